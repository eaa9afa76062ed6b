//! A volume attached to a guest: the card connects to it over NVMe/TCP and
//! serves it to the machine as a disk.

use std::net::SocketAddr;

use card_proto::host::{self, Block, function};

use crate::object::Id;
use crate::port::socket_name;

/// A desired attachment; its id is the volume's.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Disk {
    pub id: Id,
    pub generation: u64,
    pub instance_id: Id,
    /// What the tenant calls it: `/dev/sdf`.
    pub device_name: String,
    pub boot: bool,
    pub source: Source,
    pub attach_time_s: u64,
}

/// Where the blocks of a disk are. Another source is another server.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Source {
    pub nqn: String,
    pub address: SocketAddr,
    pub size_bytes: u64,
}

impl Disk {
    /// EBS's form of the serial number: the volume id without its dash, which
    /// is exactly the 20 characters that virtio-blk has room for.
    #[must_use]
    pub fn serial(&self) -> String {
        let mut serial = self.id.as_str().replace('-', "");
        serial.truncate(20);
        serial
    }

    /// The PCI function that the host plugs into the machine.
    #[must_use]
    pub fn function(&self) -> host::Function {
        let block = Block { boot: self.boot, serial: self.serial() };
        host::Function { id: self.id.to_string(), socket: socket_name(&self.id), kind: Some(function::Kind::Block(block)) }
    }
}
