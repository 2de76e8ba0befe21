//! A crowd of endpoints of which some hang, fail, redirect or lead inside: who is well has everything soon, whatever the others do.

use crate::{
    Stack,
    events::{self, HttpEvent},
    queues::Queue,
    receiver::Receiver,
    scene::{self, TUESDAY_TEN, Tenant},
};
use anyhow::{Context, Result, ensure};
use event_delivery::{Delivery, Sender};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use uuid::Uuid;

/// How ten endpoints behave, one after the other.
const CROWD: [&str; 10] = ["ok", "hang", "ok", "half", "ok", "redirect", "ok", "rebound", "ok", "ok"];
/// Batches at once, as `template.yaml` says of the two queues.
const HANDLERS: [usize; 2] = [20, 10];
/// How often what is due is claimed, besides by handlers: in earnest every new event nudges.
const CLAIM_EVERY: Duration = Duration::from_millis(200);
const IDLE: Duration = Duration::from_millis(50);
/// How long nothing may come forward before it is given up.
const STUCK_LIMIT: Duration = Duration::from_secs(120);

/// What is played.
#[derive(Debug, Clone, Copy)]
pub struct Crowd {
    /// Endpoints of all organizations.
    pub endpoints: usize,
    /// Endpoints of each, twenty at most.
    pub each: usize,
    /// Events of each organization, every one for all of its endpoints.
    pub events: usize,
    /// Events a second of each organization.
    pub rate: usize,
    /// How long an endpoint has to answer.
    pub patience: Duration,
    /// How often what failed is tried again afterwards, with the clock set forward.
    pub rounds: usize,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Events of all organizations.
    pub events: usize,
    /// Endpoints of all.
    pub endpoints: usize,
    /// Requests that reached the receiver.
    pub requests: usize,
    /// From the first event to the last.
    pub told: Duration,
    /// From the last event until the last healthy endpoint had its last event.
    pub behind: Duration,
    /// From an event to a healthy endpoint, sorted.
    pub waits: Vec<Duration>,
    /// Names asked for.
    pub resolved: usize,
}

impl Report {
    /// In a few lines.
    pub fn text(&self) -> String {
        let at = |percent: usize| {
            let last = self.waits.len().saturating_sub(1);
            self.waits.get((self.waits.len() * percent / 100).min(last)).copied().unwrap_or_default().as_millis()
        };
        format!(
            "{} events in {:.1} s to {} endpoints, {} requests; every healthy endpoint had all of its events {:.1} s after the last\n\
             an event waited p50 {} ms, p95 {} ms, p99 {} ms, max {} ms; {} names were resolved, and none was connected to",
            self.events,
            self.told.as_secs_f64(),
            self.endpoints,
            self.requests,
            self.behind.as_secs_f64(),
            at(50),
            at(95),
            at(99),
            at(100),
            self.resolved,
        )
    }
}

/// A name server that gives another answer every time, none of which leads outside alone.
struct Rebinding(AtomicUsize);

impl Resolve for Rebinding {
    fn resolve(&self, _: Name) -> Resolving {
        const ANSWERS: [&[&str]; 6] = [
            &["127.0.0.1:0"],
            &["93.184.215.14:0", "127.0.0.1:0"],
            &["[::1]:0"],
            &["169.254.169.254:0"],
            &["[::ffff:127.0.0.1]:0"],
            &["[fd00:ec2::254]:0"],
        ];
        let answer = ANSWERS[self.0.fetch_add(1, Ordering::SeqCst) % ANSWERS.len()];
        Box::pin(async move {
            let found = answer.iter().map(|text| text.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// A port of this machine that nobody may connect to; how often somebody did.
async fn trap() -> Result<(u16, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (port, connected) = (listener.local_addr()?.port(), Arc::<AtomicUsize>::default());
    let counted = Arc::clone(&connected);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    Ok((port, connected))
}

/// One handler of a queue, until it is told to stop.
async fn handle(queue: Queue, delivery: Arc<Delivery>, stop: Arc<AtomicBool>) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        let delivered = queue.deliver_some(&*delivery, 1).await?;
        ensure!(delivered.failed == 0, "{delivered:?}");
        if delivered.messages == 0 {
            sleep(IDLE).await;
        }
    }
    Ok(())
}

async fn claim(delivery: Arc<Delivery>, stop: Arc<AtomicBool>) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        events::job(&*delivery, "deliver").await?;
        sleep(CLAIM_EVERY).await;
    }
    Ok(())
}

struct World<'a> {
    stack: &'a Stack,
    crowd: Crowd,
    receiver: Receiver,
    names: Arc<Rebinding>,
    tenants: Vec<Tenant>,
}

impl World<'_> {
    fn delivery(&self, patience: Duration) -> Result<Arc<Delivery>> {
        let sender = Sender::resolving_with(Arc::clone(&self.names) as Arc<dyn Resolve>, patience, true)?;
        Ok(Arc::new(self.stack.delivery()?.sending_with(sender)))
    }

    /// Handlers and claims, as many as there are in earnest, until `done` says that it is enough.
    async fn run_until(&self, patience: Duration, mut far: impl AsyncFnMut() -> Result<(usize, bool)>) -> Result<()> {
        let (stop, mut running) = (Arc::<AtomicBool>::default(), JoinSet::new());
        for (queue, handlers) in [&self.stack.event_queue, &self.stack.slow_event_queue].into_iter().zip(HANDLERS) {
            for _ in 0..handlers {
                running.spawn(handle(queue.clone(), self.delivery(patience)?, Arc::clone(&stop)));
            }
        }
        running.spawn(claim(self.delivery(patience)?, Arc::clone(&stop)));
        let (mut last, mut moved) = (usize::MAX, Instant::now());
        loop {
            let (at, done) = far().await?;
            if done {
                break;
            }
            if at != last {
                (last, moved) = (at, Instant::now());
            }
            ensure!(moved.elapsed() < STUCK_LIMIT, "nothing comes forward any more: {last}");
            tokio::select! {
                Some(ended) = running.join_next() => ended?.context("a handler")?,
                () = sleep(IDLE) => {}
            }
        }
        stop.store(true, Ordering::SeqCst);
        while let Some(ended) = running.join_next().await {
            ended?.context("a handler")?;
        }
        Ok(())
    }

    /// The names of the endpoints that behave so, each with the index of its organization.
    fn that_are(&self, behaviour: &str) -> Vec<(usize, String)> {
        let of_kind = |nth: &usize| CROWD[nth % CROWD.len()] == behaviour;
        (0..self.crowd.endpoints).filter(of_kind).map(|nth| (nth / self.crowd.each, name(nth))).collect()
    }

    /// What failed waits for as long as the schedule says, and what leads inside says so.
    async fn check_schedule(&self) -> Result<()> {
        let early = "select count(*) from public.event_deliveries where status = 'failed' and not next_attempt_at - last_attempt_at
            between (array['5 s', '5 min', '30 min', '2 h'])[attempts]::interval and (array['6 s', '6 min', '36 min', '144 min'])[attempts]::interval";
        ensure!(self.stack.value(early).await? == "0", "the schedule is not kept");
        let reached = "select count(*) from public.event_deliveries as delivery
            join public.webhook_endpoints as endpoint on endpoint.id = delivery.endpoint_id
            where endpoint.url like 'https://rebound%' and delivery.attempts > 0
              and (delivery.response_status is not null or delivery.error not like '%not one of the public internet')";
        ensure!(self.stack.value(reached).await? == "0", "something came of what leads inside");
        Ok(())
    }
}

fn name(nth: usize) -> String {
    format!("{}-{nth}", CROWD[nth % CROWD.len()])
}

async fn listen(stack: &Stack, tenant: &Tenant, url: &str) -> Result<()> {
    // By the database: a name that leads nowhere is refused at once, and these are to be found out when they are sent to.
    let arguments = json!({ "endpoint_id": Uuid::new_v4(), "url": url, "events": ["lead.created"] });
    let delivery = stack.delivery()?;
    let request = HttpEvent::post("/functions/v1/event-delivery/endpoints").bearer(tenant.jwt()).json(&arguments)?;
    let answer = request.send(&delivery).await?;
    ensure!(answer.status == 201, "POST endpoints: {} {}", answer.status, answer.body);
    Ok(())
}

impl Crowd {
    /// Plays it on a stack. Fails unless each healthy endpoint has each event, what failed keeps the schedule, and nothing led inside.
    pub async fn play(self, stack: &Stack) -> Result<Report> {
        stack.set_clock(TUESDAY_TEN).await?;
        // Two thousand leads are more than a trial has room for.
        stack.sql.batch_execute("update public.subscription_plans set features = features - 'max_leads'").await?;
        let (port, trapped) = trap().await?;
        let mut world = World {
            stack,
            crowd: self,
            receiver: Receiver::start().await?,
            names: Arc::new(Rebinding(AtomicUsize::new(0))),
            tenants: Vec::new(),
        };
        for nth in 0..self.endpoints {
            if nth % self.each == 0 {
                world.tenants.push(scene::sign_up(stack, &format!("Crowd {nth}")).await?);
            }
            let path = name(nth);
            let url = match CROWD[nth % CROWD.len()] {
                "rebound" => format!("https://{path}.example:{port}/"),
                _ => world.receiver.url(&path),
            };
            listen(stack, &world.tenants[nth / self.each], &url).await?;
        }

        let began = Instant::now();
        let healthy = world.that_are("ok");
        let (mut made, mut last) = (0, began);
        let wanted = self.events * healthy.len();
        world
            .run_until(self.patience, async || {
                let due = (began.elapsed().as_secs_f64() * self.rate as f64).ceil() as usize;
                if made < self.events.min(due) {
                    let until = self.events.min(due);
                    for tenant in &world.tenants {
                        let sql = "insert into public.leads (organization_id, name, phone)
                             select $1, 'Lead ' || n, '+9198' || lpad(n::text, 8, '0') from generate_series($2::bigint, $3) as n";
                        stack.sql.execute(sql, &[&tenant.id, &(made as i64 + 1), &(until as i64)]).await?;
                    }
                    (made, last) = (until, Instant::now());
                }
                let arrived: usize = healthy.iter().map(|(_, name)| world.receiver.events(name)).sum();
                Ok((arrived, arrived == wanted))
            })
            .await?;
        let report = self.report(&world, began, last).await?;
        world.check_schedule().await?;

        // Who failed is tried again when it is due. Half of what was refused once is taken now.
        for wait in ["7 seconds", "7 minutes", "40 minutes"].into_iter().take(self.rounds) {
            stack
                .sql
                .batch_execute(&format!(
                    "update private.clock_offset set shift = shift + interval '{wait}';
                     update public.event_deliveries set lease_until = null, lease_token = null where lease_until is not null"
                ))
                .await?;
            world
                .run_until(Duration::from_millis(250), async || {
                    let left = "select count(*) from public.event_deliveries where status in ('pending', 'failed') and next_attempt_at <= private.clock_now()";
                    let left: usize = stack.value(left).await?.parse()?;
                    Ok((left, left == 0))
                })
                .await?;
            world.check_schedule().await?;
        }
        ensure!(trapped.load(Ordering::SeqCst) == 0, "a private address was connected to");
        ensure!(world.receiver.count("trap") == 0, "a redirect was followed");
        for (_, name) in world.that_are("half").into_iter().filter(|_| self.rounds > 0) {
            let events = world.receiver.events(&name);
            ensure!(events == self.events, "{events} of {} came to {name}", self.events);
        }
        Ok(report)
    }

    async fn report(&self, world: &World<'_>, began: Instant, last: Instant) -> Result<Report> {
        let mut waits = Vec::new();
        let received = world.receiver.all();
        let end = received.iter().filter(|one| one.name.starts_with("ok-")).map(|one| one.at).max().unwrap_or(last);
        // The moment of an event is business time, which runs as real time does from the clock that was set.
        let shift = world.stack.value("select extract(epoch from shift) from private.clock_offset").await?;
        let shift: f64 = shift.parse()?;
        let now = (Instant::now(), chrono::Utc::now());
        for one in received.iter().filter(|one| one.name.starts_with("ok-")) {
            let told =
                one.event()["timestamp"].as_str().and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok());
            let told = told.context("an event without a time")?.to_utc();
            let arrived = now.1 - chrono::TimeDelta::from_std(now.0 - one.at)?;
            let wait = (arrived - told).num_milliseconds() as f64 / 1_000.0 + shift;
            waits.push(Duration::from_secs_f64(wait.max(0.0)));
        }
        waits.sort();
        for (organization, name) in world.that_are("ok") {
            let tenant = &world.tenants[organization];
            let sql = "select id::text from private.outbox where organization_id = $1 and topic = 'lead.created'";
            let told = world.stack.sql.query(sql, &[&tenant.id]).await?.iter().map(|row| row.get(0)).collect();
            ensure!(world.receiver.ids(&name) == told, "{name} has not what happened");
        }
        Ok(Report {
            events: self.events * world.tenants.len(),
            endpoints: self.endpoints,
            requests: received.len(),
            told: last - began,
            behind: end.saturating_duration_since(last),
            waits,
            resolved: world.names.0.load(Ordering::SeqCst),
        })
    }
}
