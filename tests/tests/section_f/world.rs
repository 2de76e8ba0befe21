//! A database in which something is going on, and sessions that meet in it.

use anyhow::{Context, Result, ensure};
use futures::future::{join_all, try_join_all};
use local::parts::postgres::Role;
use std::sync::Arc;
use tests::{Database, database::first_column, supervisor_binary};
use tokio::{
    sync::Mutex,
    task::JoinHandle,
    time::{Duration, sleep},
};
use tokio_postgres::{Client, types::ToSql};

const WORLD: &str = include_str!("world.sql");
/// Only so that a test which hangs says what it hung on: nothing here takes a fraction of it.
const PATIENCE: &str = "set statement_timeout = '60s'";

/// What a statement gave: its last row's first value, or the code that a caller would be told.
pub type Answer = Result<String, String>;

/// The world of `world.sql`, in a database of the test's own.
pub struct World {
    sql: Arc<Client>,
    database: Database,
    crowd: Mutex<Vec<Session>>,
}

impl World {
    /// A new one.
    pub async fn new() -> Result<Self> {
        let database = Database::migrated(supervisor_binary!()).await?;
        let sql = database.connect(Role::Owner).await?;
        sql.batch_execute(WORLD).await.context("world.sql")?;
        Ok(Self { sql: Arc::new(sql), database, crowd: Mutex::default() })
    }

    /// A new one with more in it.
    pub async fn with(sql: &str) -> Result<Self> {
        let world = Self::new().await?;
        world.is(sql).await?;
        Ok(world)
    }

    /// The last value that statements give.
    pub async fn is(&self, sql: &str) -> Result<String> {
        Ok(first_column(&self.sql, sql).await.with_context(|| sql.to_owned())?.pop().unwrap_or_default())
    }

    /// Another session.
    pub async fn session(&self) -> Result<Session> {
        let client = self.database.connect(Role::Owner).await?;
        client.batch_execute(PATIENCE).await?;
        let pid = client.query_one("select pg_backend_pid()", &[]).await?.get(0);
        Ok(Session { client: Arc::new(client), pid, watch: Arc::clone(&self.sql) })
    }

    /// Another session, as the owner of an organization by the API.
    pub async fn session_of_owner(&self, tenant: u8) -> Result<Session> {
        let session = self.session().await?;
        session
            .done(&format!(
                "select set_config('request.jwt.claims', json_build_object('sub', scene.id('c000', {tenant}), 'role', 'authenticated')::text, false);
                 set role authenticated"
            ))
            .await?;
        Ok(session)
    }

    /// Two sessions at once: the second begins while the first has not committed, and has to wait for it.
    pub async fn meet(&self, first: &str, second: &str) -> Result<(Answer, Answer)> {
        meet(&self.session().await?, first, &self.session().await?, second).await
    }

    /// Many sessions at once, each with a statement of its own.
    pub async fn crowd(&self, statements: impl IntoIterator<Item = String>) -> Result<Vec<Answer>> {
        let statements: Vec<_> = statements.into_iter().collect();
        let mut sessions = self.crowd.lock().await;
        let missing = statements.len().saturating_sub(sessions.len());
        sessions.extend(try_join_all((0..missing).map(|_| self.session())).await?);
        Ok(join_all(sessions.iter().zip(&statements).map(|(session, sql)| session.run(sql))).await)
    }
}

/// Does two things at once: the second begins while the first has not committed, and has to wait for it.
pub async fn meet(first: &Session, one: &str, second: &Session, other: &str) -> Result<(Answer, Answer)> {
    first.done("begin").await?;
    let before = first.run(one).await;
    ensure!(before.is_ok(), "the first fails by itself: {before:?}");
    let waiting = second.start(other);
    waiting.waits_for(first).await?;
    first.done("commit").await?;
    Ok((before, waiting.ends().await?))
}

/// A session of its own.
pub struct Session {
    client: Arc<Client>,
    pid: i32,
    watch: Arc<Client>,
}

impl Session {
    /// Runs statements to their end.
    pub async fn run(&self, sql: &str) -> Answer {
        run(&self.client, sql).await
    }

    /// Runs statements that have to succeed.
    pub async fn done(&self, sql: &str) -> Result<String> {
        self.run(sql).await.map_err(|code| anyhow::anyhow!("{code}: {sql}"))
    }

    /// Begins to run statements.
    pub fn start(&self, sql: &str) -> Running {
        let (client, text) = (Arc::clone(&self.client), sql.to_owned());
        let task = tokio::spawn(async move { run(&client, &text).await });
        Running { task, pid: self.pid, sql: sql.to_owned(), watch: Arc::clone(&self.watch) }
    }

    /// The session's process dies, as when its client's machine does.
    pub async fn dies(self) -> Result<()> {
        let killed = self.watch.query_one("select pg_terminate_backend($1, 10000)", &[&self.pid]).await?;
        ensure!(killed.get::<_, bool>(0), "the session is still there");
        Ok(())
    }
}

/// Statements under way.
pub struct Running {
    task: JoinHandle<Answer>,
    pid: i32,
    sql: String,
    watch: Arc<Client>,
}

impl Running {
    /// Returns once they stand behind a lock that the other session holds; fails if they end without.
    pub async fn waits_for(&self, other: &Session) -> Result<()> {
        self.is_blocked_by("$2 = any (pg_blocking_pids($1))", &[&self.pid, &other.pid]).await
    }

    /// Returns once they stand behind any lock; fails if they end without.
    pub async fn waits(&self) -> Result<()> {
        self.is_blocked_by("pg_blocking_pids($1) <> '{}'", &[&self.pid]).await
    }

    async fn is_blocked_by(&self, condition: &str, values: &[&(dyn ToSql + Sync)]) -> Result<()> {
        let look = format!("select {condition}");
        while !self.watch.query_one(&look, values).await?.get::<_, bool>(0) {
            ensure!(!self.task.is_finished(), "it did not wait: {}", self.sql);
            sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// What they give in the end.
    pub async fn ends(self) -> Result<Answer> {
        Ok(self.task.await?)
    }
}

async fn run(client: &Client, sql: &str) -> Answer {
    match first_column(client, sql).await {
        Ok(mut rows) => Ok(rows.pop().unwrap_or_default()),
        Err(error) => Err(code_of(&error)),
    }
}

/// The code of ours where there is one, else PostgreSQL's.
fn code_of(error: &anyhow::Error) -> String {
    let Some(told) = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error) else {
        return error.to_string();
    };
    let ours = serde_json::from_str::<serde_json::Value>(told.message()).ok();
    ours.and_then(|body| body["code"].as_str().map(str::to_owned)).unwrap_or_else(|| told.code().code().to_owned())
}

/// An answer that is a value.
pub fn gives(value: &str) -> Answer {
    Ok(value.to_owned())
}

/// An answer that is a refusal.
pub fn refused(code: &str) -> Answer {
    Err(code.to_owned())
}

/// How many of some answers are this value.
pub fn count(answers: &[Answer], value: &str) -> usize {
    answers.iter().filter(|answer| **answer == gives(value)).count()
}
