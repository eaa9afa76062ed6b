//! Capture files: classic pcap in both byte orders with micro- or nanoseconds,
//! and pcapng. Written: classic pcap, microseconds, little-endian.
//!
//! ```text
//! pcap:   | magic 4 | version 2+2 | zone 4 | accuracy 4 | snap length 4 | link type 4 |
//!         then per frame | seconds 4 | fraction 4 | captured 4 | original 4 | bytes |
//! pcapng: blocks of | type 4 | length 4 | body, padded to 4 | length 4 |
//! ```
//!
//! Only frames of link type Ethernet count; time stamps do not matter here, since
//! a trace is replayed as fast as it is taken. Knows bytes and files, and nothing
//! of what is in a frame.

use std::io::{self, Write};
use std::path::Path;

use dataplane::headers;

const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const SECTION: u32 = 0x0a0d_0d0a;
const SECTION_ORDER: u32 = 0x1a2b_3c4d;
const ETHERNET: u32 = 1;

/// Why a capture file is not read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum PcapError {
    #[error("{0} bytes are no capture file: it begins with a magic number of 4 bytes")]
    Empty(usize),
    #[error("{0:#010x} is the magic number of neither pcap nor pcapng")]
    Magic(u32),
    #[error("link type {0}, and only 1, Ethernet, is replayed")]
    LinkType(u32),
    #[error("the file ends within {what} at byte {offset}")]
    Truncated { what: &'static str, offset: usize },
    #[error("{what} at byte {offset} contradicts itself")]
    Broken { what: &'static str, offset: usize },
    #[error("no frame in the file")]
    NoFrames,
}

/// Frames in one piece of memory.
#[derive(Debug, Default, Clone)]
pub struct Trace {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    /// Frames of which the capture holds only the beginning.
    pub cut: usize,
}

impl Trace {
    /// Adds a frame.
    pub fn push(&mut self, frame: &[u8]) {
        self.bytes.extend_from_slice(frame);
        self.ends.push(self.bytes.len());
    }

    /// Frames in the trace.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of all frames.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// A frame; empty beyond the last.
    #[inline]
    pub fn get(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(index).and_then(|end| self.bytes.get(start..*end)).unwrap_or_default()
    }

    /// The first `N` bytes of a frame that is not longer, with whatever follows it
    /// in memory, and its length.
    #[inline]
    pub fn head<const N: usize>(&self, index: usize) -> Option<(&[u8; N], usize)> {
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        let length = self.ends.get(index)? - start;
        self.bytes.get(start..)?.first_chunk().filter(|_| length <= N).map(|head| (head, length))
    }

    /// All frames in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.get(index))
    }
}

/// Reads the frames of a capture file.
///
/// # Errors
/// [`PcapError`].
pub fn read(file: &[u8]) -> Result<Trace, PcapError> {
    let magic = file.first_chunk::<4>().ok_or(PcapError::Empty(file.len()))?;
    let trace = match (u32::from_le_bytes(*magic), u32::from_be_bytes(*magic)) {
        (MICROSECONDS | NANOSECONDS, _) => classic(file, Order::Little),
        (_, MICROSECONDS | NANOSECONDS) => classic(file, Order::Big),
        (SECTION, _) => blocks(file),
        (_, other) => Err(PcapError::Magic(other)),
    }?;
    if trace.len() == 0 { Err(PcapError::NoFrames) } else { Ok(trace) }
}

/// Writes frames as a classic capture file, one microsecond apart.
///
/// # Errors
/// Those of the file system.
pub fn write<'a>(path: &Path, frames: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
    let mut file = io::BufWriter::new(std::fs::File::create(path)?);
    file.write_all(&MICROSECONDS.to_le_bytes())?;
    file.write_all(&[2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    file.write_all(&0x4_0000u32.to_le_bytes())?;
    file.write_all(&ETHERNET.to_le_bytes())?;
    for (microseconds, frame) in (0u32..).zip(frames) {
        let length = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        for word in [microseconds / 1_000_000, microseconds % 1_000_000, length, length] {
            file.write_all(&word.to_le_bytes())?;
        }
        file.write_all(frame)?;
    }
    file.flush()
}

/// The byte order of a file.
#[derive(Debug, Clone, Copy)]
enum Order {
    Little,
    Big,
}

impl Order {
    /// The number of 16 bits at `at`; zero beyond the end.
    fn half(self, bytes: &[u8], at: usize) -> u32 {
        let half = headers::read(bytes, at).unwrap_or_default();
        match self {
            Order::Little => u16::from_le_bytes(half),
            Order::Big => u16::from_be_bytes(half),
        }
        .into()
    }

    /// The number of 32 bits at `at`; zero beyond the end.
    fn word(self, bytes: &[u8], at: usize) -> u32 {
        let word = headers::read(bytes, at).unwrap_or_default();
        match self {
            Order::Little => u32::from_le_bytes(word),
            Order::Big => u32::from_be_bytes(word),
        }
    }
}

fn classic(file: &[u8], order: Order) -> Result<Trace, PcapError> {
    let Some((header, mut rest)) = file.split_first_chunk::<24>() else {
        return Err(PcapError::Truncated { what: "the file header", offset: 0 });
    };
    // The upper bits say how long the frame check sequence is.
    let link_type = order.word(header, 20) & 0x0fff_ffff;
    if link_type != ETHERNET {
        return Err(PcapError::LinkType(link_type));
    }
    let mut trace = Trace::default();
    while !rest.is_empty() {
        let offset = file.len() - rest.len();
        let Some((record, behind)) = rest.split_first_chunk::<16>() else {
            return Err(PcapError::Truncated { what: "a frame's header", offset });
        };
        let (captured, original) = (order.word(record, 8), order.word(record, 12));
        let Some((frame, behind)) = behind.split_at_checked(captured as usize) else {
            return Err(PcapError::Truncated { what: "a frame", offset });
        };
        trace.push(frame);
        trace.cut += usize::from(captured < original);
        rest = behind;
    }
    Ok(trace)
}

fn blocks(file: &[u8]) -> Result<Trace, PcapError> {
    const INTERFACE: u32 = 1;
    const PACKET: u32 = 2;
    const SIMPLE: u32 = 3;
    const ENHANCED: u32 = 6;
    let (mut trace, mut rest) = (Trace::default(), file);
    let mut order = Order::Little;
    // Length to which frames of the first interface are cut; 0 is no limit.
    let mut snap: Option<u32> = None;
    while !rest.is_empty() {
        let offset = file.len() - rest.len();
        let head = rest.first_chunk::<12>().ok_or(PcapError::Truncated { what: "a block's header", offset })?;
        let kind = order.word(head, 0);
        if kind == SECTION {
            order = match (Order::Little.word(head, 8), Order::Big.word(head, 8)) {
                (SECTION_ORDER, _) => Order::Little,
                (_, SECTION_ORDER) => Order::Big,
                _ => return Err(PcapError::Broken { what: "a section header", offset }),
            };
            snap = None;
        }
        let length = order.word(head, 4) as usize;
        if length < 12 || !length.is_multiple_of(4) {
            return Err(PcapError::Broken { what: "a block's length", offset });
        }
        let (block, behind) = rest.split_at_checked(length).ok_or(PcapError::Truncated { what: "a block", offset })?;
        rest = behind;
        let body = block.get(8..length - 4).unwrap_or_default();
        let broken = PcapError::Broken { what: "a block", offset };
        match kind {
            INTERFACE => {
                let fields = body.first_chunk::<8>().ok_or(broken)?;
                let link_type = order.half(fields, 0);
                if link_type != ETHERNET {
                    return Err(PcapError::LinkType(link_type));
                }
                snap.get_or_insert(order.word(fields, 4));
            }
            PACKET | ENHANCED => {
                let (fields, data) = body.split_first_chunk::<20>().ok_or(broken)?;
                let (captured, original) = (order.word(fields, 12), order.word(fields, 16));
                let frame = data.get(..captured as usize).ok_or(PcapError::Broken { what: "a packet block", offset })?;
                trace.push(frame);
                trace.cut += usize::from(captured < original);
            }
            SIMPLE => {
                let (fields, data) = body.split_first_chunk::<4>().ok_or(broken)?;
                let original = order.word(fields, 0);
                let captured = snap.filter(|snap| *snap > 0).map_or(original, |snap| original.min(snap));
                let frame = data.get(..captured as usize).ok_or(PcapError::Broken { what: "a simple packet block", offset })?;
                trace.push(frame);
                trace.cut += usize::from(captured < original);
            }
            // Statistics, names, comments.
            _ => {}
        }
    }
    Ok(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: [&[u8]; 3] = [b"first frame", b"", b"the third"];

    fn classic_file(order: fn(u32) -> [u8; 4], magic: u32, link_type: u32) -> Vec<u8> {
        let mut file = Vec::new();
        for number in [magic, 0x0004_0002, 0, 0, 65535, link_type] {
            file.extend(order(number));
        }
        for frame in FRAMES {
            let length = u32::try_from(frame.len()).unwrap();
            for number in [1, 2, length, length] {
                file.extend(order(number));
            }
            file.extend(frame);
        }
        file
    }

    fn block(order: fn(u32) -> [u8; 4], kind: u32, body: &[u8]) -> Vec<u8> {
        let padded = body.len().next_multiple_of(4);
        let length = u32::try_from(padded + 12).unwrap();
        let mut block = [order(kind), order(length)].concat();
        block.extend(body);
        block.resize(padded + 8, 0);
        block.extend(order(length));
        block
    }

    fn ng_file(order: fn(u32) -> [u8; 4], half: fn(u16) -> [u8; 2]) -> Vec<u8> {
        let section = [order(SECTION_ORDER).as_slice(), &half(1), &half(0), &[0xff; 8]].concat();
        let interface = [half(1).as_slice(), &[0, 0], &order(0)].concat();
        let mut file = block(order, SECTION, &section);
        file.extend(block(order, 1, &interface));
        file.extend(block(order, 5, b"statistics"));
        for frame in FRAMES {
            let length = order(u32::try_from(frame.len()).unwrap());
            file.extend(block(order, 6, &[order(0).as_slice(), &[0; 8], &length, &length, frame].concat()));
        }
        file.extend(block(order, 3, &[order(5).as_slice(), b"plain"].concat()));
        file
    }

    #[track_caller]
    fn check(trace: &Trace, expected: &[&[u8]]) {
        assert_eq!(trace.iter().collect::<Vec<_>>(), expected);
        assert_eq!(trace.bytes(), expected.iter().map(|frame| frame.len()).sum::<usize>());
    }

    #[test]
    fn classic_files_of_both_byte_orders_and_units_are_read() {
        for magic in [MICROSECONDS, NANOSECONDS] {
            check(&read(&classic_file(u32::to_le_bytes, magic, 1)).unwrap(), &FRAMES);
            check(&read(&classic_file(u32::to_be_bytes, magic, 1)).unwrap(), &FRAMES);
        }
    }

    #[test]
    fn pcapng_of_both_byte_orders_is_read() {
        let expected = [FRAMES[0], FRAMES[1], FRAMES[2], b"plain"];
        check(&read(&ng_file(u32::to_le_bytes, u16::to_le_bytes)).unwrap(), &expected);
        check(&read(&ng_file(u32::to_be_bytes, u16::to_be_bytes)).unwrap(), &expected);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pcap");
        write(&path, FRAMES.into_iter()).unwrap();
        check(&read(&std::fs::read(&path).unwrap()).unwrap(), &FRAMES);
    }

    #[test]
    fn frames_that_the_capture_cut_are_counted() {
        let mut file = classic_file(u32::to_le_bytes, MICROSECONDS, 1);
        file[24 + 12] += 1;
        assert_eq!(read(&file).unwrap().cut, 1);
    }

    #[test]
    fn other_links_and_other_files_are_refused_with_the_reason() {
        let file = classic_file(u32::to_le_bytes, MICROSECONDS, 113);
        assert!(matches!(read(&file), Err(PcapError::LinkType(113))));
        assert!(matches!(read(b"GIF89a, and so on, and so on"), Err(PcapError::Magic(_))));
        assert!(matches!(read(b""), Err(PcapError::Empty(0))));
        assert!(matches!(read(&classic_file(u32::to_le_bytes, MICROSECONDS, 1)[..24]), Err(PcapError::NoFrames)));
    }

    /// Every prefix either is a shorter file or says where it breaks.
    #[test]
    fn truncated_files_are_refused_at_every_byte() {
        let file = classic_file(u32::to_le_bytes, MICROSECONDS, 1);
        let whole: Vec<usize> = [24, 24 + 16 + 11, 24 + 32 + 11, file.len()].to_vec();
        for length in 0..file.len() {
            assert_eq!(read(&file[..length]).is_ok(), whole[1..].contains(&length), "{length} bytes");
        }
        let file = ng_file(u32::to_le_bytes, u16::to_le_bytes);
        for length in 0..file.len() {
            let _ = read(&file[..length]);
        }
        assert!(read(&file[..file.len() - 1]).is_err());
    }

    #[test]
    fn garbage_never_panics_and_lengths_beyond_the_file_are_refused() {
        let mut state = 1u32;
        for file in [classic_file(u32::to_be_bytes, NANOSECONDS, 1), ng_file(u32::to_be_bytes, u16::to_be_bytes)] {
            for _ in 0..5000 {
                let mut broken = file.clone();
                for _ in 0..3 {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = (state >> 8) as usize % broken.len();
                    broken[at] = state.to_be_bytes()[0];
                }
                let _ = read(&broken);
            }
        }
        let mut file = classic_file(u32::to_le_bytes, MICROSECONDS, 1);
        file[24 + 8..24 + 12].fill(0xff);
        assert!(matches!(read(&file), Err(PcapError::Truncated { what: "a frame", offset: 24 })));
    }
}
