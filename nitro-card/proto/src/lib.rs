//! What crosses the card's two borders.
//!
//! [`card`] is the gRPC protocol from control to card, [`host`] the messages
//! from card to thin host, [`mailbox`] the shared-memory link that carries
//! the latter. Nothing here decides anything.

/// Control to card: gRPC messages, clients and servers (`proto/card.proto`, `proto/packets.proto`).
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod card {
    tonic::include_proto!("cardinal.card.v1");
}

/// Card to host: mailbox messages (`proto/host.proto`).
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod host {
    tonic::include_proto!("cardinal.host.v1");
}

pub mod mailbox;
