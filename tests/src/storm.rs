//! Hang-ups by the hundred while the database, the road to it or the queue is away: what was acknowledged is applied, once.

use crate::{
    Stack,
    callbacks::{TALKED, callback_url},
    carrier::{CarrierStub, Create},
    events,
    proxy::Trouble,
    queues::Delivered,
    scene,
};
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use local::parts::postgres::Role;
use shared::telephony::{CallbackEvent, token::CallbackToken};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;
use webhook_intake::Intake;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// The database is stopped: its connections are ended, and it takes no new ones.
    DatabaseStopped,
    /// The road to PostgREST goes silent, breaks off, delays and loses answers, all the time.
    Road,
}

/// A storm.
#[derive(Debug, Clone, Copy)]
pub struct Storm {
    /// What goes wrong.
    pub weather: Weather,
    /// Hang-ups a second.
    pub rate: u32,
    /// Quiet at the beginning and at the end.
    pub quiet: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// How long of it the queue takes nothing either.
    pub queue_away: Duration,
    /// How often one hang-up is sent at most: from one to this, in turn.
    pub copies: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Hang-ups, each of a call of its own.
    pub calls: usize,
    /// Requests for them, those sent again included.
    pub requests: usize,
    /// Of these, answered 2xx.
    pub acknowledged: usize,
    /// Of these, kept on the queue.
    pub buffered: usize,
    /// Answered 503: neither database nor queue took it, and it was sent again.
    pub refused: usize,
    /// Messages that were drained afterwards.
    pub drained: usize,
    /// How long hang-ups waited for their answer, sorted.
    pub waits: Vec<Duration>,
    /// How long answered callees waited for their document, sorted.
    pub answers: Vec<Duration>,
}

impl Report {
    /// The time within which so many of a hundred are done.
    pub fn percentile(sorted: &[Duration], percent: usize) -> Duration {
        let last = sorted.len().saturating_sub(1);
        sorted.get((sorted.len() * percent / 100).min(last)).copied().unwrap_or_default()
    }

    /// In a few lines.
    pub fn text(&self) -> String {
        let times = |sorted: &[Duration]| {
            let at = |percent| Self::percentile(sorted, percent).as_millis();
            format!("p50 {} ms, p99 {} ms, max {} ms", at(50), at(99), at(100))
        };
        format!(
            "{} hang-ups in {} requests: {} acknowledged, {} of them by the queue, {} refused and sent again; {} drained\n\
             hang-ups waited {}\n{} answer documents came after {}\n",
            self.calls,
            self.requests,
            self.acknowledged,
            self.buffered,
            self.refused,
            self.drained,
            times(&self.waits),
            self.answers.len(),
            times(&self.answers),
        )
    }
}

/// How long after a refusal a carrier comes again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often a document is asked for.
const ANSWER_EVERY: Duration = Duration::from_millis(100);
/// How long nothing may come forward before it is given up, and how often it is said how far it is. A busy machine is slow; it is
/// stuck only when nothing moves.
const STUCK_LIMIT: Duration = Duration::from_secs(60);
const TELL_EVERY: Duration = Duration::from_secs(5);
/// Batches that are drained side by side, as Lambda's event source does.
const DRAINERS: usize = 4;

/// Watches a number that should change until all is done.
struct Progress {
    last: String,
    moved: Instant,
    told: Instant,
}

impl Progress {
    fn new() -> Self {
        Self { last: String::new(), moved: Instant::now(), told: Instant::now() }
    }

    /// Takes down how far it is. Fails when that has not changed for too long.
    fn at(&mut self, far: String) -> Result<()> {
        if self.told.elapsed() >= TELL_EVERY {
            println!("  {far}");
            self.told = Instant::now();
        }
        if far != self.last {
            (self.last, self.moved) = (far, Instant::now());
        }
        ensure!(self.moved.elapsed() < STUCK_LIMIT, "nothing comes forward any more: {}", self.last);
        Ok(())
    }
}

struct World {
    /// With all its queues.
    whole: Intake,
    /// To it the queue is away.
    without_queue: Intake,
    carrier: CarrierStub,
    report: Mutex<Report>,
    began: Instant,
    queue_away: (Duration, Duration),
}

impl World {
    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn intake(&self) -> &Intake {
        let (from, until) = self.queue_away;
        if (from..until).contains(&self.began.elapsed()) { &self.without_queue } else { &self.whole }
    }

    /// Sends a hang-up until somebody takes it, as a carrier does.
    async fn hang_up(&self, call: &Create) -> Result<()> {
        let event = self.carrier.hangup(call, &TALKED)?;
        loop {
            let sent = Instant::now();
            let answer = event.send(self.intake()).await?;
            {
                let mut report = self.report();
                report.requests += 1;
                report.waits.push(sent.elapsed());
                match answer.status {
                    200..300 => {
                        report.acknowledged += 1;
                        report.buffered += usize::from(answer.json()["result"] == "buffered");
                        return Ok(());
                    }
                    503 => report.refused += 1,
                    status => anyhow::bail!("a hang-up was answered {status}: {}", answer.body),
                }
            }
            sleep(AGAIN).await;
        }
    }

    async fn answer(&self, call: &Create) -> Result<()> {
        let event = self.carrier.answer(call)?;
        let sent = Instant::now();
        let answer = event.send(self.intake()).await?;
        ensure!(answer.status == 200 && answer.body.contains("<Stream"), "an answered callee hears {}", answer.body);
        self.report().answers.push(sent.elapsed());
        Ok(())
    }
}

impl Storm {
    /// Plays it on a stack, waits until everything has come to rest, and fails unless each hang-up was applied once.
    pub async fn play(self, stack: &Stack) -> Result<Report> {
        let total = self.quiet * 2 + self.lasts;
        let calls = (total.as_secs_f64() * f64::from(self.rate)).ceil() as u32;
        let answered = u32::try_from(total.as_millis() / ANSWER_EVERY.as_millis())? + 1;
        let carrier = CarrierStub::start().await?;
        let legs = legs(stack, &carrier, calls + answered).await?;
        let mut config = stack.config.clone();
        config.queues.insert("intake".to_owned(), format!("{}-gone", stack.intake_queue.url));
        let middle = self.quiet + (self.lasts.saturating_sub(self.queue_away)) / 2;
        let (whole, without_queue) = (stack.intake()?, stack.intake_of(config)?);
        // The account's secret is known from an earlier event.
        for intake in [&whole, &without_queue] {
            ensure!(carrier.ring(&legs[0])?.send(intake).await?.status == 200, "the first event was not taken");
        }
        let world = Arc::new(World {
            whole,
            without_queue,
            carrier,
            report: Mutex::default(),
            began: Instant::now(),
            queue_away: (middle, middle + self.queue_away),
        });

        let mut tasks: JoinSet<Result<()>> = JoinSet::new();
        for (number, call) in legs.into_iter().enumerate() {
            let world = Arc::clone(&world);
            let hangs_up = number < calls as usize;
            let at = if hangs_up {
                Duration::from_secs_f64(number as f64 / f64::from(self.rate))
            } else {
                ANSWER_EVERY * u32::try_from(number)?.saturating_sub(calls)
            };
            tasks.spawn(async move {
                sleep(at).await;
                if !hangs_up {
                    return world.answer(&call).await;
                }
                for copy in 0..=number % self.copies.max(1) {
                    sleep(Duration::from_millis(7 * copy as u64)).await;
                    world.hang_up(&call).await?;
                }
                Ok(())
            });
        }
        sleep(self.quiet).await;
        self.begin(stack).await?;
        sleep(self.lasts).await;
        self.end(stack).await?;
        let mut progress = Progress::new();
        loop {
            match timeout(TELL_EVERY, tasks.join_next()).await {
                Ok(Some(done)) => done??,
                Ok(None) => break,
                Err(_) => {}
            }
            let (requests, acknowledged) = {
                let report = world.report();
                (report.requests, report.acknowledged)
            };
            // What is refused again and again comes no further: only what was taken counts.
            progress
                .at(format!("{acknowledged} acknowledged, {} to go", tasks.len()))
                .with_context(|| format!("{requests} requests were made"))?;
        }

        let mut report = std::mem::take(&mut *world.report());
        report.calls = calls as usize;
        report.waits.sort();
        report.answers.sort();
        report.drained = drain(stack, &world.whole, calls).await?;
        verify(stack, calls).await?;
        Ok(report)
    }

    async fn begin(self, stack: &Stack) -> Result<()> {
        match self.weather {
            Weather::DatabaseStopped => admit(stack, false).await,
            Weather::Road => {
                stack.proxy.make(Trouble::Everything);
                Ok(())
            }
        }
    }

    async fn end(self, stack: &Stack) -> Result<()> {
        match self.weather {
            Weather::DatabaseStopped => admit(stack, true).await,
            Weather::Road => {
                stack.proxy.make(Trouble::None);
                Ok(())
            }
        }
    }
}

/// Opens the database to PostgREST, or closes it and ends what is connected.
async fn admit(stack: &Stack, open: bool) -> Result<()> {
    let admin = stack.database.connect(Role::Admin).await?;
    let name = stack.value("select current_database()").await?;
    // The limit is for all but superusers, and for those alone who are not connected yet.
    let limit = if open { -1 } else { 0 };
    admin
        .batch_execute(&format!("alter database \"{name}\" with connection limit {limit}"))
        .await
        .context("the database can be neither opened nor closed")?;
    if !open {
        let ended = "select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and usename = 'authenticator'";
        admin.query_one(ended, &[]).await?;
    }
    Ok(())
}

/// Calls that the carrier has and that have not ended.
async fn legs(stack: &Stack, carrier: &CarrierStub, count: u32) -> Result<Vec<Create>> {
    let tenant = scene::sign_up(stack, "Storm").await?;
    let account = scene::connect_carrier(stack, &tenant, carrier).await?;
    let rows = stack
        .sql
        .query(
            "insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, status, dialled, submitted_at)
             select $1, $2, '+918000000000', '+9199' || lpad(number::text, 8, '0'), 'initiated', true, private.clock_now()
             from generate_series(1, $3::integer) as number
             returning id, callee_number",
            &[&tenant.id, &account, &i32::try_from(count)?],
        )
        .await?;
    let secrets = stack.keys.secrets()?;
    let not_after = chrono::Utc::now().timestamp() + 3_600;
    rows.iter()
        .map(|row| {
            let attempt_id: Uuid = row.get(0);
            let token = CallbackToken {
                attempt_id,
                carrier_account_id: account,
                record: false,
                not_after,
                agent_id: Uuid::nil(),
            };
            let url = |event| {
                let token = token.encode(&secrets.callback_keys, "plivo", event).context("no key")?;
                anyhow::Ok(callback_url(event, &token))
            };
            Ok(Create {
                call_uuid: Uuid::new_v4(),
                from: "+918000000000".to_owned(),
                to: row.get(1),
                answer_url: url(CallbackEvent::Answer)?,
                ring_url: url(CallbackEvent::Ring)?,
                hangup_url: url(CallbackEvent::Hangup)?,
            })
        })
        .collect()
}

/// Hands what the queue kept to the function until nothing is left to do. How many messages there were.
async fn drain(stack: &Stack, intake: &Intake, calls: u32) -> Result<usize> {
    let mut drained = 0;
    let mut progress = Progress::new();
    loop {
        // What failed stays hidden for a while, so that one round of each ends.
        let rounds = try_join_all((0..DRAINERS).map(|_| stack.intake_queue.deliver(intake))).await?;
        drained += rounds.iter().map(|Delivered { messages, .. }| messages).sum::<usize>();
        // What failed to apply is due at once, instead of in a minute.
        stack
            .sql
            .batch_execute("update private.webhook_events set next_try_at = now() where status = 'failed'")
            .await?;
        events::job(intake, "sweep").await?;
        let ended = stack.value("select count(*) from public.call_logs where status = 'ended'").await?;
        let waiting = stack.intake_queue.waiting().await?;
        if ended == calls.to_string() && waiting == 0 {
            return Ok(drained);
        }
        progress.at(format!("{ended} of {calls} hang-ups are applied, {drained} messages drained, {waiting} wait"))?;
        sleep(Duration::from_millis(200)).await;
    }
}

async fn verify(stack: &Stack, calls: u32) -> Result<()> {
    let kept = stack
        .value(
            "select count(*) || ' ' || count(distinct attempt_id) || ' ' || count(*) filter (where status = 'applied')
             from private.webhook_events where kind = 'hangup'",
        )
        .await?;
    ensure!(
        kept == format!("{calls} {calls} {calls}"),
        "of {calls} hang-ups these are kept, of calls, and applied: {kept}"
    );
    let counted = stack
        .value(
            "select count(*) || ' ' || count(distinct key) || ' ' || coalesce(sum(quantity), 0)
             from private.usage_events where source = 'call' and meter_key = 'ai_calls'",
        )
        .await?;
    ensure!(counted == format!("{calls} {calls} {calls}"), "of {calls} calls these are counted: {counted}");
    Ok(())
}
