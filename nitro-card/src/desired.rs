//! What control wants, durable on the card's own disk.
//!
//! One file per object in `desired/`, named `<kind>.<id>`:
//!
//! ```text
//! | crc32c of the rest (32, little-endian) | record: protobuf |
//! ```
//!
//! and two more: `epoch` holds the highest control epoch seen, in decimal;
//! `complete` is there while every machine of the host is known to be in the
//! store (see [`Loaded::complete`]). A file is replaced by writing beside it, fsync, rename, fsync of the folder, so
//! that a crash leaves the old or the new one.
//!
//! Fencing: an epoch or a generation below the highest seen is refused. An
//! object that is gone leaves a tombstone for an hour, so that a delayed Put
//! cannot bring it back.
//!
//! Deleting takes two steps: [`Store::delete`] makes the record say so, which
//! is what survives a crash while the object is torn down, and
//! [`Store::finish`] makes it a tombstone when nothing is left of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use card_proto::card::{PutRequest, put_request};
use prost::Message;

use crate::convert::Invalid;
use crate::object::{Id, Key, Kind, Object, kind_name};

/// How long a tombstone fences.
const TOMBSTONE_LIFE: Duration = Duration::from_secs(3600);
/// A record is one message of at most 4 MiB and little more.
const RECORD_MAX: u64 = 8 << 20;

/// The store; one owner.
pub struct Store {
    folder: PathBuf,
    /// Fsynced after renames.
    handle: File,
    epoch: u64,
    records: BTreeMap<Key, Mark>,
    /// Renamed since the last commit.
    dirty: bool,
    /// A folder that could not be synced promises nothing any more.
    failed: bool,
}

#[derive(Clone, Copy)]
struct Mark {
    generation: u64,
    state: State,
    changed_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum State {
    Wanted = 0,
    Deleting = 1,
    Gone = 2,
}

#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(uint64, tag = "1")]
    generation: u64,
    #[prost(enumeration = "State", tag = "2")]
    state: i32,
    #[prost(uint64, tag = "3")]
    changed_s: u64,
    /// The last spec, until the object is gone.
    #[prost(message, optional, tag = "4")]
    spec: Option<PutRequest>,
}

/// What a store held when it was opened.
pub struct Loaded {
    /// Objects to converge to, and objects whose deletion a crash cut short,
    /// each of those with the generation of the Delete.
    pub objects: Vec<(Object, Option<u64>)>,
    /// False when the store is new or lost a record, until [`Store::set_complete`]:
    /// an unknown machine on the host may be one that should be known.
    pub complete: bool,
}

/// Why a request of control was not taken.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum Refusal {
    #[error("epoch {epoch} was superseded by {seen}")]
    Epoch { epoch: u64, seen: u64 },
    #[error("generation {generation} is below {seen}")]
    Generation { generation: u64, seen: u64 },
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("this card has not the role")]
    Role,
    #[error("the card's disk failed")]
    Disk(#[from] io::Error),
    #[error("the card is busy")]
    Busy,
    #[error("the card is stopping")]
    Stopping,
}

impl Store {
    /// Opens the store in `state_dir`, or makes one.
    ///
    /// # Errors
    /// What the file system says. A record that cannot be understood is no
    /// error: it is set aside as `<name>.bad`, logged, and the store is incomplete.
    pub fn open(state_dir: &Path) -> io::Result<(Self, Loaded)> {
        let folder = state_dir.join("desired");
        fs::create_dir_all(&folder)?;
        let handle = File::open(&folder)?;
        let mut store = Self { folder, handle, epoch: 0, records: BTreeMap::new(), dirty: false, failed: false };
        let mut loaded = Loaded { objects: Vec::new(), complete: store.folder.join(COMPLETE).exists() };
        store.load_epoch()?;
        for entry in fs::read_dir(&store.folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name == EPOCH || name == COMPLETE || name.ends_with(".bad") {
                continue;
            }
            if name.ends_with(".tmp") {
                fs::remove_file(&path)?;
                continue;
            }
            match load(&path, name) {
                Ok((key, mark, object)) => {
                    store.records.insert(key, mark);
                    let deleted = (mark.state == State::Deleting).then_some(mark.generation);
                    loaded.objects.extend(object.map(|object| (object, deleted)));
                }
                Err(reason) => {
                    tracing::error!(file = %path.display(), reason, "a desired object cannot be read; it is set aside");
                    fs::rename(&path, path.with_extension(format!("{}.bad", path.extension().unwrap_or_default().display())))?;
                    if std::mem::take(&mut loaded.complete) {
                        fs::remove_file(store.folder.join(COMPLETE))?;
                    }
                }
            }
        }
        store.bury()?;
        store.handle.sync_all()?;
        Ok((store, loaded))
    }

    /// Stores a desired object. Returns whether it changed anything. Durable after [`Store::commit`].
    ///
    /// # Errors
    /// A [`Refusal`]; nothing changed then.
    pub fn put(&mut self, key: &Key, generation: u64, request: PutRequest, now: SystemTime) -> Result<bool, Refusal> {
        self.admit_epoch(request.epoch)?;
        match self.records.get(key) {
            Some(mark) if generation < mark.generation => return Err(Refusal::Generation { generation, seen: mark.generation }),
            Some(mark) if generation == mark.generation => return Ok(false),
            _ => {}
        }
        self.save(key, Record { generation, state: State::Wanted.into(), changed_s: seconds(now), spec: Some(request) })?;
        Ok(true)
    }

    /// Marks an object as to be torn down. Returns whether it was desired, or
    /// being torn down already. Durable after [`Store::commit`].
    ///
    /// # Errors
    /// A [`Refusal`]; nothing changed then.
    pub fn delete(&mut self, key: &Key, generation: u64, epoch: u64, now: SystemTime) -> Result<bool, Refusal> {
        self.admit_epoch(epoch)?;
        let mark = self.records.get(key).copied();
        if let Some(mark) = mark.filter(|mark| generation < mark.generation) {
            return Err(Refusal::Generation { generation, seen: mark.generation });
        }
        let known = mark.is_some_and(|mark| mark.state != State::Gone);
        let spec = if known { self.spec(key)? } else { None };
        let state = if known { State::Deleting } else { State::Gone };
        self.save(key, Record { generation, state: state.into(), changed_s: seconds(now), spec })?;
        Ok(known)
    }

    /// Makes the record of a torn down object a tombstone.
    ///
    /// # Errors
    /// What the file system says; the object is torn down again after a restart.
    pub fn finish(&mut self, key: &Key, generation: u64, now: SystemTime) -> Result<(), Refusal> {
        self.save(key, Record { generation, state: State::Gone.into(), changed_s: seconds(now), spec: None })?;
        Ok(self.bury()?)
    }

    /// Remembers that no machine of the host is missing from the store.
    ///
    /// # Errors
    /// What the file system says; the store is incomplete after a restart.
    pub fn set_complete(&mut self) -> io::Result<()> {
        self.write(COMPLETE, b"")?;
        self.dirty = true;
        self.commit()
    }

    /// Takes an epoch from control: the highest fences all lower ones.
    ///
    /// # Errors
    /// [`Refusal::Epoch`] for a lower one.
    pub fn admit_epoch(&mut self, epoch: u64) -> Result<(), Refusal> {
        if epoch < self.epoch {
            return Err(Refusal::Epoch { epoch, seen: self.epoch });
        }
        if self.epoch < epoch {
            self.write(EPOCH, epoch.to_string().as_bytes())?;
            self.epoch = epoch;
            self.dirty = true;
        }
        Ok(())
    }

    /// Makes everything since the last commit survive a power cut.
    ///
    /// # Errors
    /// After the first, every change is refused until the daemon starts again.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier sync failed"));
        }
        if self.dirty {
            self.failed = true;
            self.handle.sync_all()?;
            self.failed = false;
            self.dirty = false;
        }
        Ok(())
    }

    fn save(&mut self, key: &Key, record: Record) -> Result<(), Refusal> {
        if self.failed {
            return Err(Refusal::Disk(io::Error::other("an earlier sync failed")));
        }
        let body = record.encode_to_vec();
        let mut bytes = crc32c::crc32c(&body).to_le_bytes().to_vec();
        bytes.extend(body);
        self.write(&key.to_string(), &bytes)?;
        self.records.insert(key.clone(), Mark { generation: record.generation, state: record.state(), changed_s: record.changed_s });
        self.dirty = true;
        Ok(())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let beside = self.folder.join(format!("{name}.tmp"));
        let written = File::create(&beside)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&beside, self.folder.join(name)));
        if written.is_err() {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_file(&beside);
        }
        written
    }

    fn spec(&self, key: &Key) -> io::Result<Option<PutRequest>> {
        let record = read(&self.folder.join(key.to_string())).map_err(io::Error::other)?;
        Ok(record.spec)
    }

    fn load_epoch(&mut self) -> io::Result<()> {
        match fs::read_to_string(self.folder.join(EPOCH)) {
            // Without its epoch a card would obey a control node that was fenced off.
            Ok(text) => self.epoch = text.trim().parse().map_err(|_| io::Error::other("the file `epoch` is damaged"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Forgets tombstones that have outlived every delayed request.
    fn bury(&mut self) -> io::Result<()> {
        let newest = self.records.values().map(|mark| mark.changed_s).max().unwrap_or_default();
        let old = |mark: &Mark| mark.state == State::Gone && mark.changed_s.saturating_add(TOMBSTONE_LIFE.as_secs()) < newest;
        let buried: Vec<Key> = self.records.iter().filter(|(_, mark)| old(mark)).map(|(key, _)| key.clone()).collect();
        for key in buried {
            fs::remove_file(self.folder.join(key.to_string()))?;
            self.records.remove(&key);
        }
        Ok(())
    }
}

const EPOCH: &str = "epoch";
const COMPLETE: &str = "complete";

fn load(path: &Path, name: &str) -> Result<(Key, Mark, Option<Object>), String> {
    let kinds = [Kind::Instance, Kind::Port, Kind::Disk, Kind::Volume, Kind::Network, Kind::NatGateway];
    let (kind, id) = name.split_once('.').ok_or("not the name of a record")?;
    let kind = kinds.into_iter().find(|known| kind_name(*known) == kind).ok_or("not the name of a record")?;
    let key = Key { kind, id: Id::parse(id).ok_or("not the name of a record")? };
    let record = read(path)?;
    let mark = Mark { generation: record.generation, state: record.state(), changed_s: record.changed_s };
    if mark.state == State::Gone {
        return Ok((key, mark, None));
    }
    let spec: put_request::Object = record.spec.and_then(|request| request.object).ok_or("holds no object")?;
    let object = Object::try_from(spec).map_err(|invalid| invalid.to_string())?;
    if object.key() != key {
        return Err("holds another object".into());
    }
    Ok((key, mark, Some(object)))
}

fn read(path: &Path) -> Result<Record, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if RECORD_MAX < length {
        return Err("too long".into());
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let (checksum, body) = bytes.split_first_chunk::<4>().ok_or("too short")?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
        return Err("wrong checksum".into());
    }
    Record::decode(body).map_err(|error| error.to_string())
}

fn seconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use card_proto::card;

    fn request(epoch: u64, generation: u64) -> PutRequest {
        let volume = card::Volume { id: "vol-1".into(), generation, size_bytes: 512, ..card::Volume::default() };
        PutRequest { epoch, object: Some(put_request::Object::Volume(volume)) }
    }

    fn key() -> Key {
        Key { kind: Kind::Volume, id: Id::parse("vol-1").unwrap() }
    }

    fn put(store: &mut Store, epoch: u64, generation: u64) -> Result<bool, Refusal> {
        store.put(&key(), generation, request(epoch, generation), UNIX_EPOCH)
    }

    #[test]
    fn lower_generations_and_epochs_are_refused_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, loaded) = Store::open(folder.path()).unwrap();
        assert!(!loaded.complete, "a new store knows nothing");
        assert!(put(&mut store, 3, 7).unwrap());
        store.commit().unwrap();
        drop(store);
        let (mut store, loaded) = Store::open(folder.path()).unwrap();
        assert!(!loaded.complete, "nobody has compared it with the host");
        assert_eq!(loaded.objects.len(), 1);
        assert!(matches!(put(&mut store, 2, 9), Err(Refusal::Epoch { epoch: 2, seen: 3 })));
        assert!(matches!(put(&mut store, 3, 6), Err(Refusal::Generation { generation: 6, seen: 7 })));
        assert!(!put(&mut store, 3, 7).unwrap(), "an equal generation changes nothing");
        assert!(matches!(store.delete(&key(), 6, 3, UNIX_EPOCH), Err(Refusal::Generation { .. })));
    }

    #[test]
    fn a_deletion_cut_short_goes_on_and_a_tombstone_fences() {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(folder.path()).unwrap();
        put(&mut store, 1, 1).unwrap();
        assert!(store.delete(&key(), 2, 1, UNIX_EPOCH).unwrap());
        drop(store);
        let (mut store, loaded) = Store::open(folder.path()).unwrap();
        assert_eq!(loaded.objects.first().unwrap().1, Some(2));
        store.finish(&key(), 2, UNIX_EPOCH).unwrap();
        drop(store);
        let (mut store, loaded) = Store::open(folder.path()).unwrap();
        assert!(loaded.objects.is_empty());
        assert!(matches!(put(&mut store, 1, 1), Err(Refusal::Generation { .. })));
        assert!(!store.delete(&key(), 3, 1, UNIX_EPOCH).unwrap(), "unknown: gone at once");
        assert!(put(&mut store, 1, 4).unwrap(), "a higher generation is a new life");
    }

    #[test]
    fn old_tombstones_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(folder.path()).unwrap();
        store.delete(&key(), 1, 1, UNIX_EPOCH).unwrap();
        let other = Key { kind: Kind::Volume, id: Id::parse("vol-2").unwrap() };
        store.finish(&other, 1, UNIX_EPOCH + TOMBSTONE_LIFE * 2).unwrap();
        let (store, _) = Store::open(folder.path()).unwrap();
        assert_eq!(store.records.keys().collect::<Vec<_>>(), [&other]);
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_the_store_incomplete() {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(folder.path()).unwrap();
        put(&mut store, 1, 1).unwrap();
        store.set_complete().unwrap();
        assert!(Store::open(folder.path()).unwrap().1.complete);
        let file = folder.path().join("desired/volume.vol-1");
        let good = fs::read(&file).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file, bad).unwrap();
            let (_, loaded) = Store::open(folder.path()).unwrap();
            assert!(loaded.objects.is_empty() && !loaded.complete, "byte {at}");
        }
        fs::write(folder.path().join("desired/volume.vol-1.tmp"), b"torn").unwrap();
        fs::write(&file, good).unwrap();
        let (_, loaded) = Store::open(folder.path()).unwrap();
        assert!(loaded.objects.len() == 1 && !loaded.complete);
    }
}
