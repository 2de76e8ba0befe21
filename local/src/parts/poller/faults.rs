//! How a queue can be worse than it should be, within what SQS promises: messages that come twice, and messages that are overtaken.

use aws_sdk_sqs::types::{Message, MessageSystemAttributeName};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::{Arc, Mutex, PoisonError};

/// Shares in per mille of the messages, each judged when it comes for the first time. None unless a run asks for them.
#[derive(Debug, Clone, Copy, Default)]
pub struct MessageFaults {
    /// Messages that two processes are given at the same time.
    pub duplicate: u16,
    /// Messages that are held back until later ones have overtaken them.
    pub reorder: u16,
    /// Decides which.
    pub seed: u64,
}

/// How often what struck.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MessageCounts {
    /// Messages that came.
    pub messages: u64,
    /// Of them, those that were given out twice.
    pub duplicated: u64,
    /// Of them, those that were held back.
    pub reordered: u64,
}

/// The faults in force and what they did. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Spoiler {
    faults: MessageFaults,
    state: Arc<Mutex<(StdRng, MessageCounts)>>,
}

impl Spoiler {
    pub(super) fn new(faults: MessageFaults) -> Self {
        let state = (StdRng::seed_from_u64(faults.seed), MessageCounts::default());
        Self { faults, state: Arc::new(Mutex::new(state)) }
    }

    pub(super) fn counts(&self) -> MessageCounts {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Splits a batch into what is delivered now and what is held back; third, those of the first that are delivered twice.
    pub(super) fn spoil(&self, batch: Vec<Message>) -> (Vec<Message>, Vec<Message>, Vec<Message>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut now, mut later, mut twice) = (Vec::new(), Vec::new(), Vec::new());
        for message in batch {
            let receives =
                message.attributes().and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount));
            if receives.is_some_and(|count| count != "1") {
                now.push(message);
                continue;
            }
            state.1.messages += 1;
            let mut strikes = |share: u16| state.0.random_range(0..1_000) < share;
            let (held, doubled) = (strikes(self.faults.reorder), strikes(self.faults.duplicate));
            if held {
                state.1.reordered += 1;
                later.push(message);
                continue;
            }
            if doubled {
                state.1.duplicated += 1;
                twice.push(message.clone());
            }
            now.push(message);
        }
        (now, later, twice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(count: usize, receives: &str) -> Vec<Message> {
        let name = MessageSystemAttributeName::ApproximateReceiveCount;
        (0..count)
            .map(|n| Message::builder().message_id(n.to_string()).attributes(name.clone(), receives).build())
            .collect()
    }

    #[test]
    fn each_message_is_judged_once_and_none_unless_asked() {
        let none = Spoiler::new(MessageFaults::default());
        assert_eq!(none.spoil(batch(50, "1")).0.len(), 50);
        let spoiler = Spoiler::new(MessageFaults { duplicate: 200, reorder: 100, seed: 7 });
        let (now, later, twice) = spoiler.spoil(batch(1_000, "1"));
        assert_eq!(now.len() + later.len(), 1_000);
        let counts = spoiler.counts();
        assert_eq!(
            (counts.messages, counts.reordered, counts.duplicated),
            (1_000, later.len() as u64, twice.len() as u64)
        );
        assert!((60..140).contains(&later.len()) && (130..250).contains(&twice.len()), "{counts:?}");
        assert_eq!(spoiler.spoil(batch(100, "2")).0.len(), 100);
        assert_eq!(spoiler.counts().messages, 1_000);
    }
}
