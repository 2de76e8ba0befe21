//! Each carrier, at its worst: what may have been dialled is held, and never dialled again.

use super::*;
use serde_json::Map;
use shared::{
    seal::Sealer,
    telephony::{
        CallbackEvent, DialOutcome, Outcome,
        api::{self, Account},
        carrier::{self, Credentials},
    },
};
use std::sync::{Arc, Mutex, PoisonError};
use tests::stack::PUBLIC_ORIGIN;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// What comes of a request for a call.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// The connection is reset once the request is there.
    Reset,
    /// 503.
    Away,
    /// The answer ends in its middle.
    Broken,
    /// 201, and nothing that names a call.
    Nameless,
    /// No answer.
    Silence,
    /// 201 with the call's id.
    Accept,
}

/// Requests: method, path, and whether it asks for a call.
type Log = Arc<Mutex<Vec<(String, String, bool)>>>;

/// A server that has the manners of no carrier: it speaks HTTP by hand, so that it can break off anywhere.
struct Rude {
    url: String,
    log: Log,
    server: JoinHandle<()>,
}

impl Rude {
    /// Each number has its fate; what asks for nothing that we know is answered 404, as of a call that is not there.
    async fn start(fates: Vec<(String, Fate)>) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let log = Log::default();
        let (kept, fates) = (Arc::clone(&log), Arc::new(fates));
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, fates) = (Arc::clone(&kept), Arc::clone(&fates));
                tokio::spawn(async move { serve(stream, &log, &fates).await });
            }
        });
        Ok(Self { url, log, server })
    }

    fn seen(&self) -> Vec<(String, String, bool)> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn creates(&self) -> usize {
        self.seen().iter().filter(|(_, _, is_create)| *is_create).count()
    }
}

impl Drop for Rude {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(mut stream: TcpStream, log: &Log, fates: &[(String, Fate)]) -> Option<()> {
    let (head, body) = receive(&mut stream).await?;
    let mut line = head.split(' ');
    let (method, path) = (line.next()?.to_owned(), line.next()?.to_owned());
    let fate = fates.iter().find(|(number, _)| body.contains(number.trim_start_matches('+'))).map(|(_, fate)| *fate);
    log.lock().unwrap_or_else(PoisonError::into_inner).push((method.clone(), path, fate.is_some()));
    let named = r#"{"request_uuid":"call-1","sid":"call-1","uuid":"call-1","data":{"call_control_id":"call-1"}}"#;
    let (status, length, body) = match fate {
        Some(Fate::Silence) => return std::future::pending().await,
        Some(Fate::Reset) => {
            // A reset, and not an end.
            stream.set_zero_linger().ok()?;
            return None;
        }
        Some(Fate::Away) => (503, 0, ""),
        Some(Fate::Broken) => (201, 500, named),
        Some(Fate::Nameless) => (201, 2, "{}"),
        Some(Fate::Accept) => (201, named.len(), named),
        None if method == "GET" => (404, 2, "{}"),
        None => (200, 2, "{}"),
    };
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.ok()?;
    stream.shutdown().await.ok()
}

/// A request's head and body.
async fn receive(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .and_then(|(_, length)| length.trim().parse().ok())
            .unwrap_or(0);
        if body.len() >= length {
            return Some((head.to_owned(), body.to_owned()));
        }
    }
}

/// What any of the carriers' accounts is opened with.
async fn credentials() -> Result<String> {
    let program = "console.log(require('node:crypto').generateKeyPairSync('rsa', { modulusLength: 2048, \
                   privateKeyEncoding: { type: 'pkcs8', format: 'pem' }, publicKeyEncoding: { type: 'spki', format: 'pem' } }).privateKey)";
    local::parts::folder::require_program("node", "to make a key of Vonage's")?;
    let key = tokio::process::Command::new("node").args(["-e", program]).output().await?.stdout;
    let secrets = [
        ("auth_token", "token".to_owned()),
        ("api_key", "KEY".to_owned()),
        ("application_id", "app".to_owned()),
        ("private_key", String::from_utf8(key)?),
    ];
    let secrets: Map<String, Value> =
        secrets.into_iter().map(|(name, secret)| (name.to_owned(), json!(secret))).collect();
    Ok(Value::Object(secrets).to_string())
}

async fn what_may_have_been_dialled_is_held(provider: &str) -> Result<()> {
    let (stack, campaign) = running(5).await?;
    let phones = phones(1, 5);
    let fates = [Fate::Reset, Fate::Away, Fate::Broken, Fate::Nameless, Fate::Accept];
    let rude = Rude::start(phones.iter().cloned().zip(fates).collect()).await?;
    let sealed =
        Sealer::new(&stack.keys.secrets()?.seal_keys)?.seal(&credentials().await?, &campaign.account.to_string())?;
    stack
        .sql
        .execute(
            "update public.carrier_accounts set provider = $1::text::public.carrier_provider, api_base = $2, credentials_sealed = $3",
            &[&provider, &rude.url, &sealed],
        )
        .await?;

    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
    assert_eq!(rude.creates(), 5, "each was asked for once: {:?}", rude.seen());
    let states = || async {
        let mut states = Vec::new();
        for phone in &phones {
            let mut attempts = attempts(&stack, phone).await?;
            assert_eq!(attempts.len(), 1, "{phone}");
            let attempt = attempts.remove(0);
            states.push((attempt["status"].clone(), attempt["dialled"].clone()));
        }
        Ok::<_, anyhow::Error>(states)
    };
    let unknown = (json!("submission_unknown"), json!(true));
    let expected = [&[(); 4].map(|()| unknown.clone())[..], &[(json!("queued"), json!(true))]].concat();
    assert_eq!(states().await?, expected);

    // Neither the message again, nor a release, nor the reconciler makes another call.
    assert!(hand_over(&stack.dispatch()?, &messages).await?.is_empty());
    assert_eq!(release(&campaign.dispatch).await?["sent"], 0);
    stack.sql.batch_execute("update public.call_logs set lease_until = now() - interval '1 second'").await?;
    assert_eq!(events::job(&campaign.dispatch, "reconcile").await?, json!({ "asked": 5, "news": 0 }));
    assert_eq!(rude.creates(), 5);
    assert_eq!(states().await?, expected);

    // The one that was accepted can be hung up, the others not.
    let hang_up = async |phone: &str| {
        let id = attempts(&stack, phone).await?.remove(0)["id"].as_str().context("an id")?.to_owned();
        let url = format!("/functions/v1/call-dispatch/calls/{id}/hangup");
        HttpEvent::post(&url).bearer(campaign.tenant.jwt()).send(&campaign.dispatch).await
    };
    hang_up(&phones[0]).await?.assert_error(409, "invalid_transition");
    let before = rude.seen().len();
    let answer = hang_up(&phones[4]).await?;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let sent = rude.seen().split_off(before);
    let path = sent.first().map(|(method, path, _)| (method.as_str(), path.as_str()));
    let account = stack.value("select account_sid from public.carrier_accounts").await?;
    let expected = match provider {
        "plivo" => ("DELETE", format!("/v1/Account/{account}/Call/call-1/")),
        "twilio" => ("POST", format!("/2010-04-01/Accounts/{account}/Calls/call-1.json")),
        "telnyx" => ("POST", "/v2/calls/call-1/actions/hangup".to_owned()),
        _ => ("PUT", "/v1/calls/call-1".to_owned()),
    };
    assert_eq!((path, sent.len()), (Some((expected.0, expected.1.as_str())), 1));
    Ok(())
}

#[tokio::test]
async fn what_may_have_been_dialled_at_plivo_is_held() -> Result<()> {
    what_may_have_been_dialled_is_held("plivo").await
}

#[tokio::test]
async fn what_may_have_been_dialled_at_twilio_is_held() -> Result<()> {
    what_may_have_been_dialled_is_held("twilio").await
}

#[tokio::test]
async fn what_may_have_been_dialled_at_telnyx_is_held() -> Result<()> {
    what_may_have_been_dialled_is_held("telnyx").await
}

#[tokio::test]
async fn what_may_have_been_dialled_at_vonage_is_held() -> Result<()> {
    what_may_have_been_dialled_is_held("vonage").await
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_unknown_and_a_connection_that_fails_a_refusal() -> Result<()> {
    let to = "+14155550100";
    let rude = Rude::start(vec![(to.to_owned(), Fate::Silence)]).await?;
    let nowhere = format!("http://127.0.0.1:{}", local::parts::postgres::free_port()?);
    shared::supabase::http_client()?;
    let http = reqwest::Client::builder().read_timeout(Duration::from_millis(300)).build()?;
    let callbacks: Vec<_> =
        CallbackEvent::ALL.into_iter().map(|event| (event, format!("{PUBLIC_ORIGIN}/{}", event.as_str()))).collect();
    let call = api::Create {
        attempt_id: Uuid::nil(),
        from: "+14155550111",
        to,
        callbacks: &callbacks,
        stream_url: Some("wss://voice.example.com/stream"),
        ring_timeout: 30,
        time_limit: 600,
        record: true,
    };
    let credentials = Credentials::read(&credentials().await?);
    for (nth, carrier) in carrier::ALL.into_iter().enumerate() {
        let account = |url: &str| Account::new(carrier, "acc", credentials.clone(), url, true);
        let silent = api::create(carrier, &http, &account(&rude.url)?, &call).await;
        assert_eq!(silent, DialOutcome::Unknown { code: "timeout".to_owned() }, "{carrier:?}");
        assert_eq!(rude.creates(), nth + 1, "{carrier:?}");
        let away = api::create(carrier, &http, &account(&nowhere)?, &call).await;
        let refused = DialOutcome::Refused { reason: Outcome::CarrierTransient, code: "connect".to_owned() };
        assert_eq!(away, refused, "{carrier:?}");
    }
    Ok(())
}
