//! The VPC packet path of a card: security groups, routes, VXLAN, address
//! translation, and the ARP, DHCP and ping that guests expect of a network.
//!
//! [`Dataplane`] runs it in a thread of its own over any devices that implement
//! [`io::PacketIo`]; [`pipeline`] is all of it without threads, clocks or devices.
//! The path of a packet stands at the head of [`worker`].
//!
//! Invariants:
//! - Nothing passes a port but what a rule of it allows, or what belongs to a
//!   connection that a rule allowed.
//! - A packet from another card counts only if the network maps its inner source
//!   to that card. There is no learning and no flooding.
//! - No bytes from a guest or a wire panic, and no queue or table is unbounded.
//! - In steady state the path of a packet allocates nothing.

pub mod action;
pub mod anti_spoof;
pub mod arp;
pub mod capture;
mod config;
pub mod counters;
pub mod dhcp;
pub mod explain;
pub mod flow;
pub mod fragment;
pub mod headers;
pub mod icmp;
pub mod io;
pub mod nat;
pub mod packet;
pub mod pipeline;
pub mod policy;
pub mod route;
pub mod security_group;
pub mod vxlan;
pub mod worker;

pub use config::*;
pub use counters::{Counters, DropReason, Drops, PortCounters, Traffic};
pub use pipeline::{METADATA, ROUTER_MAC};
pub use worker::{Dataplane, StartError};
