//! Sleeping until one of several descriptors is readable.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// The descriptors to wait for; kept between calls so that waiting allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Waiter {
    fds: Vec<libc::pollfd>,
}

impl Waiter {
    pub(crate) fn clear(&mut self) {
        self.fds.clear();
    }

    /// Adds a descriptor. `None`, for a device without one, keeps its place and is
    /// never ready.
    pub(crate) fn push(&mut self, fd: Option<RawFd>) {
        self.fds.push(libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    }

    /// Waits until one is readable or `timeout` has passed, `None` for ever. A
    /// signal ends the wait early.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|timeout| libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let count = self.fds.len() as libc::nfds_t;
        // SAFETY: `fds` is an initialised vector of exactly `count` entries, borrowed
        // mutably for the call; `timeout` is null or points at a local that outlives
        // it; a null mask leaves the signal mask alone. A descriptor that was closed
        // meanwhile only yields POLLNVAL.
        let result = unsafe { libc::ppoll(self.fds.as_mut_ptr(), count, timeout, std::ptr::null()) };
        if result < 0 {
            let error = io::Error::last_os_error();
            self.fds.iter_mut().for_each(|fd| fd.revents = 0);
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether the descriptor added as the `index`-th has something: data, an error
    /// or a hang-up, all of which its owner finds out by reading.
    pub(crate) fn is_ready(&self, index: usize) -> bool {
        self.fds.get(index).is_some_and(|fd| fd.revents != 0)
    }
}
