//! `cardinal packet capture`: carries a pcapng stream into a file, block by block, and says at the end what it holds.
//!
//! Only whole blocks are written, so that a file that was cut off by Ctrl-C opens everywhere. The blocks are those of the
//! control plane's writer: of their content only the number of frames and of those that were lost is read here.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value};

use super::Capture;

const SECTION: u32 = 0x0a0d_0d0a;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
/// Type and length in front, length behind.
const FRAME: usize = 12;
/// The longest block taken: far more than any frame.
const BLOCK_MAX: usize = 1 << 20;
/// Where the count of lost frames stands in the body of a statistics block: after interface, time and the option's head.
const LOST: usize = 16;

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    frames: u64,
    lost: u64,
}

pub fn run(arguments: &Capture) -> Result<ExitCode> {
    let to_stdout = arguments.write == Path::new("-");
    if to_stdout && io::stdout().is_terminal() {
        bail!("pcapng is not for terminals: name a file with -w, or read it with | tcpdump -nr - or | wireshark -ki -");
    }
    let mut ask = Map::new();
    for (name, value) in [("card", &arguments.card), ("instance", &arguments.instance), ("port", &arguments.port)] {
        if let Some(value) = value {
            ask.insert(name.into(), value.clone().into());
        }
    }
    ask.insert("filter".into(), arguments.filter.clone().into());
    ask.insert("count".into(), arguments.count.into());
    ask.insert("seconds".into(), arguments.seconds.into());
    ask.insert("snap_length".into(), arguments.snaplen.into());
    let stream = arguments.operator.post("/packets/capture", &Value::Object(ask).to_string())?;
    if stream.status != 200 {
        let answer = stream.text()?;
        let error: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        bail!("{}", error.pointer("/error/message").and_then(Value::as_str).unwrap_or(answer.body.trim()));
    }
    let summary = if to_stdout {
        copy(stream, &mut io::stdout().lock())
    } else {
        let context = || format!("writing {}", arguments.write.display());
        copy(stream, &mut File::create(&arguments.write).with_context(context)?)
    };
    let Summary { frames, lost } = summary?;
    eprintln!("{frames} frames, {lost} lost because they were not read fast enough");
    Ok(ExitCode::SUCCESS)
}

/// Carries whole blocks until the stream ends.
fn copy(mut from: impl Read, to: &mut impl Write) -> Result<Summary> {
    let (mut summary, mut block, mut begun) = (Summary::default(), Vec::new(), false);
    loop {
        block.clear();
        if from.by_ref().take(8).read_to_end(&mut block).context("reading the capture")? == 0 {
            return Ok(summary);
        }
        if !begun && word(&block, 0) != Some(SECTION) {
            bail!("the control plane sent no pcapng");
        }
        begun = true;
        let length = word(&block, 4).and_then(|length| usize::try_from(length).ok());
        let length = length.filter(|length| (FRAME..=BLOCK_MAX).contains(length)).context("the control plane sent no pcapng")?;
        let rest = u64::try_from(length - 8)?;
        if from.by_ref().take(rest).read_to_end(&mut block).context("reading the capture")? < length - 8 {
            bail!("the capture was cut off after {} frames", summary.frames);
        }
        match word(&block, 0) {
            Some(PACKET) => summary.frames += 1,
            Some(STATISTICS) => summary.lost += u64::from(word(&block, 8 + LOST).unwrap_or(0)),
            _ => {}
        }
        // A pipe to a viewer wants each frame at once; whoever reads it may have seen enough.
        match to.write_all(&block).and_then(|()| to.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(summary),
            written => written.context("writing the capture")?,
        }
    }
}

fn word(block: &[u8], at: usize) -> Option<u32> {
    block.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(kind: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + FRAME).unwrap().to_le_bytes();
        [&kind.to_le_bytes()[..], &length, body, &length].concat()
    }

    #[test]
    fn whole_blocks_are_carried_and_counted() {
        let mut statistics = [0; 28];
        statistics[LOST] = 5;
        let stream = [block(SECTION, &[0; 16]), block(PACKET, &[1; 40]), block(PACKET, &[2; 40]), block(STATISTICS, &statistics)].concat();
        let mut file = Vec::new();
        assert_eq!(copy(&stream[..], &mut file).unwrap(), Summary { frames: 2, lost: 5 });
        assert_eq!(file, stream);
    }

    #[test]
    fn half_a_block_is_not_written() {
        let stream = [block(SECTION, &[0; 16]), block(PACKET, &[1; 40])].concat();
        let mut file = Vec::new();
        assert!(copy(&stream[..stream.len() - 1], &mut file).is_err());
        assert_eq!(file, block(SECTION, &[0; 16]));
        assert!(copy(&b"HTTP/1.1 200 OK"[..], &mut Vec::new()).is_err());
    }
}
