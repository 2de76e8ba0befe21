//! What the carrier says happened: its record of calls, read over its API like any customer would read it.
//!
//! It is the only witness that the system under test has no hand in, and it works alike for a carrier that is not ours. Nothing of our
//! own database is looked at here, but for the business clock's history, which says what time it was.

use super::Provider;
use anyhow::{Context, Result, ensure};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use url::Url;

/// Results a page at most.
const PAGE: usize = 20;
/// Least time between two calls to one number.
const MIN_GAP: TimeDelta = TimeDelta::minutes(60);
/// In so much time a number is called at most [`CAP`] times.
const CAP_WINDOW: TimeDelta = TimeDelta::hours(24);
const CAP: usize = 2;

/// Access to an account at a carrier.
#[derive(Clone, Debug)]
pub struct Witness {
    /// Whose API it is.
    pub provider: Provider,
    /// Where the carrier's API is.
    pub url: Url,
    /// The account.
    pub auth_id: String,
    /// Its token.
    pub auth_token: String,
    /// The client to ask with.
    pub http: reqwest::Client,
}

/// An instant of the carrier's, known to the second or better: not before `0`, not after `1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment(DateTime<Utc>, DateTime<Utc>);

/// One create that the carrier accepted.
#[derive(Clone, Debug)]
pub struct Dial {
    callee: String,
    created: Moment,
    /// None while the call is live.
    ended: Option<Moment>,
    /// Seconds the carrier bills.
    pub billed_seconds: u64,
    /// Code of the hang-up's cause.
    pub hangup_code: Option<u64>,
}

#[derive(Deserialize)]
struct Page {
    meta: Meta,
    objects: Vec<Record>,
}

#[derive(Deserialize)]
struct Meta {
    total_count: usize,
}

#[derive(Deserialize)]
struct Record {
    call_uuid: String,
    to_number: String,
    initiation_time: String,
    end_time: Option<String>,
    #[serde(default, deserialize_with = "number")]
    bill_duration: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    billed_duration: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    hangup_cause_code: Option<u64>,
}

/// A number, also where it is written as a text.
fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(match Option::<serde_json::Value>::deserialize(deserializer)? {
        Some(serde_json::Value::String(text)) => text.parse().ok(),
        Some(value) => value.as_u64(),
        None => None,
    })
}

#[derive(Deserialize)]
struct Live {
    calls: Vec<String>,
}

#[derive(Deserialize)]
struct LiveCall {
    to: String,
    session_start: String,
}

impl Witness {
    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        let base = self.url.as_str().trim_end_matches('/');
        let url = match self.provider {
            Provider::Plivo => format!("{base}/v1/Account/{}/Call/{path}", self.auth_id),
            Provider::Twilio => format!("{base}/2010-04-01/Accounts/{}/{path}", self.auth_id),
            Provider::Telnyx => format!("{base}/v2/{path}"),
            Provider::Vonage => format!("{base}/v1/{path}"),
        };
        let request = self.http.get(&url);
        let request = match self.provider {
            Provider::Plivo | Provider::Twilio => request.basic_auth(&self.auth_id, Some(&self.auth_token)),
            Provider::Telnyx => request.bearer_auth(self.secret("api_key")?),
            Provider::Vonage => {
                let (application, key) = (self.secret("application_id")?, self.secret("private_key")?);
                request.bearer_auth(shared::telephony::vonage::token::token(&application, &key)?)
            }
        };
        let response = request.send().await.with_context(|| format!("the carrier does not answer at {url}"))?;
        let status = response.status();
        let body = response.text().await?;
        ensure!(status.is_success(), "the carrier answered {status} to GET {url}: {body}");
        serde_json::from_str(&body)
            .with_context(|| format!("the carrier's answer to GET {url} is not {}'s: {body}", self.provider.as_str()))
    }

    /// One of the secrets that the token is made of.
    fn secret(&self, name: &str) -> Result<String> {
        let secrets: serde_json::Value = serde_json::from_str(&self.auth_token).context("the account's token")?;
        secrets[name].as_str().map(str::to_owned).with_context(|| format!("the account has no {name}"))
    }

    /// Every call that the carrier accepted on this account, ended or live. `told` hears how many were read, of how many.
    pub async fn dials(&self, told: impl Fn(usize, usize)) -> Result<Vec<Dial>> {
        match self.provider {
            Provider::Plivo => {}
            Provider::Twilio => return self.dials_at_twilio(told).await,
            Provider::Telnyx => return self.dials_at_telnyx(told).await,
            Provider::Vonage => return self.dials_at_vonage(told).await,
        }
        // Before the records, and in the order in which a call goes: whatever ends meanwhile is in one of them.
        let mut staged = BTreeSet::new();
        for status in ["queued", "live"] {
            staged.extend(self.get::<Live>(&format!("?status={status}")).await?.calls);
        }
        let mut dials = Vec::new();
        let mut seen = BTreeSet::new();
        let mut offset = 0;
        loop {
            let page: Page = self.get(&format!("?limit={PAGE}&offset={offset}")).await?;
            offset += page.objects.len();
            let known = seen.len();
            for record in page.objects {
                if seen.insert(record.call_uuid.clone()) {
                    dials.push(Dial::of(record)?);
                }
            }
            told(seen.len(), page.meta.total_count);
            // A page without anything new is the last one, whatever the count says.
            if seen.len() == known || offset >= page.meta.total_count {
                break;
            }
        }
        for uuid in staged.into_iter().filter(|uuid| !seen.contains(uuid)) {
            dials.push(self.staged(&uuid).await?);
        }
        Ok(dials)
    }

    /// A call that was not over when the lists were read, however far it is by now.
    async fn staged(&self, uuid: &str) -> Result<Dial> {
        for status in ["queued", "live"] {
            if let Ok(call) = self.get::<LiveCall>(&format!("{uuid}/?status={status}")).await {
                let created = Moment::read(&call.session_start)?;
                return Ok(Dial {
                    callee: digits(&call.to),
                    created,
                    ended: None,
                    billed_seconds: 0,
                    hangup_code: None,
                });
            }
        }
        Dial::of(self.get(&format!("{uuid}/")).await?)
    }
}

/// A page of Twilio's calls, live ones among them.
#[derive(Deserialize)]
struct Calls {
    calls: Vec<CallResource>,
    next_page_uri: Option<String>,
}

#[derive(Deserialize)]
struct CallResource {
    sid: String,
    to: String,
    date_created: String,
    end_time: Option<String>,
    #[serde(default, deserialize_with = "number")]
    duration: Option<u64>,
}

impl Witness {
    async fn dials_at_twilio(&self, told: impl Fn(usize, usize)) -> Result<Vec<Dial>> {
        let mut dials = Vec::new();
        let mut seen = BTreeSet::new();
        for page in 0.. {
            let read: Calls = self.get(&format!("Calls.json?PageSize=1000&Page={page}")).await?;
            // A call that began meanwhile moves others to the next page.
            for call in read.calls.into_iter().filter(|call| seen.insert(call.sid.clone())) {
                dials.push(Dial {
                    callee: digits(&call.to),
                    created: Moment::read(&call.date_created)?,
                    ended: call.end_time.as_deref().map(Moment::read).transpose()?,
                    // Started minutes.
                    billed_seconds: call.duration.unwrap_or(0).div_ceil(60) * 60,
                    hangup_code: None,
                });
            }
            told(dials.len(), dials.len());
            if read.next_page_uri.is_none() {
                break;
            }
        }
        Ok(dials)
    }
}

/// A page of Telnyx's detail records: of calls that are over, since no list tells who is being called.
#[derive(Deserialize)]
struct Details {
    data: Vec<Detail>,
    meta: DetailMeta,
}

#[derive(Deserialize)]
struct DetailMeta {
    total_pages: usize,
    total_results: usize,
}

#[derive(Deserialize)]
struct Detail {
    id: String,
    cld: String,
    started_at: String,
    finished_at: Option<String>,
    #[serde(default, deserialize_with = "number")]
    billed_sec: Option<u64>,
}

/// A page of Vonage's calls, live ones among them.
#[derive(Deserialize)]
struct VonageCalls {
    count: usize,
    #[serde(rename = "_embedded")]
    embedded: VonagePage,
}

#[derive(Deserialize)]
struct VonagePage {
    calls: Vec<VonageCall>,
}

#[derive(Deserialize)]
struct VonageCall {
    uuid: String,
    to: VonageEnd,
    start_time: String,
    end_time: Option<String>,
    #[serde(default, deserialize_with = "number")]
    duration: Option<u64>,
}

#[derive(Deserialize)]
struct VonageEnd {
    number: String,
}

impl Witness {
    async fn dials_at_telnyx(&self, told: impl Fn(usize, usize)) -> Result<Vec<Dial>> {
        let mut dials = Vec::new();
        let mut seen = BTreeSet::new();
        for page in 1.. {
            let query = "filter%5Brecord_type%5D=call-control&sort=started_at&page%5Bsize%5D=50";
            let read: Details = self.get(&format!("detail_records?{query}&page%5Bnumber%5D={page}")).await?;
            for call in read.data.into_iter().filter(|call| seen.insert(call.id.clone())) {
                dials.push(Dial {
                    callee: digits(&call.cld),
                    created: Moment::read(&call.started_at)?,
                    ended: call.finished_at.as_deref().map(Moment::read).transpose()?,
                    billed_seconds: call.billed_sec.unwrap_or(0),
                    hangup_code: None,
                });
            }
            told(dials.len(), read.meta.total_results);
            if page >= read.meta.total_pages {
                break;
            }
        }
        Ok(dials)
    }

    async fn dials_at_vonage(&self, told: impl Fn(usize, usize)) -> Result<Vec<Dial>> {
        let mut dials = Vec::new();
        let mut seen = BTreeSet::new();
        loop {
            let path = format!("calls?order=asc&page_size=100&record_index={}", dials.len());
            let read: VonageCalls = self.get(&path).await?;
            let known = dials.len();
            for call in read.embedded.calls.into_iter().filter(|call| seen.insert(call.uuid.clone())) {
                dials.push(Dial {
                    callee: digits(&call.to.number),
                    created: Moment::read(&call.start_time)?,
                    ended: call.end_time.as_deref().map(Moment::read).transpose()?,
                    billed_seconds: call.duration.unwrap_or(0),
                    hangup_code: None,
                });
            }
            told(dials.len(), read.count);
            if dials.len() == known || dials.len() >= read.count {
                break;
            }
        }
        Ok(dials)
    }
}

impl Dial {
    /// Whether it was created within a stretch, by every reading of its time.
    pub fn was_created_within(&self, from: DateTime<Utc>, to: DateTime<Utc>) -> bool {
        from <= self.created.0 && self.created.1 < to
    }

    fn of(record: Record) -> Result<Self> {
        Ok(Self {
            callee: digits(&record.to_number),
            created: Moment::read(&record.initiation_time)?,
            ended: record.end_time.as_deref().map(Moment::read).transpose()?,
            // What is billed, in whole pulses; the other is how long was talked.
            billed_seconds: record.billed_duration.or(record.bill_duration).unwrap_or(0),
            hangup_code: record.hangup_cause_code,
        })
    }
}

impl Moment {
    /// Reads a time with or without offset (UTC then), to the second or finer.
    fn read(text: &str) -> Result<Self> {
        let at = DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%:z")
            .or_else(|_| DateTime::parse_from_rfc3339(text))
            .or_else(|_| DateTime::parse_from_rfc2822(text))
            .map(|time| time.to_utc())
            .or_else(|_| NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").map(|time| time.and_utc()))
            .with_context(|| format!("the carrier's time {text:?} cannot be read"))?;
        let uncertain = if text.contains('.') { TimeDelta::zero() } else { TimeDelta::milliseconds(999) };
        Ok(Self(at, at + uncertain))
    }
}

/// Creates that should not have been: while an earlier call to the number may still have been live, inside the minimum gap, or beyond
/// the cap of a rolling day. `business` tells the business time of an instant. Where the carrier tells only whole seconds, a create
/// counts when every reading of them makes it one.
pub fn double_dials(dials: &[Dial], business: impl Fn(DateTime<Utc>) -> DateTime<Utc>) -> usize {
    let mut by_callee: BTreeMap<&str, Vec<&Dial>> = BTreeMap::new();
    for dial in dials {
        by_callee.entry(&dial.callee).or_default().push(dial);
    }
    let mut doubles = 0;
    for calls in by_callee.values_mut() {
        // Of two that began in one second, the one that ended first came first: they cannot both have been live.
        calls.sort_by_key(|dial| (dial.created.0, dial.ended.is_none(), dial.ended.map(|ended| ended.0)));
        for (index, call) in calls.iter().enumerate() {
            let latest = business(call.created.1);
            let since = |earlier: &&&Dial| latest - business(earlier.created.0);
            let earlier = &calls[..index];
            let live = earlier.iter().any(|earlier| earlier.ended.is_none_or(|ended| call.created.1 < ended.0));
            let close = earlier.iter().any(|earlier| since(&earlier) < MIN_GAP);
            let often = earlier.iter().filter(|earlier| since(earlier) < CAP_WINDOW).count() >= CAP;
            doubles += usize::from(live || close || often);
        }
    }
    doubles
}

fn digits(number: &str) -> String {
    number.chars().filter(char::is_ascii_digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carrier::{Account, Carrier, CarrierOptions};
    use serde_json::json;

    fn dial(callee: &str, from: &str, to: Option<&str>) -> Dial {
        let moment = |time: &str| Moment::read(&format!("2026-11-24 {time}+05:30")).unwrap();
        Dial {
            callee: callee.to_owned(),
            created: moment(from),
            ended: to.map(moment),
            billed_seconds: 0,
            hangup_code: None,
        }
    }

    fn count(dials: &[Dial]) -> usize {
        double_dials(dials, |real| real)
    }

    #[tokio::test]
    async fn reads_the_whole_record_of_a_carrier() {
        let account = Account::fresh();
        let options = CarrierOptions { accounts: vec![account.clone()], ..CarrierOptions::default() };
        let carrier = Carrier::start(options).await.unwrap();
        let http = crate::parts::http_client().unwrap();
        let create = carrier.url().join(&format!("v1/Account/{}/Call/", account.auth_id)).unwrap();
        for n in 0..45 {
            let body =
                json!({"from": "918031234567", "to": format!("9197000001{n:02}"), "answer_url": "http://127.0.0.1:9/"});
            let request = http.post(create.clone()).basic_auth(&account.auth_id, Some(&account.auth_token));
            assert_eq!(request.json(&body).send().await.unwrap().status(), 201);
        }
        let witness = Witness {
            provider: Provider::Plivo,
            url: carrier.url().clone(),
            auth_id: account.auth_id,
            auth_token: account.auth_token,
            http,
        };
        assert_eq!(witness.dials(|_, _| ()).await.unwrap().len(), 45, "live or ended");
        while !carrier.is_idle() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let dials = witness.dials(|_, _| ()).await.unwrap();
        assert_eq!((dials.len(), dials.iter().filter(|dial| dial.ended.is_none()).count()), (45, 0));
        // Whoever was reached costs a minute, though the answer URL was not.
        assert!(dials.iter().any(|dial| dial.billed_seconds == 60));
        assert_eq!(count(&dials), 0);
    }

    #[test]
    fn two_calls_at_once_are_double_whoever_made_them() {
        assert_eq!(
            count(&[dial("1", "10:00:00.0", Some("10:00:01.0")), dial("2", "10:00:00.5", Some("10:00:01.0"))]),
            0
        );
        assert_eq!(
            count(&[dial("1", "10:00:00.0", Some("11:30:00.0")), dial("1", "11:00:00.5", Some("11:31:00.0"))]),
            1
        );
        assert_eq!(count(&[dial("1", "10:00:00.0", None), dial("1", "15:00:00.0", Some("15:01:00.0"))]), 1);
    }

    #[test]
    fn the_gap_and_the_cap_are_judged_in_business_time() {
        let calls = [dial("1", "10:00:00.0", Some("10:00:01.0")), dial("1", "10:00:02.0", Some("10:00:03.0"))];
        assert_eq!(count(&calls), 1);
        let jump = |hours: i64| {
            let at = Moment::read("2026-11-24 10:00:01.5+05:30").unwrap().0;
            move |real: DateTime<Utc>| if real < at { real } else { real + TimeDelta::hours(hours) }
        };
        assert_eq!(double_dials(&calls, jump(1)), 0);
        let mut calls = calls.to_vec();
        calls.push(dial("1", "11:30:00.0", Some("11:30:01.0")));
        assert_eq!(double_dials(&calls, jump(1)), 1, "the third in a day");
    }

    #[test]
    fn whole_seconds_never_accuse_falsely() {
        // The clock jumps between two calls of one second.
        let calls = [dial("1", "10:00:00", Some("10:00:00")), dial("1", "10:00:00", Some("10:00:00"))];
        let at = Moment::read("2026-11-24 10:00:00.5+05:30").unwrap().0;
        let jump = |real| if real < at { real } else { real + TimeDelta::hours(1) };
        assert_eq!(double_dials(&calls, jump), 0);
        // Whichever is told first.
        let calls = [dial("1", "10:00:00", Some("10:00:01")), dial("1", "10:00:00", Some("10:00:00"))];
        assert_eq!(double_dials(&calls, jump), 0);
    }
}
