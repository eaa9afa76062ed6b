//! The world in memory: typed tables under one lock, changed in transactions.
//!
//! A [`Tx`] sees and changes the tables at once and keeps what it replaced;
//! dropped without [`Tx::commit`] it puts everything back, so an action that
//! returns an error has changed nothing. A commit hands the changed rows, in
//! commit order, to the store and yields a [`Sequence`]; whoever saw the state
//! of that transaction, reader or writer, waits for [`World::durable`] before
//! an answer leaves.
//!
//! Invariants: the lock is never held across an await; indexes and sums are those
//! of the present rows, so that no ledger can differ from what it counts; the store receives commits in the order in
//! which they took effect.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::ops::{Bound, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};

use crate::auth::Principal;
use crate::model::{self, Counter, REGION, Time};

/// Position in the order of commits; 0 is the state at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sequence(pub u64);

/// What a region is, from the settings.
#[derive(Clone, Debug)]
pub struct Region {
    /// `us-east-1`.
    pub name: String,
    /// In the order of the settings.
    pub zones: Vec<Zone>,
    /// Addresses that instances and Elastic IPs are given.
    pub public_pool: RangeInclusive<Ipv4Addr>,
}

/// An availability zone.
#[derive(Clone, Debug)]
pub struct Zone {
    /// `us-east-1a`.
    pub name: String,
    /// `use1-az1`: the same place under the same name for every account.
    pub id: String,
}

impl Region {
    /// The zone of this name.
    pub fn zone(&self, name: &str) -> Option<&Zone> {
        self.zones.iter().find(|zone| zone.name == name)
    }

    /// A region of three zones.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        let zone = |letter: char, number: u8| Zone { name: format!("us-east-1{letter}"), id: format!("use1-az{number}") };
        let public_pool = Ipv4Addr::new(198, 51, 100, 16)..=Ipv4Addr::new(198, 51, 100, 250);
        Self { name: "us-east-1".into(), zones: vec![zone('a', 1), zone('b', 2), zone('c', 3)], public_pool }
    }
}

/// One request of one principal, inside its transaction.
pub struct Call<'a> {
    /// Who asks; only a verified signature makes one.
    pub principal: &'a Principal,
    /// When the request was accepted.
    pub now: Time,
    /// All that is read and written.
    pub tx: Tx<'a>,
    /// The region that answers.
    pub region: &'a Region,
}

impl Call<'_> {
    /// The account that asks.
    pub fn account(&self) -> &str {
        self.principal.account_id()
    }

    /// A row of the asking account.
    pub fn get<R: Row>(&self, id: &str) -> Option<Arc<R>> {
        self.tx.get(self.account(), id)
    }

    /// Every row of the asking account, by id.
    pub fn list<R: Row>(&self) -> impl Iterator<Item = &Arc<R>> {
        self.tx.list(self.account())
    }

    /// The rows of the asking account whose index `name` holds `value`.
    pub fn find<R: Row>(&self, name: &'static str, value: &str) -> Vec<Arc<R>> {
        self.tx.find(self.account(), name, value)
    }
}

/// A type of row: where it stands and under which keys.
pub trait Row: Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Name of the kind in the store.
    const KIND: &'static str;
    /// The owner, or [`REGION`].
    fn account(&self) -> &str;
    /// Unique within (kind, account).
    fn id(&self) -> Cow<'_, str>;
    /// The (index, value) pairs under which [`Tx::find`] finds it.
    fn indexes(&self) -> BTreeSet<Key>;
    /// What it adds to the sums that [`Tx::sum`] reads.
    fn sums(&self) -> Vec<(Key, u64)>;
    /// Its table.
    fn table(tables: &Tables) -> &Table<Self>;
    /// Its table, to change.
    fn table_mut(tables: &mut Tables) -> &mut Table<Self>;
}

/// Name and value of an index or a sum.
pub type Key = (&'static str, String);

/// The rows of one kind, by account, then by id, with what is derived from them.
pub struct Table<R> {
    accounts: BTreeMap<String, BTreeMap<String, Arc<R>>>,
    /// The (account, id) of the rows under each key.
    indexes: HashMap<Key, BTreeSet<(String, String)>>,
    sums: HashMap<Key, u64>,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { accounts: BTreeMap::new(), indexes: HashMap::new(), sums: HashMap::new() }
    }
}

impl<R: Row> Table<R> {
    fn get(&self, account: &str, id: &str) -> Option<&Arc<R>> {
        self.accounts.get(account)?.get(id)
    }

    fn list(&self, account: &str) -> impl Iterator<Item = &Arc<R>> {
        self.accounts.get(account).into_iter().flat_map(BTreeMap::values)
    }

    fn after(&self, account: &str, id: &str) -> impl Iterator<Item = &Arc<R>> {
        let range = (Bound::Excluded(id.to_owned()), Bound::Unbounded);
        self.accounts.get(account).into_iter().flat_map(move |rows| rows.range(range.clone()).map(|(_, row)| row))
    }

    fn all(&self) -> impl Iterator<Item = &Arc<R>> {
        self.accounts.values().flat_map(BTreeMap::values)
    }

    fn find(&self, account: &str, name: &'static str, value: &str) -> Vec<Arc<R>> {
        let Some(ids) = self.indexes.get(&(name, value.to_owned())) else { return Vec::new() };
        let ids = ids.range((account.to_owned(), String::new())..);
        let ids = ids.take_while(|(owner, _)| owner == account);
        ids.filter_map(|(_, id)| self.get(account, id).cloned()).collect()
    }

    fn find_all(&self, name: &'static str, value: &str) -> Vec<Arc<R>> {
        let Some(ids) = self.indexes.get(&(name, value.to_owned())) else { return Vec::new() };
        ids.iter().filter_map(|(account, id)| self.get(account, id).cloned()).collect()
    }

    fn sum(&self, name: &'static str, value: &str) -> u64 {
        self.sums.get(&(name, value.to_owned())).copied().unwrap_or(0)
    }

    /// Puts a row in place and returns the one that it replaced.
    pub(crate) fn insert(&mut self, row: Arc<R>) -> Option<Arc<R>> {
        let (account, id) = (row.account().to_owned(), row.id().into_owned());
        let old = self.remove(&account, &id);
        for key in row.indexes() {
            self.indexes.entry(key).or_default().insert((account.clone(), id.clone()));
        }
        for (key, amount) in row.sums() {
            let sum = self.sums.entry(key).or_default();
            *sum = sum.saturating_add(amount);
        }
        self.accounts.entry(account).or_default().insert(id, row);
        old
    }

    fn remove(&mut self, account: &str, id: &str) -> Option<Arc<R>> {
        let rows = self.accounts.get_mut(account)?;
        let old = rows.remove(id)?;
        if rows.is_empty() {
            self.accounts.remove(account);
        }
        let place = (account.to_owned(), id.to_owned());
        for key in old.indexes() {
            if let Some(ids) = self.indexes.get_mut(&key) {
                ids.remove(&place);
                if ids.is_empty() {
                    self.indexes.remove(&key);
                }
            }
        }
        for (key, amount) in old.sums() {
            if let Some(sum) = self.sums.get_mut(&key) {
                *sum = sum.saturating_sub(amount);
                if *sum == 0 {
                    self.sums.remove(&key);
                }
            }
        }
        Some(old)
    }
}

/// Every table.
#[derive(Default)]
#[allow(missing_docs)] // a table is named after its rows
pub struct Tables {
    pub(crate) accounts: Table<model::Account>,
    pub(crate) access_keys: Table<model::AccessKey>,
    pub(crate) vpcs: Table<model::Vpc>,
    pub(crate) subnets: Table<model::Subnet>,
    pub(crate) internet_gateways: Table<model::InternetGateway>,
    pub(crate) route_tables: Table<model::RouteTable>,
    pub(crate) security_groups: Table<model::SecurityGroup>,
    pub(crate) network_acls: Table<model::NetworkAcl>,
    pub(crate) network_interfaces: Table<model::NetworkInterface>,
    pub(crate) addresses: Table<model::Address>,
    pub(crate) public_ips: Table<model::PublicIp>,
    pub(crate) key_pairs: Table<model::KeyPair>,
    pub(crate) images: Table<model::Image>,
    pub(crate) instances: Table<model::Instance>,
    pub(crate) volumes: Table<model::Volume>,
    pub(crate) tags: Table<model::Tags>,
    pub(crate) client_tokens: Table<model::ClientToken>,
    pub(crate) dhcp_options: Table<model::DhcpOptions>,
    pub(crate) cards: Table<model::Card>,
    pub(crate) counters: Table<model::Counter>,
    pub(crate) card_objects: Table<model::CardObject>,
    pub(crate) events: Table<model::Event>,
    pub(crate) prefix_lists: Table<model::PrefixList>,
    pub(crate) prefix_list_versions: Table<model::PrefixListVersion>,
    pub(crate) nat_gateways: Table<model::NatGateway>,
    pub(crate) vpc_peering_connections: Table<model::VpcPeeringConnection>,
}

/// Why a stored document was not understood.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LoadError {
    #[error("no table for rows of kind {0:?}")]
    Kind(String),
    #[error("a stored document does not parse")]
    Document(#[from] serde_json::Error),
}

/// A row as the store keeps it.
pub trait Document: Send + Sync {
    /// JSON.
    ///
    /// # Errors
    /// When the row has no JSON form, which none of ours lacks.
    fn document(&self) -> serde_json::Result<Vec<u8>>;
}

impl<R: Row> Document for R {
    fn document(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

/// One changed row of a commit; no document: it was deleted.
pub struct Change {
    /// [`Row::KIND`].
    pub kind: &'static str,
    /// [`Row::account`].
    pub account: String,
    /// [`Row::id`].
    pub id: String,
    /// The new content.
    pub row: Option<Arc<dyn Document>>,
}

/// The rows that one transaction changed, with its place in the order.
pub struct Commit {
    /// 1 and up, without gaps.
    pub sequence: Sequence,
    /// Each row once.
    pub changes: Vec<Change>,
}

/// Who makes commits durable. Called under the world's lock, so it must only enqueue.
pub trait Sink: Send {
    /// Takes a commit; they come in order.
    fn accept(&mut self, commit: Commit);
}

/// Keeps nothing: for worlds that live no longer than a test or a simulation.
pub struct Forget {
    durable: watch::Sender<Sequence>,
}

impl Sink for Forget {
    fn accept(&mut self, commit: Commit) {
        self.durable.send_replace(commit.sequence);
    }
}

/// Where random ids come from.
pub enum Entropy {
    /// The operating system.
    System,
    /// A seed, so that a simulation replays (SplitMix64).
    Seeded(u64),
}

impl Entropy {
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        let state = match self {
            Self::System => match getrandom::fill(out) {
                Ok(()) => return,
                // A kernel without entropy cannot make ids that are unique: stop before any harm.
                Err(error) => {
                    tracing::error!(%error, "the operating system gives no random bytes");
                    std::process::abort();
                }
            },
            Self::Seeded(state) => state,
        };
        for chunk in out.chunks_mut(8) {
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = *state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            for (to, from) in chunk.iter_mut().zip((z ^ (z >> 31)).to_le_bytes()) {
                *to = from;
            }
        }
    }
}

struct State {
    tables: Tables,
    sequence: Sequence,
    sink: Box<dyn Sink>,
    entropy: Entropy,
    /// Rows changed since the reconciler last looked.
    dirty: Dirty,
}

/// A row that changed: (kind, account, id).
pub type DirtyRow = (&'static str, String, String);

/// Rows that changed, each with the keys under which it was found before, in between and after: what a deleted row belonged to is
/// known only from these.
pub type Dirty = BTreeMap<DirtyRow, BTreeSet<Key>>;

/// The world: shared by every request, the reconciler and the cards' tasks.
pub struct World {
    region: Region,
    state: Mutex<State>,
    durable: watch::Receiver<Sequence>,
    wake: Notify,
}

/// The store stopped: what was changed last may be lost, and nothing more is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store takes no more writes")]
pub struct StoreGone;

impl World {
    /// A world of these tables; `durable` tells how far `sink` has come.
    pub fn new(region: Region, tables: Tables, entropy: Entropy, sink: Box<dyn Sink>, durable: watch::Receiver<Sequence>) -> Self {
        let state = State { tables, sequence: Sequence(0), sink, entropy, dirty: Dirty::new() };
        Self { region, state: Mutex::new(state), durable, wake: Notify::new() }
    }

    /// A world without a store, whose ids follow from the seed.
    pub fn in_memory(region: Region, seed: u64) -> Self {
        let (sender, receiver) = watch::channel(Sequence(0));
        Self::new(region, Tables::default(), Entropy::Seeded(seed), Box::new(Forget { durable: sender }), receiver)
    }

    /// The region that this world is.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Opens a transaction; others wait until it is dropped or committed. A thread that has one open on this world would wait for
    /// itself, so that is refused by a panic.
    pub fn begin(&self) -> Tx<'_> {
        let place = std::ptr::from_ref(&self.state).addr();
        assert!(OPEN.get() != place, "a transaction inside a transaction");
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let outer = OPEN.replace(place);
        Tx { state: Some(state), undo: Vec::new(), changed: BTreeMap::new(), dirty: Dirty::new(), wake: &self.wake, outer }
    }

    /// Runs one action of a principal: committed when it returns Ok, undone
    /// otherwise. The sequence is what the answer must wait for, in both cases.
    pub fn call<T, E>(
        &self,
        principal: &Principal,
        now: Time,
        action: impl FnOnce(&mut Call<'_>) -> Result<T, E>,
    ) -> (Result<T, E>, Sequence) {
        let mut call = Call { principal, now, tx: self.begin(), region: &self.region };
        let result = action(&mut call);
        let Call { tx, .. } = call;
        let sequence = if result.is_ok() { tx.commit() } else { tx.seen() };
        (result, sequence)
    }

    /// Runs `action` in a transaction of its own, for whoever is no tenant.
    pub fn transact<T, E>(&self, action: impl FnOnce(&mut Tx<'_>) -> Result<T, E>) -> (Result<T, E>, Sequence) {
        let mut tx = self.begin();
        let result = action(&mut tx);
        let sequence = if result.is_ok() { tx.commit() } else { tx.seen() };
        (result, sequence)
    }

    /// Reads; whatever `action` changes is undone.
    pub fn read<T>(&self, action: impl FnOnce(&Tx<'_>) -> T) -> (T, Sequence) {
        let tx = self.begin();
        let result = action(&tx);
        let sequence = tx.seen();
        (result, sequence)
    }

    /// Waits until everything up to `sequence` survives a crash.
    ///
    /// # Errors
    /// [`StoreGone`] when the store stopped before.
    pub async fn durable(&self, sequence: Sequence) -> Result<(), StoreGone> {
        // Mostly nothing is on its way to the store.
        if sequence <= *self.durable.borrow() {
            return Ok(());
        }
        let mut durable = self.durable.clone();
        durable.wait_for(|reached| *reached >= sequence).await.map(|_| ()).map_err(|_| StoreGone)
    }

    /// Returns when something was committed after the last [`World::take_dirty`].
    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// The rows that changed since the last call.
    pub fn take_dirty(&self) -> Dirty {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.dirty)
    }
}

type Undo = Box<dyn FnOnce(&mut Tables)>;
type RowOf = fn(&Tables, &str, &str) -> Option<Arc<dyn Document>>;

/// An open transaction.
pub struct Tx<'a> {
    /// None only after the end.
    state: Option<MutexGuard<'a, State>>,
    undo: Vec<Undo>,
    changed: BTreeMap<DirtyRow, RowOf>,
    /// What [`Tx::take_dirty`] has not taken.
    dirty: Dirty,
    wake: &'a Notify,
    /// What [`OPEN`] was before.
    outer: usize,
}

thread_local! {
    /// The world on which this thread has a transaction open, 0: none.
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

impl Tx<'_> {
    /// A row.
    pub fn get<R: Row>(&self, account: &str, id: &str) -> Option<Arc<R>> {
        R::table(self.tables()?).get(account, id).cloned()
    }

    /// Every row of an account, by id.
    pub fn list<R: Row>(&self, account: &str) -> impl Iterator<Item = &Arc<R>> {
        self.tables().into_iter().flat_map(move |tables| R::table(tables).list(account))
    }

    /// The rows of an account whose ids come after `id`, by id.
    pub fn after<R: Row>(&self, account: &str, id: &str) -> impl Iterator<Item = &Arc<R>> {
        self.tables().into_iter().flat_map(move |tables| R::table(tables).after(account, id))
    }

    /// Every row of every account, by account, then by id.
    pub fn all<R: Row>(&self) -> impl Iterator<Item = &Arc<R>> {
        self.tables().into_iter().flat_map(|tables| R::table(tables).all())
    }

    /// The rows of an account whose index `name` (see `model.rs`) holds `value`, by id.
    pub fn find<R: Row>(&self, account: &str, name: &'static str, value: &str) -> Vec<Arc<R>> {
        self.tables().map(|tables| R::table(tables).find(account, name, value)).unwrap_or_default()
    }

    /// The rows of every account whose index `name` holds `value`, by account, then by id.
    pub fn find_all<R: Row>(&self, name: &'static str, value: &str) -> Vec<Arc<R>> {
        self.tables().map(|tables| R::table(tables).find_all(name, value)).unwrap_or_default()
    }

    /// What the rows of every account add up to under the sum `name` (see `model.rs`) of `value`.
    pub fn sum<R: Row>(&self, name: &'static str, value: &str) -> u64 {
        self.tables().map(|tables| R::table(tables).sum(name, value)).unwrap_or_default()
    }

    /// Inserts a row or replaces the one with its key.
    pub fn put<R: Row>(&mut self, row: R) {
        let (account, id, keys) = (row.account().to_owned(), row.id().into_owned(), row.indexes());
        let Some(state) = self.state.as_mut() else { return };
        let old = R::table_mut(&mut state.tables).insert(Arc::new(row));
        self.note::<R>(account, id, old, keys);
    }

    /// Changes a row in place; says whether it was there.
    pub fn update<R: Row>(&mut self, account: &str, id: &str, change: impl FnOnce(&mut R)) -> bool {
        let Some(row) = self.get::<R>(account, id) else { return false };
        let mut row = R::clone(&row);
        change(&mut row);
        self.put(row);
        true
    }

    /// Deletes a row and returns it.
    pub fn delete<R: Row>(&mut self, account: &str, id: &str) -> Option<Arc<R>> {
        let state = self.state.as_mut()?;
        let old = R::table_mut(&mut state.tables).remove(account, id)?;
        self.note::<R>(account.to_owned(), id.to_owned(), Some(old.clone()), BTreeSet::new());
        Some(old)
    }

    /// Raises a counter and returns its new value; the first is 1.
    pub fn counter_next(&mut self, name: &str) -> u64 {
        let value = self.get::<Counter>(REGION, name).map_or(0, |counter| counter.value).saturating_add(1);
        self.put(Counter { name: name.to_owned(), value });
        value
    }

    /// A fresh id: the prefix, a dash and 17 hexadecimal digits.
    pub fn new_id(&mut self, prefix: &str) -> String {
        let digits = hex::encode(self.random::<9>());
        format!("{prefix}-{}", digits.get(..17).unwrap_or(&digits))
    }

    /// Random bytes.
    pub fn random<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(state) = self.state.as_mut() {
            state.entropy.fill(&mut bytes);
        }
        bytes
    }

    /// Keeps everything and returns this transaction's place in the order.
    pub fn commit(self) -> Sequence {
        self.end(true)
    }

    /// The rows that this transaction changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// As [`Tx::commit`], for the reconciler, which has already looked at what it changed itself.
    pub fn commit_reconciled(self) -> Sequence {
        self.end(false)
    }

    fn end(mut self, wake: bool) -> Sequence {
        let Some(mut state) = self.state.take() else { return Sequence(0) };
        self.undo.clear();
        if self.changed.is_empty() {
            return state.sequence;
        }
        let sequence = Sequence(state.sequence.0.saturating_add(1));
        state.sequence = sequence;
        let changes = self.changed.iter().map(|((kind, account, id), row)| Change {
            kind,
            account: account.clone(),
            id: id.clone(),
            row: row(&state.tables, account, id),
        });
        let commit = Commit { sequence, changes: changes.collect() };
        state.sink.accept(commit);
        if wake {
            for (row, keys) in std::mem::take(&mut self.dirty) {
                state.dirty.entry(row).or_default().extend(keys);
            }
            self.wake.notify_one();
        }
        sequence
    }

    /// The newest commit that this transaction saw.
    pub fn seen(&self) -> Sequence {
        self.state.as_ref().map_or(Sequence(0), |state| state.sequence)
    }

    fn tables(&self) -> Option<&Tables> {
        self.state.as_ref().map(|state| &state.tables)
    }

    /// Notes that a row changed, which stands under `keys` now.
    fn note<R: Row>(&mut self, account: String, id: String, old: Option<Arc<R>>, keys: BTreeSet<Key>) {
        let row_of: RowOf = |tables, account, id| {
            let row: Arc<dyn Document> = R::table(tables).get(account, id)?.clone();
            Some(row)
        };
        let row = (R::KIND, account.clone(), id.clone());
        let before = old.iter().flat_map(|old| old.indexes());
        self.dirty.entry(row.clone()).or_default().extend(keys.into_iter().chain(before));
        self.changed.insert(row, row_of);
        self.undo.push(Box::new(move |tables| {
            let table = R::table_mut(tables);
            match old {
                Some(row) => table.insert(row),
                None => table.remove(&account, &id),
            };
        }));
    }
}

impl Drop for Tx<'_> {
    fn drop(&mut self) {
        OPEN.set(self.outer);
        let Some(state) = self.state.as_mut() else { return };
        while let Some(undo) = self.undo.pop() {
            undo(&mut state.tables);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InternetGateway, PublicIp};

    fn gateway(id: &str, vpc: Option<&str>) -> InternetGateway {
        InternetGateway { account_id: "1".into(), id: id.into(), vpc_id: vpc.map(Into::into) }
    }

    fn attached(world: &World, vpc: &str) -> Vec<String> {
        world.read(|tx| tx.find::<InternetGateway>("1", "vpc", vpc).iter().map(|row| row.id.clone()).collect()).0
    }

    #[test]
    fn an_error_puts_rows_indexes_and_counters_back() {
        let world = World::in_memory(Region::for_tests(), 1);
        let mut tx = world.begin();
        tx.put(gateway("igw-1", Some("vpc-1")));
        tx.commit();
        let (result, _) = world.transact(|tx| {
            tx.put(gateway("igw-2", Some("vpc-1")));
            tx.update::<InternetGateway>("1", "igw-1", |row| row.vpc_id = Some("vpc-2".into()));
            tx.delete::<InternetGateway>("1", "igw-1");
            tx.counter_next("vni");
            Err::<(), _>("no")
        });
        assert_eq!(result, Err("no"));
        assert_eq!(attached(&world, "vpc-1"), ["igw-1"]);
        assert!(attached(&world, "vpc-2").is_empty());
        assert!(world.read(|tx| tx.get::<Counter>(REGION, "vni")).0.is_none());
    }

    #[test]
    fn a_panic_in_a_transaction_undoes_it_and_the_world_goes_on() {
        let world = World::in_memory(Region::for_tests(), 1);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut tx = world.begin();
            tx.put(gateway("igw-1", None));
            panic!("a mistake of ours");
        }));
        assert!(result.is_err());
        assert_eq!(world.read(|tx| tx.all::<InternetGateway>().count()).0, 0);
    }

    #[test]
    #[should_panic(expected = "inside")]
    fn a_nested_transaction_is_refused_rather_than_waited_for() {
        let world = World::in_memory(Region::for_tests(), 1);
        let _outer = world.begin();
        world.begin();
    }

    #[test]
    fn accounts_do_not_see_each_other() {
        let world = World::in_memory(Region::for_tests(), 1);
        let mut tx = world.begin();
        tx.put(gateway("igw-1", Some("vpc-1")));
        assert!(tx.get::<InternetGateway>("2", "igw-1").is_none());
        assert!(tx.find::<InternetGateway>("2", "vpc", "vpc-1").is_empty());
        assert_eq!(tx.list::<InternetGateway>("2").count(), 0);
        assert_eq!(tx.find_all::<InternetGateway>("vpc", "vpc-1").len(), 1);
    }

    #[test]
    fn commits_reach_the_store_in_order_with_each_row_once() {
        struct Record(std::sync::mpsc::Sender<Commit>);
        impl Sink for Record {
            fn accept(&mut self, commit: Commit) {
                self.0.send(commit).unwrap();
            }
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let (_durable, reached) = watch::channel(Sequence(0));
        let world = World::new(Region::for_tests(), Tables::default(), Entropy::Seeded(1), Box::new(Record(sender)), reached);
        for _ in 0..3 {
            let mut tx = world.begin();
            let value = tx.counter_next("vni");
            tx.put(PublicIp { ip: Ipv4Addr::LOCALHOST, account_id: "1".into(), holder: format!("eni-{value}") });
            tx.put(PublicIp { ip: Ipv4Addr::LOCALHOST, account_id: "1".into(), holder: "eni-last".into() });
            tx.commit();
        }
        assert_eq!(world.begin().commit(), Sequence(3), "a transaction without a change is no commit");
        drop(world);
        let commits: Vec<Commit> = receiver.iter().collect();
        assert_eq!(commits.iter().map(|commit| commit.sequence.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(commits.iter().all(|commit| commit.changes.len() == 2));
        assert_eq!(world_dirty_kinds(&commits), ["counter", "public_ip"]);
    }

    fn world_dirty_kinds(commits: &[Commit]) -> Vec<&'static str> {
        let kinds: BTreeSet<_> = commits.iter().flat_map(|commit| commit.changes.iter().map(|change| change.kind)).collect();
        kinds.into_iter().collect()
    }

    #[test]
    fn ids_are_a_prefix_and_seventeen_digits() {
        let world = World::in_memory(Region::for_tests(), 1);
        let mut tx = world.begin();
        let (a, b) = (tx.new_id("i"), tx.new_id("i"));
        assert_ne!(a, b);
        assert!(a.starts_with("i-") && a.len() == 19);
    }
}
