//! The same packets on Open vSwitch with DPDK, as Debian packages it.
//!
//! ```text
//!  net_pcap, infinite_rx --> br-phy --(VXLAN to us)--> tnl_pop --> br-int --> net_null
//!                              |                                     ^
//!                              '--(plain)------- patch --------------'--> VXLAN push --> br-phy --> net_null
//! ```
//!
//! One PMD thread on the last processor, at SCHED_FIFO while it is measured. Frames
//! come from a capture of one pass, in the order in which our own pipeline got them.
//! What OVS does not do here, in its favour: no check of the sender's address or
//! card, one tunnel destination for all, no TTL. It runs with its exact match cache
//! as it comes and without, and the better of the two counts.
//!
//! Everything lives in a temporary directory and a network namespace of its own:
//! database, sockets, bridges; huge pages that were taken are given back. Only
//! processes that were started here are ended.

mod ordinary;
mod switch;

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Context;
use dataplane::{Mac, Vni, headers};
use serde_json::{Map, Value, json};

use self::ordinary::Ordinary;
use self::switch::Switch;
use super::case::Policy;
use super::clock::Clock;
use super::pcap::{self, Trace};
use super::report;
use super::world::World;

/// Measurements of each configuration.
const WINDOWS: u32 = 5;
/// A MAC for the bridge where the capture's own cannot be one.
const BRIDGE_MAC: Mac = Mac([0x02, 0, 0, 0xff, 0, 1]);

/// What OVS is to do.
pub struct Job<'a> {
    /// One pass of frames, those from the wire in VXLAN.
    pub trace: &'a Trace,
    /// The world they belong to.
    pub world: &'a World,
    /// What they meet; `None` is a generated load.
    pub policy: Option<Policy>,
}

/// Measures OVS for `seconds` in each of its configurations, and adds `peer_mpps`,
/// `ratio` to our `mpps`, and what was seen to a report.
pub fn compare(clock: &Clock, job: &Job<'_>, seconds: f64, fields: &mut Map<String, Value>) -> anyhow::Result<()> {
    let peer = measure(clock, job, seconds)?;
    let best = peer.iter().map(|one| one.mpps).fold(0.0, f64::max);
    let ours = fields.get("mpps").and_then(Value::as_f64).unwrap_or(0.0);
    fields.insert("peer".to_owned(), peer.iter().map(Measured::value).collect());
    fields.insert("peer_mpps".to_owned(), report::round(best));
    fields.insert("ratio".to_owned(), report::round(ours / best));
    Ok(())
}

struct Measured {
    configuration: &'static str,
    mpps: f64,
    cycles: Vec<f64>,
    sent_share: f64,
    connections: u64,
}

impl Measured {
    fn value(&self) -> Value {
        json!({
            "peer": "Open vSwitch with DPDK",
            "version": switch::version(),
            "configuration": self.configuration,
            "mpps": report::round(self.mpps),
            "cycles_per_packet": crate::figure::spread(&self.cycles, "TSC cycles"),
            "sent_share": report::round(self.sent_share),
            "connections": self.connections,
        })
    }
}

fn measure(clock: &Clock, job: &Job<'_>, seconds: f64) -> anyhow::Result<Vec<Measured>> {
    switch::install()?;
    // At SCHED_FIFO, or bound to the packet thread's processor, this process and the
    // commands that it runs would wait for that thread for ever.
    let _ordinary = Ordinary::enter()?;
    let underlay = job.world.settings.underlay;
    let directory = tempfile::tempdir()?;
    let capture = directory.path().join("pass.pcap");
    let mac = if underlay.mac.is_group() || underlay.mac == Mac([0; 6]) { BRIDGE_MAC } else { underlay.mac };
    write_capture(&capture, job.trace, underlay.mac, mac)?;
    let card = job.world.neighbours.first().copied().unwrap_or((Mac([0x02, 0, 0, 0xff, 0, 2]), Ipv4Addr::new(10, 255, 1, 1)));
    let vni = job.world.snapshot.networks.first().map_or(Vni(100), |network| network.vni);

    let mut switch = Switch::start(directory.path(), &capture, (mac, underlay.address), card)?;
    switch.flows("br-phy", &physical_flows(underlay.address))?;
    switch.flows("br-int", &guest_flows(job.policy, vni, card.1))?;
    let mut measured = Vec::new();
    for (configuration, probability) in [("exact match cache as it comes", "100"), ("without exact match cache", "0")] {
        switch.set(&format!("other_config:emc-insert-inv-prob={probability}"))?;
        measured.push(one(clock, &mut switch, configuration, seconds)?);
    }
    Ok(measured)
}

fn one(clock: &Clock, switch: &mut Switch, configuration: &'static str, seconds: f64) -> anyhow::Result<Measured> {
    switch.realtime(true)?;
    let measured = (|| {
        // Connections are opened, and what upcalls install is there.
        std::thread::sleep(std::time::Duration::from_secs(1));
        let before = switch.traffic()?;
        let cycles = (0..WINDOWS).map(|_| switch.window(seconds / f64::from(WINDOWS))).collect::<anyhow::Result<Vec<f64>>>()?;
        let after = switch.traffic()?;
        let (received, sent) = (after.0 - before.0, after.1 - before.1);
        let mut sorted = cycles.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        anyhow::ensure!(sent > 0, "OVS took {received} packets and sent none: its flows do not fit this capture");
        Ok(Measured {
            configuration,
            mpps: clock.hz() / median / 1e6,
            cycles,
            sent_share: sent as f64 / received.max(1) as f64,
            connections: switch.connections()?,
        })
    })();
    switch.realtime(false)?;
    measured
}

/// Writes the pass, with the bridge's MAC where the card's was.
fn write_capture(path: &Path, trace: &Trace, card: Mac, bridge: Mac) -> anyhow::Result<()> {
    let mut changed = Trace::default();
    for frame in trace.iter() {
        let mut frame = frame.to_vec();
        if card != bridge && headers::read(&frame, 0) == Some(card.0) {
            headers::write(&mut frame, 0, bridge.0);
        }
        changed.push(&frame);
    }
    pcap::write(path, changed.iter()).with_context(|| path.display().to_string())
}

/// Port 1 is the capture, 2 the sink, 3 the patch to the guests' bridge.
fn physical_flows(card: Ipv4Addr) -> String {
    format!(
        "priority=100,in_port=1,udp,nw_dst={card},tp_dst=4789,actions=LOCAL\n\
         priority=50,in_port=1,actions=3\n\
         priority=100,in_port=LOCAL,actions=2\n"
    )
}

/// Port 1 is VXLAN, 2 the guests' sink, 3 the patch from the capture.
fn guest_flows(policy: Option<Policy>, vni: Vni, vtep: Ipv4Addr) -> String {
    let vni = vni.0;
    let push = format!("set_field:{vni}->tun_id,set_field:{vtep}->tun_dst,1");
    let track = format!("ct(table=1,zone={zone})", zone = vni & 0xffff);
    let commit = format!("ct(commit,zone={zone})", zone = vni & 0xffff);
    // Table 1 is from the wire, table 2 from a guest.
    let from_guest = track.replace("table=1", "table=2");
    let tracked = |ingress: &str| {
        format!(
            "table=0,in_port=1,tun_id={vni},ip,actions={track}\n\
             table=0,in_port=3,ip,actions={from_guest}\n\
             table=1,ct_state=+trk+est,actions=2\n\
             {ingress}\
             table=2,ct_state=+trk+est,actions={push}\n\
             table=2,ct_state=+trk+new,ip,actions={commit},{push}\n"
        )
    };
    match policy {
        Some(Policy::Forward) => "table=0,in_port=3,ip,actions=2\n".to_owned(),
        Some(Policy::Encap | Policy::Decap) => {
            format!("table=0,in_port=1,tun_id={vni},ip,actions=2\ntable=0,in_port=3,ip,actions={push}\n")
        }
        Some(Policy::DecapConntrack) => {
            tracked(&format!("table=1,ct_state=+trk+new,udp,nw_src=10.0.0.0/16,nw_dst=10.0.1.5,tp_dst=8080,actions={commit},2\n"))
        }
        Some(Policy::ConntrackEncap) => tracked(""),
        None => tracked(&format!("table=1,ct_state=+trk+new,udp,nw_src=10.0.0.0/16,tp_dst=8080,actions={commit},2\n")),
    }
}
