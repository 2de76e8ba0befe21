//! One process that all test processes of a run share. It owns PostgreSQL, the template and the queue server.
//!
//! The first test that needs it takes a file lock beside the binary and starts it; the others find its socket in a file there. A test
//! holds a connection for as long as it lives, and asks over it, one JSON object a line, for a database or for the queues. When the
//! connection closes, the test's databases and its folder are removed: a test that panics or is killed cleans up too.
//!
//! It ends 5 s after the last connection has closed, and at once when whoever runs the tests (cargo, nextest) is gone. All that it
//! starts dies with it. A test process in turn ends itself when its parent is gone, so that a run that was killed leaves nothing.

mod client;
mod server;
mod template;

pub use client::Attached;
pub use server::serve;

use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What a test asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
enum Ask {
    /// To be counted in; `parent` is the process that runs the tests.
    Attach { parent: u32 },
    /// A clone of the template; without `migrated`, of a database that has only what Supabase adds.
    Database { migrated: bool },
    /// The queue server.
    Queues,
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
enum Answer {
    /// A folder of the test's own.
    Attached { folder: PathBuf },
    /// The database's URL by the name of the role that connects.
    Database { name: String, urls: BTreeMap<String, String> },
    /// Endpoint of the queue server and the variables that AWS's clients read.
    Queues { url: String, environment: BTreeMap<String, String> },
    /// It cannot be had, and why.
    Failed { why: String },
}

/// Where a running supervisor is found: beside its binary, so that every target folder has its own.
struct Rendezvous {
    /// Held while somebody attaches, or while the supervisor decides to end.
    lock: PathBuf,
    /// Holds the path of the socket.
    state: PathBuf,
    /// What the supervisor has to say besides; of the last run.
    log: PathBuf,
}

impl Rendezvous {
    fn beside(binary: &Path) -> Self {
        Self {
            lock: binary.with_extension("lock"),
            state: binary.with_extension("socket"),
            log: binary.with_extension("log"),
        }
    }
}

/// Whether a process is there and is more than a zombie.
pub fn is_alive(pid: u32) -> bool {
    if Path::new("/proc/self/stat").exists() {
        // "pid (name) state …", and the name may hold anything.
        return std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])));
    }
    let asked = Command::new("kill").args(["-0", &pid.to_string()]).stderr(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}
