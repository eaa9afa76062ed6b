//! What was decided for a flow, and where finished packets are put.

use std::net::Ipv4Addr;

use crate::PortId;
use crate::counters::DropReason;
use crate::flow::Slot;
use crate::packet::{Packet, Pool};

/// What happens to the packets of a flow that come from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// To another guest of this card.
    Local {
        /// Its port.
        to: Slot,
        /// Through the router: TTL and source MAC change.
        routed: bool,
    },
    /// To a guest of another card, by VXLAN.
    Remote {
        /// That card.
        vtep: Ipv4Addr,
        /// MAC of the guest.
        mac: crate::Mac,
        /// Through the router: TTL and source MAC change.
        routed: bool,
    },
    /// To the internet, from this address instead of the private one.
    Public {
        /// The port's public address.
        address: Ipv4Addr,
    },
}

/// Where the packets of a flow that go to the guest come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Another guest of this card.
    Local,
    /// The card with this underlay address.
    Vtep(Ipv4Addr),
    /// The internet, or a guest of this card by its public address.
    Public,
}

/// A packet that died, kept for whoever captures.
#[derive(Debug)]
pub struct Dropped {
    /// The port on whose account, if it belonged to one.
    pub port: Option<PortId>,
    /// Why.
    pub reason: DropReason,
    /// As it was then.
    pub packet: Packet,
}

/// Finished packets of a turn, by device. The worker sends and empties it.
#[derive(Debug, Default)]
pub struct Output {
    /// For other cards.
    pub underlay: Vec<Packet>,
    /// For the internet.
    pub public: Vec<Packet>,
    /// For the card's own services, with the port each came from.
    pub punted: Vec<(PortId, Packet)>,
    /// What died, while [`Output::keep_dropped`] is set.
    pub dropped: Vec<Dropped>,
    /// Somebody captures: packets that die are kept instead of freed.
    pub keep_dropped: bool,
    ports: Vec<(PortId, Vec<Packet>)>,
    touched: Vec<Slot>,
}

impl Output {
    /// Adds a frame for the guest of a port.
    pub fn port(&mut self, slot: Slot, id: PortId, packet: Packet) {
        let index = slot.0 as usize;
        if self.ports.len() <= index {
            self.ports.resize_with(index + 1, || (id, Vec::new()));
        }
        if let Some((owner, packets)) = self.ports.get_mut(index) {
            if packets.is_empty() {
                *owner = id;
                self.touched.push(slot);
            }
            packets.push(packet);
        }
    }

    /// Takes a packet that died.
    pub fn drop(&mut self, pool: &mut Pool, port: Option<PortId>, reason: DropReason, packet: Packet) {
        if self.keep_dropped {
            self.dropped.push(Dropped { port, reason, packet });
        } else {
            pool.put(packet);
        }
    }

    /// Hands over the frames of each guest that has some; whatever `send` leaves
    /// goes back to the pool.
    pub fn drain_ports(&mut self, pool: &mut Pool, mut send: impl FnMut(&mut Pool, PortId, &mut Vec<Packet>)) {
        for slot in self.touched.drain(..) {
            if let Some((id, packets)) = self.ports.get_mut(slot.0 as usize) {
                send(pool, *id, packets);
                pool.put_all(packets);
            }
        }
    }
}
