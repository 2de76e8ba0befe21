//! Sending callbacks: signed, bounded, and retried as the URL's fragment says, or else as the carrier does by itself.

use super::{
    World,
    call::Hook,
    faults::Fault,
    signature::{self, Pairs},
    telnyx, twilio, vonage,
};
use serde::Serialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Plivo waits between retries; so do we, but only so long.
const RETRY_PAUSE: Duration = Duration::from_millis(150);
/// What Plivo reads of a document at most, in bytes.
const MAX_DOCUMENT: usize = 100_000;

/// How many callbacks went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallbackCounts {
    /// Events of calls that there was a callback for; answer documents are none.
    pub offered: u64,
    /// Requests sent, retries and duplicates included.
    pub sent: u64,
    /// Answered 2xx.
    pub accepted: u64,
    /// Answered with anything else below 500.
    pub refused: u64,
    /// Answered 5xx.
    pub failed: u64,
    /// Not answered: no connection, or no response in time.
    pub unanswered: u64,
    /// Sent again because of how the try before ended.
    pub retried: u64,
    /// Given up: no try was answered 2xx.
    pub lost: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    offered: AtomicU64,
    sent: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    unanswered: AtomicU64,
    retried: AtomicU64,
    lost: AtomicU64,
    pub in_flight: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> CallbackCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CallbackCounts {
            offered: read(&self.offered),
            sent: read(&self.sent),
            accepted: read(&self.accepted),
            refused: read(&self.refused),
            failed: read(&self.failed),
            unanswered: read(&self.unanswered),
            retried: read(&self.retried),
            lost: read(&self.lost),
        }
    }
}

/// What the fragment of a callback URL configures: `#ct=2000&rt=40000&tt=55000&rc=1&rp=ct,rt` are the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    read_timeout: Duration,
    total_timeout: Duration,
    retries: u32,
    on_4xx: bool,
    on_5xx: bool,
    on_connect: bool,
    on_read: bool,
}

impl Policy {
    fn of(callback: &Callback) -> Self {
        match callback.told {
            Told::Plivo(_) | Told::Twilio(_) => Self::written(&callback.hook.url),
            Told::Telnyx(_) | Told::Vonage(_) => Self { retries: 3, on_5xx: true, ..Self::written("") },
        }
    }

    /// What a URL's fragment says.
    fn written(url: &str) -> Self {
        let mut policy = Self {
            read_timeout: Duration::from_secs(40),
            total_timeout: Duration::from_secs(55),
            retries: 1,
            on_4xx: false,
            on_5xx: false,
            on_connect: true,
            on_read: true,
        };
        let fragment = url.split_once('#').map_or("", |(_, fragment)| fragment);
        for (name, value) in form_urlencoded::parse(fragment.as_bytes()) {
            let number = value.parse::<u64>();
            match (name.as_ref(), number) {
                // The connection's own timeout (ct) is not told apart: on loopback there is nothing to wait for.
                ("rt", Ok(ms)) => policy.read_timeout = Duration::from_millis(ms.clamp(100, 40_000)),
                ("tt", Ok(ms)) => policy.total_timeout = Duration::from_millis(ms.clamp(100, 55_000)),
                ("rc", Ok(count)) => policy.retries = count.min(5) as u32,
                ("rp", _) => {
                    let has = |word: &str| value.split(',').any(|item| item == word || item == "all");
                    (policy.on_4xx, policy.on_5xx, policy.on_connect, policy.on_read) =
                        (has("4xx"), has("5xx"), has("ct"), has("rt"));
                }
                _ => {}
            }
        }
        policy
    }
}

/// An answer to a callback.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: String,
}

/// One callback of a call.
#[derive(Clone, Debug)]
pub(super) struct Callback {
    pub call: Uuid,
    /// Names the fault decisions: callee, how-manieth call, event.
    pub key: [String; 3],
    pub hook: Hook,
    pub auth_token: String,
    pub told: Told,
}

/// What a callback says, in whose words: it is signed as that carrier does.
#[derive(Clone, Debug)]
pub(super) enum Told {
    Plivo(Pairs),
    Twilio(Pairs),
    Telnyx(String),
    Vonage(String),
}

/// Sends a callback that the call does not wait for.
pub(super) fn send(world: &Arc<World>, callback: Callback) {
    send_after(world, callback, Duration::ZERO);
}

/// The same after a while.
pub(super) fn send_after(world: &Arc<World>, callback: Callback, pause: Duration) {
    world.counters.in_flight.fetch_add(1, Ordering::Relaxed);
    world.counters.offered.fetch_add(1, Ordering::Relaxed);
    let task_world = Arc::clone(world);
    world.spawn(async move {
        let world = task_world;
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let key: Vec<&str> = callback.key.iter().map(String::as_str).collect();
        let strikes = |fault| world.faults.strikes(fault, world.options.seed, &key);
        if strikes(Fault::Reorder) || strikes(Fault::Delay) {
            tokio::time::sleep(Duration::from_millis(world.faults.get().callback_delay_ms)).await;
        }
        if !strikes(Fault::Drop) {
            deliver(&world, &callback).await;
            if strikes(Fault::Duplicate) {
                deliver(&world, &callback).await;
            }
        }
        world.counters.in_flight.fetch_sub(1, Ordering::Relaxed);
    });
}

/// Sends a callback and waits for its answer: the last try's, whatever its status. None when no try was answered.
pub(super) async fn deliver(world: &World, callback: &Callback) -> Option<Answer> {
    let policy = Policy::of(callback);
    let deadline = Instant::now() + policy.total_timeout;
    let counters = &world.counters;
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let mut answer = None;
    for attempt in 0..=policy.retries {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        if attempt > 0 {
            count(&counters.retried);
            tokio::time::sleep(RETRY_PAUSE * attempt).await;
        }
        count(&counters.sent);
        let again = match try_once(world, callback, policy.read_timeout.min(left)).await {
            Ok(read) => {
                let again = match read.status {
                    200..=299 => {
                        count(&counters.accepted);
                        return Some(read);
                    }
                    500.. => {
                        count(&counters.failed);
                        policy.on_5xx
                    }
                    _ => {
                        count(&counters.refused);
                        policy.on_4xx
                    }
                };
                world.note_callback(callback, attempt, &format!("{} {}", read.status, read.body));
                answer = Some(read);
                again
            }
            Err(error) => {
                count(&counters.unanswered);
                world.note_callback(callback, attempt, &error.to_string());
                if error.is_connect() { policy.on_connect } else { policy.on_read }
            }
        };
        if !again {
            break;
        }
    }
    count(&counters.lost);
    answer
}

async fn try_once(world: &World, callback: &Callback, timeout: Duration) -> reqwest::Result<Answer> {
    // At most so many at once: a carrier has its limits, and so has the machine.
    let _permit = world.permits.acquire().await;
    let url = callback.hook.url.split('#').next().unwrap_or_default();
    let encode =
        |pairs: &Pairs| -> String { form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish() };
    let form = |encoded: String| {
        world.http.post(url).header("content-type", "application/x-www-form-urlencoded").body(encoded)
    };
    let json = |body: &String| world.http.post(url).header("content-type", "application/json").body(body.clone());
    let now = chrono::Utc::now().timestamp();
    let request = match &callback.told {
        Told::Twilio(pairs) => {
            let signed = twilio::signature(&callback.auth_token, url, pairs);
            form(encode(pairs)).header("x-twilio-signature", signed).header("user-agent", "TwilioProxy/1.1")
        }
        Told::Telnyx(body) => {
            let signed = telnyx::headers(&callback.auth_token, body, now);
            let request = json(body).header("user-agent", "telnyx-webhooks");
            signed.into_iter().fold(request, |request, (name, value)| request.header(name, value))
        }
        Told::Vonage(body) => {
            let signed = vonage::authorization(&callback.auth_token, body, now);
            json(body).header("authorization", signed).header("user-agent", "Vonage")
        }
        Told::Plivo(pairs) => {
            let nonce = signature::nonce();
            let (request, signed) = if callback.hook.get {
                let separator = if url.contains('?') { '&' } else { '?' };
                let url = format!("{url}{separator}{}", encode(pairs));
                let signed = signature::headers(&callback.auth_token, &url, &[], &nonce);
                (world.http.get(url), signed)
            } else {
                (form(encode(pairs)), signature::headers(&callback.auth_token, url, pairs, &nonce))
            };
            let request = request.header("user-agent", "Plivo");
            signed.into_iter().fold(request, |request, (name, value)| request.header(name, value))
        }
    };
    read(request, timeout).await
}

async fn read(request: reqwest::RequestBuilder, timeout: Duration) -> reqwest::Result<Answer> {
    let response = request.timeout(timeout).send().await?;
    let status = response.status().as_u16();
    let content_type =
        response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let mut body = response.text().await?;
    if body.len() >= MAX_DOCUMENT {
        body.clear();
    }
    Ok(Answer { status, content_type, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_policy_from_the_fragment() {
        let default = Policy::written("https://h/p");
        assert_eq!((default.retries, default.on_5xx, default.on_connect), (1, false, true));
        let policy = Policy::written("https://h/p?a=1#rc=3&rp=ct,rt,5xx&rt=5000&er=mumbai");
        assert_eq!(policy.retries, 3);
        assert_eq!(policy.read_timeout, Duration::from_secs(5));
        assert!(policy.on_5xx && policy.on_connect && policy.on_read && !policy.on_4xx);
        let policy = Policy::written("https://h/p#rc=99&rp=all");
        assert_eq!(policy.retries, 5);
        assert!(policy.on_4xx && policy.on_5xx);
    }
}
