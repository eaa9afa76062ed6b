//! What the daemon counts, as Prometheus text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Requests by action and status, with the time they took.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), Requests>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Requests {
    count: u64,
    time: Duration,
}

impl Metrics {
    /// Counts an answered request. `action` is one of ours, never the client's text.
    pub fn request(&self, action: &'static str, status: u16, time: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = requests.entry((action, status)).or_default();
        requests.count += 1;
        requests.time += time;
    }

    /// The text that Prometheus scrapes.
    #[must_use]
    pub fn to_text(&self) -> String {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut text = String::new();
        let mut family = |name: &str, value: &dyn Fn(&Requests) -> String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# TYPE {name} counter");
            for ((action, status), requests) in &requests {
                let _ = writeln!(text, "{name}{{action=\"{action}\",status=\"{status}\"}} {}", value(requests));
            }
        };
        family("cardinal_api_requests_total", &|requests| requests.count.to_string());
        family("cardinal_api_request_seconds_total", &|requests| format!("{:.6}", requests.time.as_secs_f64()));
        text
    }
}
