//! How a shard waits: sockets that spoke last first, then all of them, awake or asleep.
//!
//! A host with a deep queue answers each burst with the next, so reading its socket again is mostly worth more
//! than asking epoll whether to. At depth 1 the answer takes a few microseconds, and a sleep would cost as much
//! again: while answers are quick the thread spins for up to [`SPIN`]. Whether they are is learned from sleeps:
//! [`QUICK`] in a row that a spin would have caught start it, one spin in vain ends it. An idle target therefore
//! sleeps, and a shared core is not fought for.

use super::*;

/// How long a spin lasts.
const SPIN: Duration = Duration::from_micros(50);
/// So many sleeps shorter than that, one after the other, let the thread spin.
const QUICK: u32 = 8;
/// Turns by which sockets that spoke last may get ahead of all others.
const HOT_TURNS: u32 = 8;
/// Sockets that are read again without asking.
const MAX_HOT: usize = 8;
/// Reads in vain between two questions to epoll while spinning.
const SPINS: u32 = 32;

/// What was learned about waiting.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// Sleeps in a row that were shorter than a spin.
    quick: u32,
    /// Turns since epoll was asked.
    turns: u32,
}

impl Shard {
    /// Waits for something to do, and receives it.
    pub(super) fn wait(&mut self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        let hot = std::mem::take(&mut self.hot);
        self.now = self.start.elapsed();
        if !hot.is_empty() && self.patience.turns < HOT_TURNS && self.receive_hot(&hot) {
            self.patience.turns += 1;
            return Ok(());
        }
        self.patience.turns = 0;
        if !hot.is_empty() && self.patience.quick >= QUICK && self.throttled == 0 {
            if self.spin(&hot, events)? {
                return Ok(());
            }
            self.patience.quick = 0;
        }
        let timeout = self.timeout();
        let before = self.start.elapsed();
        self.ask(events, timeout)?;
        let slept = self.now.saturating_sub(before);
        let quick = !events.is_empty() && slept < SPIN;
        self.patience.quick = if quick { self.patience.quick.saturating_add(1) } else { 0 };
        Ok(())
    }

    /// Reads the sockets that spoke last; whether any of them did again.
    fn receive_hot(&mut self, hot: &[usize]) -> bool {
        let mut any = false;
        for key in hot {
            if self.receive(*key) {
                self.warm(*key);
                any = true;
            }
        }
        any
    }

    /// Waits awake; whether anything came.
    fn spin(&mut self, hot: &[usize], events: &mut Vec<epoll::Event>) -> io::Result<bool> {
        let end = self.start.elapsed() + SPIN;
        let mut spins = 0;
        while self.now < end {
            if self.receive_hot(hot) {
                return Ok(true);
            }
            spins += 1;
            if spins % SPINS == 0 {
                self.ask(events, Some(Duration::ZERO))?;
                if !events.is_empty() {
                    return Ok(true);
                }
            }
            self.now = self.start.elapsed();
        }
        Ok(false)
    }

    /// Asks epoll, and receives what it names.
    fn ask(&mut self, events: &mut Vec<epoll::Event>, timeout: Option<Duration>) -> io::Result<()> {
        let timeout =
            timeout.map(|wait| Timespec { tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: wait.subsec_nanos().into() });
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.now = self.start.elapsed();
        for event in events.iter() {
            match event.data.u64() {
                WAKE => self.wake.clear(),
                DEVICE => {}
                LISTENER => self.accept(),
                key => {
                    let key = crate::bytes::narrow(key);
                    if self.receive(key) {
                        self.warm(key);
                    } else {
                        // The socket has room again for what waits to be sent.
                        self.touched.push(key);
                    }
                }
            }
        }
        Ok(())
    }

    fn warm(&mut self, key: usize) {
        if self.hot.len() < MAX_HOT {
            self.hot.push(key);
        }
    }

    /// How long the next turn may sleep.
    fn timeout(&mut self) -> Option<Duration> {
        let now = self.start.elapsed();
        let scans = self.accept_paused || !self.connections.is_empty();
        let scan = scans.then(|| self.next_scan.saturating_sub(now));
        if self.throttled == 0 {
            return scan;
        }
        let limits = self.volumes.iter_mut().filter_map(|(_, served)| {
            let (_, _, cost) = served.throttled.front()?;
            Some(served.qos.wait(now, *cost))
        });
        limits.min().into_iter().chain(scan).min()
    }
}
