//! Threads that serve connections, each with an event loop of its own.
//!
//! A connection stays on the thread that it was given to, so a request wakes that thread and nobody else. In one loop that
//! several threads share, whoever took a request from the kernel also woke another thread to watch the sockets meanwhile: of six
//! system calls for a small request three were for that.
//!
//! This module knows how busy its threads are, and nothing of what they serve.

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// The threads; they end with this value, and with them what they have not finished.
pub struct Threads(Vec<Thread>);

struct Thread {
    handle: Handle,
    /// Everything that runs on the thread holds a copy.
    load: Arc<()>,
    /// Dropped to end the thread.
    _stop: oneshot::Sender<()>,
}

impl Threads {
    /// A thread for each core that this process may use.
    ///
    /// # Errors
    /// When the system gives no thread or no event loop.
    pub fn start(name: &str) -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, NonZero::get);
        (0..count).map(|index| Thread::start(&format!("{name}-{index}"))).collect::<io::Result<_>>().map(Self)
    }

    /// Runs `work` on the thread that has the least to do.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(thread) = self.0.iter().min_by_key(|thread| Arc::strong_count(&thread.load)) {
            let load = Arc::clone(&thread.load);
            thread.handle.spawn(async move {
                let _load = load;
                work.await;
            });
        }
    }
}

impl Thread {
    fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            // The sender is never used, only dropped.
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { handle, load: Arc::new(()), _stop: stop })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_goes_where_the_least_is_and_stays_there() {
        let threads = Threads::start("test").unwrap();
        let (sender, receiver) = mpsc::channel();
        let mut release = Vec::new();
        for _ in 0..2 * threads.0.len() {
            let (sender, (go, wait)) = (sender.clone(), oneshot::channel::<()>());
            release.push(go);
            threads.spawn(async move {
                let before = thread::current().id();
                let _ = wait.await;
                sender.send((before, thread::current().id())).unwrap();
            });
        }
        drop(release);
        let mut seen = std::collections::BTreeMap::<String, usize>::new();
        for _ in 0..2 * threads.0.len() {
            let (before, after) = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(before, after);
            *seen.entry(format!("{before:?}")).or_default() += 1;
        }
        assert!(seen.len() == threads.0.len() && seen.values().all(|count| *count == 2), "{seen:?}");
    }

    #[test]
    fn unfinished_work_ends_with_the_threads() {
        let threads = Threads::start("test").unwrap();
        let (sender, receiver) = mpsc::channel::<()>();
        threads.spawn(async move {
            let _sender = sender;
            std::future::pending::<()>().await;
        });
        drop(threads);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Err(mpsc::RecvTimeoutError::Disconnected));
    }
}
