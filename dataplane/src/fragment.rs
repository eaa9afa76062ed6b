//! IPv4 fragments. Only the first one of a datagram has ports; the others follow
//! its verdict by (source, destination, identification, protocol), or are dropped
//! when it did not pass. And the making of fragments, RFC 791 section 2.3.

use std::collections::VecDeque;
use std::time::Duration;

use crate::flow::{Direction, Key, Slot};
use crate::headers::{self, ETHERNET, Ipv4, write};
use crate::packet::{Packet, Pool};
use crate::policy::Map;

/// How long the rest of a datagram may take.
const LIFE: Duration = Duration::from_secs(5);
/// Datagrams under way at most, over all ports and of one port.
const BOUND: usize = 8192;
const PORT_BOUND: u16 = 1024;

const MORE_FRAGMENTS: u16 = 0x2000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Datagram {
    slot: Slot,
    direction: Direction,
    source: std::net::Ipv4Addr,
    destination: std::net::Ipv4Addr,
    id: u16,
    protocol: u8,
}

/// Datagrams whose first fragment passed, each with what was decided for it.
#[derive(Debug)]
pub struct FragmentTable<T = Key> {
    decided: Map<Datagram, T>,
    expiry: VecDeque<(Duration, Datagram)>,
    held: Map<Slot, u16>,
}

impl<T> Default for FragmentTable<T> {
    fn default() -> Self {
        Self { decided: Map::default(), expiry: VecDeque::new(), held: Map::default() }
    }
}

impl<T: Copy> FragmentTable<T> {
    /// What was decided for the first fragment of a later one.
    #[must_use]
    pub fn find(&self, slot: Slot, direction: Direction, ip: &Ipv4) -> Option<T> {
        self.decided.get(&datagram(slot, direction, ip)).copied()
    }

    /// Notes what was decided for a first fragment that passed. Returns false when
    /// too many are under way.
    #[must_use]
    pub fn insert(&mut self, now: Duration, slot: Slot, direction: Direction, ip: &Ipv4, decision: T) -> bool {
        self.expire(now);
        let datagram = datagram(slot, direction, ip);
        if let Some(known) = self.decided.get_mut(&datagram) {
            *known = decision;
            return true;
        }
        let held = self.held.entry(slot).or_default();
        if *held >= PORT_BOUND || self.decided.len() >= BOUND {
            return false;
        }
        *held += 1;
        self.decided.insert(datagram, decision);
        self.expiry.push_back((now + LIFE, datagram));
        true
    }

    fn expire(&mut self, now: Duration) {
        while let Some((at, datagram)) = self.expiry.front() {
            if *at > now {
                break;
            }
            self.decided.remove(datagram);
            if let Some(held) = self.held.get_mut(&datagram.slot) {
                *held -= 1;
            }
            self.expiry.pop_front();
        }
    }
}

fn datagram(slot: Slot, direction: Direction, ip: &Ipv4) -> Datagram {
    Datagram { slot, direction, source: ip.source, destination: ip.destination, id: ip.id, protocol: ip.protocol }
}

/// Cuts the IPv4 packet in `frame` into frames of at most `mtu` bytes of IP and
/// hands each to `send`. Every fragment repeats the whole header, options included.
pub fn split(frame: &[u8], ip: &Ipv4, mtu: usize, pool: &mut Pool, mut send: impl FnMut(&mut Pool, Packet)) {
    let Some((head, data)) = frame.get(..ETHERNET + ip.total_len).and_then(|all| all.split_at_checked(ETHERNET + ip.header_len)) else {
        return;
    };
    let room = mtu.saturating_sub(ip.header_len) & !7;
    if room == 0 {
        return;
    }
    let mut offset = ip.fragment_offset;
    let mut pieces = data.chunks(room).peekable();
    while let Some(piece) = pieces.next() {
        let mut packet = pool.get();
        let more = ip.more_fragments || pieces.peek().is_some();
        if packet.set_len(head.len() + piece.len()) {
            let bytes = packet.as_mut_slice();
            if let Some((to, rest)) = bytes.split_at_mut_checked(head.len()) {
                to.copy_from_slice(head);
                rest.copy_from_slice(piece);
                header(to, piece.len(), offset | if more { MORE_FRAGMENTS } else { 0 });
            }
            send(pool, packet);
        } else {
            pool.put(packet);
        }
        // Pieces but the last are whole units of 8 bytes, and all of a packet's fit 13 bits.
        offset += u16::try_from(piece.len() / 8).unwrap_or(0);
    }
}

/// Sets length, flags and checksum of the IPv4 header behind an Ethernet header.
fn header(head: &mut [u8], payload: usize, flags: u16) {
    let Some(ip) = head.get_mut(ETHERNET..) else { return };
    // No longer than the packet that it is a piece of.
    let total = u16::try_from(ip.len() + payload).unwrap_or(u16::MAX);
    write(ip, 2, total.to_be_bytes());
    write(ip, 6, flags.to_be_bytes());
    write(ip, 10, [0, 0]);
    let sum = headers::checksum(ip);
    write(ip, 10, sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::IPV4;

    #[test]
    fn pieces_put_together_are_the_datagram() {
        let mut frame = vec![0; ETHERNET + IPV4];
        let data: Vec<u8> = (0..4000u16).map(|n| n.to_be_bytes()[1]).collect();
        headers::write_ethernet(&mut frame, crate::Mac::BROADCAST, crate::Mac::BROADCAST, headers::TYPE_IPV4);
        headers::write_ipv4(&mut frame[ETHERNET..], ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()), 17, (9, 0), 4000);
        frame.extend(&data);
        let ip = headers::ipv4(&frame[ETHERNET..]).unwrap();
        let mut pool = Pool::new(8);
        let mut whole = Vec::new();
        let mut last = false;
        split(&frame, &ip, 1500, &mut pool, |_, packet| {
            let bytes = &packet.as_slice()[ETHERNET..];
            let piece = headers::ipv4(bytes).unwrap();
            assert!(bytes.len() <= 1500 && piece.total_len == bytes.len() && piece.id == 9 && !last);
            assert_eq!(usize::from(piece.fragment_offset) * 8, whole.len());
            last = !piece.more_fragments;
            whole.extend_from_slice(&bytes[IPV4..]);
        });
        assert!(last);
        assert_eq!(whole, data);
    }

    #[test]
    fn one_port_cannot_fill_the_table() {
        let mut table = FragmentTable::<Key>::default();
        let mut bytes = [0; 20];
        headers::write_ipv4(&mut bytes, ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()), 17, (0, MORE_FRAGMENTS), 0);
        let mut ip = headers::ipv4(&bytes).unwrap();
        let key = Key::new(Slot(1), Direction::Egress, &ip, &headers::Transport::default());
        for id in 0..PORT_BOUND {
            ip.id = id;
            assert!(table.insert(Duration::ZERO, Slot(1), Direction::Egress, &ip, key));
        }
        ip.id = PORT_BOUND;
        assert!(!table.insert(Duration::ZERO, Slot(1), Direction::Egress, &ip, key));
        assert!(table.insert(Duration::ZERO, Slot(2), Direction::Egress, &ip, key));
        assert!(table.find(Slot(2), Direction::Ingress, &ip).is_none());
        assert!(table.insert(LIFE, Slot(1), Direction::Egress, &ip, key), "the first ones have expired");
    }
}
