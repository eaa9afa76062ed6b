//! The thin host: cores, memory and vCPUs of one server, for its card.
//!
//! The host is passive. It answers its card over the mailbox and nobody else:
//! no listening socket, no address, no disk, no tenant's secret. It keeps a
//! ledger of whole cores and 2 MiB pages, and runs one process per machine,
//! whose devices are functions of the card.
//!
//! Path of a launch: [`server`] (threads and the link) → [`host`] (one state
//! machine, no clock, no thread) → [`partition`] → [`machine`].
//!
//! Invariants:
//! - A core belongs to at most one machine, a page too; a machine that does not
//!   run holds none.
//! - The card says what a machine shall be, with a generation; a lower one is
//!   ignored. The same message twice changes nothing.
//! - Whatever moment the agent is killed at, its machines run on, and the next
//!   agent finds each of them exactly once.

pub mod console;
pub mod host;
pub mod jail;
pub mod machine;
pub mod partition;
pub mod record;
pub mod server;
pub mod settings;
