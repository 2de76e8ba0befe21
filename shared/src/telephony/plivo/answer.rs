//! Plivo XML for an answered call.

/// What the callee is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream<'a> {
    /// `wss://` URL of the voice agent, at most 2,048 characters.
    pub url: &'a str,
    /// Where the recording is reported; `None` when the call is not recorded.
    pub recording_callback: Option<&'a str>,
}

/// Connects the call with the voice agent, both ways, and keeps it up for as long as the agent's socket is open.
///
/// `keepCallAlive` is what keeps a call with nothing but a stream from ending at once (4010); `<Record>` must stand before the stream.
pub fn connect(stream: &Stream<'_>) -> String {
    let record = stream.recording_callback.map_or_else(String::new, |callback| {
        format!(
            r#"<Record fileFormat="mp3" maxLength="3600" recordSession="true" callbackUrl="{}" callbackMethod="POST"/>"#,
            escape(callback)
        )
    });
    format!(
        r#"<Response>{record}<Stream bidirectional="true" contentType="audio/x-mulaw;rate=8000" keepCallAlive="true">{}</Stream></Response>"#,
        escape(stream.url)
    )
}

/// Ends the call.
pub fn hangup() -> String {
    "<Response><Hangup/></Response>".to_owned()
}

/// Nothing to do: the answer to a callback that wants no document.
pub fn nothing() -> String {
    "<Response/>".to_owned()
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const GOLDEN: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/xml_golden.json"));

    fn golden(id: &str) -> String {
        let documents: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
        let document = documents.iter().find(|d| d["id"] == id).unwrap();
        document["xml"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_recorded_stream_is_the_sdk_s() {
        let document = connect(&Stream {
            url: "wss://voice.example.com/stream/x",
            recording_callback: Some("https://api.example.com/v1/webhooks/plivo/recording?attempt=01J9Z"),
        });
        assert_eq!(document, golden("plivo-record-stream"));
    }

    #[test]
    fn nothing_is_the_sdk_s() {
        assert_eq!(nothing(), golden("plivo-empty"));
    }

    #[test]
    fn text_cannot_become_markup() {
        let document = connect(&Stream { url: "wss://x/<Hangup/>&\"", recording_callback: None });
        assert!(document.contains("wss://x/&lt;Hangup/&gt;&amp;&quot;</Stream>"));
    }
}
