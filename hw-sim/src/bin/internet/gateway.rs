//! The host behind the switch: ARP, ping and TCP in user space (smoltcp).
//!
//! It has the gateway's address in the public network and that of one host far
//! away, and opens connections; it accepts none.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

/// Locally administered.
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// Ethernet header and 1,500 bytes.
const FRAME_MAX: usize = 1514;
/// Frames that wait for their turn; more are dropped.
const QUEUE_MAX: usize = 1024;
const BUFFER_BYTES: usize = 64 * 1024;
/// After this long without an answer nobody is there.
const CONNECT_TIMEOUT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(10);
/// An open connection outlives a card that is away for ten minutes.
const TIMEOUT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(15 * 60);
/// The longest pause between two looks at the stack.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Local ports of connections.
const PORTS: std::ops::RangeInclusive<u16> = 49_152..=65_535;

/// The host.
pub struct Gateway {
    interface: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
    next_port: u16,
}

/// Frames on their way in and out.
#[derive(Default)]
struct Wire {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

impl Gateway {
    /// A host with two addresses.
    pub fn new(address: Ipv4Addr, prefix_length: u8, far_host: Ipv4Addr) -> Self {
        let mut wire = Wire::default();
        let mut interface = Interface::new(Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC))), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Every build of smoltcp has room for two.
            let _ = addresses.push(IpCidr::new(address.into(), prefix_length.min(32)));
            let _ = addresses.push(IpCidr::new(far_host.into(), 32));
        });
        Self { interface, wire, sockets: SocketSet::new(Vec::new()), next_port: *PORTS.start() }
    }

    /// Takes a frame from the switch.
    pub fn receive(&mut self, frame: &[u8]) {
        if self.wire.received.len() < QUEUE_MAX {
            self.wire.received.push_back(frame.to_vec());
        }
    }

    /// Lets everything happen that can; the frames for the switch.
    pub fn poll(&mut self, now: Duration) -> Vec<Vec<u8>> {
        self.interface.poll(instant(now), &mut self.wire, &mut self.sockets);
        std::mem::take(&mut self.wire.sent)
    }

    /// How long [`Gateway::poll`] need not be called if nothing comes.
    pub fn pause(&mut self, now: Duration) -> Duration {
        let delay = self.interface.poll_delay(instant(now), &self.sockets);
        delay.map_or(PAUSE_MAX, |delay| Duration::from(delay).min(PAUSE_MAX))
    }

    /// Begins a connection; `None` when the address cannot be connected to.
    pub fn connect(&mut self, to: SocketAddrV4) -> Option<SocketHandle> {
        let buffer = || SocketBuffer::new(vec![0; BUFFER_BYTES]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_timeout(Some(CONNECT_TIMEOUT));
        socket.set_nagle_enabled(false);
        let port = self.next_port;
        self.next_port = port.checked_add(1).unwrap_or(*PORTS.start());
        socket.connect(self.interface.context(), (*to.ip(), to.port()), port).ok()?;
        Some(self.sockets.add(socket))
    }

    /// Gives a connection that was answered the patience of an open one.
    pub fn opened(&mut self, handle: SocketHandle) {
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        socket.set_timeout(Some(TIMEOUT));
        socket.set_keep_alive(Some(CONNECT_TIMEOUT));
    }

    /// The socket of a connection.
    pub fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Forgets a connection. The other side is told with the next poll only if it
    /// was closed or aborted before.
    pub fn forget(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Received(frame), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        (self.sent.len() < QUEUE_MAX).then_some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        capabilities
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.push(frame);
        result
    }
}
