//! The operator's view into the packet paths of the cards: captures, traces, counters, flows. It knows which card to ask
//! and what tenants call the things that cards speak of; the answers are the cards'.
//!
//! Bodies of requests are JSON; answers too, but for a capture, which is a pcapng file that grows while it is read.

mod pcapng;
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use card_proto::card::{CaptureRequest, Captured, Count, FlowsRequest};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::{Api, RequestId, response};
use crate::cards::{self, CardError, Cards};
use crate::error::ApiError;
use crate::model::{Instance, NetworkInterface};
use crate::world::Tx;

/// Messages of cards that wait for the writer of a capture, and pieces that wait for its reader.
const BACKLOG: usize = 4;

/// A body in JSON. Fields that nobody knows are mistakes.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::new("MalformedRequest", error.to_string()))
}

/// The answer to an operator.
fn answer(result: Result<Value, ApiError>) -> Response {
    let id = RequestId::new();
    match result {
        Ok(value) => response(200, "application/json", &id, value.to_string()),
        Err(ApiError { code, message, status }) => {
            let body = json!({"error": {"code": code, "message": message}, "requestId": id.as_str()});
            response(status, "application/json", &id, body.to_string())
        }
    }
}

fn of_cards(api: &Api) -> Result<&Arc<Cards>, ApiError> {
    api.cards.as_ref().ok_or_else(|| ApiError::with_status(503, "NoCards", "This process has no cards"))
}

fn refused(error: &CardError) -> ApiError {
    let status = match error {
        CardError::Unknown(_) => 404,
        CardError::Away(_) => 503,
        _ => 400,
    };
    ApiError::with_status(status, "CardRefused", error.to_string())
}

fn not_found(id: &str) -> ApiError {
    ApiError::with_status(404, "NotFound", format!("{id} has no interface on any card"))
}

/// The interfaces that `i-...` or `eni-...` names; an instance's in the order of their devices.
fn interfaces(tx: &Tx<'_>, id: &str) -> Vec<Arc<NetworkInterface>> {
    let mut found = tx.find_all::<NetworkInterface>(if id.starts_with("i-") { "instance" } else { "id" }, id);
    found.sort_by_key(|interface| interface.attachment.as_ref().map(|attachment| attachment.device_index));
    found
}

/// The card that an interface is on.
fn card_of(tx: &Tx<'_>, interface: &NetworkInterface) -> Option<String> {
    let attachment = interface.attachment.as_ref()?;
    let instance = tx.get::<Instance>(&interface.account_id, &attachment.instance_id)?;
    Some(instance.placement.as_ref()?.card_id.clone())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneCard {
    card: Option<String>,
}

/// `{card?}`: the counters of one card, or of all that are there.
pub async fn counters(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    answer(read_counters(&api, &body).await)
}

async fn read_counters(api: &Api, body: &Bytes) -> Result<Value, ApiError> {
    let wanted: OneCard = parse(body)?;
    let cards = of_cards(api)?;
    let ids = wanted.card.clone().map_or_else(|| cards.connected(), |card| vec![card]);
    let mut readings = Vec::new();
    for card in ids {
        let reply = match cards.counters(&card).await {
            Ok(reply) => reply,
            // One that just went, or has no packet path: the others are still worth seeing.
            Err(_) if wanted.card.is_none() => continue,
            Err(error) => return Err(refused(&error)),
        };
        let devices = reply.devices.into_iter().map(|device| {
            json!({
                "name": device.name, "instance": device.instance_id,
                "rxPackets": device.rx_packets, "rxBytes": device.rx_bytes,
                "txPackets": device.tx_packets, "txBytes": device.tx_bytes,
                "drops": counts(device.drops), "events": counts(device.events),
            })
        });
        let devices: Vec<Value> = devices.collect();
        readings.push(json!({"card": card, "flows": reply.flows, "drops": counts(reply.drops), "devices": devices}));
    }
    Ok(json!({"cards": readings}))
}

fn counts(counts: Vec<Count>) -> BTreeMap<String, u64> {
    counts.into_iter().map(|count| (count.name, count.value)).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlowsOf {
    port: String,
    #[serde(default)]
    cursor: u64,
    limit: u32,
}

/// `{port, cursor?, limit}`: a piece of the connections tracked at a port, and the cursor of the next one (0: that was all).
pub async fn flows(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    answer(read_flows(&api, &body).await)
}

async fn read_flows(api: &Api, body: &Bytes) -> Result<Value, ApiError> {
    let FlowsOf { port, cursor, limit } = parse(body)?;
    let find = |tx: &Tx<'_>| interfaces(tx, &port).first().and_then(|interface| Some((interface.id.clone(), card_of(tx, interface)?)));
    let (port_id, card) = api.world.read(find).0.ok_or_else(|| not_found(&port))?;
    let reply = of_cards(api)?.flows(&card, FlowsRequest { port_id, cursor, limit }).await.map_err(|error| refused(&error))?;
    let flows = reply.flows.into_iter().map(|flow| {
        json!({
            "port": flow.port_id, "protocol": protocol_name(flow.protocol),
            "local": Ipv4Addr::from(flow.local), "localPort": flow.local_port,
            "remote": Ipv4Addr::from(flow.remote), "remotePort": flow.remote_port,
            "state": flow.state, "openedByGuest": flow.opened_by_guest,
            "idleMs": flow.idle_ms, "idleLimitMs": flow.idle_limit_ms,
            "egress": flow.egress, "ingress": flow.ingress,
        })
    });
    Ok(json!({"card": card, "flows": flows.collect::<Vec<_>>(), "cursor": reply.cursor}))
}

/// A protocol as people write it.
fn protocol_name(number: u32) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        256 => "all".to_owned(),
        other => other.to_string(),
    }
}

/// `{from, to, protocol ...}`: see [`trace`].
pub async fn trace(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    let traced = async { trace::trace(&api.world, of_cards(&api)?, &parse(&body)?).await };
    answer(traced.await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaptureOf {
    card: Option<String>,
    instance: Option<String>,
    port: Option<String>,
    #[serde(default)]
    filter: String,
    #[serde(default)]
    count: u64,
    #[serde(default)]
    seconds: u32,
    #[serde(default)]
    snap_length: u32,
}

/// `{card?, instance?, port?, filter?, count?, seconds?, snap_length?}`: frames of one card, one instance or one interface,
/// or of all cards, as pcapng. Whoever stops reading ends it.
pub async fn capture(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    match begin_capture(&api, &body).await {
        Ok(body) => {
            let mut response = Response::new(body);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-pcapng"));
            response
        }
        Err(error) => answer(Err(error)),
    }
}

async fn begin_capture(api: &Api, body: &Bytes) -> Result<Body, ApiError> {
    let wanted: CaptureOf = parse(body)?;
    let cards = of_cards(api)?;
    let mut request = CaptureRequest {
        filter: wanted.filter,
        snap_length: wanted.snap_length,
        count: wanted.count,
        seconds: wanted.seconds,
        ..CaptureRequest::default()
    };
    let mut ids = BTreeSet::new();
    for subject in wanted.instance.iter().chain(&wanted.port) {
        let find = |tx: &Tx<'_>| {
            let found = interfaces(tx, subject);
            found.iter().filter_map(|interface| Some((interface.id.clone(), card_of(tx, interface)?))).collect::<Vec<_>>()
        };
        let found = api.world.read(find).0;
        if found.is_empty() {
            return Err(not_found(subject));
        }
        for (port, card) in found {
            request.port_ids.push(port);
            ids.insert(card);
        }
    }
    match wanted.card {
        Some(card) if ids.is_empty() || ids == BTreeSet::from([card.clone()]) => drop(ids.insert(card)),
        Some(card) => return Err(ApiError::new("CardRefused", format!("what to capture is not on {card}"))),
        None if ids.is_empty() => ids.extend(cards.connected()),
        None => {}
    }
    let mut captures = Vec::new();
    let all = ids.len() > 1;
    for card in ids {
        match cards.capture(&card, request.clone()).await {
            Ok(capture) => captures.push((card, capture)),
            // Of a whole region, a card without a packet path is no mistake; a filter that makes no sense is one.
            Err(CardError::Refused { status, .. }) if all && status.code() == tonic::Code::FailedPrecondition => {}
            Err(error) => return Err(refused(&error)),
        }
    }
    let (pieces, body) = mpsc::channel(BACKLOG);
    tokio::spawn(write(captures, request.count, pieces));
    Ok(Body::from_stream(ReceiverStream::new(body)))
}

/// Writes what the cards see into one file until all have ended, or the reader has.
async fn write(captures: Vec<(String, cards::Capture)>, count: u64, pieces: mpsc::Sender<Result<Bytes, Infallible>>) {
    let (sender, mut messages) = mpsc::channel::<(String, Captured)>(BACKLOG);
    for (card, mut capture) in captures {
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = capture.next() => message,
                    () = sender.closed() => return,
                };
                match message {
                    Ok(Some(captured)) => {
                        if sender.send((card.clone(), captured)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => return tracing::warn!(card, %error, "a capture ended early"),
                }
            }
        });
    }
    drop(sender);
    let mut file = pcapng::Writer::default();
    let mut left = if count == 0 { u64::MAX } else { count };
    if pieces.send(Ok(file.begin().into())).await.is_err() {
        return;
    }
    while left > 0 {
        let message = tokio::select! {
            message = messages.recv() => message,
            () = pieces.closed() => return,
        };
        let Some((card, captured)) = message else { break };
        let mut piece = Vec::new();
        file.lost(&card, captured.lost);
        for frame in captured.frames {
            if left > 0 {
                left -= 1;
                file.frame(&mut piece, &card, &frame);
            }
        }
        if !piece.is_empty() && pieces.send(Ok(piece.into())).await.is_err() {
            return;
        }
    }
    // A reader that left early does not miss it.
    let _ = pieces.send(Ok(file.end().into())).await;
}
