//! What was decided for a flow, and where finished packets are put.

use std::net::Ipv4Addr;

use crate::PortId;
use crate::flow::Slot;
use crate::packet::{Packet, Pool};
use crate::policy::GatewaySlot;

/// What happens to the packets of a flow that come from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
        /// MAC of the guest, or of the port or NAT gateway that a route leads to.
        mac: crate::Mac,
        /// Its VPC, which is another one for a peer.
        vni: crate::Vni,
        /// Through the router: TTL and source MAC change.
        routed: bool,
    },
    /// To the internet, from this address instead of the private one.
    Public {
        /// The port's public address.
        address: Ipv4Addr,
    },
    /// To a NAT gateway of this card.
    Gateway {
        /// Which one.
        to: GatewaySlot,
    },
}

/// Where the packets of a flow that go to the guest come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Another guest of this card, or a NAT gateway of it.
    Local,
    /// The card with this underlay address.
    Vtep(Ipv4Addr),
    /// The internet, or a guest of this card by its public address.
    Public,
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
    ports: Vec<PortOutput>,
    touched: Vec<Slot>,
}

/// Frames for one guest.
#[derive(Debug)]
struct PortOutput {
    id: PortId,
    packets: Vec<Packet>,
    /// How many of them [`Output::judge`] has seen.
    judged: usize,
}

impl Output {
    /// Adds a frame for the guest of a port.
    #[inline]
    pub fn port(&mut self, slot: Slot, id: PortId, packet: Packet) {
        let index = slot.0 as usize;
        if self.ports.len() <= index {
            self.grow(index, id);
        }
        if let Some(port) = self.ports.get_mut(index) {
            if port.packets.is_empty() {
                port.id = id;
                port.judged = 0;
                self.touched.push(slot);
            }
            port.packets.push(packet);
        }
    }

    /// Takes back the frames for guests that `keep` refuses; each is asked for once.
    pub(crate) fn judge(&mut self, pool: &mut Pool, mut keep: impl FnMut(Slot, &Packet) -> bool) {
        let ports = &mut self.ports;
        self.touched.retain(|slot| {
            let Some(port) = ports.get_mut(slot.0 as usize) else { return false };
            let from = port.judged.min(port.packets.len());
            port.packets.extract_if(from.., |packet| !keep(*slot, packet)).for_each(|packet| pool.put(packet));
            port.judged = port.packets.len();
            // Without any it will be touched again.
            port.judged > 0
        });
    }

    #[cold]
    fn grow(&mut self, index: usize, id: PortId) {
        self.ports.resize_with(index + 1, || PortOutput { id, packets: Vec::new(), judged: 0 });
    }

    /// Hands over the frames of each guest that has some; whatever `send` leaves
    /// goes back to the pool.
    pub fn drain_ports(&mut self, pool: &mut Pool, mut send: impl FnMut(&mut Pool, PortId, &mut Vec<Packet>)) {
        for slot in self.touched.drain(..) {
            if let Some(port) = self.ports.get_mut(slot.0 as usize) {
                send(pool, port.id, &mut port.packets);
                pool.put_all(&mut port.packets);
            }
        }
    }
}
