//! The faults of the seed systems that need two at once to show, each with real sessions that meet.

use anyhow::Result;
use local::{parts::postgres::Role, schema::data};
use tests::{Database, supervisor_binary};
use tokio::time::{Duration, sleep};

const SHOP: &str = "
    insert into public.stores (id, organization_id, name, domain, platform)
    select '00000000-0000-4000-8000-0000000000aa', id, 'Shop', 'shop.example.com', 'shopify' from public.organizations;
    insert into public.customers (id, organization_id, store_id, external_id)
    select '00000000-0000-4000-8000-0000000000bb', id, '00000000-0000-4000-8000-0000000000aa', 'c1' from public.organizations;";

fn order(id: &str) -> String {
    format!(
        "begin;
         insert into public.orders (organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
         select id, '00000000-0000-4000-8000-0000000000aa', '00000000-0000-4000-8000-0000000000bb', '{id}', 1000, 1000, 'USD', now()
         from public.organizations"
    )
}

#[tokio::test]
async fn two_orders_at_once_both_count_for_their_customer() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let mut admin = database.connect(Role::Admin).await?;
    data::generate(&mut admin, data::Amount { seed: 1, organizations: 1, leads: 1, calls: 0 }).await?;
    admin.batch_execute(SHOP).await?;
    let (first, second) = (database.connect(Role::Owner).await?, database.connect(Role::Owner).await?);
    first.batch_execute(&order("one")).await?;
    // The second begins while the first is not committed, and so cannot see it.
    let later = tokio::spawn(async move {
        second.batch_execute(&order("two")).await?;
        second.batch_execute("commit").await
    });
    sleep(Duration::from_millis(300)).await;
    first.batch_execute("commit").await?;
    later.await??;
    let total = admin.query_one("select total_orders, total_spent_minor from public.customer_totals", &[]).await?;
    assert_eq!((total.get::<_, i32>(0), total.get::<_, i64>(1)), (2, 2000));
    Ok(())
}

#[tokio::test]
async fn of_two_debits_of_25_from_39_at_once_one_is_taken() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let mut admin = database.connect(Role::Admin).await?;
    data::generate(&mut admin, data::Amount { seed: 1, organizations: 1, leads: 1, calls: 0 }).await?;
    let credit = "select private.post_credit(id, 'purchase', 'INR', 39, 'bought', now()) from public.organizations";
    admin.batch_execute(credit).await?;
    let mut debits = Vec::new();
    for key in ["one", "two"] {
        let session = database.connect(Role::Owner).await?;
        debits.push(tokio::spawn(async move {
            let debit = "select private.debit_credit(id, 'INR', 25, $1, now()) from public.organizations";
            session.query_one(debit, &[&key]).await.map(|row| row.get::<_, i64>(0))
        }));
    }
    let mut taken = Vec::new();
    for debit in debits {
        taken.push(debit.await??);
    }
    taken.sort_unstable();
    assert_eq!(taken, [0, 25]);
    Ok(())
}
