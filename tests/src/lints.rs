//! Supabase's lints 0025 to 0029, which neither its CLI nor the Postgres Language Server has yet, in words of our own.

use anyhow::{Context, Result};
use tokio_postgres::Client;

/// A lint's number and name, and the query whose rows are its findings.
const LINTS: &[(&str, &str)] = &[
    ("0025_public_bucket_allows_listing", BUCKETS),
    ("0026_pg_graphql_anon_table_exposed", GRAPHQL_ANON),
    ("0027_pg_graphql_authenticated_table_exposed", GRAPHQL_AUTHENTICATED),
    ("0028_anon_security_definer_function_executable", DEFINERS_ANON),
    ("0029_authenticated_security_definer_function_executable", DEFINERS_AUTHENTICATED),
];

/// Whoever may select from `storage.objects` may list what is in a bucket; a public one needs no policy to be read by address. Stricter
/// than the original: any policy that names no one's own folder will do. Nothing is asked of a database without Storage.
const BUCKETS: &str = "
    select format('bucket %s may be listed by policy %s', bucket.id, policy.policyname)
    from unnest(xpath('/table/row/id/text()', (
      select query_to_xml('select id from storage.buckets where public', false, false, '')
      where to_regclass('storage.buckets') is not null
    ))) as bucket (id)
    join pg_policies as policy on policy.schemaname = 'storage' and policy.tablename = 'objects'
    where policy.cmd in ('SELECT', 'ALL')
      and policy.permissive = 'PERMISSIVE'
      and policy.roles && array['public', 'anon', 'authenticated']::name[]
      and coalesce(policy.qual, '') !~ 'foldername|owner'
      and (coalesce(policy.qual, '') !~ 'bucket_id' or strpos(policy.qual, quote_literal(bucket.id::text)) > 0)";

const GRAPHQL_ANON: &str = "
    select format('%s is in the GraphQL schema that anon sees', class.oid::regclass)
    from pg_class as class
    where class.relnamespace = any ($1::text[]::regnamespace[]) and class.relkind in ('r', 'p', 'v', 'm')
      and exists (select from pg_extension where extname = 'pg_graphql')
      and has_table_privilege('anon', class.oid, 'select')";

const GRAPHQL_AUTHENTICATED: &str = "
    select format('%s is in the GraphQL schema that authenticated sees', class.oid::regclass)
    from pg_class as class
    where class.relnamespace = any ($1::text[]::regnamespace[]) and class.relkind in ('r', 'p', 'v', 'm')
      and exists (select from pg_extension where extname = 'pg_graphql')
      and has_table_privilege('authenticated', class.oid, 'select')";

const DEFINERS_ANON: &str = "
    select format('%s runs as its owner and anon may call it', proc.oid::regprocedure)
    from pg_proc as proc
    where proc.pronamespace = any ($1::text[]::regnamespace[]) and proc.prosecdef
      and has_function_privilege('anon', proc.oid, 'execute')";

const DEFINERS_AUTHENTICATED: &str = "
    select format('%s runs as its owner and authenticated may call it', proc.oid::regprocedure)
    from pg_proc as proc
    where proc.pronamespace = any ($1::text[]::regnamespace[]) and proc.prosecdef
      and has_function_privilege('authenticated', proc.oid, 'execute')";

/// What they find in the schemas that the API exposes.
pub async fn findings(client: &Client, exposed: &[&str]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (lint, query) in LINTS {
        let rows = if query.contains("$1") {
            client.query(*query, &[&exposed]).await
        } else {
            client.query(*query, &[]).await
        };
        let rows = rows.with_context(|| format!("{lint} does not run"))?;
        found.extend(rows.iter().map(|row| format!("{lint}: {}", row.get::<_, String>(0))));
    }
    Ok(found)
}
