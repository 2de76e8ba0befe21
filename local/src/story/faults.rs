//! What goes wrong on purpose while the campaign runs, and how often it did.
//!
//! The carrier and the queues have their shares; processes are killed and the database is stopped by a clock of their own. A run that was
//! to be rough and was not has proved nothing: what struck is counted, and too little of it is a check that fails.

use super::report::Check;
use crate::{
    carrier::{Carrier, Fault, Faults},
    parts::{poller::MessageFaults, progress::Progress},
    stack::Stack,
};
use anyhow::Result;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};

/// How long a process is waited for that can be killed: one that was killed a moment ago is being replaced.
const REPLACED_WITHIN: Duration = Duration::from_millis(20);
const TRIES: usize = 100;

/// How rough it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Severity {
    /// As on a bad day.
    Mild,
    /// Worse than any day.
    Severe,
}

/// How much has to have struck at least: shares in per mille, and counts.
struct Least {
    doubled: u64,
    reordered: u64,
    lost_callbacks: u64,
    lost_responses: u64,
    kills: u64,
    stops: u64,
}

impl Severity {
    const fn least(self) -> Least {
        match self {
            Self::Mild => {
                Least { doubled: 30, reordered: 20, lost_callbacks: 5, lost_responses: 5, kills: 3, stops: 0 }
            }
            Self::Severe => {
                Least { doubled: 150, reordered: 100, lost_callbacks: 50, lost_responses: 50, kills: 30, stops: 1 }
            }
        }
    }

    /// The shares aimed at: enough above the least that chance does not end below it.
    const fn aim(share: u64) -> u16 {
        (share + share / 2) as u16 + 5
    }

    /// The carrier's part.
    pub const fn carrier(self) -> Faults {
        let least = self.least();
        Faults {
            duplicate_callbacks: Self::aim(least.doubled),
            reorder_callbacks: Self::aim(least.reordered),
            delay_callbacks: 0,
            drop_callbacks: Self::aim(least.lost_callbacks),
            callback_delay_ms: 400,
            lose_responses: Self::aim(least.lost_responses),
            slow_responses: 0,
            response_delay_ms: 0,
            lie_after_accept: 0,
            fail_creates: 0,
            throttle_creates: 0,
            refuse_creates: 0,
        }
    }

    /// The queues' part.
    pub const fn messages(self, seed: u64) -> MessageFaults {
        let least = self.least();
        MessageFaults { duplicate: Self::aim(least.doubled), reorder: Self::aim(least.reordered), seed }
    }
}

/// What struck, by name.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Injected {
    /// Calls that the carrier accepted.
    pub creates: u64,
    /// Of their answers, those that were lost.
    pub lost_responses: u64,
    /// Callbacks that the carrier had to send; answer documents are none.
    pub callbacks: u64,
    /// Of them, those that were sent twice.
    pub doubled_callbacks: u64,
    /// Of them, those that were overtaken.
    pub reordered_callbacks: u64,
    /// Of them, those that were never sent.
    pub lost_callbacks: u64,
    /// Messages of the queues.
    pub messages: u64,
    /// Of them, those that two processes had at the same time.
    pub doubled_messages: u64,
    /// Of them, those that were overtaken.
    pub reordered_messages: u64,
    /// SIGKILLs by function.
    pub kills: BTreeMap<String, u64>,
    /// Immediate stops of PostgreSQL.
    pub database_stops: u64,
}

/// What kills processes and stops the database while a campaign runs.
#[derive(Debug)]
pub(super) struct Injector {
    severity: Severity,
    rng: StdRng,
    pause: Duration,
    injected: Injected,
}

impl Injector {
    /// Spreads what it does over the time that so many leads take.
    pub(super) fn new(severity: Severity, seed: u64, leads: usize) -> Self {
        let pause = Duration::from_millis((leads as u64 * 3 / 5).clamp(250, 6_000));
        Self { severity, rng: StdRng::seed_from_u64(seed), pause, injected: Injected::default() }
    }

    /// Does it; returns when all is done.
    pub(super) async fn run(&mut self, stack: &Stack, progress: &Progress) -> Result<()> {
        let least = self.severity.least();
        let functions: Vec<&str> = stack.template.functions.iter().map(|function| function.package.as_str()).collect();
        let step = progress.step("Faults");
        for round in 1..=least.kills {
            for function in &functions {
                // Not all functions at one moment.
                let pause = self.pause.mul_f64(2.0 * self.rng.random::<f64>() / functions.len() as f64);
                tokio::time::sleep(pause).await;
                self.kill(stack, function).await;
            }
            step.say(format!("{round} processes of each function killed"));
            if least.stops > 0 && round == least.kills / 2 {
                step.say("PostgreSQL stopped at once");
                stack.postgres.crash_and_restart().await?;
                self.injected.database_stops += 1;
            }
        }
        let stops = self.injected.database_stops;
        step.done(format!("{} processes of each function killed, PostgreSQL stopped {stops} times", least.kills));
        Ok(())
    }

    async fn kill(&mut self, stack: &Stack, function: &str) {
        for _ in 0..TRIES {
            if stack.functions.kill_one(function, self.rng.random_range(0..1_000)) {
                *self.injected.kills.entry(function.to_owned()).or_default() += 1;
                return;
            }
            tokio::time::sleep(REPLACED_WITHIN).await;
        }
    }

    /// What struck, with what the carrier and the queues counted.
    pub(super) fn injected(self, stack: &Stack, carrier: Option<&Carrier>) -> Injected {
        let struck = carrier.map(Carrier::faults_struck).unwrap_or_default();
        let struck = |fault| struck.get(&fault).copied().unwrap_or_default();
        let messages = stack.message_counts();
        Injected {
            creates: carrier.map_or(0, |carrier| carrier.creates() as u64),
            lost_responses: struck(Fault::LoseResponse),
            callbacks: carrier.map_or(0, |carrier| carrier.callbacks().offered),
            doubled_callbacks: struck(Fault::Duplicate),
            reordered_callbacks: struck(Fault::Reorder),
            lost_callbacks: struck(Fault::Drop),
            messages: messages.messages,
            doubled_messages: messages.duplicated,
            reordered_messages: messages.reordered,
            ..self.injected
        }
    }
}

impl Injected {
    /// That as much struck as was to. What somebody else's carrier does wrong is not ours to say.
    pub(super) fn checks(&self, severity: Severity, carrier_is_ours: bool, functions: usize) -> Vec<Check> {
        let least = severity.least();
        // A side that is large enough is the least itself: the two are then the same.
        let at_least = |claim, count: u64, least: u64| Check { claim, sides: (count.min(least) as i64, least as i64) };
        let share =
            |claim, count: u64, of: u64, least: u64| at_least(claim, count, (of * least).div_ceil(1_000).max(1));
        let kills: u64 = self.kills.values().map(|kills| (*kills).min(least.kills)).sum();
        let mut checks = vec![
            share("enough messages came twice", self.doubled_messages, self.messages, least.doubled),
            share("enough messages were overtaken", self.reordered_messages, self.messages, least.reordered),
            at_least("enough processes were killed", kills, least.kills * functions as u64),
            at_least("PostgreSQL was stopped at once", self.database_stops, least.stops),
        ];
        if carrier_is_ours {
            checks.extend([
                share("enough callbacks came twice", self.doubled_callbacks, self.callbacks, least.doubled),
                share("enough callbacks were overtaken", self.reordered_callbacks, self.callbacks, least.reordered),
                share("enough callbacks were lost", self.lost_callbacks, self.callbacks, least.lost_callbacks),
                share("enough answers to a create were lost", self.lost_responses, self.creates, least.lost_responses),
            ]);
        }
        checks
    }

    /// Name and count of each, as a person reads them.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let of = |count: u64, all: u64| format!("{count} of {all} ({:.1} %)", 100.0 * count as f64 / all.max(1) as f64);
        let kills: Vec<String> = self.kills.iter().map(|(function, kills)| format!("{function} {kills}")).collect();
        vec![
            ("messages doubled", of(self.doubled_messages, self.messages)),
            ("messages overtaken", of(self.reordered_messages, self.messages)),
            ("callbacks doubled", of(self.doubled_callbacks, self.callbacks)),
            ("callbacks overtaken", of(self.reordered_callbacks, self.callbacks)),
            ("callbacks lost", of(self.lost_callbacks, self.callbacks)),
            ("answers to a create lost", of(self.lost_responses, self.creates)),
            ("SIGKILLs", kills.join(", ")),
            ("stops of PostgreSQL", self.database_stops.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enough() -> Injected {
        Injected {
            creates: 100,
            lost_responses: 5,
            callbacks: 300,
            doubled_callbacks: 45,
            reordered_callbacks: 30,
            lost_callbacks: 15,
            messages: 100,
            doubled_messages: 15,
            reordered_messages: 10,
            kills: BTreeMap::from([("a".to_owned(), 30), ("b".to_owned(), 31)]),
            database_stops: 1,
        }
    }

    fn missed(injected: &Injected) -> Vec<&'static str> {
        let checks = injected.checks(Severity::Severe, true, 2);
        checks.into_iter().filter(|check| !check.holds()).map(|check| check.claim).collect()
    }

    #[test]
    fn a_run_that_was_too_gentle_fails() {
        assert!(missed(&enough()).is_empty());
        let short = |change: fn(&mut Injected)| {
            let mut injected = enough();
            change(&mut injected);
            missed(&injected).len()
        };
        for change in [
            |all: &mut Injected| all.lost_responses = 4,
            |all: &mut Injected| all.doubled_callbacks = 44,
            |all: &mut Injected| all.reordered_callbacks = 29,
            |all: &mut Injected| all.lost_callbacks = 14,
            |all: &mut Injected| all.doubled_messages = 14,
            |all: &mut Injected| all.reordered_messages = 9,
            |all: &mut Injected| all.database_stops = 0,
            // One function's many do not make up for another's few.
            |all: &mut Injected| all.kills = BTreeMap::from([("a".to_owned(), 29), ("b".to_owned(), 99)]),
        ] {
            assert_eq!(short(change), 1);
        }
        assert_eq!(missed(&Injected::default()).len(), 8);
    }
}
