//! Plivo XML, as Plivo's SDK renders it: the order of attributes is the SDK's.

use crate::telephony::{
    carrier::{Answer, Connect, Dial, SORRY},
    xml::Element,
};

/// Writes a document.
pub fn write(answer: &Answer<'_>) -> String {
    let response = Element::new("Response");
    let response = match answer {
        Answer::Connect(connect) => agent(response, connect),
        Answer::Dial(dial) => person(response, dial),
        Answer::Sorry => response.child(Element::new("Speak").text(SORRY)).child(Element::new("Hangup")),
        Answer::Hangup => response.child(Element::new("Hangup")),
        Answer::Reject(reason) => response.child(Element::new("Hangup").with("reason", reason.as_str())),
        Answer::Nothing => response,
    };
    response.render("/>")
}

/// Connects the call with the voice agent, both ways, and keeps it up for as long as the agent's socket is open.
///
/// `keepCallAlive` is what keeps a call with nothing but a stream from ending at once (4010); `<Record>` must stand before the stream.
fn agent(response: Element, connect: &Connect<'_>) -> Element {
    let response = match connect.recording_callback {
        Some(callback) => response.child(
            Element::new("Record")
                .with("fileFormat", "mp3")
                .with("maxLength", 3600)
                .with("recordSession", true)
                .with("callbackUrl", callback)
                .with("callbackMethod", "POST"),
        ),
        None => response,
    };
    let headers =
        connect.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",");
    response.child(
        Element::new("Stream")
            .with("bidirectional", true)
            .maybe("statusCallbackUrl", connect.stream_callback)
            .maybe("statusCallbackMethod", connect.stream_callback.map(|_| "POST"))
            .with("contentType", "audio/x-mulaw;rate=8000")
            .maybe("extraHeaders", Some(headers).filter(|headers| !headers.is_empty()))
            .with("keepCallAlive", true)
            .text(connect.url),
    )
}

/// Connects the call with a person, and ends it when that is over.
fn person(response: Element, dial: &Dial<'_>) -> Element {
    // Plivo writes numbers without a plus sign.
    let number = |number: &str| number.trim_start_matches('+').to_owned();
    let element = Element::new("Dial")
        .maybe("action", dial.action)
        .maybe("method", dial.action.map(|_| "POST"))
        .with("timeLimit", dial.time_limit)
        .with("timeout", dial.timeout)
        .with("callerId", number(dial.caller_id))
        .maybe("callbackUrl", dial.leg_callback)
        .maybe("callbackMethod", dial.leg_callback.map(|_| "POST"))
        .with("redirect", false)
        .child(Element::new("Number").text(&number(dial.to)));
    response.child(element).child(Element::new("Hangup"))
}
