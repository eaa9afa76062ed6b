//! The card's DHCP server, RFC 2131. Every port has one address, set by control,
//! so there is nothing to allocate and nothing to remember: DISCOVER is offered
//! it, REQUEST is granted it or refused another, INFORM is told the rest.
//!
//! ```text
//! 0    1      2     3      4     8      10      12       16       20       24       28       44
//! | op | type | len | hops | xid | secs | flags | ciaddr | yiaddr | siaddr | giaddr | chaddr | ...
//! ... sname 64, file 128 | 236: magic cookie | 240: options: code, length, value ... 255 |
//! ```
//!
//! The parser is our own and small: it runs on the worker, where bytes of a guest
//! must not be able to panic.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::counters::DropReason;
use crate::headers::{read, write};
use crate::packet::Packet;
use crate::policy::Port;
use crate::{Mac, datagram};

/// UDP port of the server.
pub const SERVER_PORT: u16 = 67;
/// UDP port of the client.
pub const CLIENT_PORT: u16 = 68;

const LEASE_S: u32 = 3600;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
const OPTIONS: usize = 240;
/// Some clients take no message below the size that BOOTP had.
const LENGTH_MIN: usize = 300;

/// Message types, option 53.
mod kind {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const INFORM: u8 = 8;
}

/// Options, RFC 2132.
mod option {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const HOSTNAME: u8 = 12;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const BROADCAST: u8 = 28;
    pub const NTP: u8 = 42;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const RENEWAL_TIME: u8 = 58;
    pub const REBINDING_TIME: u8 = 59;
    pub const END: u8 = 255;
}

/// What the server looks at in a message of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    kind: u8,
    xid: [u8; 4],
    broadcast: bool,
    ciaddr: Ipv4Addr,
    client: Mac,
    address: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

/// Answers `request`, a UDP payload from the guest of `port`, with a whole frame
/// written into `packet`.
///
/// # Errors
/// [`DropReason::DhcpIgnored`] for what is malformed, from another client, for
/// another server, or of a kind that has no answer.
pub fn answer(port: &Port, router_mac: Mac, request: &[u8], packet: &mut Packet) -> Result<(), DropReason> {
    let request = parse(request).ok_or(DropReason::DhcpIgnored)?;
    let kind = decide(port, &request).ok_or(DropReason::DhcpIgnored)?;
    // Section 4.1: to the client's address if it has one, else to the offered one,
    // or to all when the client says that it cannot take that yet, or is refused.
    let (mac, to) = if kind == kind::NAK || request.broadcast {
        (Mac::BROADCAST, Ipv4Addr::BROADCAST)
    } else if request.ciaddr.is_unspecified() {
        (port.config.mac, port.config.ipv4)
    } else {
        (port.config.mac, request.ciaddr)
    };
    let payload = reply(port, &request, kind);
    let ends = (SocketAddrV4::new(port.router, SERVER_PORT), SocketAddrV4::new(to, CLIENT_PORT));
    if datagram::frame(packet, (router_mac, mac), ends, &payload) { Ok(()) } else { Err(DropReason::TooLong) }
}

fn parse(bytes: &[u8]) -> Option<Request> {
    let [op, hardware, length] = read::<3>(bytes, 0)?;
    if (op, hardware, length) != (1, 1, 6) || read(bytes, OPTIONS - 4) != Some(COOKIE) {
        return None;
    }
    let mut request = Request {
        kind: 0,
        xid: read(bytes, 4)?,
        broadcast: read::<1>(bytes, 10)? >= [0x80],
        ciaddr: read::<4>(bytes, 12)?.into(),
        client: Mac(read(bytes, 28)?),
        address: None,
        server: None,
    };
    let mut rest = bytes.get(OPTIONS..)?;
    while let Some((code, after)) = rest.split_first() {
        match *code {
            option::PAD => rest = after,
            option::END => break,
            code => {
                let (length, after) = after.split_first()?;
                let (value, after) = after.split_at_checked(usize::from(*length))?;
                let address = || <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from);
                match code {
                    option::MESSAGE_TYPE => request.kind = *value.first()?,
                    option::REQUESTED_ADDRESS => request.address = Some(address()?),
                    option::SERVER => request.server = Some(address()?),
                    _ => {}
                }
                rest = after;
            }
        }
    }
    Some(request)
}

/// The message type of the answer, if there is one.
fn decide(port: &Port, request: &Request) -> Option<u8> {
    if request.client != port.config.mac || request.server.is_some_and(|server| server != port.router) {
        return None;
    }
    match request.kind {
        kind::DISCOVER => Some(kind::OFFER),
        kind::REQUEST if request.address.unwrap_or(request.ciaddr) == port.config.ipv4 => Some(kind::ACK),
        kind::REQUEST => Some(kind::NAK),
        kind::INFORM => Some(kind::ACK),
        _ => None,
    }
}

fn reply(port: &Port, request: &Request, kind: u8) -> Vec<u8> {
    let config = &port.config;
    let mut message = vec![0; OPTIONS];
    write(&mut message, 0, [2, 1, 6, 0]);
    write(&mut message, 4, request.xid);
    write(&mut message, 10, [if request.broadcast { 0x80 } else { 0 }]);
    write(&mut message, 28, config.mac.0);
    write(&mut message, OPTIONS - 4, COOKIE);
    put(&mut message, option::MESSAGE_TYPE, &[kind]);
    put(&mut message, option::SERVER, &port.router.octets());
    if kind != kind::NAK {
        write(&mut message, 12, request.ciaddr.octets());
        if request.kind != kind::INFORM {
            write(&mut message, 16, config.ipv4.octets());
            put(&mut message, option::LEASE_TIME, &LEASE_S.to_be_bytes());
            put(&mut message, option::RENEWAL_TIME, &(LEASE_S / 2).to_be_bytes());
            put(&mut message, option::REBINDING_TIME, &(LEASE_S / 8 * 7).to_be_bytes());
        }
        let broadcast = u32::from(config.subnet.nth(0)) | !u32::from(config.subnet.mask());
        put(&mut message, option::SUBNET_MASK, &config.subnet.mask().octets());
        put(&mut message, option::ROUTER, &port.router.octets());
        put(&mut message, option::BROADCAST, &broadcast.to_be_bytes());
        put(&mut message, option::MTU, &config.mtu.to_be_bytes());
        // 63 addresses fill the option; a resolver asks no more than three.
        let list = |addresses: &[Ipv4Addr]| addresses.iter().take(63).flat_map(Ipv4Addr::octets).collect::<Vec<u8>>();
        put(&mut message, option::DNS, &list(&config.dhcp.dns));
        put(&mut message, option::NTP, &list(&config.dhcp.ntp));
        put(&mut message, option::HOSTNAME, config.dhcp.hostname.as_bytes());
        put(&mut message, option::DOMAIN, config.dhcp.domain.as_bytes());
    }
    message.push(option::END);
    message.resize(message.len().max(LENGTH_MIN), option::PAD);
    message
}

/// Appends an option; an empty one, or one that its length cannot say, is left out.
fn put(message: &mut Vec<u8>, code: u8, value: &[u8]) {
    if let Ok(length @ 1..) = u8::try_from(value.len()) {
        message.extend([code, length]);
        message.extend(value);
    }
}
