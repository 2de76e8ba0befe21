//! A count and a page of calls: a user's token and no filter, so that the policy decides, against a token that passes all policies and
//! the organization written into the request. Same PostgREST, same connections, in turns.

use crate::figures::Times;
use anyhow::{Result, ensure};
use local::{
    parts::{
        self,
        folder::RunFolder,
        install,
        keys::Keys,
        postgres::{Postgres, PostgresOptions, Role, Server},
        postgrest::{Postgrest, PostgrestOptions},
        progress::Progress,
        supabase,
    },
    schema::data,
    stack::DATABASE,
};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Each query, how it is asked, and what it may cost at most.
const QUERIES: [(&str, &str, bool, f64); 2] = [
    ("count of an organization's calls", "call_logs?select=id&limit=1", true, 1.1),
    ("page of 20, latest first", "call_logs?order=created_at.desc&limit=20", false, 1.2),
];
/// Requests that are not counted, so that every connection has its plans.
const WARM_UP: usize = 50;
/// Connections of PostgREST.
const POOL: u32 = 4;

/// How it is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Calls in the table.
    #[arg(long, default_value_t = 1_000_000)]
    rows: i32,
    /// Organizations that they are spread over; every number gives a database of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [15, 1])]
    organizations: Vec<i32>,
    /// Requests of each kind.
    #[arg(long, default_value_t = 400)]
    rounds: usize,
}

/// One way of asking.
struct Asker {
    http: reqwest::Client,
    token: String,
    filter: String,
}

impl Asker {
    /// The time an answer took, and the answer.
    async fn ask(&self, postgrest: &Postgrest, query: &str, count: bool) -> Result<(Duration, String)> {
        let url = format!("{}{query}{}", postgrest.url, self.filter);
        let mut request = self.http.get(url).bearer_auth(&self.token);
        if count {
            request = request.header("Prefer", "count=exact");
        }
        let began = Instant::now();
        let response = request.send().await?;
        let (status, range) = (response.status(), response.headers().get("content-range").cloned());
        let body = response.text().await?;
        let took = began.elapsed();
        ensure!(status.is_success(), "{query}: {status} {body}");
        Ok((took, format!("{range:?} {body}")))
    }
}

/// Measures and prints.
pub async fn run(options: &Options) -> Result<()> {
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let (binary, cli) = (install::postgrest(&progress).await?, install::supabase_cli(&progress).await?);
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    supabase::seed(&owner).await?;
    println!(
        "PostgreSQL {}, {} calls, {} requests of each kind, medians",
        server.version, options.rows, options.rounds
    );
    for organizations in &options.organizations {
        let database = format!("of_{organizations}");
        postgres.clone_database(DATABASE, &database).await?;
        let mut admin = postgres.connect(Role::Admin, &database).await?;
        let leads = (options.rows / 20).max(*organizations);
        data::generate(&mut admin, data::Amount { seed: 1, organizations: *organizations, leads, calls: options.rows })
            .await?;
        // A member without a role is the longest way through the policy's helper.
        admin.batch_execute("update public.profiles set system_role = 'member'").await?;
        admin.batch_execute("vacuum analyze").await?;
        let row = admin.query_one("select id, organization_id from public.profiles order by id limit 1", &[]).await?;
        let (user, organization): (Uuid, Uuid) = (row.get(0), row.get(1));

        let keys = Keys::generate("http://127.0.0.1")?;
        let postgrest = PostgrestOptions {
            binary: binary.clone(),
            database_url: postgres.url(Role::Authenticator, &database),
            pool: POOL,
        };
        let postgrest = Postgrest::start(&postgrest, &keys, run.path(), &logs).await?;
        let http = parts::http_client()?;
        let claims = keys.user_claims(user, "member@example.com");
        let mut all = claims.clone();
        "service_role".clone_into(&mut all.role);
        let by_policy = Asker { http: http.clone(), token: keys.sign(&claims)?, filter: String::new() };
        let by_hand = Asker { http, token: keys.sign(&all)?, filter: format!("&organization_id=eq.{organization}") };
        println!("\n{organizations} organizations");
        for (name, query, count, limit) in QUERIES {
            let (policy, hand) = compare(&postgrest, &by_policy, &by_hand, query, count, options.rounds).await?;
            let ratio = policy.median() / hand.median();
            // On a machine that does something else too, the quickest quarter tells more than the middle.
            let quick = policy.percentile(25) / hand.percentile(25);
            println!(
                "  {name:34}  policy {:8.3} ms  by hand {:8.3} ms  ratio {ratio:.3} (quickest quarter {quick:.3}), at most {limit:.1}{}",
                policy.median(),
                hand.median(),
                if ratio > limit { "  MISSED" } else { "" },
            );
        }
        postgrest.stop().await?;
    }
    postgres.stop().await
}

async fn compare(
    postgrest: &Postgrest,
    by_policy: &Asker,
    by_hand: &Asker,
    query: &str,
    count: bool,
    rounds: usize,
) -> Result<(Times, Times)> {
    let (policy, hand) = (by_policy.ask(postgrest, query, count).await?, by_hand.ask(postgrest, query, count).await?);
    ensure!(policy.1 == hand.1, "the two do not ask the same: {} {}", policy.1, hand.1);
    let (mut policy, mut hand) = (Times::default(), Times::default());
    for round in 0..WARM_UP + rounds {
        // Whoever comes second may find the processor warmer: in turns.
        let (first, second) = if round % 2 == 0 { (by_policy, by_hand) } else { (by_hand, by_policy) };
        let (one, other) = (first.ask(postgrest, query, count).await?.0, second.ask(postgrest, query, count).await?.0);
        if round >= WARM_UP {
            let (of_policy, of_hand) = if round % 2 == 0 { (one, other) } else { (other, one) };
            policy.push(of_policy);
            hand.push(of_hand);
        }
    }
    Ok((policy, hand))
}
