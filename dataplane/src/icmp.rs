//! ICMP, RFC 792: the router's answer to a ping, and the errors it sends.

use std::net::Ipv4Addr;

use crate::Mac;
use crate::headers::{self, ETHERNET, IPV4, Ipv4, write};
use crate::packet::Packet;

/// Type of an echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Type of an echo request.
pub const ECHO: u8 = 8;

/// Bytes of the offending packet that an error quotes, so that the error stays
/// within the 576 bytes that every host takes (RFC 1812 section 4.3.2.3).
const QUOTE: usize = 576 - IPV4 - 8;

/// An error that the router sends about a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The next link takes this many bytes, and the packet forbids fragments. RFC 1191.
    FragmentationNeeded {
        /// Largest IP packet of that link.
        mtu: u16,
    },
    /// The packet has made its last hop.
    TimeExceeded,
}

/// Whether a type is that of an error, which quotes another packet.
#[must_use]
pub fn is_error(icmp_type: u8) -> bool {
    matches!(icmp_type, 3 | 4 | 5 | 11 | 12)
}

/// Turns an echo request into its reply, in place; `frame` was parsed as `ip`.
pub fn echo_reply(frame: &mut [u8], ip: &Ipv4, guest: Mac, router: Mac) {
    headers::set_macs(frame, guest, router);
    let Some(bytes) = frame.get_mut(ETHERNET..) else { return };
    // Exchanging the addresses leaves the header's checksum as it is.
    write(bytes, 12, ip.destination.octets());
    write(bytes, 16, ip.source.octets());
    let Some(icmp) = bytes.get_mut(ip.header_len..) else { return };
    if let Some([code, s0, s1]) = headers::read::<3>(icmp, 1) {
        let sum = headers::checksum_adjust(u16::from_be_bytes([s0, s1]), &[ECHO, code], &[0, code]);
        write(icmp, 0, [0, code]);
        write(icmp, 2, sum.to_be_bytes());
    }
}

/// Writes an error about `offending`, an IPv4 packet parsed as `ip`, into `packet`:
/// a frame from the router to the guest that sent it. Returns false, and nothing
/// may be sent, where RFC 1122 section 3.2.2 forbids an error.
#[must_use]
pub fn error(packet: &mut Packet, error: Error, offending: &[u8], ip: &Ipv4, (router, router_mac): (Ipv4Addr, Mac), guest: Mac) -> bool {
    let icmp_type = offending.get(ip.header_len).copied().unwrap_or(0);
    if ip.fragment_offset != 0 || (ip.protocol == headers::ICMP && is_error(icmp_type)) {
        return false;
    }
    let quote = offending.get(..offending.len().min(QUOTE)).unwrap_or_default();
    let length = ETHERNET + IPV4 + 8 + quote.len();
    packet.reset();
    if !packet.set_len(length) {
        return false;
    }
    let frame = packet.as_mut_slice();
    headers::write_ethernet(frame, guest, router_mac, headers::TYPE_IPV4);
    let Some(bytes) = frame.get_mut(ETHERNET..) else { return false };
    headers::write_ipv4(bytes, (router, ip.source), headers::ICMP, (0, 0), 8 + quote.len());
    let Some(icmp) = bytes.get_mut(IPV4..) else { return false };
    let [m0, m1] = match error {
        Error::FragmentationNeeded { mtu } => mtu.to_be_bytes(),
        Error::TimeExceeded => [0, 0],
    };
    let (icmp_type, code) = match error {
        Error::FragmentationNeeded { .. } => (3, 4),
        Error::TimeExceeded => (11, 0),
    };
    write(icmp, 0, [icmp_type, code, 0, 0, 0, 0, m0, m1]);
    if let Some(room) = icmp.get_mut(8..) {
        room.copy_from_slice(quote);
    }
    let sum = headers::checksum(icmp);
    write(icmp, 2, sum.to_be_bytes());
    true
}
