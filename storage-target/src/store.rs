//! Volumes on the file system: one folder each.
//!
//! ```text
//! DIR/lock                         held by the process that serves the folder
//! DIR/volumes/ID/volume.json       what the volume is; replaced by rename
//! DIR/volumes/ID/data              the volume's own blocks, sparse
//! DIR/volumes/ID/image             a clone's image: a hard link, so that it outlives the image store's entry
//! DIR/volumes/ID/present, durable  a clone's maps, see `volume`
//! DIR/volumes/ID/failed            there after a flush failed: no more writes
//! DIR/volumes/.ID.new, .ID.gone    a volume being made or removed; swept at start
//! ```
//!
//! A folder appears and disappears by one rename, so a crash leaves a volume whole or not at all.

use crate::target::{TargetError, VolumeSpec};
use crate::volume;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a start waits for an earlier process to let go of the folder.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const RECORD_VERSION: u32 = 1;

/// `volume.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    pub spec: VolumeSpec,
}

impl Record {
    pub fn of(spec: &VolumeSpec) -> Self {
        Self { version: RECORD_VERSION, spec: spec.clone() }
    }
}

/// The open files of a volume.
#[derive(Debug)]
pub(crate) struct VolumeFiles {
    pub data: File,
    pub clone: Option<ImageFiles>,
    /// A flush failed once: the volume takes no more writes.
    pub failed: bool,
}

/// The open files that only a clone has.
#[derive(Debug)]
pub(crate) struct ImageFiles {
    pub image: File,
    pub image_bytes: u64,
    pub present: File,
    pub durable: File,
    pub marks: Vec<u8>,
    pub durable_marks: Vec<u8>,
}

/// The folder.
#[derive(Debug)]
pub(crate) struct Store {
    volumes: PathBuf,
    images: PathBuf,
    boot: [u8; 16],
    _lock: File,
}

impl Store {
    /// Takes the folder for this process and sweeps what a crash left half made.
    pub fn open(dir: &Path, images: &Path, boot: [u8; 16], lock_timeout: Duration) -> io::Result<Self> {
        let volumes = dir.join("volumes");
        fs::create_dir_all(&volumes)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        let start = Instant::now();
        while let Err(error) = lock.try_lock() {
            match error {
                fs::TryLockError::WouldBlock if start.elapsed() < lock_timeout => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                fs::TryLockError::WouldBlock => {
                    let message = format!("another process serves the volumes in {}", dir.display());
                    return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
                }
                fs::TryLockError::Error(error) => return Err(error),
            }
        }
        let store = Self { volumes, images: images.to_owned(), boot, _lock: lock };
        for entry in fs::read_dir(&store.volumes)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(store)
    }

    /// Every volume of the folder by the name of its own folder, or why it is none.
    ///
    /// # Errors
    /// When the folder itself cannot be read.
    pub fn list(&self) -> io::Result<Vec<(String, io::Result<Record>)>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.volumes)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let record = read_record(&self.volumes.join(&name), &name);
            records.push((name, record));
        }
        records.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(records)
    }

    /// Makes a volume's folder, without copying a byte of the image.
    pub fn create(&self, spec: &VolumeSpec) -> Result<Record, TargetError> {
        let record = Record::of(spec);
        let new = self.volumes.join(format!(".{}.new", spec.id));
        let _ = fs::remove_dir_all(&new);
        let io = |error| TargetError::Io { id: spec.id.clone(), source: error };
        let made = self
            .create_in(&new, &record)
            .and_then(|()| fs::rename(&new, self.folder(&spec.id)).and_then(|()| sync_folder(&self.volumes)).map_err(io));
        if made.is_err() {
            let _ = fs::remove_dir_all(&new);
        }
        made.map(|()| record)
    }

    fn create_in(&self, folder: &Path, record: &Record) -> Result<(), TargetError> {
        let spec = &record.spec;
        let io = |error| TargetError::Io { id: spec.id.clone(), source: error };
        fs::create_dir(folder).map_err(io)?;
        let data = create(&folder.join("data")).map_err(io)?;
        data.set_len(spec.size_bytes).and_then(|()| data.sync_all()).map_err(io)?;
        if let Some(image) = &spec.image {
            self.create_clone(folder, image, spec.size_bytes).map_err(|error| match error {
                CloneError::Image(source) => TargetError::Image { image: image.clone(), source },
                CloneError::TooSmall(image_bytes) => TargetError::TooSmall { image: image.clone(), image_bytes },
                CloneError::Io(source) => io(source),
            })?;
        }
        write_record(folder, record).map_err(io)
    }

    fn create_clone(&self, folder: &Path, image: &str, size_bytes: u64) -> Result<(), CloneError> {
        let source = self.images.join(image);
        let image_bytes = fs::metadata(&source).map_err(CloneError::Image)?.len();
        if image_bytes > size_bytes {
            return Err(CloneError::TooSmall(image_bytes));
        }
        // Across file systems there are no hard links: the image is then read where it is.
        let link = folder.join("image");
        if fs::hard_link(&source, &link).is_err() {
            let source = fs::canonicalize(&source).map_err(CloneError::Image)?;
            std::os::unix::fs::symlink(source, &link).map_err(CloneError::Io)?;
        }
        let marks = vec![0; volume::marks_len(image_bytes)];
        for name in ["present", "durable"] {
            write_synced(&folder.join(name), &volume::map_file(self.boot, &marks)).map_err(CloneError::Io)?;
        }
        Ok(())
    }

    /// Replaces what is known about a volume; a larger size grows its file first.
    pub fn update(&self, record: &Record) -> io::Result<()> {
        let folder = self.folder(&record.spec.id);
        let data = OpenOptions::new().write(true).open(folder.join("data"))?;
        if data.metadata()?.len() < record.spec.size_bytes {
            data.set_len(record.spec.size_bytes)?;
            data.sync_all()?;
        }
        write_record(&folder, record)
    }

    /// Removes a volume for good.
    pub fn delete(&self, id: &str) -> io::Result<()> {
        let gone = self.volumes.join(format!(".{id}.gone"));
        fs::rename(self.folder(id), &gone)?;
        sync_folder(&self.volumes)?;
        fs::remove_dir_all(gone)
    }

    /// Opens a volume's files and decides which marks to believe.
    pub fn open_files(&self, record: &Record) -> io::Result<VolumeFiles> {
        let folder = self.folder(&record.spec.id);
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(folder.join(name));
        // A pipe or a device in its place would be waited for when opened.
        let found = fs::metadata(folder.join("data"))?;
        let size = record.spec.size_bytes;
        if !found.is_file() || found.len() < size {
            let message = format!("{} is no file of {size} bytes but has {}", folder.join("data").display(), found.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let data = open("data")?;
        let clone = if record.spec.image.is_some() {
            let image = File::open(folder.join("image"))?;
            let image_bytes = image.metadata()?.len();
            let present_path = folder.join("present");
            let present = fs::read(&present_path).unwrap_or_default();
            let mut durable = open("durable")?;
            let mut durable_bytes = Vec::new();
            durable.read_to_end(&mut durable_bytes)?;
            let len = volume::marks_len(image_bytes);
            let (marks, durable_marks) = volume::read_maps(&present, &durable_bytes, self.boot, len)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{} is no map", folder.join("durable").display())))?;
            let fresh = volume::map_file(self.boot, &marks);
            if present != fresh {
                let new = folder.join("present.new");
                write_synced(&new, &fresh)?;
                fs::rename(&new, &present_path)?;
            }
            Some(ImageFiles { image, image_bytes, present: open("present")?, durable, marks, durable_marks })
        } else {
            None
        };
        Ok(VolumeFiles { data, clone, failed: folder.join("failed").exists() })
    }

    /// Bytes of disk that the volume's own blocks take.
    pub fn allocated_bytes(&self, id: &str) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(fs::metadata(self.folder(id).join("data"))?.blocks() * 512)
    }

    /// Where a volume's files are.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.volumes.join(id)
    }
}

enum CloneError {
    Image(io::Error),
    TooSmall(u64),
    Io(io::Error),
}

/// Reads the record of the volume in `folder`, which has to be the volume's own.
fn read_record(folder: &Path, name: &str) -> io::Result<Record> {
    let path = folder.join("volume.json");
    let bad = |message: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {message}", path.display()));
    let text = fs::read(&path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let record: Record = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    if record.version != RECORD_VERSION {
        return Err(bad(format!("has version {}, not {RECORD_VERSION}", record.version)));
    }
    if record.spec.id != name {
        return Err(bad(format!("belongs to volume {}", record.spec.id)));
    }
    Ok(record)
}

/// A random number that the kernel draws at each boot of the machine.
pub(crate) fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Marks a volume as failed, in the folder that `Store::folder` names.
pub(crate) fn mark_failed(folder: &Path) -> io::Result<()> {
    create(&folder.join("failed"))?;
    sync_folder(folder)
}

fn write_record(folder: &Path, record: &Record) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(record)?;
    let new = folder.join("volume.json.new");
    write_synced(&new, &text)?;
    fs::rename(new, folder.join("volume.json"))?;
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(id: &str, image: Option<&str>) -> VolumeSpec {
        VolumeSpec { id: id.into(), size_bytes: 1 << 20, image: image.map(Into::into), ..VolumeSpec::default() }
    }

    fn store(dir: &Path, boot: u8) -> Store {
        Store::open(&dir.join("volumes"), &dir.join("images"), [boot; 16], LOCK_TIMEOUT).unwrap()
    }

    #[test]
    fn a_half_made_or_half_removed_volume_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        drop(store(dir.path(), 1));
        for name in [".vol-1.new", ".vol-2.gone"] {
            fs::create_dir_all(dir.path().join("volumes/volumes").join(name).join("x")).unwrap();
        }
        assert!(store(dir.path(), 1).list().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path().join("volumes/volumes")).unwrap().count(), 0);
    }

    #[test]
    fn records_come_back_and_marks_are_believed_in_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        fs::write(dir.path().join("images/base"), vec![3; 700_000]).unwrap();
        let record = {
            let store = store(dir.path(), 1);
            let record = store.create(&spec("vol-1", Some("base"))).unwrap();
            let files = store.open_files(&record).unwrap().clone.unwrap();
            use std::os::unix::fs::FileExt as _;
            files.present.write_all_at(&[0b101], volume::MAP_HEADER).unwrap();
            record
        };
        // The image store may drop its entry: the volume goes on.
        fs::remove_file(dir.path().join("images/base")).unwrap();
        for (boot, marks) in [(1, 2), (2, 0), (1, 0)] {
            let store = store(dir.path(), boot);
            let listed = store.list().unwrap();
            assert_eq!(listed.iter().map(|(_, listed)| listed.as_ref().unwrap()).collect::<Vec<_>>(), [&record]);
            let files = store.open_files(&record).unwrap().clone.unwrap();
            assert_eq!((files.image_bytes, volume::count_marks(&files.marks)), (700_000, marks), "boot {boot}");
        }
    }

    #[test]
    fn an_image_that_is_missing_or_too_large_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        fs::write(dir.path().join("images/large"), vec![0; (1 << 20) + 1]).unwrap();
        let store = store(dir.path(), 1);
        assert!(matches!(store.create(&spec("vol-1", Some("none"))), Err(TargetError::Image { .. })));
        assert!(matches!(store.create(&spec("vol-1", Some("large"))), Err(TargetError::TooSmall { .. })));
        assert_eq!(fs::read_dir(&store.volumes).unwrap().count(), 0);
        assert!(store.create(&spec("vol-1", None)).is_ok());
        store.delete("vol-1").unwrap();
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn two_processes_cannot_serve_one_folder() {
        let dir = tempfile::tempdir().unwrap();
        let _first = store(dir.path(), 1);
        let second = Store::open(&dir.path().join("volumes"), dir.path(), [1; 16], Duration::from_millis(50));
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
