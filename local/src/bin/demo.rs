//! Starts the stack, plays the story from leads to an invoice, and tells how it ended.

use anyhow::{Context, Result};
use clap::Parser;
use local::{
    parts::progress::Progress,
    shutdown,
    stack::{Stack, StackOptions},
    story::{self, Played, Provider, Severity, StoryOptions},
};
use std::{
    fs,
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Instant,
};
use url::Url;

/// How many times faster than deployed the schedules fire: what a nudge missed is found in seconds.
const SPEED: f64 = 20.0;

/// Takes a campaign from leads to an invoice, on real parts, on this machine.
#[derive(Debug, Parser)]
#[command(name = "demo", bin_name = "cargo demo --")]
struct Arguments {
    /// Decides how calls end: two seeds give two invoices.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Number of leads; beyond the 200 of the CSV they are made up.
    #[arg(long, value_name = "N", default_value_t = story::leads_shipped() as u32, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    calls: u32,
    /// Leave everything running afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Print the table also as one JSON object, on the last line.
    #[arg(long)]
    json: bool,
    /// Kill PostgREST in the middle, for five seconds.
    #[arg(long)]
    kill_postgrest: bool,
    /// What goes wrong meanwhile: messages, callbacks and answers lost, doubled and overtaken, processes killed.
    #[arg(long, value_name = "HOW")]
    faults: Option<Severity>,
    /// Have the operator stop all dialling in the middle, and let it go on.
    #[arg(long)]
    kill_switch: bool,
    /// Calls at the same time at most [default: by the number of leads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=10_000))]
    live_calls: Option<i32>,
    /// Whose API the carrier speaks: plivo, twilio, telnyx or vonage.
    #[arg(long, value_name = "NAME", default_value = "plivo")]
    provider: Provider,
    /// Root of the carrier's API, in place of the simulated carrier.
    #[arg(long, value_name = "URL")]
    carrier_url: Option<Url>,
    /// Account at that carrier [default: a random one]
    #[arg(long, value_name = "ID", requires_all = ["carrier_url", "carrier_auth_token"])]
    carrier_auth_id: Option<String>,
    /// Its token, which signs callbacks too, or a JSON object of its secrets [default: a random one]
    #[arg(long, value_name = "TOKEN", requires_all = ["carrier_url", "carrier_auth_id"])]
    carrier_auth_token: Option<String>,
    /// Where /rest/v1 goes, in place of the stack's own PostgREST, which runs all the same.
    #[arg(long, value_name = "URL")]
    postgrest_url: Option<Url>,
    /// Processes a function.
    #[arg(long, value_name = "N", default_value_t = 6)]
    workers: usize,
    /// What the functions log.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse_from(local::arguments())).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
    let started = Instant::now();
    let progress = Progress::visible();
    let interrupted = shutdown::requested()?;
    tokio::pin!(interrupted);
    let stack = tokio::select! {
        stack = Stack::start(arguments.stack(&progress)) => stack?,
        // What was started so far is killed as it is dropped.
        () = &mut interrupted => return Ok(ExitCode::from(130)),
    };
    let options = arguments.story();
    let played = tokio::select! {
        played = story::play(&stack, &options, &progress, started) => played,
        () = &mut interrupted => {
            stack.stop().await?;
            return Ok(ExitCode::from(130));
        }
    };
    let played = match played {
        Ok(played) => played,
        Err(error) => {
            let logs = stack.log_dir.clone();
            stack.stop().await?;
            return Err(error.context(format!("the story broke off; the logs are in {}", logs.display())));
        }
    };
    let code = if played.report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    tell(&played, &arguments)?;
    if arguments.keep {
        // Not among the moving lines any more: those would be drawn again, over the table.
        eprintln!("  Everything is still running. Ctrl-C stops it.");
        interrupted.await;
        eprintln!("  stopping");
    }
    if let Some(carrier) = played.carrier {
        carrier.stop().await;
    }
    stack.stop().await?;
    Ok(code)
}

impl Arguments {
    fn stack(&self, progress: &Progress) -> StackOptions {
        StackOptions {
            postgrest_url: self.postgrest_url.clone(),
            workers: self.workers,
            speed: SPEED,
            log_level: self.log_level.clone(),
            progress: progress.clone(),
            ..self.story().stack()
        }
    }

    fn story(&self) -> StoryOptions {
        StoryOptions {
            seed: self.seed,
            leads: self.calls as usize,
            live_calls: self.live_calls,
            kill_postgrest: self.kill_postgrest,
            faults: self.faults,
            kill_switch: self.kill_switch,
            provider: self.provider,
            carrier_url: self.carrier_url.clone(),
            long_calls: 0,
            carrier_account: self.carrier_auth_id.clone().zip(self.carrier_auth_token.clone()),
        }
    }
}

/// Prints the table, and keeps it with the logs.
fn tell(played: &Played, arguments: &Arguments) -> Result<()> {
    let report = &played.report;
    let numbers = serde_json::to_string(&report.numbers)?;
    fs::create_dir_all(&report.log_dir)
        .and_then(|()| fs::write(report.log_dir.join("table.txt"), story::render(report, false)))
        .and_then(|()| fs::write(report.log_dir.join("table.json"), &numbers))
        .with_context(|| format!("cannot write to {}", report.log_dir.display()))?;
    let mut out = std::io::stdout().lock();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    write!(out, "{}", story::render(report, colour))?;
    if !arguments.keep {
        writeln!(out, "  API, database and carrier end with the demo; with --keep they stay.")?;
    }
    writeln!(out)?;
    if arguments.json {
        writeln!(out, "{numbers}")?;
    }
    out.flush()?;
    Ok(())
}
