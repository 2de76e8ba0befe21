//! What an answer URL said: reads the XML as strictly as Plivo does.
//!
//! A small reader of its own: elements, attributes and text are all that Plivo's documents have. What it does not know ends the
//! call, as it does there (8011).

/// What the document makes the call do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instructions {
    /// The callback of `<Record recordSession="true">`, with its method, where there is one.
    pub recording: Option<(String, String)>,
    /// Where the events of a websocket are told, and its address, at a carrier to which it is a leg of its own.
    pub socket: Option<(String, String)>,
    /// What comes after.
    pub then: Then,
}

/// The element that decides the call's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// `<Stream>`, or `<Dial>`: talks until somebody hangs up.
    Talk,
    /// `<Hangup/>`.
    Hangup,
    /// Nothing more to do, or a stream that is not kept alive.
    End,
}

/// Reads TwiML: an agent's stream, or a person, or the end. Recordings are asked for with the call.
pub fn read_twiml(document: &str) -> Result<Instructions, String> {
    for element in &children(document)? {
        let then = match element.name.as_str() {
            "Connect" if document.contains("<Stream ") && document.contains("url=\"ws") => Then::Talk,
            "Connect" => return Err("<Connect> without a <Stream> to a websocket".to_owned()),
            "Dial" => Then::Talk,
            "Hangup" | "Reject" => Then::Hangup,
            "Say" | "Play" | "Pause" | "Gather" => continue,
            name => return Err(format!("<{name}> is no element of Twilio's")),
        };
        return Ok(Instructions { recording: None, socket: None, then });
    }
    Ok(Instructions { recording: None, socket: None, then: Then::End })
}

/// Elements that Plivo knows and that neither talk nor hang up.
const PASSING: &[&str] = &["Speak", "Play", "Wait", "DTMF", "PreAnswer", "Message", "GetInput", "GetDigits"];
/// Content types that a stream may have.
const STREAM_TYPES: &[&str] =
    &["audio/x-mulaw;rate=8000", "audio/x-l16;rate=8000", "audio/x-l16;rate=16000", "audio/x-l16;rate=24000"];

/// Reads a document. The error says what is wrong with it, for the carrier's log.
pub fn read(document: &str) -> Result<Instructions, String> {
    let elements = children(document)?;
    let mut recording = None;
    for element in &elements {
        let then = match element.name.as_str() {
            "Record" => {
                if element.attribute("recordSession") == Some("true")
                    && let Some(url) = element.attribute("callbackUrl")
                {
                    let method = element.attribute("callbackMethod").unwrap_or("POST");
                    recording = Some((url.to_owned(), method.to_owned()));
                }
                continue;
            }
            "Stream" => stream(element)?,
            "Dial" | "Conference" | "MultiPartyCall" => Then::Talk,
            "Hangup" => Then::Hangup,
            name if PASSING.contains(&name) => continue,
            name => return Err(format!("<{name}> is no element of Plivo's")),
        };
        return Ok(Instructions { recording, socket: None, then });
    }
    Ok(Instructions { recording, socket: None, then: Then::End })
}

fn stream(element: &Element) -> Result<Then, String> {
    let url = element.text.trim();
    if !(url.starts_with("wss://") || url.starts_with("ws://")) || url.len() > 2_048 {
        return Err(format!("<Stream> to {url:?}, which is no websocket address"));
    }
    if let Some(kind) = element.attribute("contentType")
        && !STREAM_TYPES.contains(&kind)
    {
        return Err(format!("<Stream> of {kind:?}, which Plivo does not stream"));
    }
    let bidirectional = element.attribute("bidirectional") == Some("true");
    if bidirectional && matches!(element.attribute("audioTrack"), Some("outbound" | "both")) {
        return Err("a bidirectional <Stream> takes the inbound track only".to_owned());
    }
    // Without keepCallAlive the document goes on, and there is nothing behind the stream.
    Ok(if element.attribute("keepCallAlive") == Some("true") { Then::Talk } else { Then::End })
}

/// One element below `<Response>`; what is inside it is kept as text only.
#[derive(Debug, Default)]
struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    text: String,
}

impl Element {
    fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The elements directly below `<Response>`; an error for anything that is not well formed.
fn children(document: &str) -> Result<Vec<Element>, String> {
    let mut rest = document.trim_start_matches('\u{feff}');
    let mut open: Vec<String> = Vec::new();
    let mut found: Vec<Element> = Vec::new();
    let mut seen_root = false;
    loop {
        let Some((text, tag)) = rest.split_once('<') else {
            return match (rest.trim().is_empty(), open.last(), seen_root) {
                (true, None, true) => Ok(found),
                (true, None, false) => Err("the document is empty".to_owned()),
                (_, Some(name), _) => Err(format!("<{name}> is not closed")),
                (false, None, _) => Err("there is text outside <Response>".to_owned()),
            };
        };
        if open.len() > 1 {
            if let Some(element) = found.last_mut() {
                element.text.push_str(&unescape(text)?);
            }
        } else if !text.trim().is_empty() {
            return Err("there is text where an element belongs".to_owned());
        }
        if let Some(comment) = tag.strip_prefix("!--") {
            rest = comment.split_once("-->").ok_or("a comment is not closed")?.1;
            continue;
        }
        let end = tag_end(tag).ok_or("a tag is not closed")?;
        let (tag, after) = (&tag[..end], &tag[end + 1..]);
        rest = after;
        if tag.starts_with('?') {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            let opened = open.pop();
            if opened.as_deref() != Some(name.trim_end()) {
                return Err(format!("</{name}> closes nothing"));
            }
            continue;
        }
        let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, attributes) = parse_tag(tag)?;
        match open.len() {
            0 if seen_root => return Err("there is a second root".to_owned()),
            0 if name != "Response" => return Err(format!("the root is <{name}>, not <Response>")),
            0 => seen_root = true,
            1 => found.push(Element { name: name.clone(), attributes, text: String::new() }),
            _ => {}
        }
        if !empty {
            open.push(name);
        }
    }
}

/// Where a tag's `>` is; one inside a quoted value is not it.
fn tag_end(tag: &str) -> Option<usize> {
    let mut quote = None;
    tag.char_indices().find_map(|(at, letter)| {
        match (quote, letter) {
            (None, '>') => return Some(at),
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), letter) if open == letter => quote = None,
            _ => {}
        }
        None
    })
}

type Tag = (String, Vec<(String, String)>);

fn parse_tag(tag: &str) -> Result<Tag, String> {
    let end = tag.find(char::is_whitespace).unwrap_or(tag.len());
    let (name, mut rest) = tag.split_at(end);
    if name.is_empty() || !name.chars().all(|letter| letter.is_ascii_alphanumeric()) {
        return Err(format!("<{tag}> has no name"));
    }
    let mut attributes = Vec::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Ok((name.to_owned(), attributes));
        }
        let broken = || format!("an attribute of <{name}> is not written as name=\"value\"");
        let (key, after) = rest.split_once('=').ok_or_else(broken)?;
        let after = after.trim_start();
        let quote = after.chars().next().filter(|quote| matches!(quote, '"' | '\'')).ok_or_else(broken)?;
        let (value, after) = after[1..].split_once(quote).ok_or_else(broken)?;
        attributes.push((key.trim_end().to_owned(), unescape(value)?));
        rest = after;
    }
}

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        out.push_str(before);
        let (entity, after) = after.split_once(';').ok_or("there is a bare & in the document")?;
        out.push(match entity {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            other => other
                .strip_prefix('#')
                .and_then(|code| match code.strip_prefix('x') {
                    Some(hex) => u32::from_str_radix(hex, 16).ok(),
                    None => code.parse().ok(),
                })
                .and_then(char::from_u32)
                .ok_or_else(|| format!("&{other}; is no entity"))?,
        });
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = r#"<?xml version="1.0" encoding="UTF-8"?><Response><Record fileFormat="mp3" maxLength="3600" recordSession="true" callbackUrl="https://h/rec?a=1&amp;b=2" callbackMethod="POST"/><Stream bidirectional="true" contentType="audio/x-mulaw;rate=8000" keepCallAlive="true">wss://voice.example.com/stream/x</Stream></Response>"#;

    #[test]
    fn reads_a_recorded_agent() {
        let recording = Some(("https://h/rec?a=1&b=2".to_owned(), "POST".to_owned()));
        let wanted = Instructions { recording, socket: None, then: Then::Talk };
        assert_eq!(read(AGENT), Ok(wanted));
    }

    #[test]
    fn reads_the_ends() {
        let then = |document: &str| read(document).map(|read| read.then);
        assert_eq!(then("<Response/>"), Ok(Then::End));
        assert_eq!(then("<Response><Hangup reason=\"rejected\"/></Response>"), Ok(Then::Hangup));
        assert_eq!(then("<Response><Speak>Bye &amp; thanks</Speak><Hangup/></Response>"), Ok(Then::Hangup));
        assert_eq!(then("<Response><Stream bidirectional=\"true\">wss://v/x</Stream></Response>"), Ok(Then::End));
        assert_eq!(then("<Response><Dial><Number>91</Number></Dial></Response>"), Ok(Then::Talk));
    }

    #[test]
    fn refuses_what_plivo_refuses() {
        for document in [
            "",
            "ok",
            "{}",
            "<Response>",
            "<Response></Wrong>",
            "<Reject/>",
            "<Response><Reject/></Response>",
            "<Response><Stream>https://v/x</Stream></Response>",
            "<Response><Stream contentType=\"audio/mp3\">wss://v/x</Stream></Response>",
            "<Response><Stream bidirectional=\"true\" audioTrack=\"both\" keepCallAlive=\"true\">wss://v/x</Stream></Response>",
            "<Response><Stream keepCallAlive=true>wss://v/x</Stream></Response>",
            "<Response><Stream>wss://v/x?a&b</Stream></Response>",
            "<Response/><Response/>",
        ] {
            assert!(read(document).is_err(), "{document}");
        }
    }
}
