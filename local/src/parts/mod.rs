//! The parts of a stack. Each is a struct that runs from its `start` to its `stop`, and is killed when it is dropped or when this
//! process dies.

pub mod build;
pub mod clock;
pub mod folder;
pub mod gateway;
pub mod install;
pub mod keys;
pub mod lambda;
pub mod poller;
pub mod postgres;
pub mod postgrest;
pub mod process;
pub mod progress;
pub mod relay;
pub mod sqs;
pub mod supabase;
pub mod template;

use anyhow::{Context, Result};
use axum::serve::{ListenerExt, TapIo};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// The HTTP client of the stack's own parts: they are all on this machine, so no proxy of the environment comes in between.
pub fn http_client() -> Result<reqwest::Client> {
    // A second installation in one process keeps the first.
    let _already = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(2))
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("trunkline-local/", env!("CARGO_PKG_VERSION")))
        .build()
        .context("the HTTP client cannot be built")
}

/// The listener, whose connections send a small answer at once: one that is passed on in pieces would wait for the acknowledgement of its
/// first piece otherwise, which a client delays by 40 milliseconds.
pub fn without_delay(listener: TcpListener) -> TapIo<TcpListener, fn(&mut TcpStream)> {
    listener.tap_io(|stream| {
        let _unsupported = stream.set_nodelay(true);
    })
}
