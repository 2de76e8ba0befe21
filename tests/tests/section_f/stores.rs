//! Experiments 1 and 6, and what else stores and properties have that two may touch at once.

use crate::world::{World, count, gives, meet, refused};
use anyhow::Result;

/// How many customers' totals do not say what their orders say.
const WRONG_TOTALS: &str = "select private.recompute_customer_totals(scene.id('8000', 1), scene.id('a000', 1))";

#[tokio::test]
async fn f01_two_orders_at_once_both_count_for_their_customer() -> Result<()> {
    let world = World::new().await?;
    let answers = world.meet("select scene.place('one', 1, 1000)", "select scene.place('two', 1, 1000)").await?;
    assert_eq!(answers, (gives(""), gives("")));
    assert_eq!(world.is("select scene.totals(1)").await?, "USD 2 2000 2000; 2");
    Ok(())
}

#[tokio::test]
async fn f01_a_refund_and_another_order_at_once_both_count() -> Result<()> {
    let world = World::with("select scene.place('one', 1, 1000)").await?;
    let refund = "update public.orders set total_refunded_minor = 300 where external_id = 'one'";
    let answers = world.meet(refund, "select scene.place('two', 1, 1000, 'JPY')").await?;
    assert_eq!(answers, (gives(""), gives("")));
    assert_eq!(world.is("select scene.totals(1)").await?, "JPY 1 1000 1000, USD 1 1000 700; 2");
    Ok(())
}

#[tokio::test]
async fn f01_orders_that_change_customers_crosswise_at_once_do_not_block_each_other_for_good() -> Result<()> {
    let world = World::with("select scene.place('one', 1, 1000), scene.place('two', 2, 500)").await?;
    let moved = |order: &str, to: u8| {
        format!("update public.orders set customer_id = scene.id('b000', {to}) where external_id = '{order}'")
    };
    // Both stand before the same customer.
    let (holder, one, other) = (world.session().await?, world.session().await?, world.session().await?);
    holder.done("begin; select 1 from public.customers where id = scene.id('b000', 1) for no key update").await?;
    let one = one.start(&moved("one", 2));
    one.waits().await?;
    let other = other.start(&moved("two", 1));
    other.waits().await?;
    // Neither has the other customer already, for which the one who goes first would wait for good.
    world.is("select 1 from public.customers where id = scene.id('b000', 2) for no key update nowait").await?;
    holder.done("commit").await?;
    assert_eq!((one.ends().await?, other.ends().await?), (gives(""), gives("")));
    assert_eq!(world.is("select scene.totals(1)").await?, "USD 1 500 500; 1");
    assert_eq!(world.is("select scene.totals(2)").await?, "USD 1 1000 1000; 1");
    Ok(())
}

#[tokio::test]
async fn f01_whatever_sixteen_sessions_do_to_orders_at_once_totals_are_those_of_the_orders() -> Result<()> {
    let world = World::new().await?;
    world.is("select scene.place('old' || n, 1 + n % 2, n, 'INR') from generate_series(1, 16) as n").await?;
    let busy = |session: i32| {
        let number = |change: &str| format!("update public.orders set {change} where external_id = 'old{session}'");
        [
            format!("select scene.place('new{session}', 1 + {session} % 2, 100 + {session}, 'USD')"),
            number("customer_id = scene.id('b000', 1)"),
            number("total_refunded_minor = 1, currency_code = 'USD'"),
            number("customer_id = scene.id('b000', 2)"),
            format!(
                "update public.orders set status = 'refunded' where external_id = 'new{session}' and {session} % 4 = 0"
            ),
            format!("delete from public.orders where external_id = 'old{session}' and {session} % 3 = 0"),
        ]
    };
    // Each statement is a transaction of its own, so that they take turns.
    for step in 0..busy(1).len() {
        let done =
            world.crowd((1..=16).map(|session| busy((session + 5 * step as i32) % 16 + 1)[step].clone())).await?;
        assert!(done.iter().all(Result::is_ok), "{done:?}");
    }
    assert_eq!(world.is("select count(*) from public.orders").await?, "27");
    assert_eq!(world.is(WRONG_TOTALS).await?, "0");
    Ok(())
}

#[tokio::test]
async fn f06_of_two_messages_at_once_both_are_taken_and_the_later_one_is_the_last_activity() -> Result<()> {
    let world = World::new().await?;
    // The one said later is told first, and so has the lower number.
    let (later, earlier) =
        world.meet("select scene.say('later', '10 minutes')", "select scene.say('earlier', '20 minutes')").await?;
    assert_eq!((later, earlier), (gives("0"), gives("1")));
    let ago = "select date_trunc('minute', private.clock_now() - last_activity_at + interval '1 second') from public.conversations";
    assert_eq!(world.is(ago).await?, "00:10:00");
    Ok(())
}

#[tokio::test]
async fn f06_messages_of_sixteen_sessions_in_any_order_are_numbered_without_a_gap() -> Result<()> {
    let world = World::new().await?;
    let said = world.crowd((0..16).map(|n| {
        let minutes = 5 + n * 7 % 16;
        format!("select scene.say('{n}', '{minutes} minutes')")
    }));
    assert!(said.await?.iter().all(Result::is_ok));
    let numbers =
        "select string_agg(message_index::text, ' ' order by message_index) from public.conversation_messages";
    assert_eq!(world.is(numbers).await?, "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15");
    let last =
        "select last_activity_at = (select max(timestamp) from public.conversation_messages) from public.conversations";
    assert_eq!(world.is(last).await?, "t");
    Ok(())
}

#[tokio::test]
async fn of_two_versions_of_a_row_at_once_the_source_s_newer_one_stays() -> Result<()> {
    let world = World::new().await?;
    let synced = |name: &str, time: &str| {
        format!(
            "update public.customers set first_name = '{name}', source_updated_at = '2026-11-24T{time}Z'
             where id = scene.id('b000', 1) returning first_name"
        )
    };
    let (newer, older) = world.meet(&synced("Newer", "03:00"), &synced("Older", "02:00")).await?;
    assert_eq!((newer, older), (gives("Newer"), gives("")), "the older one writes nothing, and is told so");
    let row = "select first_name || ' ' || (source_updated_at = '2026-11-24T03:00Z') || ' ' || (updated_at > source_updated_at)
               from public.customers where id = scene.id('b000', 1)";
    assert_eq!(world.is(row).await?, "Newer true true");
    // What is changed here is ours; when the source last changed it stays the source's.
    world
        .is("update public.customers set tags = '{vip}', updated_at = updated_at where id = scene.id('b000', 1)")
        .await?;
    assert_eq!(world.is(row).await?, "Newer true true");
    Ok(())
}

#[tokio::test]
async fn of_two_who_reserve_a_property_at_once_one_wins() -> Result<()> {
    let world = World::new().await?;
    let reserve = "select public.reserve_property(scene.id('9300', 1)) ->> 'status'";
    let (first, second) = (world.session_of_owner(1).await?, world.session_of_owner(1).await?);
    let answers = meet(&first, reserve, &second, reserve).await?;
    assert_eq!(answers, (gives("held"), refused("property_not_available")));
    // Whoever goes round the function meets the index.
    let by_hand = "insert into public.property_reservations (organization_id, property_id) values (scene.id('8000', 1), scene.id('9300', 1)) returning 'held'";
    let release = "select public.set_property_status(scene.id('9300', 1), 'available') ->> 'status'";
    assert_eq!(first.done(release).await?, "available");
    let forced = world.crowd((0..8).map(|_| by_hand.to_owned())).await?;
    assert_eq!((count(&forced, "held"), forced.iter().filter(|told| **told == refused("23505")).count()), (1, 7));
    Ok(())
}

#[tokio::test]
async fn of_two_drags_at_once_the_later_order_stands_whole_and_position_is_order_index() -> Result<()> {
    let world = World::new().await?;
    let drag = |order: &str| {
        format!(
            "select public.order_property_images(scene.id('9300', 1), array(select scene.id('9700', n) from unnest(array[{order}]) as n)) is not null"
        )
    };
    let (first, second) = (world.session_of_owner(1).await?, world.session_of_owner(1).await?);
    let answers = meet(&first, &drag("4, 3, 2, 1, 0"), &second, &drag("2, 0, 4, 1, 3")).await?;
    assert_eq!(answers, (gives("t"), gives("t")));
    let order = "select string_agg(right(id::text, 1) || order_index || position, ' ' order by order_index) from public.property_images";
    assert_eq!(world.is(order).await?, "200 011 422 133 344");
    Ok(())
}

#[tokio::test]
async fn of_two_featured_images_at_once_the_later_one_stands() -> Result<()> {
    let world = World::new().await?;
    let feature =
        |n: u8| format!("update public.property_images set is_featured = true where id = scene.id('9700', {n})");
    let answers = world.meet(&feature(1), &feature(2)).await?;
    assert_eq!(answers, (gives(""), gives("")));
    let featured = "select string_agg(right(id::text, 1), ' ') from public.property_images where is_featured";
    assert_eq!(world.is(featured).await?, "2");
    Ok(())
}
