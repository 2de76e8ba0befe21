//! The story: an organization signs up, imports its leads, runs a campaign, and is sent an invoice.
//!
//! Every step goes through the API as its user would send it. What is told at the end comes from the database and from the carrier's own
//! record, and is compared, so that a story that ends well is a proof and not a show.

mod bill;
mod browser;
mod cast;
mod events;
mod facts;
mod faults;
mod leads;
mod report;
mod silence;
mod switch;
mod table;
mod watch;
mod witness;

pub use faults::{Injected, Severity};
pub use leads::shipped as leads_shipped;
pub use report::{Check, Numbers, Report};
pub use table::render;

use crate::{
    carrier::{Account, Billing, Carrier, CarrierOptions},
    parts::postgres::PostgresOptions,
    parts::{clock, progress::Progress},
    stack::{Stack, StackOptions},
};
use anyhow::Result;
use chrono::Utc;
use faults::Injector;
use report::Evidence;
use std::time::Instant;
use url::Url;
use witness::Witness;

/// What is played.
#[derive(Clone, Debug)]
pub struct StoryOptions {
    /// Decides how calls end.
    pub seed: u64,
    /// How many leads there are.
    pub leads: usize,
    /// Calls at the same time at most; chosen by the number of leads when none.
    pub live_calls: Option<i32>,
    /// Whether PostgREST is killed in the middle, for five seconds.
    pub kill_postgrest: bool,
    /// What goes wrong on purpose.
    pub faults: Option<Severity>,
    /// Whether the operator stops all dialling in the middle, for a few seconds.
    pub kill_switch: bool,
    /// Whose API is spoken.
    pub provider: Provider,
    /// Somebody else's carrier in place of the simulated one.
    pub carrier_url: Option<Url>,
    /// The account there, with its token, or a JSON object of its secrets; made up when none, for a carrier that takes whoever comes.
    pub carrier_account: Option<(String, String)>,
    /// How many of the simulated carrier's first calls are long.
    pub long_calls: usize,
}

impl StoryOptions {
    /// What a stack has to be for this story.
    pub fn stack(&self) -> StackOptions {
        let mut options = StackOptions::default();
        if let Some(severity) = self.faults {
            options.message_faults = severity.messages(self.seed);
            // A lost callback takes seconds to be found out: many retries wait for theirs at the same time.
            options.gather = 4 * self.limit().unsigned_abs();
            // The server is to lose nothing that it confirmed when it is stopped; the machine goes on, so that files need no sync.
            let settings = vec![("synchronous_commit".to_owned(), "on".to_owned())];
            options.postgres = PostgresOptions { settings, ..PostgresOptions::default() };
        }
        options
    }

    /// Calls at the same time at most.
    fn limit(&self) -> i32 {
        self.live_calls.unwrap_or_else(|| live_calls(self.leads))
    }
}

/// Whose API is spoken, by the stack and by the carrier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// Plivo's.
    #[default]
    Plivo,
    /// Twilio's, which bills started minutes.
    Twilio,
    /// Telnyx's, billed by the second, which it tells beside the end.
    Telnyx,
    /// Vonage's, billed by the second.
    Vonage,
}

impl Provider {
    /// The name in tables and paths.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plivo => "plivo",
            Self::Twilio => "twilio",
            Self::Telnyx => "telnyx",
            Self::Vonage => "vonage",
        }
    }

    fn fresh_account(self) -> Result<Account> {
        Ok(match self {
            Self::Plivo => Account::fresh(),
            Self::Twilio => Account { auth_id: format!("AC{}", uuid::Uuid::new_v4().simple()), ..Account::fresh() },
            Self::Telnyx => Account::telnyx(),
            Self::Vonage => Account::vonage()?,
        })
    }

    fn billing(self) -> Billing {
        match self {
            Self::Plivo => Billing::default(),
            Self::Twilio => Billing { pulse: 60, ..Billing::default() },
            Self::Telnyx | Self::Vonage => Billing { first_pulse: 1, ..Billing::default() },
        }
    }
}

impl std::str::FromStr for Provider {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "plivo" => Ok(Self::Plivo),
            "twilio" => Ok(Self::Twilio),
            "telnyx" => Ok(Self::Telnyx),
            "vonage" => Ok(Self::Vonage),
            _ => Err("it is plivo, twilio, telnyx or vonage".to_owned()),
        }
    }
}

/// A story that was played, and the carrier that is still there for whoever wants to go on.
pub struct Played {
    /// How it ended.
    pub report: Report,
    /// The simulated carrier, if it was ours.
    pub carrier: Option<Carrier>,
}

/// Calls at the same time when nobody says how many: enough that the machine and not the limit is what is waited for.
fn live_calls(leads: usize) -> i32 {
    (leads / 5).clamp(10, 128) as i32
}

/// Plays the story on a stack on which nothing has happened. `started` is when the stack began to start.
pub async fn play(stack: &Stack, options: &StoryOptions, progress: &Progress, started: Instant) -> Result<Played> {
    let mut stages = vec![("starting the stack", started.elapsed())];
    let mut begun = Instant::now();
    let mut stage = |name: &'static str| {
        stages.push((name, begun.elapsed()));
        begun = Instant::now();
    };

    stack.clock.start_at(clock::tuesday_morning(Utc::now())).await?;
    let account = match &options.carrier_account {
        Some((auth_id, auth_token)) => {
            Account { auth_id: auth_id.clone(), auth_token: auth_token.clone(), ..Account::fresh() }
        }
        None => options.provider.fresh_account()?,
    };
    let (carrier, url) = match &options.carrier_url {
        Some(url) => (None, url.clone()),
        None => {
            let options = CarrierOptions {
                accounts: vec![account.clone()],
                seed: options.seed,
                billing: options.provider.billing(),
                long_calls: options.long_calls,
                faults: options.faults.map(Severity::carrier).unwrap_or_default(),
                log: Some(stack.log_dir.join("carrier.jsonl")),
                ..CarrierOptions::default()
            };
            let carrier = Carrier::start(options).await?;
            let url = carrier.url().clone();
            (Some(carrier), url)
        }
    };

    let live_calls = options.limit();
    let step = progress.step("Sign-up");
    let cast =
        cast::sign_up(stack, options.provider.as_str(), &url, (&account.auth_id, &account.auth_token), live_calls)
            .await?;
    step.done("Sunrise Realty, on a plan with 60 minutes a month");
    stage("signing up");

    let listener = events::Listener::register(&cast, options.leads).await?;
    let step = progress.step("Leads");
    let project = cast::import_leads(&cast, options.leads, &step).await?;
    step.done(format!("{} imported from a CSV", options.leads));
    stage("importing leads");

    let campaign = cast::plan_campaign(&cast, project, live_calls).await?;
    cast::start_campaign(&cast, campaign).await?;
    let plan = watch::Plan {
        kill_postgrest: options.kill_postgrest,
        kill_switch: options.kill_switch,
        callbacks_are_lost: options.faults.is_some(),
    };
    let mut injector = options.faults.map(|severity| Injector::new(severity, options.seed, options.leads));
    let injecting = async {
        match &mut injector {
            Some(injector) => injector.run(stack, progress).await,
            None => Ok(()),
        }
    };
    let (stopped, ()) = tokio::try_join!(watch::campaign(stack, &cast, campaign, plan, progress), injecting)?;
    watch::settle(stack, carrier.as_ref()).await?;
    stage("calling");

    let step = progress.step("Invoice");
    let billed = bill::close(stack, &cast, &step).await?;
    step.done(format!("{} of the period that ended", billed.number()));
    stage("closing the period");

    let step = progress.step("Events out");
    let told = listener.settle(stack, &step).await?;
    step.done(format!("{} told to the organization's own system", told.received.len()));
    stage("telling");

    let step = progress.step("Comparing");
    let witness = Witness {
        provider: options.provider,
        url,
        auth_id: account.auth_id,
        auth_token: account.auth_token,
        http: crate::parts::http_client()?,
    };
    let dials = witness.dials(|read, of| step.say(format!("the carrier's record, {read} of {of} calls"))).await?;
    let database = stack.connect(crate::parts::postgres::Role::Admin).await?;
    let evidence = Evidence {
        seed: options.seed,
        calls: options.leads,
        standing: facts::standing(&database, campaign).await?,
        attempts: facts::attempts(&database, campaign).await?,
        books: facts::books(&database, cast.organization.id, cast::PLAN).await?,
        invoices: facts::invoices(&database, cast.organization.id).await?,
        shown: billed.shown,
        usage: billed.usage,
        dials,
        told,
        function_errors: stack.invoker().activity().failed,
        outage: options.kill_postgrest || options.faults.is_some(),
        stopped,
        injected: injector.map(|injector| injector.injected(stack, carrier.as_ref())),
        dead_letters: bill::dead_letters(stack).await?,
    };
    step.done("database and carrier compared");
    stage("comparing");

    let (numbers, mut checks) = report::judge(&evidence, |real| stack.clock.to_business(real), started.elapsed());
    if let (Some(severity), Some(injected)) = (options.faults, &evidence.injected) {
        checks.extend(carrier.as_ref().map(|carrier| report::Check {
            claim: "no more calls at once than allowed",
            sides: (carrier.most_live_calls().max(live_calls as usize) as i64, i64::from(live_calls)),
        }));
        checks.extend(injected.checks(severity, carrier.is_some(), stack.template.functions.len()));
    }
    let places = vec![
        ("API", stack.origin_text().to_owned()),
        ("Database", stack.database_url.clone()),
        ("Carrier", witness.url.to_string()),
        ("Invoice", billed.page.display().to_string()),
        ("Logs", stack.log_dir.display().to_string()),
    ];
    let report = Report { numbers, checks, evidence, stages, places, log_dir: stack.log_dir.clone() };
    Ok(Played { report, carrier })
}
