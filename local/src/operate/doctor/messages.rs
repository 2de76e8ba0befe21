//! What a message comes from: those of PostgreSQL, of the pooler and of PostgREST that people who install this get, and how each is cured.

use super::Finding;
use anyhow::Result;
use tokio_postgres::Client;

/// Where a message says what it is about: the text between this and the next quote.
fn quoted<'a>(message: &'a str, before: &str) -> Option<&'a str> {
    let rest = &message[message.find(before)? + before.len()..];
    let rest = rest.trim_start_matches([' ', '"', '\'']);
    let end = rest.find(['"', '\'', ' ', ';', ',']).unwrap_or(rest.len());
    rest.get(..end).filter(|name| !name.is_empty())
}

/// Why the database could not be connected to.
pub(super) fn of_connecting(message: &str) -> Finding {
    let known: [(&str, &str, &str); 6] = [
        (
            "password authentication failed",
            "the password in the database's address is wrong",
            "take the address from the project's settings, Database; a special character in the password is written as %40 and the like",
        ),
        (
            "Tenant or user not found",
            "the pooler does not know the project: its region or the user's name is wrong",
            "the user is postgres.<ref> at a pooler, and postgres at the direct address; copy the whole address from the project's settings",
        ),
        (
            "ENOIDENTIFIER",
            "the pooler does not know the project: the user's name lacks it",
            "the user is postgres.<ref> at a pooler; copy the whole address from the project's settings",
        ),
        (
            "failed to lookup address",
            "the host's name is not known here; the direct address is IPv6 alone",
            "take the session pooler's address (port 5432) from the project's settings",
        ),
        (
            "refused",
            "nothing listens there",
            "is the project paused, or the port another one? `cargo up` prints the address of a local stack",
        ),
        (
            "no pg_hba.conf entry",
            "the database does not let this user in from here",
            "use the role postgres; look at the project's network restrictions",
        ),
    ];
    let found = known.iter().find(|(pattern, ..)| message.contains(pattern));
    match found {
        Some((_, cause, cure)) => Finding::fault("connection", *cause, *cure),
        None => Finding::fault("connection", message, "compare the address with the project's settings, Database"),
    }
}

/// What an error message comes from in this database.
pub(super) async fn explain(client: &Client, message: &str) -> Result<Finding> {
    let subject = "that message";
    if let Some(relation) = message.contains("does not exist").then(|| quoted(message, "relation")).flatten() {
        return missing_relation(client, relation).await;
    }
    if message.contains("permission denied for") {
        let object = ["table", "view", "schema", "function"]
            .iter()
            .find_map(|kind| quoted(message, &format!("permission denied for {kind}")))
            .unwrap_or_default();
        return denied(client, object).await;
    }
    if let Some(constraint) = quoted(message, "duplicate key value violates unique constraint") {
        return duplicate(client, constraint).await;
    }
    let known: [(&str, &str, &str); 9] = [
        (
            "violates row-level security",
            "the user's role lacks the permission for that, or the row names another organization",
            "leave organization_id out, the database sets it; what a role may is in public.roles.permissions, what there is in public.permissions",
        ),
        (
            "PGRST202",
            "PostgREST does not know the function: the migrations are newer than what it read, or an argument has another name",
            "notify pgrst, 'reload schema'; then compare the arguments with docs/schema.md",
        ),
        (
            "PGRST205",
            "PostgREST does not know the table: the migrations are newer than what it read, or it is not in public",
            "notify pgrst, 'reload schema'; tables of the schema private are not for clients",
        ),
        (
            "PGRST301",
            "the user's token is none of this project's, or has expired",
            "let the client refresh the session; do app and functions name the same project?",
        ),
        (
            "JWT expired",
            "the user's token has expired",
            "let the client refresh the session (supabase-js does by itself)",
        ),
        (
            "Invalid API key",
            "the key is of another project, or was deleted",
            "take the keys from the project's settings, API keys; the secret one goes into the stack's secret (docs/deploy.md)",
        ),
        (
            "lock timeout",
            "a migration waited five seconds for a lock, and nothing has happened",
            "run it again; if it happens each time, look for what holds the table: select * from pg_stat_activity where state <> 'idle'",
        ),
        (
            "prepared statement",
            "the address is the transaction pooler's (port 6543), which does not keep prepared statements",
            "use the session pooler's address, port 5432",
        ),
        ("must be owner of", "the migrations were applied by another role before", "apply them as postgres, always"),
    ];
    let found = known.iter().find(|(pattern, ..)| message.contains(pattern));
    Ok(match found {
        Some((_, cause, cure)) => Finding::fault(subject, *cause, *cure),
        None => Finding::fault(
            subject,
            "that is none of the messages that are known here",
            "what our functions refuse has a `code`, explained in docs/errors.md; PostgreSQL's messages have an SQLSTATE",
        ),
    })
}

async fn missing_relation(client: &Client, relation: &str) -> Result<Finding> {
    let bare = relation.rsplit('.').next().unwrap_or(relation);
    let found = client
        .query(
            "select class.oid::regclass::text from pg_catalog.pg_class as class
             where class.relname = $1 and class.relkind in ('r', 'p', 'v')
               and class.relnamespace in (select space.oid from pg_catalog.pg_namespace as space where space.nspname in ('public', 'private'))",
            &[&bare],
        )
        .await?;
    let subject = "relation does not exist";
    Ok(match found.first().map(|row| row.get::<_, String>(0)) {
        Some(name) => Finding::fault(
            subject,
            format!(
                "{bare} is there, as {name}: the message comes from another project, or from a search_path without its schema"
            ),
            "does the app's address name this project? In SQL write the schema before the name",
        ),
        None => Finding::fault(
            subject,
            format!("{bare} is not in this database: the migrations were not applied here, or the name is another one"),
            "npx supabase db push --yes --remote=\"$DATABASE_URL\"; docs/schema.md lists every table",
        ),
    })
}

async fn denied(client: &Client, object: &str) -> Result<Finding> {
    let subject = "permission denied";
    let rows = client
        .query(
            "select class.oid::regclass::text, class.relnamespace = 'private'::regnamespace,
               has_table_privilege('anon', class.oid, 'select'), has_any_column_privilege('authenticated', class.oid, 'select'),
               has_any_column_privilege('authenticated', class.oid, 'insert') or has_any_column_privilege('authenticated', class.oid, 'update')
             from pg_catalog.pg_class as class
             where class.relname = $1 and class.relkind in ('r', 'p', 'v')
               and class.relnamespace in ('public'::regnamespace, 'private'::regnamespace)",
            &[&object],
        )
        .await?;
    let Some(row) = rows.first() else {
        return Ok(Finding::fault(
            subject,
            format!("there is no table {object} of ours"),
            "grant it to the role that asks, and write a policy: a grant alone shows no row",
        ));
    };
    let (name, private, anon, read, write): (String, bool, bool, bool, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    Ok(if private {
        Finding::fault(
            subject,
            format!("{name} is for the database's own functions"),
            "call the function or route that uses it (docs/schema.md)",
        )
    } else if !read {
        Finding::fault(
            subject,
            format!("no user may read {name}, whatever their role"),
            "ask the route or function that shows what may be seen of it",
        )
    } else if !write {
        Finding::fault(
            subject,
            format!("users read {name} and do not write it; without a sign-in nobody reads it either"),
            "writing goes through a function or route. For reading: is the request signed in (the user's JWT, not the publishable key alone)?",
        )
    } else if anon {
        Finding::fault(
            subject,
            format!("{name} may be read by all and written by who is signed in"),
            "send the user's JWT as Authorization: Bearer",
        )
    } else {
        Finding::fault(
            subject,
            format!(
                "{name} is for who is signed in and has an organization; some columns are written by functions alone"
            ),
            "send the user's JWT, not the publishable key alone; has the user's profile an organization_id? Leave out columns that the database sets",
        )
    })
}

async fn duplicate(client: &Client, constraint: &str) -> Result<Finding> {
    let subject = "duplicate key";
    let found = client
        .query_opt(
            "select class.indrelid::regclass::text, pg_catalog.pg_get_indexdef(class.indexrelid)
             from pg_catalog.pg_index as class join pg_catalog.pg_class as named on named.oid = class.indexrelid
             where named.relname = $1 and class.indisunique limit 1",
            &[&constraint],
        )
        .await?;
    Ok(match found.map(|row| (row.get::<_, String>(0), row.get::<_, String>(1))) {
        Some((table, definition)) => {
            let columns = definition.find('(').map_or(definition.as_str(), |at| &definition[at..]);
            Finding::fault(
                subject,
                format!("{table} has a row with the same {columns} already"),
                "supabase/seed.sql and the migrations may be run again; your own scripts say `on conflict do nothing`. From an app: show the row that is there",
            )
        }
        None => Finding::fault(
            subject,
            format!("there is no constraint {constraint} of ours in this database"),
            "does the message come from another project? Ours are in docs/schema.md",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_message_is_about_is_found_in_it() {
        assert_eq!(quoted(r#"ERROR: relation "public.leads" does not exist"#, "relation"), Some("public.leads"));
        assert_eq!(quoted("permission denied for table leads", "permission denied for table"), Some("leads"));
        assert_eq!(quoted("permission denied for table", "permission denied for table"), None);
    }

    #[test]
    fn a_connection_s_error_names_its_cause() {
        let cause = |message| of_connecting(message).cause;
        assert!(cause("FATAL: password authentication failed for user").contains("password"));
        assert!(cause("Tenant or user not found").contains("pooler"));
        assert_eq!(cause("something new"), "something new");
    }
}
