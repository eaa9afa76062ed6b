//! The newest 64 KiB that each guest wrote to its console, on the card's disk.
//!
//! One file per instance in `console/`, written as the bytes come, so that they
//! survive a restart of the card:
//!
//! ```text
//! | bytes written since the beginning (64, little-endian) | Unix time of the last, s (64) | ring of 65536 bytes |
//! ```
//!
//! The byte number n of a console stands at n modulo 65536 of the ring. A crash
//! between ring and header costs the bytes of one write.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::broadcast;

use crate::object::Id;

/// How many bytes of a console are kept.
pub const RING_BYTES: u64 = 64 * 1024;

const HEADER_BYTES: u64 = 16;
/// Pieces that a live reader may lag behind before it loses some.
const LIVE_BACKLOG: usize = 256;

/// The consoles of a card. Shared by the thread that hears the host and the API.
pub struct Consoles {
    folder: PathBuf,
    open: Mutex<HashMap<Id, Console>>,
}

struct Console {
    file: File,
    written: u64,
    live: broadcast::Sender<Arc<[u8]>>,
}

/// What a console holds.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub struct Output {
    pub bytes: Vec<u8>,
    pub timestamp_s: u64,
}

impl Consoles {
    /// The consoles kept in `state_dir`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(state_dir: &Path) -> io::Result<Self> {
        let folder = state_dir.join("console");
        fs::create_dir_all(&folder)?;
        Ok(Self { folder, open: Mutex::new(HashMap::new()) })
    }

    /// Makes room for an instance's console, or goes on with the one that is there.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(&self, id: &Id) -> io::Result<()> {
        let mut open = self.lock();
        if !open.contains_key(id) {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(self.path(id))?;
            let (written, _) = header(&file)?;
            open.insert(id.clone(), Console { file, written, live: broadcast::channel(LIVE_BACKLOG).0 });
        }
        Ok(())
    }

    /// Removes an instance's console.
    ///
    /// # Errors
    /// What the file system says, except that there was none.
    pub fn remove(&self, id: &Id) -> io::Result<()> {
        let mut open = self.lock();
        open.remove(id);
        remove_file(&self.path(id))
    }

    /// Takes bytes of a guest. Those of an unknown instance are dropped.
    ///
    /// # Errors
    /// What the file system says; live readers have them all the same.
    pub fn append(&self, id: &Id, bytes: &[u8]) -> io::Result<()> {
        let mut open = self.lock();
        let Some(console) = open.get_mut(id) else { return Ok(()) };
        if console.live.receiver_count() > 0 {
            // Nobody left to read is no error.
            let _ = console.live.send(bytes.into());
        }
        console.write(bytes)
    }

    /// What an instance wrote last, if it has a console.
    ///
    /// # Errors
    /// What the file system says.
    pub fn output(&self, id: &Id) -> io::Result<Option<Output>> {
        self.lock().get(id).map(Console::read).transpose()
    }

    /// What an instance writes from now on, if it has a console.
    #[must_use]
    pub fn subscribe(&self, id: &Id) -> Option<broadcast::Receiver<Arc<[u8]>>> {
        self.lock().get(id).map(|console| console.live.subscribe())
    }

    fn path(&self, id: &Id) -> PathBuf {
        self.folder.join(id.as_str())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Id, Console>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let skipped = bytes.len().saturating_sub(usize::try_from(RING_BYTES).unwrap_or(usize::MAX));
        self.written = self.written.wrapping_add(skipped as u64);
        let mut rest = bytes.get(skipped..).unwrap_or_default();
        while !rest.is_empty() {
            let at = self.written % RING_BYTES;
            let count = rest.len().min(usize::try_from(RING_BYTES - at).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(count);
            self.file.write_all_at(now, HEADER_BYTES + at)?;
            self.written = self.written.wrapping_add(count as u64);
            rest = later;
        }
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.file.write_all_at(&[self.written.to_le_bytes(), now_s.to_le_bytes()].concat(), 0)
    }

    fn read(&self) -> io::Result<Output> {
        let (_, timestamp_s) = header(&self.file)?;
        let length = self.written.min(RING_BYTES);
        let mut bytes = Vec::new();
        let mut from = self.written - length;
        while from < self.written {
            let at = from % RING_BYTES;
            let count = (self.written - from).min(RING_BYTES - at);
            let mut piece = vec![0; usize::try_from(count).map_err(io::Error::other)?];
            self.file.read_exact_at(&mut piece, HEADER_BYTES + at)?;
            bytes.extend(piece);
            from += count;
        }
        Ok(Output { bytes, timestamp_s })
    }
}

fn header(file: &File) -> io::Result<(u64, u64)> {
    let (mut written, mut time) = ([0; 8], [0; 8]);
    match file.read_exact_at(&mut written, 0).and_then(|()| file.read_exact_at(&mut time, 8)) {
        // A new file.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok((0, 0)),
        read => read.map(|()| (u64::from_le_bytes(written), u64::from_le_bytes(time))),
    }
}

/// Removes a file that may not be there.
///
/// # Errors
/// What the file system says otherwise.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    fn id() -> Id {
        Id::parse("i-1").unwrap()
    }

    #[test]
    fn the_newest_bytes_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let consoles = Consoles::new(folder.path()).unwrap();
        consoles.append(&id(), b"nobody").unwrap();
        assert_eq!(consoles.output(&id()).unwrap(), None);
        consoles.open(&id()).unwrap();
        assert_eq!(consoles.output(&id()).unwrap().unwrap().bytes, b"");
        let mut all = Vec::new();
        for round in 0..5000_u32 {
            let line = format!("{round}: a line of the kernel\n");
            consoles.append(&id(), line.as_bytes()).unwrap();
            all.extend(line.into_bytes());
        }
        let kept = &all[all.len() - RING_BYTES as usize..];
        assert_eq!(consoles.output(&id()).unwrap().unwrap().bytes, kept);
        drop(consoles);
        let consoles = Consoles::new(folder.path()).unwrap();
        consoles.open(&id()).unwrap();
        assert_eq!(consoles.output(&id()).unwrap().unwrap().bytes, kept);
        consoles.append(&id(), &[b'x'; 3 * RING_BYTES as usize + 7]).unwrap();
        assert_eq!(consoles.output(&id()).unwrap().unwrap().bytes, [b'x'; RING_BYTES as usize]);
        consoles.remove(&id()).unwrap();
        assert!(fs::read_dir(folder.path().join("console")).unwrap().next().is_none());
    }

    #[test]
    fn live_readers_get_what_comes() {
        let folder = tempfile::tempdir().unwrap();
        let consoles = Consoles::new(folder.path()).unwrap();
        assert!(consoles.subscribe(&id()).is_none());
        consoles.open(&id()).unwrap();
        let mut live = consoles.subscribe(&id()).unwrap();
        consoles.append(&id(), b"hello").unwrap();
        assert_eq!(&*live.try_recv().unwrap(), b"hello");
        consoles.remove(&id()).unwrap();
        assert!(live.try_recv().is_err());
    }
}
