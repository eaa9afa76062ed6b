//! What control is told, to any number of watchers, each at its own pace.
//!
//! A watcher first gets Hello, the status of every object, and Synced; then
//! changes. What it has not taken yet is kept by object, so a slow reader skips
//! to the newest, and what is kept is bounded by the number of objects.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use card_proto::card::{Event, Gone, Hello, Status, Synced, event};
use tokio::sync::Notify;

use crate::object::Key;

/// Objects that may have come and gone while a watcher took nothing.
const PENDING_MAX: usize = 100_000;

/// The teller; one owner.
pub struct Hub {
    hello: Hello,
    statuses: BTreeMap<Key, Status>,
    watchers: Vec<Weak<Watcher>>,
}

/// One reader's place.
pub struct Watcher {
    pending: Mutex<Pending>,
    news: Notify,
}

#[derive(Default)]
struct Pending {
    /// `None`: a Hello.
    order: VecDeque<Option<Key>>,
    hello: Option<Hello>,
    objects: BTreeMap<Key, event::Event>,
    /// Synced is told once, behind the first round.
    synced_after: Option<usize>,
    overrun: bool,
}

impl Hub {
    /// A teller that knows what the card is.
    #[must_use]
    pub fn new(hello: Hello) -> Self {
        Self { hello, statuses: BTreeMap::new(), watchers: Vec::new() }
    }

    /// A new reader, with everything before it.
    pub fn watch(&mut self) -> Arc<Watcher> {
        let mut pending = Pending::default();
        pending.hello(self.hello.clone());
        for (key, status) in &self.statuses {
            pending.push(key.clone(), event::Event::Status(status.clone()));
        }
        pending.synced_after = Some(pending.order.len());
        let watcher = Arc::new(Watcher { pending: Mutex::new(pending), news: Notify::new() });
        self.watchers.push(Arc::downgrade(&watcher));
        watcher
    }

    /// Tells what the card is, when that changed.
    pub fn hello(&mut self, change: impl FnOnce(&mut Hello)) {
        let before = self.hello.clone();
        change(&mut self.hello);
        if before != self.hello {
            let hello = self.hello.clone();
            self.tell(|pending| pending.hello(hello.clone()));
        }
    }

    /// Tells what an object is.
    pub fn status(&mut self, key: &Key, status: Status) {
        self.tell(|pending| pending.push(key.clone(), event::Event::Status(status.clone())));
        self.statuses.insert(key.clone(), status);
    }

    /// Tells that an object is gone.
    pub fn gone(&mut self, key: &Key, generation: u64) {
        self.statuses.remove(key);
        let gone = Gone { kind: key.kind.into(), id: key.id.to_string(), generation };
        self.tell(|pending| pending.push(key.clone(), event::Event::Gone(gone.clone())));
    }

    fn tell(&mut self, tell: impl Fn(&mut Pending)) {
        self.watchers.retain(|watcher| {
            let Some(watcher) = watcher.upgrade() else { return false };
            tell(&mut watcher.lock());
            watcher.news.notify_one();
            true
        });
    }
}

impl Watcher {
    /// Waits for news. `None`: the reader was too slow for too long and has to begin again.
    pub async fn next(&self) -> Option<Event> {
        loop {
            // Made before looking, so that news in between wakes it.
            let news = self.news.notified();
            match self.lock().take() {
                Ok(Some(event)) => return Some(Event { event: Some(event) }),
                Ok(None) => {}
                Err(Overrun) => return None,
            }
            news.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Overrun;

impl Pending {
    fn hello(&mut self, hello: Hello) {
        if self.hello.replace(hello).is_none() {
            // What the card is comes before what it holds.
            self.order.push_front(None);
            self.synced_after = self.synced_after.map(|count| count + 1);
        }
    }

    fn push(&mut self, key: Key, event: event::Event) {
        if self.objects.insert(key.clone(), event).is_none() {
            self.order.push_back(Some(key));
        }
        if PENDING_MAX < self.order.len() {
            *self = Self { overrun: true, ..Self::default() };
        }
    }

    fn take(&mut self) -> Result<Option<event::Event>, Overrun> {
        if self.overrun {
            return Err(Overrun);
        }
        match self.synced_after.as_mut() {
            Some(0) => {
                self.synced_after = None;
                return Ok(Some(event::Event::Synced(Synced {})));
            }
            Some(count) => *count -= 1,
            None => {}
        }
        Ok(self.order.pop_front().and_then(|key| match key {
            Some(key) => self.objects.remove(&key),
            None => self.hello.take().map(event::Event::Hello),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Id, Kind};

    fn key(id: &str) -> Key {
        Key { kind: Kind::Port, id: Id::parse(id).unwrap() }
    }

    fn status(generation: u64) -> Status {
        Status { generation, ..Status::default() }
    }

    /// Everything that a watcher would be told now, one word each.
    fn told(watcher: &Watcher) -> Vec<String> {
        let mut words = Vec::new();
        while let Ok(Some(event)) = watcher.lock().take() {
            words.push(match event {
                event::Event::Hello(hello) => format!("hello {}", hello.cores),
                event::Event::Status(status) => format!("status {}", status.generation),
                event::Event::Gone(gone) => format!("gone {}", gone.id),
                event::Event::Synced(_) => "synced".into(),
            });
        }
        words
    }

    #[test]
    fn a_watch_begins_with_everything_and_goes_on_with_changes() {
        let mut hub = Hub::new(Hello::default());
        hub.status(&key("a"), status(1));
        hub.status(&key("b"), status(2));
        hub.gone(&key("b"), 2);
        let watcher = hub.watch();
        assert_eq!(told(&watcher), ["hello 0", "status 1", "synced"]);
        assert!(told(&watcher).is_empty());
        hub.status(&key("a"), status(3));
        hub.gone(&key("c"), 1);
        assert_eq!(told(&watcher), ["status 3", "gone c"]);
    }

    #[test]
    fn a_slow_reader_skips_to_the_newest() {
        let mut hub = Hub::new(Hello::default());
        let watcher = hub.watch();
        for generation in 0..1000 {
            hub.status(&key("a"), status(generation));
            hub.hello(|hello| hello.cores = 8);
        }
        assert_eq!(told(&watcher), ["hello 8", "synced", "status 999"]);
        hub.hello(|hello| hello.cores = 8);
        assert!(told(&watcher).is_empty(), "an unchanged hello is no news");
        hub.hello(|hello| hello.cores = 0);
        assert_eq!(told(&watcher), ["hello 0"]);
    }

    #[test]
    fn a_reader_that_never_takes_is_told_to_begin_again() {
        let mut hub = Hub::new(Hello::default());
        let watcher = hub.watch();
        for number in 0..=PENDING_MAX {
            hub.gone(&key(&number.to_string()), 1);
        }
        assert!(watcher.lock().take().is_err());
        drop(watcher);
        hub.gone(&key("x"), 1);
        assert!(hub.watchers.is_empty());
    }
}
