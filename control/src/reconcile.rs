//! The loop that makes the cards agree with the rows, and the rows with the cards.
//!
//! [`Core`] is a plain state machine: events of the cards go in, and each
//! [`Core::step`] is one transaction that
//! 1. takes what the cards report into the rows (pending becomes running, ...),
//! 2. computes what each touched card shall hold, gives every object whose content changed a new generation, and
//! 3. says what to send, which may leave only after the transaction is durable.
//!
//! There is no second mechanism: a launch, a rule change, a card that comes back
//! after a day and a restart of control all end in the same comparison.
//!
//! Invariants: an object is sent only after the row with its generation is
//! durable, so generations never fall; generations come from one counter, so an
//! object that goes and returns does not fall either; the row of an object
//! stays until the card has forgotten the object; an instance leaves stopping and
//! shutting-down only when no row of its objects is left on its card.

mod desired;
#[cfg(test)]
pub(crate) mod testbed;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use card_proto::card;
use tokio::sync::mpsc;

pub(crate) use desired::rule;
pub use desired::{Object, ObjectKey};

use crate::event;
use crate::model::{
    AttachmentState, Card, CardObject, ClientToken, Counter, Instance, InstanceState, KeyPair, NetworkAcl, NetworkInterface, ObjectKind,
    REGION, Tags, Time, Volume, VolumeState,
};
use crate::resource::{client_token, instance, tag, volume};
use crate::world::{DirtyRow, Row as _, Sequence, StoreGone, Tx, World};

const GENERATION: &str = "generation";
const EPOCH: &str = "epoch";

/// Raises the fencing epoch: from now on cards refuse whoever controlled them before. It is never below the Unix time, so that a
/// control plane whose store was lost is not fenced off for ever by its own past.
///
/// # Errors
/// [`StoreGone`].
pub async fn take_over(world: &World, now: Time) -> Result<u64, StoreGone> {
    let mut tx = world.begin();
    let value = tx.counter_next(EPOCH).max(now.seconds());
    tx.put(Counter { name: EPOCH.to_owned(), value });
    world.durable(tx.commit()).await?;
    Ok(value)
}

/// What comes from a card.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A message of its watch stream; the first is Hello.
    Event(card::event::Event),
    /// The watch stream ended.
    Gone,
    /// The card has stored (or forgotten) this generation durably.
    Accepted(ObjectKey, u64),
    /// The card will never take this generation.
    Refused(ObjectKey, u64, String),
    /// The card was given something newer, by us or by who controls it now.
    Outdated(ObjectKey, u64, String),
}

/// What goes to a card.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Operation {
    Put(Box<Object>),
    Delete(ObjectKey, u64),
}

impl Operation {
    /// The object that it is about.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Put(object) => object.key(),
            Self::Delete(key, _) => key.clone(),
        }
    }

    /// The generation that it carries.
    pub fn generation(&self) -> u64 {
        match self {
            Self::Put(object) => object.generation(),
            Self::Delete(_, generation) => *generation,
        }
    }
}

/// What a step wants done, once everything up to `sequence` is durable.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Step {
    pub sequence: Sequence,
    pub operations: Vec<(String, Operation)>,
}

/// The state machine. It holds only what the cards told since they connected.
#[derive(Default)]
pub struct Core {
    cards: BTreeMap<String, View>,
    /// Which cards hold objects of an account, so that a change of a row finds them.
    holders: BTreeMap<String, BTreeSet<String>>,
    touched: BTreeSet<String>,
    started: bool,
}

/// One card, since it connected.
#[derive(Default)]
struct View {
    /// It has told everything that it holds.
    synced: bool,
    /// What it holds, with the newest status.
    reported: BTreeMap<ObjectKey, card::Status>,
    /// The newest generation that was handed out for sending.
    sent: BTreeMap<ObjectKey, u64>,
    accepted: BTreeMap<ObjectKey, u64>,
    /// Puts that it may have taken without a status so far, with their generation.
    maybe: BTreeMap<ObjectKey, u64>,
    refused: BTreeMap<ObjectKey, (u64, String)>,
    /// The accounts that have objects on it.
    accounts: BTreeSet<String>,
}

impl Core {
    /// Takes one event of a card. Rows that follow from it alone (what the card is, whether it is watched) are written here.
    pub fn input(&mut self, tx: &mut Tx<'_>, now: Time, card_id: &str, input: Input) {
        let view = self.cards.entry(card_id.to_owned()).or_default();
        match input {
            Input::Event(card::event::Event::Hello(hello)) => self.hello(tx, card_id, hello),
            Input::Event(card::event::Event::Status(status)) => {
                if let Some(key) = object_key(status.kind(), &status.id) {
                    view.maybe.remove(&key);
                    view.reported.insert(key, status);
                }
            }
            Input::Event(card::event::Event::Gone(gone)) => {
                if let Some(key) = object_key(gone.kind(), &gone.id) {
                    if view.maybe.get(&key).is_some_and(|put| *put <= gone.generation) {
                        view.maybe.remove(&key);
                    }
                    if view.reported.get(&key).is_some_and(|status| status.generation <= gone.generation) {
                        view.reported.remove(&key);
                    }
                    // It may have forgotten the object before it took the newest Put: then that is sent again.
                    if view.accepted.get(&key).is_none_or(|accepted| *accepted <= gone.generation) {
                        view.sent.remove(&key);
                    }
                }
            }
            Input::Event(card::event::Event::Synced(_)) => {
                view.synced = true;
                set_watched(tx, now, card_id, true);
                tracing::info!(card = card_id, objects = view.reported.len(), "card is watched");
            }
            Input::Gone => {
                *view = View { accounts: std::mem::take(&mut view.accounts), ..View::default() };
                set_watched(tx, now, card_id, false);
            }
            Input::Accepted(key, generation) => {
                let accepted = view.accepted.entry(key).or_default();
                *accepted = generation.max(*accepted);
            }
            Input::Refused(key, generation, message) => {
                tracing::error!(card = card_id, kind = ?key.0, id = key.1, generation, message, "card refuses an object");
                if view.maybe.get(&key) == Some(&generation) {
                    view.maybe.remove(&key);
                }
                view.refused.insert(key, (generation, message));
            }
            Input::Outdated(key, generation, message) => {
                // Normal when a newer operation overtook this one; when it did not, the next connection compares all again.
                if view.sent.get(&key) == Some(&generation) {
                    tracing::error!(card = card_id, kind = ?key.0, id = key.1, generation, message, "card was told something newer");
                }
            }
        }
        self.touched.insert(card_id.to_owned());
    }

    fn hello(&mut self, tx: &mut Tx<'_>, card_id: &str, hello: card::Hello) {
        let old = tx.get::<Card>(REGION, card_id);
        let new = Card {
            id: card_id.to_owned(),
            zone: hello.zone,
            compute: hello.compute,
            storage: hello.storage,
            underlay_ip: hello.underlay_ipv4.into(),
            storage_address: hello.storage_address,
            initiator_nqn: hello.initiator_nqn,
            storage_bytes: hello.storage_bytes,
            // While its host is away a card cannot say what it has; what it had is still claimed.
            cores: if hello.host_connected { hello.cores } else { old.as_ref().map_or(0, |old| old.cores) },
            memory_bytes: if hello.host_connected { hello.memory_bytes } else { old.as_ref().map_or(0, |old| old.memory_bytes) },
            host_connected: hello.host_connected,
            machine: hello.machine,
            watched: old.as_ref().is_some_and(|old| old.watched),
            watched_since: old.as_ref().map_or(Time(0), |old| old.watched_since),
        };
        let same_place = old.as_ref().is_some_and(|old| {
            old.underlay_ip == new.underlay_ip && old.storage_address == new.storage_address && old.initiator_nqn == new.initiator_nqn
        });
        if !same_place {
            // Others were told where this card is.
            self.touched.extend(self.cards.keys().cloned());
        }
        if old.is_none_or(|old| *old != new) {
            tracing::info!(
                card = card_id,
                zone = new.zone,
                cores = new.cores,
                memory_bytes = new.memory_bytes,
                host_connected = new.host_connected,
                machine = new.machine,
                "card"
            );
            tx.put(new);
        }
    }

    /// Brings rows and cards nearer to each other; call it after inputs and commits.
    pub fn step(&mut self, mut tx: Tx<'_>, dirty: &BTreeSet<DirtyRow>, now: Time, region: &crate::world::Region) -> Step {
        self.touch(&tx, dirty);
        let mut wanted = BTreeMap::new();
        // What is taken from one card can touch another: a machine that stopped leaves the networks of all.
        while let Some(card_id) = self.touched.pop_first() {
            self.digest(&mut tx, now, &card_id);
            let objects = desired::objects(&tx, region, &card_id);
            self.plan(&mut tx, &card_id, &objects);
            wanted.insert(card_id, objects);
        }
        let mut operations = Vec::new();
        for (card_id, objects) in wanted {
            let view = self.cards.entry(card_id.clone()).or_default();
            if view.synced {
                let rows = tx.find::<CardObject>(REGION, "card", &card_id);
                operations.extend(view.operations(&rows, objects).into_iter().map(|operation| (card_id.clone(), operation)));
            }
        }
        Step { sequence: tx.commit_reconciled(), operations }
    }

    /// Finds the cards that changed rows are about.
    fn touch(&mut self, tx: &Tx<'_>, dirty: &BTreeSet<DirtyRow>) {
        if !self.started {
            self.started = true;
            self.touched.extend(tx.all::<Card>().map(|card| card.id.clone()));
            self.touched.extend(tx.all::<CardObject>().map(|row| row.card_id.clone()));
            self.touched.extend(tx.all::<Instance>().filter_map(|row| row.placement.as_ref()).map(|placement| placement.card_id.clone()));
            self.touched.extend(tx.all::<Volume>().map(|row| row.card_id.clone()));
        }
        let mut accounts = BTreeSet::new();
        for (kind, account, id) in dirty {
            match *kind {
                Tags::KIND => self.touch_object(tx, account, id),
                Volume::KIND => {
                    self.touch_object(tx, account, id);
                    if let Some(row) = tx.get::<Volume>(account, id) {
                        self.touched.insert(row.card_id.clone());
                        if let Some(attachment) = &row.attachment {
                            self.touch_object(tx, account, &attachment.instance_id);
                        }
                    }
                }
                // Rows that no object is made of, and those that only this loop writes.
                ClientToken::KIND | KeyPair::KIND | NetworkAcl::KIND | CardObject::KIND => {}
                _ if account == REGION => {}
                _ => {
                    accounts.insert(account);
                }
            }
        }
        for account in accounts {
            self.touch_account(tx, account);
        }
    }

    /// Touches the cards that hold, or shall hold, an object of this id.
    fn touch_object(&mut self, tx: &Tx<'_>, account: &str, id: &str) {
        self.touched.extend(tx.find_all::<CardObject>("object", id).iter().map(|row| row.card_id.clone()));
        let row = tx.get::<Instance>(account, id);
        self.touched.extend(row.and_then(|row| row.placement.as_ref().map(|placement| placement.card_id.clone())));
    }

    /// Touches every card that has to do with an account: a change of its network is in the picture of all of them.
    fn touch_account(&mut self, tx: &Tx<'_>, account: &str) {
        let held = self.holders.get(account).into_iter().flatten().cloned();
        let placed = tx.list::<Instance>(account).filter_map(|row| row.placement.as_ref()).map(|placement| placement.card_id.clone());
        let stored = tx.list::<Volume>(account).map(|row| row.card_id.clone());
        let cards: Vec<String> = held.chain(placed).chain(stored).collect();
        self.touched.extend(cards);
    }

    /// Takes what a card reported into the rows.
    fn digest(&mut self, tx: &mut Tx<'_>, now: Time, card_id: &str) {
        let view = self.cards.entry(card_id.to_owned()).or_default();
        view.forget(tx, card_id);
        let mut changed = BTreeSet::new();
        for row in tx.find_all::<Volume>("card", card_id) {
            if digest_volume(tx, view, card_id, &row) {
                changed.insert(row.account_id.clone());
            }
        }
        for row in tx.find_all::<Instance>("card", card_id) {
            if digest_disks(tx, view, card_id, &row) | digest_instance(tx, view, now, card_id, &row) {
                changed.insert(row.account_id.clone());
            }
        }
        for row in tx.find_all::<Instance>("leaving", "") {
            instance::terminated(tx, now, &row);
            changed.insert(row.account_id.clone());
        }
        for account in changed {
            self.touch_account(tx, &account);
        }
    }

    /// Gives every object of a card whose content changed a new generation.
    fn plan(&mut self, tx: &mut Tx<'_>, card_id: &str, objects: &BTreeMap<ObjectKey, Object>) {
        let view = self.cards.entry(card_id.to_owned()).or_default();
        let rows: BTreeMap<ObjectKey, Arc<CardObject>> =
            tx.find::<CardObject>(REGION, "card", card_id).into_iter().map(|row| ((row.kind, row.id.clone()), row)).collect();
        let unknown = view.reported.keys().filter(|_| view.synced);
        let keys: BTreeSet<&ObjectKey> = objects.keys().chain(rows.keys()).chain(unknown).collect();
        for key in keys {
            let content = objects.get(key).map(Object::content_hash);
            let row = rows.get(key);
            let reported = view.reported.get(key).map_or(0, |status| status.generation);
            // A card that is ahead of the rows was told so by a control plane whose store is lost: outbid it.
            let current = row.is_some_and(|row| row.content == content && reported <= row.generation);
            if current {
                continue;
            }
            let generation = next_generation(tx, reported);
            tx.put(CardObject { card_id: card_id.to_owned(), kind: key.0, id: key.1.clone(), generation, content });
        }
        let held = tx.find::<CardObject>(REGION, "card", card_id);
        let accounts = held.iter().filter_map(|row| owner(tx, row)).collect();
        self.hold(card_id, accounts);
    }

    /// Notes which accounts have objects on a card.
    fn hold(&mut self, card_id: &str, accounts: BTreeSet<String>) {
        let view = self.cards.entry(card_id.to_owned()).or_default();
        for account in view.accounts.difference(&accounts) {
            if let Some(cards) = self.holders.get_mut(account) {
                cards.remove(card_id);
                if cards.is_empty() {
                    self.holders.remove(account);
                }
            }
        }
        for account in accounts.difference(&view.accounts) {
            self.holders.entry(account.clone()).or_default().insert(card_id.to_owned());
        }
        view.accounts = accounts;
    }
}

impl View {
    /// Drops the rows of objects that the card was told to forget and no longer holds.
    fn forget(&mut self, tx: &mut Tx<'_>, card_id: &str) {
        if !self.synced {
            return;
        }
        for row in tx.find::<CardObject>(REGION, "card", card_id) {
            let key = (row.kind, row.id.clone());
            let told = self.accepted.get(&key).is_some_and(|accepted| row.generation <= *accepted);
            if row.content.is_none() && told && !self.reported.contains_key(&key) && !self.maybe.contains_key(&key) {
                tx.delete::<CardObject>(REGION, &row.row_key());
                self.sent.remove(&key);
                self.accepted.remove(&key);
                self.refused.remove(&key);
            }
        }
    }

    /// What the card was not told yet.
    fn operations(&mut self, rows: &[Arc<CardObject>], mut objects: BTreeMap<ObjectKey, Object>) -> Vec<Operation> {
        let mut operations = Vec::new();
        for row in rows {
            let key = (row.kind, row.id.clone());
            if self.sent.get(&key).is_some_and(|sent| row.generation <= *sent) {
                continue;
            }
            let holds = self.reported.get(&key).is_some_and(|status| status.generation == row.generation);
            let operation = match objects.remove(&key) {
                Some(_) if holds => None,
                Some(object) => {
                    self.maybe.insert(key.clone(), row.generation);
                    Some(Operation::Put(Box::new(object.with_generation(row.generation))))
                }
                None => Some(Operation::Delete(key.clone(), row.generation)),
            };
            self.sent.insert(key, row.generation);
            operations.extend(operation);
        }
        operations
    }

    /// The phase of an object, if the card speaks of the newest generation that it was given.
    fn phase(&self, tx: &Tx<'_>, card_id: &str, kind: ObjectKind, id: &str) -> Option<card::Phase> {
        let row = tx.get::<CardObject>(REGION, &CardObject::row_id(card_id, kind, id))?;
        let key = (kind, id.to_owned());
        if self.refused.get(&key).is_some_and(|(refused, _)| *refused == row.generation) {
            return Some(card::Phase::Failed);
        }
        let status = self.reported.get(&key)?;
        (row.content.is_some() && status.generation == row.generation).then(|| status.phase())
    }

    /// Why an object failed.
    fn message(&self, kind: ObjectKind, id: &str) -> &str {
        let key = (kind, id.to_owned());
        let refused = self.refused.get(&key).map(|(_, message)| message.as_str());
        refused.or(self.reported.get(&key).map(|status| status.message.as_str())).unwrap_or_default()
    }
}

impl CardObject {
    fn row_key(&self) -> String {
        Self::row_id(&self.card_id, self.kind, &self.id)
    }
}

fn next_generation(tx: &mut Tx<'_>, above: u64) -> u64 {
    let next = tx.counter_next(GENERATION);
    if above < next {
        return next;
    }
    let value = above.saturating_add(1);
    tx.put(Counter { name: GENERATION.to_owned(), value });
    value
}

/// The account whose rows an object on a card comes from.
fn owner(tx: &Tx<'_>, row: &CardObject) -> Option<String> {
    // Only a few kinds, each found by its globally unique id.
    match row.kind {
        ObjectKind::Instance => tx.find_all::<Instance>("id", &row.id).first().map(|row| row.account_id.clone()),
        ObjectKind::Port => tx.find_all::<NetworkInterface>("id", &row.id).first().map(|row| row.account_id.clone()),
        ObjectKind::Disk | ObjectKind::Volume => tx.find_all::<Volume>("id", &row.id).first().map(|row| row.account_id.clone()),
        ObjectKind::Network => tx.find_all::<crate::model::Vpc>("id", &row.id).first().map(|row| row.account_id.clone()),
        ObjectKind::NatGateway => None,
    }
}

fn object_key(kind: card::Kind, id: &str) -> Option<ObjectKey> {
    let kind = match kind {
        card::Kind::Instance => ObjectKind::Instance,
        card::Kind::Port => ObjectKind::Port,
        card::Kind::Disk => ObjectKind::Disk,
        card::Kind::Volume => ObjectKind::Volume,
        card::Kind::Network => ObjectKind::Network,
        card::Kind::NatGateway => ObjectKind::NatGateway,
        card::Kind::Unspecified => return None,
    };
    Some((kind, id.to_owned()))
}

fn set_watched(tx: &mut Tx<'_>, now: Time, card_id: &str, watched: bool) {
    if tx.get::<Card>(REGION, card_id).is_some_and(|card| card.watched != watched) {
        tx.update::<Card>(REGION, card_id, |card| {
            card.watched = watched;
            card.watched_since = now;
        });
    }
}

fn holds(tx: &Tx<'_>, card_id: &str, kind: ObjectKind, id: &str) -> bool {
    tx.get::<CardObject>(REGION, &CardObject::row_id(card_id, kind, id)).is_some()
}

/// Moves a volume by what its storage card says; says whether the row changed.
fn digest_volume(tx: &mut Tx<'_>, view: &View, card_id: &str, row: &Volume) -> bool {
    let (account, id) = (row.account_id.as_str(), row.id.as_str());
    match (row.state, view.phase(tx, card_id, ObjectKind::Volume, id)) {
        (VolumeState::Creating, Some(card::Phase::Ready)) => {
            let state = if row.attachment.is_some() { VolumeState::InUse } else { VolumeState::Available };
            tx.update::<Volume>(account, id, |row| row.state = state)
        }
        (VolumeState::Creating, Some(card::Phase::Failed)) => tx.update::<Volume>(account, id, |row| row.state = VolumeState::Error),
        (VolumeState::Deleting, _) if !holds(tx, card_id, ObjectKind::Volume, id) => {
            tag::remove(tx, account, id);
            tx.delete::<Volume>(account, id);
            true
        }
        _ => false,
    }
}

/// Moves the attachments of an instance by what its card says about the disks; says whether a row changed.
fn digest_disks(tx: &mut Tx<'_>, view: &View, card_id: &str, row: &Instance) -> bool {
    let mut changed = false;
    for disk in instance::volumes(tx, &row.account_id, &row.id) {
        let (account, id) = (disk.account_id.as_str(), disk.id.as_str());
        let Some(attachment) = &disk.attachment else { continue };
        changed |= match attachment.state {
            AttachmentState::Attaching if view.phase(tx, card_id, ObjectKind::Disk, id) == Some(card::Phase::Ready) => {
                tx.update::<Volume>(account, id, |row| {
                    if let Some(attachment) = &mut row.attachment {
                        attachment.state = AttachmentState::Attached;
                    }
                })
            }
            AttachmentState::Detaching if !holds(tx, card_id, ObjectKind::Disk, id) => tx.update::<Volume>(account, id, volume::release),
            _ => false,
        };
    }
    changed
}

/// Moves an instance by what its card says; says whether the row changed.
fn digest_instance(tx: &mut Tx<'_>, view: &View, now: Time, card_id: &str, row: &Instance) -> bool {
    let phase = view.phase(tx, card_id, ObjectKind::Instance, &row.id);
    match row.state {
        InstanceState::Pending if phase == Some(card::Phase::MachineRunning) => instance::running(tx, now, row),
        InstanceState::Pending | InstanceState::Running if phase == Some(card::Phase::MachineStopped) => {
            instance::guest_shut_down(tx, now, row)
        }
        InstanceState::Pending | InstanceState::Running if phase == Some(card::Phase::Failed) => {
            tracing::error!(card = card_id, instance = row.id, message = view.message(ObjectKind::Instance, &row.id), "the machine failed");
            instance::fail(tx, now, row);
        }
        InstanceState::Pending if part_failed(tx, view, card_id, row) => instance::fail(tx, now, row),
        InstanceState::Stopping if !row.halted => {
            if !matches!(phase, Some(card::Phase::MachineStopped | card::Phase::Failed)) {
                return false;
            }
            tx.update::<Instance>(&row.account_id, &row.id, |row| row.halted = true);
        }
        InstanceState::Stopping if !holds_any(tx, card_id, row) => instance::stopped(tx, now, row),
        InstanceState::ShuttingDown if !holds_any(tx, card_id, row) => instance::terminated(tx, now, row),
        _ => return false,
    }
    true
}

/// Whether a launch cannot succeed because a port, a disk or a volume of it failed.
fn part_failed(tx: &Tx<'_>, view: &View, card_id: &str, row: &Instance) -> bool {
    let failed = |kind, id: &str| {
        let failed = view.phase(tx, card_id, kind, id) == Some(card::Phase::Failed);
        if failed {
            tracing::error!(card = card_id, instance = row.id, ?kind, id, message = view.message(kind, id), "a part of the machine failed");
        }
        failed
    };
    instance::interfaces(tx, &row.account_id, &row.id).iter().any(|interface| failed(ObjectKind::Port, &interface.id))
        || instance::volumes(tx, &row.account_id, &row.id)
            .iter()
            .any(|disk| disk.state == VolumeState::Error || failed(ObjectKind::Disk, &disk.id))
}

/// Whether the card may still hold anything of an instance.
fn holds_any(tx: &Tx<'_>, card_id: &str, row: &Instance) -> bool {
    holds(tx, card_id, ObjectKind::Instance, &row.id)
        || instance::interfaces(tx, &row.account_id, &row.id).iter().any(|interface| holds(tx, card_id, ObjectKind::Port, &interface.id))
        || instance::volumes(tx, &row.account_id, &row.id).iter().any(|disk| holds(tx, card_id, ObjectKind::Disk, &disk.id))
}

/// Forgets what has had its time; call it now and then.
pub fn housekeep(tx: &mut Tx<'_>, now: Time) {
    instance::expire(tx, now);
    client_token::expire(tx, now);
}

/// How often [`housekeep`] is called: it looks at every instance.
const HOUSEKEEPING: Duration = Duration::from_secs(30);

/// Most inputs that one step takes.
const BATCH: usize = 4_096;

/// Runs the state machine for ever: inputs of the cards and commits of everybody drive it, `send` carries operations away.
///
/// # Errors
/// [`StoreGone`] when the store stopped; nothing more is decided then.
pub async fn run(
    world: Arc<World>,
    mut inputs: mpsc::Receiver<(String, Input)>,
    send: impl Fn(String, Operation),
) -> Result<(), StoreGone> {
    let mut core = Core::default();
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        let mut batch = Vec::new();
        let mut housekeeping = false;
        tokio::select! {
            count = inputs.recv_many(&mut batch, BATCH) => {
                if count == 0 {
                    return Ok(());
                }
            }
            () = world.changed() => {}
            _ = tick.tick() => housekeeping = true,
        }
        let now = Time::now();
        let step = {
            let dirty = world.take_dirty();
            let mut tx = world.begin();
            for (card_id, input) in batch {
                core.input(&mut tx, now, &card_id, input);
            }
            if housekeeping {
                housekeep(&mut tx, now);
            }
            core.step(tx, &dirty, now, world.region())
        };
        world.durable(step.sequence).await?;
        for (card_id, operation) in step.operations {
            send(card_id, operation);
        }
        deliver_events(&world, now).await?;
    }
}

async fn deliver_events(world: &World, now: Time) -> Result<(), StoreGone> {
    let (events, sequence) = event::undelivered(world, BATCH);
    let Some(last) = events.last() else { return Ok(()) };
    world.durable(sequence).await?;
    event::log(&events);
    let mut tx = world.begin();
    event::delivered(&mut tx, now, last.sequence);
    tx.commit_reconciled();
    Ok(())
}
