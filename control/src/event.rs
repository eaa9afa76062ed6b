//! The outbox: facts are written in the transaction that makes them true and
//! delivered afterwards, at least once, in the order of the commits.
//!
//! The default subscriber is the daemon's own log. A cursor in the store says
//! what was delivered, so a crash between delivery and cursor repeats the last
//! few and loses none.

use std::collections::BTreeMap;

use crate::model::{Counter, Event, REGION, Time};
use crate::world::{Sequence, Tx, World};

/// A launch was accepted and its capacity is claimed.
pub const INSTANCE_LAUNCH_REQUESTED: &str = "InstanceLaunchRequested";
/// The card says that the machine runs.
pub const INSTANCE_RUNNING: &str = "InstanceRunning";
/// The machine has halted and left its card.
pub const INSTANCE_STOPPED: &str = "InstanceStopped";
/// The instance and all that goes with it has left its card.
pub const INSTANCE_TERMINATED: &str = "InstanceTerminated";

const CURSOR: &str = "event-delivered";

/// How long delivered events stay readable.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// Writes an event into the outbox.
pub fn emit(tx: &mut Tx<'_>, now: Time, account: &str, kind: &str, resource_id: &str, detail: &[(&str, &str)]) {
    let sequence = tx.counter_next("event");
    let detail: BTreeMap<_, _> = detail.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    tx.put(Event {
        account_id: account.to_owned(),
        sequence,
        time: now,
        kind: kind.to_owned(),
        resource_id: resource_id.to_owned(),
        detail,
    });
}

/// The events about one resource of an account, oldest first.
pub fn of_resource(tx: &Tx<'_>, account: &str, resource_id: &str) -> Vec<Event> {
    let events = tx.find::<Event>(REGION, "resource", resource_id);
    events.iter().filter(|event| event.account_id == account).map(|event| Event::clone(event)).collect()
}

/// The events that were not delivered yet, oldest first, and the commit that they are durable with.
pub fn undelivered(world: &World, most: usize) -> (Vec<Event>, Sequence) {
    world.read(|tx| {
        let delivered = tx.get::<Counter>(REGION, CURSOR).map_or(0, |counter| counter.value);
        tx.after::<Event>(REGION, &Event::row_id(delivered)).take(most).map(|event| Event::clone(event)).collect()
    })
}

/// Moves the cursor behind `sequence` and forgets what was delivered long ago.
pub fn delivered(tx: &mut Tx<'_>, now: Time, sequence: u64) {
    tx.put(Counter { name: CURSOR.to_owned(), value: sequence });
    let old = |event: &&std::sync::Arc<Event>| event.sequence <= sequence && KEPT_MS < now.since_ms(event.time);
    let ids: Vec<String> = tx.list::<Event>(REGION).take_while(old).map(|event| Event::row_id(event.sequence)).collect();
    for id in ids {
        tx.delete::<Event>(REGION, &id);
    }
}

/// Writes events into the daemon's log.
pub fn log(events: &[Event]) {
    for event in events {
        tracing::info!(sequence = event.sequence, account = event.account_id, kind = event.kind, resource = event.resource_id, detail = ?event.detail, "event");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Region;

    #[test]
    fn events_are_delivered_once_in_order_and_forgotten_after_a_day() {
        let world = World::in_memory(Region::for_tests(), 1);
        let mut tx = world.begin();
        for id in ["i-1", "i-2", "i-3"] {
            emit(&mut tx, Time(0), "1", INSTANCE_RUNNING, id, &[("zone", "us-east-1a")]);
        }
        tx.commit();
        let (first, _) = undelivered(&world, 2);
        assert_eq!(first.iter().map(|event| event.resource_id.as_str()).collect::<Vec<_>>(), ["i-1", "i-2"]);
        let mut tx = world.begin();
        delivered(&mut tx, Time(0), 2);
        tx.commit();
        let (second, _) = undelivered(&world, 2);
        assert_eq!(second.len(), 1);
        assert_eq!(world.read(|tx| of_resource(tx, "1", "i-1").len()).0, 1);
        assert_eq!(world.read(|tx| of_resource(tx, "2", "i-1").len()).0, 0);
        let mut tx = world.begin();
        delivered(&mut tx, Time(KEPT_MS + 1), 2);
        tx.commit();
        assert_eq!(undelivered(&world, 9).0.len(), 1, "an old event that was not delivered stays");
        assert_eq!(world.read(|tx| of_resource(tx, "1", "i-1").len()).0, 0);
    }
}
