//! Nothing of an organization is readable, countable, insertable, updatable or deletable by anybody else, through any table, view or
//! function that the API exposes; and every organization's own people can do what their role lets them.
//!
//! Driven by the catalog: a table or function that is added later is judged at once, and fails until `tests::tenants::matrix` says who
//! may do what with it. With `DATABASE_URL` set (a superuser's), that database is judged, and left as it was.

use anyhow::{Result, ensure};
use local::parts::postgres::{self, Role};
use std::env;
use tests::{
    Database, supervisor_binary,
    tenants::{
        Proof,
        matrix::OPEN_BY_INTENT,
        people::{Persona, everybody},
    },
};

async fn proof() -> Result<(Option<Database>, Proof)> {
    if let Ok(url) = env::var("DATABASE_URL") {
        return Ok((None, Proof::begin(postgres::connect(&url).await?).await?));
    }
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Admin).await?;
    Ok((Some(database), Proof::begin(client).await?))
}

#[tokio::test]
async fn nobody_reaches_another_organization_and_everybody_reaches_their_own() -> Result<()> {
    let (_database, proof) = proof().await?;
    let mut wrong = proof.gaps();
    wrong.extend(proof.structure().await?);
    for table in &proof.tables {
        wrong.extend(proof.table(table).await?);
        wrong.extend(proof.ways(table).await?);
    }
    println!("tables: {:?}", proof.count());
    let functions = proof.functions().await?;
    for function in &functions {
        wrong.extend(proof.function(*function).await?);
    }
    for function in proof.public_functions().await? {
        wrong.extend(proof.uses(&function).await?);
    }
    let count = proof.count();
    let (tables, people) = (proof.tables.len(), everybody().len());
    println!("{tables} tables, {} functions, {people} personas: {count:?}", functions.len());
    ensure!(wrong.is_empty(), "{} findings:\n{}", wrong.len(), wrong.join("\n"));
    // A database that refuses everything would pass the half of it.
    ensure!(count.allowed >= count.denied, "there are too few allows: {count:?}");
    Ok(())
}

#[tokio::test]
async fn opening_any_one_policy_is_found() -> Result<()> {
    let (_database, proof) = proof().await?;
    let (mut made, mut missed) = (0, Vec::new());
    for table in &proof.tables {
        let name = &table.name;
        let policies = format!(
            "select format('alter policy %I on public.{name}%s%s', polname,
               case when polqual is not null then ' using (true)' end, case when polwithcheck is not null then ' with check (true)' end)
             from pg_policy where polrelid = 'public.{name}'::regclass order by polname"
        );
        for change in proof.strings(&policies).await? {
            if OPEN_BY_INTENT.contains(&name.as_str()) {
                continue;
            }
            made += 1;
            if proof.after(&change, async |proof| proof.table(table).await).await?.is_empty() {
                missed.push(change);
            }
        }
    }
    // No grant reaches an internal table, so that nobody could tell by trying: the catalog does.
    let closed = "select format('alter policy %I on %s using (true) with check (true)', polname, polrelid::regclass) from pg_policy
         where polrelid in (select oid from pg_class where relnamespace = 'private'::regnamespace)";
    for change in proof.strings(closed).await? {
        made += 1;
        if proof.after(&change, async |proof| proof.structure().await).await?.is_empty() {
            missed.push(change);
        }
    }
    println!("{made} policies opened, one at a time");
    ensure!(made > 50 && missed.is_empty(), "not found:\n{}", missed.join("\n"));
    Ok(())
}

#[tokio::test]
async fn dropping_row_level_security_on_any_one_table_is_found() -> Result<()> {
    let (_database, proof) = proof().await?;
    let (mut made, mut missed) = (0, Vec::new());
    for table in &proof.tables {
        made += 1;
        let change = format!("alter table public.{} disable row level security", table.name);
        let found = proof
            .after(&change, async |proof| {
                Ok((proof.structure().await?.is_empty(), proof.table(table).await?.is_empty()))
            })
            .await?;
        if found != (false, false) {
            missed.push(format!("{change}: {found:?}"));
        }
    }
    let others = "select format('alter table %s %s', class.oid::regclass, way) from pg_class as class
         cross join unnest(array['disable row level security', 'no force row level security']) as way
         where relkind in ('r', 'p') and (relnamespace = 'private'::regnamespace
           or relnamespace = 'public'::regnamespace and way ~ '^no')";
    for change in proof.strings(others).await? {
        made += 1;
        if proof.after(&change, async |proof| proof.structure().await).await?.is_empty() {
            missed.push(change);
        }
    }
    println!("row level security dropped {made} times");
    ensure!(made > 50 && missed.is_empty(), "not found:\n{}", missed.join("\n"));
    Ok(())
}

#[tokio::test]
async fn granting_any_one_definer_function_is_found() -> Result<()> {
    let (_database, proof) = proof().await?;
    let grants = "select format('grant execute on function %s to %I', proc.oid::regprocedure, role)
         from pg_proc as proc cross join unnest(array['anon', 'authenticated']) as role
         where pronamespace in ('public'::regnamespace, 'private'::regnamespace) and prosecdef
           and not has_function_privilege(role, proc.oid, 'execute')";
    let (mut made, mut missed) = (0, Vec::new());
    for change in proof.strings(grants).await? {
        made += 1;
        if proof.after(&change, async |proof| proof.structure().await).await?.is_empty() {
            missed.push(change);
        }
    }
    println!("{made} grants of definer functions");
    ensure!(made > 50 && missed.is_empty(), "not found:\n{}", missed.join("\n"));
    Ok(())
}

#[tokio::test]
async fn a_function_that_is_closed_to_its_users_or_open_to_all_is_found() -> Result<()> {
    let (_database, proof) = proof().await?;
    let mut missed = Vec::new();
    let functions = proof.public_functions().await?;
    for function in &functions {
        let closed = format!(
            "do $$ declare known regprocedure; begin
               for known in select oid from pg_proc where pronamespace = 'public'::regnamespace and proname = '{function}' loop
                 execute format('revoke execute on function %s from authenticated', known);
               end loop;
             end $$"
        );
        if proof.after(&closed, async |proof| proof.uses(function).await).await?.is_empty() {
            missed.push(closed);
        }
    }
    // As if every body had forgotten to ask for the permission.
    let open = "create or replace function private.require_org(permission text) returns uuid
         language sql stable security definer set search_path = '' as $$ select private.get_auth_org_id() $$";
    let mut found = 0;
    for function in &functions {
        found += usize::from(!proof.after(open, async |proof| proof.uses(function).await).await?.is_empty());
    }
    ensure!(missed.is_empty() && functions.len() > 20, "not found:\n{}", missed.join("\n"));
    ensure!(found > 15, "only {found} functions were found to ask no permission");
    Ok(())
}

#[test]
fn the_personas_are_all_there() {
    let names: Vec<&str> = everybody().iter().map(|persona: &Persona| persona.name).collect();
    for wanted in ["anon", "suspended", "owner", "admin", "member", "custom role", "without an organization"] {
        assert!(names.iter().any(|name| name.contains(wanted)), "{wanted} is not among {names:?}");
    }
}
