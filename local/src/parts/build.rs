//! Builds the functions' binaries with cargo, in the dev profile.

use crate::parts::{
    folder,
    process::{Command, quote},
    progress::Progress,
};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::{
    env,
    path::{Path, PathBuf},
};
use tokio::io::{AsyncBufReadExt, BufReader};

/// What cargo says of each crate it has finished, as far as it matters here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    executable: Option<PathBuf>,
    #[serde(default)]
    fresh: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds the binaries of these packages; the folder they are in. Where there is no cargo, they are taken from beside this program.
pub async fn functions(packages: &[String], progress: &Progress, logs: &Path) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    if !Path::new(&cargo).is_file() && folder::require_program("cargo", "to build the functions").is_err() {
        return beside_us(packages);
    }
    let step = progress.step("Functions");
    step.say("building");
    let log = logs.join("build.log");
    let mut process = Command::new(cargo)
        .args(["build", "--message-format=json-render-diagnostics"])
        // Chosen together with this crate, they share its dependencies as they are built already: alone, they would need fewer
        // features of them, and build them all anew.
        .args(["--package", env!("CARGO_PKG_NAME")])
        .args(packages.iter().flat_map(|package| ["--package", package, "--bin", package]))
        .folder(folder::workspace()?)
        // What cargo told this program about its own package would make build scripts that look at it run again.
        .clear_env()
        .envs(env::vars_os().filter(|(name, _)| !is_of_our_own_package(&name.to_string_lossy())))
        .pipe_stdout()
        .log(&log)
        .spawn()
        .await?;
    let mut lines = BufReader::new(process.take_stdout().context("cargo has no output")?).lines();
    let (mut compiled, mut folder) = (0, None);
    while let Some(line) = lines.next_line().await? {
        let Ok(message) = serde_json::from_str::<Message>(&line) else { continue };
        if message.reason != "compiler-artifact" {
            continue;
        }
        let Some(target) = message.target else { continue };
        if !message.fresh {
            compiled += 1;
            step.say(format!("{compiled} crates built, last {}", target.name));
        }
        if packages.contains(&target.name)
            && let Some(parent) = message.executable.as_deref().and_then(Path::parent)
        {
            folder = Some(parent.to_path_buf());
        }
    }
    let status = process.wait().await?;
    if !status.success() {
        bail!("the functions do not build{}", quote(&log));
    }
    step.done(format!("{} built", packages.len()));
    folder.context("cargo built no function")
}

fn is_of_our_own_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|prefix| name.starts_with(prefix))
        || ["CARGO_PRIMARY_PACKAGE", "LD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "OUT_DIR"].contains(&name)
}

fn beside_us(packages: &[String]) -> Result<PathBuf> {
    let program = env::current_exe()?;
    // Tests run in `deps`, one folder below.
    program
        .ancestors()
        .skip(1)
        .take(2)
        .find(|folder| packages.iter().all(|package| folder.join(package).is_file()))
        .map(Path::to_path_buf)
        .context("the functions are not built, and there is no cargo to build them")
}
