//! XML written straight into one buffer. Names are ours and need no escaping; text is the tenant's and gets it.

use std::fmt::{Display, Write as _};

/// A document in the making.
#[derive(Debug, Default)]
pub struct Xml {
    text: String,
}

impl Xml {
    /// An empty document with room for `capacity` bytes.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { text: String::with_capacity(capacity) }
    }

    /// `<?xml version="1.0" encoding="UTF-8"?>` and a line break.
    pub fn declaration(&mut self) {
        self.text.push_str("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    }

    /// The root element of an answer: `<{action}Response xmlns="{namespace}">`.
    pub fn open_response(&mut self, action: &str, namespace: &str) {
        for part in ["<", action, "Response xmlns=\"", namespace, "\">"] {
            self.text.push_str(part);
        }
    }

    /// `<name xmlns="{namespace}">`
    pub fn open_namespace(&mut self, name: &str, namespace: &str) {
        for part in ["<", name, " xmlns=\"", namespace, "\">"] {
            self.text.push_str(part);
        }
    }

    /// Closes what [`Xml::open_response`] opened.
    pub fn close_response(&mut self, action: &str) {
        for part in ["</", action, "Response>"] {
            self.text.push_str(part);
        }
    }

    /// `<name>`
    pub fn open(&mut self, name: &str) {
        self.text.push('<');
        self.text.push_str(name);
        self.text.push('>');
    }

    /// `</name>`
    pub fn close(&mut self, name: &str) {
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push('>');
    }

    /// `<name/>`
    pub fn empty(&mut self, name: &str) {
        self.text.push('<');
        self.text.push_str(name);
        self.text.push_str("/>");
    }

    /// `<name>text</name>`, escaped.
    pub fn element(&mut self, name: &str, text: &str) {
        self.open(name);
        self.escaped(text);
        self.close(name);
    }

    /// `<name>number</name>`
    pub fn number(&mut self, name: &str, number: &impl Display) {
        self.open(name);
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{number}");
        self.close(name);
    }

    /// The finished document.
    #[must_use]
    pub fn into_string(self) -> String {
        self.text
    }

    /// Appends text with `&`, `<`, `>` and quotes replaced, and without the characters that XML 1.0 section 2.2 excludes even
    /// as references: control characters, U+FFFE and U+FFFF become U+FFFD.
    fn escaped(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let mut plain = 0;
        for (at, byte) in text.bytes().enumerate() {
            let (replacement, width) = match byte {
                b'&' => ("&amp;", 1),
                b'<' => ("&lt;", 1),
                b'>' => ("&gt;", 1),
                b'"' => ("&quot;", 1),
                b'\r' => ("&#xD;", 1),
                0xef if matches!(bytes.get(at + 1..at + 3), Some([0xbf, 0xbe | 0xbf])) => ("\u{fffd}", 3),
                b'\t' | b'\n' | 0x20.. => continue,
                _ => ("\u{fffd}", 1),
            };
            // `at` is where a character starts, so both ends are on character boundaries.
            self.text.push_str(text.get(plain..at).unwrap_or_default());
            self.text.push_str(replacement);
            plain = at + width;
        }
        self.text.push_str(text.get(plain..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_read_back() {
        let mut xml = Xml::default();
        xml.element("a", "x<y>&\"\u{1}\r\né\u{fffe}\u{fffd}\u{ffff}!");
        let text = xml.into_string();
        assert_eq!(text, "<a>x&lt;y&gt;&amp;&quot;\u{fffd}&#xD;\né\u{fffd}\u{fffd}\u{fffd}!</a>");
        let inside = text.strip_prefix("<a>").and_then(|text| text.strip_suffix("</a>")).unwrap();
        let read = quick_xml::escape::unescape(inside).unwrap();
        assert_eq!(read, "x<y>&\"\u{fffd}\r\né\u{fffd}\u{fffd}\u{fffd}!");
    }
}
