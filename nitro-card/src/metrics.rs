//! `/healthz` and `/metrics` for operators, over plain HTTP/1.1: one short
//! request, one answer, one connection. Prometheus text format 0.0.4.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use dataplane::{Dataplane, Traffic};
use storage_target::Target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::card::Handle;
use crate::converge::Summary;
use crate::devices::DISK;
use crate::host::LinkCounters;
use crate::imds;
use crate::meters::Meters;
use crate::names::Names;

const REQUEST_MAX: usize = 4096;
/// For the whole of one connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// The card's thread answers in this time, or is not healthy.
const HEALTHY: Duration = Duration::from_secs(2);
const CONNECTIONS_MAX: usize = 32;

/// Everything that is measured.
#[derive(Clone)]
#[allow(missing_docs)] // the names say it
pub struct Sources {
    pub card: Handle,
    pub dataplane: Option<Arc<Dataplane>>,
    pub names: Arc<ArcSwap<Names>>,
    pub meters: Arc<Meters>,
    pub target: Option<Arc<Target>>,
    pub link: Arc<LinkCounters>,
    pub imds: Arc<imds::Counters>,
}

/// Serves for ever; a caller that is slow or sends garbage loses its connection.
pub async fn serve(listener: TcpListener, sources: Sources) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // It is never closed.
        let Ok(place) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let sources = sources.clone();
                tokio::spawn(async move {
                    // Whoever does not get an answer asks again.
                    let _ = timeout(PATIENCE, answer(stream, &sources)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a metrics connection could not be taken");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, sources: &Sources) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if REQUEST_MAX <= request.len() || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let (status, body) = match line.split(|b| *b == b' ').collect::<Vec<_>>().as_slice() {
        [b"GET", b"/healthz", _] => match summary(sources).await {
            Some(_) => ("200 OK", "ok\n".to_owned()),
            None => ("503 Service Unavailable", "the card's thread does not answer\n".to_owned()),
        },
        [b"GET", b"/metrics", _] => ("200 OK", metrics(sources, summary(sources).await)),
        [b"GET", _, _] => ("404 Not Found", "there are /healthz and /metrics\n".to_owned()),
        _ => ("400 Bad Request", "GET only\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

async fn summary(sources: &Sources) -> Option<Summary> {
    timeout(HEALTHY, sources.card.summary()).await.ok().flatten()
}

fn metrics(sources: &Sources, summary: Option<Summary>) -> String {
    let mut page = Page(String::new());
    if let Some(summary) = summary {
        page.gauge("card_host_connected", "Whether the host under the card is in sync.", u64::from(summary.host_connected));
        page.head("card_objects", "gauge", "Objects that the card holds.");
        for (kind, count) in [
            ("instance", summary.instances),
            ("port", summary.ports),
            ("disk", summary.disks),
            ("volume", summary.volumes),
            ("network", summary.networks),
        ] {
            page.sample("card_objects", &[("kind", kind)], count as u64);
        }
        page.gauge("card_machines_running", "Machines that run.", summary.machines_running as u64);
        page.gauge("card_objects_converging", "Objects that are not what they shall be yet.", summary.converging as u64);
        page.gauge("card_objects_failed", "Objects that will not be what they shall be.", summary.failed as u64);
        page.gauge("card_volume_bytes", "Sum of the sizes of all volumes.", summary.volume_bytes);
    }
    page.counter("card_host_links_total", "Times that a host connected.", sources.link.connected.load(Ordering::Relaxed));
    page.counter("card_host_links_ended_total", "Links to the host that ended.", sources.link.ended.load(Ordering::Relaxed));
    let garbage = sources.link.ended_garbage.load(Ordering::Relaxed);
    page.counter("card_host_links_garbage_total", "Links that ended because the host broke the protocol.", garbage);
    page.head("card_metadata_requests_total", "counter", "Requests of guests to the metadata service.");
    page.sample("card_metadata_requests_total", &[("answer", "ok")], sources.imds.answered.load(Ordering::Relaxed));
    page.sample("card_metadata_requests_total", &[("answer", "refused")], sources.imds.refused.load(Ordering::Relaxed));
    if let Some(dataplane) = &sources.dataplane {
        packets(&mut page, dataplane, &sources.names.load());
    }
    devices(&mut page, &sources.meters);
    if let Some(target) = &sources.target {
        page.head("storage_events_total", "counter", "What the NVMe/TCP target counts.");
        for (name, value) in target.counters().each() {
            page.sample("storage_events_total", &[("event", name)], value);
        }
    }
    page.0
}

fn packets(page: &mut Page, dataplane: &Dataplane, names: &Names) {
    let counters = dataplane.counters();
    let named = counters.ports.iter().map(|(number, port)| (names.port(*number), port.traffic));
    let devices: Vec<(String, Traffic)> =
        [("underlay".into(), counters.underlay), ("public".into(), counters.public)].into_iter().chain(named).collect();
    page.head("dataplane_packets_total", "counter", "Frames by device, seen from the card.");
    for (device, traffic) in &devices {
        page.sample("dataplane_packets_total", &[("device", device), ("direction", "rx")], traffic.rx_packets);
        page.sample("dataplane_packets_total", &[("device", device), ("direction", "tx")], traffic.tx_packets);
    }
    page.head("dataplane_bytes_total", "counter", "Bytes of frames by device, seen from the card.");
    for (device, traffic) in &devices {
        page.sample("dataplane_bytes_total", &[("device", device), ("direction", "rx")], traffic.rx_bytes);
        page.sample("dataplane_bytes_total", &[("device", device), ("direction", "tx")], traffic.tx_bytes);
    }
    page.head("dataplane_drops_total", "counter", "Packets dropped, by reason.");
    for (reason, count) in counters.drops.iter() {
        page.sample("dataplane_drops_total", &[("reason", reason.name())], count);
    }
    page.head("dataplane_port_drops_total", "counter", "Those of them on the account of a port; reasons that it never had are left out.");
    for (number, port) in &counters.ports {
        for (reason, count) in port.drops.iter().filter(|(_, count)| *count > 0) {
            page.sample("dataplane_port_drops_total", &[("device", &names.port(*number)), ("reason", reason.name())], count);
        }
    }
    page.gauge("dataplane_flows", "Connections tracked now.", counters.flows);
}

/// What the devices themselves count, beside the packet path and the volumes.
fn devices(page: &mut Page, meters: &Meters) {
    let readings = meters.read();
    page.head("disk_events_total", "counter", "What the server of a guest's disk counts.");
    for (_, disk, reading) in readings.iter().filter(|(kind, ..)| *kind == DISK) {
        for (event, value) in reading {
            page.sample("disk_events_total", &[("disk", disk), ("event", event)], *value);
        }
    }
    page.head("dataplane_device_events_total", "counter", "What a device of the packet path counts itself.");
    for (kind, device, reading) in readings.iter().filter(|(kind, ..)| *kind != DISK) {
        for (event, value) in reading {
            page.sample("dataplane_device_events_total", &[("device", device), ("kind", kind), ("event", event)], *value);
        }
    }
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Label values here hold nothing that needs escaping.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }
}
