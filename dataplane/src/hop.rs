//! Next hops: decisions about packets from a guest, each stored once and shared by
//! all flows that it was made for. It knows what a packet gets in front and how many
//! flows hold it; it must not know flows, ports or policy.
//!
//! A hop to another card keeps the 64 bytes that its packets begin with, ready to
//! be copied over the 50 bytes before the guest's frame and the 14 of its own header:
//!
//! ```text
//! | outer Ethernet 14 | IPv4 20 | UDP 8 | VXLAN 8 | inner Ethernet 14 |
//! ```
//!
//! Only both lengths, the IPv4 checksum over one of them and the UDP source port
//! differ from packet to packet. The header is built when the neighbour's MAC is
//! known, under an epoch; when a MAC of the wire changed since, it is built again.
//!
//! Invariant: hop 0 means "none" and has no header. A hop lives while flows hold it.

use std::net::Ipv4Addr;

use crate::action::Egress;
use crate::headers::{self, ETHERNET, IPV4, UDP};
use crate::policy::Map;
use crate::{Mac, Underlay, vxlan};

/// Bytes in front of the guest's frame.
pub(crate) const OUTER: usize = ETHERNET + IPV4 + UDP + vxlan::VXLAN;
/// Bytes of a ready header.
pub(crate) const HEADER: usize = OUTER + ETHERNET;

/// What a hop is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// The source MAC that its packets go on with.
    pub source: Mac,
    /// What happens to them.
    pub egress: Egress,
}

/// One next hop.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Hop {
    header: [u8; HEADER],
    /// Sum over the outer IPv4 header without length and checksum.
    sum: u32,
    /// When the header was built; 0 is never.
    epoch: u32,
    /// The burst that last used it.
    burst: u32,
    routed: bool,
    holders: u32,
    what: NextHop,
}

impl Hop {
    fn new(what: NextHop) -> Self {
        Self { header: [0; HEADER], sum: 0, epoch: 0, burst: 0, routed: false, holders: 0, what }
    }

    /// The card that it leads to, if it leads to one.
    pub(crate) fn remote(&self) -> Option<Ipv4Addr> {
        match self.what.egress {
            Egress::Remote { vtep, .. } => Some(vtep),
            Egress::Local { .. } | Egress::Public { .. } | Egress::Gateway { .. } => None,
        }
    }

    /// The card that its header leads to.
    pub(crate) fn vtep(&self) -> Ipv4Addr {
        self.remote().unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    /// Whether its header leads there through the router.
    #[inline]
    pub(crate) fn is_routed(&self) -> bool {
        self.routed
    }

    /// Whether its header is of `epoch`.
    #[inline]
    pub(crate) fn is_ready(&self, epoch: u32) -> bool {
        self.epoch == epoch
    }

    /// Builds the header towards the neighbour with `mac`.
    pub(crate) fn build(&mut self, epoch: u32, underlay: &Underlay, neighbour: Mac) {
        let Egress::Remote { vtep, mac, vni, routed } = self.what.egress else { return };
        let mut header = [0; HEADER];
        vxlan::write_outer(&mut header, underlay, vtep, 0, 0);
        headers::set_macs(&mut header, neighbour, underlay.mac);
        if let Some(rest) = header.get_mut(OUTER - vxlan::VXLAN..) {
            vxlan::write_header(rest, vni);
            headers::write_ethernet(rest.get_mut(vxlan::VXLAN..).unwrap_or_default(), mac, self.what.source, headers::TYPE_IPV4);
        }
        if let Some(ip) = header.get_mut(ETHERNET..ETHERNET + IPV4) {
            headers::write(ip, 2, [0, 0]);
            headers::write(ip, 10, [0, 0]);
            self.sum = u32::from(!headers::checksum(ip));
        }
        (self.header, self.routed, self.epoch) = (header, routed, epoch);
    }

    /// Writes the header of a packet of `bytes` of IP, which fit a frame. All of it is
    /// copied first, and what differs put over it: a copy that was patched before would
    /// wait for the patches to leave the store queue.
    #[inline]
    pub(crate) fn write(&self, room: &mut [u8; HEADER], bytes: u16, entropy: u16) {
        *room = self.header;
        // UDP and VXLAN have 8 bytes, Ethernet 14, IPv4 20.
        let udp = bytes.wrapping_add(30);
        let ip = udp.wrapping_add(20);
        let sum = self.sum + u32::from(ip);
        let [_, _, c0, c1] = (!((sum & 0xffff) + (sum >> 16))).to_be_bytes();
        [room[16], room[17]] = ip.to_be_bytes();
        [room[24], room[25]] = [c0, c1];
        [room[34], room[35]] = entropy.to_be_bytes();
        [room[38], room[39]] = udp.to_be_bytes();
    }

    /// Notes that the burst with this number uses it. True the first time.
    #[inline]
    pub(crate) fn touch(&mut self, burst: u32) -> bool {
        std::mem::replace(&mut self.burst, burst) != burst
    }
}

/// All next hops of a card.
#[derive(Debug)]
pub(crate) struct Hops {
    hops: Vec<Hop>,
    by_what: Map<NextHop, u32>,
    free: Vec<u32>,
}

impl Default for Hops {
    fn default() -> Self {
        let egress = Egress::Public { address: Ipv4Addr::UNSPECIFIED };
        let none = Hop::new(NextHop { source: Mac([0; 6]), egress });
        Self { hops: vec![none], by_what: Map::default(), free: Vec::new() }
    }
}

impl Hops {
    /// All of them, by index.
    #[inline]
    pub(crate) fn all_mut(&mut self) -> &mut [Hop] {
        &mut self.hops
    }

    fn get_mut(&mut self, index: u32) -> Option<&mut Hop> {
        self.hops.get_mut(index as usize)
    }

    /// What hop `index` does.
    pub(crate) fn egress(&self, index: u32) -> Option<Egress> {
        self.hops.get(index as usize).map(|hop| hop.what.egress)
    }

    /// The hop for `what`, with one holder more.
    pub(crate) fn hold(&mut self, what: NextHop) -> u32 {
        let index = match self.by_what.get(&what) {
            Some(index) => *index,
            None => {
                let index = self.free.pop().unwrap_or_else(|| {
                    self.hops.push(Hop::new(what));
                    // Hops are no more than flows, which are below 2^30.
                    u32::try_from(self.hops.len() - 1).unwrap_or(u32::MAX)
                });
                self.by_what.insert(what, index);
                if let Some(hop) = self.get_mut(index) {
                    *hop = Hop::new(what);
                }
                index
            }
        };
        if let Some(hop) = self.get_mut(index) {
            hop.holders += 1;
        }
        index
    }

    /// One holder less; without any the hop is forgotten.
    pub(crate) fn release(&mut self, index: u32) {
        let Some(hop) = self.hops.get_mut(index as usize).filter(|hop| hop.holders > 0) else { return };
        hop.holders -= 1;
        if hop.holders == 0 {
            hop.epoch = 0;
            self.by_what.remove(&hop.what);
            self.free.push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vni;
    use crate::packet::Packet;

    const UNDERLAY: Underlay =
        Underlay { address: Ipv4Addr::new(10, 255, 0, 11), prefix_length: 24, mac: Mac([2, 0, 0, 0, 0, 1]), encapsulated: true };

    fn what(n: u8) -> NextHop {
        let (vtep, mac) = (Ipv4Addr::new(10, 255, 0, n), Mac([2, 0, 0, 0, 1, n]));
        NextHop { source: Mac([2, 0, 0, 0, 2, n]), egress: Egress::Remote { vtep, mac, vni: Vni(0xab_cdef), routed: false } }
    }

    #[test]
    fn a_ready_header_equals_the_headers_pushed_one_by_one() {
        let mut hop = Hop::new(what(12));
        hop.build(1, &UNDERLAY, Mac([2, 0, 0, 0, 3, 3]));
        for len in (42u16..9015).chain([9166]) {
            let mut packet = Packet::new();
            assert!(packet.copy_from(&vec![0; len.into()]));
            headers::write_ethernet(packet.as_mut_slice(), Mac([2, 0, 0, 0, 1, 12]), Mac([2, 0, 0, 0, 2, 12]), headers::TYPE_IPV4);
            assert!(vxlan::push_header(&mut packet, Vni(0xab_cdef)));
            assert!(vxlan::push_outer(&mut packet, &UNDERLAY, Ipv4Addr::new(10, 255, 0, 12), 0xc000 | len));
            headers::write(packet.as_mut_slice(), 0, [2, 0, 0, 0, 3, 3]);
            let mut header = [0xaa; HEADER];
            hop.write(&mut header, len - 14, 0xc000 | len);
            assert_eq!(header[..], packet.as_slice()[..HEADER]);
        }
    }

    #[test]
    fn hops_are_shared_and_forgotten_with_their_last_holder() {
        let mut hops = Hops::default();
        let (a, b) = (hops.hold(what(1)), hops.hold(what(2)));
        assert_eq!((a, b, hops.hold(what(1))), (1, 2, 1));
        assert_eq!(hops.egress(a), Some(what(1).egress));
        hops.release(a);
        hops.get_mut(a).unwrap().build(5, &UNDERLAY, UNDERLAY.mac);
        assert_eq!(hops.hold(what(1)), a);
        hops.release(a);
        hops.release(a);
        assert_eq!((hops.by_what.len(), hops.hold(what(3))), (1, a), "its place is used again");
        assert!(!hops.get_mut(a).unwrap().is_ready(5), "and its header is not");
        hops.release(0);
    }
}
