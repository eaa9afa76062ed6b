//! AWS Signature Version 4: signs requests and verifies signed ones.
//!
//! Pure: no clock, no network, no randomness; `now` is an argument. Two forms of a signature, in the header `Authorization`
//! or presigned in the query, go through one path:
//!
//! ```text
//! request ──Claim::read──▶ claim ──(the caller finds the secret of claim.access_key_id)──▶ SigningKey
//!                            └────────────────── claim.verify(request, key, now) ◀──────────────┘
//! ```
//!
//! What the signature covers (AWS documentation, "Create a signed AWS API request"): method, path, query, the signed headers,
//! and the SHA-256 of the body, each in the canonical form of `canonical.rs`; then the time and the scope
//! `date/region/service/aws4_request`. The signing key is derived from the secret and the scope, so it can be kept for a day.
//!
//! Invariants: `host` and every `x-amz-*` header are signed, or the request is refused; the body is always hashed, there is
//! no `UNSIGNED-PAYLOAD`; signatures are compared in constant time.

mod canonical;
mod time_stamp;

use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};

pub use canonical::encode;
pub use time_stamp::TimeStamp;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";

/// How far the clocks of the two sides may differ, in seconds.
pub const SKEW_S: i64 = 15 * 60;

/// The longest life of a presigned request, in seconds.
pub const LONGEST_EXPIRY_S: i64 = 7 * 24 * 60 * 60;

/// A request as it stands on the wire.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `GET`, `POST`.
    pub method: &'a str,
    /// The path as sent, with its percent-encoding.
    pub path: &'a str,
    /// What follows the question mark, as sent; may be empty.
    pub query: &'a str,
    /// Names in any case, values as sent, repeated names in their order.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The whole body.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// The first header of this name (given in lower case).
    fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    fn header_text(&self, name: &str) -> Option<&'a str> {
        self.header(name).and_then(|value| std::str::from_utf8(value).ok()).map(str::trim)
    }
}

/// Why a request is not accepted as signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Neither an `Authorization` header nor a presigned query.
    #[error("Request is missing Authentication Token")]
    Unsigned,
    /// The signature lacks a part or has a malformed one.
    #[error("{0}")]
    Incomplete(String),
    /// The date of the scope is not that of the request.
    #[error("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '{scope}' != '{request}'.")]
    ScopeDate {
        /// The date in the credential.
        scope: String,
        /// The date of the request.
        request: String,
    },
    /// Signed too long ago, or for a time that has not come.
    #[error("Request has expired.")]
    Expired,
    /// The signature is not the one that the key gives for this request.
    #[error(
        "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key \
         and signing method. Consult the service documentation for details."
    )]
    Mismatch,
}

/// Which key signed, for what; all of it claimed by the request and believed only after [`Claim::verify`].
#[derive(Debug, Clone)]
pub struct Claim<'a> {
    /// The public half of the credentials.
    pub access_key_id: String,
    /// `YYYYMMDD`.
    pub date: String,
    /// `us-east-1`.
    pub region: String,
    /// `ec2`.
    pub service: String,
    /// The token of temporary credentials, in the header or the presigned query.
    pub session_token: Option<String>,
    signed_headers: Vec<String>,
    signature: [u8; 32],
    time: TimeStamp,
    /// Presigned requests say how long they hold.
    expires_s: Option<i64>,
    request: Request<'a>,
}

impl<'a> Claim<'a> {
    /// Reads the parts of a signature.
    ///
    /// # Errors
    /// [`Refusal::Unsigned`] without a signature, [`Refusal::Incomplete`] with half of one or two of them.
    pub fn read(request: Request<'a>) -> Result<Self, Refusal> {
        let presigned = canonical::pairs(request.query).any(|(name, _)| name == "X-Amz-Algorithm");
        match (request.header("authorization"), presigned) {
            (None, false) => Err(Refusal::Unsigned),
            (Some(_), true) => Err(incomplete("a request is signed by its header or by its query, not by both")),
            (Some(value), false) => Self::from_header(request, value),
            (None, true) => Self::from_query(request),
        }
    }

    fn from_header(request: Request<'a>, value: &[u8]) -> Result<Self, Refusal> {
        let value = std::str::from_utf8(value).map_err(|_| incomplete("Authorization header is not text"))?;
        let Some(parts) = value.trim().strip_prefix(ALGORITHM).filter(|rest| rest.starts_with(' ')) else {
            return Err(incomplete("Unsupported AWS 'algorithm' in the Authorization header; use AWS4-HMAC-SHA256"));
        };
        let (mut credential, mut headers, mut signature) = (None, None, None);
        for part in parts.split(',') {
            match part.trim().split_once('=') {
                Some(("Credential", value)) => credential = Some(value),
                Some(("SignedHeaders", value)) => headers = Some(value),
                Some(("Signature", value)) => signature = Some(value),
                _ => return Err(incomplete("Authorization header has an unknown part")),
            }
        }
        let need = |name: &str| incomplete(format!("Authorization header requires '{name}' parameter."));
        let credential = credential.ok_or_else(|| need("Credential"))?;
        let headers = headers.ok_or_else(|| need("SignedHeaders"))?;
        let signature = signature.ok_or_else(|| need("Signature"))?;
        let time = match request.header_text("x-amz-date") {
            Some(date) => TimeStamp::parse(date),
            None => request.header_text("date").and_then(|date| TimeStamp::parse(date).or_else(|| TimeStamp::parse_http(date))),
        };
        let time = time.ok_or_else(|| incomplete("Authorization header requires a valid 'X-Amz-Date' or 'Date' header."))?;
        let token = request.header_text("x-amz-security-token").map(str::to_owned);
        Self::assemble(request, credential, headers, signature, time, None, token)
    }

    fn from_query(request: Request<'a>) -> Result<Self, Refusal> {
        let part = |name: &str| -> Result<Option<String>, Refusal> {
            let mut values = canonical::pairs(request.query).filter(|(key, _)| key == name).map(|(_, value)| value);
            match (values.next(), values.next()) {
                (first, None) => Ok(first.and_then(|value| String::from_utf8(value.into_owned()).ok())),
                _ => Err(incomplete(format!("'{name}' is given more than once"))),
            }
        };
        let need = |name: &str| part(name)?.ok_or_else(|| incomplete(format!("AWS query-string parameters must include '{name}'.")));
        if need("X-Amz-Algorithm")? != ALGORITHM {
            return Err(incomplete("Unsupported 'X-Amz-Algorithm'; use AWS4-HMAC-SHA256"));
        }
        let time = TimeStamp::parse(&need("X-Amz-Date")?);
        let time = time.ok_or_else(|| incomplete("'X-Amz-Date' must be in the ISO8601 basic format"))?;
        let expires = need("X-Amz-Expires")?;
        let expires = expires.parse::<i64>().ok().filter(|expires| (1..=LONGEST_EXPIRY_S).contains(expires));
        let expires = expires.ok_or_else(|| incomplete(format!("'X-Amz-Expires' must be from 1 to {LONGEST_EXPIRY_S}")))?;
        let (credential, headers) = (need("X-Amz-Credential")?, need("X-Amz-SignedHeaders")?);
        let token = part("X-Amz-Security-Token")?;
        Self::assemble(request, &credential, &headers, &need("X-Amz-Signature")?, time, Some(expires), token)
    }

    fn assemble(
        request: Request<'a>,
        credential: &str,
        headers: &str,
        signature: &str,
        time: TimeStamp,
        expires_s: Option<i64>,
        session_token: Option<String>,
    ) -> Result<Self, Refusal> {
        let mut parts = credential.split('/').map(str::to_owned);
        let scope = (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next());
        let (Some(access_key_id), Some(date), Some(region), Some(service), Some(terminator), None) = scope else {
            return Err(incomplete(format!(
                "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, got '{credential}'"
            )));
        };
        if terminator != TERMINATOR {
            return Err(incomplete(format!("Credential should be scoped with a valid terminator: 'aws4_request', not '{terminator}'.")));
        }
        let signed_headers: Vec<String> = headers.split(';').map(str::to_owned).collect();
        if !signed_headers.iter().any(|name| name == "host") {
            return Err(incomplete("'Host' must be a 'SignedHeader' in the AWS Authorization."));
        }
        if !signed_headers.is_sorted() || signed_headers.iter().any(|name| name.bytes().any(|byte| byte.is_ascii_uppercase())) {
            return Err(incomplete("'SignedHeaders' must be in lower case and in order"));
        }
        let unsigned = request.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).find(|name| {
            // A token may be added after signing; whether one is acceptable is for the caller.
            name.starts_with("x-amz-") && name != "x-amz-security-token" && !signed_headers.contains(name)
        });
        if let Some(name) = unsigned {
            return Err(incomplete(format!("The header '{name}' is present in the request and not signed")));
        }
        let lower = signature.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        if !lower || hex::decode_to_slice(signature, &mut bytes).is_err() {
            return Err(incomplete("'Signature' must be 64 hexadecimal digits in lower case"));
        }
        Ok(Self { access_key_id, date, region, service, session_token, signed_headers, signature: bytes, time, expires_s, request })
    }

    /// Checks the time and the signature. `now_s` is in seconds since 1970.
    ///
    /// # Errors
    /// [`Refusal::Expired`], [`Refusal::ScopeDate`] or [`Refusal::Mismatch`].
    pub fn verify(&self, key: &SigningKey, now_s: i64) -> Result<(), Refusal> {
        if self.time.date() != self.date {
            return Err(Refusal::ScopeDate { scope: self.date.clone(), request: self.time.date().to_owned() });
        }
        let signed_s = self.time.unix_s();
        let life_s = self.expires_s.unwrap_or(SKEW_S);
        if now_s < signed_s.saturating_sub(SKEW_S) || signed_s.saturating_add(life_s) < now_s {
            return Err(Refusal::Expired);
        }
        let payload = payload_hash(&self.request)?;
        let form = if self.expires_s.is_some() { canonical::Form::Presigned } else { canonical::Form::Header };
        let names: Vec<&str> = self.signed_headers.iter().map(String::as_str).collect();
        let canonical = canonical::request(&self.request, &names, &payload, form);
        let scope = format!("{}/{}/{}/{TERMINATOR}", self.date, self.region, self.service);
        let text = string_to_sign(&self.time, &scope, &canonical);
        key.mac(text.as_bytes()).verify_slice(&self.signature).map_err(|_| Refusal::Mismatch)
    }
}

fn incomplete(sentence: impl Into<String>) -> Refusal {
    Refusal::Incomplete(sentence.into())
}

/// The hash of the body. A request that states one itself has to state the right one.
fn payload_hash(request: &Request<'_>) -> Result<String, Refusal> {
    let hash = hex::encode(Sha256::digest(request.body));
    match request.header_text("x-amz-content-sha256") {
        Some(stated) if stated != hash => Err(Refusal::Mismatch),
        _ => Ok(hash),
    }
}

fn string_to_sign(time: &TimeStamp, scope: &str, canonical: &str) -> String {
    format!("{ALGORITHM}\n{}\n{scope}\n{}", time.as_str(), hex::encode(Sha256::digest(canonical)))
}

/// The key that signs for one secret, day, region and service.
#[derive(Clone)]
pub struct SigningKey([u8; 32]);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("SigningKey(..)")
    }
}

impl SigningKey {
    /// Derives the key; `date` is `YYYYMMDD`.
    #[must_use]
    pub fn derive(secret: &str, date: &str, region: &str, service: &str) -> Self {
        let first = hmac(format!("AWS4{secret}").as_bytes(), date.as_bytes());
        let parts = [region, service, TERMINATOR];
        Self(parts.iter().fold(first, |key, part| hmac(&key, part.as_bytes())))
    }

    fn mac(&self, text: &[u8]) -> Hmac<Sha256> {
        mac(&self.0, text)
    }
}

fn mac(key: &[u8], text: &[u8]) -> Hmac<Sha256> {
    // HMAC takes keys of every length; a failure here would be a change of that crate's contract.
    #[allow(clippy::expect_used)]
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of every length");
    mac.update(text);
    mac
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    mac(key, text).finalize().into_bytes().into()
}

/// Credentials, and what they sign for.
#[derive(Clone)]
pub struct Signer {
    /// The public half.
    pub access_key_id: String,
    /// The secret half.
    pub secret_access_key: String,
    /// `us-east-1`.
    pub region: String,
    /// `ec2`.
    pub service: String,
}

impl Signer {
    /// The headers to add, so that the request is signed: `x-amz-date` and `authorization`. All headers of the request are
    /// signed, and `host` has to be among them. `now_s` is in seconds since 1970.
    #[must_use]
    pub fn sign(&self, request: &Request<'_>, now_s: i64) -> [(&'static str, String); 2] {
        let time = TimeStamp::from_unix_s(now_s);
        let mut headers = request.headers.to_vec();
        headers.push(("x-amz-date", time.as_str().as_bytes()));
        let names = canonical::names(&headers);
        let payload = hex::encode(Sha256::digest(request.body));
        let signed = Request { headers: &headers, ..*request };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let canonical = canonical::request(&signed, &names, &payload, canonical::Form::Header);
        let scope = self.scope(&time);
        let signature = self.signature(&time, &scope, &canonical);
        let authorization =
            format!("{ALGORITHM} Credential={}/{scope}, SignedHeaders={}, Signature={signature}", self.access_key_id, names.join(";"),);
        [("x-amz-date", time.as_str().to_owned()), ("authorization", authorization)]
    }

    /// The query of the request with a signature added that holds for `expires_s` seconds; signs the request's headers.
    #[must_use]
    pub fn presign(&self, request: &Request<'_>, now_s: i64, expires_s: i64) -> String {
        let time = TimeStamp::from_unix_s(now_s);
        let names = canonical::names(request.headers);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let scope = self.scope(&time);
        let mut query = request.query.to_owned();
        let credential = format!("{}/{scope}", self.access_key_id);
        let parts = [
            ("X-Amz-Algorithm", ALGORITHM),
            ("X-Amz-Credential", &credential),
            ("X-Amz-Date", time.as_str()),
            ("X-Amz-Expires", &expires_s.to_string()),
            ("X-Amz-SignedHeaders", &names.join(";")),
        ];
        for (name, value) in parts {
            let separator = if query.is_empty() { "" } else { "&" };
            query = format!("{query}{separator}{name}={}", encode(value.as_bytes()));
        }
        let payload = hex::encode(Sha256::digest(request.body));
        let signed = Request { query: &query, ..*request };
        let canonical = canonical::request(&signed, &names, &payload, canonical::Form::Presigned);
        let signature = self.signature(&time, &scope, &canonical);
        format!("{query}&X-Amz-Signature={signature}")
    }

    fn scope(&self, time: &TimeStamp) -> String {
        format!("{}/{}/{}/{TERMINATOR}", time.date(), self.region, self.service)
    }

    fn signature(&self, time: &TimeStamp, scope: &str, canonical: &str) -> String {
        let key = SigningKey::derive(&self.secret_access_key, time.date(), &self.region, &self.service);
        hex::encode(key.mac(string_to_sign(time, scope, canonical).as_bytes()).finalize().into_bytes())
    }
}
