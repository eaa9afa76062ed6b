//! What a sender leaves to the network card, done here in software.
//!
//! On a virtual wire the sender's kernel hands over frames as it would to a card:
//! with half a checksum, or as one "super-frame" of up to 64 KiB of TCP that the
//! card would cut. The kernel describes the rest of the work in a header of 10
//! bytes, `struct virtio_net_hdr` (VIRTIO 1.2 section 5.1.6), in native byte order:
//!
//! | flags (8) | gso_type (8) | hdr_len (16) | gso_size (16) | csum_start (16) | csum_offset (16) |

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
};

use crate::packet::{Packet, Pool};

/// Bytes of the header.
pub(super) const HEADER_LEN: usize = 10;

const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const UDP_LEN: usize = 8;
const VXLAN_LEN: usize = 8;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
/// Where UDP keeps its checksum, of which 0 means "none".
const UDP_CHECKSUM: usize = 6;

/// The work that is left to do on one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offload {
    /// Start of the summed bytes, and where from there the sum belongs.
    checksum: Option<(usize, usize)>,
    segment: Segment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segment {
    No,
    /// TCP over IPv4, in VXLAN or not, cut to that many bytes of payload.
    Tcp4(usize),
    Other,
}

/// The frame cannot be turned into frames of a real wire.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unsupported;

impl Offload {
    pub(super) fn parse(header: [u8; HEADER_LEN]) -> Self {
        let [flags, gso, _, _, size_0, size_1, start_0, start_1, offset_0, offset_1] = header;
        let number = |bytes| usize::from(u16::from_ne_bytes(bytes));
        let checksum =
            (u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0).then(|| (number([start_0, start_1]), number([offset_0, offset_1])));
        let segment = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => Segment::No,
            VIRTIO_NET_HDR_GSO_TCPV4 => Segment::Tcp4(number([size_0, size_1])),
            _ => Segment::Other,
        };
        Self { checksum, segment }
    }

    /// Finishes `frame` and appends what would have come over a wire to `out`.
    pub(super) fn finish(self, frame: &mut [u8], pool: &mut Pool, out: &mut impl Extend<Packet>) -> Result<(), Unsupported> {
        match self.segment {
            Segment::No => {
                if let Some((start, offset)) = self.checksum {
                    complete(frame, start, offset)?;
                }
                let mut packet = pool.get();
                if !packet.copy_from(frame) {
                    pool.put(packet);
                    return Err(Unsupported);
                }
                out.extend([packet]);
                Ok(())
            }
            Segment::Tcp4(size) => cut_tcp4(frame, size, pool, out),
            Segment::Other => Err(Unsupported),
        }
    }
}

/// Completes a checksum whose field holds the sum over the pseudo-header.
fn complete(frame: &mut [u8], start: usize, offset: usize) -> Result<(), Unsupported> {
    let sum = !fold(add(0, frame.get(start..).ok_or(Unsupported)?));
    let sum = if sum == 0 && offset == UDP_CHECKSUM { 0xffff } else { sum };
    let field = start + offset;
    frame.get_mut(field..field + 2).ok_or(Unsupported)?.copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// Cuts one frame of Ethernet, IPv4 and TCP into frames of at most `size` bytes of
/// payload each, as RFC 9293 allows any TCP sender to. The frame may lie in VXLAN.
fn cut_tcp4(frame: &[u8], size: usize, pool: &mut Pool, out: &mut impl Extend<Packet>) -> Result<(), Unsupported> {
    let (outer, frame) = split_vxlan(frame);
    let (ethernet, ip) = frame.split_at_checked(ETHERNET_LEN).ok_or(Unsupported)?;
    let (ip, tcp) = split_ipv4(ethernet, ip, PROTOCOL_TCP).ok_or(Unsupported)?;
    let [_, _, _, _, seq_0, seq_1, seq_2, seq_3, _, _, _, _, doff, flags, ..] = *tcp else { return Err(Unsupported) };
    let (tcp, payload) = tcp.split_at_checked(usize::from(doff >> 4) * 4).ok_or(Unsupported)?;
    if payload.is_empty() || size == 0 {
        return Err(Unsupported);
    }
    let sequence = u32::from_be_bytes([seq_0, seq_1, seq_2, seq_3]);
    let last = (payload.len() - 1) / size;
    for (index, part) in payload.chunks(size).enumerate() {
        let mut kept = flags;
        if index != last {
            kept &= !(TCP_FIN | TCP_PSH);
        }
        if index != 0 {
            kept &= !TCP_CWR;
        }
        // It wraps by its standard.
        let sequence = sequence.wrapping_add(u32::try_from(index * size).unwrap_or(0));
        let mut packet = pool.get();
        if write_segment(&mut packet, [outer, ethernet, ip, tcp, part], index, sequence, kept).is_none() {
            pool.put(packet);
            return Err(Unsupported);
        }
        out.extend([packet]);
    }
    Ok(())
}

/// The headers of VXLAN over IPv4 in front of a frame, none if it is not in VXLAN.
fn split_vxlan(frame: &[u8]) -> (&[u8], &[u8]) {
    let inner = || {
        let (ethernet, ip) = frame.split_at_checked(ETHERNET_LEN)?;
        let (_, udp) = split_ipv4(ethernet, ip, PROTOCOL_UDP)?;
        let [_, _, port_0, port_1, ..] = *udp else { return None };
        (u16::from_be_bytes([port_0, port_1]) == super::super::udp::PORT).then(|| udp.get(UDP_LEN + VXLAN_LEN..))?
    };
    frame.split_at(frame.len() - inner().map_or(frame.len(), <[u8]>::len))
}

/// Splits an IPv4 packet behind its header, if it is one that carries `protocol`.
fn split_ipv4<'a>(ethernet: &[u8], packet: &'a [u8], protocol: u8) -> Option<(&'a [u8], &'a [u8])> {
    let [version, _, _, _, _, _, _, _, _, carried, ..] = *packet else { return None };
    if !ethernet.ends_with(&ETHERTYPE_IPV4) || version >> 4 != 4 || carried != protocol {
        return None;
    }
    packet.split_at_checked(usize::from(version & 0x0f) * 4).filter(|(header, _)| header.len() >= 20)
}

/// Writes the `index`-th segment. `None` when a header is too short or the whole
/// too long.
fn write_segment(packet: &mut Packet, parts: [&[u8]; 5], index: usize, sequence: u32, flags: u8) -> Option<()> {
    let [outer, ethernet, ip, tcp, _] = parts;
    if tcp.len() < 20 || !packet.set_len(parts.iter().map(|part| part.len()).sum()) {
        return None;
    }
    let mut rest = packet.as_mut_slice();
    for part in parts {
        let (place, after) = rest.split_at_mut_checked(part.len())?;
        place.copy_from_slice(part);
        rest = after;
    }
    let (outer_headers, frame) = packet.as_mut_slice().split_at_mut_checked(outer.len())?;
    let frame_len = frame.len();
    let (header, segment) = frame.get_mut(ethernet.len()..)?.split_at_mut_checked(ip.len())?;
    finish_ipv4(header, segment.len(), index)?;
    put(segment, 4, &sequence.to_be_bytes());
    put(segment, 13, &[flags]);
    put(segment, 16, &[0, 0]);
    let pseudo = add(add(0, header.get(12..20)?), &[0, PROTOCOL_TCP]);
    let sum = !fold(add(add(pseudo, &u16::try_from(segment.len()).ok()?.to_be_bytes()), segment));
    put(segment, 16, &sum.to_be_bytes());
    if let Some(headers) = outer_headers.get_mut(ETHERNET_LEN..) {
        let (header, udp) = headers.split_at_mut_checked(headers.len() - UDP_LEN - VXLAN_LEN)?;
        finish_ipv4(header, udp.len() + frame_len, index)?;
        put(udp, 4, &u16::try_from(udp.len() + frame_len).ok()?.to_be_bytes());
        // RFC 7348 section 5: zero is what it should be over IPv4.
        put(udp, UDP_CHECKSUM, &[0, 0]);
    }
    Some(())
}

/// Length, identification and checksum of the `index`-th piece of a packet.
fn finish_ipv4(header: &mut [u8], payload_len: usize, index: usize) -> Option<()> {
    let [_, _, _, _, id_0, id_1, ..] = *header else { return None };
    let total = u16::try_from(header.len() + payload_len).ok()?;
    // Fewer than 65,536 segments, and the number wraps by its standard.
    let id = u16::from_be_bytes([id_0, id_1]).wrapping_add(u16::try_from(index).ok()?);
    put(header, 2, &total.to_be_bytes());
    put(header, 4, &id.to_be_bytes());
    put(header, 10, &[0, 0]);
    let sum = !fold(add(0, header));
    put(header, 10, &sum.to_be_bytes());
    Some(())
}

/// Overwrites bytes of a header whose length was checked before.
fn put(header: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(field) = header.get_mut(at..at + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

/// Adds bytes, as 16-bit words, to a one's complement sum (RFC 1071). `bytes`
/// begins at an even offset; 64 bits hold the sum of any frame.
fn add(sum: u64, bytes: &[u8]) -> u64 {
    let (words, odd) = bytes.as_chunks::<2>();
    let sum = words.iter().fold(sum, |sum, word| sum + u64::from(u16::from_be_bytes(*word)));
    odd.iter().fold(sum, |sum, byte| sum + (u64::from(*byte) << 8))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4 without options, TCP without options, payload 0, 1, 2, ...
    fn tcp_frame(payload_len: usize, flags: u8) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(ETHERTYPE_IPV4);
        frame.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, PROTOCOL_TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 9, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        frame.extend((0..payload_len).map(|index| index.to_le_bytes()[0]));
        frame
    }

    fn header(flags: u8, gso: u8, size: u16, start: u16, offset: u16) -> Offload {
        let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes[4..6].copy_from_slice(&size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&offset.to_ne_bytes());
        Offload::parse(bytes)
    }

    fn finish(offload: Offload, frame: &mut [u8]) -> Result<Vec<Packet>, Unsupported> {
        let mut out = Vec::new();
        offload.finish(frame, &mut Pool::new(4), &mut out)?;
        Ok(out)
    }

    /// The sum that a receiver makes is all ones.
    fn assert_sums(frame: &[u8]) {
        assert_eq!(fold(add(0, &frame[14..34])), 0xffff, "IPv4");
        let len = u16::try_from(frame.len() - 34).unwrap().to_be_bytes();
        let pseudo = add(add(0, &frame[26..34]), &[0, frame[23]]);
        assert_eq!(fold(add(add(pseudo, &len), &frame[34..])), 0xffff, "TCP");
    }

    #[test]
    fn super_frame_is_cut_into_whole_segments() {
        let mut frame = tcp_frame(2500, 0x80 | 0x10 | 0x08 | 0x01);
        let packets = finish(header(1, 1, 1000, 34, 16), &mut frame).unwrap();
        let lens: Vec<_> = packets.iter().map(Packet::len).collect();
        assert_eq!(lens, [1054, 1054, 554]);
        let mut payload: Vec<u8> = Vec::new();
        for packet in &packets {
            assert_sums(packet.as_slice());
            payload.extend_from_slice(&packet.as_slice()[54..]);
        }
        assert_eq!(payload, frame[54..]);
        let flags: Vec<_> = packets.iter().map(|packet| packet.as_slice()[47]).collect();
        assert_eq!(flags, [0x90, 0x10, 0x19]);
        let ids: Vec<_> = packets.iter().map(|packet| packet.as_slice()[18..20].to_vec()).collect();
        assert_eq!(ids, [[0xff, 0xff], [0, 0], [0, 1]]);
        assert_eq!(packets[1].as_slice()[38..42], 0xffff_ff00u32.wrapping_add(1000).to_be_bytes());
    }

    #[test]
    fn super_frame_in_vxlan_is_cut_with_its_outer_headers() {
        let mut frame = vec![4; 12];
        frame.extend(ETHERTYPE_IPV4);
        frame.extend([0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, PROTOCOL_UDP, 0, 0, 10, 255, 0, 1, 10, 255, 0, 2]);
        frame.extend([0xc0, 0, 0x12, 0xb5, 0, 0, 0xab, 0xcd]);
        frame.extend([8, 0, 0, 0, 0, 0, 7, 0]);
        frame.extend(tcp_frame(1500, 0x18));
        let packets = finish(header(1, 1, 1000, 84, 16), &mut frame).unwrap();
        assert_eq!(packets.iter().map(Packet::len).collect::<Vec<_>>(), [1104, 604]);
        for (packet, id) in packets.iter().zip(7..) {
            let bytes = packet.as_slice();
            assert_sums(&bytes[50..]);
            assert_eq!(fold(add(0, &bytes[14..34])), 0xffff, "outer IPv4");
            assert_eq!(bytes[16..20], [(bytes.len() - 14).to_be_bytes()[6], (bytes.len() - 14).to_be_bytes()[7], 0, id]);
            assert_eq!(bytes[38..42], [(bytes.len() - 34).to_be_bytes()[6], (bytes.len() - 34).to_be_bytes()[7], 0, 0]);
            assert_eq!(bytes[42..50], [8, 0, 0, 0, 0, 0, 7, 0]);
        }
    }

    #[test]
    fn half_a_checksum_is_completed() {
        let mut frame = tcp_frame(101, 0x10);
        frame[16..18].copy_from_slice(&141u16.to_be_bytes());
        let sum = !fold(add(0, &frame[14..34]));
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        let pseudo = fold(add(add(add(0, &frame[26..34]), &[0, PROTOCOL_TCP]), &121u16.to_be_bytes()));
        frame[50..52].copy_from_slice(&pseudo.to_be_bytes());
        let packets = finish(header(1, 0, 0, 34, 16), &mut frame).unwrap();
        assert_sums(packets[0].as_slice());
    }

    #[test]
    fn udp_sum_of_zero_is_written_as_ones() {
        let mut frame = vec![0; 8];
        frame[0..2].copy_from_slice(&[0xff, 0xff]);
        complete(&mut frame, 0, UDP_CHECKSUM).unwrap();
        assert_eq!(frame[6..8], [0xff, 0xff]);
    }

    #[test]
    fn what_no_wire_carries_is_refused() {
        assert_eq!(finish(header(1, 0, 0, 9999, 16), &mut tcp_frame(1, 0)).unwrap_err(), Unsupported);
        assert_eq!(finish(header(1, 0, 0, 50, 16), &mut tcp_frame(1, 0)).unwrap_err(), Unsupported);
        assert_eq!(finish(header(0, 4, 1000, 0, 0), &mut tcp_frame(9, 0)).unwrap_err(), Unsupported);
        assert_eq!(finish(header(0, 1, 0, 0, 0), &mut tcp_frame(9, 0)).unwrap_err(), Unsupported);
        for len in 0..54 {
            assert_eq!(finish(header(0, 1, 1000, 0, 0), &mut tcp_frame(9, 0)[..len]).unwrap_err(), Unsupported);
        }
        let mut long = vec![0; crate::packet::FRAME_MAX + 1];
        assert_eq!(finish(header(0, 0, 0, 0, 0), &mut long).unwrap_err(), Unsupported);
    }
}
