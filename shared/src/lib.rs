//! What more than one function needs, and nothing else.
//!
//! A function crate reads its [`config::Config`], builds its clients once, and hands a value that implements
//! [`trigger::Function`] to [`trigger::run`]. Everything between the Lambda runtime and the function's own decisions is here:
//! telling triggers apart, talking to Supabase, queueing, verifying signatures, and the errors all of them answer with.

pub mod api_key;
pub mod config;
pub mod error;
pub mod http;
pub mod mac;
pub mod metrics;
#[cfg(feature = "queue")]
pub mod queue;
pub mod seal;
pub mod secrets;
pub mod signed_link;
pub mod standard_webhooks;
pub mod storage;
pub mod supabase;
pub mod telemetry;
pub mod telephony;
pub mod trigger;

pub use error::{Error, Result};
