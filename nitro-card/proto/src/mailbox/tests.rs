use super::*;
use crate::host::{ConsoleInput, Delete, ToHost, to_host::Command};
use proptest::prelude::*;
use std::thread;

const SOON: Option<Duration> = Some(Duration::from_secs(5));

struct Pair {
    _folder: tempfile::TempDir,
    card: (Sender, Receiver),
    host: (Sender, Receiver),
}

fn pair() -> Pair {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slot.sock");
    let listener = Listener::bind(&path).unwrap();
    let host = thread::spawn(move || connect(&path).unwrap().split());
    let card = listener.accept().unwrap().split();
    Pair { _folder: folder, card, host: host.join().unwrap() }
}

/// A card's receiver, and the memory and socket of a host that obeys no rule.
struct Hostile {
    _folder: tempfile::TempDir,
    card: (Sender, Receiver),
    stream: UnixStream,
    memory: Memory,
}

impl Hostile {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slot.sock");
        let listener = Listener::bind(&path).unwrap();
        let host = thread::spawn(move || attach(&path).unwrap());
        let card = listener.accept().unwrap().split();
        let (stream, file) = host.join().unwrap();
        Self { _folder: folder, card, stream, memory: Memory::map(file, LINK_WORDS).unwrap() }
    }

    /// Writes `words` at the start of the ring from host to card, and `head`.
    fn write(&self, words: &[u64], head: u64) {
        let ring = &self.memory.words()[LINK_WORDS / 2..];
        for (slot, word) in ring[INDEX_WORDS..].iter().zip(words) {
            slot.store(word.to_le(), Ordering::Relaxed);
        }
        ring[0].store(head.to_le(), Ordering::Release);
    }

    fn ring_doorbell(&self) {
        rustix::net::send(&self.stream, &[1], SendFlags::NOSIGNAL).unwrap();
    }
}

fn frame(sequence: u64, body: &[u8]) -> Vec<u64> {
    let mut bytes = header(body.len() as u32, sequence, 0).to_vec();
    bytes.extend(body);
    let checksum = crc32c::crc32c(&bytes);
    bytes[20..24].copy_from_slice(&checksum.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn message(size: usize, tag: u64) -> ToHost {
    let data = (0..size).map(|index| (index as u64 ^ tag) as u8).collect();
    ToHost { command: Some(Command::Console(ConsoleInput { id: format!("i-{tag}"), data })) }
}

#[test]
fn messages_arrive_in_order_in_both_directions() {
    let mut pair = pair();
    for tag in 0..100 {
        pair.card.0.send(&message(tag, tag as u64)).unwrap();
        pair.host.0.send(&message(1000 + tag, tag as u64)).unwrap();
    }
    for tag in 0..100 {
        assert_eq!(pair.host.1.recv(SOON).unwrap(), Some(message(tag, tag as u64)));
        assert_eq!(pair.card.1.recv(SOON).unwrap(), Some(message(1000 + tag, tag as u64)));
    }
    assert_eq!(pair.host.1.recv::<ToHost>(Some(Duration::from_millis(5))).unwrap(), None);
}

#[test]
fn frames_survive_many_turns_of_the_ring_and_back_pressure() {
    let mut pair = pair();
    let sizes = |tag: u64| (tag * 7919 % 65_000) as usize;
    let sender = thread::spawn(move || (0..400).for_each(|tag| pair.card.0.send(&message(sizes(tag), tag)).unwrap()));
    for tag in 0..400 {
        if tag % 100 == 0 {
            thread::sleep(Duration::from_millis(20)); // Let the ring fill up.
        }
        assert_eq!(pair.host.1.recv(SOON).unwrap(), Some(message(sizes(tag), tag)));
    }
    sender.join().unwrap();
}

#[test]
fn a_message_over_the_limit_is_refused_and_the_link_goes_on() {
    let mut pair = pair();
    assert!(matches!(pair.card.0.send(&message(BODY_MAX, 1)), Err(MailboxError::TooLarge(_))));
    pair.card.0.send(&message(BODY_MAX - 32, 2)).unwrap();
    assert_eq!(pair.host.1.recv(SOON).unwrap(), Some(message(BODY_MAX - 32, 2)));
}

#[test]
fn last_words_of_a_dead_peer_are_delivered_before_its_end() {
    let mut pair = pair();
    pair.host.0.send(&message(10, 7)).unwrap();
    drop(pair.host);
    assert_eq!(pair.card.1.recv(SOON).unwrap(), Some(message(10, 7)));
    assert!(matches!(pair.card.1.recv::<ToHost>(None), Err(MailboxError::PeerGone)));
    assert!(matches!(pair.card.0.send(&message(10, 7)), Err(MailboxError::PeerGone)));
}

#[test]
fn hang_up_ends_a_waiting_receive_and_a_waiting_send() {
    let Pair { _folder, mut card, mut host } = pair();
    let waiting = thread::spawn(move || host.1.recv::<ToHost>(None));
    let stuck = thread::spawn(move || {
        loop {
            if let Err(error) = host.0.send(&message(60_000, 1)) {
                return error;
            }
        }
    });
    thread::sleep(Duration::from_millis(50));
    card.0.hang_up();
    assert!(matches!(waiting.join().unwrap(), Err(MailboxError::PeerGone)));
    assert!(matches!(stuck.join().unwrap(), MailboxError::PeerGone));
    assert!(matches!(card.1.recv::<ToHost>(None), Err(MailboxError::PeerGone)));
}

#[test]
fn a_peer_that_never_reads_stalls_a_send_for_five_seconds_only() {
    let mut pair = pair();
    let begin = Instant::now();
    let error = loop {
        if let Err(error) = pair.card.0.send(&message(60_000, 1)) {
            break error;
        }
    };
    assert!(matches!(error, MailboxError::Stalled(_)));
    assert!((5..7).contains(&begin.elapsed().as_secs()));
    // And the peer sees the end of the link after what it was sent.
    while pair.host.1.recv::<ToHost>(SOON).is_ok() {}
}

#[test]
fn a_closed_listener_accepts_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slot.sock");
    let listener = Listener::bind(&path).unwrap();
    listener.close();
    assert!(matches!(listener.accept(), Err(MailboxError::Closed)));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_killed_card_is_replaced_but_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slot.sock");
    std::mem::forget(Listener::bind(&path).unwrap());
    Listener::bind(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(Listener::bind(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn what_is_no_card_is_refused_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slot.sock");
    let server = UnixListener::bind(&path).unwrap();
    let host = thread::spawn(move || connect(&path).map(|_| ()));
    rustix::net::send(server.accept().unwrap().0, b"mailbox1", SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(host.join().unwrap(), Err(MailboxError::Greeting(_))));
}

#[test]
fn each_broken_rule_ends_the_link_under_its_name() {
    let body = ToHost { command: Some(Command::Delete(Delete { id: "i-1".into(), generation: 3 })) }.encode_to_vec();
    let good = frame(0, &body);
    let size = good.len() as u64;
    let altered = |word: usize, bits: u64| {
        let mut words = good.clone();
        words[word] ^= bits;
        words
    };
    let check = |words: Vec<u64>, head: u64, rule: Garbage| {
        let mut peer = Hostile::new();
        peer.write(&words, head);
        peer.ring_doorbell();
        assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::Garbage(found)) if found == rule), "{rule}");
        assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::PeerGone)));
    };
    check(altered(0, 1), size, Garbage::Header);
    check(altered(0, 1 << 32), size, Garbage::Header);
    check(altered(0, 1 << 40), size, Garbage::Header);
    check(altered(0, 1 << 48), size, Garbage::Header);
    check(altered(1, 1 << 20), size, Garbage::Length);
    check(altered(1, 1), size, Garbage::Checksum);
    check(altered(1, 1 << 40), size, Garbage::Sequence);
    check(altered(2, 1), size, Garbage::Sequence);
    check(altered(2, 1 << 33), size, Garbage::Checksum);
    check(altered(3, 1 << 9), size, Garbage::Checksum);
    check(good.clone(), size - 1, Garbage::Length);
    check(good.clone(), 2, Garbage::Length);
    check(good.clone(), RING_WORDS as u64 + 1, Garbage::Index);
    check(good.clone(), u64::MAX, Garbage::Index);
    check(frame(0, &[0xff; 5]), 4, Garbage::Message);
    check(vec![], 0, Garbage::Doorbell);
}

#[test]
fn a_head_that_moves_back_is_garbage() {
    let mut peer = Hostile::new();
    let good = frame(0, &message(5, 1).encode_to_vec());
    peer.write(&good, good.len() as u64);
    assert!(peer.card.1.recv::<ToHost>(SOON).unwrap().is_some());
    peer.write(&good, 0);
    assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::Garbage(Garbage::Index))));
}

#[test]
fn a_tail_outside_the_ring_ends_the_senders_link() {
    let mut peer = Hostile::new();
    peer.memory.words()[TAIL].store(77_u64.to_le(), Ordering::Relaxed);
    assert!(matches!(peer.card.0.send(&message(5, 1)), Err(MailboxError::Garbage(Garbage::Index))));
}

#[test]
fn frames_written_after_the_hang_up_are_not_read() {
    let mut peer = Hostile::new();
    peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::PeerGone)));
    let good = frame(0, &message(5, 1).encode_to_vec());
    peer.write(&good, good.len() as u64);
    assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::PeerGone)));
}

#[test]
fn a_flood_of_doorbells_never_blocks_the_card() {
    let mut peer = Hostile::new();
    // Nobody reads the card's own doorbells; its sends go on all the same.
    for tag in 0..5000 {
        peer.card.0.send(&message(1, tag)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_in_the_ring_is_an_error_or_a_message_and_never_a_panic(
        words in proptest::collection::vec(any::<u64>(), 0..40), head in prop_oneof![0..64_u64, any::<u64>()],
    ) {
        let mut peer = Hostile::new();
        peer.write(&words, head);
        peer.ring_doorbell();
        while let Ok(Some(_)) = peer.card.1.recv::<ToHost>(Some(Duration::from_millis(2))) {}
    }

    #[test]
    fn one_flipped_bit_is_never_a_message(body in proptest::collection::vec(any::<u8>(), 0..200), bit in any::<prop::sample::Index>()) {
        let message = ToHost { command: Some(Command::Console(ConsoleInput { id: "i".into(), data: body })) }.encode_to_vec();
        let mut words = frame(0, &message);
        let bit = bit.index((HEADER_BYTES + message.len()) * 8);
        words[bit / 64] ^= 1 << (bit % 64);
        let mut peer = Hostile::new();
        peer.write(&words, words.len() as u64);
        peer.ring_doorbell();
        prop_assert!(matches!(peer.card.1.recv::<ToHost>(SOON), Err(MailboxError::Garbage(_))));
    }

    #[test]
    fn any_messages_of_any_sizes_arrive(sizes in proptest::collection::vec(0..BODY_MAX - 64, 1..60)) {
        let mut pair = pair();
        let sent = sizes.clone();
        let sender = thread::spawn(move || sent.iter().for_each(|size| pair.host.0.send(&message(*size, *size as u64)).unwrap()));
        for size in sizes {
            prop_assert_eq!(pair.card.1.recv(SOON).unwrap(), Some(message(size, size as u64)));
        }
        sender.join().unwrap();
    }
}
