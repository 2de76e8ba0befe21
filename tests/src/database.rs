//! A database of a test's own.

use crate::supervisor::Attached;
use anyhow::{Context, Result};
use local::parts::postgres::{self, Role};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};
use tokio_postgres::{Client, SimpleQueryMessage};

/// A clone that lives as long as this value.
#[derive(Debug)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// The connection that keeps it; further things can be asked for over it.
    pub attached: Attached,
    urls: BTreeMap<String, String>,
}

impl Database {
    /// A database to which the Supabase CLI has applied the migrations, and then the seed.
    pub async fn migrated(supervisor: &Path) -> Result<Self> {
        Self::of(supervisor, true).await
    }

    /// A database with what Supabase adds, and nothing of ours.
    pub async fn bare(supervisor: &Path) -> Result<Self> {
        Self::of(supervisor, false).await
    }

    async fn of(supervisor: &Path, migrated: bool) -> Result<Self> {
        let attached = Attached::attach(supervisor).await?;
        let (name, urls) = attached.database(migrated).await?;
        Ok(Self { name, attached, urls })
    }

    /// Its URL for a role.
    pub fn url(&self, role: Role) -> &str {
        &self.urls[role.name()]
    }

    /// A connection as a role.
    pub async fn connect(&self, role: Role) -> Result<Client> {
        postgres::connect(self.url(role)).await
    }
}

/// What every table of `public` and `private` held at one moment: rows, and a hash over them.
#[derive(Clone, PartialEq, Eq)]
pub struct Fingerprint(BTreeMap<String, (u64, String)>);

impl Fingerprint {
    /// Takes it. Partitions count, the tables that they are parts of do not.
    pub async fn of(client: &Client) -> Result<Self> {
        let tables = client
            .query(
                "select format('%I.%I', space.nspname, class.relname)
                 from pg_class as class join pg_namespace as space on space.oid = class.relnamespace
                 where space.nspname in ('public', 'private') and class.relkind = 'r' order by 1",
                &[],
            )
            .await?;
        let mut held = BTreeMap::new();
        for table in tables {
            let table: String = table.get(0);
            let row = client
                .query_one(
                    &format!("select count(*), coalesce(md5(string_agg(t::text, '|' order by t::text)), '') from {table} as t"),
                    &[],
                )
                .await
                .with_context(|| table.clone())?;
            held.insert(table, (row.get::<_, i64>(0).unsigned_abs(), row.get(1)));
        }
        Ok(Self(held))
    }

    /// The tables that hold something else now.
    pub fn changed(&self, now: &Self) -> BTreeSet<String> {
        let names: BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        names.into_iter().filter(|name| self.0.get(*name) != now.0.get(*name)).cloned().collect()
    }

    /// Fails unless no row of any table was added, changed or removed.
    #[track_caller]
    pub fn assert_same(&self, now: &Self) {
        let changed = self.changed(now);
        assert!(changed.is_empty(), "these tables hold something else now: {changed:?}");
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_map().entries(self.0.iter().map(|(table, (rows, _))| (table, rows))).finish()
    }
}

/// The first column of every row that a text of statements returns.
pub async fn first_column(client: &Client, sql: &str) -> Result<Vec<String>> {
    let messages = client.simple_query(sql).await?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .collect())
}
