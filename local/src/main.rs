//! What is done with the system by hand: filling a database, and making the files that are made from the schema.

use anyhow::{Context, Result};
use clap::Parser;
use local::{
    operate,
    parts::{
        folder::{self, RunFolder},
        install, postgres,
        postgres::{Postgres, PostgresOptions, Role, Server},
        progress::Progress,
        supabase,
    },
    schema::{self, data},
    stack::DATABASE,
};
use std::fs;

/// Trunkline on this machine. `cargo demo` plays the story, `cargo up` starts the stack; these are the other things one does.
#[derive(Debug, Parser)]
#[command(name = "local", bin_name = "cargo run -p local --")]
enum Arguments {
    /// Fill a database with realistic data, the same for the same seed.
    Seed(SeedArguments),
    /// Make master_schema.sql, docs/schema.md and types.ts again from supabase/schemas.
    Generate,
    /// Look at what came in from outside, and have it applied again.
    #[command(subcommand)]
    Events(operate::events::Events),
    /// Enter accounts at carriers and payment gateways, and seal credentials anew.
    #[command(subcommand)]
    Accounts(operate::accounts::Accounts),
    /// See what stops dialling, and stop it or let it go on: everybody's, an account's, an organization's, a campaign's.
    #[command(subcommand)]
    Dialling(operate::dialling::Dialling),
    /// Look at calls that have no end.
    #[command(subcommand)]
    Attempts(operate::attempts::Attempts),
    /// See whose usage does not add up, and let somebody be billed again.
    #[command(subcommand)]
    Billing(operate::billing::Billing),
    /// Tell the database where a stack's functions are, and with what key it nudges them.
    Connect(operate::connect::Connect),
    /// Find what is wrong with an installation, why, and what puts it right. Ends with 1 where something is.
    Doctor(operate::doctor::Doctor),
    /// After a backup was restored: stop dialling until calls and numbers since then are known.
    Restored(operate::restored::Restored),
    /// Look at queues, and send through again what a function gave up on.
    #[command(subcommand)]
    Queues(operate::queues::Queues),
    /// Load rate decks and exchange rates, and see what calls leave.
    #[command(subcommand)]
    Rates(operate::rates::Rates),
}

#[derive(Debug, clap::Args)]
struct SeedArguments {
    /// The database, as a superuser; what `cargo up` prints.
    #[arg(long, value_name = "URL", env = "DATABASE_URL")]
    database_url: String,
    #[arg(long, default_value_t = 1)]
    seed: i64,
    #[arg(long, default_value_t = 10)]
    organizations: i32,
    #[arg(long, default_value_t = 1_000)]
    leads: i32,
    #[arg(long, default_value_t = 10_000)]
    calls: i32,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Arguments::parse_from(local::arguments()) {
        Arguments::Seed(arguments) => seed(&arguments).await,
        Arguments::Generate => generate().await,
        Arguments::Events(command) => {
            print!("{}", operate::events::run(&command).await?);
            Ok(())
        }
        Arguments::Accounts(command) => {
            print!("{}", operate::accounts::run(&command, std::io::stdin()).await?);
            Ok(())
        }
        Arguments::Dialling(command) => {
            print!("{}", operate::dialling::run(&command).await?);
            Ok(())
        }
        Arguments::Attempts(command) => {
            print!("{}", operate::attempts::run(&command).await?);
            Ok(())
        }
        Arguments::Billing(command) => {
            print!("{}", operate::billing::run(&command).await?);
            Ok(())
        }
        Arguments::Connect(command) => {
            print!("{}", operate::connect::run(&command).await?);
            Ok(())
        }
        Arguments::Doctor(command) => {
            let (page, healthy) = operate::doctor::run(&command).await?;
            print!("{page}");
            if healthy { Ok(()) } else { std::process::exit(1) }
        }
        Arguments::Restored(command) => {
            print!("{}", operate::restored::run(&command).await?);
            Ok(())
        }
        Arguments::Queues(command) => {
            print!("{}", operate::queues::run(&command).await?);
            Ok(())
        }
        Arguments::Rates(command) => {
            print!("{}", operate::rates::run(&command).await?);
            Ok(())
        }
    }
}

async fn seed(arguments: &SeedArguments) -> Result<()> {
    let mut client = postgres::connect(&arguments.database_url).await?;
    let began = std::time::Instant::now();
    let amount = data::Amount {
        seed: arguments.seed,
        organizations: arguments.organizations,
        leads: arguments.leads,
        calls: arguments.calls,
    };
    data::generate(&mut client, amount).await?;
    println!(
        "{} organizations, {} leads, {} calls in {:.1} s",
        amount.organizations,
        amount.leads,
        amount.calls,
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

async fn generate() -> Result<()> {
    let workspace = folder::workspace()?;
    let files = schema::files()?;
    fs::write(workspace.join("supabase/master_schema.sql"), schema::master::render(&files))?;
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let cli = install::supabase_cli(&progress).await?;
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    let client = postgres.connect(Role::Owner, DATABASE).await?;
    fs::write(workspace.join("docs/schema.md"), schema::docs::render(&client, &files).await?)?;
    let types = schema::types::render(&cli, &owner, run.path()).await.context("types.ts")?;
    fs::write(workspace.join("supabase/types.ts"), types)?;
    postgres.stop().await
}
