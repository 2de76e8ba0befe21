//! Carriers' HTTP APIs: create a call, hang it up, look it up.
//!
//! A carrier says what is to be sent and what an answer means; this file alone sends. Nothing is ever sent twice: no carrier but Telnyx
//! has a key by which it would know a call that was asked for before. A connection that fails is told apart from an answer that does
//! not come, since the first proves that nobody was dialled and the second proves nothing.

use super::{CallReport, CallbackEvent, DialOutcome, Lookup, Outcome, carrier::Carrier, carrier::Credentials};
use crate::{Error, Result};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use http::{Method, StatusCode};
use serde_json::Value;
use std::{fmt, time::Duration};
use url::Url;
use uuid::Uuid;

/// How long a carrier may take to answer, once connected: what comes later is unknown, not refused.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// An account at a carrier, opened for one request.
#[derive(Debug, Clone)]
pub struct Account {
    /// Its id at the carrier.
    pub sid: String,
    /// Its secrets.
    pub credentials: Credentials,
    /// Origin of the API, as `https://api.plivo.com`.
    pub api_base: Url,
}

impl Account {
    /// An account of `carrier`, unless its API is at a host that must not be asked: one of the carrier's own over TLS is, and loopback
    /// where `local`.
    pub fn new(
        carrier: &dyn Carrier,
        sid: &str,
        credentials: Credentials,
        api_base: &str,
        local: bool,
    ) -> Result<Self> {
        let api_base = Url::parse(api_base).map_err(|_| Error::internal("the account's api_base is no URL"))?;
        if !is_allowed(carrier, &api_base, local) {
            return Err(Error::internal("the account's api_base is not a host that may be asked to dial"));
        }
        Ok(Self { sid: sid.to_owned(), credentials, api_base })
    }

    /// The URL of a path; an empty last segment is a slash at the end.
    pub fn url(&self, path: &[&str]) -> Result<Url> {
        let mut url = self.api_base.clone();
        url.path_segments_mut()
            .map_err(|()| Error::internal("the account's api_base has no paths"))?
            .pop_if_empty()
            .extend(path);
        Ok(url)
    }

    /// A secret that the account cannot do without.
    pub fn secret(&self, name: &'static str) -> Result<&str> {
        self.credentials.get(name).ok_or_else(|| Error::internal(format!("the account's credentials have no {name}")))
    }
}

fn is_allowed(carrier: &dyn Carrier, api_base: &Url, local: bool) -> bool {
    let is_plain = api_base.username().is_empty() && api_base.password().is_none();
    match (api_base.scheme(), api_base.host_str()) {
        ("https", Some(host)) => is_plain && api_base.port().is_none() && carrier.hosts().contains(&host),
        ("http", Some("127.0.0.1" | "localhost" | "[::1]")) => local,
        _ => false,
    }
}

/// A call to make.
#[derive(Debug, Clone)]
pub struct Create<'a> {
    /// The attempt.
    pub attempt_id: Uuid,
    /// Caller, E.164.
    pub from: &'a str,
    /// Callee, E.164.
    pub to: &'a str,
    /// Where each event of the call is told.
    pub callbacks: &'a [(CallbackEvent, String)],
    /// `wss://` URL of the voice agent, for a carrier that is told of it before the call is answered.
    pub stream_url: Option<&'a str>,
    /// Seconds of ringing, 20 at least.
    pub ring_timeout: u32,
    /// Seconds of talk at most.
    pub time_limit: u32,
    /// Whether the call is recorded.
    pub record: bool,
}

impl Create<'_> {
    /// Where an event is told.
    pub fn callback(&self, event: CallbackEvent) -> Result<&str> {
        self.callbacks
            .iter()
            .find(|(known, _)| *known == event)
            .map(|(_, url)| url.as_str())
            .ok_or_else(|| Error::internal(format!("the call has no URL for {}", event.as_str())))
    }
}

/// A call that is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The attempt.
    pub attempt_id: Uuid,
    /// The carrier's id of the call; `None` when it was never learnt.
    pub provider_call_id: Option<&'a str>,
    /// Caller, E.164.
    pub from: &'a str,
    /// Callee, E.164.
    pub to: &'a str,
    /// Before this it cannot have been made.
    pub since: DateTime<Utc>,
    /// The carrier's ids of other calls to that callee: what is known as another attempt's is not this one's, whatever its time says.
    pub others: &'a [String],
}

impl Wanted<'_> {
    /// Whether a call that was found is the wanted one. By its id it always is; by its numbers only if it is no other one to the same
    /// callee, and a time without a zone proves nothing.
    pub fn is(&self, call: &CallReport) -> bool {
        let started = call.started_at.as_deref().and_then(|at| DateTime::parse_from_rfc3339(at).ok());
        match self.provider_call_id {
            Some(id) => call.provider_call_id.as_deref() == Some(id),
            None => {
                let is_another = call.provider_call_id.as_ref().is_some_and(|id| self.others.contains(id));
                !is_another && started.is_some_and(|at| at >= self.since)
            }
        }
    }
}

/// From when to when records are asked for.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The first moment.
    pub since: DateTime<Utc>,
    /// The first moment that is no longer asked for.
    pub until: DateTime<Utc>,
}

/// A page of call records.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// The calls.
    pub calls: Vec<CallReport>,
    /// What the next page is asked for by; `None` after the last.
    pub next: Option<String>,
}

/// Who asks.
#[derive(Clone)]
pub enum Authorization {
    /// Name and password.
    Basic(String, String),
    /// A token.
    Bearer(String),
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic(..) => "Basic",
            Self::Bearer(_) => "Bearer",
        })
    }
}

/// What is sent along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing.
    Nothing,
    /// A form; a name may come several times.
    Form(Vec<(&'static str, String)>),
    /// JSON.
    Json(Value),
}

/// A request to a carrier, before it is sent.
#[derive(Debug, Clone)]
pub struct ApiRequest {
    /// The method.
    pub method: Method,
    /// The URL, with its query.
    pub url: Url,
    /// Who asks.
    pub authorization: Authorization,
    /// What is sent along.
    pub payload: Payload,
}

impl ApiRequest {
    /// A request for what is at a URL.
    pub fn get(url: Url, authorization: Authorization) -> Self {
        Self { method: Method::GET, url, authorization, payload: Payload::Nothing }
    }

    /// Sends it, once. `http` must neither follow redirects nor send again.
    async fn send(self, http: &reqwest::Client) -> reqwest::Result<reqwest::Response> {
        let request = http.request(self.method, self.url).timeout(READ_TIMEOUT);
        let request = match self.authorization {
            Authorization::Basic(name, password) => request.basic_auth(name, Some(password)),
            Authorization::Bearer(token) => request.bearer_auth(token),
        };
        match self.payload {
            Payload::Nothing => request,
            Payload::Form(form) => request.form(&form),
            Payload::Json(json) => request.json(&json),
        }
        .send()
        .await
    }
}

/// What a carrier answered.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// `Retry-After` in seconds.
    pub retry_after: Option<u32>,
    /// The body; empty where it broke off.
    pub body: Bytes,
}

impl Reply {
    /// The body as JSON; null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The refusal of a call, with a code of the carrier's.
    pub fn refused(&self, reason: Outcome, code: impl ToString) -> DialOutcome {
        DialOutcome::Refused { reason, code: code.to_string() }
    }

    /// That there is no capacity now; `seconds` to wait where the carrier does not say.
    pub fn deferred(&self, seconds: u32, code: impl ToString) -> DialOutcome {
        DialOutcome::Deferred { retry_after_seconds: self.retry_after.unwrap_or(seconds), code: code.to_string() }
    }

    /// What the status says by itself: 429 is no capacity, a documented 4xx a refusal of the account or the request. Anything else may
    /// have been dialled.
    pub fn by_status(&self) -> DialOutcome {
        let code = self.status.as_u16();
        match code {
            429 => self.deferred(5, code),
            400..=405 | 409 | 422 => self.refused(Outcome::Config, code),
            _ => DialOutcome::Unknown { code: code.to_string() },
        }
    }
}

/// A carrier's HTTP API: what is sent, and what the answers mean.
pub trait Api {
    /// Hosts that may be asked, over TLS.
    fn hosts(&self) -> &'static [&'static str];

    /// The fragment that makes the carrier send a callback again which we answered with an error; empty where there is none.
    fn retries(&self) -> &'static str {
        ""
    }

    /// The request for a call.
    fn create(&self, account: &Account, call: &Create<'_>) -> Result<ApiRequest>;

    /// The id of the call in the answer to a request that was taken.
    fn created(&self, body: &Value) -> Option<String>;

    /// What an answer other than 2xx means, by the carrier's documented errors.
    fn refusal(&self, reply: &Reply) -> DialOutcome;

    /// The request that ends a call.
    fn hang_up(&self, account: &Account, call_id: &str) -> Result<ApiRequest>;

    /// Whether a call could not be ended because it is over; 404 always says so.
    fn is_over(&self, _reply: &Reply) -> bool {
        false
    }

    /// The requests that find a call, in the order in which they are made until one does: by its id, or else in a list.
    fn look_up(&self, account: &Account, wanted: &Wanted<'_>) -> Result<Vec<ApiRequest>>;

    /// The request for a page of the account's call records that lie in a span: the first, or where the page before said that it goes on.
    /// `None` for a carrier whose records are not read.
    fn records(&self, _account: &Account, _span: &Span, _next_page: Option<&str>) -> Result<Option<ApiRequest>> {
        Ok(None)
    }

    /// A page of records, and where the next one is. `None` for what is no such page.
    fn recorded(&self, _body: &Value) -> Option<Page> {
        None
    }

    /// The call in an answer to one of [`Api::look_up`]'s requests. `None` where it is not there.
    fn found(&self, wanted: &Wanted<'_>, body: &Value) -> Option<Lookup>;
}

/// Asks for a call, once.
///
/// Accepted is a 2xx with the id. Refused is a failure to connect, before any byte was sent, or an error that the carrier documents: the
/// line was not seized. Deferred is a documented lack of capacity. Everything else may have been dialled.
pub async fn create(
    carrier: &dyn Carrier,
    http: &reqwest::Client,
    account: &Account,
    call: &Create<'_>,
) -> DialOutcome {
    let unknown = |code: &str| DialOutcome::Unknown { code: code.to_owned() };
    let request = match carrier.create(account, call) {
        Ok(request) => request,
        Err(error) => return DialOutcome::Refused { reason: Outcome::Config, code: error.code },
    };
    let answer = match request.send(http).await {
        Ok(answer) => answer,
        Err(error) if error.is_connect() || error.is_builder() => {
            return DialOutcome::Refused { reason: Outcome::CarrierTransient, code: "connect".to_owned() };
        }
        Err(error) => return unknown(if error.is_timeout() { "timeout" } else { "broken_answer" }),
    };
    let status = answer.status();
    let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    let body = match answer.bytes().await {
        Ok(body) => body,
        Err(_) if status.is_client_error() => Bytes::new(),
        Err(error) => return unknown(if error.is_timeout() { "timeout" } else { "broken_answer" }),
    };
    let reply = Reply { status, retry_after, body };
    if !status.is_success() {
        return carrier.refusal(&reply);
    }
    match carrier.created(&reply.json()).filter(|id| !id.is_empty()) {
        Some(provider_call_id) => DialOutcome::Accepted { provider_call_id },
        None => unknown("unreadable_answer"),
    }
}

/// What the carrier knows of a call. An error is the status, or what was seen instead.
pub async fn look_up(
    carrier: &dyn Carrier,
    http: &reqwest::Client,
    account: &Account,
    wanted: &Wanted<'_>,
) -> Result<Lookup> {
    for request in carrier.look_up(account, wanted)? {
        let answer = request.send(http).await.map_err(away)?;
        match answer.status() {
            StatusCode::NOT_FOUND => continue,
            status if status.is_success() => {
                let body: Value = answer.json().await.map_err(away)?;
                if let Some(found) = carrier.found(wanted, &body) {
                    return Ok(found);
                }
            }
            status => return Err(Error::carrier_unavailable(status.to_string())),
        }
    }
    Ok(Lookup::NotFound)
}

/// A page of an account's call records. `None` for a carrier whose records are not read.
pub async fn records(
    carrier: &dyn Carrier,
    http: &reqwest::Client,
    account: &Account,
    span: &Span,
    next_page: Option<&str>,
) -> Result<Option<Page>> {
    let Some(request) = carrier.records(account, span, next_page)? else {
        return Ok(None);
    };
    let answer = request.send(http).await.map_err(away)?;
    let status = answer.status();
    if !status.is_success() {
        return Err(Error::carrier_unavailable(status.to_string()));
    }
    let body: Value = answer.json().await.map_err(away)?;
    let page = carrier.recorded(&body).ok_or_else(|| Error::carrier_unavailable("the answer is no page of records"))?;
    Ok(Some(page))
}

/// Ends a call; one that is over already is no error.
pub async fn hang_up(carrier: &dyn Carrier, http: &reqwest::Client, account: &Account, call_id: &str) -> Result<()> {
    let answer = carrier.hang_up(account, call_id)?.send(http).await.map_err(away)?;
    let status = answer.status();
    let reply = Reply { status, retry_after: None, body: answer.bytes().await.unwrap_or_default() };
    if status.is_success() || status == StatusCode::NOT_FOUND || carrier.is_over(&reply) {
        return Ok(());
    }
    Err(Error::carrier_unavailable(status.to_string()))
}

fn away(error: reqwest::Error) -> Error {
    Error::carrier_unavailable(error.without_url().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::carrier::{ALL, by_name};
    use chrono::TimeDelta;
    use serde_json::json;

    #[test]
    fn only_a_carrier_s_own_hosts_are_asked_to_dial() {
        let allowed = |name: &str, url: &str, local| {
            Account::new(by_name(name).unwrap(), "s", Credentials::read("t"), url, local).is_ok()
        };
        for (name, url) in [
            ("plivo", "https://api.plivo.com"),
            ("twilio", "https://api.twilio.com"),
            ("telnyx", "https://api.telnyx.com"),
            ("vonage", "https://api.nexmo.com"),
        ] {
            assert!(allowed(name, url, false), "{url}");
            for other in ALL.iter().filter(|carrier| carrier.name() != name) {
                assert!(!allowed(other.name(), url, false), "{} {url}", other.name());
            }
            for wrong in [
                url.replace("https", "http"),
                format!("{url}.evil.example"),
                format!("{url}:8443"),
                url.replace("https://", "https://user@"),
            ] {
                assert!(!allowed(name, &wrong, true), "{wrong}");
            }
            assert!(allowed(name, "http://127.0.0.1:9000", true));
            assert!(!allowed(name, "http://127.0.0.1:9000", false));
            assert!(!allowed(name, "http://169.254.169.254", true));
        }
    }

    #[test]
    fn an_id_is_one_segment_of_a_path() {
        let account = Account {
            sid: "a".to_owned(),
            credentials: Credentials::read("t"),
            api_base: Url::parse("https://api.telnyx.com/").unwrap(),
        };
        let url = account.url(&["v2", "calls", "v3:x/../y?z"]).unwrap();
        assert_eq!(url.as_str(), "https://api.telnyx.com/v2/calls/v3:x%2F..%2Fy%3Fz");
        assert_eq!(account.url(&["Call", ""]).unwrap().path(), "/Call/");
    }

    #[test]
    fn a_page_of_records_says_where_the_next_one_is() {
        let span =
            Span { since: "2026-11-22T10:00:00Z".parse().unwrap(), until: "2026-11-24T14:00:00Z".parse().unwrap() };
        let credentials = || Credentials::read(r#"{"auth_token":"t"}"#);
        let asked = |name: &str, next: Option<&str>| {
            let account = Account {
                sid: "A".to_owned(),
                credentials: credentials(),
                api_base: Url::parse("https://carrier.example").unwrap(),
            };
            by_name(name).unwrap().records(&account, &span, next).unwrap().map(|request| request.url.to_string())
        };
        let read = |name: &str, body: Value| {
            let page = by_name(name).unwrap().recorded(&body)?;
            Some((page.calls.into_iter().filter_map(|call| call.provider_call_id).collect::<Vec<_>>(), page.next))
        };
        let (one, more) = (vec!["u".to_owned()], Some("20".to_owned()));
        assert_eq!(
            asked("plivo", None).unwrap(),
            "https://carrier.example/v1/Account/A/Call/?end_time__gte=2026-11-22+10%3A00%3A00&end_time__lt=2026-11-24+14%3A00%3A00&limit=20&offset=0"
        );
        assert!(asked("plivo", Some("20")).unwrap().ends_with("&offset=20"));
        let page = json!({"meta": {"offset": 0, "next": "/v1/…"}, "objects": [{"call_uuid": "u"}]});
        assert_eq!(read("plivo", page), Some((one.clone(), more)));
        let page = json!({"meta": {"offset": 20, "next": null}, "objects": []});
        assert_eq!(read("plivo", page), Some((vec![], None)));

        assert_eq!(
            asked("twilio", None).unwrap(),
            "https://carrier.example/2010-04-01/Accounts/A/Calls.json?StartTime%3E=2026-11-22&StartTime%3C=2026-11-24&PageSize=1000"
        );
        let next = "/2010-04-01/Accounts/OTHER/Calls.json?PageToken=x";
        assert_eq!(
            asked("twilio", Some(next)).unwrap(),
            "https://carrier.example/2010-04-01/Accounts/A/Calls.json?PageToken=x"
        );
        let page = json!({"next_page_uri": next, "calls": [{"sid": "u", "status": "completed"}]});
        assert_eq!(read("twilio", page), Some((one.clone(), Some(next.to_owned()))));

        let page =
            json!({"count": 2, "record_index": 0, "_embedded": {"calls": [{"uuid": "u", "status": "completed"}]}});
        assert_eq!(read("vonage", page), Some((one.clone(), Some("1".to_owned()))));
        let page =
            json!({"count": 2, "record_index": 1, "_embedded": {"calls": [{"uuid": "u", "status": "completed"}]}});
        assert_eq!(read("vonage", page), Some((one, None)));
        for carrier in ALL {
            assert!(carrier.recorded(&json!({"error": "no"})).is_none(), "{}", carrier.name());
        }
    }

    #[test]
    fn an_earlier_call_to_the_same_callee_is_not_the_wanted_one() {
        let now = Utc::now();
        let wanted = |provider_call_id| Wanted {
            attempt_id: Uuid::nil(),
            provider_call_id,
            from: "",
            to: "",
            since: now - TimeDelta::seconds(90),
            others: &[],
        };
        let call = |seconds_ago: i64| CallReport {
            provider_call_id: Some("u".to_owned()),
            started_at: Some((now - TimeDelta::seconds(seconds_ago)).to_rfc3339()),
            ..CallReport::default()
        };
        assert!(wanted(None).is(&call(55)));
        assert!(!wanted(None).is(&call(3_600)));
        assert!(!wanted(None).is(&CallReport::default()), "a time without a zone proves nothing");
        let others = ["u".to_owned()];
        assert!(!Wanted { others: &others, ..wanted(None) }.is(&call(55)), "another attempt's is not this one's");
        assert!(wanted(Some("u")).is(&call(3_600)));
        assert!(!wanted(Some("v")).is(&call(55)));
    }
}

/// How the carriers' own files try their errors.
#[cfg(test)]
pub(super) mod replies {
    use super::{DialOutcome, Outcome, Reply};
    use crate::telephony::carrier::by_name;

    fn refusal(carrier: &str, status: u16, body: &str) -> DialOutcome {
        let reply = Reply { status: status.try_into().unwrap(), retry_after: None, body: body.to_owned().into() };
        by_name(carrier).unwrap().refusal(&reply)
    }

    pub fn is_refused(carrier: &str, status: u16, body: &str, why: Outcome, code: &str) {
        let expected = DialOutcome::Refused { reason: why, code: code.to_owned() };
        assert_eq!(refusal(carrier, status, body), expected, "{status} {body}");
    }

    pub fn is_deferred(carrier: &str, status: u16, body: &str, seconds: u32, code: &str) {
        let expected = DialOutcome::Deferred { retry_after_seconds: seconds, code: code.to_owned() };
        assert_eq!(refusal(carrier, status, body), expected, "{status} {body}");
        let told = Reply { status: status.try_into().unwrap(), retry_after: Some(77), body: body.to_owned().into() };
        assert!(matches!(
            by_name(carrier).unwrap().refusal(&told),
            DialOutcome::Deferred { retry_after_seconds: 77, .. }
        ));
    }

    /// What proves nothing, whatever the body says.
    pub fn the_rest_is_unknown(carrier: &str, body: &str) {
        for status in [302, 408, 418, 425, 500, 501, 502, 503, 504] {
            let unknown = DialOutcome::Unknown { code: status.to_string() };
            assert_eq!(refusal(carrier, status, body), unknown, "{status}");
            assert_eq!(refusal(carrier, status, ""), unknown, "{status}");
        }
    }
}
