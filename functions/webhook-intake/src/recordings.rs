//! Recordings are copied to Supabase Storage before the carrier's link dies.
//!
//! The table is the queue of record and its message only a nudge: a worker claims what the message names, streams it from the carrier
//! into Storage without ever holding it, and says what became of it. Whatever is lost on the way is due again at the sweep.

mod hosts;

use crate::Intake;
use futures::stream::try_unfold;
use hosts::Place;
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    queue::{Envelope, Outgoing, VERSION},
    seal::Sealer,
    storage::Object,
    trigger::{Invocation, Message},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use url::Url;
use uuid::Uuid;

/// The bucket.
pub const BUCKET: &str = "recordings";
/// Bytes of a recording at most: four hours of a stereo WAV would be more, and no carrier is asked for one.
const MOST_BYTES: u64 = 200 * 1024 * 1024;
/// How often a carrier may send us on to another host.
const REDIRECTS: usize = 3;
/// How long a carrier may take to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(8);
/// How long a link for a listener lasts, in seconds.
const LINK_SECONDS: u32 = 300;
/// Objects that one sweep deletes at most.
const DELETIONS: u32 = 100;

/// A recording that an answer of the database names.
#[derive(Debug, Deserialize)]
pub struct Waiting {
    organization_id: Uuid,
    id: Uuid,
}

/// A recording as `claim_recordings` hands it over. No `Debug`: the URL may carry a signature.
#[derive(Deserialize)]
struct Claimed {
    id: Uuid,
    organization_id: Uuid,
    url: String,
    provider: String,
    carrier_account_id: Uuid,
    account_sid: String,
    credentials_sealed: String,
    api_base: String,
}

/// What became of a copy.
enum Outcome {
    Copied {
        path: String,
        bytes: u64,
        content_type: String,
    },
    /// It will never be copied.
    Refused(&'static str),
    /// It may be copied later. A word or two: nothing of the URL or of the answer.
    Failed(String),
}

/// Puts recordings on the queue, as far as it takes them; the sweep finds the others.
pub async fn announce(intake: &Intake, waiting: &[Waiting]) {
    if waiting.is_empty() {
        return;
    }
    let messages: Vec<Outgoing> = waiting
        .iter()
        .map(|recording| {
            Outgoing::from(&Envelope {
                v: VERSION,
                kind: "recording".to_owned(),
                organization_id: recording.organization_id.to_string(),
                id: recording.id.to_string(),
                not_after: None,
            })
        })
        .collect();
    match intake.queues.send(&intake.config, "recording", &messages).await {
        Ok(refused) if refused.is_empty() => {}
        Ok(refused) => tracing::warn!(refused = refused.len(), "recordings wait for the sweep"),
        Err(error) => tracing::warn!(error = %error, "recordings wait for the sweep"),
    }
}

/// Whether a message is about a recording.
pub fn is_about_one(message: &Message) -> bool {
    serde_json::from_str::<Envelope>(&message.body).is_ok_and(|envelope| envelope.kind == "recording")
}

/// Copies the recordings of a batch. Returns the messages that must come again: those whose claim or outcome the database did not take.
pub async fn copy(intake: &Intake, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
    let mut again = Vec::new();
    for message in batch {
        let copied = match serde_json::from_str::<Envelope>(&message.body) {
            Ok(envelope) => copy_one(intake, &envelope.id, invocation).await,
            Err(error) => Err(error.into()),
        };
        if let Err(error) = copied {
            tracing::warn!(error = %error, receive_count = message.receive_count, "a recording could not be dealt with");
            again.push(message.id);
        }
    }
    again
}

async fn copy_one(intake: &Intake, id: &str, invocation: &Invocation) -> Result<()> {
    #[derive(Deserialize)]
    struct Answer {
        recordings: Vec<Claimed>,
    }
    let lease = Uuid::new_v4();
    let request = json!({ "v": 1, "lease_token": lease, "ids": [id] });
    let claimed: Answer = intake.supabase.call("claim_recordings", &request).await?;
    // What is copied, somebody else's, or not due yet is left out.
    for recording in claimed.recordings {
        let outcome = transfer(intake, &recording, invocation).await;
        let mut result = match outcome {
            Outcome::Copied { path, bytes, content_type } => {
                tracing::info!(attempt_id = %recording.id, bytes, "a recording is copied");
                json!({ "result": "copied", "path": path, "bytes": bytes, "content_type": content_type })
            }
            Outcome::Refused(reason) => {
                tracing::warn!(attempt_id = %recording.id, provider = recording.provider, reason, "a recording is refused");
                json!({ "result": "refused", "reason": reason })
            }
            Outcome::Failed(reason) => {
                tracing::warn!(attempt_id = %recording.id, provider = recording.provider, reason, "a recording was not copied");
                json!({ "result": "failed", "reason": reason })
            }
        };
        result["id"] = json!(recording.id);
        let request = json!({ "v": 1, "lease_token": lease, "results": [result] });
        let _settled: Value = intake.supabase.call_until("record_recordings", &request, invocation.deadline).await?;
    }
    Ok(())
}

/// Streams one recording from its carrier into Storage.
async fn transfer(intake: &Intake, recording: &Claimed, invocation: &Invocation) -> Outcome {
    let local = intake.config.is_local();
    let Some(url) = hosts::media_url(&recording.provider, &recording.url) else {
        return Outcome::Refused("no_url");
    };
    let answer = match fetch(intake, recording, url, local, invocation.wait_until()).await {
        Ok(answer) => answer,
        Err(outcome) => return outcome,
    };
    let Some(kind) = kind_of(answer.headers().get(header::CONTENT_TYPE), answer.url()) else {
        return Outcome::Failed("content_type".to_owned());
    };
    let length = answer.content_length();
    if length.is_some_and(|length| length > MOST_BYTES) {
        return Outcome::Refused("too_large");
    }
    let path = format!("{}/{}.{}", recording.organization_id, recording.id, kind.extension);
    let bytes = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&bytes);
    // One piece at a time: the next one is asked for when Storage has taken the one before.
    let pieces = try_unfold(answer, move |mut answer| {
        let counted = Arc::clone(&counted);
        async move {
            let Some(piece) = answer.chunk().await.map_err(|error| error.without_url().to_string())? else {
                return Ok::<_, String>(None);
            };
            let seen = counted.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
            if seen > MOST_BYTES { Err("too_large".to_owned()) } else { Ok(Some((piece, answer))) }
        }
    });
    let object =
        Object { content_type: kind.content_type.to_owned(), length, body: reqwest::Body::wrap_stream(pieces) };
    let left = invocation.wait_until().saturating_duration_since(Instant::now());
    let stored = intake.storage.upload(BUCKET, &path, object, left).await;
    match (stored, bytes.load(Ordering::Relaxed)) {
        (_, bytes) if bytes > MOST_BYTES => Outcome::Refused("too_large"),
        (Ok(()), 0) => Outcome::Failed("empty".to_owned()),
        (Ok(()), bytes) => Outcome::Copied { path, bytes, content_type: kind.content_type.to_owned() },
        (Err(error), _) if error.code == "object_too_large" => Outcome::Refused("too_large"),
        (Err(error), _) => Outcome::Failed(error.message),
    }
}

/// Asks the carrier, wherever it sends us as long as that is its own or its storage. The account's credentials are for its API alone,
/// and only for the first request.
async fn fetch(
    intake: &Intake,
    recording: &Claimed,
    mut url: Url,
    local: bool,
    until: Instant,
) -> Result<reqwest::Response, Outcome> {
    for hop in 0..=REDIRECTS {
        let place = hosts::place(&recording.provider, &url, &recording.api_base, local);
        let mut request = match place {
            Place::Elsewhere => return Err(Outcome::Refused("host")),
            _ => intake.http.get(url.clone()),
        };
        if hop == 0 && place == Place::Api {
            request = match credentials(intake, recording).await {
                Ok(Some(Credentials::Basic(user, password))) => request.basic_auth(user, Some(password)),
                Ok(Some(Credentials::Bearer(token))) => request.bearer_auth(token),
                Ok(None) => request,
                Err(error) => {
                    tracing::error!(error = %error, "a carrier account's credentials cannot be used");
                    return Err(Outcome::Failed("credentials".to_owned()));
                }
            };
        }
        let left = until.saturating_duration_since(Instant::now());
        // The whole answer has as long as the invocation; its beginning, which shows that anybody is there, has less.
        let sent = tokio::time::timeout(BEGIN_LIMIT, request.timeout(left).send()).await;
        let answer = match sent {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(Outcome::Failed(error.without_url().to_string())),
            Err(_) => return Err(Outcome::Failed("silence".to_owned())),
        };
        match answer.status() {
            StatusCode::OK => return Ok(answer),
            status if status.is_redirection() => {
                let next = answer.headers().get(header::LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
                url = next.ok_or_else(|| Outcome::Failed("redirect to nowhere".to_owned()))?;
            }
            status => return Err(Outcome::Failed(format!("status {}", status.as_u16()))),
        }
    }
    Err(Outcome::Failed("redirects".to_owned()))
}

enum Credentials {
    Basic(String, String),
    Bearer(String),
}

/// What opens a recording at the carrier's API. The sealed secret is a JSON object, or a bare auth token.
async fn credentials(intake: &Intake, recording: &Claimed) -> Result<Option<Credentials>> {
    let sealer = Sealer::new(&intake.secrets.get().await?.seal_keys)?;
    let opened = sealer.open(&recording.credentials_sealed, &recording.carrier_account_id.to_string())?;
    let fields: Value = serde_json::from_str(&opened).unwrap_or(Value::Null);
    let field = |name: &str| fields.get(name).and_then(Value::as_str);
    let token = field("auth_token").unwrap_or(&opened);
    Ok(match recording.provider.as_str() {
        "plivo" | "twilio" => Some(Credentials::Basic(recording.account_sid.clone(), token.to_owned())),
        "vonage" => match (field("application_id"), field("private_key")) {
            (Some(application), Some(key)) => {
                Some(Credentials::Bearer(shared::telephony::vonage::token::token(application, key)?))
            }
            _ => None,
        },
        _ => None,
    })
}

/// A kind of sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Its media type.
    pub content_type: &'static str,
    /// How its files' names end.
    pub extension: &'static str,
}

/// What bytes are that nobody has named a type of; nothing when they are no sound.
pub fn kind_of_sound(bytes: &[u8]) -> Option<Kind> {
    let kind = |content_type, extension| Some(Kind { content_type, extension });
    match bytes {
        [b'I', b'D', b'3', ..] | [0xff, 0xe0..=0xff, _, ..] => kind("audio/mpeg", "mp3"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => kind("audio/wav", "wav"),
        [b'O', b'g', b'g', b'S', ..] => kind("audio/ogg", "ogg"),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => kind("audio/mp4", "m4a"),
        _ => None,
    }
}

/// What an answer says it is. Storage services that know no better say octet-stream: then the name tells.
fn kind_of(content_type: Option<&HeaderValue>, url: &Url) -> Option<Kind> {
    let kind = |content_type, extension| Some(Kind { content_type, extension });
    let mp3 = || kind("audio/mpeg", "mp3");
    let wav = || kind("audio/wav", "wav");
    let told = content_type?.to_str().ok()?.split(';').next()?.trim().to_ascii_lowercase();
    match told.as_str() {
        "audio/mpeg" | "audio/mp3" | "audio/mpeg3" | "audio/x-mpeg" | "audio/x-mp3" => mp3(),
        "audio/wav" | "audio/x-wav" | "audio/wave" | "audio/vnd.wave" => wav(),
        "audio/ogg" | "audio/opus" => kind("audio/ogg", "ogg"),
        "audio/mp4" | "audio/x-m4a" | "audio/aac" => kind("audio/mp4", "m4a"),
        "application/octet-stream" | "binary/octet-stream" => match url.path().rsplit('.').next() {
            Some("mp3") => mp3(),
            Some("wav") => wav(),
            _ => None,
        },
        _ => None,
    }
}

/// `POST calls/{id}/recording`: a link for who may listen, which the database decides under the user's token.
pub async fn link(intake: &Intake, call: &str, request: &Request) -> Result<Response> {
    #[derive(Deserialize)]
    struct Opened {
        path: String,
        content_type: String,
        bytes: u64,
    }
    let jwt = request.user_jwt()?;
    let call: Uuid = call.parse().map_err(|_| Error::not_found("there is no such call").at("call_id"))?;
    let opened: Opened = intake.supabase.call_as(jwt, "open_recording", &json!({ "call_id": call })).await?;
    let url = intake.storage.sign(BUCKET, &opened.path, LINK_SECONDS).await?;
    web::json(&json!({
        "url": url.as_str(), "expires_in": LINK_SECONDS, "content_type": opened.content_type, "bytes": opened.bytes,
    }))
}

/// Deletes the objects of erased persons; how many are gone.
pub async fn delete_erased(intake: &Intake) -> Result<usize> {
    #[derive(Deserialize)]
    struct Doomed {
        paths: Vec<String>,
    }
    let doomed: Doomed = intake.supabase.call("claim_deletions", &json!({ "v": 1, "limit": DELETIONS })).await?;
    if doomed.paths.is_empty() {
        return Ok(0);
    }
    intake.storage.delete(BUCKET, &doomed.paths).await?;
    let _gone: Value = intake.supabase.call("record_deletions", &json!({ "v": 1, "paths": doomed.paths })).await?;
    Ok(doomed.paths.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sound_is_known_by_how_it_begins() {
        let kind = |bytes: &[u8]| kind_of_sound(bytes).map(|kind| kind.extension);
        assert_eq!(kind(b"ID3\x04\0"), Some("mp3"));
        assert_eq!(kind(&[0xff, 0xfb, 0x90, 0]), Some("mp3"));
        assert_eq!(kind(b"RIFF\x24\0\0\0WAVEfmt "), Some("wav"));
        assert_eq!(kind(b"OggS\0"), Some("ogg"));
        assert_eq!(kind(b"\0\0\0\x20ftypM4A "), Some("m4a"));
        for other in [&b""[..], b"<html>", b"{}", b"\xff\xd8\xff", b"RIFF\x24\0\0\0AVI "] {
            assert_eq!(kind(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_page_is_no_recording() {
        let url = Url::parse("https://media.plivo.com/a.mp3").unwrap();
        let kind = |told: &'static str| kind_of(Some(&HeaderValue::from_static(told)), &url).map(|kind| kind.extension);
        assert_eq!(kind("audio/mpeg"), Some("mp3"));
        assert_eq!(kind("Audio/X-WAV; rate=8000"), Some("wav"));
        assert_eq!(kind("binary/octet-stream"), Some("mp3"));
        for told in ["text/html", "application/json", "application/xml", "video/mp4", ""] {
            assert_eq!(kind(told), None, "{told}");
        }
        assert_eq!(kind_of(None, &url), None);
    }
}
