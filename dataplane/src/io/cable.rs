//! A wire made of two UDP sockets, for machines where we have no root: one datagram
//! is one Ethernet frame, from the destination address to before the check sequence.
//!
//! Both ends are connected, so the kernel takes datagrams of the other end only. A
//! datagram longer than the largest frame is dropped, as a switch drops a giant.

use std::io;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use super::{BURST, PacketIo};
use crate::packet::{Packet, Pool};

/// One end of a wire.
#[derive(Debug)]
pub struct CablePort {
    socket: UdpSocket,
}

impl CablePort {
    /// Plugs in the end at `near`; the other end is at `far`, now or later.
    ///
    /// # Errors
    /// When `near` is not this machine's, or is taken.
    pub fn plug(near: SocketAddrV4, far: SocketAddrV4) -> io::Result<Self> {
        let socket = UdpSocket::bind(near)?;
        socket.connect(far)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }
}

impl PacketIo for CablePort {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        for _ in 0..BURST {
            let mut packet = pool.get();
            let room = packet.room_mut();
            let room_len = room.len();
            match self.socket.recv(room) {
                // A datagram that fills the buffer was cut: the largest frame leaves room.
                Ok(len) if len < room_len && packet.set_len(len) => out.push(packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return pool.put(packet),
                // A giant, or what a datagram to an end that is not there left behind.
                _ => pool.put(packet),
            }
        }
    }

    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        let dropped = packets.iter().filter(|packet| self.socket.send(packet.as_slice()).is_err()).count();
        pool.put_all(packets);
        dropped
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const NEAR: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 77, 0, 3), 4790);
    const FAR: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 77, 0, 4), 4790);

    fn frame(content: &[u8]) -> Packet {
        let mut packet = Packet::new();
        assert!(packet.copy_from(content));
        packet
    }

    #[test]
    fn frames_pass_between_both_ends_and_from_nowhere_else() {
        let mut near = CablePort::plug(NEAR, FAR).unwrap();
        let mut pool = Pool::new(8);
        assert_eq!(near.tx_burst(&mut pool, &mut vec![frame(b"into the void")]), 0);
        let mut far = CablePort::plug(FAR, NEAR).unwrap();
        // The void's answer was an error, which costs nothing but a turn.
        let mut out = Vec::new();
        near.rx_burst(&mut pool, &mut out);
        assert!(out.is_empty());

        let stranger = UdpSocket::bind((*FAR.ip(), 0)).unwrap();
        stranger.send_to(b"forged", NEAR).unwrap();
        assert_eq!(far.tx_burst(&mut pool, &mut vec![frame(b"one"), frame(&[7; 1514])]), 0);
        near.rx_burst(&mut pool, &mut out);
        assert_eq!(out.iter().map(|packet| packet.as_slice().to_vec()).collect::<Vec<_>>(), [b"one".to_vec(), vec![7; 1514]]);
    }

    #[test]
    fn a_giant_is_dropped_and_the_next_frame_passes() {
        let (near, far) = (SocketAddrV4::new(*NEAR.ip(), 4791), SocketAddrV4::new(*FAR.ip(), 4791));
        let mut port = CablePort::plug(near, far).unwrap();
        let other = UdpSocket::bind(far).unwrap();
        other.send_to(&[0; 40_000], near).unwrap();
        other.send_to(b"next", near).unwrap();
        let mut out = Vec::new();
        port.rx_burst(&mut Pool::new(8), &mut out);
        assert_eq!(out.iter().map(Packet::len).collect::<Vec<_>>(), [4]);
    }
}
