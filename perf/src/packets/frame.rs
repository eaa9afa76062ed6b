//! Frames, taken apart as far as a world can be derived from them, and made.
//!
//! ```text
//! plain:  | Ethernet | IPv4 | transport |
//! VXLAN:  | Ethernet | IPv4 | UDP, port 4789 | VXLAN | plain |
//! ```

use std::net::Ipv4Addr;

use dataplane::headers::{self, ETHERNET, IPV4, UDP, read, write};
use dataplane::packet::Packet;
use dataplane::{Mac, Underlay, Vni, arp, vxlan};

/// Bytes that VXLAN puts in front of a frame.
pub const ENCAPSULATION: usize = ETHERNET + IPV4 + UDP + vxlan::VXLAN;

/// What a frame says of a guest's packet.
#[derive(Debug, Clone, Copy)]
pub struct Inner {
    /// Sender's MAC and address.
    pub source: (Mac, Ipv4Addr),
    /// Receiver's MAC and address.
    pub destination: (Mac, Ipv4Addr),
}

/// What a frame says of the underlay.
#[derive(Debug, Clone, Copy)]
pub struct Outer {
    /// Sender's MAC and address.
    pub source: (Mac, Ipv4Addr),
    /// Receiver's MAC and address.
    pub destination: (Mac, Ipv4Addr),
    /// The network; `None` when the header does not name one.
    pub vni: Option<Vni>,
    /// Where the inner frame begins.
    pub at: usize,
}

/// A frame of a trace.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// What carries it, if it is VXLAN.
    pub outer: Option<Outer>,
    /// The guest's packet, if it is IPv4 with a right header.
    pub inner: Option<Inner>,
}

/// Takes a frame apart.
pub fn dissect(frame: &[u8]) -> Frame {
    let outer = outer(frame);
    let inner = match &outer {
        Some(outer) => frame.get(outer.at..),
        None => Some(frame),
    };
    Frame { outer, inner: inner.and_then(inner_of) }
}

fn inner_of(frame: &[u8]) -> Option<Inner> {
    let (ethernet, payload) = headers::ethernet(frame).ok()?;
    if ethernet.ethertype != headers::TYPE_IPV4 {
        return None;
    }
    let ip = headers::ipv4(payload).ok()?;
    Some(Inner { source: (ethernet.source, ip.source), destination: (ethernet.destination, ip.destination) })
}

fn outer(frame: &[u8]) -> Option<Outer> {
    let (ethernet, payload) = headers::ethernet(frame).ok()?;
    if ethernet.ethertype != headers::TYPE_IPV4 {
        return None;
    }
    let ip = headers::ipv4(payload).ok()?;
    if ip.protocol != headers::UDP_PROTOCOL || ip.is_fragment() {
        return None;
    }
    let udp = payload.get(ip.header_len..ip.total_len)?;
    if u16::from_be_bytes(read(udp, 2)?) != vxlan::PORT {
        return None;
    }
    let vni = vxlan::decap(udp.get(UDP..)?).ok().map(|(vni, _)| vni);
    let at = ETHERNET + ip.header_len + UDP + vxlan::VXLAN;
    Some(Outer { source: (ethernet.source, ip.source), destination: (ethernet.destination, ip.destination), vni, at })
}

/// Carries `inner` from another card to this one, which is `to` on the underlay;
/// `port` is the source port that stands for the inner flow.
pub fn encapsulate(inner: &[u8], from: (Mac, Ipv4Addr), to: &Underlay, vni: Vni, port: u16) -> Vec<u8> {
    let mut frame = vec![0; ENCAPSULATION];
    frame.extend_from_slice(inner);
    let [_, high, middle, low] = vni.0.to_be_bytes();
    write(&mut frame, ETHERNET + IPV4 + UDP, [0x08, 0, 0, 0, high, middle, low, 0]);
    fill_udp(&mut frame, (from.0, from.1, port), (to.mac, to.address, vxlan::PORT));
    frame
}

/// A question by ARP for this card's MAC, from which the card learns the asker's.
pub fn arp_question(from: (Mac, Ipv4Addr), to: &Underlay) -> Packet {
    let mut packet = Packet::new();
    let message = arp::Message { operation: arp::REQUEST, sender: from, target: (Mac([0; 6]), to.address) };
    arp::frame(&mut packet, Mac::BROADCAST, &message);
    packet
}

/// A UDP datagram with `payload` zero bytes, whole with Ethernet.
pub fn udp(source: (Mac, Ipv4Addr, u16), destination: (Mac, Ipv4Addr, u16), payload: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + IPV4 + UDP + payload];
    fill_udp(&mut frame, source, destination);
    frame
}

/// Fills the headers of Ethernet, IPv4 and UDP in front of what `frame` holds. The
/// UDP checksum is left out, as RFC 768 and RFC 7348 let senders do.
fn fill_udp(frame: &mut [u8], source: (Mac, Ipv4Addr, u16), destination: (Mac, Ipv4Addr, u16)) {
    headers::write_ethernet(frame, destination.0, source.0, headers::TYPE_IPV4);
    let length = frame.len().saturating_sub(ETHERNET + IPV4);
    if let Some(ip) = frame.get_mut(ETHERNET..) {
        headers::write_ipv4(ip, (source.1, destination.1), headers::UDP_PROTOCOL, (0, 0), length);
    }
    let ports = ETHERNET + IPV4;
    write(frame, ports, source.2.to_be_bytes());
    write(frame, ports + 2, destination.2.to_be_bytes());
    // Frames end at 9,216 bytes.
    write(frame, ports + 4, u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encapsulated_is_taken_apart_again() {
        let (a, b) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 1, 5));
        let inner = udp((a, from, 1), (b, to, 8080), 22);
        let us = Underlay { address: Ipv4Addr::new(192, 0, 2, 1), prefix_length: 24, mac: b, encapsulated: true };
        let vtep = Ipv4Addr::new(192, 0, 2, 2);
        let frame = encapsulate(&inner, (a, vtep), &us, Vni(100), 0xc007);
        assert_eq!(frame.len(), inner.len() + ENCAPSULATION);
        let Frame { outer: Some(outer), inner: Some(seen) } = dissect(&frame) else { panic!("VXLAN") };
        assert_eq!((outer.source, outer.destination, outer.vni), ((a, vtep), (b, us.address), Some(Vni(100))));
        assert_eq!((seen.source, seen.destination), ((a, from), (b, to)));
        assert_eq!(&frame[outer.at..], inner);
        assert!(dissect(&inner).outer.is_none());
        for length in 0..frame.len() {
            let _ = dissect(&frame[..length]);
        }
    }
}
