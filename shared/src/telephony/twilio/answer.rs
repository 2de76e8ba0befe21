//! TwiML as Twilio's SDK renders it, attributes sorted, and TeXML, which differs in a few of them.

use crate::telephony::{
    carrier::{Answer, Connect, Dial, SORRY},
    xml::Element,
};

/// Whose XML it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Twilio's.
    TwiMl,
    /// Telnyx's.
    TeXml,
}

/// Writes a document.
pub fn write(answer: &Answer<'_>, dialect: Dialect) -> String {
    let response = Element::new("Response");
    let response = match answer {
        Answer::Connect(connect) => response.child(agent(connect, dialect)),
        Answer::Dial(dial) => response.child(person(dial)),
        Answer::Sorry => response.child(Element::new("Say").text(SORRY)).child(Element::new("Hangup")),
        Answer::Hangup => response.child(Element::new("Hangup")),
        Answer::Reject(reason) => response.child(Element::new("Reject").with("reason", reason.as_str())),
        Answer::Nothing => response,
    };
    format!(r#"<?xml version="1.0" encoding="UTF-8"?>{}"#, response.sorted().render(" />"))
}

/// `<Connect><Stream>` is both ways and holds the document until the agent's socket closes. It cannot record: that is asked for when
/// the call is made.
fn agent(connect: &Connect<'_>, dialect: Dialect) -> Element {
    let mut stream = Element::new("Stream")
        .maybe("statusCallback", connect.stream_callback)
        .maybe("statusCallbackMethod", connect.stream_callback.map(|_| "POST"))
        // Telnyx streams one way unless it is told otherwise.
        .maybe("bidirectionalMode", (dialect == Dialect::TeXml).then_some("rtp"))
        .with("url", connect.url);
    for (name, value) in connect.parameters {
        stream = stream.child(Element::new("Parameter").with("name", name).with("value", value));
    }
    Element::new("Connect").maybe("action", connect.after).maybe("method", connect.after.map(|_| "POST")).child(stream)
}

fn person(dial: &Dial<'_>) -> Element {
    let number = Element::new("Number")
        .maybe("statusCallback", dial.leg_callback)
        .maybe("statusCallbackEvent", dial.leg_callback.map(|_| "initiated ringing answered completed"))
        .maybe("statusCallbackMethod", dial.leg_callback.map(|_| "POST"))
        .text(dial.to);
    Element::new("Dial")
        .maybe("action", dial.action)
        .with("answerOnBridge", true)
        .with("callerId", dial.caller_id)
        .maybe("method", dial.action.map(|_| "POST"))
        .maybe("record", dial.recording_callback.map(|_| "record-from-answer-dual"))
        .maybe("recordingStatusCallback", dial.recording_callback)
        .with("timeLimit", dial.time_limit)
        .with("timeout", dial.timeout)
        .child(number)
}
