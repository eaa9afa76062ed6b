//! Capture files: pcapng, draft-ietf-opsawg-pcapng, in the writer's byte order (little-endian here).
//!
//! ```text
//! block:   | type (32) | length (32) | body, padded to 32 bits | length (32) |
//! option:  | code (16) | length (16) | value, padded to 32 bits | ... | 0 (32)
//! section  0A0D0D0A: 1A2B3C4D | version 1.0 | length unknown
//! interface       1: Ethernet | snap length 0 | name, nanoseconds          one for each place of each card
//! packet          6: interface | time | captured, original length | frame | direction, comment
//! statistics      5: interface | time | frames lost                        one for each interface, at the end
//! ```
//!
//! The statistics end the file, so that a reader can tell a whole file from one that was cut.

use std::collections::BTreeMap;

use card_proto::card::{CapturedFrame, Place, Way};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const VERSION_MAJOR: u16 = 1;
const VERSION_MINOR: u16 = 0;
const LINK_ETHERNET: u16 = 1;

const OPTION_COMMENT: u16 = 1;
const INTERFACE_NAME: u16 = 2;
const INTERFACE_DESCRIPTION: u16 = 3;
const INTERFACE_RESOLUTION: u16 = 9;
const SECTION_APPLICATION: u16 = 4;
const PACKET_FLAGS: u16 = 2;
const STATISTICS_DROPPED: u16 = 5;

/// Two lowest bits of the flags.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// Writes one section. It gives bytes and knows no file.
#[derive(Default)]
pub struct Writer {
    /// By card and name; numbered in the order of their coming.
    interfaces: BTreeMap<(String, String), u32>,
    lost: BTreeMap<String, u64>,
    newest_ns: u64,
}

impl Writer {
    /// The beginning of the file.
    pub fn begin(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(BYTE_ORDER.to_le_bytes());
        body.extend(VERSION_MAJOR.to_le_bytes());
        body.extend(VERSION_MINOR.to_le_bytes());
        body.extend(u64::MAX.to_le_bytes());
        option(&mut body, SECTION_APPLICATION, b"cardinal");
        let mut out = Vec::new();
        block(&mut out, SECTION, body);
        out
    }

    /// Adds a frame of a card, and before the first frame of a place the place.
    pub fn frame(&mut self, out: &mut Vec<u8>, card: &str, frame: &CapturedFrame) {
        let interface = self.interface(out, card, place_name(frame));
        self.newest_ns = self.newest_ns.max(frame.unix_ns);
        let mut body = Vec::new();
        body.extend(interface.to_le_bytes());
        body.extend(time(frame.unix_ns));
        body.extend(u32::try_from(frame.data.len()).unwrap_or(u32::MAX).to_le_bytes());
        body.extend(frame.length.to_le_bytes());
        body.extend(&frame.data);
        pad(&mut body);
        match frame.way() {
            Way::In => option(&mut body, PACKET_FLAGS, &INBOUND.to_le_bytes()),
            Way::Out => option(&mut body, PACKET_FLAGS, &OUTBOUND.to_le_bytes()),
            Way::Unspecified => {}
        }
        if !frame.dropped.is_empty() {
            option(&mut body, OPTION_COMMENT, format!("dropped: {}", frame.dropped).as_bytes());
        }
        block(out, PACKET, body);
    }

    /// Notes how many frames of a card nobody saw, so far.
    pub fn lost(&mut self, card: &str, lost: u64) {
        self.lost.insert(card.to_owned(), lost);
    }

    /// The end of the file. What a card lost stands at the first of its places.
    pub fn end(mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut interfaces: Vec<_> = std::mem::take(&mut self.interfaces).into_iter().collect();
        interfaces.sort_by_key(|(_, number)| *number);
        for ((card, _), number) in interfaces {
            let mut body = Vec::new();
            body.extend(number.to_le_bytes());
            body.extend(time(self.newest_ns));
            option(&mut body, STATISTICS_DROPPED, &self.lost.remove(&card).unwrap_or(0).to_le_bytes());
            block(&mut out, STATISTICS, body);
        }
        out
    }

    fn interface(&mut self, out: &mut Vec<u8>, card: &str, name: String) -> u32 {
        let next = u32::try_from(self.interfaces.len()).unwrap_or(u32::MAX);
        let key = (card.to_owned(), name);
        if let Some(number) = self.interfaces.get(&key) {
            return *number;
        }
        let mut body = Vec::new();
        body.extend(LINK_ETHERNET.to_le_bytes());
        body.extend([0; 6]);
        option(&mut body, INTERFACE_NAME, key.1.as_bytes());
        option(&mut body, INTERFACE_DESCRIPTION, card.as_bytes());
        // Ten to the power of minus nine.
        option(&mut body, INTERFACE_RESOLUTION, &[9]);
        block(out, INTERFACE, body);
        self.interfaces.insert(key, next);
        next
    }
}

/// A place as it stands in the list of interfaces.
fn place_name(frame: &CapturedFrame) -> String {
    let port = frame.port_id.as_str();
    match frame.place() {
        Place::Guest => format!("{port} guest"),
        Place::Underlay => "underlay".to_owned(),
        Place::Public => "public".to_owned(),
        Place::Drops | Place::Unspecified if port.is_empty() => "drops".to_owned(),
        Place::Drops | Place::Unspecified => format!("{port} drops"),
    }
}

fn time(unix_ns: u64) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h] = unix_ns.to_le_bytes();
    // The upper half comes first.
    [e, f, g, h, a, b, c, d]
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    // Ours are short; a longer one is cut as the format has it.
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    body.extend(code.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(value.iter().take(length.into()));
    pad(body);
}

fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Closes the options of a body and adds it as a block.
fn block(out: &mut Vec<u8>, kind: u32, mut body: Vec<u8>) {
    body.extend([0; 4]);
    // Frames are far below 4 GiB.
    let length = u32::try_from(body.len() + 12).unwrap_or(u32::MAX).to_le_bytes();
    out.extend(kind.to_le_bytes());
    out.extend(length);
    out.append(&mut body);
    out.extend(length);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(place: Place, dropped: &str) -> CapturedFrame {
        CapturedFrame {
            unix_ns: 0x0102_0304_0506_0708,
            place: place.into(),
            port_id: if place == Place::Underlay { String::new() } else { "eni-1".into() },
            way: Way::In.into(),
            length: 99,
            data: vec![7; 5],
            dropped: dropped.into(),
        }
    }

    fn number(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// Type and body of each block; lengths on both sides agree.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let length = number(bytes, 4) as usize;
            assert!(length.is_multiple_of(4) && number(bytes, length - 4) as usize == length);
            blocks.push((number(bytes, 0), bytes[8..length - 4].to_vec()));
            bytes = &bytes[length..];
        }
        blocks
    }

    #[test]
    fn a_file_has_an_interface_for_each_place_and_says_why_a_frame_died() {
        let mut writer = Writer::default();
        let mut file = writer.begin();
        writer.frame(&mut file, "card-a", &frame(Place::Guest, ""));
        writer.frame(&mut file, "card-a", &frame(Place::Underlay, ""));
        writer.frame(&mut file, "card-b", &frame(Place::Underlay, ""));
        writer.frame(&mut file, "card-a", &frame(Place::Guest, ""));
        writer.frame(&mut file, "card-a", &frame(Place::Drops, "denied_ingress"));
        writer.lost("card-a", 3);
        file.extend(writer.end());
        let blocks = blocks(&file);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [SECTION, 1, 6, 1, 6, 1, 6, 6, 1, 6, 5, 5, 5, 5]);
        let of = |wanted: u32| blocks.iter().filter(move |(kind, _)| *kind == wanted).map(|(_, body)| body);
        assert_eq!(of(PACKET).map(|body| number(body, 0)).collect::<Vec<_>>(), [0, 1, 2, 0, 3]);
        let first = of(PACKET).next().unwrap();
        assert_eq!((number(first, 4), number(first, 8), number(first, 12), number(first, 16)), (0x0102_0304, 0x0506_0708, 5, 99));
        let names = ["eni-1 guest", "underlay", "underlay", "eni-1 drops"];
        for (body, name) in of(INTERFACE).zip(names) {
            assert_eq!(&body[12..12 + name.len()], name.as_bytes());
        }
        let last = of(PACKET).next_back().unwrap();
        assert!(last.windows(23).any(|window| window == b"dropped: denied_ingress"));
        assert_eq!(of(STATISTICS).map(|body| number(body, 16)).collect::<Vec<_>>(), [3, 0, 0, 0]);
    }
}
