//! How a function of the card reaches its machine.
//!
//! The machine's process binds a Unix socket for each of its functions and takes one
//! connection at a time; the card connects. So a card that comes back is with its
//! guests at once, and does not wait until their machines look for it.
//!
//! ```text
//!   no file, nobody behind it, its queue is full ──► pause ──► look again
//!   connected ──► served until either side hangs up ──► pause ──► look again
//! ```
//!
//! The other side of the socket is not trusted:
//! - What is connected to is what was looked at: a socket, and no link to one that
//!   belongs to somebody else.
//! - Nothing here waits for longer than a pause, and a stop ends that at once.
//! - A side that hangs up again and again costs 100 connections a second.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The first pause.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest one: what an absent machine costs is four looks a second.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// A pause is this part of what was waited so far, so that a machine that appears
/// waits for the card a little longer than the card for it.
const PART: u32 = 16;
/// Counts as waited when a connection has ended.
const AFTER_CONNECTION: Duration = Duration::from_millis(160);

/// Connects to one machine's socket, again and again.
#[derive(Debug)]
pub struct Dialer {
    socket: PathBuf,
    /// Readable when stopped.
    stop: OwnedFd,
    stopped: AtomicBool,
    connected_before: AtomicBool,
}

impl Dialer {
    /// A dialer for the socket that a machine binds, or will bind, at `socket`.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn new(socket: PathBuf) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { socket, stop, stopped: AtomicBool::new(false), connected_before: AtomicBool::new(false) })
    }

    /// Waits until the socket is there and `connect` succeeds; `None` once stopped.
    ///
    /// `connect` takes a path that leads to the socket that was looked at.
    pub fn dial<T>(&self, mut connect: impl FnMut(&Path) -> io::Result<T>) -> Option<T> {
        let mut waited = Duration::ZERO;
        if self.connected_before.load(Ordering::Relaxed) {
            waited = AFTER_CONNECTION;
            self.pause(&mut waited);
        }
        let mut said = false;
        while !self.is_stopped() {
            match self.look().and_then(|socket| connect(Path::new(&format!("/proc/self/fd/{}", socket.as_raw_fd())))) {
                Ok(connection) => {
                    self.connected_before.store(true, Ordering::Relaxed);
                    return Some(connection);
                }
                Err(error) if is_absence(error.kind()) => {}
                Err(error) if std::mem::replace(&mut said, true) => tracing::debug!(%error, "machine's socket"),
                Err(error) => tracing::warn!(socket = %self.socket.display(), %error, "a machine's socket cannot be used"),
            }
            self.pause(&mut waited);
        }
        None
    }

    /// Ends [`Dialer::dial`], now and for ever.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // An eventfd takes eight bytes.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    /// Whether [`Dialer::stop`] was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Holds on to the socket file, whatever takes its name from now on.
    fn look(&self) -> io::Result<OwnedFd> {
        let file = rustix::fs::open(&self.socket, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::Socket => Ok(file),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "another kind of file is in its place")),
        }
    }

    fn pause(&self, waited: &mut Duration) {
        let pause = (*waited / PART).clamp(PAUSE_MIN, PAUSE_MAX);
        let timeout = Timespec { tv_sec: 0, tv_nsec: pause.subsec_nanos().into() };
        // A signal makes it shorter, which does no harm.
        let _ = poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&timeout));
        *waited = waited.saturating_add(pause);
    }
}

/// Connects without waiting for the other side, then makes the stream a waiting one.
///
/// # Errors
/// `WouldBlock` when the socket's queue is full; `ConnectionRefused` when nobody listens.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// What is to be expected while a machine is not there, or busy with an earlier connection.
fn is_absence(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;
    use std::thread::{JoinHandle, sleep, spawn};
    use std::time::Instant;

    use super::*;

    fn dialing(socket: PathBuf) -> (Arc<Dialer>, JoinHandle<Option<UnixStream>>) {
        let dialer = Arc::new(Dialer::new(socket).unwrap());
        let thread = spawn({
            let dialer = Arc::clone(&dialer);
            move || dialer.dial(connect)
        });
        (dialer, thread)
    }

    #[test]
    fn a_socket_is_found_when_it_appears_and_also_over_a_stale_one() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        drop(UnixListener::bind(&socket).unwrap());
        let (_dialer, thread) = dialing(socket.clone());
        sleep(Duration::from_millis(30));
        assert!(!thread.is_finished(), "nobody listens there");
        std::fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let _peer = listener.accept().unwrap();
        assert!(thread.join().unwrap().is_some());
    }

    #[test]
    fn a_link_to_another_socket_and_a_plain_file_are_not_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        let (other, socket) = (folder.path().join("other"), folder.path().join("s"));
        let listener = UnixListener::bind(&other).unwrap();
        listener.set_nonblocking(true).unwrap();
        for link in [true, false] {
            if link {
                std::os::unix::fs::symlink(&other, &socket).unwrap()
            } else {
                std::fs::write(&socket, b"x").unwrap()
            }
            let (dialer, thread) = dialing(socket.clone());
            sleep(Duration::from_millis(30));
            dialer.stop();
            assert!(thread.join().unwrap().is_none());
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            std::fs::remove_file(&socket).unwrap();
        }
    }

    #[test]
    fn a_peer_that_takes_no_connection_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = connect(&socket) {
            queue.push(stream);
        }
        let (dialer, thread) = dialing(socket);
        sleep(Duration::from_millis(30));
        let begun = Instant::now();
        dialer.stop();
        assert!(thread.join().unwrap().is_none());
        assert!(begun.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_peer_that_hangs_up_again_and_again_is_not_dialled_in_a_rush() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let dialer = Dialer::new(socket).unwrap();
        let begun = Instant::now();
        (0..6).for_each(|_| drop(dialer.dial(connect)));
        assert!(begun.elapsed() >= Duration::from_millis(50), "{:?}", begun.elapsed());
    }
}
