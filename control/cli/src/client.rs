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

/// An answer while it comes in.
pub struct Stream {
    /// The HTTP status.
    pub status: u16,
    /// What was read with the header, then the rest.
    early: Vec<u8>,
    socket: UnixStream,
}

impl Stream {
    /// The whole body as text.
    pub fn text(mut self) -> Result<Answer> {
        self.socket.set_read_timeout(Some(TIMEOUT))?;
        let mut body = String::from_utf8(std::mem::take(&mut self.early)).context("the answer is not text")?;
        self.socket.read_to_string(&mut body).context("reading the answer")?;
        Ok(Answer { status: self.status, body })
    }
}

impl std::io::Read for Stream {
    fn read(&mut self, room: &mut [u8]) -> std::io::Result<usize> {
        if self.early.is_empty() {
            return self.socket.read(room);
        }
        let count = self.early.len().min(room.len());
        for (to, from) in room.iter_mut().zip(self.early.drain(..count)) {
            *to = from;
        }
        Ok(count)
    }
}

/// The longest header of an answer.
const HEADER_MAX: usize = 16 * 1024;

/// Posts JSON to an HTTP server on a Unix socket. In HTTP/1.0, so that the body of the answer ends where the connection does.
pub fn post_to_socket(socket: &Path, path: &str, body: &str) -> Result<Stream> {
    let mut socket = UnixStream::connect(socket).context("connecting")?;
    let length = body.len();
    write!(socket, "POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut read = Vec::new();
    let end = loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        let mut piece = [0; 1024];
        let count = socket.read(&mut piece).context("reading the answer")?;
        if count == 0 || read.len() > HEADER_MAX {
            bail!("the answer is not HTTP");
        }
        read.extend(piece.iter().take(count));
    };
    let early = read.split_off(end + 4);
    let head = String::from_utf8_lossy(&read);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("the answer has no status")?;
    Ok(Stream { status, early, socket })
}
