//! A TCP endpoint at 169.254.169.254:80 for one port.
//!
//! Frames of the guest go in, frames to the guest come out; the endpoint has no
//! other way to the world, so nobody but the guest of the port can reach it.
//! The link is point to point: a reply goes to the MAC that the guest sent
//! from, and the stack below Ethernet is smoltcp on bare IP.
//!
//! Bounds per guest: `CONNECTIONS_MAX` connections; when a new one comes, the
//! one that was idle longest makes room.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use dataplane::Mac;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr, IpProtocol, Ipv4Packet, TcpPacket};

use super::http::{self, Context, HEAD_MAX, Response};

/// Where every guest finds the service.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

const HTTP_PORT: u16 = 80;
const CONNECTIONS_MAX: usize = 32;
const RECEIVE_BYTES: usize = 4 * 1024;
const SEND_BYTES: usize = 16 * 1024;
/// After this long without a byte a connection is dropped.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Of the card's replies; a guest with a smaller one says so in its SYN.
const MTU: usize = 1500;

/// The endpoint of one port.
pub struct Stack {
    interface: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// Ethernet addresses of the last frame, guest and card.
    ends: (Mac, Mac),
}

struct Connection {
    socket: SocketHandle,
    input: Vec<u8>,
    /// What is still to be sent of the last response.
    output: VecDeque<u8>,
    closing: bool,
    active: Duration,
}

impl Stack {
    /// An endpoint; `seed` makes its sequence numbers unpredictable.
    #[must_use]
    pub fn new(seed: u64, now: Duration) -> Self {
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, instant(now));
        // One address and one route have room in every build of smoltcp.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(ADDRESS.into(), 32));
        });
        let _ = interface.routes_mut().add_default_ipv4_route(ADDRESS);
        Self { interface, wire, sockets: SocketSet::new(Vec::new()), connections: Vec::new(), ends: (Mac([0; 6]), Mac([0; 6])) }
    }

    /// Takes a frame of the guest. What is not TCP to the service is ignored.
    pub fn receive(&mut self, frame: &[u8], now: Duration) {
        let Some((ends, packet, opens)) = dissect(frame) else { return };
        self.ends = ends;
        if opens {
            self.listen(now);
        }
        self.wire.received.push_back(packet.to_vec());
    }

    /// Lets everything happen that can, and hands each frame for the guest to `send`.
    pub fn poll(&mut self, now: Duration, context: &Context<'_>, mut answered: impl FnMut(u16), mut send: impl FnMut(&[u8])) {
        loop {
            self.interface.poll(instant(now), &mut self.wire, &mut self.sockets);
            let mut progress = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.socket);
                progress |= connection.serve(socket, now, context, &mut answered);
            }
            if !progress {
                break;
            }
        }
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            let ended = sockets.get::<tcp::Socket<'_>>(connection.socket).state() == tcp::State::Closed;
            if ended {
                sockets.remove(connection.socket);
            }
            !ended
        });
        let (guest, card) = self.ends;
        for packet in self.wire.sent.drain(..) {
            let mut frame = Vec::with_capacity(14 + packet.len());
            frame.extend(guest.0);
            frame.extend(card.0);
            frame.extend([0x08, 0x00]);
            frame.extend(packet);
            send(&frame);
        }
    }

    /// When [`Stack::poll`] has to be called again without a frame; `None`: the stack may be dropped.
    pub fn deadline(&mut self, now: Duration) -> Option<Duration> {
        let idle = self.connections.iter().map(|connection| connection.active + IDLE_MAX).min()?;
        let stack = self.interface.poll_at(instant(now), &self.sockets);
        let stack = stack.map(|at| Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)));
        Some(stack.map_or(idle, |stack| stack.min(idle)))
    }

    /// Makes sure that a socket waits for the connection that is about to come.
    fn listen(&mut self, now: Duration) {
        let listening = |connection: &Connection| self.sockets.get::<tcp::Socket<'_>>(connection.socket).is_listening();
        if self.connections.iter().any(listening) {
            return;
        }
        if CONNECTIONS_MAX <= self.connections.len() {
            let oldest = self.connections.iter().enumerate().min_by_key(|(_, connection)| connection.active);
            if let Some(index) = oldest.map(|(index, _)| index) {
                let connection = self.connections.swap_remove(index);
                self.sockets.remove(connection.socket);
            }
        }
        let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
        let mut socket = tcp::Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
        // Answers are whole: waiting for more to send only costs the guest time.
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(smoltcp::time::Duration::from_secs(10)));
        if socket.listen(HTTP_PORT).is_err() {
            return;
        }
        let socket = self.sockets.add(socket);
        self.connections.push(Connection { socket, input: Vec::new(), output: VecDeque::new(), closing: false, active: now });
    }
}

impl Connection {
    /// Moves bytes both ways; true when another look at the stack is worth it.
    fn serve(&mut self, socket: &mut tcp::Socket<'_>, now: Duration, context: &Context<'_>, answered: &mut impl FnMut(u16)) -> bool {
        let mut progress = false;
        if self.active + IDLE_MAX <= now {
            socket.abort();
        }
        while !self.closing && self.output.is_empty() {
            let mut bytes = [0; 1024];
            let room = HEAD_MAX + bytes.len();
            let count = if self.input.len() < room && socket.can_recv() { socket.recv_slice(&mut bytes).unwrap_or(0) } else { 0 };
            self.input.extend(bytes.iter().take(count));
            if let Some(Response { status, bytes, close, ttl }) = http::answer(&mut self.input, context) {
                answered(status);
                socket.set_hop_limit(Some(ttl.max(1)));
                self.output.extend(bytes);
                self.closing = close;
            } else if count == 0 {
                break;
            }
            progress = true;
            self.active = now;
        }
        while !self.output.is_empty() && socket.can_send() {
            let (front, _) = self.output.as_slices();
            let count = socket.send_slice(front).unwrap_or(0);
            self.output.drain(..count);
            self.active = now;
            progress |= 0 < count;
            if count == 0 {
                break;
            }
        }
        let guest_closed = socket.is_active() && !socket.may_recv() && socket.state() == tcp::State::CloseWait;
        if socket.may_send() && self.output.is_empty() && (self.closing || guest_closed) {
            socket.close();
            progress = true;
        }
        progress
    }
}

/// Ethernet ends (guest, card) and IP packet of a frame to the service, and
/// whether it opens a connection.
fn dissect(frame: &[u8]) -> Option<((Mac, Mac), &[u8], bool)> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    if ethernet.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ends = (Mac(ethernet.src_addr().0), Mac(ethernet.dst_addr().0));
    let packet = frame.get(14..)?;
    let ip = Ipv4Packet::new_checked(packet).ok()?;
    if ip.dst_addr() != ADDRESS || ip.next_header() != IpProtocol::Tcp || ip.more_frags() || ip.frag_offset() != 0 {
        return None;
    }
    let segment = TcpPacket::new_checked(ip.payload()).ok()?;
    let opens = segment.syn() && !segment.ack() && segment.dst_port() == HTTP_PORT;
    Some((ends, packet, opens))
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// The point-to-point link, without Ethernet.
#[derive(Default)]
struct Wire {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sent<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A guest may leave checksums to its device, and this is its device.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sent<'a>(&'a mut Vec<Vec<u8>>);

impl phy::TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use crate::imds::token::TokenKey;
    use crate::imds::tree::tests::rich;
    use smoltcp::wire::{IpAddress, Ipv4Repr, TcpControl, TcpRepr, TcpSeqNumber};

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);

    /// A guest: the other end of the wire, as smoltcp too.
    struct Guest {
        interface: Interface,
        wire: Wire,
        sockets: SocketSet<'static>,
        stack: Stack,
        key: TokenKey,
        now: Duration,
        ttls: Vec<u8>,
    }

    impl Guest {
        fn new() -> Self {
            let mut wire = Wire::default();
            let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut wire, instant(Duration::ZERO));
            interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 24)).unwrap());
            interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 1, 1)).unwrap();
            let key = TokenKey::load(&tempfile::tempdir().unwrap().path().join("key")).unwrap();
            let sockets = SocketSet::new(Vec::new());
            Self { interface, wire, sockets, stack: Stack::new(1, Duration::ZERO), key, now: Duration::ZERO, ttls: Vec::new() }
        }

        fn connect(&mut self, from: u16) -> SocketHandle {
            let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
            let mut socket = tcp::Socket::new(buffer(), buffer());
            socket.connect(self.interface.context(), (IpAddress::from(ADDRESS), HTTP_PORT), from).unwrap();
            self.sockets.add(socket)
        }

        fn turn(&mut self) {
            self.interface.poll(instant(self.now), &mut self.wire, &mut self.sockets);
            for packet in self.wire.sent.drain(..) {
                let frame = [&[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 0][..], &packet].concat();
                self.stack.receive(&frame, self.now);
            }
            let subject = rich();
            let context = Context { subject: Some(&subject), key: &self.key, now_s: 5, nonce: [0; 8] };
            self.stack.poll(
                self.now,
                &context,
                |_| (),
                |frame| {
                    assert_eq!(frame[..14], [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 8, 0]);
                    self.ttls.push(frame[14 + 8]);
                    self.wire.received.push_back(frame[14..].to_vec());
                },
            );
        }

        fn ask(&mut self, handle: SocketHandle, request: &str) -> String {
            let request = request.replace('\n', "\r\n");
            let mut sent = 0;
            let mut answer = Vec::new();
            for _ in 0..2000 {
                self.turn();
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
                if socket.can_send() && sent < request.len() {
                    sent += socket.send_slice(&request.as_bytes()[sent..]).unwrap();
                }
                while socket.can_recv() {
                    socket
                        .recv(|bytes| {
                            answer.extend(bytes.iter());
                            (bytes.len(), ())
                        })
                        .unwrap();
                }
                if let Some((head, body)) = String::from_utf8_lossy(&answer).split_once("\r\n\r\n") {
                    let length: usize = head.split_once("Content-Length: ").unwrap().1.lines().next().unwrap().parse().unwrap();
                    if length <= body.len() {
                        return String::from_utf8_lossy(&answer).into_owned();
                    }
                }
                self.now += Duration::from_micros(100);
            }
            panic!("no answer: {:?}", String::from_utf8_lossy(&answer));
        }
    }

    #[test]
    fn one_connection_carries_a_token_and_many_answers() {
        let mut guest = Guest::new();
        let socket = guest.connect(40000);
        let answer = guest.ask(socket, "PUT /latest/api/token HTTP/1.1\nX-aws-ec2-metadata-token-ttl-seconds: 60\n\n");
        let token = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
        assert!(guest.ttls.contains(&1), "the token goes one hop");
        guest.ttls.clear();
        for _ in 0..50 {
            let answer = guest.ask(socket, &format!("GET /latest/meta-data/instance-id HTTP/1.1\nX-aws-ec2-metadata-token: {token}\n\n"));
            assert!(answer.ends_with("i-0123456789abcdef0"), "{answer}");
        }
        assert_eq!(guest.stack.connections.len(), 1);
        assert!(guest.ttls.contains(&64));
    }

    #[test]
    fn closed_connections_leave_nothing() {
        let mut guest = Guest::new();
        for round in 0..200_u16 {
            let socket = guest.connect(40000 + round);
            let answer = guest.ask(socket, "GET / HTTP/1.1\nConnection: close\n\n");
            assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
            guest.sockets.get_mut::<tcp::Socket<'_>>(socket).close();
            guest.turn();
        }
        assert!(guest.stack.connections.len() <= CONNECTIONS_MAX);
        guest.now += Duration::from_secs(300);
        guest.turn();
        guest.turn();
        assert_eq!(guest.stack.connections.len(), 0);
        assert_eq!(guest.stack.deadline(guest.now), None);
    }

    #[test]
    fn idle_connections_make_room_and_time_out() {
        let mut guest = Guest::new();
        for round in 0..100_u16 {
            guest.connect(40000 + round);
            guest.turn();
            guest.turn();
            guest.now += Duration::from_millis(1);
        }
        assert_eq!(guest.stack.connections.len(), CONNECTIONS_MAX);
        let socket = guest.connect(50000);
        assert!(guest.ask(socket, "GET / HTTP/1.1\n\n").starts_with("HTTP/1.1 401"));
        assert!(guest.stack.deadline(guest.now).unwrap() <= guest.now + IDLE_MAX);
        guest.now += IDLE_MAX;
        let subject = rich();
        let context = Context { subject: Some(&subject), key: &guest.key, now_s: 5, nonce: [0; 8] };
        guest.stack.poll(guest.now, &context, |_| (), |_| ());
        assert!(guest.stack.connections.is_empty());
    }

    #[test]
    fn frames_of_every_length_and_content_are_survived() {
        let tcp = TcpRepr {
            src_port: 1,
            dst_port: HTTP_PORT,
            control: TcpControl::Syn,
            seq_number: TcpSeqNumber(1),
            ack_number: None,
            window_len: 1000,
            window_scale: None,
            max_seg_size: Some(1460),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let ip =
            Ipv4Repr { src_addr: GUEST, dst_addr: ADDRESS, next_header: IpProtocol::Tcp, payload_len: tcp.buffer_len(), hop_limit: 64 };
        let mut frame = vec![0; 14 + ip.buffer_len() + tcp.buffer_len()];
        frame[12] = 8;
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &phy::ChecksumCapabilities::default());
        let (source, destination) = (IpAddress::from(GUEST), IpAddress::from(ADDRESS));
        tcp.emit(&mut TcpPacket::new_unchecked(&mut frame[34..]), &source, &destination, &phy::ChecksumCapabilities::default());
        assert!(dissect(&frame).unwrap().2);
        let key = TokenKey::load(&tempfile::tempdir().unwrap().path().join("key")).unwrap();
        let context = Context { subject: None, key: &key, now_s: 5, nonce: [0; 8] };
        let mut stack = Stack::new(1, Duration::ZERO);
        for at in 0..frame.len() {
            stack.receive(&frame[..at], Duration::ZERO);
            for bit in 0..8 {
                let mut changed = frame.clone();
                changed[at] ^= 1 << bit;
                stack.receive(&changed, Duration::ZERO);
            }
            stack.poll(Duration::ZERO, &context, |_| (), |_| ());
        }
        assert!(stack.connections.len() <= CONNECTIONS_MAX);
    }
}
