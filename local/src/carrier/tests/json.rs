//! Telnyx and Vonage over real HTTP: the adapters of `shared` make the calls and judge what they are told.

use super::{super::*, number};
use axum::{Router, body::Bytes, extract::State, http::HeaderMap, response::IntoResponse, routing::post};
use chrono::TimeDelta;
use shared::telephony::{
    CallReport, CallStatus, CallbackEvent, DialOutcome, Lookup,
    api::{self, Create, Span, Wanted},
    carrier::{self, Credentials, Signed},
};
use std::time::Duration;

const FROM: &str = "+918031234567";

#[derive(Clone)]
struct Receiver {
    carrier: &'static dyn carrier::Carrier,
    credentials: Arc<Credentials>,
    origin: String,
    seen: Arc<Mutex<Vec<(CallbackEvent, CallReport)>>>,
}

/// Takes what verifies, and gives the document that is asked for.
async fn receive(
    State(receiver): State<Receiver>,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: Bytes,
) -> impl IntoResponse {
    let signed = Signed { method: &http::Method::POST, url: "", headers: &headers, body: &body };
    assert!(receiver.carrier.verify(&receiver.credentials, &signed, Utc::now().timestamp()));
    let event: CallbackEvent = uri.path().trim_start_matches('/').parse().unwrap();
    let told = receiver.carrier.parse(event, &body).unwrap();
    assert_eq!(told.report.unmapped, None);
    receiver.seen.lock().unwrap().push((event, told.report));
    let socket = json!({
        "type": "websocket", "uri": "wss://agent.example.com/x", "content-type": "audio/l16;rate=16000",
    });
    let steps = json!([
        { "action": "record", "eventUrl": [format!("{}/recording", receiver.origin)], "eventMethod": "POST" },
        { "action": "connect", "eventUrl": [format!("{}/stream", receiver.origin)], "endpoint": [socket] },
    ]);
    axum::Json(if told.wants_document { steps } else { json!({}) })
}

struct Scene {
    simulated: Carrier,
    receiver: Receiver,
    account: api::Account,
    http: reqwest::Client,
}

impl Scene {
    async fn set(name: &str, account: Account, billing: Billing) -> Self {
        let carrier = carrier::by_name(name).unwrap();
        let options = CarrierOptions { accounts: vec![account.clone()], billing, ..CarrierOptions::default() };
        let simulated = Carrier::start(options).await.unwrap();
        let credentials = Credentials::read(&account.auth_token);
        let url = simulated.url().as_str();
        let opened = api::Account::new(carrier, &account.auth_id, credentials.clone(), url, true).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        let receiver = Receiver { carrier, credentials: Arc::new(credentials), origin, seen: Arc::default() };
        let router = Router::new().route("/{event}", post(receive)).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { simulated, receiver, account: opened, http: crate::parts::http_client().unwrap() }
    }

    async fn create(&self, attempt_id: Uuid, to: &str) -> DialOutcome {
        let url = |event: CallbackEvent| (event, format!("{}/{}", self.receiver.origin, event.as_str()));
        let callbacks: Vec<_> = CallbackEvent::ALL.into_iter().map(url).collect();
        let call = Create {
            attempt_id,
            from: FROM,
            to,
            callbacks: &callbacks,
            stream_url: Some("wss://agent.example.com/x"),
            ring_timeout: 30,
            time_limit: 600,
            record: true,
        };
        api::create(self.receiver.carrier, &self.http, &self.account, &call).await
    }

    async fn call(&self, to: &str) -> String {
        match self.create(Uuid::new_v4(), to).await {
            DialOutcome::Accepted { provider_call_id } => provider_call_id,
            other => panic!("{other:?}"),
        }
    }

    async fn settle(&self) {
        for _ in 0..1_000 {
            if self.simulated.is_idle() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} calls still live", self.simulated.live_calls());
    }

    async fn look_up(&self, wanted: &Wanted<'_>) -> Lookup {
        api::look_up(self.receiver.carrier, &self.http, &self.account, wanted).await.unwrap()
    }

    fn told(&self, id: &str) -> Vec<CallReport> {
        let seen = self.receiver.seen.lock().unwrap();
        let of_call = |report: &&CallReport| report.provider_call_id.as_deref() == Some(id);
        seen.iter().map(|(_, report)| report).filter(of_call).cloned().collect()
    }
}

async fn plays_by_the_adapter(name: &str, account: Account) {
    let billing = Billing { first_pulse: 1, ..Billing::default() };
    let scene = Scene::set(name, account, billing).await;
    let carrier = scene.receiver.carrier;
    let to = |outcome| format!("+{}", number(outcome));
    let (answered, busy) = (scene.call(&to(Outcome::Answered)).await, scene.call(&to(Outcome::Busy)).await);
    let machine = scene.call(&to(Outcome::Machine)).await;
    scene.settle().await;
    let seconds = i64::from(outcome::fate(7, &Mix::default(), &number(Outcome::Answered), 1).talk_seconds);

    let told = scene.told(&answered);
    let status = |wanted| told.iter().filter(|report| report.status == Some(wanted)).count();
    assert_eq!((status(CallStatus::Initiated), status(CallStatus::Ended)), (1, 1), "{told:?}");
    assert!(status(CallStatus::InProgress) >= 1, "{told:?}");
    assert_eq!(told.iter().find_map(|report| report.bill_duration_seconds), Some(seconds));
    assert!(told.iter().any(|report| report.cost_micros.is_some_and(|cost| cost > 0)));
    assert!(told.iter().any(|report| report.machine == Some(false)));
    assert!(scene.told(&machine).iter().any(|report| report.machine == Some(true)));
    let busy_told = scene.told(&busy);
    assert!(busy_told.iter().any(|report| report.outcome == Some(shared::telephony::Outcome::Busy)), "{busy_told:?}");
    let (recordings, streams) = {
        let seen = scene.receiver.seen.lock().unwrap();
        let recordings: Vec<_> = seen.iter().filter_map(|(_, report)| report.recording.clone()).collect();
        (recordings, seen.iter().filter(|(_, report)| report.stream.is_some()).count())
    };
    assert_eq!((recordings.len(), streams), (2, 4), "of who was reached: a recording, and a stream's begin and end");
    assert!(recordings.iter().any(|recording| recording.duration_seconds == Some(seconds)));

    // Asked for by its id, and hung up when it is over.
    let by_id = |id| Wanted {
        attempt_id: Uuid::nil(),
        provider_call_id: Some(id),
        from: FROM,
        to: "",
        since: Utc::now(),
        others: &[],
    };
    let Lookup::Ended(report) = scene.look_up(&by_id(&answered)).await else { panic!("not over") };
    assert_eq!(report.duration_seconds, Some(seconds));
    let unknown = if name == "telnyx" { "v3:00".to_owned() } else { Uuid::nil().to_string() };
    assert_eq!(scene.look_up(&by_id(&unknown)).await, Lookup::NotFound);
    assert!(api::hang_up(carrier, &scene.http, &scene.account, &answered).await.is_ok());

    // And its records, of which there is one a call.
    let now = Utc::now();
    let span = Span { since: now - TimeDelta::hours(1), until: now + TimeDelta::hours(1) };
    let page = api::records(carrier, &scene.http, &scene.account, &span, None).await.unwrap().unwrap();
    assert_eq!((page.calls.len(), page.next), (3, None));
    let billed = |id: &str| {
        let call = page.calls.iter().find(|call| call.provider_call_id.as_deref() == Some(id));
        call.and_then(|call| call.bill_duration_seconds)
    };
    assert_eq!((billed(&answered), billed(&busy)), (Some(seconds), Some(0)));
    let none = Span { since: now - TimeDelta::hours(2), until: now - TimeDelta::hours(1) };
    assert!(api::records(carrier, &scene.http, &scene.account, &none, None).await.unwrap().unwrap().calls.is_empty());
}

#[tokio::test]
async fn telnyx_plays_by_the_adapter() {
    plays_by_the_adapter("telnyx", Account::telnyx()).await;
}

#[tokio::test]
async fn vonage_plays_by_the_adapter() {
    plays_by_the_adapter("vonage", Account::vonage().unwrap()).await;
}

#[tokio::test]
async fn a_call_whose_answer_was_lost_is_found_and_none_is_made_twice() {
    let scene = Scene::set("telnyx", Account::telnyx(), Billing::default()).await;
    scene.simulated.set_faults(Faults { lose_responses: 1_000, ..Faults::default() });
    let (attempt_id, to) = (Uuid::new_v4(), format!("+{}", number(Outcome::NoAnswer)));
    assert!(matches!(scene.create(attempt_id, &to).await, DialOutcome::Unknown { .. }));
    let wanted = Wanted { attempt_id, provider_call_id: None, from: FROM, to: &to, since: Utc::now(), others: &[] };
    let Lookup::Live(found) = scene.look_up(&wanted).await else { panic!("not found") };
    // Telnyx knows the command again.
    assert_eq!(
        scene.create(attempt_id, &to).await,
        DialOutcome::Accepted { provider_call_id: found.provider_call_id.clone().unwrap() }
    );
    assert_eq!(scene.simulated.creates(), 1);
    let id = found.provider_call_id.unwrap();
    api::hang_up(scene.receiver.carrier, &scene.http, &scene.account, &id).await.unwrap();
    scene.settle().await;
    let cancelled = Some(shared::telephony::Outcome::Cancelled);
    assert!(scene.told(&id).iter().any(|report| report.outcome == cancelled));
    assert_eq!(scene.look_up(&wanted).await, Lookup::NotFound, "what is over is listed no more");
}

#[tokio::test]
async fn another_s_credentials_open_nothing() {
    for (name, own, other) in [
        ("telnyx", Account::telnyx(), Account::telnyx()),
        ("vonage", Account::vonage().unwrap(), Account::vonage().unwrap()),
    ] {
        let mut scene = Scene::set(name, own.clone(), Billing::default()).await;
        let mut secrets: Value = serde_json::from_str(&other.auth_token).unwrap();
        // The right application, signed for with another's key.
        secrets["application_id"] = json!(own.auth_id);
        scene.account.credentials = Credentials::read(&secrets.to_string());
        let refused = scene.create(Uuid::new_v4(), "+919812345678").await;
        assert!(matches!(refused, DialOutcome::Refused { .. }), "{name}: {refused:?}");
        assert_eq!(scene.simulated.creates(), 0);
    }
}

#[tokio::test]
async fn a_call_at_vonage_is_found_however_many_came_after_it() {
    let scene = Scene::set("vonage", Account::vonage().unwrap(), Billing::default()).await;
    let since = Utc::now();
    let to = |n: u32| format!("+9197{n:08}");
    let first = scene.call(&to(0)).await;
    for n in 1..=120 {
        scene.call(&to(n)).await;
    }
    let (callee, last) = (to(0), to(120));
    let by_numbers =
        |to| Wanted { attempt_id: Uuid::nil(), provider_call_id: None, from: FROM, to, since, others: &[] };
    for (callee, is_first) in [(&callee, true), (&last, false)] {
        let (Lookup::Live(found) | Lookup::Ended(found)) = scene.look_up(&by_numbers(callee)).await else {
            panic!("not found");
        };
        assert_eq!(found.provider_call_id.as_ref() == Some(&first), is_first);
    }
    assert_eq!(scene.look_up(&by_numbers("+919700000999")).await, Lookup::NotFound);
}
