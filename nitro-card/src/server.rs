//! The card's API: gRPC for control, and for nobody else.
//!
//! The launch path, where it reaches the card:
//! **Launch**: ⇒ `server` (who speaks, how much) → [`crate::convert`] (is it
//! sound) → [`crate::card`] (durable, then answered) → [`crate::converge`]
//! (what is missing) → [`crate::devices`] (`disk`, `port`: sockets first) and
//! [`crate::host`] (then the machine) ⇒ `thin_hv`. Observed state returns by
//! [`crate::watch`]. Stop, terminate, attach and restart after a crash take the
//! same loop.
//!
//! Only a client with a certificate of the region's authority whose one DNS
//! name is `control` is heard; everyone else gets no further than the handshake
//! or PERMISSION_DENIED. Messages over 4 MiB are refused.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use card_proto::card::card_server::{Card, CardServer};
use card_proto::card::packets_server::PacketsServer;
use card_proto::card::{
    ConsoleBytes, ConsoleInput, ConsoleOutputReply, ConsoleOutputRequest, DeleteReply, DeleteRequest, Event, Kind, PutReply, PutRequest,
    WatchRequest,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use crate::card::Handle;
use crate::console::Consoles;
use crate::convert;
use crate::desired::Refusal;
use crate::object::{Id, Key, Object};
use crate::packets::Packets;

/// Largest message of control.
pub const MESSAGE_MAX: usize = 4 * 1024 * 1024;

/// The one DNS name in control's certificate.
const CONTROL: &str = "control";

/// Pieces in flight towards one reader.
const STREAM_BACKLOG: usize = 16;
/// Longest piece of console input.
const INPUT_MAX: usize = 16 * 1024;

/// What proves who is who, as PEM.
pub struct Credentials {
    /// Certificate of the region's authority.
    pub authority: String,
    /// The card's own certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// Serves control until `stopped` ends.
///
/// # Errors
/// When the credentials cannot be used, or the address.
pub async fn serve(
    listen: SocketAddr,
    credentials: Credentials,
    card: Handle,
    consoles: Arc<Consoles>,
    packets: Packets,
    stopped: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(credentials.certificate, credentials.key))
        .client_ca_root(Certificate::from_pem(credentials.authority))
        .timeout(Duration::from_secs(10));
    let (closing, closed) = watch::channel(());
    let stopped = async move {
        stopped.await;
        // Streams end with this, and connections with their streams.
        drop(closing);
    };
    let packets = PacketsServer::new(packets.service(closed.clone()));
    let service = CardServer::new(Service { card, consoles, closed }).max_decoding_message_size(MESSAGE_MAX);
    let listener = tokio::net::TcpListener::bind(listen).await?;
    tracing::info!(address = %listener.local_addr()?, "control may connect");
    let server = Server::builder()
        .tls_config(tls)?
        .tcp_nodelay(true)
        // A control node that is cut off holds nothing for long.
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(InterceptedService::new(service, only_control))
        .add_service(InterceptedService::new(packets, only_control))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped);
    Ok(server.await?)
}

/// Lets a request through when its certificate, already verified against the
/// authority, is control's.
#[allow(clippy::result_large_err)] // the signature is tonic's
fn only_control(request: Request<()>) -> Result<Request<()>, Status> {
    let certificates = request.peer_certs().ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    if certificates.first().is_some_and(|certificate| names_only_control(certificate)) {
        Ok(request)
    } else {
        Err(Status::permission_denied("this certificate is not control's"))
    }
}

fn names_only_control(certificate: &[u8]) -> bool {
    let certificate = certificate.into();
    let Ok(certificate) = webpki::EndEntityCert::try_from(&certificate) else { return false };
    certificate.valid_dns_names().eq([CONTROL])
}

struct Service {
    card: Handle,
    consoles: Arc<Consoles>,
    /// Changes, to an error, when the card stops.
    closed: watch::Receiver<()>,
}

#[tonic::async_trait]
impl Card for Service {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutReply>, Status> {
        let request = request.into_inner();
        let object = request.object.clone().ok_or_else(|| Status::invalid_argument("object is required"))?;
        let object = Object::try_from(object).map_err(|invalid| answer(invalid.into()))?;
        self.card.put(object, request).await.map_err(answer)?;
        Ok(Response::new(PutReply {}))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteReply>, Status> {
        let request = request.into_inner();
        let kind = request.kind();
        if kind == Kind::Unspecified {
            return Err(Status::invalid_argument("kind is required"));
        }
        let key = Key { kind, id: id(&request.id, "id")? };
        self.card.delete(key, request.generation, request.epoch).await.map_err(answer)?;
        Ok(Response::new(DeleteReply {}))
    }

    type WatchStream = ReceiverStream<Result<Event, Status>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let watcher = self.card.watch(request.into_inner().epoch).await.map_err(answer)?;
        let (events, stream) = mpsc::channel(STREAM_BACKLOG);
        let mut closed = self.closed.clone();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = watcher.next() => event,
                    () = events.closed() => return,
                    _ = closed.changed() => return,
                };
                let event = event.ok_or_else(|| Status::resource_exhausted("too slow: watch again"));
                let last = event.is_err();
                if events.send(event).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn console_output(&self, request: Request<ConsoleOutputRequest>) -> Result<Response<ConsoleOutputReply>, Status> {
        let id = id(&request.into_inner().instance_id, "instance_id")?;
        let output = self.consoles.output(&id).map_err(|error| Status::internal(error.to_string()))?;
        let output = output.ok_or_else(|| Status::not_found("no such instance on this card"))?;
        Ok(Response::new(ConsoleOutputReply { output: output.bytes, timestamp_s: output.timestamp_s }))
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleBytes, Status>> + Send>>;

    async fn console(&self, request: Request<Streaming<ConsoleInput>>) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.next().await.ok_or_else(|| Status::invalid_argument("the first message names the instance"))??;
        let id = id(&first.instance_id, "instance_id")?;
        let mut live = self.consoles.subscribe(&id).ok_or_else(|| Status::not_found("no such instance on this card"))?;
        let (bytes, output) = mpsc::channel(STREAM_BACKLOG);
        let (card, mut closed) = (self.card.clone(), self.closed.clone());
        tokio::spawn(async move {
            keys(&card, &id, first.data);
            let mut typing = true;
            loop {
                tokio::select! {
                    piece = live.recv() => match piece {
                        Ok(piece) => {
                            if bytes.send(Ok(ConsoleBytes { data: piece.to_vec() })).await.is_err() {
                                return;
                            }
                        }
                        // As a terminal that was switched off for a moment.
                        Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => return,
                    },
                    message = input.next(), if typing => match message {
                        Some(Ok(message)) => keys(&card, &id, message.data),
                        _ => typing = false,
                    },
                    () = bytes.closed() => return,
                    _ = closed.changed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(output))))
    }
}

fn keys(card: &Handle, id: &Id, data: Vec<u8>) {
    for piece in data.chunks(INPUT_MAX) {
        card.console_input(id.clone(), piece.to_vec());
    }
}

#[allow(clippy::result_large_err)] // as the caller's
fn id(text: &str, field: &'static str) -> Result<Id, Status> {
    convert::id(text, field).map_err(|invalid| answer(invalid.into()))
}

fn answer(refusal: Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::Epoch { .. } | Refusal::Generation { .. } | Refusal::Role => Status::failed_precondition(message),
        Refusal::Invalid(_) => Status::invalid_argument(message),
        Refusal::Disk(_) => Status::internal(message),
        Refusal::Busy | Refusal::Stopping => Status::unavailable(message),
    }
}
