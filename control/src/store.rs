//! Where the world survives: rows as JSON documents, written by one thread.
//!
//! Commits reach the thread in order through [`Writer`]; it takes all that wait
//! and writes them in one transaction (group commit), so under load one fsync
//! serves many answers. How far it has come stands in a watch channel; an answer
//! leaves only after that covers what the answer saw. When a write fails the
//! thread ends and nothing that it had not confirmed is ever answered.
//!
//! Invariant: what the store holds is always the world after some commit n, with
//! all of 1..=n and nothing of n+1.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use rusqlite::{Connection, params};
use tokio::sync::watch;

use crate::world::{Change, Commit, LoadError, Sequence, Sink, Tables};

/// Takes one stored row: kind, then document.
pub type TakeRow<'a> = dyn FnMut(&str, &[u8]) -> Result<(), LoadError> + 'a;

/// An engine that keeps rows.
pub trait Store: Send + 'static {
    /// Reads every row.
    ///
    /// # Errors
    /// When the engine fails or `row` refuses one.
    fn load(&mut self, row: &mut TakeRow<'_>) -> Result<(), StoreError>;

    /// Applies changes, all or none; they are durable when it returns.
    ///
    /// # Errors
    /// When the engine fails; nothing of `changes` may be visible then.
    fn write(&mut self, changes: &[Change]) -> Result<(), StoreError>;
}

/// Why the store does not open or write.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StoreError {
    #[error("SQLite")]
    Sqlite(#[from] rusqlite::Error),
    #[error("the store has format {found}, this program reads {known}")]
    Format { found: i64, known: i64 },
    #[error("a row of the store")]
    Load(#[from] LoadError),
    #[error("a row has no JSON form")]
    Document(#[from] serde_json::Error),
    #[error("the writer thread does not start")]
    Thread(#[source] std::io::Error),
}

/// A store that was read and now takes commits.
pub struct Opened {
    /// What it held.
    pub tables: Tables,
    /// Where commits go.
    pub writer: Writer,
    /// The last commit that is durable.
    pub durable: watch::Receiver<Sequence>,
}

/// Reads everything and starts the writer thread.
///
/// # Errors
/// When the engine fails or holds a row that is not understood: a control node
/// that has seen a part of its world only must not serve.
pub fn open(mut store: impl Store) -> Result<Opened, StoreError> {
    let mut tables = Tables::default();
    store.load(&mut |kind, document| tables.load(kind, document))?;
    let (commits, queue) = mpsc::channel();
    let (reached, durable) = watch::channel(Sequence(0));
    thread::Builder::new().name("store".into()).spawn(move || write_all(store, &queue, &reached)).map_err(StoreError::Thread)?;
    Ok(Opened { tables, writer: Writer(commits), durable })
}

/// The world's end of the queue; dropping it lets the thread finish what waits.
pub struct Writer(mpsc::Sender<Commit>);

impl Sink for Writer {
    fn accept(&mut self, commit: Commit) {
        // A writer that has stopped is noticed by whoever waits for durability.
        let _ = self.0.send(commit);
    }
}

/// Most commits that one write takes, so that the first does not wait long for the last.
const GROUP: usize = 1024;

fn write_all(mut store: impl Store, queue: &mpsc::Receiver<Commit>, reached: &watch::Sender<Sequence>) {
    while let Ok(first) = queue.recv() {
        let mut last = first.sequence;
        let mut changes = merge(BTreeMap::new(), first);
        for commit in queue.try_iter().take(GROUP) {
            last = commit.sequence;
            changes = merge(changes, commit);
        }
        let changes: Vec<Change> = changes.into_values().collect();
        if let Err(error) = store.write(&changes) {
            tracing::error!(error = &error as &dyn std::error::Error, sequence = last.0, "the store failed; nothing more is answered");
            return;
        }
        reached.send_replace(last);
    }
}

type Changes = BTreeMap<(&'static str, String, String), Change>;

/// Of several changes of one row only the last is written.
fn merge(mut changes: Changes, commit: Commit) -> Changes {
    for change in commit.changes {
        changes.insert((change.kind, change.account.clone(), change.id.clone()), change);
    }
    changes
}

/// The embedded engine: SQLite in WAL mode, synchronous = FULL.
pub struct Sqlite {
    connection: Connection,
}

const FORMAT: i64 = 1;

impl Sqlite {
    /// Opens or makes the file, and keeps every other process out of it.
    ///
    /// # Errors
    /// When the file is not ours, is newer than this program, or is in use.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match found {
            0 => {
                // Keys begin with the account: the same tables shard by it on other engines.
                connection.execute_batch(
                    "BEGIN;
                     CREATE TABLE rows (account TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, document BLOB NOT NULL,
                                        PRIMARY KEY (account, kind, id)) WITHOUT ROWID;
                     PRAGMA user_version = 1;
                     COMMIT;",
                )?;
            }
            FORMAT => {}
            found => return Err(StoreError::Format { found, known: FORMAT }),
        }
        Ok(Self { connection })
    }
}

impl Store for Sqlite {
    fn load(&mut self, row: &mut TakeRow<'_>) -> Result<(), StoreError> {
        let mut statement = self.connection.prepare("SELECT kind, document FROM rows")?;
        let mut rows = statement.query([])?;
        while let Some(found) = rows.next()? {
            row(found.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?, found.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?)?;
        }
        Ok(())
    }

    fn write(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        {
            let mut put = transaction.prepare_cached(
                "INSERT INTO rows (account, kind, id, document) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (account, kind, id) DO UPDATE SET document = excluded.document",
            )?;
            let mut delete = transaction.prepare_cached("DELETE FROM rows WHERE account = ?1 AND kind = ?2 AND id = ?3")?;
            for change in changes {
                match &change.row {
                    Some(row) => put.execute(params![change.account, change.kind, change.id, row.document()?])?,
                    None => delete.execute(params![change.account, change.kind, change.id])?,
                };
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Counter, REGION};
    use crate::world::{Entropy, Region, World};

    fn world(opened: Opened) -> World {
        World::new(Region::for_tests(), opened.tables, Entropy::Seeded(1), Box::new(opened.writer), opened.durable)
    }

    fn put(world: &World, name: &str, value: u64) -> Sequence {
        let mut tx = world.begin();
        tx.put(Counter { name: name.into(), value });
        tx.commit()
    }

    fn value(world: &World, name: &str) -> Option<u64> {
        world.read(|tx| tx.get::<Counter>(REGION, name).map(|row| row.value)).0
    }

    #[tokio::test]
    async fn durable_rows_are_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        {
            let world = world(open(Sqlite::open(&path).unwrap()).unwrap());
            put(&world, "a", 1);
            put(&world, "b", 1);
            put(&world, "a", 2);
            let mut tx = world.begin();
            tx.delete::<Counter>(REGION, "b");
            world.durable(tx.commit()).await.unwrap();
        }
        // The thread lets go of the file when the queue is empty.
        let store = loop {
            match Sqlite::open(&path) {
                Ok(store) => break store,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        let world = world(open(store).unwrap());
        assert_eq!((value(&world, "a"), value(&world, "b")), (Some(2), None));
    }

    #[test]
    fn two_processes_cannot_open_one_store() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let mut first = Sqlite::open(&path).unwrap();
        first.write(&[]).unwrap();
        let second = Sqlite::open(&path).and_then(|mut store| store.write(&[]));
        assert!(second.is_err());
    }

    #[test]
    fn a_newer_format_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
        assert!(matches!(Sqlite::open(&path), Err(StoreError::Format { found: 9, known: 1 })));
    }

    /// Keeps rows in memory and dies, like a machine without power, at the n-th write.
    struct Dying {
        rows: std::sync::Arc<std::sync::Mutex<BTreeMap<String, Vec<u8>>>>,
        writes_left: u32,
    }

    impl Store for Dying {
        fn load(&mut self, row: &mut TakeRow<'_>) -> Result<(), StoreError> {
            self.rows.lock().unwrap().values().try_for_each(|document| row("counter", document)).map_err(Into::into)
        }

        fn write(&mut self, changes: &[Change]) -> Result<(), StoreError> {
            self.writes_left = self.writes_left.checked_sub(1).ok_or(rusqlite::Error::InvalidQuery)?;
            for change in changes {
                self.rows.lock().unwrap().insert(change.id.clone(), change.row.as_ref().unwrap().document()?);
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn only_confirmed_commits_are_answered_and_all_of_them_survive() {
        for writes_left in 0..4 {
            let rows = std::sync::Arc::default();
            let before = world(open(Dying { rows: std::sync::Arc::clone(&rows), writes_left }).unwrap());
            let mut confirmed = Vec::new();
            for number in 0..6 {
                let sequence = put(&before, &format!("row-{number}"), number);
                if before.durable(sequence).await.is_ok() {
                    confirmed.push(number);
                }
            }
            assert_eq!(confirmed.len(), writes_left as usize);
            let after = world(open(Dying { rows, writes_left }).unwrap());
            for number in 0..6 {
                assert_eq!(value(&after, &format!("row-{number}")).is_some(), confirmed.contains(&number));
            }
        }
    }
}
