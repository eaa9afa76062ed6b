//! The published SigV4 suite (aws-c-auth, `tests/aws-signing-test-suite/v4`, Apache-2.0): the signed requests of every case with
//! a normalised path stand in `suite.txt`, in the header form and in the query form. Each has to be accepted, and refused after
//! every change of one bit.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)] // a test may fail

use sigv4::{Claim, Refusal, Request, Signer, SigningKey};

const SUITE: &str = include_str!("suite.txt");
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
/// 2015-08-30T12:36:00Z
const SIGNED_AT_S: i64 = 1_440_938_160;

/// A request in parts that tests can change.
#[derive(Debug, Clone)]
struct Parts {
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Parts {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\n\n").unwrap_or((text.trim_end_matches('\n'), ""));
        let (line, headers) = head.split_once('\n').unwrap();
        let (method, target) = line.strip_suffix(" HTTP/1.1").unwrap().split_once(' ').unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut parts = Self {
            method: method.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            headers: Vec::new(),
            body: body.trim_end_matches('\n').to_owned(),
        };
        for line in headers.lines() {
            match line.split_once(':') {
                Some((name, value)) if !line.starts_with(' ') => parts.headers.push((name.to_owned(), value.to_owned())),
                _ => parts.headers.last_mut().unwrap().1.push_str(line),
            }
        }
        parts
    }

    fn verify(&self, now_s: i64) -> Result<(), Refusal> {
        self.verify_with(SECRET, now_s)
    }

    fn verify_with(&self, secret: &str, now_s: i64) -> Result<(), Refusal> {
        let headers: Vec<(&str, &[u8])> = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let (method, path, query) = (self.method.as_str(), self.path.as_str(), self.query.as_str());
        let claim = Claim::read(Request { method, path, query, headers: &headers, body: self.body.as_bytes() })?;
        let key = SigningKey::derive(secret, &claim.date, &claim.region, &claim.service);
        claim.verify(&key, now_s)
    }
}

fn case(name: &str, form: &str) -> Parts {
    let title = format!("{name} {form}\n");
    let text = SUITE.split("=== ").find_map(|block| block.strip_prefix(&title));
    Parts::parse(text.unwrap_or_else(|| panic!("no case {title}")))
}

fn check(name: &str) {
    // In the query form of `post-sts-header-after` the token is added to the query after signing: we refuse all that is unsigned.
    let forms: &[&str] = if name == "post-sts-header-after" { &["header"] } else { &["header", "query"] };
    for form in forms {
        let parts = case(name, form);
        assert_eq!(parts.verify(SIGNED_AT_S), Ok(()), "{name} {form}");
        let mut flips = 0;
        for change in changes(&parts) {
            assert!(change.verify(SIGNED_AT_S).is_err(), "{name} {form} accepted {change:?}");
            flips += 1;
        }
        assert!(20 < flips);
        assert_eq!(parts.verify_with("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEX", SIGNED_AT_S), Err(Refusal::Mismatch));
    }
}

/// The request with one bit of its text changed, for bits that matter: of the method, the host, the time, the scope, the
/// signature, and a body that was empty.
fn changes(parts: &Parts) -> Vec<Parts> {
    let mut changes = Vec::new();
    let mut push = |change: &dyn Fn(&mut Parts)| {
        let mut changed = parts.clone();
        change(&mut changed);
        changes.push(changed);
    };
    push(&|parts| flip(&mut parts.method, 0));
    push(&|parts| parts.path.push('x'));
    push(&|parts| parts.query.push_str("&x"));
    push(&|parts| parts.body.push('x'));
    for (at, (name, value)) in parts.headers.iter().enumerate() {
        match name.to_ascii_lowercase().as_str() {
            "host" | "x-amz-date" => (0..value.len()).for_each(|place| push(&|parts| flip(&mut parts.headers[at].1, place))),
            "authorization" => (value.find("20150830").unwrap()..value.len())
                .filter(|place| !matches!(value.as_bytes()[*place], b' ' | b','))
                .for_each(|place| push(&|parts| flip(&mut parts.headers[at].1, place))),
            _ => {}
        }
    }
    for name in ["X-Amz-Date=", "X-Amz-Expires=", "X-Amz-Signature="] {
        if let Some(at) = parts.query.find(name) {
            let start = at + name.len();
            let length = parts.query[start..].find('&').unwrap_or(parts.query.len() - start);
            (start..start + length).for_each(|place| push(&|parts| flip(&mut parts.query, place)));
        }
    }
    changes
}

/// Changes the lowest bit of one character.
fn flip(text: &mut String, place: usize) {
    let mut bytes = std::mem::take(text).into_bytes();
    bytes[place] ^= 1;
    *text = String::from_utf8(bytes).unwrap();
}

macro_rules! suite {
    ($($test:ident $name:literal,)*) => {
        $(#[test]
        fn $test() {
            check($name);
        })*
    };
}

suite! {
    get_header_key_duplicate "get-header-key-duplicate",
    get_header_value_multiline "get-header-value-multiline",
    get_header_value_order "get-header-value-order",
    get_header_value_trim "get-header-value-trim",
    get_relative_normalized "get-relative-normalized",
    get_relative_relative_normalized "get-relative-relative-normalized",
    get_slash_dot_slash_normalized "get-slash-dot-slash-normalized",
    get_slash_normalized "get-slash-normalized",
    get_slash_pointless_dot_normalized "get-slash-pointless-dot-normalized",
    get_slashes_normalized "get-slashes-normalized",
    get_space_normalized "get-space-normalized",
    get_unreserved "get-unreserved",
    get_utf8 "get-utf8",
    get_vanilla "get-vanilla",
    get_vanilla_empty_query_key "get-vanilla-empty-query-key",
    get_vanilla_query "get-vanilla-query",
    get_vanilla_query_order_encoded "get-vanilla-query-order-encoded",
    get_vanilla_query_order_key_case "get-vanilla-query-order-key-case",
    get_vanilla_query_unreserved "get-vanilla-query-unreserved",
    get_vanilla_utf8_query "get-vanilla-utf8-query",
    get_vanilla_with_session_token "get-vanilla-with-session-token",
    post_header_key_case "post-header-key-case",
    post_header_key_sort "post-header-key-sort",
    post_header_value_case "post-header-value-case",
    post_sts_header_after "post-sts-header-after",
    post_sts_header_before "post-sts-header-before",
    post_vanilla "post-vanilla",
    post_vanilla_empty_query_value "post-vanilla-empty-query-value",
    post_vanilla_query "post-vanilla-query",
    post_x_www_form_urlencoded "post-x-www-form-urlencoded",
    post_x_www_form_urlencoded_parameters "post-x-www-form-urlencoded-parameters",
}

#[test]
fn a_request_signed_here_is_accepted_for_fifteen_minutes_both_ways() {
    let signer = signer();
    let headers: [(&str, &[u8]); 2] = [("Host", b"api.example:8080"), ("Content-Type", b"application/json")];
    let request = Request { method: "PUT", path: "/a//b/../c%20d", query: "b=2&a=%2B+1&a", headers: &headers, body: b"{}" };
    let added = signer.sign(&request, 1_700_000_000);
    let mut signed = headers.to_vec();
    signed.extend(added.iter().map(|(name, value)| (*name, value.as_bytes())));
    let claim = Claim::read(Request { headers: &signed, ..request }).unwrap();
    assert_eq!((claim.access_key_id.as_str(), claim.service.as_str()), ("AKIDEXAMPLE", "ec2"));
    let key = SigningKey::derive(SECRET, &claim.date, &claim.region, &claim.service);
    for (now_s, answer) in [(0, Ok(())), (900, Ok(())), (-900, Ok(())), (901, Err(Refusal::Expired)), (-901, Err(Refusal::Expired))] {
        assert_eq!(claim.verify(&key, 1_700_000_000 + now_s), answer, "{now_s}");
    }
}

#[test]
fn a_presigned_request_holds_as_long_as_it_says() {
    let headers: [(&str, &[u8]); 1] = [("host", b"api.example")];
    let request = Request { method: "GET", path: "/", query: "Action=DescribeRegions", headers: &headers, body: b"" };
    let query = signer().presign(&request, 1_700_000_000, 60);
    let claim = Claim::read(Request { query: &query, ..request }).unwrap();
    let key = SigningKey::derive(SECRET, &claim.date, &claim.region, &claim.service);
    assert_eq!(claim.verify(&key, 1_700_000_060), Ok(()));
    assert_eq!(claim.verify(&key, 1_700_000_061), Err(Refusal::Expired));
    for expires_s in [0, 604_801, -1] {
        let query = signer().presign(&request, 1_700_000_000, expires_s);
        assert!(matches!(Claim::read(Request { query: &query, ..request }), Err(Refusal::Incomplete(_))));
    }
}

#[test]
fn a_plus_in_a_query_is_not_the_plus_that_was_signed() {
    let headers: [(&str, &[u8]); 1] = [("host", b"api.example")];
    let request = Request { method: "GET", path: "/", query: "Value=a%2Bb", headers: &headers, body: b"" };
    let query = signer().presign(&request, 1_700_000_000, 60).replace("a%2Bb", "a+b");
    let claim = Claim::read(Request { query: &query, ..request }).unwrap();
    let key = SigningKey::derive(SECRET, &claim.date, &claim.region, &claim.service);
    assert_eq!(claim.verify(&key, 1_700_000_000), Err(Refusal::Mismatch));
}

#[test]
fn a_header_that_steers_us_has_to_be_signed() {
    let mut parts = case("get-vanilla", "header");
    parts.headers.push(("X-Amz-Content-Sha256".to_owned(), "UNSIGNED-PAYLOAD".to_owned()));
    assert!(matches!(parts.verify(SIGNED_AT_S), Err(Refusal::Incomplete(_))));
}

#[test]
fn an_unsigned_payload_is_refused_even_when_the_claim_is_signed() {
    let headers: [(&str, &[u8]); 2] = [("host", b"api.example"), ("x-amz-content-sha256", b"UNSIGNED-PAYLOAD")];
    let request = Request { method: "POST", path: "/", query: "", headers: &headers, body: b"" };
    let added = signer().sign(&request, 1_700_000_000);
    let mut signed = headers.to_vec();
    signed.extend(added.iter().map(|(name, value)| (*name, value.as_bytes())));
    let claim = Claim::read(Request { headers: &signed, ..request }).unwrap();
    let key = SigningKey::derive(SECRET, &claim.date, &claim.region, &claim.service);
    assert_eq!(claim.verify(&key, 1_700_000_000), Err(Refusal::Mismatch));
}

#[test]
fn half_a_signature_is_named_as_incomplete() {
    let refusal = |authorization: &str| {
        let mut parts = case("get-vanilla", "header");
        parts.headers.retain(|(name, _)| name != "Authorization");
        parts.headers.push(("Authorization".to_owned(), authorization.to_owned()));
        parts.verify(SIGNED_AT_S)
    };
    for authorization in [
        "",
        "Bearer x",
        "AWS4-HMAC-SHA256",
        "AWS4-HMAC-SHA256 Credential=a",
        "AWS4-HMAC-SHA256 Credential=a/20150830/r/s, SignedHeaders=host, Signature=00",
        "AWS4-HMAC-SHA256 Credential=a/20150830/r/s/aws4_request, SignedHeaders=host;x-amz-date, Signature=00",
        "AWS4-HMAC-SHA256 Credential=a/20150830/r/s/aws4_request, SignedHeaders=x-amz-date, Signature=00",
    ] {
        assert!(matches!(refusal(authorization), Err(Refusal::Incomplete(_))), "{authorization}");
    }
    let mut parts = case("get-vanilla", "header");
    parts.headers.retain(|(name, _)| name != "Authorization");
    assert_eq!(parts.verify(SIGNED_AT_S), Err(Refusal::Unsigned));
}

fn signer() -> Signer {
    Signer {
        access_key_id: "AKIDEXAMPLE".to_owned(),
        secret_access_key: SECRET.to_owned(),
        region: "us-east-1".to_owned(),
        service: "ec2".to_owned(),
    }
}
