//! Captures: copies of the frames that an operator asks to see.
//!
//! It knows frames, the places where they are seen, and filters; not files, and
//! not whoever reads. A frame is seen where it enters the card and where it leaves
//! it, whole and as it is on that wire, and once more where it dies, as it was
//! there and with the reason. So a ping from one guest to another card shows on
//! the guest's device and on the underlay, and one that its receiver refuses shows
//! on the underlay and in the receiver's place of drops.
//!
//! Bounds: at most [`CAPTURES_MAX`] captures; each has a queue of [`QUEUE`] frames,
//! and what finds it full is counted and not copied. Without a capture the packet
//! path asks one question for each burst.
//!
//! Frames that a device has no room for show as sent, and those that wait for ARP
//! in vain only as received: both counters have their own names.

pub mod filter;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::action::Dropped;
use crate::counters::DropReason;
use crate::headers::{self, ETHERNET, IPV4, UDP};
use crate::packet::Packet;
use crate::pipeline::Device;
use crate::{Mac, PortId, Underlay, Vni, vxlan};
use filter::{Filter, Layers};

/// Captures at once; more are refused.
pub const CAPTURES_MAX: usize = 16;
/// Frames that wait for the reader of one capture, each of its snap length at most.
pub const QUEUE: usize = 1024;

/// Where a frame is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// The device of a guest.
    Guest(PortId),
    /// The wire between cards.
    Underlay,
    /// The wire to the internet.
    Public,
    /// Where it died: at this port, or before it belonged to one.
    Drop(Option<PortId>),
}

/// Which way a frame went, seen from the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The card received it.
    In,
    /// The card sent it.
    Out,
    /// It ended here.
    None,
}

/// A frame that somebody wanted to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Since the data plane started.
    pub at: Duration,
    /// Where it was.
    pub point: Point,
    /// Which way it went.
    pub way: Way,
    /// Bytes that it had.
    pub length: usize,
    /// The first of them.
    pub bytes: Vec<u8>,
    /// Why it died.
    pub dropped: Option<DropReason>,
}

/// A port, as far as a capture of its traffic has to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// The port.
    pub port: PortId,
    /// Its network and address, by which its packets are known on the underlay.
    pub vni: Vni,
    /// Its private address.
    pub ipv4: Ipv4Addr,
    /// Its public address, by which they are known on the public wire.
    pub public: Option<Ipv4Addr>,
}

/// What to capture.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Which frames.
    pub filter: Filter,
    /// Only those of these ports, wherever they show; `None`: all of the card.
    pub subjects: Option<Vec<Subject>>,
    /// Bytes kept of each frame, at most.
    pub snap_length: usize,
    /// Ends after so many frames.
    pub count: Option<u64>,
    /// Ends at this time since the data plane started.
    pub until: Option<Duration>,
}

impl Request {
    fn wants(&self, point: Point, layers: &Layers) -> bool {
        let Some(subjects) = &self.subjects else { return true };
        let addresses = |layers: &Layers| layers.innermost().and_then(|headers| headers.addresses);
        subjects.iter().any(|subject| match point {
            Point::Guest(port) | Point::Drop(Some(port)) => port == subject.port,
            Point::Underlay | Point::Drop(None) => {
                layers.inner.is_some_and(|(vni, _)| vni == subject.vni)
                    && addresses(layers).is_some_and(|(from, to)| from == subject.ipv4 || to == subject.ipv4)
            }
            Point::Public => subject.public.is_some_and(|own| addresses(layers).is_some_and(|(from, to)| from == own || to == own)),
        })
    }
}

/// The captures of a worker.
#[derive(Debug)]
pub struct Taps {
    underlay: Underlay,
    taps: Vec<Tap>,
}

#[derive(Debug)]
struct Tap {
    id: u64,
    request: Request,
    left: u64,
    frames: Sender<Frame>,
    lost: Arc<AtomicU64>,
}

/// A capture as its reader holds it: ends of the queue and of the count.
#[derive(Debug)]
pub struct Tapped {
    /// The frames; closed when the capture has ended.
    pub frames: Receiver<Frame>,
    /// Frames that found the queue full.
    pub lost: Arc<AtomicU64>,
}

/// A request on its way to the worker.
#[derive(Debug)]
pub struct Begin {
    id: u64,
    request: Request,
    frames: Sender<Frame>,
    lost: Arc<AtomicU64>,
}

/// Makes both ends of a capture. `id` names it in [`Taps::end`].
#[must_use]
pub fn begin(id: u64, request: Request) -> (Begin, Tapped) {
    let (sender, frames) = bounded(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    (Begin { id, request, frames: sender, lost: Arc::clone(&lost) }, Tapped { frames, lost })
}

impl Taps {
    /// No capture yet.
    #[must_use]
    pub fn new(underlay: Underlay) -> Self {
        Self { underlay, taps: Vec::new() }
    }

    /// Whether there is any.
    #[must_use]
    #[inline]
    pub fn are_on(&self) -> bool {
        !self.taps.is_empty()
    }

    /// Begins a capture; one too many ends at once, with nothing captured.
    pub fn begin(&mut self, begin: Begin) {
        if self.taps.len() < CAPTURES_MAX {
            let left = begin.request.count.unwrap_or(u64::MAX);
            self.taps.push(Tap { id: begin.id, request: begin.request, left, frames: begin.frames, lost: begin.lost });
        }
    }

    /// Ends a capture.
    pub fn end(&mut self, id: u64) {
        self.taps.retain(|tap| tap.id != id);
    }

    /// Shows frames that a device gave or is about to take.
    pub fn see(&mut self, at: Duration, device: Device, way: Way, packets: &[Packet]) {
        let point = match device {
            Device::Port(id) => Point::Guest(id),
            Device::Underlay => Point::Underlay,
            Device::Public => Point::Public,
        };
        for packet in packets {
            self.show(at, point, way, packet, None);
        }
        self.expire(at);
    }

    /// Shows frames that died.
    pub fn see_dropped(&mut self, at: Duration, dropped: &[Dropped]) {
        for dropped in dropped {
            self.show(at, Point::Drop(dropped.port), Way::None, &dropped.packet, Some(dropped.reason));
        }
        self.expire(at);
    }

    fn show(&mut self, at: Duration, point: Point, way: Way, packet: &Packet, dropped: Option<DropReason>) {
        let bytes = packet.as_slice();
        // Device `udp` carries the other card's address beside the frame.
        let bare = matches!(point, Point::Underlay | Point::Drop(None)) && !self.underlay.encapsulated;
        let own = self.underlay.address;
        let addresses = packet.peer().filter(|_| bare).map(|peer| if way == Way::Out { (own, peer) } else { (peer, own) });
        let layers = addresses.map_or_else(|| Layers::of_frame(bytes), |addresses| Layers::of_vxlan(bytes, addresses));
        let layers = Layers { dropped, ..layers };
        for tap in &mut self.taps {
            if tap.left == 0 || !tap.request.wants(point, &layers) || !tap.request.filter.matches(&layers) {
                continue;
            }
            tap.left -= 1;
            if tap.frames.is_full() {
                tap.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let bytes = copy(bytes, addresses, tap.request.snap_length);
            match tap.frames.try_send(Frame { at, point, way, length: layers.length, bytes, dropped }) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => drop(tap.lost.fetch_add(1, Ordering::Relaxed)),
                Err(TrySendError::Disconnected(_)) => tap.left = 0,
            }
        }
    }

    /// Ends captures that have all that they wanted.
    fn expire(&mut self, at: Duration) {
        self.taps.retain(|tap| tap.left > 0 && tap.request.until.is_none_or(|until| at < until));
    }
}

/// The beginning of a frame. One without outer headers gets those that it would
/// have had, so that readers know what they look at.
fn copy(bytes: &[u8], outer: Option<(Ipv4Addr, Ipv4Addr)>, snap_length: usize) -> Vec<u8> {
    let mut copied = Vec::new();
    if let Some(addresses) = outer {
        copied.resize(ETHERNET + IPV4 + UDP, 0);
        headers::write_ethernet(&mut copied, Mac([0; 6]), Mac([0; 6]), headers::TYPE_IPV4);
        let length = bytes.len() + UDP;
        headers::write_ipv4(copied.get_mut(ETHERNET..).unwrap_or_default(), addresses, headers::UDP_PROTOCOL, (0, 0), length);
        let ports = ETHERNET + IPV4;
        headers::write(&mut copied, ports, vxlan::PORT.to_be_bytes());
        headers::write(&mut copied, ports + 2, vxlan::PORT.to_be_bytes());
        // A frame is far below 64 KiB, so the length always fits.
        headers::write(&mut copied, ports + 4, u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
        copied.truncate(snap_length);
    }
    let room = snap_length.saturating_sub(copied.len()).min(bytes.len());
    copied.extend_from_slice(bytes.get(..room).unwrap_or_default());
    copied
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 11);
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 12);
    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
    const PORT: PortId = PortId(7);

    fn taps(encapsulated: bool) -> Taps {
        Taps::new(Underlay { address: OWN, prefix_length: 24, mac: Mac([2; 6]), encapsulated })
    }

    /// A frame of some protocol from the guest to itself.
    fn frame(protocol: u8) -> Packet {
        let mut bytes = [0; ETHERNET + IPV4 + 8];
        headers::write_ethernet(&mut bytes, Mac([4; 6]), Mac([6; 6]), headers::TYPE_IPV4);
        headers::write_ipv4(&mut bytes[ETHERNET..], (GUEST, GUEST), protocol, (1, 0), 8);
        let mut packet = Packet::new();
        assert!(packet.copy_from(&bytes));
        packet
    }

    fn request(filter: &str) -> Request {
        Request { filter: Filter::parse(filter).unwrap(), snap_length: 65_535, ..Request::default() }
    }

    fn start(taps: &mut Taps, id: u64, request: Request) -> Tapped {
        let (begin, tapped) = begin(id, request);
        taps.begin(begin);
        tapped
    }

    #[test]
    fn several_captures_each_get_what_they_asked_for() {
        let mut taps = taps(true);
        assert!(!taps.are_on());
        let icmp = start(&mut taps, 1, request("icmp"));
        let all = start(&mut taps, 2, Request { snap_length: 20, ..request("") });
        let at = Duration::from_nanos(5);
        taps.see(at, Device::Port(PORT), Way::In, &[frame(headers::ICMP), frame(headers::TCP)]);
        let dropped = Dropped { port: Some(PORT), reason: DropReason::NoRoute, packet: frame(headers::ICMP) };
        taps.see_dropped(at, &[dropped]);
        let seen: Vec<_> = icmp.frames.try_iter().map(|frame| (frame.at, frame.point, frame.way, frame.dropped)).collect();
        let drop = (at, Point::Drop(Some(PORT)), Way::None, Some(DropReason::NoRoute));
        assert_eq!(seen, [(at, Point::Guest(PORT), Way::In, None), drop]);
        let cut: Vec<_> = all.frames.try_iter().map(|frame| (frame.bytes.len(), frame.length)).collect();
        assert_eq!(cut, [(20, 42); 3]);
        taps.end(1);
        taps.end(2);
        assert!(!taps.are_on());
    }

    #[test]
    fn a_capture_ends_by_count_by_time_and_with_its_reader() {
        let mut taps = taps(true);
        let counted = start(&mut taps, 1, Request { count: Some(1), ..request("") });
        let timed = start(&mut taps, 2, Request { until: Some(Duration::from_secs(1)), ..request("") });
        drop(start(&mut taps, 3, request("")));
        taps.see(Duration::ZERO, Device::Underlay, Way::In, &[frame(1), frame(1)]);
        assert_eq!(taps.taps.iter().map(|tap| tap.id).collect::<Vec<_>>(), [2]);
        taps.see(Duration::from_secs(1), Device::Underlay, Way::In, &[]);
        assert!(!taps.are_on());
        assert_eq!(counted.frames.iter().count(), 1);
        assert_eq!(timed.frames.iter().count(), 2);
    }

    #[test]
    fn a_slow_reader_costs_frames_and_they_are_counted() {
        let mut taps = taps(true);
        let tapped = start(&mut taps, 1, request(""));
        for _ in 0..QUEUE + 5 {
            taps.see(Duration::ZERO, Device::Public, Way::Out, &[frame(1)]);
        }
        assert_eq!(tapped.lost.load(Ordering::Relaxed), 5);
        assert_eq!(tapped.frames.len(), QUEUE);
    }

    #[test]
    fn one_capture_too_many_ends_at_once() {
        let mut taps = taps(true);
        let held: Vec<_> = (0..CAPTURES_MAX as u64).map(|id| start(&mut taps, id, request(""))).collect();
        let refused = start(&mut taps, 99, request(""));
        assert!(refused.frames.recv().is_err());
        assert_eq!(held.len(), taps.taps.len());
    }

    #[test]
    fn a_port_is_followed_to_the_underlay_and_into_the_drops() {
        let mut taps = taps(true);
        let subject = Subject { port: PORT, vni: Vni(9), ipv4: GUEST, public: None };
        let tapped = start(&mut taps, 1, Request { subjects: Some(vec![subject]), ..request("") });
        let tunnelled = |vni| {
            let mut packet = frame(headers::ICMP);
            assert!(vxlan::push_header(&mut packet, Vni(vni)));
            assert!(vxlan::push_outer(&mut packet, &taps_underlay(), PEER, 0));
            packet
        };
        taps.see(Duration::ZERO, Device::Underlay, Way::Out, &[tunnelled(9), tunnelled(8)]);
        taps.see(Duration::ZERO, Device::Port(PortId(8)), Way::In, &[frame(1)]);
        taps.see(Duration::ZERO, Device::Public, Way::In, &[frame(1)]);
        let drops = [Some(PORT), Some(PortId(8)), None].map(|port| Dropped { port, reason: DropReason::NoRoute, packet: frame(1) });
        taps.see_dropped(Duration::ZERO, &drops);
        let seen: Vec<_> = tapped.frames.try_iter().map(|frame| frame.point).collect();
        assert_eq!(seen, [Point::Underlay, Point::Drop(Some(PORT))]);
    }

    fn taps_underlay() -> Underlay {
        Underlay { address: OWN, prefix_length: 24, mac: Mac([2; 6]), encapsulated: true }
    }

    #[test]
    fn a_datagram_underlay_shows_the_headers_that_the_kernel_has() {
        let mut taps = taps(false);
        let tapped = start(&mut taps, 1, request("vni 9 and outer src host 10.255.0.12"));
        let mut packet = frame(headers::ICMP);
        assert!(vxlan::push_header(&mut packet, Vni(9)));
        packet.set_peer(PEER);
        taps.see(Duration::ZERO, Device::Underlay, Way::In, std::slice::from_ref(&packet));
        taps.see(Duration::ZERO, Device::Underlay, Way::Out, std::slice::from_ref(&packet));
        let frames: Vec<_> = tapped.frames.try_iter().collect();
        assert_eq!(frames.len(), 1);
        let layers = Layers::of_frame(&frames[0].bytes);
        assert_eq!(layers.inner.map(|(vni, _)| vni), Some(Vni(9)));
        assert_eq!(layers.outer.and_then(|outer| outer.addresses), Some((PEER, OWN)));
        assert_eq!((frames[0].bytes.len(), frames[0].length), (92, 92));
    }
}
