//! The connections to the cards: the only file that names the gRPC client.
//!
//! One task for each card keeps a connection, forwards its watch stream to the
//! reconciler and sends what the reconciler wants sent: a few
//! calls at a time, each with a deadline, and of several operations on one
//! object only the newest. A card is who its certificate says; ours says control.
//! After a loss the task tries again, with full jitter, soon at first and never
//! less than every 8 s; what was not sent then is simply computed again.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use card_proto::card::card_client::CardClient;
use card_proto::card::packets_client::PacketsClient;
use card_proto::card::{self, DeleteRequest, Kind, PutRequest, WatchRequest, put_request};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request};

use crate::model::ObjectKind;
use crate::reconcile::{Input, Object, ObjectKey, Operation};
use crate::settings;

/// Calls to one card at a time.
const IN_FLIGHT: usize = 16;
/// A card stores an object within this, or the connection is given up.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// The first waits after a loss are short, so that a restarted card is back at once.
const EAGER: Duration = Duration::from_secs(5);
const EAGER_WAIT_MS: u64 = 100;
const LONGEST_WAIT_MS: u64 = 8_000;
/// Events that may wait for the reconciler before a card has to wait.
const QUEUE: usize = 4_096;

/// Why a card cannot be asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CardError {
    #[error("reading {path}")]
    Pem {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("certificates for the cards")]
    Tls(#[source] tonic::transport::Error),
    #[error("card {0} is not known")]
    Unknown(String),
    #[error("card {0} is not connected")]
    Away(String),
    #[error("card {card}: {}", status.message())]
    Refused { card: String, status: Box<tonic::Status> },
}

/// All cards of the region.
pub struct Cards {
    cards: HashMap<String, Arc<Queue>>,
    tasks: Vec<JoinHandle<()>>,
}

/// What waits for a card, and its connection while there is one.
#[derive(Default)]
struct Queue {
    operations: Mutex<BTreeMap<ObjectKey, Operation>>,
    wake: Notify,
    channel: Mutex<Option<Channel>>,
}

impl Cards {
    /// Starts a task for each card. The receiver is for [`crate::reconcile::run`].
    ///
    /// # Errors
    /// When the certificates are not readable.
    pub fn start(cards: &[settings::Card], tls: &settings::Tls, epoch: u64) -> Result<(Self, mpsc::Receiver<(String, Input)>), CardError> {
        let (inputs, receiver) = mpsc::channel(QUEUE);
        let authority = Certificate::from_pem(read(&tls.authority)?);
        let identity = Identity::from_pem(read(&tls.certificate)?, read(&tls.key)?);
        let mut all = Self { cards: HashMap::new(), tasks: Vec::new() };
        for card in cards {
            let tls = ClientTlsConfig::new().ca_certificate(authority.clone()).identity(identity.clone()).domain_name(&card.id);
            let endpoint = Endpoint::from_shared(format!("https://{}", card.address))
                .and_then(|endpoint| endpoint.tls_config(tls))
                .map_err(CardError::Tls)?;
            let endpoint = endpoint
                .connect_timeout(CONNECT_DEADLINE)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(5))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true);
            let queue = Arc::new(Queue::default());
            all.cards.insert(card.id.clone(), Arc::clone(&queue));
            let task = Task { card_id: card.id.clone(), endpoint, queue, inputs: inputs.clone(), epoch };
            all.tasks.push(tokio::spawn(task.run()));
        }
        Ok((all, receiver))
    }

    /// Queues an operation; a newer one on the same object takes its place.
    pub fn send(&self, card_id: &str, operation: Operation) {
        let Some(queue) = self.cards.get(card_id) else {
            tracing::warn!(card = card_id, "an object waits for a card that is not in the settings");
            return;
        };
        lock(&queue.operations).insert(operation.key(), operation);
        queue.wake.notify_one();
    }

    /// The newest console bytes of an instance and when they were taken.
    ///
    /// # Errors
    /// When the card is away or does not answer in time.
    pub async fn console_output(&self, card_id: &str, instance_id: &str) -> Result<(Vec<u8>, u64), CardError> {
        let mut client = self.client(card_id)?;
        let request = card::ConsoleOutputRequest { instance_id: instance_id.to_owned() };
        let reply = client.console_output(timely(request)).await.map_err(|status| refused(card_id, status))?.into_inner();
        Ok((reply.output, reply.timestamp_s))
    }

    /// The live console of an instance: bytes sent into `keys` reach it, what it prints comes out of the stream.
    ///
    /// # Errors
    /// When the card is away or has no such instance.
    pub async fn console(&self, card_id: &str, instance_id: &str, mut keys: mpsc::Receiver<Vec<u8>>) -> Result<Console, CardError> {
        let mut client = self.client(card_id)?;
        let (sender, receiver) = mpsc::channel(16);
        let instance_id = instance_id.to_owned();
        // The first message names the instance and types nothing.
        tokio::spawn(async move {
            let mut data = Vec::new();
            while sender.send(card::ConsoleInput { instance_id: instance_id.clone(), data }).await.is_ok() {
                match keys.recv().await {
                    Some(bytes) => data = bytes,
                    None => return,
                }
            }
        });
        let stream = client.console(tokio_stream::wrappers::ReceiverStream::new(receiver)).await;
        Ok(Console { card_id: card_id.to_owned(), stream: stream.map_err(|status| refused(card_id, status))?.into_inner() })
    }

    /// The cards that are connected now, in order.
    #[must_use]
    pub fn connected(&self) -> Vec<String> {
        let there = self.cards.iter().filter(|(_, queue)| lock(&queue.channel).is_some());
        let mut cards: Vec<String> = there.map(|(id, _)| id.clone()).collect();
        cards.sort();
        cards
    }

    /// What would become of a packet on a card.
    ///
    /// # Errors
    /// When the card is away, refuses or does not answer in time.
    pub async fn explain(&self, card_id: &str, request: card::ExplainRequest) -> Result<card::ExplainReply, CardError> {
        let mut client = PacketsClient::new(self.channel(card_id)?);
        Ok(client.explain(timely(request)).await.map_err(|status| refused(card_id, status))?.into_inner())
    }

    /// A reading of the counters of a card's packet path.
    ///
    /// # Errors
    /// As [`Cards::explain`].
    pub async fn counters(&self, card_id: &str) -> Result<card::CountersReply, CardError> {
        let mut client = PacketsClient::new(self.channel(card_id)?);
        Ok(client.counters(timely(card::CountersRequest {})).await.map_err(|status| refused(card_id, status))?.into_inner())
    }

    /// A piece of the connections that a card tracks.
    ///
    /// # Errors
    /// As [`Cards::explain`].
    pub async fn flows(&self, card_id: &str, request: card::FlowsRequest) -> Result<card::FlowsReply, CardError> {
        let mut client = PacketsClient::new(self.channel(card_id)?);
        Ok(client.flows(timely(request)).await.map_err(|status| refused(card_id, status))?.into_inner())
    }

    /// Begins a capture on a card; dropping it ends it there.
    ///
    /// # Errors
    /// As [`Cards::explain`].
    pub async fn capture(&self, card_id: &str, request: card::CaptureRequest) -> Result<Capture, CardError> {
        let mut client = PacketsClient::new(self.channel(card_id)?);
        let stream = client.capture(request).await.map_err(|status| refused(card_id, status))?.into_inner();
        Ok(Capture { card_id: card_id.to_owned(), stream })
    }

    fn client(&self, card_id: &str) -> Result<CardClient<Channel>, CardError> {
        self.channel(card_id).map(CardClient::new)
    }

    fn channel(&self, card_id: &str) -> Result<Channel, CardError> {
        let queue = self.cards.get(card_id).ok_or_else(|| CardError::Unknown(card_id.to_owned()))?;
        lock(&queue.channel).clone().ok_or_else(|| CardError::Away(card_id.to_owned()))
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What an instance prints.
pub struct Console {
    card_id: String,
    stream: tonic::Streaming<card::ConsoleBytes>,
}

impl Console {
    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// When the card or the connection to it is gone.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, CardError> {
        let message = self.stream.message().await.map_err(|status| refused(&self.card_id, status))?;
        Ok(message.map(|message| message.data))
    }
}

/// The frames of a card that somebody wants to see.
pub struct Capture {
    card_id: String,
    stream: tonic::Streaming<card::Captured>,
}

impl Capture {
    /// The next frames; none at the end.
    ///
    /// # Errors
    /// When the card or the connection to it is gone.
    pub async fn next(&mut self) -> Result<Option<card::Captured>, CardError> {
        self.stream.message().await.map_err(|status| refused(&self.card_id, status))
    }
}

/// A request that is answered soon or not at all.
fn timely<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

fn refused(card_id: &str, status: tonic::Status) -> CardError {
    CardError::Refused { card: card_id.to_owned(), status: Box::new(status) }
}

fn read(path: &Path) -> Result<Vec<u8>, CardError> {
    std::fs::read(path).map_err(|source| CardError::Pem { path: path.to_owned(), source })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Task {
    card_id: String,
    endpoint: Endpoint,
    queue: Arc<Queue>,
    inputs: mpsc::Sender<(String, Input)>,
    epoch: u64,
}

/// Why a connection ended.
enum Ended {
    /// The reconciler is gone: so are we.
    Reconciler,
    Connection(String),
}

impl Task {
    async fn run(self) {
        let mut lost = Instant::now();
        let mut wait_ms = EAGER_WAIT_MS;
        loop {
            let (ended, was_connected) = self.connect_and_serve().await;
            let Ended::Connection(reason) = ended else { return };
            *lock(&self.queue.channel) = None;
            lock(&self.queue.operations).clear();
            if was_connected {
                tracing::warn!(card = self.card_id, reason, "lost the card");
                if self.inputs.send((self.card_id.clone(), Input::Gone)).await.is_err() {
                    return;
                }
                (lost, wait_ms) = (Instant::now(), EAGER_WAIT_MS);
            } else {
                tracing::debug!(card = self.card_id, reason, "the card does not answer");
            }
            if EAGER < lost.elapsed() {
                wait_ms = wait_ms.saturating_mul(2).min(LONGEST_WAIT_MS);
            }
            tokio::time::sleep(Duration::from_millis(jitter(wait_ms))).await;
        }
    }

    /// Serves one connection until it ends; says also whether there was one.
    async fn connect_and_serve(&self) -> (Ended, bool) {
        let channel = match self.endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return (Ended::Connection(chain(&error)), false),
        };
        let mut client = CardClient::new(channel.clone());
        let watch = tokio::time::timeout(CALL_DEADLINE, client.watch(WatchRequest { epoch: self.epoch })).await;
        let stream = match watch {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(status)) => return (Ended::Connection(status.to_string()), false),
            Err(_) => return (Ended::Connection("watch: no answer in time".to_owned()), false),
        };
        *lock(&self.queue.channel) = Some(channel);
        (self.serve(client, stream).await, true)
    }

    async fn serve(&self, client: CardClient<Channel>, mut stream: tonic::Streaming<card::Event>) -> Ended {
        let mut calls: JoinSet<Result<Input, String>> = JoinSet::new();
        loop {
            while calls.len() < IN_FLIGHT {
                let Some((_, operation)) = lock(&self.queue.operations).pop_first() else { break };
                calls.spawn(call(client.clone(), self.epoch, operation));
            }
            let input = tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(card::Event { event: Some(event) })) => {
                        if let card::event::Event::Hello(hello) = &event
                            && hello.card_id != self.card_id
                        {
                            return Ended::Connection(format!("the card calls itself {:?}", hello.card_id));
                        }
                        Input::Event(event)
                    }
                    Ok(Some(card::Event { event: None })) => continue,
                    Ok(None) => return Ended::Connection("the card ended the stream".to_owned()),
                    Err(status) => return Ended::Connection(status.to_string()),
                },
                Some(done) = calls.join_next() => match done {
                    Ok(Ok(input)) => input,
                    Ok(Err(reason)) => return Ended::Connection(reason),
                    Err(error) => return Ended::Connection(error.to_string()),
                },
                () = self.queue.wake.notified(), if calls.len() < IN_FLIGHT => continue,
            };
            if self.inputs.send((self.card_id.clone(), input)).await.is_err() {
                return Ended::Reconciler;
            }
        }
    }
}

/// One call; an error ends the connection.
async fn call(mut client: CardClient<Channel>, epoch: u64, operation: Operation) -> Result<Input, String> {
    let (key, generation) = (operation.key(), operation.generation());
    let outcome = match operation {
        Operation::Put(object) => {
            let mut request = Request::new(PutRequest { epoch, object: Some(message(*object)) });
            request.set_timeout(CALL_DEADLINE);
            tokio::time::timeout(CALL_DEADLINE, client.put(request)).await.map(|reply| reply.map(|_| ()))
        }
        Operation::Delete((kind, id), generation) => {
            let mut request = Request::new(DeleteRequest { epoch, kind: kind_number(kind).into(), id, generation });
            request.set_timeout(CALL_DEADLINE);
            tokio::time::timeout(CALL_DEADLINE, client.delete(request)).await.map(|reply| reply.map(|_| ()))
        }
    };
    match outcome {
        Ok(Ok(())) => Ok(Input::Accepted(key, generation)),
        Ok(Err(status)) if status.code() == Code::InvalidArgument => Ok(Input::Refused(key, generation, status.message().to_owned())),
        Ok(Err(status)) if status.code() == Code::FailedPrecondition => Ok(Input::Outdated(key, generation, status.message().to_owned())),
        Ok(Err(status)) => Err(status.to_string()),
        Err(_) => Err("a call took too long".to_owned()),
    }
}

fn message(object: Object) -> put_request::Object {
    match object {
        Object::Network(object) => put_request::Object::Network(object),
        Object::Volume(object) => put_request::Object::Volume(object),
        Object::Disk(object) => put_request::Object::Disk(object),
        Object::Port(object) => put_request::Object::Port(object),
        Object::Instance(object) => put_request::Object::Instance(object),
        Object::NatGateway(object) => put_request::Object::NatGateway(object),
    }
}

fn kind_number(kind: ObjectKind) -> Kind {
    match kind {
        ObjectKind::Network => Kind::Network,
        ObjectKind::Volume => Kind::Volume,
        ObjectKind::Disk => Kind::Disk,
        ObjectKind::Port => Kind::Port,
        ObjectKind::Instance => Kind::Instance,
        ObjectKind::NatGateway => Kind::NatGateway,
    }
}

/// Anything from 1 to `most` milliseconds, so that many who lost the same thing do not come back together.
fn jitter(most: u64) -> u64 {
    let mut bytes = [0; 8];
    // Without entropy the wait is the longest one, which is safe.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes).checked_rem(most).unwrap_or(0).saturating_add(1),
        Err(_) => most,
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    std::iter::once(error.to_string()).chain(causes.map(ToString::to_string)).collect::<Vec<_>>().join(": ")
}
