//! `docs/schema.md`: every table of the API, from the catalog's own comments, with an entity diagram a domain.

use super::{SchemaFile, tables_of};
use anyhow::Result;
use std::{collections::BTreeMap, fmt::Write};
use tokio_postgres::Client;

struct Table {
    comment: String,
    columns: Vec<Column>,
    references: Vec<(String, String)>,
}

struct Column {
    name: String,
    kind: String,
    nullable: bool,
    default: Option<String>,
    comment: Option<String>,
    key: bool,
}

/// Reads the catalog over `client` and writes the page.
pub async fn render(client: &Client, files: &[SchemaFile]) -> Result<String> {
    let tables = read_tables(client).await?;
    let mut page = String::from(
        "# Schema\n\nFor whoever reads or queries the database. Generated from the catalog's comments by `cargo run -p local -- generate`; a \
         test fails when it is stale. Tables in `private` are internal and not listed.\n\nEvery tenant table has `organization_id`, row level \
         security enabled and forced, and composite foreign keys, so that a row cannot refer to another organization's.\n",
    );
    for file in files {
        let own: Vec<(String, &Table)> = tables_of(&file.sql)
            .into_iter()
            .filter_map(|name| name.strip_prefix("public.").map(str::to_owned))
            .filter_map(|name| tables.get(&name).map(|table| (name, table)))
            .collect();
        if own.is_empty() {
            continue;
        }
        write!(page, "\n## {}\n\n", title(&file.name))?;
        diagram(&mut page, &own)?;
        for (name, table) in &own {
            section(&mut page, name, table)?;
        }
    }
    functions(&mut page, client).await?;
    Ok(page)
}

/// `04_crm.sql` becomes `Crm`.
fn title(file: &str) -> String {
    let words = file.trim_end_matches(".sql").split_once('_').map_or(file, |(_, words)| words).replace('_', " ");
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn diagram(page: &mut String, tables: &[(String, &Table)]) -> Result<()> {
    page.push_str("```mermaid\nerDiagram\n");
    for (name, table) in tables {
        writeln!(page, "    {name} {{")?;
        for column in
            table.columns.iter().filter(|column| column.key || column.name.ends_with("_id") || column.name == "status")
        {
            let kind = column.kind.split(['(', ' ', '[']).next().unwrap_or("text");
            writeln!(page, "        {kind} {}{}", column.name, if column.key { " PK" } else { "" })?;
        }
        page.push_str("    }\n");
    }
    for (name, table) in tables {
        for (target, through) in &table.references {
            writeln!(page, "    {target} ||--o{{ {name} : {through}")?;
        }
    }
    page.push_str("```\n");
    Ok(())
}

fn section(page: &mut String, name: &str, table: &Table) -> Result<()> {
    write!(page, "\n### {name}\n\n{}\n\n| column | type | null | default | |\n|---|---|---|---|---|\n", table.comment)?;
    for column in &table.columns {
        writeln!(
            page,
            "| {} | {} | {} | {} | {} |",
            column.name,
            column.kind,
            if column.nullable { "yes" } else { "" },
            column.default.as_deref().map_or_else(String::new, |default| format!("`{}`", default.replace('|', "\\|"))),
            column.comment.as_deref().unwrap_or_default().replace('|', "\\|").replace('\n', " "),
        )?;
    }
    Ok(())
}

async fn functions(page: &mut String, client: &Client) -> Result<()> {
    page.push_str(
        "\n## Functions\n\nWhat is called through `/rest/v1/rpc/<function>`. Those that take one unnamed `jsonb` are the handlers', for \
         `service_role` alone.\n\n| function | for | |\n|---|---|---|\n",
    );
    let rows = client
        .query(
            "select p.proname::text, pg_catalog.pg_get_function_identity_arguments(p.oid), \
                    coalesce(obj_description(p.oid, 'pg_proc'), ''), \
                    has_function_privilege('authenticated', p.oid, 'execute') as users \
             from pg_catalog.pg_proc p \
             where p.pronamespace = 'public'::regnamespace and p.prorettype <> 'trigger'::regtype \
               and not exists (select from pg_catalog.pg_depend d where d.objid = p.oid and d.deptype = 'e') \
             order by 4, 1, 2",
            &[],
        )
        .await?;
    for row in rows {
        let (name, arguments, comment): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let users: bool = row.get(3);
        writeln!(
            page,
            "| `{name}({arguments})` | {} | {} |",
            if users { "users" } else { "handlers" },
            comment.replace('|', "\\|").replace('\n', " ")
        )?;
    }
    Ok(())
}

async fn read_tables(client: &Client) -> Result<BTreeMap<String, Table>> {
    let mut tables = BTreeMap::new();
    let rows = client
        .query(
            "select c.relname::text, coalesce(obj_description(c.oid, 'pg_class'), ''), a.attname::text, \
                    format_type(a.atttypid, a.atttypmod), not a.attnotnull, pg_get_expr(d.adbin, d.adrelid), \
                    col_description(c.oid, a.attnum), \
                    exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary and a.attnum = any (i.indkey)) \
             from pg_catalog.pg_class c \
             join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped \
             left join pg_catalog.pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum \
             where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') \
             order by c.relname, a.attnum",
            &[],
        )
        .await?;
    for row in rows {
        let table: &mut Table = tables.entry(row.get(0)).or_insert_with(|| Table {
            comment: row.get(1),
            columns: Vec::new(),
            references: Vec::new(),
        });
        table.columns.push(Column {
            name: row.get(2),
            kind: row.get(3),
            nullable: row.get(4),
            default: row.get(5),
            comment: row.get(6),
            key: row.get(7),
        });
    }
    let rows = client
        .query(
            "select c.conrelid::regclass::text, c.confrelid::regclass::text, \
                    (select a.attname::text from pg_catalog.pg_attribute a \
                     where a.attrelid = c.conrelid and a.attnum = c.conkey[array_upper(c.conkey, 1)]) \
             from pg_catalog.pg_constraint c \
             where c.contype = 'f' and c.connamespace = 'public'::regnamespace and c.conparentid = 0 \
             order by 1, 2, 3",
            &[],
        )
        .await?;
    for row in rows {
        let (from, to, through): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let plain = |name: &str| name.trim_start_matches("public.").replace("auth.users", "auth_users");
        if let Some(table) = tables.get_mut(&plain(&from)) {
            table.references.push((plain(&to), through));
        }
    }
    Ok(tables)
}
