//! Puts a card together from its settings, in the order in which the parts need
//! each other, and runs it until it is told to stop.
//!
//! The order: storage target, packet path, metadata service, the card's thread
//! (which converges from its own disk), the host's link, and the API last, so
//! that control never finds half a card. Stopping flushes disks and leaves guests
//! and desired state as they are: guests go on, their I/O waits for the next start.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use card_proto::card::Hello;
use dataplane::io::PacketIo;
use dataplane::io::cable::CablePort;
use dataplane::io::packet::PacketPort;
use dataplane::io::udp::UdpPort;
use dataplane::{Dataplane, Mac, PublicSide, Underlay};
use storage_target::{Target, TargetSettings};

use crate::card::{self, Card};
use crate::console::Consoles;
use crate::converge::Config;
use crate::desired::Store;
use crate::devices::Parts;
use crate::host::{LinkCounters, Slot};
use crate::imds::{self, Subjects, token::TokenKey};
use crate::meters::Meters;
use crate::metrics::{self, Sources};
use crate::names::Names;
use crate::packets::Packets;
use crate::server::{self, Credentials};
use crate::settings::{Device, Role, Settings};

/// The mailbox's socket in the link folder.
const SLOT: &str = "slot.sock";
/// The two wires, as metrics name them.
const UNDERLAY: &str = "underlay";
const PUBLIC: &str = "public";

/// Runs a card until `stopped` ends.
///
/// # Errors
/// What keeps the card from starting, or from serving control.
pub async fn run(settings: Settings, stopped: impl Future<Output = ()>) -> anyhow::Result<()> {
    for folder in [&settings.state_dir, &settings.link_dir] {
        fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
    }
    let credentials = Credentials {
        authority: read(&settings.tls.authority)?,
        certificate: read(&settings.tls.certificate)?,
        key: read(&settings.tls.key)?,
    };
    let store = Store::open(&settings.state_dir).context("open the store of desired state")?;
    let consoles = Arc::new(Consoles::new(&settings.state_dir).context("open the consoles")?);
    let target = settings.storage.as_ref().map(|storage| {
        let dir = settings.state_dir.join("volumes");
        fs::create_dir_all(&dir)?;
        Target::start(TargetSettings { listen: storage.listen, dir, images: settings.images_dir.clone() }).map(Arc::new)
    });
    let target = target.transpose().context("start the storage target")?;
    let (names, meters) = (Arc::new(ArcSwap::from_pointee(Names::default())), Arc::new(Meters::default()));
    let dataplane = if settings.has(Role::Compute) { Some(Arc::new(packet_path(&settings, &meters)?)) } else { None };

    let subjects = Arc::new(ArcSwap::from_pointee(Subjects::new()));
    let imds_counters = Arc::new(imds::Counters::default());
    let _metadata = match &dataplane {
        Some(dataplane) => {
            let key = TokenKey::load(&settings.state_dir.join("imds.key")).context("read the key of metadata tokens")?;
            let (punted, replies) = (dataplane.punted(), dataplane.clone());
            let inject = move |port, frame: &[u8]| replies.inject(port, frame);
            Some(imds::Service::start(punted, inject, subjects.clone(), key, imds_counters.clone())?)
        }
        None => None,
    };

    let boot_id = u64::from_le_bytes(random()?);
    let capacity_bytes = settings.storage.as_ref().map_or(0, |storage| storage.capacity_bytes);
    let hello = Hello {
        card_id: settings.id.clone(),
        zone: settings.zone.clone(),
        boot_id,
        compute: settings.has(Role::Compute),
        storage: settings.has(Role::Storage),
        underlay_ipv4: settings.underlay.address.map_or(0, u32::from),
        storage_address: target.as_ref().map(|target| target.local_addr().to_string()).unwrap_or_default(),
        initiator_nqn: settings.initiator_nqn(),
        storage_bytes: capacity_bytes,
        ..Hello::default()
    };
    let parts = Parts {
        link_dir: settings.link_dir.clone(),
        images_dir: settings.images_dir.clone(),
        initiator_nqn: settings.initiator_nqn(),
        consoles: consoles.clone(),
        names: names.clone(),
        meters: meters.clone(),
        dataplane: dataplane.clone(),
        target: target.clone(),
    };
    let (handle, inbox) = card::channel();
    let config = Config { boot_id, capacity_bytes, store_complete: false };
    let card = Card::new(store, config, hello, parts, subjects, handle.clone()).context("make the card")?;
    let thread = card.start(inbox)?;
    let link = Arc::new(LinkCounters::default());
    let slot = if settings.has(Role::Compute) {
        let telling = handle.clone();
        let tell = move |number, event| telling.host(number, event);
        let socket = settings.link_dir.join(SLOT);
        Some(Slot::listen(&socket, consoles.clone(), link.clone(), tell).context("listen for the host")?)
    } else {
        None
    };
    let listener = tokio::net::TcpListener::bind(settings.metrics_listen).await;
    let listener = listener.with_context(|| format!("listen on {} for metrics", settings.metrics_listen))?;
    let packets = Packets { dataplane: dataplane.clone(), names: names.clone(), meters: meters.clone() };
    let sources = Sources { card: handle.clone(), dataplane, names, meters, target: target.clone(), link, imds: imds_counters };
    let metrics = tokio::spawn(metrics::serve(listener, sources));

    let served = server::serve(settings.listen, credentials, handle.clone(), consoles, packets, stopped).await;
    metrics.abort();
    handle.stop();
    let ended = move || {
        drop(slot);
        thread.join()
    };
    if tokio::task::spawn_blocking(ended).await.is_ok_and(|joined| joined.is_err()) {
        tracing::error!("the card's thread had panicked");
    }
    if let Some(target) = target {
        target.stop();
    }
    served.with_context(|| format!("serve control on {}", settings.listen))
}

/// Opens the wires of the card and starts the packet path on them.
fn packet_path(settings: &Settings, meters: &Meters) -> anyhow::Result<Dataplane> {
    let underlay = &settings.underlay;
    let address = underlay.address.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let (wire, mac) = match underlay.device {
        Device::Udp => {
            let port = UdpPort::bind(address).with_context(|| format!("bind the underlay to {address}"))?;
            let counters = port.counters();
            meters.put("udp", UNDERLAY, move || {
                vec![("wrong_port", read_counter(&counters.wrong_port)), ("oversize", read_counter(&counters.oversize))]
            });
            (Some(Box::new(port) as Box<dyn PacketIo>), Mac([0; 6]))
        }
        device => {
            open((device, UNDERLAY), meters, underlay.interface.as_deref(), underlay.netns.as_deref()).context("open the underlay")?
        }
    };
    let encapsulated = underlay.device != Device::Udp;
    let underlay = Underlay { address, prefix_length: underlay.prefix_length, mac, encapsulated };
    let public = &settings.public;
    let (outside, mac) = match (public.device, public.near, public.far) {
        (Device::Cable, Some(near), Some(far)) => {
            let port = CablePort::plug(near, far).with_context(|| format!("plug the public side in at {near}"))?;
            let [first, second, third, fourth, fifth, ..] = random()?;
            // Locally administered, one station.
            let mac = Mac([0x02, first, second, third, fourth, fifth]);
            (Some(Box::new(port) as Box<dyn PacketIo>), mac)
        }
        (device, ..) => {
            open((device, PUBLIC), meters, public.interface.as_deref(), public.netns.as_deref()).context("open the public side")?
        }
    };
    let public = match (&outside, public.gateway) {
        (Some(_), Some(gateway)) => Some(PublicSide { mac, gateway, prefix_length: public.prefix_length }),
        _ => None,
    };
    let seed = u64::from_le_bytes(random()?);
    Ok(Dataplane::start(dataplane::Settings { underlay, public, seed }, wire, outside)?)
}

/// Opens an interface that carries Ethernet frames.
fn open(
    (device, name): (Device, &'static str),
    meters: &Meters,
    interface: Option<&str>,
    netns: Option<&Path>,
) -> anyhow::Result<(Option<Box<dyn PacketIo>>, Mac)> {
    let interface = interface.unwrap_or_default();
    match device {
        Device::None | Device::Udp | Device::Cable => Ok((None, Mac([0; 6]))),
        Device::Packet => {
            let port = PacketPort::open(interface, netns).with_context(|| format!("open a packet socket on {interface}"))?;
            let mac = Mac(port.mac());
            let counters = port.counters();
            meters.put("packet", name, move || {
                vec![("unsupported", read_counter(&counters.unsupported)), ("errors", read_counter(&counters.errors))]
            });
            Ok((Some(Box::new(port)), mac))
        }
        #[cfg(feature = "dpdk")]
        Device::Dpdk => {
            use dataplane::io::dpdk::DpdkPort;
            // A name of the kernel has neither a comma nor a colon; device arguments and PCI addresses have.
            let port =
                if interface.contains([',', ':']) { DpdkPort::open(interface, netns) } else { DpdkPort::open_interface(interface, netns) };
            let port = port.with_context(|| format!("open {interface} by DPDK"))?;
            let mac = Mac(port.mac());
            let counters = port.counters();
            meters.put("dpdk", name, move || {
                vec![
                    ("tagged", read_counter(&counters.tagged)),
                    ("oversize", read_counter(&counters.oversize)),
                    ("no_mbuf", read_counter(&counters.no_mbuf)),
                ]
            });
            Ok((Some(Box::new(port)), mac))
        }
        // Settings::load says so first, and better.
        #[cfg(not(feature = "dpdk"))]
        Device::Dpdk => anyhow::bail!("this nitro-card was built without DPDK"),
    }
}

fn read_counter(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn random() -> anyhow::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    Ok(bytes)
}
