//! Plivo: signature V3, callbacks, answer documents and the call API.
//!
//! Where Plivo's prose and its official SDKs disagree, the SDKs are followed (plivo-python 4.63, plivo-node 4.79).

pub mod answer;
pub mod api;
pub mod callback;
pub mod signature;

/// The name in paths, tokens and tables.
pub const NAME: &str = "plivo";
