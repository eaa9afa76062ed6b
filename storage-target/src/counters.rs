//! What a target counts: one number per reason.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A reading of everything that a target counts since it started.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Every counter with its name, for whoever exports them.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }

        /// The counters as the shards raise them.
        #[derive(Debug, Default)]
        pub(crate) struct Counting { $(pub $name: AtomicU64,)* }

        impl Counting {
            pub fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Connections taken in.
    connections_accepted,
    /// Connections closed at once because too many had not said who they are.
    connections_over_limit,
    /// Connections closed because they did not say who they are in time.
    connections_timed_out,
    /// Connections closed because their controller's keep alive ran out.
    keep_alive_expired,
    /// Connections ended with C2HTermReq: a PDU broke the protocol.
    protocol_errors,
    /// Data that did not fit its digest.
    data_digest_errors,
    /// Connect commands refused because the host is not the volume's.
    hosts_refused,
    /// Connect commands refused for any other reason.
    connects_refused,
    /// Controllers cut off because another connection of their host took over, or the host lost the volume.
    controllers_cut,
    /// Commands answered with an error.
    commands_failed,
    /// Reads answered.
    reads,
    /// Writes answered.
    writes,
    /// Write Zeroes and Dataset Management commands answered.
    zeroes,
    /// Compare and Verify commands answered.
    verifies,
    /// Flushes answered.
    flushes,
    /// Bytes read.
    read_bytes,
    /// Bytes written.
    write_bytes,
    /// Requests that waited for the limits of their volume's type.
    throttled,
    /// Turns of the shards' loops: how many system calls one operation costs follows from it.
    turns,
}

/// Raises a counter.
pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
