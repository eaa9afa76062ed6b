//! The data plane against Linux: the kernel's own vxlan device is the other card,
//! and a kernel in a namespace of its own is the guest.
//!
//! ```text
//! guest namespace            card namespace                other namespace
//! eth0 10.0.1.10 --veth-- port [Dataplane] wire --veth-- eth0 10.255.0.12
//!                                                        vxlan0 10.0.1.20 (VNI 7)
//!                                                        vxlan1 10.0.1.20 (VNI 8)
//! ```
//!
//! Needs root; without, each test says so and passes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dataplane::io::packet::{PacketCounters, PacketPort};
use dataplane::{
    Dataplane, DropReason, Mac, Mapping, NetworkConfig, PortConfig, PortId, Prefix, Protocol, Remote, Rule, Settings, Snapshot, Underlay,
    Vni,
};

const CARD: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 11);
const OTHER_CARD: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 12);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 10);
const OTHER_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 20);
const GUEST_MAC: Mac = Mac([2, 0, 0, 0, 1, 10]);
const OTHER_GUEST_MAC: Mac = Mac([2, 0, 0, 0, 1, 20]);
const PATIENCE: Duration = Duration::from_secs(10);

/// An empty network namespace, which ends with the last interest in it.
struct Namespace(File);

impl Namespace {
    fn new() -> Option<Self> {
        let made = thread::spawn(|| {
            // SAFETY: moves only this thread, which owns nothing that knows a network.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        });
        match made.join().unwrap() {
            Ok(file) => Some(Self(file)),
            Err(error) => {
                println!("skipped: no network namespace can be made here: {error}");
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Runs `action` on a thread inside.
    fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let network = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(self.0.as_fd(), network).unwrap();
                action()
            });
            inside.join().unwrap()
        })
    }

    fn ip(&self, arguments: &str) {
        let output = self.run(|| Command::new("ip").args(arguments.split_whitespace()).output().unwrap());
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn has_vxlan(&self) -> bool {
        let probe = || Command::new("ip").args("link add probe type vxlan id 1 dstport 4789 remote 127.0.0.1".split(' ')).output();
        let output = self.run(probe).unwrap();
        if !output.status.success() {
            println!("skipped: this kernel has no vxlan: {}", String::from_utf8_lossy(&output.stderr));
        }
        output.status.success()
    }
}

/// The three namespaces with the card in the middle.
struct Lab {
    guest: Namespace,
    other: Namespace,
    dataplane: Dataplane,
    wire: Arc<PacketCounters>,
    port: Arc<PacketCounters>,
}

fn lab() -> Option<Lab> {
    let (guest, card, other) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
    if !Namespace::new()?.has_vxlan() {
        return None;
    }
    card.ip(&format!("link add port mtu 9001 up type veth peer name eth0 mtu 9001 address {GUEST_MAC} netns {}", guest.path().display()));
    card.ip(&format!("link add wire mtu 9100 up type veth peer name eth0 mtu 9100 netns {}", other.path().display()));
    guest.ip(&format!("address add {GUEST}/24 dev eth0"));
    guest.ip("link set eth0 up");
    other.ip(&format!("address add {OTHER_CARD}/24 dev eth0"));
    other.ip("link set eth0 up");
    for (name, vni, address) in [("vxlan0", 7, OTHER_GUEST), ("vxlan1", 8, Ipv4Addr::new(10, 0, 2, 20))] {
        other.ip(&format!(
            "link add {name} mtu 9001 address {OTHER_GUEST_MAC} type vxlan id {vni} local {OTHER_CARD} remote {CARD} dstport 4789 nolearning"
        ));
        other.ip(&format!("address add {address}/24 dev {name}"));
        other.ip(&format!("link set {name} up"));
        // No card answers ARP from the wire: the mapping says where everybody is.
        other.ip(&format!("neighbour add {} lladdr {GUEST_MAC} dev {name}", Ipv4Addr::from(u32::from(address) - 10)));
    }

    let wire = PacketPort::open("wire", Some(&card.path())).unwrap();
    let port = PacketPort::open("port", Some(&card.path())).unwrap();
    let (wire_counters, port_counters) = (wire.counters(), port.counters());
    let underlay = Underlay { address: CARD, prefix_length: 24, mac: Mac(wire.mac()), encapsulated: true };
    let settings = Settings { underlay, public: None, flows_max: dataplane::flow::FLOWS_MAX, seed: 1 };
    let dataplane = Dataplane::start(settings, Some(Box::new(wire)), None).unwrap();
    dataplane.apply(Arc::new(snapshot()));
    dataplane.port_attach(PortId(1), Box::new(port));
    Some(Lab { guest, other, dataplane, wire: wire_counters, port: port_counters })
}

fn snapshot() -> Snapshot {
    let vpc = Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16);
    let all = Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: Remote::Prefix(vpc) };
    let port = PortConfig {
        vpc_prefixes: vec![vpc],
        ingress: vec![all],
        egress: vec![all],
        ..PortConfig::new(PortId(1), Vni(7), GUEST_MAC, GUEST, Prefix::new(Ipv4Addr::new(10, 0, 1, 0), 24))
    };
    let mappings = vec![Mapping::new(GUEST, GUEST_MAC, CARD), Mapping::new(OTHER_GUEST, OTHER_GUEST_MAC, OTHER_CARD)];
    Snapshot { ports: vec![port], networks: vec![NetworkConfig::new(Vni(7), mappings)], ..Snapshot::default() }
}

/// A datagram of `len` bytes goes there and comes back.
fn echo(from: &Namespace, to: &Namespace, address: Ipv4Addr, len: usize) -> bool {
    let server = to.run(|| UdpSocket::bind((address, 7)).unwrap());
    let client = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    }
    let content: Vec<u8> = (0..len).map(|index| index as u8).collect();
    let mut buffer = vec![0; len + 1];
    // The first one may wait for ARP on both sides.
    (0..10).any(|_| {
        client.send_to(&content, (address, 7)).unwrap();
        let Ok((got, source)) = server.recv_from(&mut buffer) else { return false };
        assert_eq!(buffer[..got], content);
        server.send_to(&buffer[..got], source).unwrap();
        client.recv_from(&mut buffer).is_ok_and(|(got, _)| buffer[..got] == content)
    })
}

/// Sends `len` bytes over one connection and compares what arrives.
fn transfer(from: &Namespace, to: &Namespace, address: Ipv4Addr, len: usize) -> Duration {
    let content: Vec<u8> = (0..len).map(|index| (index / 251) as u8).collect();
    let listener = to.run(|| TcpListener::bind((address, 80)).unwrap());
    let start = Instant::now();
    let got = thread::scope(|scope| {
        let server = scope.spawn(move || {
            let mut got = Vec::new();
            let mut stream = listener.accept().unwrap().0;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.read_to_end(&mut got).unwrap();
            got
        });
        let mut client = from.run(|| TcpStream::connect((address, 80)).unwrap());
        client.set_write_timeout(Some(PATIENCE)).unwrap();
        client.write_all(&content).unwrap();
        drop(client);
        server.join().unwrap()
    });
    assert!(got == content, "{} of {len} bytes arrived, or others", got.len());
    start.elapsed()
}

/// ICMP echo with `len` bytes of payload; true when the answer carries them.
fn ping(from: &Namespace, address: Ipv4Addr, len: usize) -> bool {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrV4, SocketType, ipproto, recv, sendto, socket, sockopt};
    let socket = from.run(|| socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap());
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(200))).unwrap();
    let mut request = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    request.extend((0..len).map(|index| index as u8));
    let sum = request.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    request[2..4].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        sendto(&socket, &request, SendFlags::empty(), &SocketAddrV4::new(address, 0)).unwrap();
        let mut answer = vec![0; len + 100];
        while let Ok((got, _)) = recv(&socket, &mut answer[..], RecvFlags::empty()) {
            if answer[20] == 0 && answer[24..got] == request[4..] {
                return true;
            }
        }
    }
    false
}

#[test]
fn guest_and_a_guest_behind_the_kernels_vxlan_reach_each_other() {
    let Some(lab) = lab() else { return };
    assert!(ping(&lab.guest, OTHER_GUEST, 56), "{:?}", lab.dataplane.counters());
    assert!(ping(&lab.other, GUEST, 56));
    // 8,973 and the headers of UDP and IP are 9,001.
    for len in [1, 1472, 8973] {
        assert!(echo(&lab.guest, &lab.other, OTHER_GUEST, len), "{len} bytes out: {:?}", lab.dataplane.counters());
        assert!(echo(&lab.other, &lab.guest, GUEST, len), "{len} bytes in: {:?}", lab.dataplane.counters());
    }
    assert!(ping(&lab.guest, OTHER_GUEST, 8973));
    assert!(ping(&lab.guest, Ipv4Addr::new(10, 0, 1, 1), 56), "the router is the card");
    let out = transfer(&lab.guest, &lab.other, OTHER_GUEST, 4 << 20);
    let back = transfer(&lab.other, &lab.guest, GUEST, 4 << 20);
    println!("4 MiB over TCP: out {out:?}, back {back:?}");
    for counters in [&lab.wire, &lab.port] {
        assert_eq!(counters.unsupported.load(std::sync::atomic::Ordering::Relaxed), 0);
    }
}

#[test]
fn network_that_the_card_does_not_have_is_dropped_and_counted() {
    let Some(lab) = lab() else { return };
    let client = lab.other.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    let start = Instant::now();
    while lab.dataplane.counters().drops.get(DropReason::UnknownVni) == 0 {
        assert!(start.elapsed() < PATIENCE);
        client.send_to(b"wrong network", (Ipv4Addr::new(10, 0, 2, 10), 7)).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn guest_is_believed_only_from_the_card_it_is_mapped_to() {
    let Some(lab) = lab() else { return };
    let mut moved = snapshot();
    moved.networks[0].mappings[1].vtep = Ipv4Addr::new(10, 255, 0, 13);
    lab.dataplane.apply(Arc::new(moved));
    let client = lab.other.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    let start = Instant::now();
    while lab.dataplane.counters().drops.get(DropReason::UnmappedVtep) == 0 {
        assert!(start.elapsed() < PATIENCE);
        client.send_to(b"not mapped here", (GUEST, 7)).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
}
