//! Counters of the devices that the card has open, by what they serve. It knows
//! how to read them, and not what they count.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What a device counts: names and values.
pub type Reading = Vec<(&'static str, u64)>;

type Read = Box<dyn Fn() -> Reading + Send + Sync>;

/// Every device that counts.
#[derive(Default)]
pub struct Meters(Mutex<BTreeMap<(&'static str, String), Read>>);

impl Meters {
    /// Adds a device of a kind (`vhost`, `packet`, `disk` ...) that serves `name`,
    /// in place of the one that did before.
    pub fn put(&self, kind: &'static str, name: &str, read: impl Fn() -> Reading + Send + Sync + 'static) {
        self.lock().insert((kind, name.to_owned()), Box::new(read));
    }

    /// Forgets a device.
    pub fn remove(&self, kind: &'static str, name: &str) {
        self.lock().remove(&(kind, name.to_owned()));
    }

    /// Reads all of them: kind, name, counters.
    pub fn read(&self) -> Vec<(&'static str, String, Reading)> {
        self.lock().iter().map(|((kind, name), read)| (*kind, name.clone(), read())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(&'static str, String), Read>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_device_is_read_live_until_it_goes() {
        let (meters, count) = (Meters::default(), Arc::new(AtomicU64::new(1)));
        let counted = Arc::clone(&count);
        meters.put("vhost", "eni-1", move || vec![("oversize", counted.load(Ordering::Relaxed))]);
        assert_eq!(meters.read(), [("vhost", "eni-1".to_owned(), vec![("oversize", 1)])]);
        count.store(2, Ordering::Relaxed);
        assert_eq!(meters.read(), [("vhost", "eni-1".to_owned(), vec![("oversize", 2)])]);
        meters.remove("disk", "eni-1");
        assert_eq!(meters.read().len(), 1);
        meters.remove("vhost", "eni-1");
        assert!(meters.read().is_empty());
    }
}
