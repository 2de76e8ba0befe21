//! One function's events: who waits for a process, which processes wait for an event.

use super::{Activity, InvocationOutcome};
use crate::parts::{process, template::Function};
use anyhow::{Result, bail};
use axum::body::Bytes;
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

/// How many events may wait for a process before further ones are throttled.
const WAITING_LIMIT: usize = 1_000;

/// Why an event failed that no process could take.
pub(super) const STOPPED: &str = "the function was stopped";

/// A function, its waiting events and its idle processes.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) function: Function,
    pub(super) log: PathBuf,
    queues: Mutex<Queues>,
    pids: Mutex<Vec<u32>>,
    counts: Arc<Counts>,
    health: watch::Sender<Health>,
}

#[derive(Debug, Default)]
struct Queues {
    waiting: VecDeque<Invocation>,
    /// The last one that became idle is taken first: its memory is still in the processor's cache.
    idle: Vec<oneshot::Sender<Invocation>>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Counts {
    open: AtomicU64,
    started: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    Starting,
    Ready,
    Failed(String),
}

/// An event on its way to its answer. Dropped unanswered, its caller learns that the process is gone.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) id: String,
    pub(super) payload: Bytes,
    reply: Option<oneshot::Sender<InvocationOutcome>>,
    counts: Arc<Counts>,
}

impl Invocation {
    /// Answers it. The caller may have gone; the answer is then nobody's.
    pub(super) fn answer(mut self, outcome: InvocationOutcome) {
        if matches!(outcome, InvocationOutcome::FunctionError { .. }) {
            self.counts.failed.fetch_add(1, Relaxed);
        }
        if let Some(reply) = self.reply.take() {
            // Closed before its caller hears of it, so that a caller never sees its own event as still open.
            self.counts.open.fetch_sub(1, Relaxed);
            let _caller_gone = reply.send(outcome);
        }
    }

    /// Answers it with an error in Lambda's words.
    pub(super) fn fail(self, error_type: &str, what: &str) {
        let message = format!("RequestId: {} Error: {what}", self.id);
        self.answer(InvocationOutcome::error(error_type, &message));
    }
}

impl Drop for Invocation {
    fn drop(&mut self) {
        if self.reply.is_some() {
            self.counts.open.fetch_sub(1, Relaxed);
            self.counts.failed.fetch_add(1, Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks leaves them half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    pub(super) fn new(function: &Function, log: PathBuf) -> Self {
        Self {
            function: function.clone(),
            log,
            queues: Mutex::default(),
            pids: Mutex::default(),
            counts: Arc::default(),
            health: watch::Sender::new(Health::Starting),
        }
    }

    /// Queues an event and waits for its answer.
    pub(super) async fn invoke(&self, payload: Bytes) -> InvocationOutcome {
        let (reply, answer) = oneshot::channel();
        let invocation = Invocation {
            id: Uuid::new_v4().to_string(),
            payload,
            reply: Some(reply),
            counts: Arc::clone(&self.counts),
        };
        self.counts.open.fetch_add(1, Relaxed);
        self.counts.started.fetch_add(1, Relaxed);
        self.place(invocation, false);
        answer.await.unwrap_or_else(|_| InvocationOutcome::error("Runtime.ExitError", STOPPED))
    }

    /// Gives an event back that its process never saw; it is the next one again.
    pub(super) fn give_back(&self, invocation: Invocation) {
        self.place(invocation, true);
    }

    fn place(&self, mut invocation: Invocation, first: bool) {
        let mut queues = lock(&self.queues);
        while let Some(idle) = queues.idle.pop() {
            match idle.send(invocation) {
                Ok(()) => return,
                // That process is gone.
                Err(returned) => invocation = returned,
            }
        }
        if queues.closed {
            drop(queues);
            invocation.fail("Runtime.ExitError", STOPPED);
        } else if first {
            queues.waiting.push_front(invocation);
        } else if queues.waiting.len() < WAITING_LIMIT {
            queues.waiting.push_back(invocation);
        } else {
            drop(queues);
            invocation.answer(InvocationOutcome::Throttled);
        }
    }

    /// The next event for a process. Nothing is lost when this is cancelled.
    pub(super) async fn take(&self) -> Invocation {
        let turn = {
            let mut queues = lock(&self.queues);
            if let Some(invocation) = queues.waiting.pop_front() {
                return invocation;
            }
            let (sender, turn) = oneshot::channel();
            // Those of processes that died idle would pile up.
            queues.idle.retain(|idle| !idle.is_closed());
            queues.idle.push(sender);
            turn
        };
        let mut turn = Turn { lane: self, turn };
        match (&mut turn.turn).await {
            Ok(invocation) => invocation,
            // The sender lives in `idle` until it sends.
            Err(_) => std::future::pending().await,
        }
    }

    /// The oldest event that waits, to be failed when no process will come for it.
    pub(super) fn take_waiting(&self) -> Option<Invocation> {
        lock(&self.queues).waiting.pop_front()
    }

    /// Ends all waiting: no process will come any more.
    pub(super) fn close(&self) {
        let waiting = {
            let mut queues = lock(&self.queues);
            queues.closed = true;
            std::mem::take(&mut queues.waiting)
        };
        waiting.into_iter().for_each(|invocation| invocation.fail("Runtime.ExitError", STOPPED));
    }

    pub(super) fn activity(&self) -> Activity {
        let open = self.counts.open.load(Relaxed);
        let queued = lock(&self.queues).waiting.len() as u64;
        Activity {
            queued,
            in_flight: open.saturating_sub(queued),
            started: self.counts.started.load(Relaxed),
            failed: self.counts.failed.load(Relaxed),
        }
    }

    pub(super) fn process_started(&self, pid: u32) {
        lock(&self.pids).push(pid);
    }

    pub(super) fn process_ended(&self, pid: u32) {
        lock(&self.pids).retain(|other| *other != pid);
    }

    pub(super) fn processes(&self) -> Vec<u32> {
        lock(&self.pids).clone()
    }

    /// Kills the `nth` process, counted round.
    pub(super) fn kill_one(&self, nth: usize) -> bool {
        let pids = lock(&self.pids);
        let pid = nth.checked_rem(pids.len()).map(|index| pids[index]);
        pid.is_some_and(process::kill)
    }

    /// A process asked for its first event.
    pub(super) fn is_ready(&self) {
        self.health.send_if_modified(|health| std::mem::replace(health, Health::Ready) != Health::Ready);
    }

    /// A process ended before it asked for an event; of interest while none ever did.
    pub(super) fn init_failed(&self, why: &str) {
        self.health.send_if_modified(|health| {
            let first = *health == Health::Starting;
            if first {
                *health = Health::Failed(why.to_owned());
            }
            first
        });
    }

    /// Waits until a process asks for events.
    pub(super) async fn ready(&self) -> Result<()> {
        let mut health = self.health.subscribe();
        let settled = health.wait_for(|health| *health != Health::Starting).await?;
        match &*settled {
            Health::Failed(why) => {
                bail!("{} does not start: {why}{}", self.function.package, process::quote(&self.log))
            }
            _ => Ok(()),
        }
    }
}

/// An idle process's place in the row.
struct Turn<'a> {
    lane: &'a Lane,
    turn: oneshot::Receiver<Invocation>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turn.close();
        if let Ok(invocation) = self.turn.try_recv() {
            self.lane.give_back(invocation);
        }
    }
}
