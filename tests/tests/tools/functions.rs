//! `plpgsql_check` over every function: what the server itself would find only when a line is reached.

use anyhow::Result;
use local::parts::postgres::Role;
use std::collections::BTreeSet;
use tests::{Database, required, supervisor_binary};
use tokio_postgres::Client;

/// What it says that is not so, by function and message.
#[rustfmt::skip]
const NOT_SO: &[(&str, &str, &str)] = &[
    ("close_periods", "target type is different type than source type", "a literal without a type is read as the variable's: '{}' is an array"),
    ("empty_listed", "text type variable is not sanitized", "the assignments are erase()'s, of private.personal_data, which migrations alone write; nobody else may call it"),
    ("scrub_listed", "text type variable is not sanitized", "the type is the catalog's, and the rest is quoted; nobody but erase() may call it"),
];
/// Every body that decides by time, every job, and every function that applies news of a store has the same shape: what one of them does
/// not need of it, it need not read or set. By message, and by the parameters that such a function has.
const SHAPE: &[(&str, &str)] = &[
    ("unused parameter \"at\"", ""),
    ("unused parameter \"request\"", "request,at"),
    ("unused parameter \"source\"", "source,store,payload,at,result,error"),
    ("unused parameter \"payload\"", "source,store,payload,at,result,error"),
    ("unmodified OUT variable \"error\"", "source,store,payload,at,result,error"),
];

/// A trigger's function is judged for each table that it serves, and one that reads transition tables with all that any of its triggers
/// there names: which of them are there depends on the operation, and only the function knows. Hidden casts are not judged.
const CHECK: &str = "
    with work as materialized (
      select proc.oid, proc.proname::text as name, proc.prorettype = 'trigger'::regtype and served.relation is null as idle, served.*
      from pg_proc as proc
      join pg_language as language on language.oid = proc.prolang and language.lanname = 'plpgsql'
      left join lateral (
        select trigger.tgrelid as relation, max(trigger.tgoldtable::text)::name as old, max(trigger.tgnewtable::text)::name as new
        from pg_trigger as trigger
        where trigger.tgfoid = proc.oid and trigger.tgparentid = 0
        group by trigger.tgrelid
      ) as served on true
      where proc.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
    ), judged as materialized (select * from work where not idle)
    select judged.name, concat_ws(' ', judged.oid::regprocedure, 'on ' || judged.relation::regclass), said.level,
           coalesce(said.lineno, 0), concat_ws(' | ', said.message, said.detail, said.hint, said.query),
           (select array_to_string(proc.proargnames, ',') from pg_proc as proc where proc.oid = judged.oid)
    from judged
    cross join lateral judge.plpgsql_check_function_tb(
      funcoid => judged.oid::regprocedure, relid => coalesce(judged.relation, 0)::regclass, oldtable => judged.old,
      newtable => judged.new, fatal_errors => false, other_warnings => true, extra_warnings => true, security_warnings => true,
      performance_warnings => false
    ) as said
    union all
    select work.name, work.oid::regprocedure::text, 'error', 0, 'a trigger''s function that no trigger has', '' from work where work.idle
    order by 2, 4";

/// Whether the server has it. It is in the schema `judge` then.
async fn installed(admin: &Client) -> Result<bool> {
    let available = "select from pg_available_extensions where name = 'plpgsql_check'";
    if admin.query_opt(available, &[]).await?.is_none() {
        let version: String = admin.query_one("show server_version_num", &[]).await?.get(0);
        let major = version.parse::<u32>()? / 10_000;
        required::missing(
            "plpgsql_check",
            &format!("Install postgresql-{major}-plpgsql-check for the server that the tests use."),
        )?;
        return Ok(false);
    }
    admin.batch_execute("create schema judge; create extension plpgsql_check with schema judge").await?;
    Ok(true)
}

/// What is found and is so, a line each; and the exceptions that excepted nothing.
async fn findings(admin: &Client) -> Result<(Vec<String>, BTreeSet<&'static str>)> {
    let shaped = SHAPE.iter().map(|(message, _)| *message);
    let mut unused: BTreeSet<&str> = NOT_SO.iter().map(|(function, ..)| *function).chain(shaped).collect();
    let mut found = Vec::new();
    for row in admin.query(CHECK, &[]).await? {
        let (name, place, level): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (line, message): (i32, String) = (row.get(3), row.get(4));
        let parameters = row.get::<_, Option<String>>(5).unwrap_or_default();
        if let Some((function, ..)) = NOT_SO.iter().find(|it| it.0 == name && message.starts_with(it.1)) {
            unused.remove(function);
        } else if let Some((message, _)) =
            SHAPE.iter().find(|(known, has)| *known == message && parameters.starts_with(has))
        {
            unused.remove(message);
        } else {
            found.push(format!("{place}:{line} {level}: {message}"));
        }
    }
    Ok((found, unused))
}

#[tokio::test]
async fn plpgsql_check_passes_on_every_function() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let admin = database.connect(Role::Admin).await?;
    if !installed(&admin).await? {
        return Ok(());
    }
    let (found, unused) = findings(&admin).await?;
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(unused.is_empty(), "these exceptions except nothing: {unused:?}");

    admin
        .batch_execute(
            "create function public.forgetful(lead public.leads) returns text language plpgsql set search_path = '' as $$
             begin
               return lead.telephone;
             end $$;
             create function private.stray() returns trigger language plpgsql set search_path = '' as $$
             begin
               return new;
             end $$;
             create function private.looks_back() returns trigger language plpgsql set search_path = '' as $$
             begin
               perform before.telephone from before;
               return null;
             end $$;
             create trigger looks_back after update on public.leads referencing old table as before
               for each statement execute function private.looks_back();
             create function public.careless(name text) returns void language plpgsql set search_path = '' as $$
             begin
               execute 'drop table ' || name;
             end $$",
        )
        .await?;
    let (found, _) = findings(&admin).await?;
    for (function, told) in [
        ("forgetful(", "has no field \"telephone\""),
        ("private.stray()", "no trigger has"),
        ("private.looks_back() on leads", "telephone"),
        ("careless(", "sanitized"),
    ] {
        assert!(
            found.iter().any(|finding| finding.contains(function) && finding.contains(told)),
            "{function} was not seen: {found:#?}"
        );
    }
    Ok(())
}
