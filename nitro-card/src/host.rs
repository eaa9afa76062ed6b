//! The link to the thin host under the card, over the mailbox.
//!
//! Three threads: one waits for the host to connect, and per link one reads and
//! one writes. The newest link is the host; an older one is dead by then, and
//! what it still says is told with its number, so that it can be ignored.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use card_proto::host::{ToCard, ToHost, to_card, to_host};
use card_proto::mailbox::{Listener, MailboxError, Receiver, Sender};
use crossbeam_channel as channel;

use crate::console::Consoles;
use crate::object::Id;

/// Messages on their way to a host that does not read; then the link is given up.
const BACKLOG: usize = 4096;
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What the card says to the host.
pub trait Host: Send {
    /// Queues a command.
    ///
    /// # Errors
    /// [`HostGone`]: the link is down or to be given up. After the next connect
    /// everything is said again.
    fn send(&self, command: to_host::Command) -> Result<(), HostGone>;
}

/// The host does not take commands any more.
#[derive(Debug, thiserror::Error)]
#[error("the host is gone or does not read")]
pub struct HostGone;

/// What the link says to the card.
pub enum HostEvent {
    /// A host is there.
    Connected(Box<dyn Host>),
    /// It is not any more.
    Disconnected,
    /// It said something; console bytes go to the consoles instead.
    Report(to_card::Report),
}

/// Links that ended, by reason.
#[derive(Debug, Default)]
#[allow(missing_docs)] // the names say it
pub struct LinkCounters {
    pub connected: AtomicU64,
    pub ended: AtomicU64,
    pub ended_garbage: AtomicU64,
}

/// The card's end of the slot; dropping it ends the listening, not the links.
pub struct Slot {
    listener: Arc<Listener>,
    thread: Option<JoinHandle<()>>,
}

impl Slot {
    /// Listens in the slot; `tell` takes the number of the link and what happened.
    ///
    /// # Errors
    /// When the socket or a thread cannot be made.
    pub fn listen(
        socket: &Path,
        consoles: Arc<Consoles>,
        counters: Arc<LinkCounters>,
        tell: impl Fn(u64, HostEvent) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let listener = Arc::new(Listener::bind(socket)?);
        let accepting = listener.clone();
        let accept = move || {
            for number in 1.. {
                match accepting.accept() {
                    Ok(link) => {
                        let (sender, receiver) = link.split();
                        counters.connected.fetch_add(1, Ordering::Relaxed);
                        let (consoles, counters, tell) = (consoles.clone(), counters.clone(), tell.clone());
                        if let Err(error) = spawn(number, sender, receiver, consoles, counters, tell) {
                            tracing::error!(%error, "no thread for the host's link");
                        }
                    }
                    Err(MailboxError::Closed) => return,
                    Err(error) => {
                        tracing::warn!(%error, "a host could not connect");
                        std::thread::sleep(ACCEPT_RETRY);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("host-accept".into()).spawn(accept)?;
        Ok(Self { listener, thread: Some(thread) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.listener.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that waits for the host had panicked");
        }
    }
}

fn spawn(
    number: u64,
    mut sender: Sender,
    mut receiver: Receiver,
    consoles: Arc<Consoles>,
    counters: Arc<LinkCounters>,
    tell: impl Fn(u64, HostEvent) + Send + 'static,
) -> io::Result<()> {
    let (commands, queue) = channel::bounded::<to_host::Command>(BACKLOG);
    let write = move || {
        // The queue ends when the card has a newer link, or gave this one up.
        for command in queue {
            match sender.send(&ToHost { command: Some(command) }) {
                Ok(()) => {}
                Err(MailboxError::TooLarge(bytes)) => tracing::error!(bytes, "a command is too large for the mailbox"),
                Err(_) => break,
            }
        }
        sender.hang_up();
    };
    std::thread::Builder::new().name("host-write".into()).spawn(write)?;
    let read = move || {
        tell(number, HostEvent::Connected(Box::new(Link { commands })));
        tracing::info!(link = number, "the host is connected");
        let error = loop {
            match receiver.recv::<ToCard>(None) {
                Ok(Some(ToCard { report: Some(to_card::Report::Console(output)) })) => {
                    let Some(id) = Id::parse(&output.id) else { continue };
                    if let Err(error) = consoles.append(&id, &output.data) {
                        tracing::error!(instance = %id, %error, "console bytes are not kept");
                    }
                }
                Ok(Some(ToCard { report: Some(report) })) => tell(number, HostEvent::Report(report)),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        counters.ended.fetch_add(1, Ordering::Relaxed);
        if matches!(error, MailboxError::Garbage(_)) {
            counters.ended_garbage.fetch_add(1, Ordering::Relaxed);
        }
        tracing::warn!(link = number, reason = error.reason(), "the host's link ended");
        tell(number, HostEvent::Disconnected);
    };
    std::thread::Builder::new().name("host-read".into()).spawn(read).map(drop)
}

struct Link {
    commands: channel::Sender<to_host::Command>,
}

impl Host for Link {
    fn send(&self, command: to_host::Command) -> Result<(), HostGone> {
        self.commands.try_send(command).map_err(|_| HostGone)
    }
}
