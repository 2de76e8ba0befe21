//! The simulated carrier: the HTTP APIs and callbacks of Plivo, Twilio, Telnyx and Vonage, on loopback.
//!
//! It checks what they check, signs as they sign, and plays each call from the queue to its record in a fraction of a second.
//! What becomes of a call follows from the seed alone ([`outcome`]); how the road can be worse than it should be is in [`Faults`].
//! Its record of calls (the CDR list of the API, and a log of JSON lines) is the one witness that the system under test has no hand
//! in: what was dialled, when, and for how many seconds.

mod answer;
mod api;
mod call;
mod callback;
mod cause;
mod faults;
mod outcome;
mod play;
mod signature;
mod sound;
mod telnyx;
#[cfg(test)]
mod tests;
mod twilio;
mod vonage;

pub use call::Billing;
pub use callback::CallbackCounts;
pub use faults::{Fault, Faults};
pub use outcome::{Mix, Outcome};
pub use play::Pace;
pub use signature::{headers as sign_callback, nonce};
pub use sound::mp3;

use anyhow::Context;
use call::{Book, Call, Hook};
use callback::{Callback, Counters};
use chrono::{FixedOffset, Offset, Utc};
use faults::FaultBox;
use jsonwebtoken::DecodingKey;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};
use url::Url;
use uuid::Uuid;

/// An account at the carrier.
#[derive(Clone, Debug)]
pub struct Account {
    /// Name of the account in paths and credentials.
    pub auth_id: String,
    /// Password of the API and key of the callbacks' signatures; where those are several secrets, a JSON object of them.
    pub auth_token: String,
    /// Numbers that may call; any may when there are none.
    pub numbers: Vec<String>,
    /// Live calls at most, excess answered 403 as in India; unlimited when none.
    pub max_concurrent_calls: Option<usize>,
}

impl Account {
    /// An account with fresh credentials of Plivo's form, any caller number and no limit.
    pub fn fresh() -> Self {
        let random = Uuid::new_v4().simple().to_string().to_uppercase();
        Self {
            auth_id: format!("MA{}", &random[..18]),
            auth_token: Uuid::new_v4().simple().to_string() + &random[..8],
            numbers: Vec::new(),
            max_concurrent_calls: None,
        }
    }
}

/// How the carrier behaves.
#[derive(Clone, Debug)]
pub struct CarrierOptions {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Accounts it knows from the start.
    pub accounts: Vec<Account>,
    /// Decides every outcome and every fault.
    pub seed: u64,
    /// Shares of the outcomes.
    pub mix: Mix,
    /// How much real time the stages of a call take.
    pub pace: Pace,
    /// How many of the first calls are long: so that as many are live at once as may be, whatever falls silent meanwhile.
    pub long_calls: usize,
    /// Pulses and price.
    pub billing: Billing,
    /// What goes wrong.
    pub faults: Faults,
    /// Time zone of the account's records.
    pub zone: FixedOffset,
    /// Callbacks sent at the same time at most.
    pub max_callbacks: usize,
    /// File for the log of JSON lines: each create, each refusal, each end, each callback that was not answered 2xx.
    pub log: Option<PathBuf>,
}

impl Default for CarrierOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            accounts: Vec::new(),
            seed: 7,
            mix: Mix::default(),
            pace: Pace::default(),
            long_calls: 0,
            billing: Billing::default(),
            faults: Faults::default(),
            zone: FixedOffset::east_opt(5 * 3_600 + 1_800).unwrap_or_else(|| Utc.fix()),
            max_callbacks: 64,
            log: None,
        }
    }
}

/// Everything the carrier's tasks share.
struct World {
    options: CarrierOptions,
    url: Url,
    accounts: RwLock<HashMap<String, Account>>,
    book: Mutex<Book>,
    recordings: Mutex<HashMap<Uuid, Hook>>,
    /// What the tokens of applications are judged by, as far as one came.
    keys: Mutex<HashMap<String, DecodingKey>>,
    http: reqwest::Client,
    permits: Semaphore,
    faults: FaultBox,
    counters: Counters,
    log: Option<Mutex<File>>,
    tasks: Mutex<JoinSet<()>>,
}

impl World {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(&self, uuid: Uuid, read: impl FnOnce(&Call) -> T) -> Option<T> {
        self.book().get(uuid).map(read)
    }

    fn change<T>(&self, uuid: Uuid, change: impl FnOnce(&mut Call) -> T) -> Option<T> {
        self.book().change(uuid, change)
    }

    fn account(&self, auth_id: &str) -> Option<Account> {
        self.accounts.read().unwrap_or_else(PoisonError::into_inner).get(auth_id).cloned()
    }

    fn account_where(&self, fits: impl Fn(&Account) -> bool) -> Option<Account> {
        let accounts = self.accounts.read().unwrap_or_else(PoisonError::into_inner);
        accounts.values().find(|account| fits(account)).cloned()
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Writes a line of the log; a log that cannot be written does not stop a call.
    fn note(&self, line: Value) {
        if let Some(log) = &self.log {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            let _written = writeln!(log, "{line}");
        }
    }

    fn note_callback(&self, callback: &Callback, attempt: u32, answer: &str) {
        let [to, nth, event] = &callback.key;
        self.note(json!({
            "event": "callback_refused", "at": Utc::now(), "call_uuid": callback.call, "to": to, "nth": nth, "callback": event,
            "try": attempt + 1, "answer": answer.chars().take(500).collect::<String>(),
        }));
    }
}

/// A running carrier. Dropping it ends its calls.
pub struct Carrier {
    world: Arc<World>,
    server: JoinHandle<()>,
}

impl Carrier {
    /// Starts a carrier. Fails when it cannot listen or write its log.
    pub async fn start(options: CarrierOptions) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("the simulated carrier cannot listen on {}", options.listen))?;
        let url = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
        let log = options
            .log
            .as_ref()
            .map(|path| {
                File::create(path).with_context(|| format!("the carrier's log {} cannot be written", path.display()))
            })
            .transpose()?
            .map(Mutex::new);
        let accounts = options.accounts.iter().map(|account| (account.auth_id.clone(), account.clone())).collect();
        let world = Arc::new(World {
            url,
            accounts: RwLock::new(accounts),
            book: Mutex::default(),
            recordings: Mutex::default(),
            keys: Mutex::default(),
            http: crate::parts::http_client()?,
            permits: Semaphore::new(options.max_callbacks.max(1)),
            faults: FaultBox::new(options.faults),
            counters: Counters::default(),
            log,
            tasks: Mutex::default(),
            options,
        });
        let router = api::router(Arc::clone(&world));
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(crate::parts::without_delay(listener), router).await {
                tracing::error!(%error, "the simulated carrier stopped");
            }
        });
        Ok(Self { world, server })
    }

    /// Address of its API, with a slash at the end.
    pub fn url(&self) -> &Url {
        &self.world.url
    }

    /// Adds an account, or replaces the one of the same `auth_id`.
    pub fn add_account(&self, account: Account) {
        self.world.accounts.write().unwrap_or_else(PoisonError::into_inner).insert(account.auth_id.clone(), account);
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.world.faults.set(faults);
    }

    /// How often each fault struck.
    pub fn faults_struck(&self) -> BTreeMap<Fault, u64> {
        self.world.faults.struck()
    }

    /// How callbacks went.
    pub fn callbacks(&self) -> CallbackCounts {
        self.world.counters.read()
    }

    /// Calls that are not over.
    pub fn live_calls(&self) -> usize {
        self.world.book().live_count()
    }

    /// Calls that there were at once, at most.
    pub fn most_live_calls(&self) -> usize {
        self.world.book().most_live()
    }

    /// Calls accepted since the start.
    pub fn creates(&self) -> usize {
        self.world.book().calls.len()
    }

    /// Whether no call is live and no callback on its way.
    pub fn is_idle(&self) -> bool {
        self.live_calls() == 0 && self.world.counters.in_flight.load(Ordering::Relaxed) == 0
    }

    /// Hangs everything up without a word and stops listening.
    pub async fn stop(mut self) {
        self.server.abort();
        let _stopped = (&mut self.server).await;
        let mut tasks = std::mem::take(&mut *self.world.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.server.abort();
        self.world.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}
