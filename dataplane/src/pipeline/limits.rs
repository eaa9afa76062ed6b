//! The allowances of instances, at the two doors between the pipeline and a guest:
//! what a guest sends is judged before anything else is done with it, what it is to
//! receive when all else has been. What the card's services say is not judged.

use std::time::Duration;

use super::{Pipeline, Turn};
use crate::AllowanceId;
use crate::counters::Frames;
use crate::flow::{Direction, Slot};
use crate::limits::Allowance;
use crate::packet::Packet;

/// The allowance of an instance, and its ports.
#[derive(Debug)]
pub(super) struct Shared {
    id: AllowanceId,
    allowance: Allowance,
    members: Vec<Slot>,
}

impl Pipeline {
    /// Takes over the allowances of the ports. One whose limits did not change keeps
    /// what is left of it.
    pub(super) fn allowances_put(&mut self, now: Duration) {
        let mut before = std::mem::take(&mut self.allowances);
        for (number, state) in (0..).zip(&mut self.ports) {
            let Some(state) = state else { continue };
            state.allowance = None;
            state.tally.set_connections_left(None);
            let Some(config) = state.port.config.allowance else { continue };
            let index = self.allowances.iter().position(|shared| shared.id == config.id).unwrap_or_else(|| {
                let known = before.iter().position(|shared| shared.id == config.id && *shared.allowance.limits() == config.limits);
                let allowance = match known {
                    Some(known) => before.swap_remove(known).allowance,
                    None => Allowance::new(&config.limits, now),
                };
                self.allowances.push(Shared { id: config.id, allowance, members: Vec::new() });
                self.allowances.len() - 1
            });
            state.allowance = Some(index);
            if let Some(shared) = self.allowances.get_mut(index) {
                shared.members.push(Slot(number));
            }
        }
    }

    /// Drops what a guest sends beyond its allowance.
    pub(super) fn police_sent(&mut self, turn: &mut Turn<'_>, slot: Slot, packets: &mut Vec<Packet>) {
        let Self { ports, allowances, board, .. } = self;
        let Some(state) = ports.get(slot.0 as usize).and_then(Option::as_ref) else { return };
        let Some(shared) = state.allowance.and_then(|index| allowances.get_mut(index)) else { return };
        let now = turn.now;
        let refused = packets.extract_if(.., |packet| match shared.allowance.take(now, Direction::Egress, packet.len()) {
            Ok(()) => false,
            Err(reason) => {
                state.tally.received(Frames::one(packet.len()));
                state.tally.dropped(reason, 1);
                board.card.dropped(reason, 1);
                true
            }
        });
        refused.for_each(|packet| turn.pool.put(packet));
    }

    /// Drops what guests are to receive in this turn beyond their allowance.
    pub(super) fn police_received(&mut self, turn: &mut Turn<'_>) {
        if self.allowances.is_empty() {
            return;
        }
        let Self { ports, allowances, board, .. } = self;
        let now = turn.now;
        turn.out.judge(turn.pool, |slot, packet| {
            let Some(state) = ports.get(slot.0 as usize).and_then(Option::as_ref) else { return true };
            let Some(shared) = state.allowance.and_then(|index| allowances.get_mut(index)) else { return true };
            match shared.allowance.take(now, Direction::Ingress, packet.len()) {
                Ok(()) => true,
                Err(reason) => {
                    state.tally.dropped(reason, 1);
                    board.card.dropped(reason, 1);
                    false
                }
            }
        });
    }

    /// Shows how many connections may still be tracked.
    pub(super) fn allowances_show(&self) {
        for shared in &self.allowances {
            let left = self.connections_left(shared);
            for state in shared.members.iter().filter_map(|slot| self.port(*slot)) {
                state.tally.set_connections_left(left);
            }
        }
    }

    /// Whether the instance of a port may have one more connection tracked.
    pub(super) fn may_track(&self, slot: Slot) -> bool {
        let shared = self.port(slot).and_then(|state| self.allowances.get(state.allowance?));
        shared.and_then(|shared| self.connections_left(shared)).is_none_or(|left| left > 0)
    }

    fn connections_left(&self, shared: &Shared) -> Option<u32> {
        shared.allowance.connections_left(shared.members.iter().map(|slot| self.flows.tracked(*slot)).sum())
    }
}
