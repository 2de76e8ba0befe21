//! The ways to install that the two seed documents describe, followed to the letter as whoever pastes into the SQL editor: the role
//! `postgres`, which is no superuser. Each is done twice, since a person who is not sure does.

use anyhow::{Context, Result, ensure};
use local::parts::{folder, postgres::Role};
use std::{collections::BTreeSet, fs, time::Instant};
use tests::{Database, Fingerprint, database::first_column, supervisor_binary};
use tokio_postgres::{Client, error::SqlState};

const OPTION_1: &[&str] = &[
    "schemas/00_enums_and_types.sql",
    "schemas/01_stores_and_settings.sql",
    "schemas/02_products_and_orders.sql",
    "schemas/03_calls_and_conversations.sql",
];
const OPTION_2: &[&str] = &["schemas/00_enums_and_types.sql", "master_schema.sql"];
const QUICK_SETUP: &[&str] = &["master_schema.sql", "seed.sql"];
/// What a visitor may read: what is for sale. There is nothing in it before the seed.
const PRICE_LIST: &[&str] = &["plan_price_meters", "plan_prices", "subscription_plans"];
/// What a screen watches live.
const WATCHED: &[&str] = &["call_logs", "call_queue", "campaign_leads", "campaigns", "conversations"];

/// Organizations A and B with an owner each, and somebody who is in none.
const PEOPLE: &str = "
    insert into auth.users (id, email) values
      ('00000000-0000-4000-8000-0000000000aa', 'a@example.com'), ('00000000-0000-4000-8000-0000000000bb', 'b@example.com'),
      ('00000000-0000-4000-8000-0000000000cc', 'c@example.com');
    insert into public.organizations (id, name) values
      ('00000000-0000-4000-8000-00000000000a', 'A'), ('00000000-0000-4000-8000-00000000000b', 'B');
    update public.profiles set organization_id = '00000000-0000-4000-8000-00000000000a', system_role = 'owner'
    where id = '00000000-0000-4000-8000-0000000000aa';
    update public.profiles set organization_id = '00000000-0000-4000-8000-00000000000b', system_role = 'owner'
    where id = '00000000-0000-4000-8000-0000000000bb';";

async fn paste(client: &Client, name: &str) -> Result<()> {
    let sql = fs::read_to_string(folder::workspace()?.join("supabase").join(name))?;
    let begun = Instant::now();
    client.batch_execute(&sql).await.with_context(|| name.to_owned())?;
    println!("{name}: {} ms", begun.elapsed().as_millis());
    Ok(())
}

/// Every table that was made has its walls; those that a visitor may read.
async fn open_to_visitors(client: &Client) -> Result<BTreeSet<String>> {
    let made = "select oid::regclass::text, relkind in ('v', 'm') or relrowsecurity and relforcerowsecurity
                from pg_class where relkind in ('r', 'p', 'v', 'm') and pg_get_userbyid(relowner) = 'postgres' order by 1";
    let mut open = BTreeSet::new();
    for row in client.query(made, &[]).await? {
        let (table, walled): (String, bool) = (row.get(0), row.get(1));
        ensure!(walled, "{table} is without row level security, or it is not forced");
        let read = client.batch_execute(&format!("begin; set local role anon; select from {table} limit 1")).await;
        client.batch_execute("rollback").await?;
        match read {
            Ok(()) => open.insert(table),
            Err(error) => {
                ensure!(error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{table}: {error:?}");
                false
            }
        };
    }
    Ok(open)
}

fn names(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|name| (*name).to_owned()).collect()
}

/// What a user reads with a query, in a transaction that is rolled back.
async fn as_user(client: &Client, end_of_id: &str, sql: &str) -> Result<Vec<String>> {
    let claims = format!("{{\"sub\":\"00000000-0000-4000-8000-0000000000{end_of_id}\",\"role\":\"authenticated\"}}");
    client
        .batch_execute(&format!(
            "begin; set local role authenticated; select set_config('request.jwt.claims', '{claims}', true)"
        ))
        .await?;
    let read = first_column(client, sql).await;
    client.batch_execute("rollback").await?;
    read
}

#[tokio::test]
async fn callai_option_1_four_files_in_order_and_nothing_else() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    for _ in 0..2 {
        for name in OPTION_1 {
            paste(&client, name).await?;
            // After each file, and not only at the end: a person may stop anywhere.
            assert_eq!(open_to_visitors(&client).await?, BTreeSet::new(), "after {name}");
        }
    }
    client.batch_execute(PEOPLE).await?;
    client
        .batch_execute(
            "insert into public.stores (organization_id, name, domain, platform, owner_email)
             select id, name, lower(name) || '.example.com', 'shopify', lower(name) || '@example.com' from public.organizations",
        )
        .await?;
    for (user, stores) in [("aa", vec!["A"]), ("bb", vec!["B"]), ("cc", vec![])] {
        assert_eq!(as_user(&client, user, "select name from public.stores").await?, stores, "{user}");
    }
    let made = as_user(
        &client,
        "aa",
        "insert into public.customers (store_id, external_id) select id, '1' from public.stores returning external_id",
    );
    assert_eq!(made.await?, ["1"]);
    Ok(())
}

#[tokio::test]
async fn callai_option_2_the_enums_and_the_master_schema() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    for _ in 0..2 {
        for name in OPTION_2 {
            paste(&client, name).await?;
        }
        assert_eq!(open_to_visitors(&client).await?, names(PRICE_LIST));
    }
    let offered = "begin; set local role anon; select slug from public.subscription_plans";
    assert_eq!(first_column(&client, offered).await?, Vec::<String>::new(), "nothing is for sale before the seed");
    Ok(())
}

#[tokio::test]
async fn vantage_quick_setup_the_schema_and_the_seed() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    paste(&client, QUICK_SETUP[0]).await?;
    // Whoever is there before the seed is has no plan yet.
    client.batch_execute(PEOPLE).await?;
    paste(&client, QUICK_SETUP[1]).await?;
    assert_eq!(open_to_visitors(&client).await?, names(PRICE_LIST));
    let subscribed = "select concat_ws(' ', organization.name, plan.slug, subscription.status, price.base_minor,
                        round(extract(epoch from subscription.trial_ends_at - subscription.created_at) / 3600 / 24))
                      from public.subscriptions as subscription
                      join public.organizations as organization on organization.id = subscription.organization_id
                      join public.subscription_plans as plan on plan.id = subscription.plan_id
                      join public.plan_prices as price on price.id = subscription.plan_price_id
                      order by 1";
    assert_eq!(first_column(&client, subscribed).await?, ["A free trialing 0 14", "B free trialing 0 14"]);

    // What an operator edited stays, and a second time adds nothing.
    let edits = "update public.plan_prices set base_minor = 1234500 where base_minor = 999900;
                 update public.subscription_plans set name = 'Gold', features = features || '{\"max_users\": 11}' where slug = 'pro';
                 update private.billing_issuer set legal_name = 'Somebody Ltd'";
    client.batch_execute(edits).await?;
    let edited = Fingerprint::of(&client).await?;
    for name in QUICK_SETUP {
        paste(&client, name).await?;
    }
    edited.assert_same(&Fingerprint::of(&client).await?);
    let gold = "select plan.name || ' ' || price.base_minor from public.subscription_plans as plan
                join public.plan_prices as price on price.plan_id = plan.id and price.billing_cycle = 'monthly'
                where plan.slug = 'pro'";
    assert_eq!(first_column(&client, gold).await?, ["Gold 1234500"]);
    Ok(())
}

/// The policy that the Vantage document gives as its example, for a table that somebody adds.
#[tokio::test]
async fn the_documents_example_policy_isolates_a_new_table() -> Result<()> {
    const POLICY: &str = r#"CREATE POLICY "View org leads" ON public.leads
  FOR SELECT USING (organization_id = get_auth_org_id());"#;
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    client.batch_execute(PEOPLE).await?;
    client
        .batch_execute(
            "create table public.site_visits (organization_id uuid not null references public.organizations (id), note text);
             alter table public.site_visits enable row level security;
             grant select on public.site_visits to anon, authenticated;
             insert into public.site_visits select id, name from public.organizations",
        )
        .await?;
    assert_eq!(as_user(&client, "aa", "select note from public.site_visits").await?, Vec::<String>::new());
    client.batch_execute(&POLICY.replace("public.leads", "public.site_visits")).await?;
    for (user, notes) in [("aa", vec!["A"]), ("bb", vec!["B"]), ("cc", vec![])] {
        assert_eq!(as_user(&client, user, "select note from public.site_visits").await?, notes, "{user}");
    }
    let visitor = "begin; set local role anon; select note from public.site_visits";
    let refused = client.batch_execute(visitor).await.expect_err("a visitor has no organization to ask for");
    assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
    client.batch_execute("rollback").await?;
    Ok(())
}

/// What is published for screens that watch; none where there is no such publication.
async fn published(client: &Client) -> Result<Option<BTreeSet<String>>> {
    if client.query_opt("select from pg_publication where pubname = 'supabase_realtime'", &[]).await?.is_none() {
        return Ok(None);
    }
    let members = "select c.relname::text from pg_publication_rel as r join pg_publication as p on p.oid = r.prpubid
                   join pg_class as c on c.oid = r.prrelid where p.pubname = 'supabase_realtime'";
    Ok(Some(first_column(client, members).await?.into_iter().collect()))
}

#[tokio::test]
async fn realtime_gets_the_tables_that_screens_watch_where_there_is_realtime() -> Result<()> {
    let mut migrations: Vec<String> = fs::read_dir(folder::workspace()?.join("supabase/migrations"))?
        .flatten()
        .map(|entry| format!("migrations/{}", entry.file_name().to_string_lossy()))
        .collect();
    migrations.sort();
    for files in [vec!["master_schema.sql".to_owned()], migrations] {
        for is_there in [true, false] {
            let database = Database::bare(supervisor_binary!()).await?;
            let client = database.connect(Role::Owner).await?;
            if is_there {
                assert_eq!(published(&client).await?, Some(BTreeSet::new()), "it is empty before");
            } else {
                client.batch_execute("drop publication supabase_realtime").await?;
            }
            for name in &files {
                paste(&client, name).await?;
            }
            assert_eq!(published(&client).await?, is_there.then(|| names(WATCHED)), "{files:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_publication_of_all_tables_is_left_as_it_is() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    database
        .connect(Role::Admin)
        .await?
        .batch_execute("drop publication supabase_realtime; create publication supabase_realtime for all tables")
        .await?;
    let client = database.connect(Role::Owner).await?;
    paste(&client, "master_schema.sql").await?;
    assert_eq!(published(&client).await?, Some(BTreeSet::new()));
    Ok(())
}
