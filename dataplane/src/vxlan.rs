//! VXLAN, RFC 7348 section 5: 8 bytes, big-endian, in UDP to port 4789.
//!
//! ```text
//! | Ethernet 14 | IPv4 20 | UDP 8 | flags (8), I = 0x08 | reserved (24) | VNI (24) | reserved (8) | inner frame
//! ```
//!
//! The source port carries 14 bits that both ends of the inner flow agree on
//! ([`Key::entropy`](crate::flow::Key::entropy)), so that the underlay spreads flows
//! over its paths and keeps each on one, and each card finds both directions of a
//! connection on one queue. The outer UDP checksum is
//! zero, as the RFC asks of senders over IPv4, and not looked at in what arrives.

use std::net::Ipv4Addr;

use crate::counters::DropReason;
use crate::headers::{self, ETHERNET, IPV4, UDP, read, write};
use crate::packet::Packet;
use crate::{Mac, Underlay, Vni};

/// UDP port of VXLAN.
pub const PORT: u16 = 4789;
/// Bytes of the VXLAN header.
pub const VXLAN: usize = 8;

const FLAG_I: u8 = 0x08;
const DONT_FRAGMENT: u16 = 0x4000;

/// Splits a UDP payload into its VNI and the inner Ethernet frame.
///
/// # Errors
/// [`DropReason::Truncated`] below 8 bytes, [`DropReason::NoVni`] when I is clear.
pub fn decap(payload: &[u8]) -> Result<(Vni, &[u8]), DropReason> {
    let (header, inner) = payload.split_first_chunk::<VXLAN>().ok_or(DropReason::Truncated)?;
    let [flags, _, _, _, high, middle, low, _] = *header;
    if !is_flagged(flags) {
        return Err(DropReason::NoVni);
    }
    Ok((Vni(u32::from_be_bytes([0, high, middle, low])), inner))
}

/// Whether the flags of a VXLAN header say that it has a VNI.
#[must_use]
#[inline]
pub fn is_flagged(flags: u8) -> bool {
    flags & FLAG_I != 0
}

/// Puts the VXLAN header in front of a frame. Returns false when there is no room.
#[must_use]
pub fn push_header(packet: &mut Packet, vni: Vni) -> bool {
    match packet.push_front(VXLAN) {
        Some(header) => {
            write_header(header, vni);
            true
        }
        None => false,
    }
}

/// Fills the 8 bytes of a VXLAN header.
pub fn write_header(header: &mut [u8], vni: Vni) {
    let [_, high, middle, low] = vni.0.to_be_bytes();
    write(header, 0, [FLAG_I, 0, 0, 0, high, middle, low, 0]);
}

/// Puts the outer headers in front of a VXLAN payload, all but the destination
/// MAC. `port` is the UDP source port. Returns false when there is no room.
#[must_use]
pub fn push_outer(packet: &mut Packet, underlay: &Underlay, vtep: Ipv4Addr, port: u16) -> bool {
    let length = packet.len();
    match packet.push_front(ETHERNET + IPV4 + UDP) {
        Some(header) => {
            write_outer(header, underlay, vtep, port, length);
            true
        }
        None => false,
    }
}

/// Fills the 42 bytes of the outer headers before a payload of `length` bytes, all
/// but the destination MAC.
pub fn write_outer(header: &mut [u8], underlay: &Underlay, vtep: Ipv4Addr, port: u16, length: usize) {
    let length = length + UDP;
    headers::write_ethernet(header, Mac([0; 6]), underlay.mac, headers::TYPE_IPV4);
    if let Some(ip) = header.get_mut(ETHERNET..) {
        headers::write_ipv4(ip, (underlay.address, vtep), headers::UDP_PROTOCOL, (0, DONT_FRAGMENT), length);
    }
    write(header, ETHERNET + IPV4, port.to_be_bytes());
    write(header, ETHERNET + IPV4 + 2, PORT.to_be_bytes());
    // A frame is far below 64 KiB, so the length always fits.
    write(header, ETHERNET + IPV4 + 4, u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    write(header, ETHERNET + IPV4 + 6, [0, 0]);
}

/// Finds the VXLAN payload behind the outer Ethernet header: the VTEP that sent
/// it, and where in `bytes`, the outer IPv4 packet, it begins and ends.
///
/// # Errors
/// [`DropReason::NotForUs`], [`DropReason::NotVxlan`] and those of
/// [`headers::ipv4`].
pub fn outer(bytes: &[u8], underlay: &Underlay) -> Result<(Ipv4Addr, std::ops::Range<usize>), DropReason> {
    let ip = headers::ipv4(bytes)?;
    if ip.destination != underlay.address {
        return Err(DropReason::NotForUs);
    }
    if ip.protocol != headers::UDP_PROTOCOL || ip.is_fragment() {
        return Err(DropReason::NotVxlan);
    }
    let udp = bytes.get(ip.header_len..ip.total_len).ok_or(DropReason::Truncated)?;
    let [_, _, p0, p1, l0, l1] = read::<6>(udp, 0).ok_or(DropReason::Truncated)?;
    if u16::from_be_bytes([p0, p1]) != PORT {
        return Err(DropReason::NotVxlan);
    }
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    if length < UDP || length > udp.len() {
        return Err(DropReason::BadHeader);
    }
    Ok((ip.source, ip.header_len + UDP..ip.header_len + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNDERLAY: Underlay =
        Underlay { address: Ipv4Addr::new(10, 255, 0, 11), prefix_length: 24, mac: Mac([2, 0, 0, 0, 0, 1]), encapsulated: true };

    #[test]
    fn decap_refuses_every_truncated_header() {
        for len in 0..8 {
            assert_eq!(decap(&[0x08; 8][..len]), Err(DropReason::Truncated));
        }
        assert_eq!(decap(&[0xf7, 0, 0, 0, 0, 0, 1, 0]), Err(DropReason::NoVni));
    }

    #[test]
    fn what_is_encapsulated_is_found_again() {
        let mut packet = Packet::new();
        assert!(packet.copy_from(&[7; 9015]));
        assert!(push_header(&mut packet, Vni(0xab_cdef)));
        assert!(push_outer(&mut packet, &UNDERLAY, UNDERLAY.address, 0xffff));
        assert_eq!(packet.len(), 9015 + 50);
        let bytes = &packet.as_slice()[ETHERNET..];
        let (vtep, range) = outer(bytes, &UNDERLAY).unwrap();
        assert_eq!(vtep, UNDERLAY.address);
        assert_eq!(decap(&bytes[range]).unwrap(), (Vni(0xab_cdef), &[7; 9015][..]));
        assert_eq!(read(bytes, 20), Some([0xff, 0xff]));
    }
}
