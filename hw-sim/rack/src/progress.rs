//! One line of progress for everything that takes longer than a second.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way: a spinner on a terminal, plain lines elsewhere.
pub struct Step {
    bar: ProgressBar,
    name: String,
    begun: std::time::Instant,
}

impl Step {
    /// Begins a step and says so.
    pub fn begin(name: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        if bar.is_hidden() {
            eprintln!("rack: {name} ...");
        } else {
            bar.set_message(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, name: name.to_owned(), begun: std::time::Instant::now() }
    }

    /// Says what the step is doing now.
    pub fn note(&self, what: &str) {
        self.bar.set_message(format!("{}: {what}", self.name));
    }

    /// Ends the step with the time it took.
    pub fn end(self) {
        self.bar.finish_and_clear();
        eprintln!("rack: {} {:.1} s", self.name, self.begun.elapsed().as_secs_f64());
    }
}
