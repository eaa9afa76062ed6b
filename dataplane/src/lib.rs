//! The VPC packet path of a card: security groups, routes, VXLAN, address
//! translation, NAT gateways, and the ARP, DHCP, ping and DNS that guests expect of
//! a network. The name server knows the names of its VPC and has no upstream: it
//! refuses all others.
//!
//! [`Dataplane`] runs it in a thread of its own over any devices that implement
//! [`io::PacketIo`]; [`pipeline`] is all of it without threads, clocks or devices.
//! The path of a packet stands at the head of [`worker`].
//!
//! Invariants:
//! - Nothing passes a port but what a rule of it allows, or what belongs to a
//!   connection that a rule allowed; nothing crosses the border of a subnet against
//!   its network ACL, whatever was allowed before.
//! - A packet from another card counts only if the network, or one that it is peered
//!   with, maps its inner source to that card, or a route of the receiver leads
//!   there. There is no learning and no flooding.
//! - No bytes from a guest or a wire panic, and no queue or table is unbounded.
//! - In steady state the path of a packet allocates nothing.

pub mod acl;
pub mod action;
pub mod anti_spoof;
pub mod arp;
mod config;
pub mod counters;
pub mod datagram;
pub mod dhcp;
pub mod flow;
pub mod fragment;
pub mod headers;
pub mod hop;
pub mod icmp;
pub mod io;
pub mod limits;
mod memory;
pub mod nat;
pub mod nat_gateway;
pub mod packet;
pub mod pipeline;
pub mod policy;
pub mod resolver;
pub mod route;
pub mod security_group;
mod vector;
pub mod vxlan;
pub mod worker;

pub use config::*;
pub use counters::{Counters, DropReason, Drops, PortCounters, Traffic};
pub use nat_gateway::NatGatewayCounters;
pub use pipeline::{METADATA, ROUTER_MAC};
pub use worker::{Dataplane, StartError};
