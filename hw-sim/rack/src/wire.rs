//! The wires of a rack: namespaces with two bridges, and nothing outside them.
//!
//! ```text
//! NAME-a1 (a card)    NAME-wire             NAME-net (the internet side)
//!   a1-under ---------- bridge underlay
//!   a1-pub   ---------- bridge public ------- internet 198.51.100.1/24
//!                                             lo 203.0.113.10/32, a host far away
//! ```
//!
//! Each card has a namespace for its two interfaces, as each server has its own
//! NICs: DPDK's af_packet driver would otherwise put interfaces of two cards
//! into one fanout group whenever their numbers happen to collide.
//!
//! The bridges carry frames only: the namespace of the wire has no address, so
//! what a capture on it shows was sent by a card. Needs root; see `loopback`
//! for how it goes without.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Gateway of the public network, held by the internet side.
pub const PUBLIC_GATEWAY: &str = "198.51.100.1";
/// Public addresses that control may hand out.
pub const PUBLIC_POOL: &str = "198.51.100.16-198.51.100.250";
/// A host on the internet, behind the gateway.
pub const FAR_HOST: &str = "203.0.113.10";

/// The wires of one region.
pub struct Wire {
    name: String,
    cards: Vec<String>,
}

impl Wire {
    /// The wires of the region that calls itself `name`, between these cards
    /// (short names such as `a1`).
    pub fn new(name: &str, cards: Vec<String>) -> Self {
        Self { name: name.to_owned(), cards }
    }

    /// The namespace with the interfaces of a card.
    fn card_namespace(&self, card: &str) -> String {
        format!("{}-{card}", self.name)
    }

    /// The namespace with both bridges.
    pub fn wire_namespace(&self) -> String {
        format!("{}-wire", self.name)
    }

    /// The namespace of the simulated internet.
    pub fn internet_namespace(&self) -> String {
        format!("{}-net", self.name)
    }

    /// Interfaces of a card, underlay first.
    fn card_interfaces(card: &str) -> (String, String) {
        (format!("{card}-under"), format!("{card}-pub"))
    }

    /// The settings of one card, whose interfaces are driven by `device`.
    pub fn card(&self, index: usize, device: &str) -> Result<String> {
        let card = self.cards.get(index).with_context(|| format!("card {index} has no wires"))?;
        let (under, public) = Self::card_interfaces(card);
        let namespace = format!("/run/netns/{}", self.card_namespace(card));
        Ok(format!(
            "[underlay]\ndevice = \"{device}\"\ninterface = \"{under}\"\nnetns = \"{namespace}\"\naddress = \"10.255.0.{address}\"\nprefix_length = 24\n\n\
             [public]\ndevice = \"{device}\"\ninterface = \"{public}\"\nnetns = \"{namespace}\"\ngateway = \"{PUBLIC_GATEWAY}\"\nprefix_length = 24\n",
            address = index + 11,
        ))
    }

    /// Lays all wires anew.
    pub fn lay(&self) -> Result<()> {
        self.remove();
        let (wire, net) = (self.wire_namespace(), self.internet_namespace());
        for namespace in self.namespaces() {
            ip(&["netns", "add", &namespace])?;
            // IPv6 neighbour discovery would talk on a wire that has to be silent.
            let silence = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
            let _ = Command::new("ip").args(["netns", "exec", &namespace, "sh", "-c", silence]).stderr(Stdio::null()).status();
        }
        let mut script = Batch::default();
        for (bridge, mtu) in [("underlay", "9216"), ("public", "1500")] {
            script.line(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0"));
            script.line(&format!("link set {bridge} mtu {mtu} up"));
        }
        for card in &self.cards {
            let namespace = self.card_namespace(card);
            let (under, public) = Self::card_interfaces(card);
            for (end, bridge, mtu) in [(under, "underlay", "9216"), (public, "public", "1500")] {
                script.line(&format!("link add {end}-b mtu {mtu} type veth peer name {end} mtu {mtu} netns {namespace}"));
                script.line(&format!("link set {end}-b master {bridge} up"));
            }
        }
        script.line(&format!("link add internet-b type veth peer name internet netns {net}"));
        script.line("link set internet-b master public up");
        script.run(&wire)?;
        for card in &self.cards {
            let (under, public) = Self::card_interfaces(card);
            let mut script = Batch::default();
            script.line(&format!("link set {under} up"));
            script.line(&format!("link set {public} up"));
            script.run(&self.card_namespace(card))?;
        }
        let mut script = Batch::default();
        script.line("link set lo up");
        script.line("link set internet up");
        script.line(&format!("addr add {PUBLIC_GATEWAY}/24 dev internet"));
        script.line(&format!("addr add {FAR_HOST}/32 dev lo"));
        script.run(&net)?;
        // On a real wire a frame carries its whole checksum; a veth leaves it to
        // hardware that is not there.
        let status =
            Command::new("ip").args(["netns", "exec", &net, "ethtool", "-K", "internet", "tx", "off"]).stdout(Stdio::null()).status();
        if !status.context("ethtool")?.success() {
            bail!("ethtool could not switch checksum offload off");
        }
        Ok(())
    }

    /// Removes every namespace of this name with all that is in it.
    pub fn remove(&self) {
        let mark = format!("{}-", self.name);
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&mark) {
                let _ = Command::new("ip").args(["netns", "del", &name]).stderr(Stdio::null()).status();
            }
        }
    }

    fn namespaces(&self) -> Vec<String> {
        let mut namespaces = vec![self.wire_namespace(), self.internet_namespace()];
        namespaces.extend(self.cards.iter().map(|card| self.card_namespace(card)));
        namespaces
    }
}

/// Commands for one `ip -batch`, which takes milliseconds where one process for
/// each takes a second in all.
#[derive(Default)]
struct Batch(String);

impl Batch {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn run(&self, namespace: &str) -> Result<()> {
        use std::io::Write;
        let mut child = Command::new("ip")
            .args(["-n", namespace, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("ip -batch")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(self.0.as_bytes())?;
        }
        if !child.wait()?.success() {
            bail!("ip could not lay the wires of {namespace}");
        }
        Ok(())
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("ip")?;
    if !status.success() {
        bail!("ip {}: {status}", arguments.join(" "));
    }
    Ok(())
}
