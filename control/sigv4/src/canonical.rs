//! The canonical form of a request: the text that both sides hash.
//!
//! ```text
//! method \n path \n query \n name:value \n ... \n \n names joined by ; \n hash of the body
//! ```
//!
//! The path is normalised (`.`, `..` and empty segments) and encoded once more; queries are decoded, encoded anew and sorted,
//! with `+` read as the space that it means; header values are trimmed and runs of white space become one space. Two requests
//! that mean different things therefore never share one canonical form.

use std::borrow::Cow;

use crate::Request;

/// Where the signature stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Header,
    /// In the query, where it does not sign itself.
    Presigned,
}

pub(crate) fn request(request: &Request<'_>, names: &[&str], payload_hash: &str, form: Form) -> String {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(request.method.as_bytes());
    out.push(b'\n');
    path(request.path, &mut out);
    out.push(b'\n');
    query(request.query, form, &mut out);
    out.push(b'\n');
    for name in names {
        header(request, name, &mut out);
    }
    out.push(b'\n');
    out.extend_from_slice(names.join(";").as_bytes());
    out.push(b'\n');
    out.extend_from_slice(payload_hash.as_bytes());
    // Header values that are no UTF-8 are refused by every caller's HTTP library or hashed in their lossy form on both sides.
    String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// The lower-case names of the headers, sorted, each once.
pub(crate) fn names(headers: &[(&str, &[u8])]) -> Vec<String> {
    let mut names: Vec<String> = headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn path(path: &str, out: &mut Vec<u8>) {
    let mut segments = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    for segment in &segments {
        out.push(b'/');
        encode_into(segment.as_bytes(), out);
    }
    let folder = path.ends_with('/') || path.ends_with("/.") || path.ends_with("/..");
    if segments.is_empty() || folder {
        out.push(b'/');
    }
}

fn query(query: &str, form: Form, out: &mut Vec<u8>) {
    let mut encoded: Vec<(String, String)> = pairs(query)
        .filter(|(name, _)| form == Form::Header || name != "X-Amz-Signature")
        .map(|(name, value)| (encode(name.as_bytes()), encode(&value)))
        .collect();
    encoded.sort_unstable();
    for (index, (name, value)) in encoded.iter().enumerate() {
        if index != 0 {
            out.push(b'&');
        }
        out.extend_from_slice(name.as_bytes());
        out.push(b'=');
        out.extend_from_slice(value.as_bytes());
    }
}

fn header(request: &Request<'_>, name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.push(b':');
    let values = request.headers.iter().filter(|(header, _)| header.eq_ignore_ascii_case(name));
    for (index, (_, value)) in values.enumerate() {
        if index != 0 {
            out.push(b',');
        }
        let words = value.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        for (index, word) in words.enumerate() {
            if index != 0 {
                out.push(b' ');
            }
            out.extend_from_slice(word);
        }
    }
    out.push(b'\n');
}

/// A name and a value of a query, decoded; names that are no UTF-8 keep their encoding.
pub(crate) type Pair<'a> = (Cow<'a, str>, Cow<'a, [u8]>);

/// The pairs of a query.
pub(crate) fn pairs(query: &str) -> impl Iterator<Item = Pair<'_>> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let decoded = match decode(name) {
            Cow::Borrowed(_) => Cow::Borrowed(name),
            Cow::Owned(bytes) => String::from_utf8(bytes).map_or(Cow::Borrowed(name), Cow::Owned),
        };
        (decoded, decode(value))
    })
}

/// Decodes `%41` and `+`; what is no valid escape stays as it is.
fn decode(text: &str) -> Cow<'_, [u8]> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = match (first, after) {
            (b'%', [high, low, ..]) => hex_digit(*high).zip(hex_digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        rest = after;
        match (escaped, first) {
            (Some(byte), _) => {
                out.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            (None, b'+') => out.push(b' '),
            (None, byte) => out.push(*byte),
        }
    }
    Cow::Owned(out)
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

/// Percent-encodes all but the unreserved characters of RFC 3986.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    let mut out = Vec::with_capacity(bytes.len());
    encode_into(bytes, &mut out);
    String::from_utf8(out).unwrap_or_default()
}

fn encode_into(bytes: &[u8], out: &mut Vec<u8>) {
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(*byte),
            byte => {
                let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'A' + nibble - 10 };
                out.extend_from_slice(&[b'%', digit(byte >> 4), digit(byte & 15)]);
            }
        }
    }
}
