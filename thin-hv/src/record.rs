//! What one agent leaves for the next: a folder per machine in `run_dir`.
//!
//! A record is replaced as a whole (write, rename), so a killed agent leaves
//! the old one or the new one. It needs no fsync: a host that loses power loses
//! its machines too, and `boot_id` tells that the records are of an earlier
//! boot. It says nothing of a tenant: ids, sizes, sockets, cores.

use card_proto::host;
use prost::Message;
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const SPEC: &str = "spec";
const MACHINES: &str = "machines";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// One machine, as the agent last saw it.
#[derive(Clone, PartialEq, Message)]
pub struct Record {
    /// What the card last asked for.
    #[prost(message, optional, tag = "1")]
    pub machine: Option<host::Machine>,
    /// The boot count reached.
    #[prost(uint64, tag = "2")]
    pub boot: u64,
    /// The cores that it holds; none when it does not run.
    #[prost(uint32, repeated, tag = "3")]
    pub cores: Vec<u32>,
    /// The memory that it holds.
    #[prost(uint64, tag = "4")]
    pub memory_bytes: u64,
    /// Its guest has run since the cores were given.
    #[prost(bool, tag = "5")]
    pub ready: bool,
    /// Functions that were plugged.
    #[prost(string, repeated, tag = "6")]
    pub plugged: Vec<String>,
    /// How it ended by itself.
    #[prost(message, optional, tag = "7")]
    pub end: Option<End>,
    /// It is to be forgotten as soon as it has ended.
    #[prost(bool, tag = "8")]
    pub deleting: bool,
}

/// An end that nobody asked for: it stays until a higher generation.
#[derive(Clone, PartialEq, Message)]
pub struct End {
    /// The generation that ended.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// False when the guest turned itself off.
    #[prost(bool, tag = "2")]
    pub failed: bool,
    /// What the card is told.
    #[prost(string, tag = "3")]
    pub message: String,
}

/// The folder of all records; one agent at a time has it.
#[derive(Debug)]
pub struct Records {
    folder: PathBuf,
    /// Held for the life of the agent; the kernel lets go when it dies.
    _lock: File,
}

impl Records {
    /// Takes `run_dir` for the VMM `vmm`; records of an earlier boot of this
    /// server are thrown away.
    ///
    /// # Errors
    /// Another agent has it, it belongs to another VMM, or the file system's error.
    pub fn open(run_dir: &Path, vmm: &str) -> io::Result<Self> {
        let records = Self::open_any(run_dir)?;
        let owner = format!("{vmm} {}", fs::read_to_string(BOOT_ID)?);
        let owner_file = run_dir.join("owner");
        match fs::read_to_string(&owner_file) {
            Ok(found) if found == owner => {}
            Ok(found) if found.split(' ').next() != Some(vmm) && !records.ids()?.is_empty() => {
                let message = "run_dir holds machines of another kind: run --release-all first";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            _ => {
                records.ids()?.iter().try_for_each(|id| records.remove(id))?;
                fs::write(&owner_file, owner)?;
            }
        }
        Ok(records)
    }

    /// As [`Records::open`], whoever the machines belong to.
    ///
    /// # Errors
    /// Another agent has it, or the file system's error.
    pub fn open_any(run_dir: &Path) -> io::Result<Self> {
        let folder = run_dir.join(MACHINES);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let lock = File::create(run_dir.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| io::Error::new(io::ErrorKind::ResourceBusy, "another agent runs in this run_dir"))?;
        Ok(Self { folder, _lock: lock })
    }

    /// The ids that have a folder.
    ///
    /// # Errors
    /// The file system's.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// The folder of the machine `id`, whose id was checked.
    #[must_use]
    pub fn folder(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// Reads one record; `None` when there is none that makes sense.
    #[must_use]
    pub fn load(&self, id: &str) -> Option<Record> {
        Record::decode(fs::read(self.folder(id).join(SPEC)).ok()?.as_slice()).ok()
    }

    /// Replaces one record.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, id: &str, record: &Record) -> io::Result<()> {
        let folder = self.folder(id);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let new = folder.join("spec.new");
        fs::write(&new, record.encode_to_vec())?;
        fs::rename(new, folder.join(SPEC))
    }

    /// Forgets one machine.
    ///
    /// # Errors
    /// The file system's; a missing folder is none.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.folder(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_torn_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path(), "sim").unwrap();
        let record = Record { boot: 3, cores: vec![1, 2], ..Default::default() };
        records.save("i-1", &record).unwrap();
        assert_eq!(records.load("i-1"), Some(record));
        assert_eq!(records.ids().unwrap(), ["i-1"]);
        fs::write(records.folder("i-1").join(SPEC), [0xff; 7]).unwrap();
        assert_eq!(records.load("i-1"), None);
        records.remove("i-1").unwrap();
        records.remove("i-1").unwrap();
        assert!(records.ids().unwrap().is_empty());
    }

    #[test]
    fn one_agent_at_a_time_has_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = Records::open(folder.path(), "sim").unwrap();
        assert!(Records::open(folder.path(), "sim").is_err());
        drop(first);
        Records::open(folder.path(), "sim").unwrap();
    }

    #[test]
    fn records_of_another_kind_are_refused_and_of_another_boot_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        Records::open(folder.path(), "qemu").unwrap().save("i-1", &Record::default()).unwrap();
        assert!(Records::open(folder.path(), "sim").is_err());
        assert_eq!(Records::open(folder.path(), "qemu").unwrap().ids().unwrap(), ["i-1"]);
        fs::write(folder.path().join("owner"), "qemu an-earlier-boot\n").unwrap();
        assert!(Records::open(folder.path(), "qemu").unwrap().ids().unwrap().is_empty());
    }
}
