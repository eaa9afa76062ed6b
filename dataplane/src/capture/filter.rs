//! Which frames a capture wants: a subset of pcap-filter(7), and what a VPC adds.
//!
//! ```text
//! expression = factor { ("and" | "&&" | "or" | "||") factor }      left to right, as pcap-filter has it
//! factor     = ("not" | "!") factor | "(" expression ")" | primitive
//! primitive  = ["outer"] test
//! test       = "ip" | "arp" | "icmp" | "tcp" | "udp" | "proto" NUMBER
//!            | [protocol] [way] "host" ADDRESS | [protocol] [way] "net" PREFIX
//!            | [protocol] [way] "port" NUMBER | [protocol] [way] "portrange" FIRST-LAST
//!            | "ether" [way] "host" MAC | "less" BYTES | "greater" BYTES
//!            | "vxlan" | "vni" NUMBER | "dropped" [REASON]
//! way        = "src" | "dst" | "src or dst"
//! ```
//!
//! Addresses, ports and protocols are those of the innermost packet: of a VXLAN
//! frame what it carries, so that one expression finds a packet on both sides of
//! the card. After `outer` they are those of the frame itself. No expression at all
//! matches everything.
//!
//! An expression becomes a program of tests, each with the place to go to when it
//! holds and when it does not, as BPF has it. Places only lead backwards in the
//! program (it is written from its end), so every run ends.

use std::net::Ipv4Addr;

use crate::counters::DropReason;
use crate::headers::{self, ETHERNET, Ethernet};
use crate::{Mac, Prefix, Vni, arp, vxlan};

/// Longest expression taken, in bytes.
pub const EXPRESSION_MAX: usize = 4096;
/// Parentheses and negations within each other.
const DEPTH_MAX: usize = 64;

/// Why an expression is not a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum FilterError {
    /// There is no such word here.
    #[error("{found:?} at byte {at}, where {wanted} was expected")]
    Unexpected { at: usize, found: String, wanted: &'static str },
    /// The expression stops too early.
    #[error("the filter ends where {wanted} was expected")]
    Ends { wanted: &'static str },
    /// Longer than [`EXPRESSION_MAX`], or nested too deeply.
    #[error("the filter is too long or nested too deeply")]
    TooComplex,
}

/// A compiled expression.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    program: Vec<Instruction>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    test: Test,
    holds: Place,
    fails: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Accept,
    Reject,
    /// An instruction that stands before this one.
    At(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Test {
    outer: bool,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Ethertype(u16),
    Protocol(u8),
    Net(Way, Prefix),
    Ports(Way, u16, u16),
    Ether(Way, Mac),
    Less(usize),
    Greater(usize),
    Vxlan,
    Vni(Vni),
    Dropped(Option<DropReason>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Source,
    Destination,
    Either,
}

impl Way {
    fn any<T>(self, (source, destination): (T, T), test: impl Fn(T) -> bool) -> bool {
        match self {
            Way::Source => test(source),
            Way::Destination => test(destination),
            Way::Either => test(source) || test(destination),
        }
    }
}

/// What a frame says of itself, read once for all filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    /// Bytes of the frame.
    pub length: usize,
    /// The frame itself.
    pub outer: Option<Headers>,
    /// The network and the frame that it carries, if it is VXLAN.
    pub inner: Option<(Vni, Option<Headers>)>,
    /// Why the frame died, if it did.
    pub dropped: Option<DropReason>,
}

/// Headers of one frame, as far as they can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers {
    /// Ethernet.
    pub ethernet: Ethernet,
    /// Source and destination of IPv4, or of an ARP message.
    pub addresses: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Of IPv4.
    pub protocol: Option<u8>,
    /// Of TCP and UDP, in all but later fragments.
    pub ports: Option<(u16, u16)>,
}

impl Headers {
    /// Reads a frame; what is cut off or makes no sense is `None`.
    #[must_use]
    pub fn of(frame: &[u8]) -> Option<Self> {
        Self::with_payload(frame).map(|(headers, _)| headers)
    }

    /// The headers, and where the payload of the transport begins.
    fn with_payload(frame: &[u8]) -> Option<(Self, &[u8])> {
        let (ethernet, payload) = headers::ethernet(frame).ok()?;
        let mut read = Self { ethernet, addresses: None, protocol: None, ports: None };
        let mut rest: &[u8] = &[];
        match ethernet.ethertype {
            headers::TYPE_IPV4 => {
                // As for a quoted packet: a wrong checksum is what one may be looking for.
                if let Ok(ip) = headers::ipv4_quoted(payload) {
                    read.addresses = Some((ip.source, ip.destination));
                    read.protocol = Some(ip.protocol);
                    let segment = payload.get(ip.header_len..).unwrap_or_default();
                    if ip.fragment_offset == 0
                        && matches!(ip.protocol, headers::TCP | headers::UDP_PROTOCOL)
                        && let Ok(transport) = headers::transport_quoted(&ip, segment)
                    {
                        read.ports = Some((transport.source_port, transport.destination_port));
                        rest = segment.get(headers::UDP..).unwrap_or_default();
                    }
                }
            }
            headers::TYPE_ARP => {
                read.addresses = arp::parse(payload).ok().map(|message| (message.sender.1, message.target.1));
            }
            _ => {}
        }
        Some((read, rest))
    }
}

impl Layers {
    /// Reads a frame.
    #[must_use]
    pub fn of_frame(frame: &[u8]) -> Self {
        let read = Headers::with_payload(frame);
        let inner = read.and_then(|(headers, payload)| {
            let tunnel = headers.protocol == Some(headers::UDP_PROTOCOL) && headers.ports.is_some_and(|(_, to)| to == vxlan::PORT);
            vxlan::decap(payload).ok().filter(|_| tunnel)
        });
        Self {
            length: frame.len(),
            outer: read.map(|(headers, _)| headers),
            inner: inner.map(|(vni, frame)| (vni, Headers::of(frame))),
            dropped: None,
        }
    }

    /// Reads a VXLAN payload between two cards, whose own headers were
    /// [`ETHERNET`], IPv4 and UDP and are not there.
    #[must_use]
    pub fn of_vxlan(payload: &[u8], addresses: (Ipv4Addr, Ipv4Addr)) -> Self {
        let outer = Headers {
            ethernet: Ethernet { destination: Mac([0; 6]), source: Mac([0; 6]), ethertype: headers::TYPE_IPV4 },
            addresses: Some(addresses),
            protocol: Some(headers::UDP_PROTOCOL),
            ports: Some((vxlan::PORT, vxlan::PORT)),
        };
        Self {
            length: payload.len() + ETHERNET + headers::IPV4 + headers::UDP,
            outer: Some(outer),
            inner: vxlan::decap(payload).ok().map(|(vni, frame)| (vni, Headers::of(frame))),
            dropped: None,
        }
    }

    /// The headers that a guest sees.
    #[must_use]
    pub fn innermost(&self) -> Option<&Headers> {
        match &self.inner {
            Some((_, headers)) => headers.as_ref(),
            None => self.outer.as_ref(),
        }
    }
}

impl Test {
    fn holds(&self, layers: &Layers) -> bool {
        let headers = if self.outer { layers.outer.as_ref() } else { layers.innermost() };
        let of = |test: &dyn Fn(&Headers) -> bool| headers.is_some_and(test);
        match self.what {
            What::Ethertype(ethertype) => of(&|headers| headers.ethernet.ethertype == ethertype),
            What::Protocol(protocol) => of(&|headers| headers.protocol == Some(protocol)),
            What::Net(way, prefix) => {
                of(&|headers| headers.addresses.is_some_and(|pair| way.any(pair, |address| prefix.contains(address))))
            }
            What::Ports(way, first, last) => {
                of(&|headers| headers.ports.is_some_and(|pair| way.any(pair, |port| (first..=last).contains(&port))))
            }
            What::Ether(way, mac) => {
                of(&|headers| way.any((headers.ethernet.source, headers.ethernet.destination), |address| address == mac))
            }
            What::Less(length) => layers.length <= length,
            What::Greater(length) => layers.length >= length,
            What::Vxlan => layers.inner.is_some(),
            What::Vni(vni) => layers.inner.is_some_and(|(found, _)| found == vni),
            What::Dropped(None) => layers.dropped.is_some(),
            What::Dropped(reason) => layers.dropped == reason,
        }
    }
}

impl Filter {
    /// Compiles an expression.
    ///
    /// # Errors
    /// [`FilterError`] says where it stops making sense.
    pub fn parse(expression: &str) -> Result<Self, FilterError> {
        if expression.len() > EXPRESSION_MAX {
            return Err(FilterError::TooComplex);
        }
        let mut parser = Parser { words: words(expression), next: 0, depth: 0 };
        if parser.words.is_empty() {
            return Ok(Self::default());
        }
        let tree = parser.expression()?;
        if let Some((at, word)) = parser.words.get(parser.next) {
            return Err(FilterError::Unexpected { at: *at, found: (*word).to_owned(), wanted: "\"and\", \"or\" or the end" });
        }
        let mut program = Vec::new();
        compile(&mut program, &tree, Place::Accept, Place::Reject);
        Ok(Self { program })
    }

    /// Whether a frame is wanted.
    #[must_use]
    pub fn matches(&self, layers: &Layers) -> bool {
        let mut current = self.program.last();
        while let Some(instruction) = current {
            match if instruction.test.holds(layers) { instruction.holds } else { instruction.fails } {
                Place::Accept => return true,
                Place::Reject => return false,
                Place::At(place) => current = self.program.get(place),
            }
        }
        true
    }
}

enum Tree {
    Test(Test),
    Not(Box<Tree>),
    And(Box<Tree>, Box<Tree>),
    Or(Box<Tree>, Box<Tree>),
}

/// Writes `tree` behind what it leads to, and returns where it begins.
fn compile(program: &mut Vec<Instruction>, tree: &Tree, holds: Place, fails: Place) -> Place {
    match tree {
        Tree::Test(test) => {
            program.push(Instruction { test: *test, holds, fails });
            Place::At(program.len() - 1)
        }
        Tree::Not(inner) => compile(program, inner, fails, holds),
        Tree::And(left, right) => {
            let right = compile(program, right, holds, fails);
            compile(program, left, right, fails)
        }
        Tree::Or(left, right) => {
            let right = compile(program, right, holds, fails);
            compile(program, left, holds, right)
        }
    }
}

/// The words of an expression, with where each begins.
fn words(expression: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    let mut start = None;
    let mut rest = expression.char_indices().peekable();
    while let Some((at, character)) = rest.next() {
        let doubled = matches!(character, '&' | '|') && rest.peek().is_some_and(|(_, next)| *next == character);
        let alone = doubled || matches!(character, '(' | ')' | '!');
        if (alone || character.is_whitespace())
            && let Some(start) = start.take()
        {
            words.extend(expression.get(start..at).map(|word| (start, word)));
        }
        if alone {
            let end = at + if doubled { 2 } else { 1 };
            words.extend(expression.get(at..end).map(|word| (at, word)));
            if doubled {
                rest.next();
            }
        } else if !character.is_whitespace() && start.is_none() {
            start = Some(at);
        }
    }
    words.extend(start.and_then(|start| expression.get(start..).map(|word| (start, word))));
    words
}

struct Parser<'a> {
    words: Vec<(usize, &'a str)>,
    next: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.next).map(|(_, word)| *word)
    }

    /// Takes the next word if it is one of these.
    fn take(&mut self, wanted: &[&str]) -> bool {
        let found = self.peek().is_some_and(|word| wanted.contains(&word));
        self.next += usize::from(found);
        found
    }

    /// Takes the next word as `parse` reads it.
    fn value<T>(&mut self, wanted: &'static str, parse: impl Fn(&str) -> Option<T>) -> Result<T, FilterError> {
        let word = self.peek().ok_or(FilterError::Ends { wanted })?;
        let value = parse(word).ok_or_else(|| self.unexpected(wanted))?;
        self.next += 1;
        Ok(value)
    }

    fn unexpected(&self, wanted: &'static str) -> FilterError {
        match self.words.get(self.next) {
            Some((at, word)) => FilterError::Unexpected { at: *at, found: (*word).to_owned(), wanted },
            None => FilterError::Ends { wanted },
        }
    }

    fn expression(&mut self) -> Result<Tree, FilterError> {
        let mut tree = self.factor()?;
        // A chain leans to the left, and compiling it descends once for each link.
        for _ in 0..DEPTH_MAX {
            if self.take(&["and", "&&"]) {
                tree = Tree::And(Box::new(tree), Box::new(self.factor()?));
            } else if self.take(&["or", "||"]) {
                tree = Tree::Or(Box::new(tree), Box::new(self.factor()?));
            } else {
                return Ok(tree);
            }
        }
        Err(FilterError::TooComplex)
    }

    fn factor(&mut self) -> Result<Tree, FilterError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(FilterError::TooComplex);
        }
        let tree = if self.take(&["not", "!"]) {
            Tree::Not(Box::new(self.factor()?))
        } else if self.take(&["("]) {
            let tree = self.expression()?;
            self.value("\")\"", |word| (word == ")").then_some(()))?;
            tree
        } else {
            self.primitive()?
        };
        self.depth -= 1;
        Ok(tree)
    }

    fn primitive(&mut self) -> Result<Tree, FilterError> {
        let outer = self.take(&["outer"]);
        let test = |what| Tree::Test(Test { outer, what });
        let protocol = match self.peek() {
            Some("ip") => Some(What::Ethertype(headers::TYPE_IPV4)),
            Some("arp") => Some(What::Ethertype(headers::TYPE_ARP)),
            Some("icmp") => Some(What::Protocol(headers::ICMP)),
            Some("tcp") => Some(What::Protocol(headers::TCP)),
            Some("udp") => Some(What::Protocol(headers::UDP_PROTOCOL)),
            _ => None,
        };
        if let Some(protocol) = protocol {
            self.next += 1;
            return Ok(match self.end()? {
                Some(end) => Tree::And(Box::new(test(protocol)), Box::new(test(end))),
                None => test(protocol),
            });
        }
        if let Some(end) = self.end()? {
            return Ok(test(end));
        }
        let what = if self.take(&["proto"]) {
            What::Protocol(self.value("a protocol number", |word| word.parse().ok())?)
        } else if self.take(&["ether"]) {
            let way = self.way();
            self.value("\"host\"", |word| (word == "host").then_some(()))?;
            What::Ether(way.unwrap_or(Way::Either), self.value("a MAC address", mac)?)
        } else if self.take(&["less"]) {
            What::Less(self.value("a number of bytes", |word| word.parse().ok())?)
        } else if self.take(&["greater"]) {
            What::Greater(self.value("a number of bytes", |word| word.parse().ok())?)
        } else if self.take(&["vxlan"]) {
            What::Vxlan
        } else if self.take(&["vni"]) {
            What::Vni(Vni(self.value("a VNI", |word| word.parse().ok().filter(|vni| *vni <= 0xff_ffff))?))
        } else if self.take(&["dropped"]) {
            let reason = self.peek().and_then(|word| DropReason::ALL.iter().copied().find(|reason| reason.name() == word));
            self.next += usize::from(reason.is_some());
            What::Dropped(reason)
        } else {
            return Err(self.unexpected("a protocol, host, net, port, vni or another test"));
        };
        Ok(test(what))
    }

    /// `[way] host|net|port|portrange VALUE`, if that comes next.
    fn end(&mut self) -> Result<Option<What>, FilterError> {
        let way = self.way();
        let side = way.unwrap_or(Way::Either);
        let what = if self.take(&["host"]) {
            What::Net(side, Prefix::new(self.value("an IPv4 address", |word| word.parse().ok())?, 32))
        } else if self.take(&["net"]) {
            What::Net(side, self.value("a prefix such as 10.0.0.0/8", prefix)?)
        } else if self.take(&["port"]) {
            let port = self.value("a port", |word| word.parse().ok())?;
            What::Ports(side, port, port)
        } else if self.take(&["portrange"]) {
            let (first, last) = self.value("a range such as 8000-8999", |word| {
                let (first, last) = word.split_once('-')?;
                Some((first.parse().ok()?, last.parse().ok()?)).filter(|(first, last)| first <= last)
            })?;
            What::Ports(side, first, last)
        } else if way.is_some() {
            return Err(self.unexpected("host, net, port or portrange"));
        } else {
            return Ok(None);
        };
        Ok(Some(what))
    }

    fn way(&mut self) -> Option<Way> {
        let first = if self.take(&["src"]) {
            Way::Source
        } else if self.take(&["dst"]) {
            Way::Destination
        } else {
            return None;
        };
        let rest = self.words.get(self.next..).unwrap_or_default();
        if let [(_, "or"), (_, "src" | "dst"), ..] = rest {
            self.next += 2;
            return Some(Way::Either);
        }
        Some(first)
    }
}

fn prefix(word: &str) -> Option<Prefix> {
    let (address, length) = word.split_once('/').unwrap_or((word, "32"));
    let length = length.parse().ok().filter(|length| *length <= 32)?;
    Some(Prefix::new(address.parse().ok()?, length))
}

fn mac(word: &str) -> Option<Mac> {
    let mut bytes = [0; 6];
    let mut parts = word.split(':');
    for byte in &mut bytes {
        *byte = parts.next().filter(|part| part.len() <= 2).and_then(|part| u8::from_str_radix(part, 16).ok())?;
    }
    parts.next().is_none().then_some(Mac(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::Packet;
    use crate::{Underlay, headers::write};

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 6);
    const CARD: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 11);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 12);

    /// A TCP segment from A:4000 to B:80.
    fn segment() -> Packet {
        let mut frame = [0; ETHERNET + headers::IPV4 + 20];
        headers::write_ethernet(&mut frame, Mac([2; 6]), Mac([4; 6]), headers::TYPE_IPV4);
        headers::write_ipv4(&mut frame[ETHERNET..], (A, B), headers::TCP, (1, 0), 20);
        write(
            &mut frame,
            ETHERNET + headers::IPV4,
            [4000_u16.to_be_bytes(), 80_u16.to_be_bytes()].concat().try_into().map(|b: [u8; 4]| b).unwrap(),
        );
        let mut packet = Packet::new();
        assert!(packet.copy_from(&frame));
        packet
    }

    fn tunnelled() -> Packet {
        let mut packet = segment();
        let underlay = Underlay { address: CARD, prefix_length: 24, mac: Mac([6; 6]), encapsulated: true };
        assert!(vxlan::push_header(&mut packet, Vni(77)));
        assert!(vxlan::push_outer(&mut packet, &underlay, OTHER, 1 << 40));
        packet
    }

    fn matches(expression: &str, layers: &Layers) -> bool {
        Filter::parse(expression).unwrap_or_else(|error| panic!("{expression}: {error}")).matches(layers)
    }

    #[test]
    fn expressions_match_what_they_name() {
        let plain = Layers::of_frame(segment().as_slice());
        for (expression, expected) in [
            ("", true),
            ("tcp", true),
            ("udp", false),
            ("ip", true),
            ("arp", false),
            ("proto 6", true),
            ("tcp and port 80 and host 10.0.1.5", true),
            ("tcp and port 81 or host 10.0.1.5", true),
            // Equal precedence, to the left: (udp or tcp) and port 81.
            ("udp or tcp and port 81", false),
            ("udp or (tcp and port 80)", true),
            ("tcp port 80", true),
            ("udp port 80", false),
            ("tcp src port 80", false),
            ("tcp dst port 80", true),
            ("src or dst port 4000", true),
            ("portrange 79-81", true),
            ("src host 10.0.2.6", false),
            ("dst host 10.0.2.6", true),
            ("net 10.0.0.0/16", true),
            ("src net 10.0.2.0/24", false),
            ("not tcp", false),
            ("!!tcp", true),
            ("!(udp||icmp)&&tcp", true),
            ("ether host 04:04:04:04:04:04", true),
            ("ether dst host 04:04:04:04:04:04", false),
            ("less 54", true),
            ("greater 55", false),
            ("vxlan", false),
            ("vni 77", false),
            ("dropped", false),
        ] {
            assert_eq!(matches(expression, &plain), expected, "{expression}");
        }
    }

    #[test]
    fn the_inner_packet_of_a_tunnel_is_what_counts() {
        let packet = tunnelled();
        let framed = Layers::of_frame(packet.as_slice());
        let bare = Layers::of_vxlan(&packet.as_slice()[42..], (CARD, OTHER));
        assert_eq!((framed.length, framed.inner), (bare.length, bare.inner));
        for layers in [framed, bare] {
            for (expression, expected) in [
                ("tcp port 80 and host 10.0.1.5", true),
                ("udp", false),
                ("outer udp", true),
                ("outer tcp", false),
                ("host 10.255.0.11", false),
                ("outer src host 10.255.0.11 and outer dst host 10.255.0.12", true),
                ("outer udp port 4789", true),
                ("vxlan and vni 77", true),
                ("vni 78", false),
            ] {
                assert_eq!(matches(expression, &layers), expected, "{expression}");
            }
        }
    }

    #[test]
    fn a_drop_is_found_by_its_reason() {
        let layers = Layers { dropped: Some(DropReason::DeniedIngress), ..Layers::of_frame(segment().as_slice()) };
        assert!(matches("dropped", &layers) && matches("dropped denied_ingress and tcp", &layers));
        assert!(!matches("dropped no_route", &layers));
    }

    #[test]
    fn nonsense_is_refused_where_it_stands() {
        let at = |expression: &str| match Filter::parse(expression).unwrap_err() {
            FilterError::Unexpected { at, .. } => Some(at),
            FilterError::Ends { .. } | FilterError::TooComplex => None,
        };
        assert_eq!(at("tcp and prt 80"), Some(8));
        assert_eq!(at("tcp tcp"), Some(4));
        assert_eq!(at("port 65536"), Some(5));
        assert_eq!(at("host 10.0.0"), Some(5));
        assert_eq!(at("net 10.0.0.0/33"), Some(4));
        assert_eq!(at("vni 16777216"), Some(4));
        assert_eq!(at("(tcp"), None);
        assert_eq!(at("tcp and"), None);
        assert_eq!(at("src"), None);
        assert_eq!(at(&"(".repeat(EXPRESSION_MAX)), None);
        assert_eq!(at(&"!".repeat(EXPRESSION_MAX)), None);
        assert_eq!(Filter::parse(&format!("tcp{}", " or tcp".repeat(500))), Err(FilterError::TooComplex));
        assert_eq!(Filter::parse(&" ".repeat(EXPRESSION_MAX + 1)), Err(FilterError::TooComplex));
    }

    /// What a connective makes of the truth of its two sides.
    type Meaning = fn(bool, bool) -> bool;

    fn expression() -> impl Strategy<Value = (&'static str, Meaning)> {
        let join: [(&str, Meaning); 4] = [
            ("{a} and {b}", |a, b| a && b),
            ("{a} or {b}", |a, b| a || b),
            ("not ({a} and {b})", |a, b| !(a && b)),
            ("! {a} || {b}", |a, b| !a || b),
        ];
        prop::sample::select(join.to_vec())
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text: String, frame: Vec<u8>) {
            if let Ok(filter) = Filter::parse(&text) {
                let _ = filter.matches(&Layers::of_frame(&frame));
            }
        }

        #[test]
        fn any_words_are_parsed_or_refused(words in prop::collection::vec(prop::sample::select(vec![
            "tcp", "udp", "icmp", "ip", "arp", "host", "net", "port", "portrange", "src", "dst", "or", "and", "not", "!", "(", ")",
            "10.0.1.5", "10.0.0.0/8", "80", "1-2", "vni", "vxlan", "outer", "dropped", "denied_ingress", "ether", "02:00:00:00:00:01",
        ]), 0..40), frame: Vec<u8>) {
            if let Ok(filter) = Filter::parse(&words.join(" ")) {
                let _ = filter.matches(&Layers::of_frame(&frame));
                let _ = filter.matches(&Layers::of_vxlan(&frame, (A, B)));
            }
        }

        #[test]
        fn compiled_connectives_mean_what_they_say((text, meaning) in expression(), a: bool, b: bool) {
            let layers = Layers::of_frame(segment().as_slice());
            let word = |value| if value { "tcp" } else { "udp" };
            let text = text.replace("{a}", word(a)).replace("{b}", word(b));
            prop_assert_eq!(Filter::parse(&text).unwrap().matches(&layers), meaning(a, b), "{}", text);
        }
    }
}
