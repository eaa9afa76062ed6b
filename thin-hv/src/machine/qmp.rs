//! QEMU's monitor protocol (QMP), over a pair of FIFOs that outlive an agent.
//!
//! One JSON object a line in both directions. The session never ends while
//! QEMU lives, so a new agent continues the one that it finds:
//! - A command is one write of at most PIPE_BUF bytes: it is in the FIFO whole
//!   or not at all, whenever its writer is killed.
//! - A reply carries the tag of its command and the name of the agent that
//!   sent it; replies to a dead agent are ignored.
//! - The first line read may be the rest of one that a dead agent had begun.

use rustix::pipe::PIPE_BUF;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Write};

/// Longest line taken from QEMU; its longest reply here is `query-pci`.
const LINE_MAX: usize = 1024 * 1024;

/// The sending half, usable by several threads.
pub(super) struct Commands {
    fifo: File,
    agent: String,
}

impl Commands {
    /// `agent` tells this agent's commands from those of earlier ones.
    pub(super) fn new(fifo: File, agent: u64) -> Self {
        Self { fifo, agent: format!("{agent:x}") }
    }

    /// Sends a command; its reply will carry `tag`.
    pub(super) fn send(&self, tag: &str, execute: &str, arguments: Value) {
        let command = json!({ "execute": execute, "arguments": arguments, "id": format!("{} {tag}", self.agent) });
        if let Err(error) = self.write(format!("{command}\n").as_bytes()) {
            tracing::error!(execute, tag, %error, "QMP command not sent");
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        if PIPE_BUF < line.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than PIPE_BUF"));
        }
        (&self.fifo).write_all(line)
    }

    /// Reads one line from QEMU; `None` for what this agent did not ask for.
    pub(super) fn parse(&self, line: &[u8]) -> Option<Message> {
        let mut value: Value = serde_json::from_slice(line).ok()?;
        if let Some(name) = value.get("event").and_then(Value::as_str) {
            return Some(Message::Event { name: name.to_owned(), data: value.get_mut("data").map(Value::take).unwrap_or_default() });
        }
        let tag = value.get("id")?.as_str()?.strip_prefix(&self.agent)?.strip_prefix(' ')?.to_owned();
        let result = match value.get_mut("return") {
            Some(result) => Ok(result.take()),
            None => Err(value.pointer("/error/desc").and_then(Value::as_str).unwrap_or("error without a description").to_owned()),
        };
        Some(Message::Reply { tag, result })
    }
}

/// What QEMU says.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// The answer to a command of this agent.
    Reply { tag: String, result: Result<Value, String> },
    /// Something happened.
    Event { name: String, data: Value },
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    /// Appends bytes and returns the lines that are complete now.
    ///
    /// # Errors
    /// A line over [`LINE_MAX`]: whoever writes that is broken.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.buffer.extend(bytes);
        let mut lines: Vec<Vec<u8>> = self.buffer.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        self.buffer = lines.pop().unwrap_or_default();
        if LINE_MAX < self.buffer.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an endless line"));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn commands() -> Commands {
        Commands::new(File::open("/dev/null").unwrap(), 0xab)
    }

    #[test]
    fn replies_to_this_agent_are_told_from_those_to_a_dead_one() {
        let parse = |line: &str| commands().parse(line.as_bytes());
        assert_eq!(
            parse(r#"{"return": {"status": "running"}, "id": "ab status"}"#),
            Some(Message::Reply { tag: "status".into(), result: Ok(json!({"status": "running"})) })
        );
        assert_eq!(
            parse(r#"{"error": {"class": "GenericError", "desc": "no"}, "id": "ab plug eni-1"}"#),
            Some(Message::Reply { tag: "plug eni-1".into(), result: Err("no".into()) })
        );
        assert_eq!(parse(r#"{"return": {}, "id": "abc status"}"#), None);
        assert_eq!(parse(r#"{"return": {}}"#), None);
        assert_eq!(parse(r#"{"QMP": {"version": {}}}"#), None);
        assert_eq!(parse(r#"atus": "running"}, "id": "ab status"}"#), None);
        assert_eq!(
            parse(r#"{"event": "DEVICE_DELETED", "data": {"device": "f-1"}, "timestamp": {}}"#),
            Some(Message::Event { name: "DEVICE_DELETED".into(), data: json!({"device": "f-1"}) })
        );
    }

    #[test]
    fn lines_are_cut_wherever_the_reads_fall() {
        let mut lines = Lines::default();
        assert!(lines.push(b"ab").unwrap().is_empty());
        assert_eq!(lines.push(b"c\nd\n\ne").unwrap(), [b"abc".to_vec(), b"d".to_vec(), b"".to_vec()]);
        assert_eq!(lines.push(b"\n").unwrap(), [b"e".to_vec()]);
        assert!(lines.push(&vec![b'x'; LINE_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in proptest::collection::vec(any::<u8>(), 0..100), text in ".*") {
            commands().parse(&line);
            commands().parse(text.as_bytes());
        }
    }
}
