//! Requests: signed ones over TCP, and the operator's over a Unix socket, where file permissions say who may ask.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use sigv4::{Request, Signer};
use ureq::http;

/// How long a whole exchange may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What came back.
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The whole body.
    pub body: String,
}

impl Answer {
    /// Whether the status tells of an error.
    pub fn is_error(&self) -> bool {
        400 <= self.status
    }
}

/// Where to send requests, and who signs them.
pub struct Endpoint {
    url: String,
    /// The value of the header `Host`.
    host: String,
    signer: Signer,
}

impl Endpoint {
    /// Takes `http://host:port`.
    pub fn new(url: &str, signer: Signer) -> Result<Self> {
        let url = url.trim_end_matches('/');
        let Some(host) = url.strip_prefix("http://").filter(|host| !host.contains('/')) else {
            bail!("the endpoint {url} is not of the form http://HOST:PORT");
        };
        Ok(Self { url: url.to_owned(), host: host.to_owned(), signer })
    }

    /// Signs and sends a request; `target` is the path with its query.
    pub fn send(&self, method: &str, target: &str, content_type: &str, body: String) -> Result<Answer> {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?.as_secs();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = [("host", self.host.as_bytes()), ("content-type", content_type.as_bytes())];
        let request = Request { method, path, query, headers: &headers, body: body.as_bytes() };
        let mut builder = http::Request::builder().method(method).uri(format!("{}{target}", self.url));
        builder = builder.header("content-type", content_type);
        for (name, value) in self.signer.sign(&request, i64::try_from(now_s)?) {
            builder = builder.header(name, value);
        }
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).allow_non_standard_methods(true);
        let agent = ureq::Agent::new_with_config(config.build());
        let request = builder.body(body).context("the request is not valid HTTP")?;
        let mut answer = agent.run(request).with_context(|| format!("asking {}", self.url))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(1 << 30).read_to_string().context("reading the answer")?;
        Ok(Answer { status, body })
    }
}

/// Posts an empty body to an HTTP/1.1 server on a Unix socket.
pub fn post_to_socket(socket: &Path, path: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket).context("connecting")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("reading the answer")?;
    // The server closes after its one answer, so what follows the header is the body.
    let (head, body) = text.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("the answer has no status")?;
    Ok(Answer { status, body: body.to_owned() })
}
