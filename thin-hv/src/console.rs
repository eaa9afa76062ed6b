//! Console bytes of one machine on their way to the card.
//!
//! A machine never waits for its console: when the card is away and the ring is
//! full, the oldest bytes are dropped and counted. The card keeps the record;
//! this is only the buffer between two processes.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes kept while nobody takes them.
pub const CAPACITY_BYTES: usize = 64 * 1024;

/// Filled by the thread that reads the machine, emptied by the host.
#[derive(Debug, Default)]
pub struct Console {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Console {
    /// Appends output; true when the console was empty before, so that one
    /// notice per emptying is enough.
    pub fn push(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(bytes);
        let excess = state.bytes.len().saturating_sub(CAPACITY_BYTES);
        state.bytes.drain(..excess);
        state.dropped += excess as u64;
        was_empty && !bytes.is_empty()
    }

    /// Takes the oldest bytes, at most `limit` of them; empty when there are none.
    pub fn take(&self, limit: usize) -> Vec<u8> {
        let mut state = self.lock();
        let count = state.bytes.len().min(limit);
        state.bytes.drain(..count).collect()
    }

    /// Bytes dropped so far because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Bytes and a number: a panic elsewhere leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_taken_in_order_and_announced_once() {
        let console = Console::default();
        assert!(console.push(b"ab"));
        assert!(!console.push(b"cd"));
        assert_eq!(console.take(3), b"abc");
        assert_eq!(console.take(3), b"d");
        assert!(console.take(3).is_empty());
        assert!(console.push(b"e"));
    }

    #[test]
    fn the_newest_bytes_survive_a_flood() {
        let console = Console::default();
        console.push(&vec![b'x'; CAPACITY_BYTES]);
        console.push(b"end");
        assert_eq!(console.dropped(), 3);
        let kept = console.take(usize::MAX);
        assert_eq!((kept.len(), &kept[kept.len() - 3..]), (CAPACITY_BYTES, b"end".as_slice()));
    }
}
