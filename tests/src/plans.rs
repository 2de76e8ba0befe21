//! What a statement really does: the plans that PostgreSQL ran for it, of the statements inside functions, triggers and policies too.
//!
//! A hot query is judged by them, and never by a clock: see [`HotQuery`].

use anyhow::{Context, Result};
use futures::stream::{StreamExt, poll_fn};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};
use tokio_postgres::{AsyncMessage, Client, NoTls};

/// From how many rows on reading all of a table is a fault.
const LARGE: f32 = 3_000.0;

/// As whom a statement is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// A handler.
    Service,
    /// The user with this email, as PostgREST says who they are.
    User(&'static str),
}

/// A query that runs all the time, and what it may cost.
#[derive(Debug, Clone, Copy)]
pub struct HotQuery {
    /// What it is for.
    pub name: &'static str,
    /// As whom it is run.
    pub who: Who,
    /// What happens before, in the same transaction.
    pub before: &'static str,
    /// The statement. Its first value is the number of rows that it is about: shown, claimed, applied.
    pub sql: &'static str,
    /// That number here.
    pub rows: i64,
    /// The indexes that it has to use; of names in one group, one.
    pub indexes: &'static [&'static [&'static str]],
    /// Rows, and likewise pages, of large tables that may be read for each of `rows`, besides [`Self::besides`].
    pub each: i64,
    /// What may be read whatever the number of rows.
    pub besides: i64,
    /// How often the user is looked up.
    pub look_ups: Option<usize>,
    /// Of the statements inside it those are judged that name this.
    pub about: &'static str,
}

/// A statement that was run, on its own or inside another one.
#[derive(Debug, Deserialize)]
struct Executed {
    #[serde(rename = "Query Text")]
    query: String,
    #[serde(rename = "Plan")]
    plan: Value,
}

/// A superuser's session in which every statement tells its plan.
pub struct Recorder {
    /// The session.
    pub client: Client,
    told: Arc<Mutex<Vec<String>>>,
    /// Large tables by name.
    large: BTreeMap<String, f32>,
    /// The index of the partitioned table that an index is a part of.
    parents: BTreeMap<String, String>,
}

impl Recorder {
    /// Opens it on a database whose statistics are up to date.
    pub async fn open(url: &str) -> Result<Self> {
        let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
        let told = Arc::new(Mutex::new(Vec::new()));
        let teller = Arc::clone(&told);
        tokio::spawn(async move {
            let mut messages = poll_fn(move |context| connection.poll_message(context));
            while let Some(Ok(message)) = messages.next().await {
                if let AsyncMessage::Notice(notice) = message
                    && let Ok(mut told) = teller.lock()
                {
                    told.push(notice.message().to_owned());
                }
            }
        });
        client
            .batch_execute(
                "load 'auto_explain';
                 set auto_explain.log_analyze = on; set auto_explain.log_buffers = on; set auto_explain.log_timing = off;
                 set auto_explain.log_format = json; set auto_explain.log_nested_statements = on; set auto_explain.log_level = notice",
            )
            .await
            .context("auto_explain, which comes with PostgreSQL's contrib modules")?;
        let large = client
            .query(
                "select relname::text, reltuples from pg_class as class
                 where relkind = 'r' and reltuples > $1 and relnamespace::regnamespace::text in ('public', 'private', 'auth')",
                &[&LARGE],
            )
            .await?;
        let parents = client
            .query(
                "select part.relname::text, whole.relname::text from pg_inherits
                 join pg_class as part on part.oid = inhrelid join pg_class as whole on whole.oid = inhparent where part.relkind = 'i'",
                &[],
            )
            .await?;
        Ok(Self {
            client,
            told,
            large: large.iter().map(|row| (row.get(0), row.get(1))).collect(),
            parents: parents.iter().map(|row| (row.get(0), row.get(1))).collect(),
        })
    }

    /// Runs a query within the open transaction and says all that is wrong with how it was run. `mode` is `plan_cache_mode`: a function's
    /// statements are planned for their values at first, and once for all values when they have run a few times. `drop` comes right before.
    pub async fn complaints(&self, query: &HotQuery, mode: &str, drop: &str) -> Result<Vec<String>> {
        self.client.batch_execute("set local auto_explain.log_min_duration = -1").await?;
        self.client.batch_execute(query.before).await.with_context(|| format!("{}: before", query.name))?;
        let role = match query.who {
            Who::Service => "service_role",
            Who::User(email) => {
                let claims = "select set_config('request.jwt.claims', json_build_object('sub', id, 'role', 'authenticated')::text, true) \
                              from public.profiles where email = $1";
                self.client.query_one(claims, &[&email]).await?;
                "authenticated"
            }
        };
        self.client.batch_execute(drop).await?;
        self.client.batch_execute("set local auto_explain.log_min_duration = 0").await?;
        self.client.batch_execute(&format!("set local role {role}")).await?;
        self.client.batch_execute(&format!("set local plan_cache_mode = {mode}")).await?;
        if role == "authenticated" {
            // What a connection reads of the catalog when it first calls a policy's helper is no page of the query's.
            self.client.batch_execute("select private.org_with('call.view'), private.get_auth_org_id()").await?;
        }
        self.told().clear();
        let rows = crate::database::first_column(&self.client, query.sql).await;
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return Ok(vec![format!("it fails: {error:#}")]),
        };
        let executed = std::mem::take(&mut *self.told());
        let executed: Vec<Executed> = executed
            .iter()
            .filter_map(|text| text.split_once("plan:\n"))
            .map(|(_, plan)| serde_json::from_str(plan).with_context(|| plan.to_owned()))
            .collect::<Result<_>>()?;
        let executed: Vec<Executed> = executed.into_iter().filter(|told| told.query.contains(query.about)).collect();
        let rows = rows.first().and_then(|value| value.parse().ok()).unwrap_or(-1);
        Ok(self.judge(query, rows, &executed))
    }

    /// The statement that drops an index, or the constraint that it is for.
    pub async fn drop_index(&self, name: &str) -> Result<String> {
        let row = self
            .client
            .query_one(
                "select coalesce(
                   -- The publication of Realtime updates no table without an identity.
                   (select format('alter table %1$s replica identity full; alter table %1$s drop constraint %2$I cascade;',
                      conrelid::regclass, conname)
                    from pg_constraint where conindid = index.oid and contype in ('p', 'u', 'x')),
                   format('drop index %s;', index.oid::regclass))
                 from pg_class as index where relname = $1 and relkind in ('i', 'I')",
                &[&name],
            )
            .await
            .with_context(|| format!("there is no index {name}"))?;
        Ok(row.get(0))
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn judge(&self, query: &HotQuery, rows: i64, executed: &[Executed]) -> Vec<String> {
        let mut wrong = Vec::new();
        if rows != query.rows {
            wrong.push(format!("it is about {rows} rows and not {}", query.rows));
        }
        let mut done = Done::default();
        for statement in executed {
            self.walk(&statement.plan, "", &mut done);
        }
        wrong.extend(done.whole.iter().map(|table| format!("it reads the whole of {table}")));
        for group in query.indexes {
            if !group.iter().any(|name| done.indexes.contains_key(*name)) {
                wrong.push(format!("it uses none of {group:?}, but {:?}", done.indexes.keys()));
            }
        }
        let allowed = query.each * query.rows + query.besides;
        for (what, number) in [("rows", done.rows), ("pages", done.pages)] {
            if number > allowed {
                wrong.push(format!(
                    "it touches {number} {what} of large tables where {allowed} are allowed: {:?}",
                    done.by_index
                ));
            }
        }
        let looked_up = executed.iter().filter(|statement| statement.query.contains("public.profiles")).count();
        if query.look_ups.is_some_and(|expected| expected != looked_up) {
            wrong.push(format!("the user is looked up {looked_up} times"));
        }
        wrong
    }

    /// `above` is the table whose pages the index scans below collect.
    fn walk(&self, node: &Value, above: &str, done: &mut Done) {
        let text = |key: &str| node[key].as_str().unwrap_or_default();
        let number = |key: &str| node[key].as_f64().unwrap_or_default();
        let loops = number("Actual Loops");
        if let Some(index) = node["Index Name"].as_str()
            && loops > 0.0
        {
            let index = self.parents.get(index).map_or(index, String::as_str);
            *done.indexes.entry(index.to_owned()).or_default() += 1;
        }
        for arbiter in node["Conflict Arbiter Indexes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            *done.indexes.entry(arbiter.to_owned()).or_default() += 1;
        }
        let (kind, table) = (text("Node Type"), node["Relation Name"].as_str().unwrap_or(above));
        if loops > 0.0 && kind.contains("Scan") && self.large.contains_key(table) {
            if kind.contains("Seq Scan") {
                done.whole.insert(table.to_owned());
            }
            let seen =
                number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
            #[allow(clippy::cast_possible_truncation, reason = "numbers of rows")]
            let (rows, pages) =
                ((seen * loops) as i64, (number("Shared Hit Blocks") + number("Shared Read Blocks")) as i64);
            done.rows += rows;
            done.pages += pages;
            let name = format!("{kind} {table} {}", text("Index Name"));
            let entry = done.by_index.entry(name).or_default();
            *entry = (entry.0 + rows, entry.1 + pages);
        }
        for child in node["Plans"].as_array().into_iter().flatten() {
            self.walk(child, if kind.starts_with("Bitmap") { table } else { "" }, done);
        }
    }
}

/// What the statements of one query did.
#[derive(Debug, Default)]
struct Done {
    whole: BTreeSet<String>,
    indexes: BTreeMap<String, usize>,
    rows: i64,
    pages: i64,
    /// Rows and pages by kind of scan, table and index.
    by_index: BTreeMap<String, (i64, i64)>,
}
