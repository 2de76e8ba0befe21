//! What the tests stand on: real parts, one database a test, and everything gone when the run ends.
//!
//! - [`Database`] is a clone of one template to which the real Supabase CLI has applied `supabase/`; [`Stack`] adds a PostgREST of
//!   its own behind a counting [`Proxy`] and the key gateway, and queues, for functions that are called in process.
//! - [`supervisor`] is the process that all test processes of a run share: it owns PostgreSQL and the queue server, and ends them
//!   when the run ends, however it ends.
//! - [`scene`] plays what users and operators do before the point where a test begins; [`carrier`] is a carrier that does as it is
//!   told, for a single outcome at a time; [`deliveries`] are what all carriers send, as it was recorded.

pub mod advisor;
pub mod agents;
pub mod callbacks;
pub mod carrier;
pub mod commerce;
pub mod database;
pub mod deliveries;
pub mod events;
pub mod fan_out;
pub mod gateways;
pub mod lints;
pub mod media;
pub mod never_twice;
pub mod pgtap;
pub mod plans;
pub mod programs;
pub mod proxy;
pub mod queues;
pub mod receiver;
pub mod required;
pub mod scene;
pub mod stack;
pub mod storm;
pub mod supervisor;
pub mod tap;
pub mod tenants;
pub mod vectors;

pub use database::{Database, Fingerprint};
pub use proxy::Proxy;
pub use stack::Stack;

/// The path of the supervisor's binary, which only an integration test is told.
#[macro_export]
macro_rules! supervisor_binary {
    () => {
        ::std::path::Path::new(env!("CARGO_BIN_EXE_stack-supervisor"))
    };
}
