//! How a command of this machine reaches public addresses of a region: through its
//! internet's network namespace, or through the proxy of a region without root.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::region;

/// The longest answer of the proxy.
const HEAD_MAX: usize = 4096;

/// An ssh that speaks from the internet side of the region that `ready` describes.
pub fn ssh(dir: &Path, ready: &Value) -> Command {
    if let Some(namespace) = ready["internet_namespace"].as_str() {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, "ssh"]);
        return command;
    }
    let mut command = Command::new("ssh");
    let rack = std::env::current_exe().unwrap_or_else(|_| "rack".into());
    let proxy = format!("ProxyCommand={} connect --dir {} %h %p", quoted(&rack), quoted(dir));
    command.args(["-o", &proxy]);
    command
}

/// `cargo rack connect`.
pub fn run(dir: &Path, address: Ipv4Addr, port: u16) -> Result<ExitCode> {
    let ready = region::ready(dir)?;
    let proxy = ready["internet_proxy"].as_str().ok_or_else(|| anyhow!("this region has an internet namespace; use cargo rack exec"))?;
    let mut stream = TcpStream::connect(proxy).with_context(|| format!("the internet of this region at {proxy}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("CONNECT {address}:{port} HTTP/1.1\r\nHost: {address}:{port}\r\n\r\n").as_bytes())?;
    let mut head = Vec::new();
    let mut byte = [0];
    // Byte by byte: what follows the head is the other side's.
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).context("the internet of this region hung up")?;
        head.extend(byte);
        if HEAD_MAX < head.len() {
            bail!("{proxy} does not answer as a proxy does");
        }
    }
    let head = String::from_utf8_lossy(&head);
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        bail!("{address} port {port}: {}", head.lines().next().unwrap_or_default());
    }
    let mut out = stream.try_clone()?;
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut out);
        let _ = out.shutdown(Shutdown::Write);
    });
    let mut stdout = std::io::stdout().lock();
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let count = stream.read(&mut bytes)?;
        let Some(chunk) = bytes.get(..count).filter(|chunk| !chunk.is_empty()) else { return Ok(ExitCode::SUCCESS) };
        stdout.write_all(chunk)?;
        stdout.flush()?;
    }
}

/// A path as one word of the shell that ssh runs its ProxyCommand with, in which
/// ssh itself would replace `%`.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_one_word() {
        assert_eq!(quoted(Path::new("/a b/it's 5%")), "'/a b/it'\\''s 5%%'");
    }
}
