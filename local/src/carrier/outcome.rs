//! What becomes of a call: a pure function of the seed, the number called and how often it was called before.
//!
//! So a story ends with the same table whatever the timing was: how fast calls were made, in which order, and what broke on the way.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How a call ends when nobody interferes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A person picks up and talks.
    Answered,
    /// The line is busy.
    Busy,
    /// It rings until the ring timeout.
    NoAnswer,
    /// The callee declines.
    Rejected,
    /// The number does not exist: a property of the number, so that it never changes.
    Invalid,
    /// An answering machine picks up.
    Machine,
}

/// Shares of the outcomes, in per mille of all calls to numbers that exist; what is left of a thousand is answered.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Share of busy lines.
    pub busy: u16,
    /// Share of calls nobody answers.
    pub no_answer: u16,
    /// Share of declined calls.
    pub rejected: u16,
    /// Share of answering machines.
    pub machine: u16,
    /// Share of numbers that do not exist, in per mille of all numbers.
    pub invalid_numbers: u16,
}

impl Default for Mix {
    fn default() -> Self {
        Self { busy: 130, no_answer: 180, rejected: 40, machine: 70, invalid_numbers: 30 }
    }
}

/// What is decided about a call before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// How it ends.
    pub outcome: Outcome,
    /// How long it talks, in simulated seconds; 0 when nobody answers.
    pub talk_seconds: u32,
    /// Picks one of several causes that mean the same outcome.
    pub variant: u8,
    /// Varies the real time that the call's stages take, 0 to 999.
    pub pace: [u16; 2],
}

/// Numbers derived from what names a decision; the same names give the same numbers on every machine.
pub struct Draw([u8; 32]);

impl Draw {
    /// A draw named by `parts`.
    pub fn new(seed: u64, parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        hash.update(seed.to_be_bytes());
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        Self(hash.finalize().into())
    }

    /// The `index`th number below `bound`; index 0 to 7.
    pub fn below(&self, index: usize, bound: u32) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[index * 4..index * 4 + 4]);
        u32::from_be_bytes(bytes) % bound.max(1)
    }
}

/// The fate of the `nth` call (from 1) to `callee` (digits only).
pub fn fate(seed: u64, mix: &Mix, callee: &str, nth: u32) -> Fate {
    let draw = Draw::new(seed, &["call", callee, &nth.to_string()]);
    let number = Draw::new(seed, &["number", callee]);
    let outcome = if number.below(0, 1_000) < u32::from(mix.invalid_numbers) {
        Outcome::Invalid
    } else {
        let shares = [
            (Outcome::Busy, mix.busy),
            (Outcome::NoAnswer, mix.no_answer),
            (Outcome::Rejected, mix.rejected),
            (Outcome::Machine, mix.machine),
        ];
        let mut point = draw.below(0, 1_000);
        let mut outcome = Outcome::Answered;
        for (candidate, share) in shares {
            match point.checked_sub(u32::from(share)) {
                Some(rest) => point = rest,
                None => {
                    outcome = candidate;
                    break;
                }
            }
        }
        outcome
    };
    let talk_seconds = match outcome {
        // Most calls are short, some are long: the smaller of two draws.
        Outcome::Answered => 15 + draw.below(1, 226).min(draw.below(2, 226)),
        Outcome::Machine => 8 + draw.below(1, 23),
        Outcome::Busy | Outcome::NoAnswer | Outcome::Rejected | Outcome::Invalid => 0,
    };
    Fate {
        outcome,
        talk_seconds,
        variant: draw.below(3, 256) as u8,
        pace: [draw.below(4, 1_000) as u16, draw.below(5, 1_000) as u16],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_same_names_give_the_same_fate() {
        let mix = Mix::default();
        for nth in 1..4 {
            assert_eq!(fate(7, &mix, "919812345678", nth), fate(7, &mix, "919812345678", nth));
        }
        let outcomes = |seed| (1..40).map(|nth| fate(seed, &mix, "919812345678", nth)).collect::<Vec<_>>();
        assert_ne!(outcomes(7), outcomes(8));
    }

    #[test]
    fn an_invalid_number_is_always_invalid() {
        let mix = Mix::default();
        let invalid = (0..5_000)
            .map(|n| format!("9198{n:08}"))
            .filter(|number| fate(7, &mix, number, 1).outcome == Outcome::Invalid)
            .inspect(|number| assert!((2..6).all(|nth| fate(7, &mix, number, nth).outcome == Outcome::Invalid)))
            .count();
        assert!((100..200).contains(&invalid), "{invalid}");
    }

    #[test]
    fn the_shares_are_as_promised() {
        let mix = Mix::default();
        let mut counts = BTreeMap::new();
        for n in 0..20_000 {
            let fate = fate(1, &mix, &format!("9197{n:08}"), 1);
            *counts.entry(fate.outcome).or_insert(0) += 1;
            assert_eq!(fate.talk_seconds > 0, matches!(fate.outcome, Outcome::Answered | Outcome::Machine));
            assert!(fate.talk_seconds <= 240);
        }
        assert!((10_800..11_600).contains(&counts[&Outcome::Answered]), "{counts:?}");
        assert!((2_300..2_800).contains(&counts[&Outcome::Busy]), "{counts:?}");
        assert!((3_200..3_800).contains(&counts[&Outcome::NoAnswer]), "{counts:?}");
    }
}
