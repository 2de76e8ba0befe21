//! The carriers: requests that were signed for them, and documents as their SDKs write them.

use super::{compare, number, request_of, text};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shared::telephony::{
    carrier::{self, Answer, Connect, Credentials, Dial, Rejection, Signed},
    plivo::v2,
};

/// The application that Vonage's vectors were signed for; a vector may name another.
const APPLICATION: &str = "aaaaaaaa-bbbb-cccc-dddd-0123456789ab";

/// Plivo: V3 as the handler verifies it, and V2, which no handler takes an event by, by the function that knows it.
pub fn judge_plivo(vector: &Value) -> Result<()> {
    let (mut request, url) = request_of(vector)?;
    let secret = text(vector, "secret")?;
    let under_test = text(vector, "header_under_test")?.to_ascii_lowercase();
    match under_test.as_str() {
        "x-plivo-signature-v3" | "x-plivo-signature-ma-v3" => {}
        "x-plivo-signature-v2" | "x-plivo-signature-ma-v2" => {
            return compare(vector, v2::verify(&[secret.to_owned()], &url, &request.headers));
        }
        other => bail!("nobody knows the header {other}"),
    }
    // Where one of the two signatures is judged, the other has no say.
    for other in ["x-plivo-signature-v3", "x-plivo-signature-ma-v3"] {
        if other != under_test {
            request.headers.remove(other);
        }
    }
    let signed = Signed { method: &request.method, url: &url, headers: &request.headers, body: &request.body };
    compare(vector, verdict("plivo", &json!({ "auth_token": secret }), &signed, 0)?)
}

/// Twilio: a request that names its key was made for an account that is configured so.
pub fn judge_twilio(vector: &Value) -> Result<()> {
    let (request, url) = request_of(vector)?;
    let secret = text(vector, "secret")?;
    let credentials = match request.header("x-twilio-webhooks-signature-settings") {
        Some(_) => json!({ "shared_key": { "key": secret, "algorithm": text(vector, "algorithm")? } }),
        None => json!({ "auth_token": secret }),
    };
    let signed = Signed { method: &request.method, url: &url, headers: &request.headers, body: &request.body };
    compare(vector, verdict("twilio", &credentials, &signed, 0)?)
}

/// Telnyx.
pub fn judge_telnyx(vector: &Value) -> Result<()> {
    let (request, url) = request_of(vector)?;
    let credentials = json!({ "public_key": text(vector, "secret")? });
    let signed = Signed { method: &request.method, url: &url, headers: &request.headers, body: &request.body };
    compare(vector, verdict("telnyx", &credentials, &signed, number(vector, "now_unix")?)?)
}

/// Vonage.
pub fn judge_vonage(vector: &Value) -> Result<()> {
    let (request, url) = request_of(vector)?;
    let application = vector.get("application_id").and_then(Value::as_str).unwrap_or(APPLICATION);
    let credentials = json!({ "signature_secret": text(vector, "secret")?, "application_id": application });
    let signed = Signed { method: &request.method, url: &url, headers: &request.headers, body: &request.body };
    compare(vector, verdict("vonage", &credentials, &signed, number(vector, "now_unix")?)?)
}

fn verdict(name: &str, credentials: &Value, signed: &Signed<'_>, now: i64) -> Result<bool> {
    let carrier = carrier::by_name(name).with_context(|| format!("there is no carrier {name}"))?;
    Ok(carrier.verify(&Credentials::read(&credentials.to_string()), signed, now))
}

/// Judges a golden document: what it says is read from it, written again by the code that answers calls, and must be the same text.
pub fn judge_golden(vector: &Value) -> Result<()> {
    let (provider, golden) = (text(vector, "provider")?, text(vector, "xml")?);
    let carrier = carrier::by_name(provider).with_context(|| format!("there is no carrier {provider}"))?;
    let document = roxmltree::Document::parse(golden)?;
    let elements: Vec<_> = document.root_element().children().filter(roxmltree::Node::is_element).collect();
    let parameters = parameters(&elements);
    let parameters: Vec<(&str, &str)> =
        parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let answer = read(&elements, &parameters)?;
    let ours = carrier.answer(&answer);
    ensure!(ours.body == golden, "we write\n  {}\nwhere the SDK writes\n  {golden}", ours.body);
    ensure!(ours.content_type == text(vector, "content_type")?, "we call it {}", ours.content_type);
    Ok(())
}

type Node<'a> = roxmltree::Node<'a, 'a>;

fn child<'a>(of: Node<'a>, name: &str) -> Option<Node<'a>> {
    of.children().find(|node| node.has_tag_name(name))
}

fn stream<'a>(elements: &[Node<'a>]) -> Option<Node<'a>> {
    elements.iter().find_map(|node| if node.has_tag_name("Stream") { Some(*node) } else { child(*node, "Stream") })
}

fn parameters(elements: &[Node<'_>]) -> Vec<(String, String)> {
    let Some(stream) = stream(elements) else { return Vec::new() };
    let attribute = |node: &Node<'_>, name| node.attribute(name).unwrap_or_default().to_owned();
    let named = stream.children().filter(|node| node.has_tag_name("Parameter"));
    let named = named.map(|node| (attribute(&node, "name"), attribute(&node, "value")));
    let headers = stream.attribute("extraHeaders").into_iter().flat_map(|headers| headers.split(','));
    let headers =
        headers.filter_map(|item| item.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned()));
    named.chain(headers).collect()
}

fn read<'a>(elements: &[Node<'a>], parameters: &'a [(&'a str, &'a str)]) -> Result<Answer<'a>> {
    let names: Vec<&str> = elements.iter().map(|node| node.tag_name().name()).collect();
    let number = |node: &Node<'a>, name| node.attribute(name).unwrap_or_default().parse::<u32>();
    Ok(match names.as_slice() {
        [] => Answer::Nothing,
        ["Hangup" | "Reject"] => match elements[0].attribute("reason") {
            None => Answer::Hangup,
            Some("rejected") => Answer::Reject(Rejection::Rejected),
            Some("busy") => Answer::Reject(Rejection::Busy),
            Some(other) => bail!("nobody rejects a call for being {other}"),
        },
        ["Stream"] | ["Record", "Stream"] | ["Connect"] => {
            let stream = stream(elements).context("a connection without a stream")?;
            Answer::Connect(Connect {
                url: stream.attribute("url").or_else(|| stream.text()).context("a stream without a URL")?,
                parameters,
                stream_callback: stream.attribute("statusCallback").or_else(|| stream.attribute("statusCallbackUrl")),
                recording_callback: elements[0].attribute("callbackUrl"),
                after: elements[0].attribute("action"),
            })
        }
        ["Dial"] | ["Dial", "Hangup"] => {
            let dial = elements[0];
            let person = child(dial, "Number").context("a dial without a number")?;
            Answer::Dial(Dial {
                to: person.text().unwrap_or_default(),
                caller_id: dial.attribute("callerId").unwrap_or_default(),
                timeout: number(&dial, "timeout")?,
                time_limit: number(&dial, "timeLimit")?,
                action: dial.attribute("action"),
                leg_callback: dial.attribute("callbackUrl").or_else(|| person.attribute("statusCallback")),
                recording_callback: dial.attribute("recordingStatusCallback"),
            })
        }
        other => bail!("a document of {other:?}"),
    })
}
