//! ARP, RFC 826: the message, and the neighbours of the card on one wire.
//!
//! ```text
//! | Ethernet 14 | 1 | 0800 | 6 | 4 | operation | sender MAC, IP | target MAC, IP |
//! ```
//!
//! ```text
//!            resolve             reply                 30 s, used
//! (unknown) --------> Resolving ------> Known --------------------> Known, asked again
//!                        | 5 questions, no answer     | 3 questions, no answer, or 60 s unused
//!                        v                            v
//!                     (unknown), what waits is dropped
//! ```
//!
//! Bounds: neighbours per wire, packets that wait for one. An answer is taken only
//! for an address that was asked for, or from one that asks for us.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::Mac;
use crate::counters::DropReason;
use crate::headers::{self, ETHERNET, write};
use crate::packet::{Packet, Pool};
use crate::policy::Map;

/// Operation of a question.
pub const REQUEST: u16 = 1;
/// Operation of an answer.
pub const REPLY: u16 = 2;

const LENGTH: usize = 28;

const NEIGHBOURS: usize = 4096;
const WAITING: usize = 64;
/// The first question is repeated after this, each further one after twice as long.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
const TRIES: u8 = 5;
const FRESH: Duration = Duration::from_secs(30);
const REFRESH_TRIES: u8 = 3;
const UNUSED: Duration = Duration::from_secs(60);

/// An ARP message for Ethernet and IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// [`REQUEST`] or [`REPLY`].
    pub operation: u16,
    /// Who speaks.
    pub sender: (Mac, Ipv4Addr),
    /// Who is asked for, or answered.
    pub target: (Mac, Ipv4Addr),
}

/// Parses what follows an Ethernet header of type ARP.
///
/// # Errors
/// [`DropReason::Truncated`], [`DropReason::BadHeader`] for other hardware or protocols.
pub fn parse(bytes: &[u8]) -> Result<Message, DropReason> {
    let (head, rest) = bytes.split_first_chunk::<8>().ok_or(DropReason::Truncated)?;
    let [0, 1, 0x08, 0x00, 6, 4, o0, o1] = *head else { return Err(DropReason::BadHeader) };
    let (sender, rest) = party(rest)?;
    let (target, _) = party(rest)?;
    Ok(Message { operation: u16::from_be_bytes([o0, o1]), sender, target })
}

fn party(bytes: &[u8]) -> Result<((Mac, Ipv4Addr), &[u8]), DropReason> {
    let (mac, rest) = bytes.split_first_chunk::<6>().ok_or(DropReason::Truncated)?;
    let (ip, rest) = rest.split_first_chunk::<4>().ok_or(DropReason::Truncated)?;
    Ok(((Mac(*mac), Ipv4Addr::from(*ip)), rest))
}

/// Writes a whole frame with `message` into `packet`.
pub fn frame(packet: &mut Packet, destination: Mac, message: &Message) {
    packet.reset();
    // 42 bytes always fit a packet.
    if !packet.set_len(ETHERNET + LENGTH) {
        return;
    }
    let bytes = packet.as_mut_slice();
    headers::write_ethernet(bytes, destination, message.sender.0, headers::TYPE_ARP);
    let Some(body) = bytes.get_mut(ETHERNET..) else { return };
    let [o0, o1] = message.operation.to_be_bytes();
    write(body, 0, [0, 1, 0x08, 0x00, 6, 4, o0, o1]);
    write(body, 8, message.sender.0.0);
    write(body, 14, message.sender.1.octets());
    write(body, 18, message.target.0.0);
    write(body, 24, message.target.1.octets());
}

/// The neighbours of the card on one wire.
#[derive(Debug)]
pub struct Neighbours {
    mac: Mac,
    entries: Map<Ipv4Addr, Neighbour>,
    due: Option<Duration>,
    epoch: u32,
}

#[derive(Debug)]
struct Neighbour {
    state: State,
    /// Our address in questions about it.
    sender: Ipv4Addr,
    tries: u8,
    due: Duration,
    used: Duration,
}

#[derive(Debug)]
enum State {
    Resolving(VecDeque<Packet>),
    Known(Mac),
}

impl Neighbours {
    /// Nobody known yet; `mac` is the card's own on this wire.
    #[must_use]
    pub fn new(mac: Mac) -> Self {
        Self { mac, entries: Map::default(), due: None, epoch: 1 }
    }

    /// Changes, and is not 0, whenever what [`Neighbours::mac`] said may be wrong now.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The MAC of a neighbour, if it is known.
    #[must_use]
    pub fn mac(&self, address: Ipv4Addr) -> Option<Mac> {
        match self.entries.get(&address)?.state {
            State::Known(mac) => Some(mac),
            State::Resolving(_) => None,
        }
    }

    /// Notes that a neighbour got packets without [`Neighbours::send`].
    pub fn used(&mut self, now: Duration, address: Ipv4Addr) {
        if let Some(neighbour) = self.entries.get_mut(&address) {
            neighbour.used = now;
        }
    }

    /// Sends `packet`, a frame that lacks only its destination MAC, to `hop`: into
    /// `out` at once when the MAC is known, else when it becomes so. `sender` is our
    /// address in the question.
    ///
    /// # Errors
    /// [`DropReason::NeighbourQueueFull`] with the packet back in the pool.
    pub fn send(
        &mut self,
        now: Duration,
        (hop, sender): (Ipv4Addr, Ipv4Addr),
        mut packet: Packet,
        pool: &mut Pool,
        out: &mut Vec<Packet>,
    ) -> Result<(), DropReason> {
        let room = self.entries.len() < NEIGHBOURS;
        match self.entries.get_mut(&hop) {
            Some(neighbour) => {
                neighbour.used = now;
                match &mut neighbour.state {
                    State::Known(mac) => {
                        write(packet.as_mut_slice(), 0, mac.0);
                        out.push(packet);
                    }
                    State::Resolving(waiting) if waiting.len() < WAITING => waiting.push_back(packet),
                    State::Resolving(_) => {
                        pool.put(packet);
                        return Err(DropReason::NeighbourQueueFull);
                    }
                }
            }
            None if room => {
                let due = now + RETRY;
                let state = State::Resolving(VecDeque::from([packet]));
                self.entries.insert(hop, Neighbour { state, sender, tries: 1, due, used: now });
                self.due = Some(self.due.map_or(due, |before| before.min(due)));
                out.push(question(self.mac, sender, hop, pool));
            }
            None => {
                pool.put(packet);
                return Err(DropReason::NeighbourQueueFull);
            }
        }
        Ok(())
    }

    /// Takes what an ARP message says about its sender. `asks_us` lets a sender
    /// that is not known yet become so: we are about to answer it. Returns packets
    /// that waited for it to `out`.
    pub fn learn(&mut self, now: Duration, message: &Message, asks_us: bool, out: &mut Vec<Packet>) {
        let (mac, address) = message.sender;
        if mac.is_group() || address.is_unspecified() || mac == self.mac {
            return;
        }
        let due = now + FRESH;
        if let Some(neighbour) = self.entries.get_mut(&address) {
            if let State::Resolving(waiting) = &mut neighbour.state {
                for mut packet in waiting.drain(..) {
                    write(packet.as_mut_slice(), 0, mac.0);
                    out.push(packet);
                }
            }
            let before = std::mem::replace(&mut neighbour.state, State::Known(mac));
            if matches!(before, State::Known(old) if old != mac) {
                self.epoch = self.epoch.wrapping_add(1).max(1);
            }
            neighbour.tries = 0;
            neighbour.due = due;
        } else if asks_us && self.entries.len() < NEIGHBOURS {
            let sender = message.target.1;
            self.entries.insert(address, Neighbour { state: State::Known(mac), sender, tries: 0, due, used: now });
        } else {
            return;
        }
        self.due = Some(self.due.map_or(due, |before| before.min(due)));
    }

    /// Repeats questions and forgets neighbours that are due. Returns how many
    /// packets waited in vain.
    pub fn tick(&mut self, now: Duration, pool: &mut Pool, out: &mut Vec<Packet>) -> u64 {
        if self.due.is_none_or(|due| due > now) {
            return 0;
        }
        let mut lost = 0;
        let mac = self.mac;
        let before = self.entries.len();
        self.entries.retain(|address, neighbour| {
            if neighbour.due > now {
                return true;
            }
            let limit = match &mut neighbour.state {
                State::Resolving(waiting) if neighbour.tries >= TRIES => {
                    lost += waiting.len() as u64;
                    waiting.drain(..).for_each(|packet| pool.put(packet));
                    return false;
                }
                State::Resolving(_) => RETRY_MAX,
                State::Known(_) if neighbour.tries >= REFRESH_TRIES || now.saturating_sub(neighbour.used) >= UNUSED => {
                    return false;
                }
                State::Known(_) if now.saturating_sub(neighbour.used) >= FRESH => {
                    neighbour.due = neighbour.used + UNUSED;
                    return true;
                }
                State::Known(_) => RETRY_MAX,
            };
            out.push(question(mac, neighbour.sender, *address, pool));
            neighbour.due = now + (RETRY * 2u32.saturating_pow(u32::from(neighbour.tries))).min(limit);
            neighbour.tries += 1;
            true
        });
        if self.entries.len() < before {
            self.epoch = self.epoch.wrapping_add(1).max(1);
        }
        self.due = self.entries.values().map(|neighbour| neighbour.due).min();
        lost
    }

    /// When [`Neighbours::tick`] has something to do.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        self.due
    }
}

/// A question for `address`; from and about `sender` itself it is an announcement.
pub fn question(mac: Mac, sender: Ipv4Addr, address: Ipv4Addr, pool: &mut Pool) -> Packet {
    let mut packet = pool.get();
    let message = Message { operation: REQUEST, sender: (mac, sender), target: (Mac([0; 6]), address) };
    frame(&mut packet, Mac::BROADCAST, &message);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 12);
    const US: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 11);
    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const PEER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn setup() -> (Neighbours, Pool, Vec<Packet>) {
        (Neighbours::new(MAC), Pool::new(100), Vec::new())
    }

    fn packet() -> Packet {
        let mut packet = Packet::new();
        assert!(packet.copy_from(&[0; 60]));
        packet
    }

    fn reply() -> Message {
        Message { operation: REPLY, sender: (PEER, HOP), target: (MAC, US) }
    }

    #[test]
    fn packets_wait_for_the_answer_and_then_go_in_order() {
        let (mut neighbours, mut pool, mut out) = setup();
        for n in 0..3 {
            let mut packet = packet();
            packet.as_mut_slice()[20] = n;
            neighbours.send(Duration::ZERO, (HOP, US), packet, &mut pool, &mut out).unwrap();
        }
        assert_eq!(out.len(), 1, "one question for all of them");
        let asked = parse(&out[0].as_slice()[ETHERNET..]).unwrap();
        assert_eq!((asked.operation, asked.sender, asked.target.1), (REQUEST, (MAC, US), HOP));
        out.clear();
        neighbours.learn(Duration::ZERO, &reply(), false, &mut out);
        assert_eq!(out.iter().map(|packet| packet.as_slice()[20]).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(out.iter().all(|packet| packet.as_slice()[..6] == PEER.0));
    }

    #[test]
    fn a_question_is_repeated_and_then_given_up() {
        let (mut neighbours, mut pool, mut out) = setup();
        for _ in 0..WAITING {
            neighbours.send(Duration::ZERO, (HOP, US), packet(), &mut pool, &mut out).unwrap();
        }
        let full = neighbours.send(Duration::ZERO, (HOP, US), packet(), &mut pool, &mut out);
        assert_eq!(full, Err(DropReason::NeighbourQueueFull));
        let (mut lost, mut now) = (0, Duration::ZERO);
        while let Some(due) = neighbours.due() {
            now = due;
            lost += neighbours.tick(now, &mut pool, &mut out);
        }
        assert_eq!((lost, out.len()), (WAITING as u64, usize::from(TRIES)));
        assert!(now < Duration::from_secs(5));
    }

    #[test]
    fn a_used_neighbour_is_asked_again_and_an_unused_one_forgotten() {
        let (mut neighbours, mut pool, mut out) = setup();
        neighbours.send(Duration::ZERO, (HOP, US), packet(), &mut pool, &mut out).unwrap();
        neighbours.learn(Duration::ZERO, &reply(), false, &mut out);
        out.clear();
        let later = Duration::from_secs(29);
        neighbours.send(later, (HOP, US), packet(), &mut pool, &mut out).unwrap();
        out.clear();
        neighbours.tick(FRESH, &mut pool, &mut out);
        assert_eq!(out.len(), 1, "asked while it is still used");
        neighbours.learn(FRESH, &reply(), false, &mut out);
        while let Some(due) = neighbours.due() {
            neighbours.tick(due, &mut pool, &mut out);
        }
        assert!(neighbours.entries.is_empty());
    }

    #[test]
    fn only_who_was_asked_for_or_asks_us_is_believed() {
        let (mut neighbours, _, mut out) = setup();
        neighbours.learn(Duration::ZERO, &reply(), false, &mut out);
        assert!(neighbours.entries.is_empty());
        neighbours.learn(Duration::ZERO, &reply(), true, &mut out);
        assert_eq!(neighbours.entries.len(), 1);
    }
}
