//! Whole frames with one UDP datagram, which the card sends to a guest in the name
//! of a service of its own.

use std::net::SocketAddrV4;

use crate::Mac;
use crate::headers::{self, ETHERNET, IPV4, UDP, write};
use crate::packet::Packet;

/// Writes the frame around a payload, checksum included. False when it is too long for one.
#[must_use]
pub fn frame(packet: &mut Packet, (from_mac, to_mac): (Mac, Mac), (from, to): (SocketAddrV4, SocketAddrV4), payload: &[u8]) -> bool {
    let length = UDP + payload.len();
    packet.reset();
    if !packet.set_len(ETHERNET + IPV4 + length) {
        return false;
    }
    let bytes = packet.as_mut_slice();
    headers::write_ethernet(bytes, to_mac, from_mac, headers::TYPE_IPV4);
    let Some(ip) = bytes.get_mut(ETHERNET..) else { return false };
    headers::write_ipv4(ip, (*from.ip(), *to.ip()), headers::UDP_PROTOCOL, (0, 0), length);
    let Some(udp) = ip.get_mut(IPV4..) else { return false };
    write(udp, 0, from.port().to_be_bytes());
    write(udp, 2, to.port().to_be_bytes());
    // It fits a packet, which is far below 64 KiB.
    write(udp, 4, u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    write(udp, 6, [0, 0]);
    if let Some(room) = udp.get_mut(UDP..) {
        room.copy_from_slice(payload);
    }
    let sum = match headers::transport_checksum(*from.ip(), *to.ip(), headers::UDP_PROTOCOL, udp) {
        0 => 0xffff,
        sum => sum,
    };
    write(udp, 6, sum.to_be_bytes());
    true
}
