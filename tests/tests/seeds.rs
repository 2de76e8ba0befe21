//! What the seed documents promise and no other file shows: their installation steps followed to the letter, the page of errors, and limits
//! that two cannot pass at once.

use anyhow::{Context, Result, ensure};
use local::{
    parts::{folder, postgres::Role},
    schema,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use tests::{Database, database::first_column, supervisor_binary};
use tokio::time::{Duration, sleep};
use tokio_postgres::Client;

/// Tables without forced row level security, and those that a visitor may read although they are not the price list.
const OPEN: &str = "
    select class.oid::regclass::text from pg_class as class
    where class.relnamespace in ('public'::regnamespace, 'private'::regnamespace) and class.relkind in ('r', 'p')
      and (not (class.relrowsecurity and class.relforcerowsecurity)
        or has_any_column_privilege('anon', class.oid, 'select, insert, update')
          and class.relname not in ('subscription_plans', 'plan_prices', 'plan_price_meters'))";
const TABLES: &str = "select tablename::text from pg_tables where schemaname = 'public'";

async fn paste(client: &Client, sql: &str, what: &str) -> Result<()> {
    client.batch_execute(sql).await.with_context(|| what.to_owned())
}

#[tokio::test]
async fn the_first_option_of_the_store_document_ends_walled() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let owner = database.connect(Role::Owner).await?;
    let files = schema::files()?;
    let named =
        ["00_enums_and_types", "01_stores_and_settings", "02_products_and_orders", "03_calls_and_conversations"];
    // In the order that the document says, and once more: it promises that of the types, and a person tries it with all.
    for round in ["once", "twice"] {
        for (file, name) in files.iter().zip(named) {
            assert!(file.name.starts_with(name), "{} is not {name}", file.name);
            paste(&owner, &file.sql, &format!("{name}, {round}")).await?;
        }
    }
    let tables = first_column(&owner, TABLES).await?;
    for table in ["stores", "settings", "customers", "products", "orders", "order_line_items", "calls", "conversations"]
    {
        assert!(tables.iter().any(|known| known == table), "{table} is not among {tables:?}");
    }
    assert_eq!(first_column(&owner, OPEN).await?, Vec::<String>::new());
    // It works by itself: a store has its settings.
    paste(
        &owner,
        "insert into public.organizations (id, name) values ('00000000-0000-4000-8000-000000000001', 'One');
         insert into public.stores (organization_id, name, domain, platform)
         values ('00000000-0000-4000-8000-000000000001', 'Shop', 'shop.example.com', 'shopify')",
        "a store",
    )
    .await?;
    assert_eq!(first_column(&owner, "select count(*)::text from public.settings").await?, ["12"]);
    Ok(())
}

#[tokio::test]
async fn the_second_option_and_the_quick_setup_end_walled() -> Result<()> {
    let supabase = folder::workspace()?.join("supabase");
    let master = fs::read_to_string(supabase.join("master_schema.sql"))?;
    let seed = fs::read_to_string(supabase.join("seed.sql"))?;
    for types_first in [true, false] {
        let database = Database::bare(supervisor_binary!()).await?;
        let owner = database.connect(Role::Owner).await?;
        if types_first {
            paste(&owner, &schema::files()?[0].sql, "the types").await?;
        }
        paste(&owner, &master, "the schema").await?;
        paste(&owner, &seed, "the seed").await?;
        paste(&owner, &seed, "the seed, twice").await?;
        assert!(first_column(&owner, TABLES).await?.len() > 50);
        assert_eq!(first_column(&owner, OPEN).await?, Vec::<String>::new());
        let plans = "select slug from public.subscription_plans order by sort_order";
        assert_eq!(first_column(&owner, plans).await?, ["free", "pro", "enterprise"]);
    }
    Ok(())
}

#[tokio::test]
async fn seeding_again_keeps_an_operator_s_edits_and_gives_who_has_none_a_trial() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let owner = database.connect(Role::Owner).await?;
    let edits = "
        update public.subscription_plans set features = features || '{\"max_users\": 4}', tier = 'enterprise' where slug = 'pro';
        update public.plan_prices set retired_at = now() where plan_id = (select id from public.subscription_plans where slug = 'pro');
        insert into public.plan_prices (plan_id, version, billing_cycle, base_minor)
        select id, 2, 'monthly', 1249900 from public.subscription_plans where slug = 'pro';
        delete from public.tax_rates where country_code = 'GB';
        insert into public.tax_rates (country_code, scope, name, rate_bp) values ('GB', 'any', 'VAT', 2100);
        insert into public.organizations (id, name) values ('00000000-0000-4000-8000-000000000001', 'One')";
    paste(&owner, edits, "an operator's edits").await?;
    let seed = fs::read_to_string(folder::workspace()?.join("supabase/seed.sql"))?;
    for round in ["once", "twice"] {
        paste(&owner, &seed, round).await?;
    }
    let kept = "
        select concat_ws(' ', plan.features ->> 'max_users', plan.tier,
          (select string_agg(concat(price.version, ':', price.base_minor, case when price.retired_at is null then '' else '-' end), ' '
             order by price.version, price.base_minor)
           from public.plan_prices as price where price.plan_id = plan.id))
        from public.subscription_plans as plan where plan.slug = 'pro'
        union all select string_agg(rate_bp::text, ' ') from public.tax_rates where country_code = 'GB'
        union all
        select concat_ws(' ', plan.slug, subscription.status, subscription.trial_ends_at - subscription.created_at)
        from public.subscriptions as subscription join public.subscription_plans as plan on plan.id = subscription.plan_id";
    assert_eq!(
        first_column(&owner, kept).await?,
        ["4 enterprise 1:999900- 1:9999000- 2:1249900", "2100", "free trialing 14 days"]
    );
    Ok(())
}

#[tokio::test]
async fn of_two_who_take_the_last_place_of_a_plan_at_once_one_does() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let admin = database.connect(Role::Admin).await?;
    paste(
        &admin,
        "update public.subscription_plans set features = '{\"max_leads\": 1}' where slug = 'free';
         insert into public.organizations (id, name) values ('00000000-0000-4000-8000-000000000001', 'One');
         select private.subscribe_organization('00000000-0000-4000-8000-000000000001', 'free', 'trialing', now())",
        "an organization with room for one lead",
    )
    .await?;
    let add =
        "begin; insert into public.leads (organization_id, name) values ('00000000-0000-4000-8000-000000000001', 'x')";
    let (first, second) = (database.connect(Role::Owner).await?, database.connect(Role::Owner).await?);
    first.batch_execute(add).await?;
    // The second begins while the first is not committed, and so cannot see it.
    let later = tokio::spawn(async move { second.batch_execute(&format!("{add}; commit")).await });
    sleep(Duration::from_millis(300)).await;
    first.batch_execute("commit").await?;
    let refused = later.await?.expect_err("both were taken");
    let told = refused.as_db_error().map_or_else(String::new, |error| error.message().to_owned());
    assert!(told.contains("quota_exhausted"), "{told}");
    assert_eq!(first_column(&admin, "select count(*)::text from public.leads").await?, ["1"]);
    Ok(())
}

/// The codes that a text of statements raises, with their status.
fn raised_in_sql(sql: &str) -> Vec<(String, String)> {
    let mut raised = Vec::new();
    for (before, call) in sql.match_indices("raise_error(").map(|(at, call)| sql.split_at(at + call.len())) {
        let Some((status, rest)) = call.trim_start().split_once(',') else { continue };
        if status.len() != 3 || !status.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let rest = rest.trim_start();
        let code = match rest.strip_prefix('\'') {
            Some(rest) => rest.split('\'').next(),
            // Named by the comparison just before: `if obstacle = 'x' then`.
            None => before.rsplit('\'').nth(1),
        };
        raised.push((status.to_owned(), code.unwrap_or_default().to_owned()));
    }
    // What is said of one usage event among others.
    for part in sql.split("case result.code").skip(1) {
        let said = part.split("end").next().unwrap_or_default();
        raised.extend(
            said.split("when '")
                .skip(1)
                .filter_map(|when| when.split('\'').next())
                .map(|code| ("422".to_owned(), code.to_owned())),
        );
    }
    raised
}

/// The codes that a Rust source makes, with their status where it stands beside them.
fn raised_in_rust(source: &str) -> Vec<(String, String)> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut raised = Vec::new();
    let literal = |text: &str| {
        let code = text.trim_start().strip_prefix('"')?.split('"').next()?;
        code.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            .then(|| code.to_owned())
    };
    for call in source.split("::new(").skip(1) {
        let Some(rest) = call.trim_start().strip_prefix("StatusCode::") else { continue };
        let Some((status, rest)) = rest.split_once(',') else { continue };
        if let Some(code) = literal(rest) {
            raised.push((status_number(status).to_owned(), code));
        }
    }
    for start in [
        "\") => \"",
        "c.starts_with(\"PGRST3\") => \"",
        "(_, \"\") => \"",
        "error.code = \"",
        "outcome.code.unwrap_or_else(|| \"",
    ] {
        for rest in source.split(start).skip(1) {
            raised.extend(literal(&format!("\"{rest}")).map(|code| (String::new(), code)));
        }
    }
    raised
}

fn status_number(name: &str) -> &'static str {
    match name {
        "BAD_REQUEST" => "400",
        "UNAUTHORIZED" => "401",
        "PAYMENT_REQUIRED" => "402",
        "FORBIDDEN" => "403",
        "NOT_FOUND" => "404",
        "METHOD_NOT_ALLOWED" => "405",
        "CONFLICT" => "409",
        "PAYLOAD_TOO_LARGE" => "413",
        "UNPROCESSABLE_ENTITY" => "422",
        "TOO_MANY_REQUESTS" => "429",
        "INTERNAL_SERVER_ERROR" => "500",
        "BAD_GATEWAY" => "502",
        "SERVICE_UNAVAILABLE" => "503",
        _ => "an unknown status",
    }
}

/// Every Rust file below a folder's `src`.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                if !matches!(path.file_name().and_then(|name| name.to_str()), Some("tests" | "target")) {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[test]
fn the_page_of_errors_lists_every_code_that_is_raised_and_no_other() -> Result<()> {
    let workspace = folder::workspace()?;
    let mut raised: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut note = |found: Vec<(String, String)>| {
        for (status, code) in found {
            let statuses = raised.entry(code).or_default();
            if !status.is_empty() {
                statuses.insert(status);
            }
        }
    };
    for file in schema::files()? {
        note(raised_in_sql(&file.sql));
    }
    for folder in ["functions", "shared"] {
        for path in sources(&workspace.join(folder))? {
            note(raised_in_rust(&fs::read_to_string(&path)?));
        }
    }
    ensure!(raised.len() > 60, "only {} codes were found: {raised:?}", raised.len());

    let page = fs::read_to_string(workspace.join("docs/errors.md"))?;
    let mut listed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (status, codes) = (cells.next().unwrap_or_default(), cells.next().unwrap_or_default());
        for code in codes.split('`').skip(1).step_by(2) {
            listed.entry(code.to_owned()).or_default().insert(status.to_owned());
        }
    }
    let missing: Vec<String> = raised
        .iter()
        .filter(|(code, statuses)| listed.get(*code).is_none_or(|known| !statuses.is_subset(known)))
        .map(|(code, statuses)| {
            format!("| {} | `{code}` |", Vec::from_iter(statuses.iter().map(String::as_str)).join(" "))
        })
        .collect();
    let unknown: Vec<&String> = listed.keys().filter(|code| !raised.contains_key(*code)).collect();
    assert!(missing.is_empty(), "docs/errors.md does not list:\n{}", missing.join("\n"));
    assert!(unknown.is_empty(), "docs/errors.md lists what nothing raises: {unknown:?}");
    Ok(())
}
