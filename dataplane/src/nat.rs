//! Address translation: one address for another (1:1, an Elastic IP), or an address
//! and a port for others (a NAT gateway).
//!
//! Checksums are adjusted, not computed (RFC 1624), so that a packet damaged on
//! its way stays damaged. TCP and UDP cover the addresses by a pseudo-header; it
//! is in the first fragment only. An ICMP error quotes a packet of the other
//! direction, which is translated with it (RFC 5508 section 4). The port of an
//! ICMP query is its identifier.

use std::net::Ipv4Addr;

use crate::headers::{self, Ipv4, read, write};

/// The end of a packet that is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    /// Offset of its address in an IPv4 header.
    fn address(self) -> usize {
        match self {
            Self::Source => 12,
            Self::Destination => 16,
        }
    }

    /// Offset of its port in a TCP or UDP header.
    fn port(self) -> usize {
        match self {
            Self::Source => 0,
            Self::Destination => 2,
        }
    }
}

/// Replaces the source address of the IPv4 packet `bytes`, parsed as `ip`, and with
/// `port` the source port; where it is an ICMP error, also the destination that the
/// quoted packet had.
pub fn source(bytes: &mut [u8], ip: &Ipv4, to: Ipv4Addr, port: Option<u16>) {
    translate(bytes, ip, Side::Source, (ip.source, to), port);
}

/// Replaces the destination likewise.
pub fn destination(bytes: &mut [u8], ip: &Ipv4, to: Ipv4Addr, port: Option<u16>) {
    translate(bytes, ip, Side::Destination, (ip.destination, to), port);
}

fn translate(bytes: &mut [u8], ip: &Ipv4, side: Side, (from, to): (Ipv4Addr, Ipv4Addr), port: Option<u16>) {
    end(bytes, ip, side, (from, to), port);
    quoted(bytes, ip, side.other(), (from, to), port);
}

/// Translates one end of a packet, but not what it may quote.
fn end(bytes: &mut [u8], ip: &Ipv4, side: Side, (from, to): (Ipv4Addr, Ipv4Addr), port: Option<u16>) {
    let (old, new) = (from.octets(), to.octets());
    write(bytes, side.address(), new);
    adjust(bytes, 10, &old, &new);
    if ip.fragment_offset != 0 {
        return;
    }
    let checksum = match ip.protocol {
        headers::TCP => 16,
        headers::UDP_PROTOCOL => 6,
        _ => 2,
    };
    if ip.protocol != headers::ICMP {
        transport(bytes, ip, checksum, &old, &new);
    }
    let Some(port) = port else { return };
    let at = match ip.protocol {
        headers::TCP | headers::UDP_PROTOCOL => side.port(),
        headers::ICMP if !bytes.get(ip.header_len).is_some_and(|icmp_type| crate::icmp::is_error(*icmp_type)) => 4,
        _ => return,
    };
    if let Some(old) = read::<2>(bytes, ip.header_len + at) {
        write(bytes, ip.header_len + at, port.to_be_bytes());
        transport(bytes, ip, checksum, &old, &port.to_be_bytes());
    }
}

/// Adjusts the transport checksum, at `offset` in its header.
fn transport(bytes: &mut [u8], ip: &Ipv4, offset: usize, old: &[u8], new: &[u8]) {
    let at = ip.header_len + offset;
    match ip.protocol {
        headers::TCP | headers::ICMP => adjust(bytes, at, old, new),
        // Zero means that the sender computed none, and may not come out of it.
        headers::UDP_PROTOCOL if read::<2>(bytes, at).is_some_and(|sum| sum != [0, 0]) => {
            adjust(bytes, at, old, new);
            if read::<2>(bytes, at) == Some([0, 0]) {
                write(bytes, at, [0xff, 0xff]);
            }
        }
        _ => {}
    }
}

/// Translates the packet quoted in an ICMP error, if it has the address.
fn quoted(bytes: &mut [u8], ip: &Ipv4, side: Side, (from, to): (Ipv4Addr, Ipv4Addr), port: Option<u16>) {
    if ip.protocol != headers::ICMP || ip.fragment_offset != 0 {
        return;
    }
    let Some(icmp) = bytes.get_mut(ip.header_len..ip.total_len) else { return };
    let Some((header, inner)) = icmp.split_first_chunk_mut::<8>() else { return };
    let [icmp_type, ..] = *header;
    let Ok(quote) = headers::ipv4_quoted(inner) else { return };
    if !crate::icmp::is_error(icmp_type) || read(inner, side.address()) != Some(from.octets()) {
        return;
    }
    let whole_before = headers::checksum(inner);
    end(inner, &quote, side, (from, to), port);
    let whole_after = headers::checksum(inner);
    // The quote as a whole changed from one sum to another: adjust by that.
    adjust(icmp, 2, &(!whole_before).to_be_bytes(), &(!whole_after).to_be_bytes());
}

fn adjust(bytes: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    if let Some(sum) = read::<2>(bytes, at) {
        write(bytes, at, headers::checksum_adjust(u16::from_be_bytes(sum), old, new).to_be_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::headers::{ICMP, TCP, UDP_PROTOCOL, checksum, ipv4, transport_checksum, write_ipv4};

    fn message(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, mut payload: Vec<u8>) -> Vec<u8> {
        let at = match protocol {
            TCP => 16,
            UDP_PROTOCOL => 6,
            _ => 2,
        };
        write(&mut payload, at, [0, 0]);
        let sum = match transport_checksum(from, to, protocol, &payload) {
            0 if protocol == UDP_PROTOCOL => 0xffff,
            sum => sum,
        };
        write(&mut payload, at, sum.to_be_bytes());
        let mut bytes = vec![0; 20];
        write_ipv4(&mut bytes, (from, to), protocol, (7, 0), payload.len());
        bytes.extend(payload);
        bytes
    }

    fn right(bytes: &[u8]) -> bool {
        let ip = ipv4(bytes).unwrap();
        transport_checksum(ip.source, ip.destination, ip.protocol, &bytes[ip.header_len..]) == 0
    }

    proptest! {
        #[test]
        fn translated_messages_have_right_checksums(
            payload in proptest::collection::vec(any::<u8>(), 20..200),
            from: [u8; 4], to: [u8; 4], new: [u8; 4], port: Option<u16>, protocol in prop::sample::select(vec![TCP, UDP_PROTOCOL]),
        ) {
            let (from, to, new) = (from.into(), to.into(), Ipv4Addr::from(new));
            let mut bytes = message(protocol, from, to, payload);
            prop_assert!(right(&bytes));
            let ip = ipv4(&bytes).unwrap();
            source(&mut bytes, &ip, new, port);
            prop_assert!(right(&bytes));
            let ip = ipv4(&bytes).unwrap();
            destination(&mut bytes, &ip, from, port);
            prop_assert!(right(&bytes));
            let ip = ipv4(&bytes).unwrap();
            prop_assert_eq!((ip.source, ip.destination), (new, from));
            if let Some(port) = port {
                let [a, b] = port.to_be_bytes();
                prop_assert_eq!(read::<4>(&bytes, 20), Some([a, b, a, b]));
            }
        }

        #[test]
        fn icmp_errors_are_translated_with_what_they_quote(
            payload in proptest::collection::vec(any::<u8>(), 20..99), quote_len in 28usize..200,
            private: [u8; 4], public: [u8; 4], other: [u8; 4], port: Option<u16>,
        ) {
            let (private, public, other) = (Ipv4Addr::from(private), Ipv4Addr::from(public), Ipv4Addr::from(other));
            prop_assume!(private != other && public != other);
            let sent = message(UDP_PROTOCOL, public, other, payload);
            let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
            error.extend(&sent[..quote_len.min(sent.len())]);
            let mut bytes = message(ICMP, other, public, error);
            let ip = ipv4(&bytes).unwrap();
            destination(&mut bytes, &ip, private, port);
            prop_assert!(right(&bytes));
            let quote = &bytes[28..];
            prop_assert_eq!(checksum(&quote[..20]), 0);
            let ip = headers::ipv4_quoted(quote).unwrap();
            prop_assert_eq!((ip.source, ip.destination), (private, other));
            prop_assert_eq!(read::<2>(quote, 20), port.map_or_else(|| read(&sent, 20), |port| Some(port.to_be_bytes())));
            if quote.len() == sent.len() {
                prop_assert!(right(quote));
            }
        }
    }

    #[test]
    fn udp_without_a_checksum_stays_without() {
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(8, 8, 8, 8));
        let mut bytes = message(UDP_PROTOCOL, from, to, vec![0, 1, 0, 2, 0, 8, 0, 0]);
        write(&mut bytes, 26, [0, 0]);
        let ip = ipv4(&bytes).unwrap();
        source(&mut bytes, &ip, Ipv4Addr::new(198, 51, 100, 7), Some(1024));
        assert_eq!(read(&bytes, 26), Some([0, 0]));
        assert!(ipv4(&bytes).is_ok());
    }
}
