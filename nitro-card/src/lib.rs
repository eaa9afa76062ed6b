//! The card daemon: owns all I/O of the guests of one server.
//!
//! Control says over gRPC what shall be ([`server`]); the card keeps that on its
//! own disk ([`desired`]), converges to it without control ([`converge`]), and
//! reports what is ([`watch`]). It owns what guests touch: ports on the packet
//! path, disks over NVMe/TCP ([`disk`]), metadata ([`imds`]), consoles
//! ([`console`]); operators look into its packet path ([`packets`], [`metrics`]);
//! the host under it ([`host`]) only runs machines. A card with
//! the storage role keeps volumes for other cards.
//!
//! Invariants:
//! - What was answered survives a power cut, and a lower epoch or generation is refused.
//! - One thread ([`card`]) owns the state; it may be killed between any two steps.
//! - Control is believed by its certificate; the host and the guests are not believed.

pub mod attachment;
pub mod card;
pub mod console;
pub mod converge;
pub mod convert;
pub mod desired;
pub mod devices;
pub mod disk;
pub mod explain;
pub mod host;
pub mod imds;
pub mod instance;
pub mod meters;
pub mod metrics;
pub mod names;
pub mod network;
pub mod object;
pub mod packets;
pub mod port;
pub mod server;
pub mod settings;
pub mod slot;
pub mod start;
pub mod volume;
pub mod watch;
