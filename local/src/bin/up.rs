//! Starts the stack alone, tells how to reach it, and runs until it is interrupted.

use anyhow::Result;
use clap::Parser;
use local::{
    parts::progress::Progress,
    shutdown,
    stack::{Stack, StackOptions},
    welcome::Welcome,
};
use std::{io::Write, process::ExitCode};
use url::Url;

/// Starts Trunkline on this machine and runs it until Ctrl-C.
#[derive(Debug, Parser)]
#[command(name = "up", bin_name = "cargo up")]
struct Arguments {
    /// Print addresses, keys, two organizations and the carrier account as one line of JSON.
    #[arg(long)]
    json: bool,
    /// Port of the API on 127.0.0.1 [default: a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Root of the carrier's API, in place of the simulated carrier.
    #[arg(long, value_name = "URL")]
    carrier_url: Option<Url>,
    /// Account at that carrier [default: a random one, which is printed]
    #[arg(long, value_name = "ID", requires = "carrier_url")]
    carrier_auth_id: Option<String>,
    /// Its token, which signs callbacks too [default: a random one, which is printed]
    #[arg(long, value_name = "TOKEN", requires = "carrier_url")]
    carrier_auth_token: Option<String>,
    /// Where /rest/v1 goes, in place of the stack's own PostgREST, which runs all the same.
    #[arg(long, value_name = "URL")]
    postgrest_url: Option<Url>,
    /// Processes a function.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Keep the real time, though nobody may be called at this hour of the day [default: at night it is 10:00 in Kolkata]
    #[arg(long)]
    real_time: bool,
    /// What the functions log.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse_from(local::arguments())).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let progress = Progress::visible();
    let options = StackOptions {
        port: arguments.port,
        postgrest_url: arguments.postgrest_url.clone(),
        workers: arguments.workers,
        log_level: arguments.log_level.clone(),
        progress: progress.clone(),
        ..StackOptions::default()
    };
    let interrupted = shutdown::requested()?;
    tokio::pin!(interrupted);
    let started = async {
        let stack = Stack::start(options).await?;
        if !arguments.real_time {
            stack.open_for_calls().await?;
        }
        let welcome = Welcome::prepare(&stack, arguments.carrier()).await?;
        anyhow::Ok((stack, welcome))
    };
    let (stack, welcome) = tokio::select! {
        started = started => started?,
        // What was started so far is killed as it is dropped.
        () = &mut interrupted => return Ok(()),
    };
    if arguments.json {
        print(&welcome.json(&stack).to_string());
    } else {
        print(&welcome.text(&stack));
    }
    interrupted.await;
    progress.print("  stopping");
    welcome.stop().await;
    stack.stop().await
}

impl Arguments {
    fn carrier(&self) -> Option<local::welcome::OtherCarrier> {
        self.carrier_url.clone().map(|url| local::welcome::OtherCarrier {
            url,
            auth_id: self.carrier_auth_id.clone(),
            auth_token: self.carrier_auth_token.clone(),
        })
    }
}

fn print(text: &str) {
    let mut output = std::io::stdout();
    // Whoever wanted to read it may be gone; the stack runs on.
    let _closed = writeln!(output, "{text}").and_then(|()| output.flush());
}
