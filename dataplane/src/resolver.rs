//! The name server of a VPC: one message in, one message out. RFC 1035, with the
//! OPT record of RFC 6891.
//!
//! ```text
//! 0    2                                            4    6    8    10   12
//! | id | QR | opcode | AA | TC | RD | RA | 0 | code | QD | AN | NS | AR | question | records ...
//! ```
//!
//! | name | answer |
//! |---|---|
//! | `ip-10-0-1-5.DOMAIN`, an address of the VPC | A |
//! | `5.1.0.10.in-addr.arpa`, the same | PTR |
//! | `ec2-198-51-100-16.PUBLIC_DOMAIN`, public to a port of the VPC | A: the private address |
//! | any of these, of another type | nothing, without error |
//! | below DOMAIN, or the reverse of an address of the VPC that nobody has | NXDOMAIN |
//! | anything else | REFUSED: there is no upstream |
//!
//! Names are compared without regard to case, and the question goes back as it
//! came (RFC 5452 section 9.3). A question's name has nothing before it to point
//! to, so a compression pointer there is an error; in other records a pointer ends a
//! name and is not followed. So every loop takes bytes of the message, and ends.

use std::net::Ipv4Addr;

use crate::headers::{read, write};
use crate::policy::Map;
use crate::{Mapping, Prefix, ResolverConfig};

/// Where guests find it beside the second address of the VPC.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
/// UDP port of DNS.
pub const PORT: u16 = 53;

const HEADER: usize = 12;
const TTL_S: u32 = 60;
/// Largest message over UDP, offered in the OPT record: what passes everywhere in one piece.
const PAYLOAD: u16 = 1232;

const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;
const CLASS_ANY: u16 = 255;

/// Response codes; the one above 15 has its upper bits in the OPT record.
mod code {
    pub const NO_ERROR: u16 = 0;
    pub const FORMAT: u16 = 1;
    pub const NAME: u16 = 3;
    pub const NOT_IMPLEMENTED: u16 = 4;
    pub const REFUSED: u16 = 5;
    pub const BAD_VERSION: u16 = 16;
}

/// The names of a VPC.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    domain: String,
    public_domain: Option<String>,
    private_of: Map<Ipv4Addr, Ipv4Addr>,
}

/// What a VPC knows of its addresses.
pub trait Addresses {
    /// Whether somebody has a private address.
    fn has(&self, address: Ipv4Addr) -> bool;
    /// The blocks of the VPC.
    fn prefixes(&self) -> &[Prefix];
}

/// What is known of a name.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Address(Ipv4Addr),
    Pointer(Ipv4Addr),
    /// It exists, and has no record.
    Empty,
    Absent,
    /// It is not ours to know.
    Foreign,
}

struct Question<'a> {
    labels: Vec<&'a [u8]>,
    kind: u16,
    class: u16,
    /// The question as it stands in the message.
    bytes: &'a [u8],
}

/// An OPT record of a query.
#[derive(Clone, Copy)]
struct Opt {
    version: u8,
    /// "DNSSEC OK", which goes back as it came. RFC 3225.
    dnssec: bool,
}

impl Resolver {
    /// The names that `config` and `mappings` make.
    #[must_use]
    pub fn new(config: &ResolverConfig, mappings: &[Mapping]) -> Self {
        Self {
            domain: config.domain.clone(),
            public_domain: config.public_domain.clone(),
            private_of: mappings.iter().filter_map(|mapping| Some((mapping.public?, mapping.ip))).collect(),
        }
    }

    /// The answer to a UDP payload; `None` for what has none, because it is no
    /// query or too short to say whose.
    #[must_use]
    pub fn answer(&self, query: &[u8], addresses: &impl Addresses) -> Option<Vec<u8>> {
        let [i0, i1, f0, _, q0, q1] = read::<6>(query, 0)?;
        if query.len() < HEADER || f0 & 0x80 != 0 {
            return None;
        }
        // What goes back of the flags: opcode and "recursion desired"; "recursion available" is set.
        let mut message = vec![i0, i1, 0x80 | f0 & 0x79, 0x80, 0, 0, 0, 0, 0, 0, 0, 0];
        if f0 & 0x78 != 0 {
            return Some(finish(message, code::NOT_IMPLEMENTED, None));
        }
        let parts = || {
            let question = question(query).filter(|_| [q0, q1] == [0, 1])?;
            let opt = opt(query, HEADER + question.bytes.len())?;
            Some((question, opt))
        };
        let Some((question, opt)) = parts() else {
            return Some(finish(message, code::FORMAT, None));
        };
        write(&mut message, 4, [0, 1]);
        message.extend(question.bytes);
        if opt.is_some_and(|opt| opt.version != 0) {
            return Some(finish(message, code::BAD_VERSION, opt));
        }
        let found = if matches!(question.class, CLASS_IN | CLASS_ANY) { self.find(&question.labels, addresses) } else { Found::Foreign };
        let code = match found {
            Found::Address(address) if question.kind == TYPE_A => {
                record(&mut message, TYPE_A, &address.octets());
                code::NO_ERROR
            }
            Found::Pointer(address) if question.kind == TYPE_PTR => {
                record(&mut message, TYPE_PTR, &encode(&format!("{}.{}", label(address), self.domain)));
                code::NO_ERROR
            }
            Found::Address(_) | Found::Pointer(_) | Found::Empty => code::NO_ERROR,
            Found::Absent => code::NAME,
            Found::Foreign => code::REFUSED,
        };
        Some(finish(message, code, opt))
    }

    fn find(&self, labels: &[&[u8]], addresses: &impl Addresses) -> Found {
        if let Some(below) = below(labels, "in-addr.arpa") {
            return match reverse(below) {
                Some(address) if addresses.has(address) => Found::Pointer(address),
                Some(address) if addresses.prefixes().iter().any(|prefix| prefix.contains(address)) => Found::Absent,
                _ => Found::Foreign,
            };
        }
        if let Some(below) = below(labels, &self.domain) {
            return match below {
                [] => Found::Empty,
                [host] => match dashed(host, b"ip-").filter(|address| addresses.has(*address)) {
                    Some(address) => Found::Address(address),
                    None => Found::Absent,
                },
                _ => Found::Absent,
            };
        }
        match self.public_domain.as_ref().and_then(|domain| below(labels, domain)) {
            Some([host]) => match dashed(host, b"ec2-").and_then(|public| self.private_of.get(&public)) {
                Some(private) => Found::Address(*private),
                None => Found::Foreign,
            },
            _ => Found::Foreign,
        }
    }
}

/// The first label of an address's name.
fn label(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("ip-{a}-{b}-{c}-{d}")
}

/// The labels before those of `domain`, if the name ends with them.
fn below<'a, 'b>(labels: &'a [&'b [u8]], domain: &str) -> Option<&'a [&'b [u8]]> {
    let count = domain.split('.').count();
    let (below, end) = labels.split_at_checked(labels.len().checked_sub(count)?)?;
    let same = end.iter().zip(domain.split('.')).all(|(label, expected)| label.eq_ignore_ascii_case(expected.as_bytes()));
    same.then_some(below)
}

/// The address that `ip-10-0-1-5` spells behind its prefix.
fn dashed(label: &[u8], prefix: &[u8]) -> Option<Ipv4Addr> {
    let (head, rest) = label.split_at_checked(prefix.len())?;
    if !head.eq_ignore_ascii_case(prefix) {
        return None;
    }
    octets(rest.split(|byte| *byte == b'-'))
}

/// The address whose reverse name the four labels before `in-addr.arpa` are.
fn reverse(labels: &[&[u8]]) -> Option<Ipv4Addr> {
    octets(labels.iter().rev().copied())
}

fn octets<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = parts;
    for octet in &mut octets {
        let text = std::str::from_utf8(parts.next()?).ok()?;
        // One name for one address: no sign, no leading zero.
        let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        *octet = text.parse().ok().filter(|_| plain)?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// The one question of a query.
fn question(query: &[u8]) -> Option<Question<'_>> {
    let mut rest = query.get(HEADER..)?;
    let mut labels = Vec::new();
    let mut length = 1;
    loop {
        let (size, after) = rest.split_first()?;
        if *size == 0 {
            rest = after;
            break;
        }
        // Above 63 it is a compression pointer, or of a kind that nobody defined.
        let (label, after) = after.split_at_checked(usize::from(*size)).filter(|_| *size < 64)?;
        length += 1 + label.len();
        if length > 255 {
            return None;
        }
        labels.push(label);
        rest = after;
    }
    let [t0, t1, c0, c1] = *rest.first_chunk::<4>()?;
    let bytes = query.get(HEADER..HEADER + length + 4)?;
    Some(Question { labels, kind: u16::from_be_bytes([t0, t1]), class: u16::from_be_bytes([c0, c1]), bytes })
}

/// The OPT record among the records that begin at `at`, `Some(None)` without one;
/// `None` where the message contradicts itself.
fn opt(query: &[u8], at: usize) -> Option<Option<Opt>> {
    let [a0, a1, n0, n1, r0, r1] = read::<6>(query, 6)?;
    let before = u32::from(u16::from_be_bytes([a0, a1])) + u32::from(u16::from_be_bytes([n0, n1]));
    let additional = u32::from(u16::from_be_bytes([r0, r1]));
    let mut rest = query.get(at..)?;
    let mut opt = None;
    for index in 0..before + additional {
        let (name, after) = skip_name(rest)?;
        let [t0, t1, _, _, _, version, flags, _, l0, l1] = *after.first_chunk::<10>()?;
        if u16::from_be_bytes([t0, t1]) == TYPE_OPT {
            let first = index >= before && name == 1 && opt.is_none();
            opt = Some(Opt { version, dnssec: flags & 0x80 != 0 }).filter(|_| first);
            opt?;
        }
        rest = after.get(10 + usize::from(u16::from_be_bytes([l0, l1]))..)?;
    }
    Some(opt)
}

/// Bytes of the name that `bytes` begin with, and what follows it.
fn skip_name(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut length = 0;
    loop {
        let size = *bytes.get(length)?;
        length += match size {
            0 => return Some((length + 1, bytes.get(length + 1..)?)),
            1..=63 => 1 + usize::from(size),
            0xc0.. => return Some((length + 2, bytes.get(length + 2..)?)),
            64..=0xbf => return None,
        };
    }
}

/// Appends the one answer, under the name of the question.
fn record(message: &mut Vec<u8>, kind: u16, data: &[u8]) {
    let question_name = 0xc000_u16 | 12;
    message.extend(question_name.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    message.extend(TTL_S.to_be_bytes());
    // An address or a name: at most 255 bytes.
    message.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    message.extend(data);
    write(message, 6, [0, 1]);
}

/// A name in labels; ours fit their bounds, which the configuration keeps.
fn encode(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(0));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// Puts the response code, and the OPT record if the query had one.
fn finish(mut message: Vec<u8>, code: u16, opt: Option<Opt>) -> Vec<u8> {
    let [low] = [code & 0xf].map(|bits| u8::try_from(bits).unwrap_or(0));
    write(&mut message, 3, [0x80 | low]);
    if let Some(opt) = opt {
        let high = u8::try_from(code >> 4).unwrap_or(0);
        let [k0, k1] = TYPE_OPT.to_be_bytes();
        let [p0, p1] = PAYLOAD.to_be_bytes();
        message.extend([0, k0, k1, p0, p1, high, 0, if opt.dnssec { 0x80 } else { 0 }, 0, 0, 0]);
        write(&mut message, 10, [0, 1]);
    }
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Vpc;

    impl Addresses for Vpc {
        fn has(&self, address: Ipv4Addr) -> bool {
            address == Ipv4Addr::new(10, 0, 1, 5)
        }

        fn prefixes(&self) -> &[Prefix] {
            const { &[Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16)] }
        }
    }

    fn resolver() -> Resolver {
        let config = ResolverConfig { domain: "ec2.internal".into(), public_domain: Some("compute-1.amazonaws.com".into()) };
        let mut mapping = Mapping::new(Ipv4Addr::new(10, 0, 1, 5), crate::Mac([2; 6]), Ipv4Addr::LOCALHOST);
        mapping.public = Some(Ipv4Addr::new(198, 51, 100, 16));
        Resolver::new(&config, &[mapping])
    }

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(encode(name));
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes
    }

    /// The response code, and the data of the answer if there is one.
    #[track_caller]
    fn ask(name: &str, kind: u16) -> (u8, Option<Vec<u8>>) {
        let query = query(name, kind);
        let answer = resolver().answer(&query, &Vpc).unwrap();
        assert_eq!(answer[..3], [0xab, 0xcd, 0x81], "id, response, recursion desired");
        assert_eq!(answer[3] & 0xf0, 0x80, "recursion available, and nothing authenticated");
        assert_eq!(answer[4..6], [0, 1]);
        assert_eq!(answer[12..query.len()], query[12..], "the question as it came");
        let record = &answer[query.len()..];
        let data = match answer[7] {
            0 => {
                assert!(record.is_empty());
                None
            }
            count => {
                assert_eq!((count, record[..2].to_vec()), (1, vec![0xc0, 12]));
                assert_eq!((&record[2..4], &record[4..6]), (&kind.to_be_bytes()[..], &[0, 1][..]));
                assert_eq!(usize::from(record[11]), record.len() - 12);
                Some(record[12..].to_vec())
            }
        };
        (answer[3] & 0xf, data)
    }

    const AAAA: u16 = 28;
    const ANY: u16 = 255;

    #[test]
    fn private_names_and_their_reverse_are_known() {
        assert_eq!(ask("ip-10-0-1-5.ec2.internal", TYPE_A), (0, Some(vec![10, 0, 1, 5])));
        assert_eq!(ask("IP-10-0-1-5.Ec2.INTERNAL", TYPE_A), (0, Some(vec![10, 0, 1, 5])));
        assert_eq!(ask("5.1.0.10.in-addr.arpa", TYPE_PTR), (0, Some(b"\x0bip-10-0-1-5\x03ec2\x08internal\0".to_vec())));
        assert_eq!(ask("ec2-198-51-100-16.compute-1.amazonaws.com", TYPE_A), (0, Some(vec![10, 0, 1, 5])));
    }

    #[test]
    fn a_known_name_has_no_record_of_another_type() {
        for kind in [AAAA, ANY, TYPE_PTR] {
            assert_eq!(ask("ip-10-0-1-5.ec2.internal", kind), (0, None));
        }
        assert_eq!(ask("5.1.0.10.in-addr.arpa", TYPE_A), (0, None));
        assert_eq!(ask("ec2.internal", TYPE_A), (0, None));
    }

    #[test]
    fn what_the_vpc_has_not_does_not_exist_and_the_rest_is_refused() {
        for name in [
            "ip-10-0-1-6.ec2.internal",
            "ip-10-0-1.ec2.internal",
            "ip-10-0-1-05.ec2.internal",
            "ip-10-0-1-5-6.ec2.internal",
            "ip-10-0-1-+5.ec2.internal",
            "www.ec2.internal",
            "a.ip-10-0-1-5.ec2.internal",
        ] {
            assert_eq!(ask(name, TYPE_A), (3, None), "{name}");
        }
        assert_eq!(ask("6.1.0.10.in-addr.arpa", TYPE_PTR), (3, None));
        for name in ["example.com", "internal", "ec2-198-51-100-17.compute-1.amazonaws.com", "amazonaws.com", "xec2.internal"] {
            assert_eq!(ask(name, TYPE_A), (5, None), "{name}");
        }
        assert_eq!(ask("5.1.0.11.in-addr.arpa", TYPE_PTR), (5, None));
        let mut chaos = query("ip-10-0-1-5.ec2.internal", TYPE_A);
        *chaos.last_mut().unwrap() = 3;
        assert_eq!(resolver().answer(&chaos, &Vpc).unwrap()[3], 0x85);
    }

    #[test]
    fn without_public_names_they_are_foreign() {
        let resolver = Resolver { public_domain: None, ..resolver() };
        let answer = resolver.answer(&query("ec2-198-51-100-16.compute-1.amazonaws.com", TYPE_A), &Vpc).unwrap();
        assert_eq!(answer[3], 0x85);
    }

    fn with_opt(version: u8, flags: u8) -> Vec<u8> {
        let mut bytes = query("ip-10-0-1-5.ec2.internal", TYPE_A);
        bytes[11] = 1;
        // With a cookie, RFC 7873, which is read over.
        bytes.extend([0, 0, 41, 0x10, 0, 0, version, flags, 0, 0, 12, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
        bytes
    }

    #[test]
    fn an_opt_record_is_answered_by_one() {
        let answer = resolver().answer(&with_opt(0, 0x80), &Vpc).unwrap();
        assert_eq!((answer[3], &answer[10..12]), (0x80, &[0, 1][..]));
        assert_eq!(answer[answer.len() - 11..], [0, 0, 41, 0x04, 0xd0, 0, 0, 0x80, 0, 0, 0]);
        let answer = resolver().answer(&with_opt(1, 0), &Vpc).unwrap();
        assert_eq!((answer[3], answer[7]), (0x80, 0), "the low bits of BADVERS, and no answer");
        assert_eq!(answer[answer.len() - 11..], [0, 0, 41, 0x04, 0xd0, 1, 0, 0, 0, 0, 0]);
        let mut two = with_opt(0, 0);
        two[11] = 2;
        two.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(resolver().answer(&two, &Vpc).unwrap()[3], 0x81);
    }

    #[test]
    fn pointers_are_refused_in_a_question_and_read_over_behind_it() {
        let mut looping = query("", TYPE_A);
        looping.splice(12..13, [0xc0, 12]);
        assert_eq!(resolver().answer(&looping, &Vpc).unwrap()[3], 0x81);
        // A record whose name points at the question, before the OPT record.
        let mut pointed = with_opt(0, 0);
        let end = query("ip-10-0-1-5.ec2.internal", TYPE_A).len();
        pointed.splice(end..end, [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4]);
        pointed[11] = 2;
        let answer = resolver().answer(&pointed, &Vpc).unwrap();
        assert_eq!((answer[3], answer[7], answer[11]), (0x80, 1, 1));
    }

    #[test]
    fn what_is_no_query_is_not_answered_and_a_bad_one_is_told_so() {
        let good = with_opt(0, 0);
        for length in 0..HEADER {
            assert_eq!(resolver().answer(&good[..length], &Vpc), None);
        }
        for length in HEADER..good.len() {
            let answer = resolver().answer(&good[..length], &Vpc).unwrap();
            assert_eq!(answer, [0xab, 0xcd, 0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0], "cut at {length}");
        }
        let mut response = good.clone();
        response[2] |= 0x80;
        assert_eq!(resolver().answer(&response, &Vpc), None, "or two servers would talk for ever");
        let mut update = good;
        update[2] = 5 << 3;
        assert_eq!(resolver().answer(&update, &Vpc).unwrap()[2..4], [0x80 | 5 << 3, 0x84]);
        let long = ["a"; 130].join(".");
        assert_eq!(resolver().answer(&query(&long, TYPE_A), &Vpc).unwrap()[3], 0x81, "a name of more than 255 bytes");
    }

    proptest! {
        #[test]
        fn any_message_is_taken(bytes: Vec<u8>) {
            let _ = resolver().answer(&bytes, &Vpc);
        }

        #[test]
        fn any_change_of_a_good_message_is_taken(changes in proptest::collection::vec((0usize..80, any::<u8>()), 1..8), cut in 12usize..80) {
            let mut bytes = with_opt(0, 0);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(cut);
            if let Some(answer) = resolver().answer(&bytes, &Vpc) {
                prop_assert!(answer.len() <= 512 && answer[2] & 0x80 != 0);
                prop_assert!(question(&answer).is_some() || answer[5] == 0);
                prop_assert!(opt(&answer, answer.len().min(HEADER)).is_some() || answer[5] == 1);
            }
        }
    }
}
