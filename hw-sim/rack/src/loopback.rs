//! The wires of a rack without root: UDP sockets on the loopback interface.
//!
//! ```text
//!   card 1  127.X.Y.11:4789 ┐                  near 127.0.0.1:a ═ far ┐
//!   card 2  127.X.Y.12:4789 ┼ underlay, VXLAN  near 127.0.0.1:b ═ far ┼ process `internet`
//!   ...                     ┘                  ...                    ┘   └ proxy 127.0.0.1:p
//! ```
//!
//! X and Y come from the region's name, or are the next ones that are free. Below
//! the packet path everything is as on a real wire; what is missing is the Linux
//! network around it: no namespace to run commands in, no capture of a wire.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::{Result, anyhow, bail};

use crate::wire;

/// VXLAN's port.
const VXLAN: u16 = 4789;
/// Networks that are tried.
const TRIES: u32 = 64;

/// Addresses and ports of one region.
pub struct Loopback {
    network: [u8; 2],
    /// Both ends of each card's cable.
    cables: Vec<(SocketAddr, SocketAddr)>,
    proxy: SocketAddr,
}

impl Loopback {
    /// Finds what is free for this many cards.
    pub fn lay(name: &str, cards: usize) -> Result<Self> {
        let hash = name.bytes().fold(0_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let networks = (0..TRIES).map(|offset| {
            let [_, _, high, low] = hash.wrapping_add(offset).to_be_bytes();
            // Not 127.0, where this machine's own services are.
            [high | 0x40, low]
        });
        let free = |network: &[u8; 2]| (0..cards).all(|card| UdpSocket::bind((underlay(*network, card), VXLAN)).is_ok());
        let network = networks.into_iter().find(free).ok_or_else(|| anyhow!("no free loopback network for the underlay"))?;
        // All are held until all are found, so that none is found twice.
        let mut held = Vec::new();
        for _ in 0..2 * cards {
            held.push(UdpSocket::bind("127.0.0.1:0")?);
        }
        let ports = held.iter().map(UdpSocket::local_addr).collect::<std::io::Result<Vec<_>>>()?;
        let (pairs, _) = ports.as_chunks::<2>();
        let proxy = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        Ok(Self { network, cables: pairs.iter().map(|[near, far]| (*near, *far)).collect(), proxy })
    }

    /// The settings of one card.
    pub fn card(&self, index: usize) -> Result<String> {
        let Some((near, far)) = self.cables.get(index) else { bail!("card {index} has no cable") };
        Ok(format!(
            "[underlay]\ndevice = \"udp\"\naddress = \"{address}\"\nprefix_length = 24\n\n\
             [public]\ndevice = \"cable\"\nnear = \"{near}\"\nfar = \"{far}\"\ngateway = \"{gateway}\"\nprefix_length = 24\n",
            address = underlay(self.network, index),
            gateway = wire::PUBLIC_GATEWAY,
        ))
    }

    /// The settings of the process `internet`.
    pub fn internet(&self) -> String {
        let mut text = format!(
            "listen = \"{}\"\ngateway = \"{}\"\nprefix_length = 24\nfar_host = \"{}\"\n",
            self.proxy,
            wire::PUBLIC_GATEWAY,
            wire::FAR_HOST
        );
        for (card, internet) in &self.cables {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n[[cable]]\nnear = \"{internet}\"\nfar = \"{card}\"\n");
        }
        text
    }

    /// Where the proxy to public addresses listens.
    pub fn proxy(&self) -> SocketAddr {
        self.proxy
    }
}

fn underlay([high, low]: [u8; 2], card: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, high, low, u8::try_from(card + 11).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_regions_of_one_name_do_not_meet() {
        let one = Loopback::lay("rack-1", 2).unwrap();
        let _running = UdpSocket::bind((underlay(one.network, 0), VXLAN)).unwrap();
        let two = Loopback::lay("rack-1", 2).unwrap();
        assert_ne!(one.network, two.network);
        assert!(one.card(1).unwrap().contains(&one.cables[1].0.to_string()));
        assert!(one.card(2).is_err());
        assert_eq!(one.internet().matches("[[cable]]").count(), 2);
    }
}
