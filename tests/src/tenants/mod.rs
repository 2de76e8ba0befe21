//! Two organizations full of data, and the proof that neither sees the other.
//!
//! [`Proof`] works in one transaction that is never committed: it fills the database ([`generate`]), lets everybody try ([`people`])
//! and compares with the expectation ([`matrix`]).
//! Tables are tried twice: with what is granted, and with every privilege granted, so that the policies are judged alone.

mod functions;
pub mod generate;
pub mod matrix;
mod own;
pub mod people;
mod ways;

use anyhow::{Context, Result};
use generate::{FIRST, Rows, SECOND, Table};
use matrix::Wall;
use own::Granted;
use people::Persona;
use serde_json::{Value, json};
use tokio_postgres::Client;

/// How many attempts were judged, by what was expected of them.
#[derive(Debug, Default, Clone, Copy)]
pub struct Count {
    /// Attempts that had to come to nothing.
    pub denied: usize,
    /// Attempts that had to succeed.
    pub allowed: usize,
}

/// The two organizations, within a transaction.
#[derive(Debug)]
pub struct Proof {
    client: Client,
    /// Every table of `public`.
    pub tables: Vec<Table>,
    rows: Rows,
    unfilled: Vec<String>,
    everybody: Vec<Persona>,
    at_home: Vec<Persona>,
    count: std::cell::Cell<Count>,
}

#[derive(Clone, Copy)]
enum Expect {
    /// Refused, or no row touched.
    Nothing,
    /// Refused, or no row of the first organization touched.
    Unharmed,
    /// Refused by privilege or policy, and by nothing later.
    Refused,
    /// Fails, whatever stops it.
    Fails,
    /// Succeeds with so many rows.
    Rows(i64),
    /// Succeeds with at least one row.
    Some,
}

struct Probe {
    what: String,
    expect: Expect,
    body: Value,
}

impl Probe {
    fn new(persona: &Persona, quiet: bool, what: &str, expect: Expect, sql: String) -> Self {
        let what = format!("{}: {what}", persona.name);
        Self {
            what,
            expect,
            body: json!({ "role": persona.role, "claims": persona.claims, "quiet": quiet, "sql": sql }),
        }
    }

    fn watching(mut self, sql: &str) -> Self {
        self.body["watch"] = sql.into();
        self
    }

    /// What is wrong with the answer.
    fn judge(&self, answer: &Value) -> Option<String> {
        let state = answer["state"].as_str();
        let (rows, harm) = (answer["rows"].as_i64().unwrap_or_default(), answer["harm"] == true);
        let refused = state == Some("42501");
        let right = match self.expect {
            Expect::Nothing => refused || state.is_none() && rows == 0,
            Expect::Unharmed => {
                // A table that is only ever added to refuses before it looks at any row.
                let for_all = state == Some("23001")
                    && answer["said"].as_str().is_some_and(|said| said.contains("only ever added to"));
                refused || for_all || state.is_none() && !harm
            }
            Expect::Refused => refused,
            Expect::Fails => state.is_some(),
            Expect::Rows(wanted) => state.is_none() && rows == wanted,
            Expect::Some => state.is_none() && rows > 0,
        };
        let said = answer["said"].as_str().unwrap_or_default();
        // The organization's id may be echoed only by an error that the database's own superuser would see.
        let told = refused && (said.contains(FIRST.id) || said.contains("isolation-first"));
        (!right || told).then(|| format!("{} ({} rows, {} {said})", self.what, rows, state.unwrap_or("no error")))
    }
}

fn watch(table: &Table, rows: &str) -> String {
    format!(
        "select md5(string_agg(t::text || t.ctid, '|' order by t::text)) from public.{} as t where {rows}",
        table.name
    )
}

impl Proof {
    /// Fills a database, as its superuser, within a transaction that ends with the connection.
    pub async fn begin(client: Client) -> Result<Self> {
        client.batch_execute("begin; set local session_replication_role = 'replica'").await?;
        client.batch_execute(include_str!("../../fixtures/isolation.sql")).await?;
        let tables = generate::tables(&client).await?;
        let mut rows = Rows::new();
        people::make(&client, &mut rows).await?;
        let unfilled = generate::fill(&client, &tables, &mut rows).await?;
        // A copy of a row of each table, from which everybody may take a value that the table accepts.
        for table in &tables {
            let (name, rows) = (&table.name, table.of(FIRST));
            client
                .batch_execute(&format!(
                    "create table probe.{name} as select * from public.{name} where {rows} limit 1"
                ))
                .await?;
        }
        client
            .batch_execute(
                "grant usage on schema probe to public; grant select on all tables in schema probe to public;
                 set local session_replication_role = 'origin'",
            )
            .await?;
        Ok(Self {
            client,
            tables,
            rows,
            unfilled,
            everybody: people::everybody(),
            at_home: people::at_home(),
            count: Count::default().into(),
        })
    }

    /// Attempts judged so far.
    pub fn count(&self) -> Count {
        self.count.get()
    }

    /// The strings in the first column of a query.
    pub async fn strings(&self, sql: &str) -> Result<Vec<String>> {
        Ok(self.client.query(sql, &[]).await.context("a query of the catalog")?.iter().map(|row| row.get(0)).collect())
    }

    /// Makes a change, looks, and takes the change back.
    pub async fn after<T>(&self, change: &str, look: impl AsyncFnOnce(&Self) -> Result<T>) -> Result<T> {
        self.client.batch_execute(&format!("savepoint change; {change}")).await.with_context(|| change.to_owned())?;
        let seen = look(self).await;
        self.client.batch_execute("rollback to savepoint change; release savepoint change").await?;
        seen
    }

    /// What is wrong with tables, views, functions and keys by the catalog alone.
    pub async fn structure(&self) -> Result<Vec<String>> {
        self.strings("select probe.structure()").await
    }

    /// Tables of which an organization has fewer than three rows, or that have no line in the matrix.
    pub fn gaps(&self) -> Vec<String> {
        let mut gaps = self.unfilled.clone();
        for table in &self.tables {
            if matrix::of(&table.name).is_none() {
                gaps.push(format!("public.{} has no line in tenants/matrix.rs", table.name));
            }
            for side in [FIRST, SECOND].iter().filter(|_| table.tenant == Some("organization_id")) {
                let made = self.rows.get(&(table.name.clone(), side.name)).map_or(0, Vec::len);
                if made < 3 {
                    gaps.push(format!("public.{}: the {} organization has {made} rows", table.name, side.name));
                }
            }
        }
        gaps
    }

    async fn run(&self, probes: Vec<Probe>) -> Result<Vec<String>> {
        let bodies: Vec<&Value> = probes.iter().map(|probe| &probe.body).collect();
        let answers: Value = self.client.query_one("select probe.run($1)", &[&json!(bodies)]).await?.get(0);
        let mut count = self.count.get();
        let mut wrong = Vec::new();
        for (number, probe) in probes.iter().enumerate() {
            match probe.expect {
                Expect::Rows(1..) | Expect::Some => count.allowed += 1,
                _ => count.denied += 1,
            }
            wrong.extend(probe.judge(&answers[number]));
        }
        self.count.set(count);
        Ok(wrong)
    }

    /// Everybody tries everything with one table.
    pub async fn table(&self, table: &Table) -> Result<Vec<String>> {
        let wall = matrix::of(&table.name).with_context(|| format!("public.{} has no line", table.name))?;
        let mut wrong = self.granted(table, wall).await?;
        let grant = format!("grant all on public.{} to anon, authenticated", table.name);
        let probes = self.policies(table, wall);
        wrong.extend(self.after(&grant, async |proof| proof.run(probes).await).await?);
        Ok(wrong.into_iter().map(|finding| format!("public.{}: {finding}", table.name)).collect())
    }

    /// The rows that are closed to a persona: the first organization's, but for what is theirs as a person.
    fn closed(table: &Table, wall: &Wall, persona: &Persona) -> Option<String> {
        match (table.tenant, wall.hidden) {
            (Some(_), _) if table.name == "profiles" => Some(format!("{} and id <> '{}'", table.of(FIRST), persona.id)),
            (Some(_), _) => Some(table.of(FIRST)),
            (None, hidden) => hidden.map(str::to_owned),
        }
    }

    fn policies(&self, table: &Table, wall: &Wall) -> Vec<Probe> {
        let name = &table.name;
        let victim = self.rows.get(&(name.clone(), FIRST.name)).and_then(|rows| rows.first());
        let columns: Vec<&str> = table.writable().map(|column| column.name.as_str()).collect();
        let harmless = ["updated_at", "created_at"].into_iter().find(|name| columns.contains(name)).or_else(|| {
            let key =
                |column: &&&str| table.primary.iter().any(|key| *key == **column) || **column == "organization_id";
            columns.iter().rev().find(|column| !key(column)).copied()
        });
        let mut probes = Vec::new();
        for persona in &self.everybody {
            let closed = Self::closed(table, wall, persona);
            if let Some(rows) = &closed {
                let sql = format!("select from public.{name} where {rows}");
                probes.push(Probe::new(persona, true, "reads, all granted", Expect::Nothing, sql));
                let sql = format!("select from (select count(*) from public.{name} where {rows}) as c (n) where n > 0");
                probes.push(Probe::new(persona, true, "counts, all granted", Expect::Nothing, sql));
            }
            let watched =
                watch(table, if table.tenant.is_some() { closed.as_deref().unwrap_or("true") } else { "true" });
            let mut write = |what: &str, sql: String| {
                probes.push(Probe::new(persona, true, what, Expect::Unharmed, sql).watching(&watched));
            };
            if let Some(column) = harmless {
                let value = format!("(select {column} from probe.{name} limit 1)");
                write("changes every row, all granted", format!("update public.{name} set {column} = {value}"));
            }
            write("deletes every row, all granted", format!("delete from public.{name}"));
            if table.tenant == Some("organization_id") {
                let sql = format!("update public.{name} set organization_id = '{}'", FIRST.id);
                write("moves its rows there, all granted", sql);
            }
            let list = columns.join(", ");
            let source = victim.map_or_else(
                || format!("probe.{name}"),
                |row| format!("jsonb_populate_record(null::public.{name}, '{}')", row.to_string().replace('\'', "''")),
            );
            let sql = format!("insert into public.{name} ({list}) overriding system value select {list} from {source}");
            probes.push(Probe::new(persona, true, "adds a row there, all granted", Expect::Refused, sql));
        }
        probes
    }

    async fn granted(&self, table: &Table, wall: &Wall) -> Result<Vec<String>> {
        let name = &table.name;
        let granted = Granted::of(self, name).await?;
        let mut probes = Vec::new();
        for persona in &self.everybody {
            if let Some(rows) = Self::closed(table, wall, persona) {
                for (what, sql) in [
                    ("reads", format!("select from public.{name} where {rows}")),
                    (
                        "counts",
                        format!("select from (select count(*) from public.{name} where {rows}) as c (n) where n > 0"),
                    ),
                    ("deletes", format!("delete from public.{name} where {rows}")),
                ] {
                    probes.push(Probe::new(persona, false, what, Expect::Nothing, sql));
                }
                for column in &granted.changeable {
                    let sql = format!("update public.{name} set {column} = {column} where {rows}");
                    probes.push(Probe::new(persona, false, "changes", Expect::Nothing, sql));
                }
            }
            if table.tenant.is_none() {
                if persona.role == "authenticated" && wall.hidden != Some("true") {
                    let sql = format!("select from public.{name}");
                    probes.push(Probe::new(persona, true, "reads what is for all", Expect::Some, sql));
                    for column in &granted.readable {
                        let sql = format!("select {column} from public.{name}");
                        probes.push(Probe::new(persona, true, "reads a field that is for all", Expect::Some, sql));
                    }
                }
                continue;
            }
            probes.extend(self.own(table, wall, persona, SECOND, &granted).await?);
        }
        // What is closed to all of these is there, and open to those whose it is.
        for persona in self.at_home.iter().filter(|_| table.tenant.is_some()) {
            probes.extend(self.own(table, wall, persona, FIRST, &granted).await?);
        }
        self.run(probes).await
    }
}
