#![allow(clippy::cast_possible_truncation)]

use super::table::split_mix;
use super::*;
use crate::counters::DropReason;

fn key(slot: u32, n: u32) -> Key {
    let ip = Ipv4 {
        header_len: 20,
        total_len: 40,
        id: 0,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset: 0,
        ttl: 64,
        protocol: headers::TCP,
        source: (0x0a00_0000 + (n >> 16)).into(),
        destination: [10, 1, 0, 1].into(),
    };
    let transport = Transport { source_port: n as u16, destination_port: 80, ..Transport::default() };
    Key::new(Slot(slot), Direction::Egress, &ip, &transport)
}

fn segment(flags: u8) -> Transport {
    Transport { tcp_flags: flags, ..Transport::default() }
}

fn open(table: &mut FlowTable, key: Key) -> Result<FlowId, DropReason> {
    table.insert(Duration::ZERO, Flow::new(key, Direction::Egress))
}

fn establish(table: &mut FlowTable, id: FlowId) {
    table.observe(id, Duration::ZERO, Direction::Egress, &segment(tcp::SYN), 40);
    table.observe(id, Duration::ZERO, Direction::Ingress, &segment(tcp::SYN | tcp::ACK), 40);
    assert_eq!(table.get(id).unwrap().state(), State::New, "an answer alone may go to a forged source");
    table.observe(id, Duration::ZERO, Direction::Egress, &segment(tcp::ACK), 40);
    assert_eq!(table.get(id).unwrap().state(), State::Established);
}

fn find(table: &FlowTable, key: &Key) -> Option<FlowId> {
    table.find(table.hash(key), key)
}

#[test]
fn both_directions_of_a_connection_have_one_key() {
    let forth = Ipv4 { source: [1, 1, 1, 1].into(), destination: [2, 2, 2, 2].into(), ..quoted() };
    let back = Ipv4 { source: forth.destination, destination: forth.source, ..forth };
    let there = Transport { source_port: 7, destination_port: 9, ..Transport::default() };
    let here = Transport { source_port: 9, destination_port: 7, ..Transport::default() };
    let key = Key::new(Slot(3), Direction::Egress, &forth, &there);
    assert_eq!(key, Key::new(Slot(3), Direction::Ingress, &back, &here));
    assert_ne!(key, Key::new(Slot(4), Direction::Ingress, &back, &here));
    assert_ne!(key, Key::new(Slot(3), Direction::Ingress, &forth, &there));
    assert_eq!((key.slot(), key.protocol()), (Slot(3), headers::TCP));
}

fn quoted() -> Ipv4 {
    let mut bytes = [0; 20];
    headers::write_ipv4(&mut bytes, ([0; 4].into(), [0; 4].into()), headers::TCP, (0, 0), 20);
    headers::ipv4_quoted(&bytes).unwrap()
}

#[test]
fn the_table_agrees_with_a_plain_map_under_churn() {
    let mut table = FlowTable::new(1 << 12, 42);
    let mut model = std::collections::BTreeMap::new();
    let mut state = 1;
    for _ in 0..200_000 {
        let random = split_mix(&mut state);
        let key = key(random as u32 & 3, (random >> 8) as u32 & 0xfff);
        if random >> 63 == 0 && model.len() < 1 << 11 {
            let id = open(&mut table, key).unwrap();
            model.insert(key.high ^ key.low, (key, id));
        } else if let Some((_, id)) = model.remove(&(key.high ^ key.low)) {
            table.remove(id);
        }
        assert_eq!(find(&table, &key), model.get(&(key.high ^ key.low)).map(|(_, id)| *id));
    }
    assert_eq!(table.len(), model.len());
    assert!(model.values().all(|(key, id)| find(&table, key) == Some(*id)));
}

#[test]
fn a_full_table_evicts_the_embryonic_and_never_the_established() {
    let mut table = FlowTable::new(1024, 42);
    for n in 0..512 {
        let id = open(&mut table, key(1, n)).unwrap();
        establish(&mut table, id);
    }
    for n in 512..100_000 {
        open(&mut table, key(2, n)).unwrap();
    }
    assert_eq!(table.len(), 1024);
    for n in 0..512 {
        assert!(find(&table, &key(1, n)).is_some());
    }
    for n in 0..512 {
        let found = find(&table, &key(1, n)).unwrap();
        assert_eq!(table.get(found).unwrap().state(), State::Established);
    }
    let ids: Vec<_> = (512..100_000).filter_map(|n| find(&table, &key(2, n))).collect();
    assert_eq!(ids.len(), 512);
    ids.into_iter().for_each(|id| establish(&mut table, id));
    assert_eq!(open(&mut table, key(3, 1)), Err(DropReason::ConntrackAllowance));
}

#[test]
fn a_flood_at_one_port_leaves_room_for_the_others() {
    let mut table = FlowTable::new(FLOWS_MAX, 42);
    for n in 0..1 << 15 {
        open(&mut table, key(1, n)).unwrap();
    }
    // Each millisecond some of the flood make room for others of it.
    for ms in 1..1000u32 {
        let now = Duration::from_millis(ms.into());
        let passed = (0..200).filter(|n| {
            let refused = table.refuses(Slot(1), now);
            let flow = Flow::new(key(1, (1 << 15) + ms * 200 + n), Direction::Egress);
            let result = table.insert(now, flow);
            assert_eq!(result.is_err(), refused, "the question and the answer agree");
            assert!(matches!(result, Ok(_) | Err(DropReason::ConntrackAllowance)));
            result.is_ok()
        });
        assert_eq!((passed.count(), table.len()), (16, 1 << 15));
    }
    let now = Duration::from_millis(999);
    assert!(table.refuses(Slot(1), now) && !table.refuses(Slot(2), now));
    let known = key(1, (1 << 15) + 999 * 200);
    table.insert(now, Flow::new(known, Direction::Ingress)).expect("one in place of itself needs no room");
    open(&mut table, key(2, 1)).unwrap();
    table.remove_port(Slot(1));
    assert_eq!(table.len(), 1);
    assert!(find(&table, &key(2, 1)).is_some());
}

#[test]
fn sweeping_all_parts_forgets_what_is_idle() {
    let mut table = FlowTable::new(1024, 42);
    let old = open(&mut table, key(1, 1)).unwrap();
    establish(&mut table, old);
    for n in 2..100 {
        open(&mut table, key(1, n)).unwrap();
    }
    for _ in 0..=8 {
        table.sweep(Duration::from_secs(29));
    }
    assert_eq!(table.len(), 99);
    for _ in 0..=8 {
        table.sweep(Duration::from_secs(31));
    }
    assert_eq!(table.len(), 1);
    for _ in 0..=8 {
        table.sweep(Duration::from_secs(351));
    }
    assert!(table.is_empty());
    open(&mut table, key(1, 1)).unwrap();
}

#[test]
fn nearly_all_flows_find_room_in_their_two_buckets() {
    let mut table = FlowTable::new(1 << 16, 99);
    for n in 0..1 << 16 {
        let id = open(&mut table, key(n & 7, n)).unwrap();
        establish(&mut table, id);
    }
    assert_eq!(table.len(), 1 << 16);
}

#[test]
fn an_untracked_flow_makes_room_even_when_established_and_does_not_count() {
    let mut table = FlowTable::new(64, 42);
    for n in 0..64 {
        let mut flow = Flow::new(key(1, n), Direction::Egress);
        flow.set_untracked(n >= 32);
        let id = table.insert(Duration::ZERO, flow).unwrap();
        establish(&mut table, id);
    }
    assert_eq!((table.len(), table.tracked(Slot(1))), (64, 32));
    // From here on this one is like the others.
    table.track(find(&table, &key(1, 40)).unwrap());
    assert_eq!(table.tracked(Slot(1)), 33);
    for n in 100..120 {
        let id = open(&mut table, key(2, n)).unwrap();
        establish(&mut table, id);
    }
    assert_eq!((table.len(), table.tracked(Slot(1)), table.tracked(Slot(2))), (64, 33, 20));
    assert!((0..32).chain([40]).all(|n| find(&table, &key(1, n)).is_some()), "the tracked are still there");
    for n in 0..64 {
        if let Some(id) = find(&table, &key(1, n)) {
            table.remove(id);
        }
    }
    assert_eq!(table.tracked(Slot(1)), 0);
}

#[test]
fn a_udp_stream_begins_behind_the_first_answer_and_nothing_before_that_is_settled() {
    let mut key = key(1, 1);
    key.high = key.high & !(0xff << 32) | u64::from(headers::UDP_PROTOCOL) << 32;
    let mut flow = Flow::new(key, Direction::Egress);
    flow.decide_ingress(7, Origin::Vtep([10, 255, 0, 1].into()), Mac([2; 6]));
    let vtep = u32::from(Ipv4Addr::new(10, 255, 0, 1));
    let quick = |flow: &Flow| flow.hit_ingress(&key, 7, vtep).is_some();
    let steps = [(Direction::Egress, State::New), (Direction::Ingress, State::New), (Direction::Egress, State::Established)];
    for (direction, state) in steps {
        assert!(!quick(&flow));
        flow.observe(direction, &Transport::default());
        assert_eq!(flow.state(), state);
    }
    assert!(quick(&flow));
    let tracking = ConnectionTracking { udp_stream_s: 61, ..ConnectionTracking::default() };
    assert!(!flow.is_over(60_999, &tracking) && flow.is_over(61_000, &tracking));
}
