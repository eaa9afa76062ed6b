//! HTTP/1.1 as the metadata service needs it (RFC 9112), and who may read what.
//!
//! Bytes in, one response out; no sockets here. Everything that a guest sends
//! has a cap, and what breaks a rule gets its answer and a closed connection.

use super::token::{TTL_MAX_S, TokenKey};
use super::tree::Subject;

/// Longest request line and headers together.
pub const HEAD_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// A PUT has no body; some clients send one all the same.
const BODY_MAX: usize = 1024;

/// IP TTL of everything but tokens.
const TTL_DEFAULT: u8 = 64;

/// What a request is judged with.
pub struct Context<'a> {
    /// The instance that asks; `None` while the card knows none for the port.
    pub subject: Option<&'a Subject>,
    /// The card's secret for tokens.
    pub key: &'a TokenKey,
    /// Unix time.
    pub now_s: u64,
    /// Random.
    pub nonce: [u8; 8],
}

/// An answer, ready to be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code, for the counters.
    pub status: u16,
    /// Head and body.
    pub bytes: Vec<u8>,
    /// Whether the connection ends here.
    pub close: bool,
    /// IP TTL of the packets that carry it: tokens go no further than the tenant allows.
    pub ttl: u8,
}

/// Takes one request off the front of `input` and answers it; `None`: it is not complete yet.
#[must_use]
pub fn answer(input: &mut Vec<u8>, context: &Context<'_>) -> Option<Response> {
    let Some(end) = input.windows(4).take(HEAD_MAX).position(|window| window == b"\r\n\r\n") else {
        // Nobody reads on behind a head that never ends.
        return (HEAD_MAX <= input.len()).then(|| Answer::error(431).encode(true, true));
    };
    let Some(request) = input.get(..end).and_then(Request::parse) else {
        return Some(Answer::error(400).encode(true, true));
    };
    let body = match request.body_length() {
        Ok(length) => length,
        Err(status) => return Some(Answer::error(status).encode(true, true)),
    };
    let total = end + 4 + body;
    if input.len() < total {
        return None;
    }
    let response = judge(&request, context).encode(request.method != "HEAD", request.close());
    input.drain(..total);
    Some(response)
}

fn judge(request: &Request<'_>, context: &Context<'_>) -> Answer {
    let Some(subject) = context.subject else { return Answer::error(404) };
    let options = subject.metadata.options.unwrap_or_default();
    if !options.enabled {
        return Answer::error(403);
    }
    let Some(path) = request.path() else { return Answer::error(400) };
    let is_token = path.split('/').filter(|segment| !segment.is_empty()).eq(["latest", "api", "token"]);
    match request.method {
        "PUT" if is_token => issue(request, subject, context, options.hop_limit),
        "GET" | "HEAD" if is_token => Answer::error(405),
        "GET" | "HEAD" => {
            let good = match request.header("x-aws-ec2-metadata-token") {
                Some(token) => context.key.check(&subject.instance_id, token.as_bytes(), context.now_s).is_some(),
                None => !options.tokens_required,
            };
            if !good {
                return Answer::error(401);
            }
            let kind = if path.contains("user-data") { "application/octet-stream" } else { "text/plain" };
            subject.lookup(&path).map_or_else(|| Answer::error(404), |body| Answer { kind, ..Answer::ok(body) })
        }
        _ => Answer::error(405),
    }
}

/// A token, unless a proxy stands in between: it would hand it to somebody else.
fn issue(request: &Request<'_>, subject: &Subject, context: &Context<'_>, hop_limit: u32) -> Answer {
    if request.header("x-forwarded-for").is_some() {
        return Answer::error(403);
    }
    let ttl_s = request.header(TTL_HEADER).and_then(|text| text.parse().ok()).filter(|ttl_s| (1..=TTL_MAX_S).contains(ttl_s));
    let Some(ttl_s) = ttl_s else { return Answer::error(400) };
    let token = context.key.issue(&subject.instance_id, context.now_s.saturating_add(ttl_s), context.nonce);
    Answer { ttl_s: Some(ttl_s), hop_limit: u8::try_from(hop_limit).unwrap_or(TTL_DEFAULT).max(1), ..Answer::ok(token.into_bytes()) }
}

const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";

struct Answer {
    status: u16,
    kind: &'static str,
    body: Vec<u8>,
    /// Life of the token in the body.
    ttl_s: Option<u64>,
    hop_limit: u8,
}

impl Answer {
    fn ok(body: Vec<u8>) -> Self {
        Self { status: 200, kind: "text/plain", body, ttl_s: None, hop_limit: TTL_DEFAULT }
    }

    fn error(status: u16) -> Self {
        let body = format!("<html><head><title>{status} - {0}</title></head><body><h1>{status} - {0}</h1></body></html>\n", reason(status));
        Self { status, kind: "text/html", ..Self::ok(body.into_bytes()) }
    }

    fn encode(self, with_body: bool, close: bool) -> Response {
        let Self { status, kind, body, ttl_s, hop_limit } = self;
        let mut head =
            format!("HTTP/1.1 {status} {}\r\nServer: EC2ws\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n", reason(status), body.len());
        if let Some(ttl_s) = ttl_s {
            head.push_str(&format!("X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {ttl_s}\r\n"));
        }
        if status == 405 {
            head.push_str("Allow: GET, HEAD, PUT\r\n");
        }
        head.push_str(if close { "Connection: close\r\n\r\n" } else { "Connection: keep-alive\r\n\r\n" });
        let mut bytes = head.into_bytes();
        if with_body {
            bytes.extend(body);
        }
        Response { status, bytes, close, ttl: hop_limit }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Error",
    }
}

struct Request<'a> {
    method: &'a str,
    target: &'a str,
    /// HTTP/1.0 closes unless asked not to.
    old: bool,
    headers: Vec<(&'a str, &'a str)>,
}

impl<'a> Request<'a> {
    /// The request line and headers, without the empty line behind them.
    fn parse(head: &'a [u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(head).ok()?.trim_start_matches("\r\n").split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() || method.is_empty() || !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
            return None;
        }
        let headers = lines.map(|line| line.split_once(':').map(|(name, value)| (name, value.trim())));
        let headers: Vec<_> = headers.collect::<Option<_>>()?;
        let named = |name: &str| !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control());
        let sound = headers.len() <= HEADERS_MAX && headers.iter().all(|(name, _)| named(name));
        sound.then_some(Self { method, target, old: version == "HTTP/1.0", headers })
    }

    fn header(&self, name: &str) -> Option<&'a str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// Bytes of the body that follow, or the status that refuses it.
    fn body_length(&self) -> Result<usize, u16> {
        if self.header("transfer-encoding").is_some() {
            return Err(400);
        }
        let mut lengths = self.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length")).map(|(_, value)| *value);
        let Some(length) = lengths.next() else { return Ok(0) };
        if lengths.any(|other| other != length) || !length.bytes().all(|b| b.is_ascii_digit()) {
            return Err(400);
        }
        length.parse().ok().filter(|length| *length <= BODY_MAX).ok_or(413)
    }

    fn close(&self) -> bool {
        match self.header("connection").map(str::to_ascii_lowercase).as_deref() {
            Some("close") => true,
            Some("keep-alive") => false,
            _ => self.old,
        }
    }

    /// The decoded path of the target, without scheme, authority and query.
    fn path(&self) -> Option<String> {
        let target = match self.target.strip_prefix("http://") {
            Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
            None => self.target,
        };
        let path = target.split(['?', '#']).next().filter(|path| path.starts_with('/'))?;
        let mut decoded = Vec::with_capacity(path.len());
        let mut bytes = path.bytes();
        while let Some(byte) = bytes.next() {
            decoded.push(match byte {
                b'%' => (hex_digit(bytes.next()?)? << 4) | hex_digit(bytes.next()?)?,
                plain => plain,
            });
        }
        String::from_utf8(decoded).ok()
    }
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use crate::imds::tree::tests::rich;
    use proptest::prelude::*;

    fn key() -> TokenKey {
        TokenKey::load(&tempfile::tempdir().unwrap().path().join("key")).unwrap()
    }

    fn ask_with(subject: &Subject, key: &TokenKey, request: &str) -> (u16, String, Response) {
        let mut input = request.replace('\n', "\r\n").into_bytes();
        let response = answer(&mut input, &Context { subject: Some(subject), key, now_s: 1000, nonce: [1; 8] }).unwrap();
        let text = String::from_utf8(response.bytes.clone()).unwrap();
        let body = text.split_once("\r\n\r\n").unwrap().1.to_owned();
        (response.status, body, response)
    }

    fn check(subject: &Subject, request: &str, status: u16) {
        assert_eq!(ask_with(subject, &key(), request).0, status, "{request:?}");
    }

    #[test]
    fn a_token_opens_the_tree_and_nothing_else_does_when_required() {
        let (subject, key) = (rich(), key());
        let put = "PUT /latest/api/token HTTP/1.1\nX-aws-ec2-metadata-token-ttl-seconds: 60\n\n";
        let (status, token, response) = ask_with(&subject, &key, put);
        assert_eq!((status, response.ttl), (200, 1));
        assert!(String::from_utf8_lossy(&response.bytes).contains("Token-Ttl-Seconds: 60"));
        let get =
            |token: &str| ask_with(&subject, &key, &format!("GET /latest/meta-data/mac HTTP/1.1\nX-aws-ec2-metadata-token: {token}\n\n"));
        assert_eq!(get(&token).0, 200);
        assert_eq!(get(&token).1, "02:00:00:00:00:01");
        assert_eq!(get(&token).2.ttl, 64);
        assert_eq!(get("AAAA").0, 401);
        check(&subject, "GET /latest/meta-data/mac HTTP/1.1\n\n", 401);
        let mut other = rich();
        other.instance_id = "i-other".into();
        assert_eq!(ask_with(&other, &key, &format!("GET / HTTP/1.1\nX-aws-ec2-metadata-token: {token}\n\n")).0, 401);
    }

    #[test]
    fn v1_works_when_tokens_are_optional_but_a_wrong_token_is_still_wrong() {
        let mut subject = rich();
        subject.metadata.options.as_mut().unwrap().tokens_required = false;
        check(&subject, "GET /latest/meta-data/ HTTP/1.1\n\n", 200);
        check(&subject, "GET /latest/meta-data/ HTTP/1.1\nX-aws-ec2-metadata-token: x\n\n", 401);
        check(&subject, "GET /latest/meta-data/tags/instance/%4eame?x=y HTTP/1.1\n\n", 200);
        check(&subject, "GET http://169.254.169.254/latest/meta-data/ HTTP/1.1\n\n", 200);
        check(&subject, "GET /latest/meta-data/nothing HTTP/1.1\n\n", 404);
        check(&subject, "HEAD /latest/meta-data/mac HTTP/1.1\n\n", 200);
        assert_eq!(ask_with(&subject, &key(), "HEAD /latest/meta-data/mac HTTP/1.1\n\n").1, "");
        subject.metadata.options.as_mut().unwrap().enabled = false;
        check(&subject, "GET /latest/meta-data/ HTTP/1.1\n\n", 403);
    }

    #[test]
    fn token_requests_are_judged() {
        let ttl = "X-aws-ec2-metadata-token-ttl-seconds";
        for bad in ["0", "21601", "-1", "x", "", "99999999999999999999"] {
            check(&rich(), &format!("PUT /latest/api/token HTTP/1.1\n{ttl}: {bad}\n\n"), 400);
        }
        check(&rich(), "PUT /latest/api/token HTTP/1.1\n\n", 400);
        check(&rich(), &format!("PUT /latest/api/token HTTP/1.1\n{ttl}: 5\nX-Forwarded-For: 10.0.0.1\n\n"), 403);
        check(&rich(), &format!("PUT //latest/api/token/ HTTP/1.1\n{ttl}: 21600\nContent-Length: 0\n\n"), 200);
        check(&rich(), "PUT /latest/meta-data/mac HTTP/1.1\n\n", 405);
        check(&rich(), "POST / HTTP/1.1\n\n", 405);
        check(&rich(), "GET /latest/api/token HTTP/1.1\n\n", 405);
    }

    #[test]
    fn requests_wait_for_their_end_and_are_taken_one_by_one() {
        let (mut subject, key) = (rich(), key());
        subject.metadata.options.as_mut().unwrap().tokens_required = false;
        let context = Context { subject: Some(&subject), key: &key, now_s: 0, nonce: [0; 8] };
        let whole = b"GET /latest/meta-data/mac HTTP/1.1\r\n\r\nGET /x HTTP/1.0\r\n\r\n";
        let mut input = Vec::new();
        for byte in &whole[..37] {
            assert_eq!(answer(&mut input, &context), None);
            input.push(*byte);
        }
        input.extend(&whole[37..]);
        assert_eq!(answer(&mut input, &context).unwrap().status, 200);
        let second = answer(&mut input, &context).unwrap();
        assert!(second.status == 404 && second.close && input.is_empty());
        let mut input = b"PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab".to_vec();
        assert_eq!(answer(&mut input, &context), None);
    }

    #[test]
    fn what_breaks_a_rule_is_answered_and_closed() {
        for (request, status) in [
            ("GARBAGE\n\n", 400),
            ("GET / HTTP/2\n\n", 400),
            ("GET  / HTTP/1.1\n\n", 400),
            ("GET / HTTP/1.1\nno colon\n\n", 400),
            ("GET / HTTP/1.1\nTransfer-Encoding: chunked\n\n", 400),
            ("PUT / HTTP/1.1\nContent-Length: 1025\n\n", 413),
            ("PUT / HTTP/1.1\nContent-Length: 1\nContent-Length: 2\n\n", 400),
            ("PUT / HTTP/1.1\nContent-Length: +1\n\n", 400),
        ] {
            let (got, _, response) = ask_with(&rich(), &key(), request);
            assert!(got == status && response.close, "{request:?} {got}");
        }
        let mut endless = vec![b'a'; HEAD_MAX];
        let key = key();
        let context = Context { subject: None, key: &key, now_s: 0, nonce: [0; 8] };
        assert_eq!(answer(&mut endless, &context).unwrap().status, 431);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut input in prop::collection::vec(any::<u8>(), 0..200), cut in 0..60_usize) {
            let (subject, key) = (rich(), key());
            let context = Context { subject: Some(&subject), key: &key, now_s: 0, nonce: [0; 8] };
            let _ = answer(&mut input, &context);
            let mut mixed = b"GET /latest/%4d HTTP/1.1\r\nContent-Length: 1\r\n\r\n".to_vec();
            mixed.splice(cut.min(mixed.len()).., input);
            mixed.extend(b"\r\n\r\n");
            let _ = answer(&mut mixed, &context);
        }
    }
}
