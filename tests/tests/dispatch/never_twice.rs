//! `cargo run -p tests --bin never-twice` in a size for CI: sixteen handlers at once, of which some die at any step, every message
//! several times, answers and callbacks lost. The carrier's log says what came of it, callee by callee.

use super::*;
use aws_sdk_sqs::types::Message;
use futures::future::try_join_all;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use tests::callbacks::BUSY;
use tokio::time::timeout;

const HANDLERS: usize = 16;
const LEADS: u32 = 20;
/// Calls at once at most.
const LIMIT: usize = 7;
/// Hours of business time from one to the next: more than the gap between two calls, and more of them than retries need.
const TIMES: [&str; 12] = [
    "24T10:00", "24T13:00", "24T16:00", "24T19:00", "25T10:00", "25T13:00", "25T16:00", "25T19:00", "26T10:00",
    "26T14:00", "27T10:00", "27T14:00",
];
const WAVES: usize = 8;

struct Chaos {
    stack: Stack,
    campaign: Campaign,
    rng: StdRng,
    /// Every message that ever was.
    messages: Arc<Mutex<Vec<Message>>>,
    over: BTreeSet<Uuid>,
    killed: usize,
}

impl Chaos {
    fn messages(&self) -> Vec<Message> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Handlers at once: each releases, takes what is on the queue, or has messages again that others had. Half of them die.
    async fn handlers(&mut self) -> Result<()> {
        let known = self.messages();
        let mut running = Vec::new();
        for _ in 0..HANDLERS {
            let dispatch = self.stack.dispatch()?;
            let role = self.rng.random_range(0..4);
            let again: Vec<Message> = known.choose_multiple(&mut self.rng, 10).cloned().collect();
            let dies_after = self.rng.random_bool(0.5).then(|| Duration::from_millis(self.rng.random_range(0..150)));
            let (queue, kept) = (self.stack.dial_queue.clone(), Arc::clone(&self.messages));
            running.push(async move {
                let work = async {
                    match role {
                        0 => drop(release(&dispatch).await?),
                        1 if !again.is_empty() => drop(hand_over(&dispatch, &again).await?),
                        _ => {
                            let taken = queue.receive().await?;
                            kept.lock().unwrap_or_else(PoisonError::into_inner).extend(taken.iter().cloned());
                            if !taken.is_empty() {
                                hand_over(&dispatch, &taken).await?;
                            }
                        }
                    }
                    anyhow::Ok(())
                };
                // What is dropped in the middle of whatever it waits for is as one that is killed there.
                match dies_after {
                    Some(after) => Ok(timeout(after, work).await.is_err()),
                    None => work.await.map(|()| false),
                }
            });
        }
        let died: Vec<bool> = try_join_all(running).await?;
        self.killed += died.into_iter().filter(|died| *died).count();
        Ok(())
    }

    /// Calls at the carrier that are not over.
    fn live(&self) -> Vec<Create> {
        let mut creates = self.campaign.carrier.creates();
        creates.retain(|create| !self.over.contains(&create.call_uuid));
        creates
    }

    /// Ends the calls that are live; of some nobody tells, and the carrier has to be asked.
    async fn hang_up(&mut self) -> Result<()> {
        let intake = self.stack.intake()?;
        for call in self.live() {
            self.over.insert(call.call_uuid);
            if self.rng.random_bool(0.1) {
                let now = chrono::Utc::now().format("%Y-%m-%d %H:%M:%S+00:00").to_string();
                self.campaign.carrier.keep_record(json!({
                    "call_uuid": call.call_uuid, "from_number": call.from.trim_start_matches('+'), "to_number": call.to.trim_start_matches('+'),
                    "initiation_time": now, "end_time": now, "call_duration": 0, "bill_duration": 0, "total_amount": "0",
                    "call_state": "BUSY", "hangup_cause_code": 3010, "hangup_cause_name": "Busy Line",
                }));
                continue;
            }
            let ending = if self.rng.random_bool(0.3) { TALKED } else { BUSY };
            for _ in 0..self.rng.random_range(1..=2) {
                assert_eq!(self.campaign.carrier.hangup(&call, &ending)?.send(&intake).await?.status, 200);
            }
        }
        // Eleven minutes later: whoever was at it is not any more.
        self.stack
            .sql
            .batch_execute(
                "update public.call_logs set begun_at = begun_at - interval '11 minutes', lease_until = now() - interval '1 second'
                 where status <> 'ended'",
            )
            .await?;
        events::job(&self.campaign.dispatch, "reconcile").await?;
        self.stack.intake_queue.deliver(&intake).await?;
        Ok(())
    }

    /// Waits for the requests of those who died: they are at the carrier within the ten minutes after which it is asked the last time.
    async fn comes_to_rest(&self) {
        let mut creates = usize::MAX;
        while creates != self.campaign.carrier.creates().len() {
            creates = self.campaign.carrier.creates().len();
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    async fn open(&self) -> Result<usize> {
        Ok(self
            .stack
            .value("select count(*) from public.call_logs where status not in ('ended', 'created')")
            .await?
            .parse()?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_called_twice_whoever_dies_and_no_more_at_once_than_may_be() -> Result<()> {
    let (stack, campaign) = running(LEADS).await?;
    stack.sql.execute("update public.campaigns set max_concurrent_calls = $1", &[&(LIMIT as i32)]).await?;
    let mut rng = StdRng::seed_from_u64(5);
    for phone in phones(1, LEADS) {
        let reaction = match rng.random_range(0..4) {
            0 => Reaction::CutOff,
            1 => Reaction::AcceptAfter(Duration::from_millis(60)),
            _ => Reaction::Accept,
        };
        campaign.carrier.react(&phone, reaction);
    }
    let messages = Arc::default();
    let mut chaos = Chaos { stack, campaign, rng, messages, over: BTreeSet::new(), killed: 0 };
    let mut at = Vec::new();
    let mut most = 0;
    for time in TIMES {
        chaos.stack.set_clock(&format!("2026-11-{time}:00+05:30")).await?;
        for _ in 0..WAVES {
            let before = chaos.campaign.carrier.creates().len();
            chaos.handlers().await?;
            // What nobody took, or died with, is offered again.
            chaos
                .stack
                .sql
                .batch_execute(
                    "update public.call_logs set lease_until = now() - interval '1 second' where status = 'created'",
                )
                .await?;
            release(&chaos.campaign.dispatch).await?;
            chaos.handlers().await?;
            chaos.comes_to_rest().await;
            let live = chaos.live().len();
            assert!(live <= LIMIT, "{live} calls at once, at {time}");
            most = most.max(live);
            at.resize(chaos.campaign.carrier.creates().len(), time);
            chaos.hang_up().await?;
            assert_eq!(chaos.open().await?, 0, "at {time}");
            if chaos.campaign.carrier.creates().len() == before {
                break;
            }
        }
    }
    assert_eq!(most, LIMIT, "the limit is reached");
    assert!(chaos.killed > 20, "only {} handlers died", chaos.killed);

    // The carrier's log, callee by callee.
    let creates = chaos.campaign.carrier.creates();
    let mut calls: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (create, time) in creates.iter().zip(&at) {
        calls.entry(&create.to).or_default().push(time);
    }
    assert_eq!(calls.len(), LEADS as usize, "everybody is called");
    for (callee, times) in &calls {
        assert!(times.windows(2).all(|pair| pair[0] != pair[1]), "{callee} was called at {times:?}");
        let days = times.iter().map(|time| &time[..2]);
        let most = days.clone().map(|day| days.clone().filter(|other| *other == day).count()).max();
        assert!(most <= Some(2), "{callee} was called at {times:?}");
    }
    let ends = "select string_agg(distinct log.status::text, ' ') || ', ' || (select count(*) from private.call_holds)
        || ' held, ' || (select count(*) from public.call_queue where status in ('queued', 'processing')) || ' to call'
        from public.call_logs as log";
    assert_eq!(chaos.stack.value(ends).await?, "ended, 0 held, 0 to call");
    Ok(())
}
