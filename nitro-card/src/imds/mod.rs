//! The instance metadata service: what a guest reads at 169.254.169.254.
//!
//! The packet path hands the frames of guests to that address to one thread
//! here, which keeps a TCP [`stack`] per port that talks, answers by [`http`]
//! from the [`tree`] of the port's instance, and injects the replies into the
//! same port. A [`token`] proves itself, so a restart of the card forgets
//! nothing. The thread sleeps while no guest asks.

pub mod http;
pub mod stack;
pub mod token;
pub mod tree;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, after, bounded, never, select};
use dataplane::PortId;
use dataplane::packet::Packet;

use http::Context;
use stack::Stack;
use token::TokenKey;
use tree::Subject;

/// What the service knows, by port: replaced as a whole by the card.
pub type Subjects = HashMap<PortId, Arc<Subject>>;

/// Frames taken from the packet path before replies go out.
const BATCH: usize = 64;

/// The running service. Dropping it ends its thread.
pub struct Service {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Requests answered, by status class.
#[derive(Debug, Default)]
#[allow(missing_docs)] // the names say it
pub struct Counters {
    pub answered: AtomicU64,
    pub refused: AtomicU64,
}

impl Service {
    /// Serves the guests of every port in `subjects`; replies go to `inject`.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(
        punted: Receiver<(PortId, Packet)>,
        inject: impl Fn(PortId, &[u8]) + Send + 'static,
        subjects: Arc<ArcSwap<Subjects>>,
        key: TokenKey,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let (stop, stopped) = bounded(0);
        let mut worker = Worker { stacks: HashMap::new(), inject, subjects, key, counters, epoch: Instant::now() };
        let thread = std::thread::Builder::new().name("imds".into()).spawn(move || worker.run(&punted, &stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The thread sees the channel close.
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the metadata service had panicked");
        }
    }
}

struct Worker<I> {
    stacks: HashMap<PortId, Stack>,
    inject: I,
    subjects: Arc<ArcSwap<Subjects>>,
    key: TokenKey,
    counters: Arc<Counters>,
    epoch: Instant,
}

impl<I: Fn(PortId, &[u8])> Worker<I> {
    fn run(&mut self, punted: &Receiver<(PortId, Packet)>, stopped: &Receiver<()>) {
        loop {
            let now = self.epoch.elapsed();
            let next = self.stacks.values_mut().filter_map(|stack| stack.deadline(now)).min();
            let timer = next.map_or_else(never, |next| after(next.saturating_sub(now)));
            select! {
                recv(stopped) -> _ => return,
                recv(timer) -> _ => {}
                recv(punted) -> first => {
                    // The packet path has ended.
                    let Ok(first) = first else { return };
                    for (port, packet) in std::iter::once(first).chain(punted.try_iter().take(BATCH)) {
                        self.receive(port, packet.as_slice());
                    }
                }
            }
            self.poll();
        }
    }

    fn receive(&mut self, port: PortId, frame: &[u8]) {
        let now = self.epoch.elapsed();
        if !self.stacks.contains_key(&port) {
            let Some(seed) = random() else { return };
            self.stacks.insert(port, Stack::new(u64::from_ne_bytes(seed), now));
        }
        if let Some(stack) = self.stacks.get_mut(&port) {
            stack.receive(frame, now);
        }
    }

    fn poll(&mut self) {
        let subjects = self.subjects.load();
        let (key, inject, counters) = (&self.key, &self.inject, &self.counters);
        let now = self.epoch.elapsed();
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.stacks.retain(|port, stack| {
            let subject = subjects.get(port).map(AsRef::as_ref);
            let Some(nonce) = random() else { return true };
            let context = Context { subject, key, now_s, nonce };
            let answered = |status| {
                let counter = if status == 200 { &counters.answered } else { &counters.refused };
                counter.fetch_add(1, Ordering::Relaxed);
            };
            stack.poll(now, &context, answered, |frame| inject(*port, frame));
            stack.deadline(now).is_some()
        });
    }
}

fn random() -> Option<[u8; 8]> {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => Some(bytes),
        Err(error) => {
            tracing::error!(%error, "no random bytes");
            None
        }
    }
}
