//! The lab around the product, for its whole-system tests.
//!
//! A [`Region`] is a real one: `rack` starts it, its daemons are the product's
//! processes, and a test speaks to it as a tenant does, kills it as a power cut
//! does, and listens on its wires. What a test may not do is reach inside: no
//! product code is linked here.
//!
//! The harness panics on every failure of the lab itself, as tests do.

mod answer;
mod region;
mod seed;

pub use answer::{Answer, Refusal};
pub use region::{Instance, Process, Region, project_root, root_or_skip};
pub use seed::Seed;
