//! The carrier over real HTTP: a caller creates calls, a receiver takes the callbacks.

mod json;

use super::{
    Account, Carrier, CarrierOptions, Faults, Mix, Outcome,
    outcome::fate,
    signature::{Pairs, sign, text_v3},
};
use axum::{Router, body::Bytes, extract::State, http::HeaderMap, response::IntoResponse, routing::post};
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

const TOKEN: &str = "a-token";
const AGENT: &str = r#"<Response><Record recordSession="true" callbackUrl="ORIGIN/recording" callbackMethod="POST"/><Stream bidirectional="true" keepCallAlive="true" contentType="audio/x-mulaw;rate=8000">wss://agent.example.com/x</Stream></Response>"#;

#[derive(Clone)]
struct Seen {
    path: String,
    form: Pairs,
}

impl Seen {
    fn get(&self, name: &str) -> &str {
        self.form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or_default()
    }
}

#[derive(Clone, Default)]
struct Receiver {
    origin: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

async fn receive(
    State(receiver): State<Receiver>,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: Bytes,
) -> impl IntoResponse {
    let form: Pairs = form_urlencoded::parse(&body).into_owned().collect();
    let url = format!("{}{uri}", receiver.origin);
    let nonce = headers["X-Plivo-Signature-V3-Nonce"].to_str().unwrap();
    assert_eq!(headers["X-Plivo-Signature-V3"], sign(TOKEN, &text_v3(&url, &form, nonce)));
    receiver.seen.lock().unwrap().push(Seen { path: uri.path().to_owned(), form });
    ([("content-type", "application/xml")], AGENT.replace("ORIGIN", &receiver.origin))
}

struct Bench {
    carrier: Carrier,
    receiver: Receiver,
    http: reqwest::Client,
}

impl Bench {
    async fn start(options: CarrierOptions) -> Self {
        let account = Account {
            auth_id: "MA1".to_owned(),
            auth_token: TOKEN.to_owned(),
            numbers: vec!["+918031234567".to_owned()],
            max_concurrent_calls: None,
        };
        let carrier = Carrier::start(CarrierOptions { accounts: vec![account], ..options }).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let receiver = Receiver { origin: format!("http://{}", listener.local_addr().unwrap()), ..Receiver::default() };
        let router = Router::new().route("/{event}", post(receive)).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { carrier, receiver, http: crate::parts::http_client().unwrap() }
    }

    fn body(&self, to: &str) -> Value {
        let origin = &self.receiver.origin;
        json!({
            "from": "+918031234567", "to": to, "answer_url": format!("{origin}/answer#rc=3&rp=ct,rt,5xx"),
            "ring_url": format!("{origin}/ring"), "hangup_url": format!("{origin}/hangup#rc=3"), "machine_detection": "true",
        })
    }

    async fn post(&self, body: &Value) -> reqwest::Result<(u16, Value)> {
        let url = self.carrier.url().join("v1/Account/MA1/Call/").unwrap();
        let response = self.http.post(url).basic_auth("MA1", Some(TOKEN)).json(body).send().await?;
        Ok((response.status().as_u16(), response.json().await?))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let url = self.carrier.url().join(&format!("v1/Account/MA1/{path}")).unwrap();
        let response = self.http.get(url).basic_auth("MA1", Some(TOKEN)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn settle(&self) {
        for _ in 0..1_000 {
            if self.carrier.is_idle() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} calls still live", self.carrier.live_calls());
    }

    fn seen(&self) -> Vec<Seen> {
        self.receiver.seen.lock().unwrap().clone()
    }
}

/// A number whose first call ends so, for seed 7.
fn number(wanted: Outcome) -> String {
    (0..10_000)
        .map(|n| format!("9198{n:08}"))
        .find(|number| fate(7, &Mix::default(), number, 1).outcome == wanted)
        .unwrap()
}

#[tokio::test]
async fn plays_an_answered_call() {
    let bench = Bench::start(CarrierOptions::default()).await;
    let to = number(Outcome::Answered);
    let (status, fired) = bench.post(&bench.body(&format!("+{to}"))).await.unwrap();
    assert_eq!((status, &fired["message"]), (201, &json!("call fired")));
    let uuid = fired["request_uuid"].as_str().unwrap();
    assert_eq!(bench.get(&format!("Call/{uuid}/")).await.0, 404, "no record while it is live");
    bench.settle().await;

    let seen = bench.seen();
    let paths: Vec<_> = seen.iter().map(|seen| seen.path.as_str()).collect();
    assert_eq!((paths.len(), &paths[..2]), (4, &["/ring", "/answer"][..]));
    assert!(
        seen.iter()
            .all(|seen| seen.get("CallUUID") == uuid && seen.get("To") == to && seen.get("From") == "918031234567")
    );
    let hangup = seen.iter().find(|seen| seen.path == "/hangup").unwrap();
    let recording = seen.iter().find(|seen| seen.path == "/recording").unwrap();
    assert_eq!((hangup.get("Event"), hangup.get("CallStatus")), ("Hangup", "completed"));
    assert_eq!(recording.get("RecordingDuration"), hangup.get("Duration"));

    let (status, record) = bench.get(&format!("Call/{uuid}/")).await;
    assert_eq!(status, 200);
    assert_eq!(record["billed_duration"].to_string(), hangup.get("BillDuration"));
    assert_eq!(record["bill_duration"].to_string(), hangup.get("Duration"));
    assert_eq!(record["total_amount"], hangup.get("TotalCost"));
    assert_eq!(record["hangup_cause_code"].to_string(), hangup.get("HangupCauseCode"));
    assert_eq!((&record["to_number"], &record["from_number"]), (&json!(to), &json!("+918031234567")));
    assert!(record["answer_time"].as_str().unwrap().ends_with("+05:30"));
    bench.carrier.stop().await;
}

#[tokio::test]
async fn ends_calls_that_nobody_answers() {
    let bench = Bench::start(CarrierOptions::default()).await;
    let wanted = [
        (Outcome::Busy, vec!["3010", "3100"], true),
        (Outcome::NoAnswer, vec!["3000", "6010"], true),
        (Outcome::Rejected, vec!["3020", "3110"], true),
        (Outcome::Invalid, vec!["3050", "3120", "2000"], false),
        (Outcome::Machine, vec!["4000"], true),
    ];
    for (outcome, ..) in &wanted {
        assert_eq!(bench.post(&bench.body(&number(*outcome))).await.unwrap().0, 201);
    }
    bench.settle().await;
    for (outcome, codes, rings) in wanted {
        let to = number(outcome);
        let seen: Vec<_> = bench.seen().into_iter().filter(|seen| seen.get("To") == to).collect();
        let hangup = seen.iter().find(|seen| seen.path == "/hangup").unwrap();
        assert!(codes.contains(&hangup.get("HangupCauseCode")), "{outcome:?}: {:?}", hangup.form);
        assert_eq!(seen.iter().any(|seen| seen.path == "/ring"), rings, "{outcome:?}");
        assert_eq!(hangup.get("Machine") == "true", outcome == Outcome::Machine);
        assert_eq!(hangup.get("BillDuration") == "0", outcome != Outcome::Machine);
    }
}

#[tokio::test]
async fn lists_records_page_by_page() {
    let bench = Bench::start(CarrierOptions::default()).await;
    for n in 0..45 {
        assert_eq!(bench.post(&bench.body(&format!("+9197000000{n:02}"))).await.unwrap().0, 201);
    }
    bench.settle().await;
    let mut uuids = std::collections::BTreeSet::new();
    for (offset, wanted) in [(0, 20), (20, 20), (40, 5)] {
        let (_, page) = bench.get(&format!("Call/?limit=20&offset={offset}")).await;
        assert_eq!((&page["meta"]["total_count"], &page["meta"]["limit"]), (&json!(45), &json!(20)));
        assert_eq!(page["meta"]["next"].is_null(), offset == 40);
        let objects = page["objects"].as_array().unwrap();
        assert_eq!(objects.len(), wanted);
        uuids.extend(objects.iter().map(|object| object["call_uuid"].to_string()));
    }
    assert_eq!(uuids.len(), 45);
    let (_, one) = bench.get("Call/?to_number=%2B919700000044&from_number=918031234567").await;
    assert_eq!(one["meta"]["total_count"], 1);
    let (_, none) = bench.get("Call/?end_time__lt=2020-01-01 00:00").await;
    assert_eq!(none["meta"]["total_count"], 0);
    let (_, live) = bench.get("Call/?status=live").await;
    assert_eq!(live["calls"], json!([]));
}

#[tokio::test]
async fn refuses_what_plivo_refuses() {
    let bench = Bench::start(CarrierOptions::default()).await;
    let good = bench.body("+919812345678");
    for (name, value, wanted) in [
        ("to", json!(null), "to parameter is not a valid phone number"),
        ("to", json!("12"), "to parameter is not a valid phone number"),
        ("from", json!("+911111111111"), "from number +911111111111 is not associated with your account"),
        ("answer_url", json!("ftp://x"), "answer_url parameter is not valid"),
        ("answer_url", json!(""), "answer_url parameter not present"),
        ("time_limit", json!(0), "time_limit parameter is not valid"),
        ("machine_detection", json!("perhaps"), "machine_detection parameter is not valid"),
    ] {
        let mut body = good.clone();
        body[name] = value;
        let (status, error) = bench.post(&body).await.unwrap();
        assert_eq!((status, error["error"].as_str().unwrap()), (400, wanted));
        assert!(error["api_id"].is_string());
    }
    let url = bench.carrier.url().join("v1/Account/MA1/Call/").unwrap();
    let wrong = bench.http.post(url.clone()).basic_auth("MA1", Some("wrong")).json(&good).send().await.unwrap();
    assert_eq!(wrong.status(), 401);
    let without_slash = url.as_str().trim_end_matches('/');
    let wrong = bench.http.post(without_slash).basic_auth("MA1", Some(TOKEN)).json(&good).send().await.unwrap();
    assert_eq!(wrong.status(), 404);
    assert_eq!(bench.carrier.creates(), 0);
    let form = [("from", "918031234567"), ("to", "919812345678"), ("answer_url", "https://h/a")];
    let form = bench.http.post(url).basic_auth("MA1", Some(TOKEN)).form(&form).send().await.unwrap();
    assert_eq!(form.status(), 201);
}

#[tokio::test]
async fn hangs_up_and_limits_concurrency() {
    let bench = Bench::start(CarrierOptions::default()).await;
    bench.carrier.add_account(Account {
        auth_id: "MA1".to_owned(),
        auth_token: TOKEN.to_owned(),
        numbers: Vec::new(),
        max_concurrent_calls: Some(1),
    });
    let (_, fired) = bench.post(&bench.body(&number(Outcome::NoAnswer))).await.unwrap();
    let (status, error) = bench.post(&bench.body("+919812345678")).await.unwrap();
    assert_eq!((status, error["error"].as_str()), (403, Some("Concurrency Limit Breached")));
    let path = format!("v1/Account/MA1/Call/{}/", fired["request_uuid"].as_str().unwrap());
    let url = bench.carrier.url().join(&path).unwrap();
    let delete = || bench.http.delete(url.clone()).basic_auth("MA1", Some(TOKEN)).send();
    assert_eq!(delete().await.unwrap().status(), 204);
    bench.settle().await;
    assert_eq!(delete().await.unwrap().status(), 404);
    assert_eq!(bench.seen().iter().find(|seen| seen.path == "/hangup").unwrap().get("HangupCauseCode"), "1000");
}

#[tokio::test]
async fn is_worse_than_real_when_asked() {
    let faults = Faults { lose_responses: 400, duplicate_callbacks: 300, drop_callbacks: 200, ..Faults::default() };
    let bench = Bench::start(CarrierOptions { faults, ..CarrierOptions::default() }).await;
    let mut lost = 0;
    for n in 0..40 {
        lost += u64::from(bench.post(&bench.body(&format!("+9196000000{n:02}"))).await.is_err());
    }
    bench.settle().await;
    let struck = bench.carrier.faults_struck();
    assert!((5..30).contains(&lost), "{lost}");
    assert_eq!(struck[&super::Fault::LoseResponse], lost);
    assert!(struck[&super::Fault::Duplicate] > 0 && struck[&super::Fault::Drop] > 0);
    assert_eq!(bench.carrier.creates(), 40, "every one of them was dialled all the same");
}
