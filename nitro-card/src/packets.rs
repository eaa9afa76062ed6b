//! What operators ask of the packet path, over gRPC through control: captures,
//! explanations, counters, flows. It turns ids into the packet path's numbers and
//! back, and decides nothing.
//!
//! Bounds: captures as [`dataplane::capture`] says, each of [`SECONDS_MAX`] at most;
//! a question that the packet worker does not answer within two seconds is given up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use card_proto::card::packets_server;
use card_proto::card::{
    CaptureRequest, Captured, CapturedFrame, Count, CountersReply, CountersRequest, DeviceCounters, ExplainReply, ExplainRequest, Flow,
    FlowsReply, FlowsRequest, Place, Way, explain_request,
};
use crossbeam_channel::RecvTimeoutError;
use dataplane::action::{Egress, Origin};
use dataplane::capture::filter::Filter;
use dataplane::capture::{self, Frame, Point, Subject};
use dataplane::explain::{Entry, Question};
use dataplane::flow::{Direction, State};
use dataplane::headers::Transport;
use dataplane::packet::FRAME_MAX;
use dataplane::pipeline::{FlowPage, FlowSeen, Pipeline};
use dataplane::{Counters, Dataplane, Drops, PortId, Traffic, Vni};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::explain;
use crate::meters::Meters;
use crate::names::Names;
use crate::object::Id;

/// The longest capture, and the length of one that names none.
pub const SECONDS_MAX: u32 = 3600;
/// Packets wait while a question is answered, so an answer is near or not to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long frames are collected into one message.
const GATHER: Duration = Duration::from_millis(50);
/// Frames and bytes of one message.
const MESSAGE_FRAMES: usize = 256;
const MESSAGE_BYTES: usize = 1 << 20;
/// Messages in flight towards one reader.
const BACKLOG: usize = 4;
/// Connections in one answer.
const FLOWS_MAX: usize = 1024;

/// What operators look at.
#[derive(Clone)]
#[allow(missing_docs)] // the names say it
pub struct Packets {
    pub dataplane: Option<Arc<Dataplane>>,
    pub names: Arc<ArcSwap<Names>>,
    pub meters: Arc<Meters>,
}

impl Packets {
    /// The gRPC service; its streams end when `closed` changes.
    #[must_use]
    pub fn service(self, closed: watch::Receiver<()>) -> Service {
        Service { packets: self, closed }
    }

    #[allow(clippy::result_large_err)] // as tonic has it
    fn dataplane(&self) -> Result<&Arc<Dataplane>, Status> {
        self.dataplane.as_ref().ok_or_else(|| Status::failed_precondition("this card has no packet path"))
    }

    #[allow(clippy::result_large_err)] // as tonic has it
    fn number(&self, port: &str) -> Result<PortId, Status> {
        let id = id(port, "port_id")?;
        self.names.load().number(&id).ok_or_else(|| Status::not_found(format!("no port {port} on this card")))
    }

    /// Asks the packet worker.
    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Pipeline, Duration) -> T + Send + 'static) -> Result<T, Status> {
        let answer = self.dataplane()?.ask(question);
        let answer = tokio::task::spawn_blocking(move || answer.recv_timeout(PATIENCE)).await;
        answer.ok().and_then(Result::ok).ok_or_else(|| Status::unavailable("the packet worker does not answer"))
    }

    /// The ports of these names and instances; `None` without any.
    #[allow(clippy::result_large_err)] // as tonic has it
    fn subjects(&self, ports: &[String], instances: &[String]) -> Result<Option<Vec<Subject>>, Status> {
        if ports.is_empty() && instances.is_empty() {
            return Ok(None);
        }
        let names = self.names.load();
        let mut subjects = Vec::new();
        for text in ports.iter().chain(instances) {
            let id = id(text, "port_ids or instance_ids")?;
            let before = subjects.len();
            subjects.extend(names.ports.iter().filter(|(_, port)| port.id == id || port.instance_id == id).map(|(number, port)| Subject {
                port: *number,
                vni: port.vni,
                ipv4: port.ipv4,
                public: port.public_ipv4,
            }));
            if subjects.len() == before {
                return Err(Status::not_found(format!("{text} has no port on this card")));
            }
        }
        Ok(Some(subjects))
    }
}

/// See [`Packets::service`].
pub struct Service {
    packets: Packets,
    closed: watch::Receiver<()>,
}

#[tonic::async_trait]
impl packets_server::Packets for Service {
    type CaptureStream = ReceiverStream<Result<Captured, Status>>;

    async fn capture(&self, request: Request<CaptureRequest>) -> Result<Response<Self::CaptureStream>, Status> {
        let request = request.into_inner();
        let dataplane = Arc::clone(self.packets.dataplane()?);
        let filter = Filter::parse(&request.filter).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let seconds = match request.seconds {
            0 => SECONDS_MAX,
            seconds => seconds.min(SECONDS_MAX),
        };
        let until = Instant::now() + Duration::from_secs(seconds.into());
        let snap_length = match usize::try_from(request.snap_length) {
            Ok(0) | Err(_) => FRAME_MAX,
            Ok(length) => length.min(FRAME_MAX),
        };
        let wanted = capture::Request {
            filter,
            subjects: self.packets.subjects(&request.port_ids, &request.instance_ids)?,
            snap_length,
            count: (request.count > 0).then_some(request.count),
            until: Some(until.saturating_duration_since(dataplane.started())),
        };
        let (messages, stream) = mpsc::channel(BACKLOG);
        let (names, closed) = (Arc::clone(&self.packets.names), self.closed.clone());
        let relay = move || relay(&dataplane, wanted, until, &names, &messages, &closed);
        std::thread::Builder::new().name("capture".into()).spawn(relay).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainReply>, Status> {
        let request = request.into_inner();
        let entry = match &request.from {
            Some(explain_request::From::PortId(port)) => Entry::Guest(self.packets.number(port)?),
            Some(explain_request::From::Tunnel(tunnel)) => Entry::Vtep(tunnel.underlay_ipv4.into(), Vni(tunnel.vni)),
            Some(explain_request::From::Internet(true)) => Entry::Public,
            Some(explain_request::From::Internet(false)) | None => return Err(Status::invalid_argument("from is required")),
        };
        let question = Question {
            entry,
            source: (request.source != 0).then(|| request.source.into()),
            destination: request.destination.into(),
            protocol: narrow(request.protocol, "protocol")?,
            transport: Transport {
                source_port: narrow(request.source_port, "source_port")?,
                destination_port: narrow(request.destination_port, "destination_port")?,
                tcp_flags: narrow(request.tcp_flags, "tcp_flags")?,
                icmp_type: narrow(request.icmp_type, "icmp_type")?,
                icmp_code: narrow(request.icmp_code, "icmp_code")?,
            },
            length: narrow(request.length, "length")?,
        };
        let explanation = self.packets.ask(move |pipeline, now| pipeline.explain(now, &question)).await?;
        Ok(Response::new(explain::reply(&explanation, &self.packets.names.load())))
    }

    async fn counters(&self, _: Request<CountersRequest>) -> Result<Response<CountersReply>, Status> {
        let counters = self.packets.dataplane()?.counters();
        Ok(Response::new(counters_reply(&counters, &self.packets.names.load(), &self.packets.meters)))
    }

    async fn flows(&self, request: Request<FlowsRequest>) -> Result<Response<FlowsReply>, Status> {
        let request = request.into_inner();
        let port = if request.port_id.is_empty() { None } else { Some(self.packets.number(&request.port_id)?) };
        let limit = usize::try_from(request.limit).unwrap_or(FLOWS_MAX).clamp(1, FLOWS_MAX);
        let cursor = usize::try_from(request.cursor).unwrap_or(usize::MAX);
        let FlowPage { flows, next } = self.packets.ask(move |pipeline, now| pipeline.flows(now, port, cursor, limit)).await?;
        let names = self.packets.names.load();
        let flows = flows.iter().map(|flow| flow_message(flow, &names)).collect();
        Ok(Response::new(FlowsReply { flows, cursor: next.map_or(0, |next| next as u64) }))
    }
}

/// Carries the frames of one capture to its reader, in a thread of its own, until
/// either side ends.
fn relay(
    dataplane: &Dataplane,
    wanted: capture::Request,
    until: Instant,
    names: &ArcSwap<Names>,
    messages: &mpsc::Sender<Result<Captured, Status>>,
    closed: &watch::Receiver<()>,
) {
    // The one reading of the wall clock: frames keep their distances when it jumps.
    let started_ns = wall_clock_ns().saturating_sub(nanoseconds(dataplane.started().elapsed()));
    let capture = dataplane.capture(wanted);
    let mut ended = false;
    while !ended && !messages.is_closed() && closed.has_changed().is_ok() {
        let (mut frames, mut bytes) = (Vec::new(), 0);
        let gather_until = (Instant::now() + GATHER).min(until);
        while frames.len() < MESSAGE_FRAMES && bytes < MESSAGE_BYTES {
            match capture.tapped.frames.recv_deadline(gather_until) {
                Ok(frame) => {
                    bytes += frame.bytes.len();
                    frames.push(frame_message(frame, started_ns, &names.load()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    ended = until <= Instant::now();
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    ended = true;
                    break;
                }
            }
        }
        let lost = capture.tapped.lost.load(Ordering::Relaxed);
        if (ended || !frames.is_empty()) && messages.blocking_send(Ok(Captured { frames, lost })).is_err() {
            return;
        }
    }
}

fn frame_message(frame: Frame, started_ns: u64, names: &Names) -> CapturedFrame {
    let (place, port) = match frame.point {
        Point::Guest(port) => (Place::Guest, Some(port)),
        Point::Underlay => (Place::Underlay, None),
        Point::Public => (Place::Public, None),
        Point::Drop(port) => (Place::Drops, port),
    };
    let way = match frame.way {
        capture::Way::In => Way::In,
        capture::Way::Out => Way::Out,
        capture::Way::None => Way::Unspecified,
    };
    CapturedFrame {
        unix_ns: started_ns.saturating_add(nanoseconds(frame.at)),
        place: place.into(),
        port_id: port.map(|port| names.port(port)).unwrap_or_default(),
        way: way.into(),
        // A frame is far below 4 GiB.
        length: u32::try_from(frame.length).unwrap_or(u32::MAX),
        data: frame.bytes,
        dropped: frame.dropped.map(|reason| reason.name().to_owned()).unwrap_or_default(),
    }
}

fn counters_reply(counters: &Counters, names: &Names, meters: &Meters) -> CountersReply {
    let device = |name: String, traffic: Traffic| DeviceCounters {
        name,
        rx_packets: traffic.rx_packets,
        rx_bytes: traffic.rx_bytes,
        tx_packets: traffic.tx_packets,
        tx_bytes: traffic.tx_bytes,
        ..DeviceCounters::default()
    };
    let mut devices = vec![device("underlay".into(), counters.underlay), device("public".into(), counters.public)];
    devices.extend(counters.ports.iter().map(|(number, port)| DeviceCounters {
        instance_id: names.ports.get(number).map(|name| name.instance_id.to_string()).unwrap_or_default(),
        drops: drops(&port.drops).filter(|count| count.value > 0).collect(),
        ..device(names.port(*number), port.traffic)
    }));
    for (_, name, reading) in meters.read() {
        if let Some(device) = devices.iter_mut().find(|device| device.name == name) {
            device.events.extend(reading.into_iter().map(|(name, value)| Count { name: name.to_owned(), value }));
        }
    }
    CountersReply { devices, drops: drops(&counters.drops).collect(), flows: counters.flows }
}

fn drops(drops: &Drops) -> impl Iterator<Item = Count> + '_ {
    drops.iter().map(|(reason, value)| Count { name: reason.name().to_owned(), value })
}

fn flow_message(flow: &FlowSeen, names: &Names) -> Flow {
    Flow {
        port_id: names.port(flow.port),
        protocol: flow.protocol.into(),
        local: flow.local.0.into(),
        local_port: flow.local.1.into(),
        remote: flow.remote.0.into(),
        remote_port: flow.remote.1.into(),
        state: state_name(flow.state).to_owned(),
        opened_by_guest: flow.opener == Direction::Egress,
        idle_ms: milliseconds(flow.idle),
        idle_limit_ms: milliseconds(flow.idle_limit),
        egress: flow.egress.map(|(egress, to)| egress_text(egress, to, names)).unwrap_or_default(),
        ingress: flow.ingress.map(origin_text).unwrap_or_default(),
    }
}

/// A decision for packets from a guest, in words; `to` is the port of a local one.
pub(crate) fn egress_text(egress: Egress, to: Option<PortId>, names: &Names) -> String {
    match egress {
        Egress::Local { .. } => format!("to {}", to.map_or_else(|| "a port that is gone".to_owned(), |to| names.port(to))),
        Egress::Remote { vtep, .. } => format!("by VXLAN to {vtep}"),
        Egress::Public { address } => format!("to the internet as {address}"),
    }
}

fn origin_text(origin: Origin) -> String {
    match origin {
        Origin::Local => "this card".to_owned(),
        Origin::Vtep(vtep) => format!("VXLAN from {vtep}"),
        Origin::Public => "the internet".to_owned(),
    }
}

/// One word for how far a connection has come.
pub(crate) fn state_name(state: State) -> &'static str {
    match state {
        State::New => "new",
        State::Established => "established",
        State::Closing => "closing",
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn wall_clock_ns() -> u64 {
    nanoseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[allow(clippy::result_large_err)] // as tonic has it
fn narrow<T: TryFrom<u32>>(value: u32, field: &'static str) -> Result<T, Status> {
    T::try_from(value).map_err(|_| Status::invalid_argument(format!("{field} is out of range")))
}

#[allow(clippy::result_large_err)] // as tonic has it
fn id(text: &str, field: &'static str) -> Result<Id, Status> {
    convert::id(text, field).map_err(|invalid| Status::invalid_argument(invalid.to_string()))
}
