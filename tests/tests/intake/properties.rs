//! What holds of every source, whatever is sent: a flipped bit is refused, and nothing that a stranger writes stops a reader.

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use proptest::prelude::*;
use serde_json::{Value, json};
use shared::http::Request;
use tests::{
    agents::{self, AgentSource, recorded},
    supervisor_binary, vectors,
};
use uuid::Uuid;
use webhook_intake::sources::{self, OpenSource, Source, agents::AgentReport};

const NOW_MS: i64 = 1_795_494_700_123;

/// The voice agents, and each way in which Vapi can be configured.
fn signers() -> Vec<AgentSource> {
    let signer = |provider, secret: &str, settings| AgentSource {
        provider,
        id: Uuid::nil(),
        secret: secret.to_owned(),
        settings,
    };
    vec![
        signer("retell", "key_0123456789", json!({})),
        signer("elevenlabs", "wsec_0123456789", json!({})),
        signer("agent", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", json!({})),
        signer("vapi", "0123456789", json!({})),
        signer(
            "vapi",
            "0123456789",
            json!({ "algorithm": "sha512", "signature_encoding": "base64", "signature_prefix": "sha512=",
                    "signature_header": "X-Acme-Signature", "include_timestamp": false }),
        ),
        signer("vapi", "0123456789", json!({ "auth": "bearer" })),
        signer("vapi", "0123456789", json!({ "auth": "secret" })),
    ]
}

fn open(signer: &AgentSource) -> (&'static dyn Source, OpenSource) {
    let source = sources::find(signer.provider).expect("a source of the table");
    let open = OpenSource {
        id: signer.id,
        provider: signer.provider.to_owned(),
        organization_id: None,
        store_id: None,
        settings: signer.settings.clone(),
        secrets: vec!["another secret".to_owned(), signer.secret.clone()],
    };
    (source, open)
}

fn request(headers: &[(String, Vec<u8>)], body: &[u8]) -> Option<Request> {
    let headers: Option<HeaderMap> = headers
        .iter()
        .map(|(name, value)| Some((HeaderName::try_from(name.as_str()).ok()?, HeaderValue::from_bytes(value).ok()?)))
        .collect();
    let (method, path, query) = (Method::POST, "/functions/v1/webhook-intake/x/y".to_owned(), String::new());
    Some(Request { method, path, query, headers: headers?, body: body.to_vec().into() })
}

fn signed(signer: &AgentSource, body: &[u8]) -> Vec<(String, Vec<u8>)> {
    signer.signatures(body, NOW_MS).into_iter().map(|(name, value)| (name, value.into_bytes())).collect()
}

/// Every recorded delivery of every provider.
fn deliveries() -> Vec<(&'static str, Value)> {
    let all = ["retell", "elevenlabs", "vapi", "agent"].into_iter().flat_map(|provider| {
        let names = agents::names(provider).expect("recorded deliveries");
        names.into_iter().map(move |name| {
            let text = recorded(provider, &name, Uuid::nil(), "c").expect("a delivery");
            (provider, serde_json::from_str(&text).expect("JSON"))
        })
    });
    all.collect()
}

#[test]
fn what_is_signed_is_accepted_within_its_time_and_by_no_other_secret() {
    let body = br#"{"event":"call_started","call":{}}"#;
    for signer in signers() {
        let (source, open) = open(&signer);
        let request = request(&signed(&signer, body), body).unwrap();
        assert!(source.verify(&open, &request, NOW_MS), "{} {}", signer.provider, signer.settings);
        let strangers = OpenSource { secrets: vec!["another secret".to_owned(), String::new()], ..open.clone() };
        assert!(!source.verify(&strangers, &request, NOW_MS), "{} {}", signer.provider, signer.settings);
        let without = OpenSource { secrets: vec![], ..open.clone() };
        assert!(!source.verify(&without, &request, NOW_MS), "{} {}", signer.provider, signer.settings);
        // The oldest that is taken, and the first that is not; how far ahead; in milliseconds.
        let (age, ahead) = match signer.provider {
            "retell" => (300_000, 300_000),
            "elevenlabs" => (1_800_123 - 123, i64::MAX),
            _ if signer.settings["include_timestamp"] == json!(false) || signer.settings.get("auth").is_some() => {
                continue;
            }
            _ => (300_000, 300_000),
        };
        let slack = if signer.provider == "retell" { 0 } else { 1_000 };
        assert!(source.verify(&open, &request, NOW_MS + age - slack), "{} {age}", signer.provider);
        assert!(!source.verify(&open, &request, NOW_MS + age + 1 + slack), "{} {age}", signer.provider);
        let early = NOW_MS.saturating_sub(ahead).saturating_sub(1 + slack);
        assert_eq!(source.verify(&open, &request, early), ahead == i64::MAX, "{} {ahead}", signer.provider);
    }
}

#[test]
fn every_reason_that_a_provider_lists_means_something() {
    let folder = local::parts::folder::workspace().unwrap().join("tests/fixtures/intake");
    let listed = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    let retell = listed("retell/disconnection_reasons.txt");
    assert_eq!(retell.lines().count(), 34);
    let unmapped: Vec<&str> = retell.lines().filter(|code| sources::retell::end_reason(code).is_none()).collect();
    assert_eq!(unmapped, [""; 0]);
    let vapi = listed("vapi/ended_reasons.txt");
    assert!(vapi.lines().count() > 590);
    let unmapped: Vec<&str> = vapi.lines().filter(|code| sources::vapi::end_reason(code).is_none()).collect();
    assert_eq!(unmapped, [""; 0]);
}

#[test]
fn the_vectors_of_the_agents_go_as_they_say() {
    let folder = local::parts::folder::workspace().unwrap().join("tests/vectors");
    let outcome = vectors::run(&folder, supervisor_binary!()).unwrap();
    let ours: Vec<&String> = outcome
        .wrong
        .iter()
        .filter(|line| ["retell:", "elevenlabs:", "plivo:"].iter().any(|name| line.starts_with(name)))
        .collect();
    assert_eq!(ours, [""; 0]);
    assert!(outcome.passed >= 38, "{}", outcome.passed);
}

#[test]
fn vectors_of_no_name_or_shape_are_wrong() {
    let folder = std::env::temp_dir().join(format!("vectors-{}", Uuid::new_v4()));
    std::fs::create_dir(&folder).unwrap();
    assert!(vectors::run(&folder, supervisor_binary!()).is_err(), "an empty folder");
    for (name, text) in [
        ("retell.json", "{}"),
        ("retell.json", "[]"),
        ("retell.json", r#"[{"id":"x","valid":false}]"#),
        ("who.json", "[{}]"),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
        let outcome = vectors::run(&folder, supervisor_binary!()).unwrap();
        assert!(!outcome.is_good() && outcome.wrong.len() == 1, "{name} {text}: {outcome:?}");
        std::fs::remove_file(folder.join(name)).unwrap();
    }
    std::fs::remove_dir(&folder).unwrap();
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("\0")),
        Just(json!("2026-11-24T04:31:40Z")),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,10}", inner), 0..4).prop_map(|pairs| pairs.into_iter().collect()),
        ]
    })
}

/// Replaces the node that `place` counts to.
fn replace(value: &mut Value, place: &mut usize, with: &Value) {
    if *place == 0 {
        *value = with.clone();
        *place = usize::MAX;
        return;
    }
    *place -= 1;
    match value {
        Value::Array(items) => {
            for item in items {
                if *place == usize::MAX {
                    return;
                }
                replace(item, place, with);
            }
        }
        Value::Object(map) => {
            for item in map.values_mut() {
                if *place == usize::MAX {
                    return;
                }
                replace(item, place, with);
            }
        }
        _ => {}
    }
}

/// Reads a body with every source; what it makes of it can be sent to the database.
fn read(body: &[u8]) -> Result<(), TestCaseError> {
    for signer in signers() {
        let (source, open) = open(&signer);
        let request = request(&[], body).expect("a request");
        let _reply = source.reply(&open, &request);
        let Ok(events) = source.read(&open, &request) else { continue };
        for event in &events {
            prop_assert!(event.dedupe_key.len() <= 400 && event.kind.len() <= 400, "{event:?}");
            let sent = serde_json::to_value(event).expect("an event is JSON");
            if sent["payload"]["type"] == "agent" {
                let report: AgentReport = serde_json::from_value(sent["payload"].clone()).expect("a report");
                prop_assert!(report.sentiment.is_none_or(|score| (-1.0..=1.0).contains(&score)));
                prop_assert!(report.duration_seconds.is_none_or(|seconds| (0..=1_000_000).contains(&seconds)));
                for time in [&report.started_at, &report.ended_at].into_iter().flatten() {
                    prop_assert!(chrono::DateTime::parse_from_rfc3339(time).is_ok(), "{time}");
                }
            }
        }
        let text = sources::apply_request(source.name(), open.id, &request, &events).to_string();
        prop_assert!(text.len() < 4096 + body.len() * 40, "{} of {}", text.len(), body.len());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_flipped_bit_is_refused(which in 0usize..7, part in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let signer = &signers()[which];
        let (source, open) = open(signer);
        let mut body = br#"{"event":"call_ended","call":{"call_id":"c","note":"\u0939"}}"#.to_vec();
        let mut headers = signed(signer, &body);
        let covers_body = signer.settings.get("auth").is_none();
        let parts = headers.len() + usize::from(covers_body);
        let flipped = match part.index(parts) {
            index if index < headers.len() => &mut headers[index].1,
            _ => &mut body,
        };
        let place = at.index(flipped.len());
        let before = flipped[place];
        flipped[place] ^= 1 << bit;
        // Hexadecimal digits are the same in either case.
        let same_digit = flipped[place].eq_ignore_ascii_case(&before) && before.is_ascii_hexdigit() && place > 2;
        if let Some(request) = request(&headers, &body) {
            let accepted = source.verify(&open, &request, NOW_MS);
            prop_assert!(!accepted || same_digit, "{} {}: {place} {before} {bit}", signer.provider, signer.settings);
        }
    }

    #[test]
    fn bytes_stop_no_reader(body in prop::collection::vec(any::<u8>(), 0..200)) {
        read(&body)?;
    }

    #[test]
    fn json_stops_no_reader(body in any_json()) {
        read(body.to_string().as_bytes())?;
    }

    #[test]
    fn a_delivery_with_anything_in_it_stops_no_reader(which in any::<prop::sample::Index>(), place in 0usize..120, with in any_json()) {
        let deliveries = deliveries();
        let (_, mut body) = which.get(&deliveries).clone();
        replace(&mut body, &mut { place }, &with);
        read(body.to_string().as_bytes())?;
    }
}
