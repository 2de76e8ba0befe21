//! NCCO: the steps of a call as a JSON list. A list that ends, ends the call.

use crate::telephony::carrier::{Answer, Connect, Dial, SORRY};
use serde_json::{Map, Value, json};

/// Writes a document.
pub fn write(answer: &Answer<'_>) -> String {
    let steps = match answer {
        Answer::Connect(connect) => agent(connect),
        Answer::Dial(dial) => person(dial),
        Answer::Sorry => vec![json!({ "action": "talk", "text": SORRY })],
        // There is no way to tell a busy line from an end.
        Answer::Hangup | Answer::Reject(_) | Answer::Nothing => Vec::new(),
    };
    Value::Array(steps).to_string()
}

/// Connects the call with the voice agent; Vonage signs the socket's handshake.
fn agent(connect: &Connect<'_>) -> Vec<Value> {
    let mut steps = Vec::from_iter(connect.recording_callback.map(record));
    let headers: Map<String, Value> =
        connect.parameters.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect();
    let mut step = json!({
        "action": "connect",
        "endpoint": [{
            "type": "websocket", "uri": connect.url, "content-type": "audio/l16;rate=16000", "headers": headers,
            "authorization": { "type": "vonage" },
        }],
    });
    if let Some(callback) = connect.stream_callback {
        step["eventUrl"] = json!([callback]);
        step["eventMethod"] = json!("POST");
    }
    steps.push(step);
    steps
}

/// Connects the call with a person.
fn person(dial: &Dial<'_>) -> Vec<Value> {
    let mut steps = Vec::from_iter(dial.recording_callback.map(record));
    // Vonage writes numbers without a plus sign.
    let number = |number: &str| number.trim_start_matches('+').to_owned();
    let mut step = json!({
        "action": "connect", "from": number(dial.caller_id), "timeout": dial.timeout, "limit": dial.time_limit,
        "endpoint": [{ "type": "phone", "number": number(dial.to) }],
    });
    if let Some(callback) = dial.leg_callback.or(dial.action) {
        step["eventUrl"] = json!([callback]);
        step["eventMethod"] = json!("POST");
    }
    steps.push(step);
    steps
}

/// Before the connection, a recording goes on beside it.
fn record(callback: &str) -> Value {
    json!({
        "action": "record", "format": "mp3", "split": "conversation", "channels": 2, "eventUrl": [callback], "eventMethod": "POST",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_connected_and_recorded_only_where_it_may() {
        let connect = Connect {
            url: "wss://voice.example.com/stream/x",
            parameters: &[("attempt", "A")],
            stream_callback: Some("https://h/stream"),
            recording_callback: Some("https://h/recording"),
            after: None,
        };
        let steps: Value = serde_json::from_str(&write(&Answer::Connect(connect.clone()))).unwrap();
        assert_eq!((&steps[0]["action"], &steps[0]["eventUrl"][0]), (&json!("record"), &json!("https://h/recording")));
        let endpoint = &steps[1]["endpoint"][0];
        assert_eq!(
            (&endpoint["uri"], &endpoint["headers"]["attempt"]),
            (&json!("wss://voice.example.com/stream/x"), &json!("A"))
        );
        assert_eq!(steps[1]["eventUrl"][0], "https://h/stream");
        let unrecorded: Value =
            serde_json::from_str(&write(&Answer::Connect(Connect { recording_callback: None, ..connect }))).unwrap();
        assert_eq!(unrecorded.as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_person_is_dialled_without_a_plus_sign() {
        let dial =
            Dial { to: "+14155550199", caller_id: "+14155550111", timeout: 30, time_limit: 60, ..Dial::default() };
        let steps: Value = serde_json::from_str(&write(&Answer::Dial(dial))).unwrap();
        assert_eq!(
            (&steps[0]["endpoint"][0]["number"], &steps[0]["from"]),
            (&json!("14155550199"), &json!("14155550111"))
        );
        assert_eq!(write(&Answer::Hangup), "[]");
    }
}
