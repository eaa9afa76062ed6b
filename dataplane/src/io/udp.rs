//! The underlay as a UDP socket, for machines where we have no root: outer
//! Ethernet, IP and UDP headers are the kernel's.
//!
//! A packet here is the payload of VXLAN's UDP (RFC 7348 section 5): the 8-byte
//! header and the inner frame; [`Packet::peer`] is the other card.
//! Port 4789 is source and destination of every datagram, so that only the owner
//! of an address can send from it; datagrams from other ports are refused.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BURST, PacketIo};
use crate::packet::{Packet, Pool};

/// VXLAN's port, assigned by IANA.
pub const PORT: u16 = 4789;

/// A UDP socket on one underlay address.
#[derive(Debug)]
pub struct UdpPort {
    socket: UdpSocket,
    counters: Arc<UdpCounters>,
}

/// Datagrams that were refused on reception, since the socket was opened.
#[derive(Debug, Default)]
pub struct UdpCounters {
    /// From a port other than 4789.
    pub wrong_port: AtomicU64,
    /// Longer than the largest frame.
    pub oversize: AtomicU64,
}

impl UdpPort {
    /// Opens port 4789 of `address`.
    ///
    /// # Errors
    /// When the address is not this machine's, or the port is taken.
    pub fn bind(address: Ipv4Addr) -> io::Result<Self> {
        let socket = UdpSocket::bind(SocketAddrV4::new(address, PORT))
            .map_err(|error| io::Error::new(error.kind(), format!("udp {address}:{PORT}: {error}")))?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, counters: Arc::default() })
    }

    /// What was refused; stays valid when the port has moved into a worker.
    #[must_use]
    pub fn counters(&self) -> Arc<UdpCounters> {
        Arc::clone(&self.counters)
    }

    /// Receives the next datagram into `packet`. Returns whether it is one to pass
    /// on, or `None` when none waits.
    fn receive(&self, packet: &mut Packet) -> Option<bool> {
        let room = packet.room_mut();
        let room_len = room.len();
        let (len, source) = match self.socket.recv_from(room) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // An error that a datagram left behind; the next one may be fine.
            Err(_) => return Some(false),
        };
        let SocketAddr::V4(source) = source else { return Some(false) };
        if source.port() != PORT {
            self.counters.wrong_port.fetch_add(1, Ordering::Relaxed);
            return Some(false);
        }
        // A datagram that fills the buffer was cut: the largest frame leaves room.
        if len == room_len || !packet.set_len(len) {
            self.counters.oversize.fetch_add(1, Ordering::Relaxed);
            return Some(false);
        }
        packet.set_peer(*source.ip());
        Some(true)
    }
}

impl PacketIo for UdpPort {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        for _ in 0..BURST {
            let mut packet = pool.get();
            match self.receive(&mut packet) {
                Some(true) => out.push(packet),
                Some(false) => pool.put(packet),
                None => return pool.put(packet),
            }
        }
    }

    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        let mut dropped = 0;
        for packet in packets.iter() {
            let sent = packet.peer().and_then(|peer| self.socket.send_to(packet.as_slice(), (IpAddr::V4(peer), PORT)).ok());
            dropped += usize::from(sent.is_none());
        }
        pool.put_all(packets);
        dropped
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Ipv4Addr = Ipv4Addr::new(127, 77, 0, 1);
    const TWO: Ipv4Addr = Ipv4Addr::new(127, 77, 0, 2);

    fn packet(content: &[u8], peer: Option<Ipv4Addr>) -> Packet {
        let mut packet = Packet::new();
        assert!(packet.copy_from(content));
        if let Some(peer) = peer {
            packet.set_peer(peer);
        }
        packet
    }

    #[test]
    fn payloads_travel_with_the_address_of_the_peer() {
        let (mut one, mut two) = (UdpPort::bind(ONE).unwrap(), UdpPort::bind(TWO).unwrap());
        let mut pool = Pool::new(8);
        let large = vec![7; 9030];
        let mut packets = vec![packet(b"VXLAN and a frame", Some(TWO)), packet(&large, Some(TWO)), packet(b"nowhere", None)];
        assert_eq!(one.tx_burst(&mut pool, &mut packets), 1);
        assert!(packets.is_empty());
        let mut out = Vec::new();
        two.rx_burst(&mut pool, &mut out);
        assert_eq!(out.iter().map(|packet| packet.as_slice().to_vec()).collect::<Vec<_>>(), [b"VXLAN and a frame".to_vec(), large]);
        assert!(out.iter().all(|packet| packet.peer() == Some(ONE)));

        let stranger = UdpSocket::bind((TWO, 0)).unwrap();
        stranger.send_to(b"spoofed", (ONE, PORT)).unwrap();
        out.clear();
        one.rx_burst(&mut pool, &mut out);
        assert!(out.is_empty());
        assert_eq!(one.counters().wrong_port.load(Ordering::Relaxed), 1);
    }
}
