//! A guest on the host under the card: what control wants of it, and the
//! machine that the host is asked for.

use card_proto::card::Metadata;
use card_proto::host::{self, Smbios};
use sha2::{Digest, Sha256};

use crate::object::Id;

/// A desired guest.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Instance {
    pub id: Id,
    pub generation: u64,
    pub running: bool,
    /// Reboots asked for so far.
    pub boot: u64,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub boot_source: BootSource,
    pub metadata: Metadata,
    /// Ports and disks that have to be here before it starts.
    pub ports: usize,
    pub disks: usize,
}

/// Object keys in the image store of what the machine boots directly.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BootSource {
    /// `None`: the boot disk is booted by firmware.
    pub kernel: Option<String>,
    /// Initial RAM disk of the kernel.
    pub initrd: Option<String>,
    /// Of the kernel.
    pub command_line: String,
}

/// Name of an instance's kernel in the link folder.
#[must_use]
pub fn kernel_link(id: &Id) -> String {
    format!("{id}.kernel")
}

/// Name of an instance's initial RAM disk in the link folder.
#[must_use]
pub fn initrd_link(id: &Id) -> String {
    format!("{id}.initrd")
}

impl Instance {
    /// What is known of a guest that nobody desires: its name.
    #[must_use]
    pub fn undesired(id: &Id) -> Self {
        Self {
            id: id.clone(),
            generation: 0,
            running: false,
            boot: 0,
            vcpus: 0,
            memory_bytes: 0,
            boot_source: BootSource::default(),
            metadata: Metadata::default(),
            ports: 0,
            disks: 0,
        }
    }

    /// The machine to ask the host for; its generation is the core's business.
    #[must_use]
    pub fn machine(&self, running: bool, functions: Vec<host::Function>) -> host::Machine {
        let link = |key: &Option<String>, name: String| key.as_ref().map(|_| name).unwrap_or_default();
        host::Machine {
            id: self.id.to_string(),
            generation: 0,
            running,
            boot: self.boot,
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            smbios: Some(self.smbios()),
            kernel: link(&self.boot_source.kernel, kernel_link(&self.id)),
            initrd: link(&self.boot_source.initrd, initrd_link(&self.id)),
            command_line: self.boot_source.command_line.clone(),
            functions,
        }
    }

    /// What makes a guest's cloud-init and agents see EC2: the vendor, a UUID
    /// that begins with ec2 and equals the serial, and the asset tag.
    fn smbios(&self) -> Smbios {
        let digest = hex::encode(Sha256::digest(self.id.as_str()));
        let part = |from: usize, to: usize| digest.get(from..to).unwrap_or_default();
        let uuid = format!("ec2{}-{}-4{}-8{}-{}", part(0, 5), part(5, 9), part(9, 12), part(12, 15), part(15, 27));
        Smbios {
            vendor: "Amazon EC2".into(),
            product: self.metadata.instance_type.clone(),
            uuid: uuid.clone(),
            serial: uuid,
            asset_tag: self.id.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::converge::tests::instance;

    #[test]
    fn smbios_names_ec2_and_is_stable() {
        let machine = instance("i-1", 1).machine(true, Vec::new());
        let smbios = machine.smbios.unwrap();
        assert_eq!(smbios.vendor, "Amazon EC2");
        assert!(smbios.uuid.starts_with("ec2") && smbios.uuid.len() == 36, "{}", smbios.uuid);
        assert_eq!(smbios.uuid, smbios.serial);
        assert_eq!(smbios.asset_tag, "i-1");
        assert_eq!(instance("i-1", 2).smbios().uuid, smbios.uuid);
        assert_ne!(instance("i-2", 1).smbios().uuid, smbios.uuid);
    }
}
