//! What control may put on a card: an object of one of six kinds, with an id and a generation.

use std::fmt;
use std::sync::Arc;

pub use card_proto::card::Kind;

use crate::attachment::Disk;
use crate::instance::Instance;
use crate::nat_gateway::NatGateway;
use crate::network::Network;
use crate::port::Port;
use crate::volume::Volume;

/// Name of an object, as control gave it: `i-0123...`, `vol-0123...`.
///
/// It is safe as a file name: 1 to 64 characters of `a-z`, `0-9` and `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(Arc<str>);

impl Id {
    /// The id that `text` spells, if it spells one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        ((1..=64).contains(&text.len()) && text.bytes().all(allowed)).then(|| Self(text.into()))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Kind and id: what names an object on a card.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // the names say it
pub struct Key {
    pub kind: Kind,
    pub id: Id,
}

impl Key {
    /// The key of an object of `kind`.
    #[must_use]
    pub fn new(kind: Kind, id: &Id) -> Self {
        Self { kind, id: id.clone() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", kind_name(self.kind), self.id)
    }
}

/// A kind in one word, as it stands in file names and logs.
#[must_use]
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Unspecified => "unspecified",
        Kind::Instance => "instance",
        Kind::Port => "port",
        Kind::Disk => "disk",
        Kind::Volume => "volume",
        Kind::Network => "network",
        Kind::NatGateway => "nat_gateway",
    }
}

/// A desired object.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub enum Object {
    Instance(Instance),
    Port(Port),
    Disk(Disk),
    Volume(Volume),
    Network(Network),
    NatGateway(NatGateway),
}

impl Object {
    /// What names the object.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Instance(instance) => Key::new(Kind::Instance, &instance.id),
            Self::Port(port) => Key::new(Kind::Port, &port.id),
            Self::Disk(disk) => Key::new(Kind::Disk, &disk.id),
            Self::Volume(volume) => Key::new(Kind::Volume, &volume.id),
            Self::Network(network) => Key::new(Kind::Network, &network.id),
            Self::NatGateway(gateway) => Key::new(Kind::NatGateway, &gateway.id),
        }
    }

    /// The generation that control gave it.
    #[must_use]
    pub fn generation(&self) -> u64 {
        match self {
            Self::Instance(instance) => instance.generation,
            Self::Port(port) => port.generation,
            Self::Disk(disk) => disk.generation,
            Self::Volume(volume) => volume.generation,
            Self::Network(network) => network.generation,
            Self::NatGateway(gateway) => gateway.generation,
        }
    }
}
