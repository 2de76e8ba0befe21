//! Elements of the carriers' XML documents.

/// One element, its attributes in the order in which they were given.
#[derive(Debug, Clone)]
pub(super) struct Element {
    name: &'static str,
    attributes: Vec<(&'static str, String)>,
    text: String,
    children: Vec<Self>,
}

impl Element {
    pub fn new(name: &'static str) -> Self {
        Self { name, attributes: Vec::new(), text: String::new(), children: Vec::new() }
    }

    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.attributes.push((name, value.to_string()));
        self
    }

    /// Adds an attribute, where there is one.
    pub fn maybe(self, name: &'static str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    pub fn text(mut self, text: &str) -> Self {
        text.clone_into(&mut self.text);
        self
    }

    pub fn child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    /// The element's markup; `close` ends one that has nothing inside, as `/>`.
    pub fn render(&self, close: &str) -> String {
        let mut xml = format!("<{}", self.name);
        for (name, value) in &self.attributes {
            xml.push_str(&format!(" {name}=\"{}\"", escape(value)));
        }
        if self.text.is_empty() && self.children.is_empty() {
            return xml + close;
        }
        xml.push('>');
        xml.push_str(&escape(&self.text));
        for child in &self.children {
            xml.push_str(&child.render(close));
        }
        xml + &format!("</{}>", self.name)
    }

    /// Sorts the attributes of this element and all below it: Twilio's SDK writes them so.
    pub fn sorted(mut self) -> Self {
        self.attributes.sort();
        self.children = self.children.into_iter().map(Self::sorted).collect();
        self
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML 1.0 has no way to write these.
            '\u{0}'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => {}
            other => escaped.push(other),
        }
    }
    escaped
}
