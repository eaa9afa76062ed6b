//! What the daemon counts, as Prometheus text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Requests by action and status, with the time they took.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), Requests>>,
    throttled: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
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

    /// Counts a request that was refused because a bucket of its account, one of `crate::throttle`, is too empty.
    pub fn throttled(&self, action: &'static str, bucket: &'static str) {
        let mut throttled = self.throttled.lock().unwrap_or_else(PoisonError::into_inner);
        *throttled.entry((action, bucket)).or_default() += 1;
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
        let throttled = self.throttled.lock().unwrap_or_else(PoisonError::into_inner).clone();
        text.push_str("# TYPE cardinal_api_throttled_total counter\n");
        for ((action, bucket), count) in &throttled {
            let _ = writeln!(text, "cardinal_api_throttled_total{{action=\"{action}\",bucket=\"{bucket}\"}} {count}");
        }
        text
    }
}
