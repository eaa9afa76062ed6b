//! The card as one thread: it owns the [`Core`], the [`Store`] and the
//! [`Devices`], and everybody else sends it messages.
//!
//! A round takes what has come, makes it durable with one sync, answers, lets
//! the core decide, and does what the core says. An answer to control therefore
//! means that the wish survives a power cut, not that it is fulfilled.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use card_proto::card::{Hello, PutRequest};
use card_proto::host::{self, to_host};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use tokio::sync::oneshot;

use crate::converge::{Config, Core, Event, Output, Summary, Work};
use crate::desired::{Loaded, Refusal, Store};
use crate::devices::{Devices, Parts};
use crate::host::{Host, HostEvent};
use crate::imds::Subjects;
use crate::object::{Id, Key, Object};
use crate::watch::{Hub, Watcher};

/// Messages that wait for the card's thread; more are refused.
const QUEUE: usize = 4096;
/// Messages taken before the core decides.
const ROUND: usize = 256;

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

enum Message {
    Put { object: Box<Object>, request: Box<PutRequest>, reply: Reply<()> },
    Delete { key: Key, generation: u64, epoch: u64, reply: Reply<()> },
    Watch { epoch: u64, reply: Reply<Arc<Watcher>> },
    ConsoleInput { id: Id, data: Vec<u8> },
    Host { link: u64, event: HostEvent },
    Done { key: Key, result: Result<(), String> },
    Summary { reply: oneshot::Sender<Summary> },
    Stop,
}

/// Speaks to the card's thread.
#[derive(Clone)]
pub struct Handle(Sender<Message>);

/// The messages for a card that does not run yet.
pub struct Inbox(Receiver<Message>);

/// Makes both ends, so that what the card needs can already speak to it.
#[must_use]
pub fn channel() -> (Handle, Inbox) {
    let (sender, receiver) = bounded(QUEUE);
    (Handle(sender), Inbox(receiver))
}

impl Handle {
    /// Desires an object.
    ///
    /// # Errors
    /// [`Refusal`]; after `Ok` the wish is durable.
    pub async fn put(&self, object: Object, request: PutRequest) -> Result<(), Refusal> {
        self.ask(|reply| Message::Put { object: Box::new(object), request: Box::new(request), reply }).await
    }

    /// Desires an object no more.
    ///
    /// # Errors
    /// [`Refusal`]; after `Ok` the wish is durable.
    pub async fn delete(&self, key: Key, generation: u64, epoch: u64) -> Result<(), Refusal> {
        self.ask(|reply| Message::Delete { key, generation, epoch, reply }).await
    }

    /// Begins to watch.
    ///
    /// # Errors
    /// [`Refusal::Epoch`] for a control node that was superseded.
    pub async fn watch(&self, epoch: u64) -> Result<Arc<Watcher>, Refusal> {
        self.ask(|reply| Message::Watch { epoch, reply }).await
    }

    /// Sends what a tenant types to a guest's console; dropped when the host is away.
    pub fn console_input(&self, id: Id, data: Vec<u8>) {
        // A console under such load loses keys, as a serial line does.
        let _ = self.0.try_send(Message::ConsoleInput { id, data });
    }

    /// Sizes of the card's world; `None` when its thread is gone.
    pub async fn summary(&self) -> Option<Summary> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send(Message::Summary { reply }).ok()?;
        answer.await.ok()
    }

    /// Tells the card what the host's link says; waits while the card is busy.
    pub fn host(&self, link: u64, event: HostEvent) {
        // The card may have stopped.
        let _ = self.0.send(Message::Host { link, event });
    }

    /// Ends the card's thread. Disks are flushed; guests and desired state stay.
    pub fn stop(&self) {
        let _ = self.0.send(Message::Stop);
    }

    async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send(message(reply)).map_err(|error| match error {
            TrySendError::Full(_) => Refusal::Busy,
            TrySendError::Disconnected(_) => Refusal::Stopping,
        })?;
        answer.await.map_err(|_| Refusal::Stopping)?
    }
}

/// What a card is made of.
pub struct Card {
    core: Core,
    store: Store,
    devices: Devices,
    parts: Parts,
    hub: Hub,
    subjects: Arc<ArcSwap<Subjects>>,
    /// The host, and the number of its link.
    host: Option<(u64, Box<dyn Host>)>,
    epoch: Instant,
    /// Events that are durable when the round's sync is done, and who waits for them.
    events: Vec<Event>,
    replies: Vec<Reply<()>>,
}

impl Card {
    /// A card that begins with what its store holds.
    ///
    /// # Errors
    /// When a thread or a console cannot be made.
    pub fn new(
        store: (Store, Loaded),
        config: Config,
        hello: Hello,
        parts: Parts,
        subjects: Arc<ArcSwap<Subjects>>,
        handle: Handle,
    ) -> io::Result<Self> {
        let (store, loaded) = store;
        let mut events = Vec::new();
        for (object, deleted) in loaded.objects {
            if let Object::Instance(instance) = &object {
                // The guest may be speaking already.
                parts.consoles.open(&instance.id)?;
            }
            events.push(match deleted {
                None => Event::Put(object),
                Some(generation) => Event::Deleted { key: object.key(), generation, object: Some(object) },
            });
        }
        tracing::info!(objects = events.len(), complete = loaded.complete, "the desired state is read");
        let core = Core::new(Config { store_complete: loaded.complete, ..config });
        // It waits while the card is busy.
        let report = move |key, result| drop(handle.0.send(Message::Done { key, result }));
        let devices = Devices::new(parts.clone(), report)?;
        let hub = Hub::new(hello);
        Ok(Self { core, store, devices, parts, hub, subjects, host: None, epoch: Instant::now(), events, replies: Vec::new() })
    }

    /// Runs the card in a thread of its own until [`Handle::stop`].
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(mut self, inbox: Inbox) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name("card".into()).spawn(move || {
            self.settle();
            while self.round(&inbox.0) {}
        })
    }

    /// One round; false at the end.
    fn round(&mut self, inbox: &Receiver<Message>) -> bool {
        let now = self.now();
        let first = match self.core.deadline(now) {
            Some(at) => match inbox.recv_timeout(at.saturating_sub(now)) {
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return false,
                Ok(message) => Some(message),
            },
            None => match inbox.recv() {
                Ok(message) => Some(message),
                Err(_) => return false,
            },
        };
        for message in first.into_iter().chain(inbox.try_iter().take(ROUND)) {
            if matches!(message, Message::Stop) {
                return false;
            }
            self.take(message);
        }
        self.settle();
        true
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Put { object, request, reply } => self.put(*object, *request, reply),
            Message::Delete { key, generation, epoch, reply } => self.delete(key, generation, epoch, reply),
            Message::Watch { epoch, reply } => {
                let admitted = self.store.admit_epoch(epoch).and_then(|()| Ok(self.store.commit()?));
                let _ = reply.send(admitted.map(|()| self.hub.watch()));
            }
            Message::ConsoleInput { id, data } => {
                let input = host::ConsoleInput { id: id.to_string(), data };
                self.say(to_host::Command::Console(input));
            }
            Message::Host { link, event } => self.hear(link, event),
            Message::Done { key, result } => self.done(key, result),
            Message::Summary { reply } => drop(reply.send(self.core.summary())),
            Message::Stop => {}
        }
    }

    fn put(&mut self, object: Object, request: PutRequest, reply: Reply<()>) {
        let key = object.key();
        if !self.has_role(&object) {
            return drop(reply.send(Err(Refusal::Role)));
        }
        match self.store.put(&key, object.generation(), request, SystemTime::now()) {
            Ok(changed) => {
                tracing::info!(object = %key, generation = object.generation(), changed, "put");
                self.events.extend(changed.then_some(Event::Put(object)));
                self.replies.push(reply);
            }
            Err(refusal) => refuse(&key, refusal, reply),
        }
    }

    fn delete(&mut self, key: Key, generation: u64, epoch: u64, reply: Reply<()>) {
        match self.store.delete(&key, generation, epoch, SystemTime::now()) {
            Ok(known) => {
                tracing::info!(object = %key, generation, known, "delete");
                self.events.push(Event::Deleted { key, generation, object: None });
                self.replies.push(reply);
            }
            Err(refusal) => refuse(&key, refusal, reply),
        }
    }

    fn has_role(&self, object: &Object) -> bool {
        match object {
            Object::Volume(_) => self.parts.target.is_some(),
            _ => self.parts.dataplane.is_some(),
        }
    }

    fn hear(&mut self, link: u64, event: HostEvent) {
        let current = self.host.as_ref().map(|(number, _)| *number);
        match event {
            // Threads of two links may tell in any order; the newer link counts.
            HostEvent::Connected(host) if current.is_none_or(|current| current < link) => {
                self.host = Some((link, host));
                self.events.push(Event::HostConnected);
            }
            HostEvent::Report(report) if current == Some(link) => self.events.push(Event::HostReport(report)),
            HostEvent::Disconnected if current == Some(link) => {
                self.host = None;
                self.events.push(Event::HostDisconnected);
            }
            _ => {}
        }
    }

    /// Makes the round durable, answers, decides and acts, until nothing is left to do at once.
    fn settle(&mut self) {
        let synced = self.store.commit();
        for reply in self.replies.drain(..) {
            // A caller that gave up needs no answer.
            let _ = reply.send(synced.as_ref().copied().map_err(|error| Refusal::Disk(io::Error::other(error.to_string()))));
        }
        if let Err(error) = synced {
            tracing::error!(%error, "the desired state cannot be made durable; changes are refused");
            self.events.retain(|event| !matches!(event, Event::Put(_) | Event::Deleted { .. }));
        }
        loop {
            let now = self.now();
            for event in std::mem::take(&mut self.events) {
                self.core.handle(event, now);
            }
            for output in self.core.turn(now) {
                self.act(output);
            }
            if self.events.is_empty() {
                break;
            }
        }
    }

    fn act(&mut self, output: Output) {
        match output {
            Output::Dataplane(snapshot) => {
                if let Some(dataplane) = &self.parts.dataplane {
                    dataplane.apply(Arc::new(snapshot));
                }
                self.parts.names.store(Arc::new(self.core.names()));
            }
            Output::Subjects(subjects) => self.subjects.store(Arc::new(subjects)),
            Output::Work { key, work } => self.work(key, work),
            Output::Host(command) => self.say(command),
            Output::StoreComplete => {
                if let Err(error) = self.store.set_complete() {
                    tracing::error!(%error, "the store cannot be marked as complete");
                }
            }
            Output::HostChanged => {
                let inventory = self.core.host();
                self.hub.hello(|hello| {
                    hello.host_connected = inventory.is_some();
                    let inventory = inventory.unwrap_or_default();
                    hello.cores = inventory.cores;
                    hello.memory_bytes = inventory.memory_bytes;
                    hello.machine = inventory.machine;
                });
            }
            Output::Gone { key, generation } => {
                // The record goes before the word: a crash in between only repeats the word.
                if let Err(error) = self.store.finish(&key, generation, SystemTime::now()) {
                    tracing::error!(object = %key, %error, "a tombstone cannot be written");
                }
                tracing::info!(object = %key, generation, "gone");
                self.hub.gone(&key, generation);
            }
            Output::Status(status) => {
                let Some(id) = Id::parse(&status.id) else { return };
                let key = Key { kind: status.kind(), id };
                tracing::info!(object = %key, generation = status.generation, phase = status.phase().as_str_name(), message = status.message, "status");
                self.hub.status(&key, status);
            }
        }
    }

    fn work(&mut self, key: Key, work: Work) {
        tracing::debug!(object = %key, ?work, "work");
        if let Some(result) = self.devices.perform(&key, work) {
            self.done(key, result);
        }
    }

    fn done(&mut self, key: Key, result: Result<(), String>) {
        if let Err(message) = &result {
            tracing::warn!(object = %key, message, "work on a device failed");
        }
        self.events.push(Event::Done { key, result });
    }

    fn say(&mut self, command: to_host::Command) {
        let refused = self.host.as_ref().is_some_and(|(_, host)| host.send(command).is_err());
        if refused {
            // Dropping the link hangs it up; the host comes back and is told everything.
            self.host = None;
            self.events.push(Event::HostDisconnected);
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}

fn refuse(key: &Key, refusal: Refusal, reply: Reply<()>) {
    tracing::warn!(object = %key, %refusal, "refused");
    let _ = reply.send(Err(refusal));
}
