//! Rows for every tenant table, from what the catalog says of it.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use tokio_postgres::Client;

/// How many rows each organization gets in each table.
pub const ROWS: usize = 5;

/// What the catalog does not say: table, column, expression. `{n}` is the row's number, `{s}` the organization's. A table `*` is any.
const OVERRIDES: &[(&str, &str, &str)] = &[
    ("*", "timezone", "'Asia/Kolkata'"),
    ("*", "currency", "'INR'"),
    ("*", "currency_code", "'INR'"),
    ("*", "phone", "'+91' || (9000000000 + floor(random() * 999999999))::bigint"),
    ("*", "phone_number", "'+91' || (9000000000 + floor(random() * 999999999))::bigint"),
    ("*", "caller_number", "'+91' || (9000000000 + floor(random() * 999999999))::bigint"),
    ("*", "callee_number", "'+91' || (9000000000 + floor(random() * 999999999))::bigint"),
    ("*", "sha256", "extensions.digest(gen_random_uuid()::text, 'sha256')"),
    ("*", "created_at", "now() - {n} * interval '1 hour'"),
    ("api_keys", "scopes", "array['usage.write']"),
    ("carrier_accounts", "api_base", "'https://carrier.example'"),
    ("subscriptions", "status", "case when {n} = 0 then 'active' else 'cancelled' end::public.subscription_status"),
    ("subscriptions", "plan_id", "(select id from public.subscription_plans where slug = 'isolation-{side}')"),
    (
        "subscriptions",
        "plan_price_id",
        "(select price.id from public.plan_prices as price join public.subscription_plans as plan on plan.id = price.plan_id
          where plan.slug = 'isolation-{side}')",
    ),
    ("subscriptions", "current_period_end", "now() + interval '1 month'"),
    ("call_credits", "currency", "(array['INR', 'USD', 'EUR', 'GBP', 'JPY'])[{n} + 1]"),
    ("credit_accounts", "currency", "(array['INR', 'USD', 'EUR', 'GBP', 'JPY'])[{n} + 1]"),
    ("stores", "domain", "'s{s}-{n}-' || substr(gen_random_uuid()::text, 1, 8) || '.example.com'"),
    ("settings", "key", "'isolation_{s}_{n}_' || substr(gen_random_uuid()::text, 1, 8)"),
    ("invitations", "email", "'isolation-{side}-{n}@example.org'"),
    ("invitations", "accepted_by", "null"),
    ("invitations", "token_sha256", "extensions.digest(gen_random_uuid()::text, 'sha256')"),
    ("impersonation_sessions", "started_at", "now()"),
    ("impersonation_sessions", "expires_at", "now() + interval '1 hour'"),
    ("calls", "from_phone", "'+919000000000'"),
    ("calls", "to_phone", "'+919000000001'"),
    ("consents", "scope", "'sms'"),
    ("consents", "source", "'form'"),
    ("consents", "proof", "'{\"form\": 1}'"),
    ("privacy_requests", "kind", "'data_request'"),
    ("privacy_requests", "due_at", "now() + interval '30 days'"),
    ("properties", "type", "'villa'"),
    ("product_images", "url", "'https://example.com/isolation-{side}-{n}'"),
    ("property_images", "url", "'https://example.com/isolation-{side}-{n}'"),
    ("webhook_sources", "provider", "'retell'"),
    ("websocket_sessions", "kind", "'agent'"),
    ("websocket_sessions", "user_id", "null"),
    ("credit_transactions", "reverses_id", "null"),
    ("credit_transactions", "description", "'isolation-{side}'"),
    ("call_charges", "credit_seconds", "0"),
    ("call_charges", "overage_seconds", "0"),
    ("call_charges", "charged_minor", "1"),
    ("payment_methods", "gateway_payment_method_id", "'pm_isolation_{side}_{n}'"),
    ("payments", "purpose", "'invoice'"),
    ("payments", "gateway_payment_id", "'pay_isolation_{side}_{n}'"),
    ("refunds", "gateway_refund_id", "'ref_isolation_{side}_{n}'"),
    ("credit_notes", "status", "'issued'"),
    ("credit_notes", "credit_note_number", "'CRN-202601-' || lpad((100 * {s} + {n})::text, 5, '0')"),
    ("credit_notes", "credit_note_date", "current_date"),
    ("credit_notes", "issued_at", "now()"),
    ("credit_notes", "subtotal_minor", "1"),
    ("credit_notes", "tax_minor", "0"),
    ("credit_notes", "total_minor", "1"),
    ("usage_logs", "feature_key", "'ai_calls'"),
    ("usage_logs", "period_start", "date '2026-01-01' + {n} * 31"),
    ("usage_logs", "period_end", "date '2026-02-01' + {n} * 31"),
    ("usage_days", "meter_key", "'ai_calls'"),
    ("invoices", "status", "'open'"),
    ("invoices", "invoice_number", "'INV-202601-' || lpad((100 * {s} + {n})::text, 5, '0')"),
    ("invoices", "period_start", "now() + {n} * interval '1 day'"),
    ("invoices", "period_end", "now() + {n} * interval '1 day' + interval '1 month'"),
    ("invoices", "invoice_date", "current_date"),
    ("invoices", "due_date", "current_date"),
    ("invoices", "finalized_at", "now()"),
    ("invoices", "subtotal_minor", "0"),
    ("invoices", "tax_minor", "0"),
    ("invoices", "total_minor", "0"),
    ("invoice_lines", "kind", "'base'"),
    ("webhook_endpoints", "url", "'https://hooks.example.com/isolation-{side}-{n}'"),
    ("event_deliveries", "topic", "'call.ended'"),
    ("event_deliveries", "next_attempt_at", "now()"),
];

/// A column, as far as an insert is concerned.
#[derive(Debug, Clone)]
pub struct Column {
    /// Its name.
    pub name: String,
    type_name: String,
    label: Option<String>,
    must: bool,
    generated: bool,
}

#[derive(Debug, Clone)]
struct Key {
    parent: String,
    columns: Vec<String>,
    parent_columns: Vec<String>,
}

/// A table of `public`.
#[derive(Debug, Clone)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// `organization_id`, or `id` for the organizations themselves; none for reference data.
    pub tenant: Option<&'static str>,
    /// Its columns in order.
    pub columns: Vec<Column>,
    /// The columns of its primary key.
    pub primary: Vec<String>,
    keys: Vec<Key>,
}

/// One of the two organizations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Side {
    /// `first` or `second`.
    pub name: &'static str,
    /// Its id.
    pub id: &'static str,
    number: usize,
}

/// The organization that is to be protected.
pub const FIRST: Side = Side { name: "first", id: "f1f1f1f1-0000-4000-8000-000000000001", number: 1 };
/// The organization whose people try.
pub const SECOND: Side = Side { name: "second", id: "5ec05ec0-0000-4000-8000-000000000002", number: 2 };

/// The rows made so far.
pub type Rows = BTreeMap<(String, &'static str), Vec<Value>>;

impl Table {
    /// Columns that a statement may name.
    pub fn writable(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|column| !column.generated)
    }

    /// Whether a column points at a tenant's row.
    pub fn refers(&self, column: &str) -> bool {
        self.keys.iter().any(|key| key.columns.len() > 1 && key.columns.iter().any(|known| known == column))
    }

    /// The tenants' tables that a row of this one refers to, each with the condition that joins `parent` to `child`.
    pub fn parents<'a>(&'a self, row: &'a Value) -> impl Iterator<Item = (&'a str, String)> {
        let whole = |key: &&Key| key.columns.len() > 1 && key.columns.iter().all(|column| !row[column].is_null());
        self.keys.iter().filter(whole).map(|key| {
            let pairs = key.columns.iter().zip(&key.parent_columns);
            let joined: Vec<String> = pairs.map(|(own, theirs)| format!("parent.{theirs} = child.{own}")).collect();
            (key.parent.as_str(), joined.join(" and "))
        })
    }

    /// Which rows belong to an organization.
    pub fn of(&self, side: Side) -> String {
        self.tenant.map_or_else(|| "true".to_owned(), |column| format!("{column} = '{}'", side.id))
    }

    /// Columns and expressions of the `n`th row of an organization.
    pub fn row(&self, side: Side, n: usize, rows: &Rows) -> Result<Vec<(String, String)>> {
        let mut values: BTreeMap<String, String> = BTreeMap::new();
        if let Some(column) = self.tenant {
            values.insert(column.to_owned(), format!("'{}'", side.id));
        }
        let fill = |expression: &str| {
            let expression = expression.replace("{n}", &n.to_string()).replace("{s}", &side.number.to_string());
            expression.replace("{side}", side.name)
        };
        let special = |column: &str| {
            let of = |name: &str| OVERRIDES.iter().find(|(table, known, _)| *table == name && *known == column);
            of(&self.name).or_else(|| of("*")).map(|(_, _, expression)| fill(expression))
        };
        let mut keys = self.keys.clone();
        keys.sort_by_key(|key| std::cmp::Reverse(key.columns.len()));
        for key in keys {
            if key.columns.iter().any(|column| !values.contains_key(column) && special(column).is_some()) {
                continue;
            }
            let Some(parents) = rows.get(&(key.parent.clone(), side.name)) else { continue };
            let pairs = || key.columns.iter().zip(&key.parent_columns);
            let fits = |parent: &&Value| {
                pairs().all(|(column, theirs)| values.get(column).is_none_or(|value| *value == literal(parent, theirs)))
            };
            let found = (0..parents.len()).map(|step| &parents[(n + step) % parents.len()]).find(fits);
            if let Some(parent) = found {
                for (column, theirs) in pairs() {
                    values.insert(column.clone(), literal(parent, theirs));
                }
            }
        }
        for column in self.writable().filter(|column| !values.contains_key(&column.name)).collect::<Vec<_>>() {
            if let Some(expression) = special(&column.name) {
                values.insert(column.name.clone(), expression);
            } else if let Some(key) = self.keys.iter().find(|key| key.columns == [column.name.clone()] && column.must) {
                let expression = format!("(select {} from public.{} limit 1)", key.parent_columns[0], key.parent);
                values.insert(column.name.clone(), expression);
            } else if column.must {
                values.insert(column.name.clone(), self.guess(column, side, n)?);
            }
        }
        Ok(values.into_iter().collect())
    }

    fn guess(&self, column: &Column, side: Side, n: usize) -> Result<String> {
        if let Some(label) = &column.label {
            return Ok(format!("'{label}'"));
        }
        Ok(match column.type_name.as_str() {
            "text" => {
                format!("'isolation-{} {} {n} ' || substr(gen_random_uuid()::text, 1, 8)", side.name, column.name)
            }
            "uuid" => "gen_random_uuid()".to_owned(),
            "boolean" => "false".to_owned(),
            "smallint" | "integer" | "bigint" => (n + 1).to_string(),
            "jsonb" => "'{}'".to_owned(),
            "bytea" => "decode('00', 'hex')".to_owned(),
            "date" => format!("current_date + {n}"),
            "timestamp with time zone" => format!("now() + {n} * interval '1 minute'"),
            "text[]" => "array['isolation']".to_owned(),
            name if name.starts_with("numeric") => (n + 1).to_string(),
            other => bail!("{}.{}: no value for type {other}: give it an override", self.name, column.name),
        })
    }
}

/// A column of a row, as SQL writes it.
pub fn literal(row: &Value, column: &str) -> String {
    match &row[column] {
        Value::String(text) => format!("'{}'", text.replace('\'', "''")),
        other => other.to_string(),
    }
}

/// Every table of `public`, in the order of their names.
pub async fn tables(client: &Client) -> Result<Vec<Table>> {
    let columns = client
        .query(
            "select class.relname, att.attname, pg_catalog.format_type(att.atttypid, att.atttypmod),
               (select min(label.enumlabel) from pg_enum as label where label.enumtypid = att.atttypid),
               att.attnotnull and not att.atthasdef and att.attidentity = '', att.attgenerated <> '' or att.attidentity <> '',
               exists (select from pg_index as i where i.indrelid = class.oid and i.indisprimary and att.attnum = any (i.indkey))
             from pg_class as class join pg_attribute as att on att.attrelid = class.oid
             where class.relnamespace = 'public'::regnamespace and class.relkind in ('r', 'p')
               and att.attnum > 0 and not att.attisdropped
             order by class.relname, att.attnum",
            &[],
        )
        .await?;
    let mut tables: BTreeMap<String, Table> = BTreeMap::new();
    for row in columns {
        let name: String = row.get(0);
        let table = tables.entry(name.clone()).or_insert_with(|| Table {
            tenant: (name == "organizations").then_some("id"),
            name,
            columns: Vec::new(),
            primary: Vec::new(),
            keys: Vec::new(),
        });
        let column = Column {
            name: row.get(1),
            type_name: row.get(2),
            label: row.get(3),
            must: row.get(4),
            generated: row.get(5),
        };
        if column.name == "organization_id" {
            table.tenant = Some("organization_id");
        }
        if row.get(6) {
            table.primary.push(column.name.clone());
        }
        table.columns.push(column);
    }
    let keys = client
        .query(
            "select child.relname, parent.relname,
               (select array_agg(a.attname::text order by k.n) from unnest(con.conkey) with ordinality as k (num, n)
                join pg_attribute as a on a.attrelid = con.conrelid and a.attnum = k.num),
               (select array_agg(a.attname::text order by k.n) from unnest(con.confkey) with ordinality as k (num, n)
                join pg_attribute as a on a.attrelid = con.confrelid and a.attnum = k.num)
             from pg_constraint as con
             join pg_class as child on child.oid = con.conrelid join pg_class as parent on parent.oid = con.confrelid
             where con.contype = 'f' and con.connamespace = 'public'::regnamespace
               and parent.relnamespace = 'public'::regnamespace",
            &[],
        )
        .await?;
    for row in keys {
        let child: String = row.get(0);
        if let Some(table) = tables.get_mut(&child) {
            table.keys.push(Key { parent: row.get(1), columns: row.get(2), parent_columns: row.get(3) });
        }
    }
    Ok(tables.into_values().collect())
}

/// Fills every tenant table for both organizations; the tables named in `rows` are there already. Returns what it could not fill.
pub async fn fill(client: &Client, tables: &[Table], rows: &mut Rows) -> Result<Vec<String>> {
    let mut unfilled = Vec::new();
    let mut open: Vec<&Table> = tables
        .iter()
        .filter(|table| table.tenant.is_some() && !rows.contains_key(&(table.name.clone(), FIRST.name)))
        .collect();
    while !open.is_empty() {
        let waits = |table: &Table| {
            let parents = table.keys.iter().map(|key| &key.parent).filter(|parent| **parent != table.name);
            parents.filter(|parent| open.iter().any(|other| other.name == **parent)).count()
        };
        // Where tables refer to each other in a circle, the one that waits for the fewest goes first, without those keys.
        let next = (0..open.len()).min_by_key(|index| waits(open[*index])).unwrap_or_default();
        let table = open.remove(next);
        client.batch_execute("savepoint filling").await?;
        for (side, n) in [FIRST, SECOND].into_iter().flat_map(|side| (0..ROWS).map(move |n| (side, n))) {
            match insert(client, table, side, n, rows).await {
                Ok(row) => rows.entry((table.name.clone(), side.name)).or_default().push(row),
                Err(error) => {
                    client.batch_execute("rollback to savepoint filling").await?;
                    rows.retain(|(name, _), _| *name != table.name);
                    unfilled
                        .push(format!("cannot fill public.{}: tell tenants/generate.rs how: {error:#}", table.name));
                    break;
                }
            }
        }
        client.batch_execute("release savepoint filling").await?;
    }
    Ok(unfilled)
}

async fn insert(client: &Client, table: &Table, side: Side, n: usize, rows: &Rows) -> Result<Value> {
    let (columns, values): (Vec<_>, Vec<_>) = table.row(side, n, rows)?.into_iter().unzip();
    let sql = format!(
        "insert into public.{name} as made ({}) values ({}) returning to_jsonb(made)",
        columns.join(", "),
        values.join(", "),
        name = table.name
    );
    Ok(client.query_one(&sql, &[]).await.with_context(|| sql.clone())?.get(0))
}
