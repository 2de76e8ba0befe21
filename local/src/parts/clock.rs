//! Time on one machine: the template's schedules, and a business clock that can be set forward.
//!
//! Business time is real time plus a shift, which stands in one row of the database. It runs in real time while anything is under way,
//! and else may jump to the next thing due: so that a retry in two hours takes no two hours, and nothing in flight ages by a jump.

mod schedule;

use crate::parts::{
    lambda::{InvocationOutcome, Invoker},
    poller::Backlog,
    template::Template,
};
use anyhow::{Context, Result, bail, ensure};
use chrono::{DateTime, Datelike, Duration, FixedOffset, NaiveTime, Utc, Weekday};
use schedule::Tick;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::{sync::Mutex, task::JoinSet};
use tokio_postgres::{NoTls, types::ToSql};

/// India's time, which knows no summer.
const KOLKATA_SECONDS: i32 = 19_800;
/// The job that dials what is due.
const RELEASE: &str = "release";

const SET_SHIFT: &str = "
    insert into private.clock_offset (shift) values ($1 * interval '1 microsecond')
    on conflict (single) do update set shift = excluded.shift";
const GET_SHIFT: &str = "select (extract(epoch from shift) * 1000000)::bigint from private.clock_offset";
const UNDER_WAY: &str = "
    select case
      when exists (select from net.http_request_queue) then 'a request of the database'
      when exists (select from public.call_logs where status <> 'ended') then 'a call'
      when exists (select from private.unsettled_calls) then 'a call'
    end";
/// The next thing due, and the last of the next few: what falls due within hours of each other is gathered when that is asked for.
const NEXT_DUE: &str = "
    select min(next.due), max(next.due) filter (where next.due <= next.first + interval '6 hours')
    from (
      select queue.next_retry_at as due, min(queue.next_retry_at) over () as first
      from public.call_queue as queue
      join public.campaigns as campaign on campaign.id = queue.campaign_id
      where queue.status = 'queued' and campaign.status = 'running'
      order by queue.next_retry_at
      limit $1
    ) as next";

/// What the clock works on.
pub struct ClockOptions {
    /// The database, with a role that may set the shift and see every call.
    pub database_url: String,
    /// How many times faster than the template says schedules fire; at least 1.
    pub speed: f64,
    /// The messages that keep business time from jumping.
    pub backlog: Backlog,
    /// How many things a jump gathers: 1 goes to the next one due, more go on to where so many are due at once. A jump waits until
    /// nothing is under way, so that the last few retries of a large campaign would else be made one after the other.
    pub gather: u32,
}

/// The running clock. Cheap to clone; it ticks until it is stopped or the last clone is dropped.
#[derive(Clone)]
pub struct Clock {
    inner: Arc<Inner>,
    /// Aborted when the last clone is dropped.
    ticking: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    options: ClockOptions,
    invoker: Invoker,
    jobs: Vec<Tick>,
    database: Mutex<Option<tokio_postgres::Client>>,
    history: RwLock<History>,
}

/// What [`Clock::advance_when_idle`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advance {
    /// Something is under way, so time is real: what.
    Busy(&'static str),
    /// Something was due already; it was released.
    Due,
    /// Time jumped to the next thing due, which was released.
    Jumped {
        /// Business time before.
        from: DateTime<Utc>,
        /// Business time after.
        to: DateTime<Utc>,
    },
    /// Nothing is under way and nothing will ever be due.
    Nothing,
}

/// Which shift held from which real instant on.
#[derive(Debug, Clone, Default)]
struct History(Vec<(DateTime<Utc>, Duration)>);

impl History {
    fn shift_at(&self, real: DateTime<Utc>) -> Duration {
        let later = self.0.partition_point(|(since, _)| *since <= real);
        // What was before the first entry is judged by none, as the database did then.
        later.checked_sub(1).map_or(Duration::zero(), |index| self.0[index].1)
    }

    fn to_business(&self, real: DateTime<Utc>) -> DateTime<Utc> {
        real + self.shift_at(real)
    }
}

impl Clock {
    /// Starts ticking. Takes over the shift that the database has already.
    pub async fn start(template: &Template, invoker: Invoker, options: ClockOptions) -> Result<Self> {
        ensure!(options.speed >= 1.0, "the clock's speed is {}, less than 1", options.speed);
        let jobs = schedule::ticks(template, options.speed);
        let inner = Inner { options, invoker, jobs, database: Mutex::new(None), history: RwLock::default() };
        let clock = Self { inner: Arc::new(inner), ticking: Arc::default() };
        let shift = clock.query(GET_SHIFT, &[], |row| row.get::<_, i64>(0)).await?;
        if let Some(micros) = shift {
            clock.remember(Duration::microseconds(micros));
        }
        {
            let mut ticking = clock.ticking.lock().await;
            for job in &clock.inner.jobs {
                ticking.spawn(schedule::keep_ticking(job.clone(), clock.inner.invoker.clone()));
            }
        }
        Ok(clock)
    }

    /// Stops ticking, for every clone.
    pub async fn stop(&self) {
        self.ticking.lock().await.shutdown().await;
    }

    /// The business time now.
    pub fn business_now(&self) -> DateTime<Utc> {
        self.to_business(Utc::now())
    }

    /// What business time it was at a real instant: by the shift that held then, not by today's.
    pub fn to_business(&self, real: DateTime<Utc>) -> DateTime<Utc> {
        self.inner.history.read().unwrap_or_else(PoisonError::into_inner).to_business(real)
    }

    /// Sets business time before anything happened. May go back as well as forward.
    pub async fn start_at(&self, business: DateTime<Utc>) -> Result<()> {
        self.shift_to(business).await
    }

    /// Sets business time forward to `business`, whatever is under way. Fails when that is in its past.
    pub async fn jump_to(&self, business: DateTime<Utc>) -> Result<()> {
        let now = self.business_now();
        ensure!(business >= now, "business time cannot go back from {now} to {business}");
        self.shift_to(business).await
    }

    /// One step of a story: when nothing is under way, jumps to the next thing due and has it released. Never waits for time to pass;
    /// call it again until it finds nothing.
    pub async fn advance_when_idle(&self) -> Result<Advance> {
        let before = self.inner.invoker.activity();
        if before.in_flight + before.queued > 0 {
            return Ok(Advance::Busy("an invocation"));
        }
        if let Some(what) = self.query(UNDER_WAY, &[], |row| row.get::<_, Option<String>>(0)).await?.flatten() {
            return Ok(Advance::Busy(if what == "a call" { "a call" } else { "a request of the database" }));
        }
        if self.inner.options.backlog.count().await? > 0 {
            return Ok(Advance::Busy("a message"));
        }
        let gathered = i64::from(self.inner.options.gather.max(1));
        let bounds = |row: tokio_postgres::Row| -> [Option<DateTime<Utc>>; 2] { [row.get(0), row.get(1)] };
        let due = self.query(NEXT_DUE, &[&gathered], bounds).await?;
        // Each look was at another instant: only if no event began meanwhile did all hold at once.
        if self.inner.invoker.activity() != before {
            return Ok(Advance::Busy("an invocation"));
        }
        let Some([Some(first), Some(last)]) = due else { return Ok(Advance::Nothing) };
        let from = self.business_now();
        if first <= from {
            self.fire(RELEASE).await?;
            return Ok(Advance::Due);
        }
        self.jump_to(last).await?;
        self.fire(RELEASE).await?;
        Ok(Advance::Jumped { from, to: last })
    }

    /// Runs the scheduled job `job` now, as its schedule would, and waits for its end; what it answered. Fails when no schedule has
    /// that job, or the function failed.
    pub async fn fire(&self, job: &str) -> Result<serde_json::Value> {
        let tick = self.inner.jobs.iter().find(|tick| tick.job == job);
        let tick = tick.with_context(|| format!("no schedule of the template has the job {job}"))?;
        match tick.fire(&self.inner.invoker).await {
            InvocationOutcome::Response(answer) => Ok(serde_json::from_slice(&answer)?),
            InvocationOutcome::FunctionError { payload, .. } => {
                bail!("{job} failed: {}", String::from_utf8_lossy(&payload))
            }
            InvocationOutcome::Throttled => bail!("{job} was throttled"),
        }
    }

    async fn shift_to(&self, business: DateTime<Utc>) -> Result<()> {
        let micros = (business - Utc::now()).num_microseconds().context("that is too far away")?;
        let mut database = self.inner.database.lock().await;
        let client = self.connected(&mut database).await?;
        client.execute(SET_SHIFT, &[&(micros as f64)]).await.context("the clock cannot be set")?;
        self.remember(Duration::microseconds(micros));
        Ok(())
    }

    fn remember(&self, shift: Duration) {
        let mut history = self.inner.history.write().unwrap_or_else(PoisonError::into_inner);
        history.0.push((Utc::now(), shift));
    }

    /// The first row's value, through a connection that is made again when it was lost.
    async fn query<T>(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
        read: impl FnOnce(tokio_postgres::Row) -> T,
    ) -> Result<Option<T>> {
        let mut database = self.inner.database.lock().await;
        let client = self.connected(&mut database).await?;
        Ok(client.query_opt(sql, parameters).await?.map(read))
    }

    async fn connected<'a>(
        &self,
        database: &'a mut Option<tokio_postgres::Client>,
    ) -> Result<&'a tokio_postgres::Client> {
        if database.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            let (client, connection) = tokio_postgres::connect(&self.inner.options.database_url, NoTls)
                .await
                .context("the clock cannot reach the database")?;
            tokio::spawn(connection);
            *database = Some(client);
        }
        database.as_ref().context("the clock has no connection")
    }
}

/// The first Tuesday at 10:00 in Kolkata that is not before `after`: a working hour everywhere in India.
pub fn tuesday_morning(after: DateTime<Utc>) -> DateTime<Utc> {
    let Some(kolkata) = FixedOffset::east_opt(KOLKATA_SECONDS) else { return after };
    let local = after.with_timezone(&kolkata);
    let days = (7 + Weekday::Tue.num_days_from_monday() - local.weekday().num_days_from_monday()) % 7;
    let ten = NaiveTime::MIN + Duration::hours(10);
    let tuesday = (local.date_naive() + Duration::days(days.into())).and_time(ten);
    let morning = (tuesday - Duration::seconds(KOLKATA_SECONDS.into())).and_utc();
    if morning >= after { morning } else { morning + Duration::days(7) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn the_next_tuesday_morning_may_be_today_or_in_a_week() {
        for (after, morning) in [
            ("2026-11-22T03:00:00Z", "2026-11-24T04:30:00Z"),
            ("2026-11-24T04:30:00Z", "2026-11-24T04:30:00Z"),
            ("2026-11-24T04:30:01Z", "2026-12-01T04:30:00Z"),
            // In Kolkata it is Tuesday already.
            ("2026-11-23T20:00:00Z", "2026-11-24T04:30:00Z"),
            ("2026-12-30T00:00:00Z", "2027-01-05T04:30:00Z"),
        ] {
            assert_eq!(tuesday_morning(at(after)), at(morning), "{after}");
        }
    }

    #[test]
    fn a_real_instant_is_judged_by_the_shift_that_held_then() {
        let history = History(vec![
            (at("2026-11-22T10:00:00Z"), Duration::hours(1)),
            (at("2026-11-22T10:10:00Z"), Duration::hours(5)),
        ]);
        for (real, business) in [
            ("2026-11-22T09:59:59Z", "2026-11-22T09:59:59Z"),
            ("2026-11-22T10:00:00Z", "2026-11-22T11:00:00Z"),
            ("2026-11-22T10:09:59Z", "2026-11-22T11:09:59Z"),
            ("2026-11-22T10:10:00Z", "2026-11-22T15:10:00Z"),
        ] {
            assert_eq!(history.to_business(at(real)), at(business), "{real}");
        }
    }
}
