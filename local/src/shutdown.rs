//! When a person or a supervisor wants us to end.

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

/// Resolves at the first Ctrl-C, SIGTERM or hang-up of the terminal. A second one ends the process at once: its children die with it.
pub fn requested() -> Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        let any = async |interrupt: &mut tokio::signal::unix::Signal, terminate: &mut tokio::signal::unix::Signal| {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        tokio::select! {
            () = any(&mut interrupt, &mut terminate) => {}
            _ = hangup.recv() => {}
        }
        tokio::spawn(async move {
            any(&mut interrupt, &mut terminate).await;
            std::process::exit(130);
        });
    })
}
