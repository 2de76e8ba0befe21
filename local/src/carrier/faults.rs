//! Ways in which a carrier, or the road to it, can be worse than it should be. All off unless a test asks for them.

use super::outcome::Draw;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Shares in per mille of the creates or callbacks they spoil, and the times they take. Which ones are spoilt follows from the seed,
/// so that a failure can be repeated.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// Callbacks sent twice.
    pub duplicate_callbacks: u16,
    /// Callbacks held back until later ones of the same call have overtaken them.
    pub reorder_callbacks: u16,
    /// Callbacks sent late, by `callback_delay_ms`.
    pub delay_callbacks: u16,
    /// Callbacks never sent. The answer document is always fetched: no carrier can do without it.
    pub drop_callbacks: u16,
    /// How late a delayed or reordered callback is, in milliseconds of real time.
    pub callback_delay_ms: u64,
    /// Calls accepted and dialled, the response cut off.
    pub lose_responses: u16,
    /// Calls accepted and dialled, the response late by `response_delay_ms`: with enough delay the caller times out.
    pub slow_responses: u16,
    /// How late a slow response is, in milliseconds of real time.
    pub response_delay_ms: u64,
    /// Calls accepted and dialled, answered 500: the lie that makes naive callers dial twice.
    pub lie_after_accept: u16,
    /// Creates answered 500, nothing dialled.
    pub fail_creates: u16,
    /// Creates answered 429, nothing dialled.
    pub throttle_creates: u16,
    /// Creates answered 400, nothing dialled.
    pub refuse_creates: u16,
}

/// What a fault spoils.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// See [`Faults::duplicate_callbacks`].
    Duplicate,
    /// See [`Faults::reorder_callbacks`].
    Reorder,
    /// See [`Faults::delay_callbacks`].
    Delay,
    /// See [`Faults::drop_callbacks`].
    Drop,
    /// See [`Faults::lose_responses`].
    LoseResponse,
    /// See [`Faults::slow_responses`].
    SlowResponse,
    /// See [`Faults::lie_after_accept`].
    Lie,
    /// See [`Faults::fail_creates`].
    Fail,
    /// See [`Faults::throttle_creates`].
    Throttle,
    /// See [`Faults::refuse_creates`].
    Refuse,
}

/// The faults in force and how often each struck.
#[derive(Debug, Default)]
pub(super) struct FaultBox {
    faults: Mutex<Faults>,
    struck: Mutex<BTreeMap<Fault, u64>>,
}

impl FaultBox {
    pub(super) fn new(faults: Faults) -> Self {
        Self { faults: Mutex::new(faults), struck: Mutex::default() }
    }

    pub(super) fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    pub(super) fn get(&self) -> Faults {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn struck(&self) -> BTreeMap<Fault, u64> {
        self.struck.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether `fault` strikes the event that `key` names; counted when it does.
    pub(super) fn strikes(&self, fault: Fault, seed: u64, key: &[&str]) -> bool {
        let faults = self.get();
        let share = match fault {
            Fault::Duplicate => faults.duplicate_callbacks,
            Fault::Reorder => faults.reorder_callbacks,
            Fault::Delay => faults.delay_callbacks,
            Fault::Drop => faults.drop_callbacks,
            Fault::LoseResponse => faults.lose_responses,
            Fault::SlowResponse => faults.slow_responses,
            Fault::Lie => faults.lie_after_accept,
            Fault::Fail => faults.fail_creates,
            Fault::Throttle => faults.throttle_creates,
            Fault::Refuse => faults.refuse_creates,
        };
        if share == 0 {
            return false;
        }
        let name = format!("{fault:?}");
        let parts: Vec<&str> = std::iter::once(name.as_str()).chain(key.iter().copied()).collect();
        let strikes = Draw::new(seed, &parts).below(0, 1_000) < u32::from(share);
        if strikes {
            *self.struck.lock().unwrap_or_else(PoisonError::into_inner).entry(fault).or_default() += 1;
        }
        strikes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_strikes_unless_asked() {
        let faults = FaultBox::new(Faults::default());
        assert!((0..100).all(|n| !faults.strikes(Fault::Drop, 7, &[&n.to_string()])));
        assert!(faults.struck().is_empty());
    }

    #[test]
    fn strikes_the_same_events_each_time_and_counts_them() {
        let faults = FaultBox::new(Faults { drop_callbacks: 250, ..Faults::default() });
        let strike = || (0..400).filter(|n| faults.strikes(Fault::Drop, 7, &[&n.to_string()])).collect::<Vec<_>>();
        let first = strike();
        assert!((60..140).contains(&first.len()), "{}", first.len());
        assert_eq!(first, strike());
        assert_eq!(faults.struck()[&Fault::Drop], 2 * first.len() as u64);
    }
}
