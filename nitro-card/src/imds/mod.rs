//! The instance metadata service: what a guest reads at 169.254.169.254.
//!
//! The packet path hands the frames of guests to that address to one thread
//! here, which keeps a TCP [`stack`] per port that talks, answers by [`http`]
//! from the [`tree`] of the port's instance, and injects the replies into the
//! same port. A [`token`] proves itself, so a restart of the card forgets
//! nothing. The thread sleeps while no guest asks.

pub mod http;
pub mod stack;
pub mod token;
pub mod tree;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, after, bounded, never, select};
use dataplane::PortId;
use dataplane::packet::Packet;

use http::Context;
use stack::Stack;
use token::TokenKey;
use tree::Subject;

/// What the service knows, by port: replaced as a whole by the card.
pub type Subjects = HashMap<PortId, Arc<Subject>>;

/// Frames taken from the packet path before replies go out.
const BATCH: usize = 64;

/// The running service. Dropping it ends its thread.
pub struct Service {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Requests answered, by status class.
#[derive(Debug, Default)]
#[allow(missing_docs)] // the names say it
pub struct Counters {
    pub answered: AtomicU64,
    pub refused: AtomicU64,
}

impl Service {
    /// Serves the guests of every port in `subjects`; replies go to `inject`.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(
        punted: Receiver<(PortId, Packet)>,
        inject: impl Fn(PortId, &[u8]) + Send + 'static,
        subjects: Arc<ArcSwap<Subjects>>,
        key: TokenKey,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let (stop, stopped) = bounded(0);
        let mut worker = Worker { stacks: HashMap::new(), inject, subjects, key, counters, epoch: Instant::now() };
        let thread = std::thread::Builder::new().name("imds".into()).spawn(move || worker.run(&punted, &stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The thread sees the channel close.
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the metadata service had panicked");
        }
    }
}

struct Worker<I> {
    stacks: HashMap<PortId, Stack>,
    inject: I,
    subjects: Arc<ArcSwap<Subjects>>,
    key: TokenKey,
    counters: Arc<Counters>,
    epoch: Instant,
}

impl<I: Fn(PortId, &[u8])> Worker<I> {
    fn run(&mut self, punted: &Receiver<(PortId, Packet)>, stopped: &Receiver<()>) {
        loop {
            let now = self.epoch.elapsed();
            let next = self.stacks.values_mut().filter_map(|stack| stack.deadline(now)).min();
            let timer = next.map_or_else(never, |next| after(next.saturating_sub(now)));
            select! {
                recv(stopped) -> _ => return,
                recv(timer) -> _ => {}
                recv(punted) -> first => {
                    // The packet path has ended.
                    let Ok(first) = first else { return };
                    for (port, packet) in std::iter::once(first).chain(punted.try_iter().take(BATCH)) {
                        self.receive(port, packet.as_slice());
                    }
                }
            }
            self.poll();
        }
    }

    fn receive(&mut self, port: PortId, frame: &[u8]) {
        let now = self.epoch.elapsed();
        let stack = match self.stacks.entry(port) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let Some(seed) = random() else { return };
                entry.insert(Stack::new(u64::from_ne_bytes(seed), now))
            }
        };
        stack.receive(frame, now);
    }

    fn poll(&mut self) {
        let subjects = self.subjects.load();
        let (key, inject, counters) = (&self.key, &self.inject, &self.counters);
        let now = self.epoch.elapsed();
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.stacks.retain(|port, stack| {
            let subject = subjects.get(port).map(AsRef::as_ref);
            let Some(nonce) = random() else { return true };
            let context = Context { subject, key, now_s, nonce };
            let answered = |status| {
                let counter = if status == 200 { &counters.answered } else { &counters.refused };
                counter.fetch_add(1, Ordering::Relaxed);
            };
            stack.poll(now, &context, answered, |frame| inject(*port, frame));
            stack.deadline(now).is_some()
        });
    }
}

fn random() -> Option<[u8; 8]> {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => Some(bytes),
        Err(error) => {
            tracing::error!(%error, "no random bytes");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use dataplane::io::mem::MemPort;
    use dataplane::{Dataplane, Mac, PortConfig, Prefix, Settings, Snapshot, Underlay, Vni};
    use smoltcp::iface::{Interface, SocketSet};
    use smoltcp::phy::{ChecksumCapabilities, DeviceCapabilities, Medium, RxToken, TxToken};
    use smoltcp::socket::tcp;
    use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
    const GUEST_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

    /// The guest's end of a port, as a device of its own TCP stack.
    struct Nic(MemPort);
    struct Received(Vec<u8>);
    struct Sent<'a>(&'a MemPort);

    impl smoltcp::phy::Device for Nic {
        type RxToken<'a> = Received;
        type TxToken<'a> = Sent<'a>;

        fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
            Some((Received(self.0.receive()?), Sent(&self.0)))
        }

        fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
            Some(Sent(&self.0))
        }

        fn capabilities(&self) -> DeviceCapabilities {
            let mut capabilities = DeviceCapabilities::default();
            capabilities.medium = Medium::Ethernet;
            capabilities.max_transmission_unit = 1514;
            capabilities.checksum = ChecksumCapabilities::default();
            capabilities
        }
    }

    impl RxToken for Received {
        fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
            f(&self.0)
        }
    }

    impl TxToken for Sent<'_> {
        fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
            let mut frame = vec![0; len];
            let result = f(&mut frame);
            self.0.send(&frame);
            result
        }
    }

    fn data_plane() -> (Arc<Dataplane>, MemPort) {
        let underlay = Underlay { address: Ipv4Addr::new(10, 255, 0, 1), prefix_length: 24, mac: Mac([4; 6]), encapsulated: true };
        let settings = Settings { underlay, public: None, flows_max: dataplane::flow::FLOWS_MAX, seed: 1 };
        let dataplane = Arc::new(Dataplane::start(settings, None, None).unwrap());
        // Not even a rule of the guest's own groups stands between it and its metadata.
        let port = PortConfig { mtu: 1500, ..PortConfig::new(PortId(1), Vni(7), GUEST_MAC, GUEST, Prefix::new(GUEST, 24)) };
        dataplane.apply(Arc::new(Snapshot { ports: vec![port], ..Snapshot::default() }));
        let (card, guest) = MemPort::pair().unwrap();
        dataplane.port_attach(PortId(1), Box::new(card));
        (dataplane, guest)
    }

    #[test]
    fn a_guest_reads_its_metadata_through_the_packet_path_far_below_a_second() {
        let (dataplane, guest) = data_plane();
        let mut subject = tree::tests::rich();
        subject.metadata.options.as_mut().unwrap().tokens_required = false;
        let subjects = Arc::new(ArcSwap::from_pointee(Subjects::from([(PortId(1), Arc::new(subject))])));
        let key = TokenKey::load(&tempfile::tempdir().unwrap().path().join("key")).unwrap();
        let (counters, replies) = (Arc::new(Counters::default()), dataplane.clone());
        let inject = move |port, frame: &[u8]| replies.inject(port, frame);
        let _service = Service::start(dataplane.punted(), inject, subjects, key, counters.clone()).unwrap();

        let mut nic = Nic(guest);
        let epoch = Instant::now();
        let clock = || smoltcp::time::Instant::from_micros(i64::try_from(epoch.elapsed().as_micros()).unwrap());
        let config = smoltcp::iface::Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC.0)));
        let mut interface = Interface::new(config, &mut nic, clock());
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 1, 1)).unwrap();
        let mut sockets = SocketSet::new(Vec::new());
        let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
        let socket = sockets.add(tcp::Socket::new(buffer(), buffer()));
        let mut slowest = Duration::ZERO;
        for round in 0..200_u16 {
            let begun = Instant::now();
            let mut answer = Vec::new();
            sockets
                .get_mut::<tcp::Socket<'_>>(socket)
                .connect(interface.context(), (IpAddress::from(stack::ADDRESS), 80), 40000 + round)
                .unwrap();
            let mut asked = false;
            while !String::from_utf8_lossy(&answer).ends_with("i-0123456789abcdef0") {
                assert!(begun.elapsed() < Duration::from_secs(10), "no answer in round {round}: {:?}", String::from_utf8_lossy(&answer));
                interface.poll(clock(), &mut nic, &mut sockets);
                let socket = sockets.get_mut::<tcp::Socket<'_>>(socket);
                if !asked && socket.can_send() {
                    asked = socket.send_slice(b"GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n").is_ok();
                }
                while socket.can_recv() {
                    socket
                        .recv(|bytes| {
                            answer.extend_from_slice(bytes);
                            (bytes.len(), ())
                        })
                        .unwrap();
                }
                std::thread::sleep(Duration::from_micros(20));
            }
            slowest = slowest.max(begun.elapsed());
            sockets.get_mut::<tcp::Socket<'_>>(socket).abort();
            interface.poll(clock(), &mut nic, &mut sockets);
        }
        assert_eq!(counters.answered.load(Ordering::Relaxed), 200);
        // The SDKs wait one second, once.
        assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    }
}
