//! CPU per API request, ours beside a peer's, in one run.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use hw_sim::Region;
use serde_json::{Value, json};
use sigv4::{Request, Signer};

use crate::{figure, process};

/// moto answers too slowly for as many requests as we take.
const PEER_SHARE: usize = 20;

/// How long an answer may take; moto needs seconds for a launch of 30.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server under measurement.
struct Server {
    address: String,
    signer: Signer,
    pid: i32,
}

/// CPU of `DescribeInstances` by id over one kept connection.
pub fn describe(runs: usize, instances: usize, requests: usize, moto: Option<&Path>) -> Result<Value> {
    let region = Region::start("perf-describe", &["--machine", "sim", "--hosts-per-zone", "8"]);
    let environment = region.environment();
    let key = |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone()).unwrap_or_default();
    let signer = Signer {
        access_key_id: key("AWS_ACCESS_KEY_ID"),
        secret_access_key: key("AWS_SECRET_ACCESS_KEY"),
        region: key("AWS_DEFAULT_REGION"),
        service: "ec2".into(),
    };
    let ours =
        Server { address: region.endpoint().trim_start_matches("http://").to_owned(), signer: signer.clone(), pid: region.pid("control") };
    let image = region.image("mini");
    let id = launch(&ours, &image, instances)?;
    let peer = moto.map(|binary| Peer::start(binary, &signer)).transpose()?;
    let peer_id = peer.as_ref().map(|peer| launch(&peer.server, "ami-12c6146b", instances)).transpose()?;

    let (mut our_us, mut our_rate, mut peer_us, mut ratio) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let (cpu_us, rate) = load(&ours, &id, requests)?;
        our_us.push(cpu_us);
        our_rate.push(rate);
        if let (Some(peer), Some(id)) = (&peer, &peer_id) {
            let (cpu_us_of_peer, _) = load(&peer.server, id, requests / PEER_SHARE)?;
            peer_us.push(cpu_us_of_peer);
            ratio.push(cpu_us_of_peer / cpu_us);
        }
    }
    let beside =
        peer.map(|_| json!({ "moto_cpu_per_request": figure::spread(&peer_us, "us"), "moto_cpu_over_ours": figure::spread(&ratio, "x") }));
    let figures = json!({
        "instances": instances,
        "cpu_per_request": figure::spread(&our_us, "us"),
        "requests_per_s_one_connection": figure::spread(&our_rate, "1/s"),
        "peer": beside,
    });
    Ok(figure::report("describe", figures))
}

/// Launches `count` instances and returns the id of one.
fn launch(server: &Server, image: &str, count: usize) -> Result<String> {
    let mut connection = server.connect();
    let mut id = None;
    let mut left = count;
    while left > 0 {
        // A batch has to fit into one zone: 8 hosts of 8 cores hold 32.
        let batch = left.min(30);
        let body = format!("Action=RunInstances&Version=2016-11-15&ImageId={image}&InstanceType=t3.nano&MinCount={batch}&MaxCount={batch}");
        let answer = String::from_utf8_lossy(&connection.exchange(&server.message(&body)?)?).into_owned();
        let found = answer.split_once("<instanceId>").and_then(|(_, rest)| rest.split_once('<')).map(|(id, _)| id.to_owned());
        id = Some(found.ok_or_else(|| anyhow!("no instance: {answer}"))?);
        left -= batch;
    }
    id.ok_or_else(|| anyhow!("no instance was asked for"))
}

/// CPU microseconds of the server per request, and requests per second.
fn load(server: &Server, id: &str, requests: usize) -> Result<(f64, f64)> {
    let body = format!("Action=DescribeInstances&Version=2016-11-15&InstanceId.1={id}");
    let mut connection = server.connect();
    let message = server.message(&body)?;
    let answer = connection.exchange(&message)?;
    if !String::from_utf8_lossy(&answer).contains(id) {
        bail!("an answer without {id}: {}", String::from_utf8_lossy(&answer));
    }
    let (before, begun) = (process::cpu_s(server.pid), Instant::now());
    for _ in 0..requests {
        connection.exchange(&message)?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let count = requests as f64;
    Ok(((process::cpu_s(server.pid) - before) * 1e6 / count, count / seconds))
}

/// A connection that is kept for as long as the server keeps it; moto's ends with every answer.
struct Connection<'a> {
    server: &'a Server,
    stream: Option<BufReader<TcpStream>>,
}

impl Server {
    fn connect(&self) -> Connection<'_> {
        Connection { server: self, stream: None }
    }

    fn open(&self) -> Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect(&self.address).with_context(|| self.address.clone())?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(BufReader::new(stream))
    }

    /// A signed POST as bytes; it stays valid for 15 minutes.
    fn message(&self, body: &str) -> Result<Vec<u8>> {
        let now_s = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
        let headers: [(&str, &[u8]); 2] = [("host", self.address.as_bytes()), ("content-type", b"application/x-www-form-urlencoded")];
        let request = Request { method: "POST", path: "/", query: "", headers: &headers, body: body.as_bytes() };
        let signed = self.signer.sign(&request, now_s);
        let mut text = format!(
            "POST / HTTP/1.1\r\nhost: {}\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n",
            self.address,
            body.len()
        );
        for (name, value) in signed {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        Ok(format!("{text}\r\n{body}").into_bytes())
    }
}

impl Connection<'_> {
    /// One request and its answer's body.
    fn exchange(&mut self, message: &[u8]) -> Result<Vec<u8>> {
        let mut stream = self.stream.take().map_or_else(|| self.server.open(), Ok)?;
        stream.get_mut().write_all(message)?;
        let (mut line, mut length, mut kept) = (String::new(), None, true);
        loop {
            line.clear();
            if stream.read_line(&mut line)? == 0 {
                bail!("the server hung up");
            }
            if line == "\r\n" {
                break;
            }
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse::<usize>().ok(),
                "connection" => kept = !value.trim().eq_ignore_ascii_case("close"),
                _ => {}
            }
        }
        let mut body = vec![0; length.ok_or_else(|| anyhow!("an answer without a length"))?];
        stream.read_exact(&mut body)?;
        self.stream = kept.then_some(stream);
        Ok(body)
    }
}

/// moto in server mode; ends with this value.
struct Peer {
    child: Child,
    server: Server,
}

impl Peer {
    fn start(binary: &Path, signer: &Signer) -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(binary)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| binary.display().to_string())?;
        let server = Server { address: format!("127.0.0.1:{port}"), signer: signer.clone(), pid: i32::try_from(child.id())? };
        let mut peer = Self { child, server };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(&peer.server.address).is_err() {
            if peer.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("moto_server did not start");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
