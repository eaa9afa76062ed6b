//! The socket in the folder by which a running daemon is told something.
//!
//! `DIR/control` takes one JSON object in a line, `{"volume":"data","size_bytes":1073741824}`, and answers with one line:
//! `{"done":true}` or `{"error":"..."}`. Who may write into the folder may write to the socket.

use crate::volume_flag::VolumeFlag;
use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use storage_target::{Target, VolumeSpec};

/// A line of the control socket is shorter than this, in bytes.
const MAX_LINE: u64 = 4096;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a running daemon is asked.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    volume: String,
    size_bytes: u64,
}

/// And what it answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(bool),
    Error(String),
}

/// Asks the daemon of a folder to make a volume larger.
pub fn resize(dir: &Path, volume: &VolumeFlag) -> Result<()> {
    let path = dir.join("control");
    let mut stream = UnixStream::connect(&path).with_context(|| format!("no daemon serves {}: {}", dir.display(), path.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = Resize { volume: volume.name.clone(), size_bytes: volume.size_bytes };
    writeln!(stream, "{}", serde_json::to_string(&request)?)?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line).context("the daemon does not answer")?;
    match serde_json::from_str(&line).context("the daemon's answer")? {
        Answer::Done(_) => Ok(()),
        Answer::Error(error) => Err(anyhow!(error)),
    }
}

/// Takes requests on the socket, each in turn, until the process ends.
///
/// # Errors
/// When the socket cannot be made, or the process can have no more threads.
pub fn listen(dir: &Path, target: Arc<Target>) -> Result<()> {
    let path = dir.join("control");
    // The folder's lock is ours, so a socket that is there belongs to a process that died.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
    let serve = move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(stream, &target) {
                tracing::warn!(error = format!("{error:#}"), "control connection");
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(serve)?;
    Ok(())
}

fn answer(stream: UnixStream, target: &Target) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_LINE)).read_line(&mut line)?;
    let answer = match execute(&line, target) {
        Ok(()) => Answer::Done(true),
        Err(error) => Answer::Error(format!("{error:#}")),
    };
    writeln!(&stream, "{}", serde_json::to_string(&answer)?)?;
    Ok(())
}

fn execute(line: &str, target: &Target) -> Result<()> {
    let Resize { volume, size_bytes } = serde_json::from_str(line).context("the request")?;
    let there = target.volume_get(&volume).with_context(|| format!("no volume {volume} is served"))?.spec;
    target.volume_put(VolumeSpec { size_bytes, ..there })?;
    tracing::info!(volume, size_bytes, "resized");
    Ok(())
}
