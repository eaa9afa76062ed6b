//! Ethernet II, IPv4 (RFC 791), and of TCP, UDP and ICMP what a flow is made of.
//!
//! Parsers read bytes that anybody may have written and never panic; writers put
//! single fields back. Offsets count from the start of the slice given.
//!
//! ```text
//! 0      6      12     14            14 + IHL
//! | dst  | src  | type | IPv4 header | TCP, UDP, ICMP ...
//! ```

use std::net::Ipv4Addr;

use crate::Mac;
use crate::counters::DropReason;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Bytes of a UDP header.
pub const UDP: usize = 8;

/// EtherType of IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const TYPE_ARP: u16 = 0x0806;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP_PROTOCOL: u8 = 17;

/// TCP flags.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Ends a connection at once.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

/// An Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ethernet {
    /// To whom.
    pub destination: Mac,
    /// From whom.
    pub source: Mac,
    /// What follows.
    pub ethertype: u16,
}

/// Splits a frame into its Ethernet header and the rest.
///
/// # Errors
/// [`DropReason::Truncated`] below 14 bytes.
pub fn ethernet(frame: &[u8]) -> Result<(Ethernet, &[u8]), DropReason> {
    let (header, rest) = frame.split_first_chunk::<ETHERNET>().ok_or(DropReason::Truncated)?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *header;
    let destination = Mac([d0, d1, d2, d3, d4, d5]);
    Ok((Ethernet { destination, source: Mac([s0, s1, s2, s3, s4, s5]), ethertype: u16::from_be_bytes([t0, t1]) }, rest))
}

/// An IPv4 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4 {
    /// Bytes of the header, 20..=60.
    pub header_len: usize,
    /// Bytes of header and payload.
    pub total_len: usize,
    /// Identification, common to the fragments of one datagram.
    pub id: u16,
    /// The sender forbids fragments.
    pub dont_fragment: bool,
    /// More fragments follow this one.
    pub more_fragments: bool,
    /// Where this fragment begins, in units of 8 bytes.
    pub fragment_offset: u16,
    /// Hops left.
    pub ttl: u8,
    /// Protocol number of the payload.
    pub protocol: u8,
    /// From whom.
    pub source: Ipv4Addr,
    /// To whom.
    pub destination: Ipv4Addr,
}

impl Ipv4 {
    /// Whether this is a fragment, the first one included.
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        self.more_fragments || self.fragment_offset != 0
    }
}

/// Parses the IPv4 header that `bytes` begins with.
///
/// # Errors
/// [`DropReason::Truncated`] when header or payload reach beyond `bytes`,
/// [`DropReason::BadHeader`] for a wrong version or length and
/// [`DropReason::BadChecksum`].
pub fn ipv4(bytes: &[u8]) -> Result<Ipv4, DropReason> {
    let ip = ipv4_quoted(bytes)?;
    if ip.total_len > bytes.len() {
        return Err(DropReason::Truncated);
    }
    if bytes.get(..ip.header_len).is_none_or(|header| checksum(header) != 0) {
        return Err(DropReason::BadChecksum);
    }
    Ok(ip)
}

/// Parses an IPv4 header quoted in an ICMP error: the payload may be cut off and
/// the checksum may date from another hop.
///
/// # Errors
/// As [`ipv4`], except for these two.
pub fn ipv4_quoted(bytes: &[u8]) -> Result<Ipv4, DropReason> {
    let header = bytes.first_chunk::<IPV4>().ok_or(DropReason::Truncated)?;
    let [version_ihl, _, l0, l1, i0, i1, f0, f1, ttl, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = *header;
    let header_len = usize::from(version_ihl & 0x0f) * 4;
    let total_len = usize::from(u16::from_be_bytes([l0, l1]));
    if version_ihl >> 4 != 4 || header_len < IPV4 || total_len < header_len {
        return Err(DropReason::BadHeader);
    }
    if header_len > bytes.len() {
        return Err(DropReason::Truncated);
    }
    let fragment = u16::from_be_bytes([f0, f1]);
    Ok(Ipv4 {
        header_len,
        total_len,
        id: u16::from_be_bytes([i0, i1]),
        dont_fragment: fragment & DONT_FRAGMENT != 0,
        more_fragments: fragment & MORE_FRAGMENTS != 0,
        fragment_offset: fragment & 0x1fff,
        ttl,
        protocol,
        source: Ipv4Addr::new(s0, s1, s2, s3),
        destination: Ipv4Addr::new(d0, d1, d2, d3),
    })
}

/// What a flow needs of the transport header. Zero where the protocol has no
/// such field; of ICMP the two ports are identifier and zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transport {
    /// Port of the sender.
    pub source_port: u16,
    /// Port of the receiver.
    pub destination_port: u16,
    /// TCP flags, see [`tcp`].
    pub tcp_flags: u8,
    /// ICMP type.
    pub icmp_type: u8,
    /// ICMP code.
    pub icmp_code: u8,
}

/// Parses the transport header at the start of `payload`, the payload of `ip`,
/// which must not be a later fragment.
///
/// # Errors
/// [`DropReason::Truncated`] when the header is cut, [`DropReason::FragmentTiny`]
/// when it is so in a first fragment, [`DropReason::BadHeader`] for lengths that
/// contradict each other.
pub fn transport(ip: &Ipv4, payload: &[u8]) -> Result<Transport, DropReason> {
    let cut = if ip.more_fragments { DropReason::FragmentTiny } else { DropReason::Truncated };
    match ip.protocol {
        TCP => {
            let header = payload.first_chunk::<20>().ok_or(cut)?;
            let [s0, s1, d0, d1, _, _, _, _, _, _, _, _, offset, flags, ..] = *header;
            let length = usize::from(offset >> 4) * 4;
            if length < 20 {
                return Err(DropReason::BadHeader);
            }
            if length > payload.len() {
                return Err(cut);
            }
            Ok(Transport { tcp_flags: flags & 0x3f, ..ports([s0, s1, d0, d1]) })
        }
        UDP_PROTOCOL => {
            let [s0, s1, d0, d1, l0, l1, _, _] = *payload.first_chunk::<UDP>().ok_or(cut)?;
            let length = usize::from(u16::from_be_bytes([l0, l1]));
            if length < UDP || (length > payload.len() && !ip.more_fragments) {
                return Err(DropReason::BadHeader);
            }
            Ok(ports([s0, s1, d0, d1]))
        }
        ICMP => {
            let [icmp_type, icmp_code, _, _, i0, i1, _, _] = *payload.first_chunk::<8>().ok_or(cut)?;
            let source_port = u16::from_be_bytes([i0, i1]);
            Ok(Transport { source_port, icmp_type, icmp_code, ..Transport::default() })
        }
        _ => Ok(Transport::default()),
    }
}

/// Parses the first 8 bytes of a transport header quoted in an ICMP error.
///
/// # Errors
/// [`DropReason::Truncated`] when fewer are there.
pub fn transport_quoted(ip: &Ipv4, payload: &[u8]) -> Result<Transport, DropReason> {
    let [a, b, c, d, e, f, _, _] = *payload.first_chunk::<8>().ok_or(DropReason::Truncated)?;
    Ok(match ip.protocol {
        TCP | UDP_PROTOCOL => ports([a, b, c, d]),
        ICMP => Transport { source_port: u16::from_be_bytes([e, f]), icmp_type: a, icmp_code: b, ..Transport::default() },
        _ => Transport::default(),
    })
}

fn ports([s0, s1, d0, d1]: [u8; 4]) -> Transport {
    Transport { source_port: u16::from_be_bytes([s0, s1]), destination_port: u16::from_be_bytes([d0, d1]), ..Transport::default() }
}

/// The `N` bytes at `at`, if they are there.
#[must_use]
pub fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// Writes `value` at `at`; bytes that are not there stay unwritten, so parse first.
pub fn write<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(room) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<N>()) {
        *room = value;
    }
}

/// Sets both Ethernet addresses of a frame.
pub fn set_macs(frame: &mut [u8], destination: Mac, source: Mac) {
    write(frame, 0, destination.0);
    write(frame, 6, source.0);
}

/// Fills the 14 bytes of an Ethernet header.
pub fn write_ethernet(frame: &mut [u8], destination: Mac, source: Mac, ethertype: u16) {
    set_macs(frame, destination, source);
    write(frame, 12, ethertype.to_be_bytes());
}

/// Fills the 20 bytes of an IPv4 header: `flags` is the word of flags and
/// fragment offset, `payload_len` what follows the header.
pub fn write_ipv4(
    bytes: &mut [u8],
    (source, destination): (Ipv4Addr, Ipv4Addr),
    protocol: u8,
    (id, flags): (u16, u16),
    payload_len: usize,
) {
    // A frame is far below 64 KiB, so the length always fits.
    let total_len = u16::try_from(payload_len + IPV4).unwrap_or(u16::MAX);
    write(bytes, 0, [0x45, 0]);
    write(bytes, 2, total_len.to_be_bytes());
    write(bytes, 4, id.to_be_bytes());
    write(bytes, 6, flags.to_be_bytes());
    write(bytes, 8, [64, protocol, 0, 0]);
    write(bytes, 12, source.octets());
    write(bytes, 16, destination.octets());
    let sum = checksum(bytes.get(..IPV4).unwrap_or_default());
    write(bytes, 10, sum.to_be_bytes());
}

/// Takes one hop from the TTL of an IPv4 header and mends its checksum. The
/// caller has seen that the TTL is above 1.
pub fn decrement_ttl(ip: &mut [u8]) {
    if let (Some([ttl, protocol]), Some(sum)) = (read::<2>(ip, 8), read::<2>(ip, 10)) {
        let (old, new) = ([ttl, protocol], [ttl.saturating_sub(1), protocol]);
        write(ip, 8, new);
        write(ip, 10, checksum_adjust(u16::from_be_bytes(sum), &old, &new).to_be_bytes());
    }
}

/// The Internet checksum, RFC 1071. Zero over bytes that hold a right checksum.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// The checksum of a TCP, UDP or ICMP message with `payload`; ICMP has no
/// pseudo-header. See RFC 9293 section 3.1 and RFC 768.
#[must_use]
pub fn transport_checksum(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> u16 {
    let mut total = sum(payload);
    if protocol != ICMP {
        total += sum(&source.octets()) + sum(&destination.octets()) + u64::from(protocol) + payload.len() as u64;
    }
    !fold(total)
}

/// The checksum after `old` bytes became `new` ones, RFC 1624 equation 3. Both
/// have the same even length and begin at an even offset.
#[must_use]
pub fn checksum_adjust(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    let removed: u64 = old.as_chunks::<2>().0.iter().map(|pair| u64::from(!u16::from_be_bytes(*pair))).sum();
    !fold(u64::from(!checksum) + removed + sum(new))
}

fn sum(bytes: &[u8]) -> u64 {
    // Four bytes at a time: the sum of 32-bit words folds to the same 16 bits.
    let (words, rest) = bytes.as_chunks::<4>();
    let total: u64 = words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum();
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    total + u64::from(u32::from_be_bytes(last))
}

fn fold(mut total: u64) -> u16 {
    total = (total & 0xffff_ffff) + (total >> 32);
    total = (total & 0xffff_ffff) + (total >> 32);
    total = (total & 0xffff) + (total >> 16);
    total = (total & 0xffff) + (total >> 16);
    // What is left has 16 bits: the largest sum of two halves is 0x1fffe, folded once more.
    u16::try_from(total & 0xffff).unwrap_or(u16::MAX)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of RFC 1071 section 3.
    #[test]
    fn rfc_1071_example() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn truncated_headers_are_refused() {
        let mut bytes = [0; 20];
        write_ipv4(&mut bytes, (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST), UDP_PROTOCOL, (1, 0), 0);
        assert!(ipv4(&bytes).is_ok());
        for len in 0..20 {
            assert_eq!(ipv4(&bytes[..len]), Err(DropReason::Truncated));
        }
        for len in 0..14 {
            assert_eq!(ethernet(&[0; 14][..len]), Err(DropReason::Truncated));
        }
        bytes[1] ^= 1;
        assert_eq!(ipv4(&bytes), Err(DropReason::BadChecksum));
    }

    proptest! {
        #[test]
        fn adjusted_checksums_equal_computed_ones(
            mut bytes in proptest::collection::vec(any::<u8>(), 4..60),
            new: [u8; 4],
            word in 0usize..14,
        ) {
            let at = (word * 4).min((bytes.len() - 4) & !1);
            let before = checksum(&bytes);
            let old: [u8; 4] = read(&bytes, at).unwrap();
            write(&mut bytes, at, new);
            // One's complement has two zeros, and which of them an all-zero sum gives is free.
            let adjusted = checksum_adjust(before, &old, &new);
            prop_assert!(adjusted == checksum(&bytes) || (adjusted ^ checksum(&bytes)) == 0xffff);
        }

        #[test]
        fn parsers_take_any_bytes(bytes: Vec<u8>, protocol: u8) {
            let _ = ethernet(&bytes);
            if let Ok(mut ip) = ipv4_quoted(&bytes) {
                ip.protocol = protocol;
                let _ = transport(&ip, &bytes);
                let _ = transport_quoted(&ip, &bytes);
            }
        }
    }
}
