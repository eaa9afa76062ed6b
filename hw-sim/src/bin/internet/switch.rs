//! A learning switch: it knows Ethernet addresses and nothing above them.
//!
//! IEEE 802.1Q section 8.8, without ageing: a station that moves speaks, and is
//! learned anew.

use std::collections::HashMap;

/// Stations that are remembered; a flood of made-up ones makes the switch a hub.
const STATIONS_MAX: usize = 4096;

/// Where a frame comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The cable of this number.
    Cable(usize),
    /// The host behind the switch.
    Gateway,
}

/// Who gets a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Destination {
    /// It makes no sense, or is where it belongs.
    Nobody,
    /// The port of its station.
    One(Port),
    /// Every port but its own.
    All,
}

/// Which station is at which port.
#[derive(Default)]
pub struct Switch(HashMap<[u8; 6], Port>);

impl Switch {
    /// Learns from a frame and says who gets it.
    pub fn frame(&mut self, from: Port, frame: &[u8]) -> Destination {
        let Some((&to, rest)) = frame.split_first_chunk::<6>() else { return Destination::Nobody };
        let Some((&source, _)) = rest.split_first_chunk::<6>().filter(|(_, rest)| 2 <= rest.len()) else { return Destination::Nobody };
        if is_group(source) {
            return Destination::Nobody;
        }
        if self.0.len() < STATIONS_MAX || self.0.contains_key(&source) {
            self.0.insert(source, from);
        }
        match self.0.get(&to) {
            _ if is_group(to) => Destination::All,
            Some(port) if *port == from => Destination::Nobody,
            Some(port) => Destination::One(*port),
            None => Destination::All,
        }
    }
}

fn is_group([first, ..]: [u8; 6]) -> bool {
    first & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        [[to, 0, 0, 0, 0, to], [from, 0, 0, 0, 0, from]].concat().into_iter().chain([8, 0]).collect()
    }

    #[test]
    fn stations_are_learned_and_follow_when_they_move() {
        let (one, two) = (Port::Cable(0), Port::Cable(1));
        let mut switch = Switch::default();
        assert_eq!(switch.frame(one, &frame(0xff, 2)), Destination::All);
        assert_eq!(switch.frame(two, &frame(2, 4)), Destination::One(one));
        assert_eq!(switch.frame(one, &frame(6, 2)), Destination::All, "nobody has heard of 6");
        assert_eq!(switch.frame(Port::Gateway, &frame(4, 8)), Destination::One(two));
        assert_eq!(switch.frame(two, &frame(0xff, 2)), Destination::All, "2 has moved");
        assert_eq!(switch.frame(one, &frame(2, 4)), Destination::One(two));
        assert_eq!(switch.frame(one, &frame(4, 2)), Destination::Nobody, "4 is at the same port");
    }

    #[test]
    fn what_is_no_frame_goes_nowhere_and_strangers_without_end_fill_nothing() {
        let mut switch = Switch::default();
        for len in 0..14 {
            assert_eq!(switch.frame(Port::Gateway, &frame(4, 2)[..len]), Destination::Nobody);
        }
        assert_eq!(switch.frame(Port::Gateway, &frame(4, 3)), Destination::Nobody, "a group does not speak");
        for number in 0..u32::try_from(2 * STATIONS_MAX).unwrap() {
            let [a, b, c, d] = number.to_be_bytes();
            switch.frame(Port::Cable(0), &[2, 0, 0, 0, 0, 1, 2, 1, a, b, c, d, 8, 0]);
        }
        assert_eq!(switch.0.len(), STATIONS_MAX);
    }
}
