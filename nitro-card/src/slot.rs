//! One thing that the card keeps in the world for an object: a server of a
//! machine's function, a volume, a link to a kernel.
//!
//! ```text
//!  Unknown ──► Filling ──► Full ──► Draining ──► Empty
//!     ▲           └──► Failed ◄──────────┘
//!     └ a start of the daemon: whatever the last run left is filled again or drained
//! ```
//!
//! A slot only decides; whoever owns it does what [`Slot::step`] asks and
//! tells [`Slot::done`]. One action is under way at a time. A failed action is
//! tried again after 0.5 s, then 1, 2, 4, and then every 8 s.

use std::time::Duration;

const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(8);

/// One slot; `B` says with what it is filled.
#[derive(Clone, Debug)]
pub struct Slot<B> {
    state: State<B>,
    /// Failures in a row.
    failures: u32,
}

#[derive(Clone, Debug, PartialEq)]
enum State<B> {
    /// A former run of the daemon may have left something.
    Unknown,
    Empty,
    Filling(B),
    Full(B),
    Draining,
    /// Anything may be there. `wanted`: with what it could not be filled, or `None` when it could not be drained.
    Failed {
        wanted: Option<B>,
        message: String,
        retry_at: Duration,
    },
}

/// What the owner has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<B> {
    /// Make it be there, over whatever is there.
    Fill(B),
    /// Make it not be there, also when it is not.
    Drain,
}

/// How the owner wants a slot treated.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A change is filled over what is there, without draining first.
    pub in_place: bool,
    /// What is there may be taken away now.
    pub may_drain: bool,
    /// A failed fill is tried again; a failed drain always is.
    pub retry: bool,
}

impl<B: Clone + PartialEq> Slot<B> {
    /// A slot of which nothing is known.
    #[must_use]
    pub fn new() -> Self {
        Self { state: State::Unknown, failures: 0 }
    }

    /// The next action towards `wanted` (`None`: towards empty), if there is one to start.
    pub fn step(&mut self, wanted: Option<&B>, rules: Rules, now: Duration) -> Option<Action<B>> {
        let action = match (&self.state, wanted) {
            (State::Filling(_) | State::Draining, _) | (State::Empty, None) => return None,
            (State::Full(there), Some(wanted)) if there == wanted => return None,
            (State::Failed { wanted: Some(failed), .. }, Some(wanted)) if failed == wanted && !rules.retry => return None,
            (State::Failed { wanted: failed, retry_at, .. }, wanted) if failed.as_ref() == wanted && now < *retry_at => return None,
            (State::Full(_), Some(wanted)) if rules.in_place => Action::Fill(wanted.clone()),
            (State::Full(_), _) | (_, None) => Action::Drain,
            (_, Some(wanted)) => Action::Fill(wanted.clone()),
        };
        self.state = match &action {
            Action::Drain if !rules.may_drain => return None,
            Action::Drain => State::Draining,
            Action::Fill(wanted) => State::Filling(wanted.clone()),
        };
        Some(action)
    }

    /// Takes the result of the action under way.
    pub fn done(&mut self, result: Result<(), String>, now: Duration) {
        let wanted = match &self.state {
            State::Filling(wanted) => Some(wanted.clone()),
            State::Draining => None,
            _ => return,
        };
        match result {
            Ok(()) => {
                self.failures = 0;
                self.state = wanted.map_or(State::Empty, State::Full);
            }
            Err(message) => self.fail(wanted, message, now),
        }
    }

    /// Marks `wanted` as refused, without a try.
    pub fn refuse(&mut self, wanted: B, message: String, now: Duration) {
        self.fail(Some(wanted), message, now);
    }

    /// Lets the next step try at once what failed.
    pub fn forgive(&mut self) {
        if matches!(self.state, State::Failed { .. }) {
            *self = Self::new();
        }
    }

    /// What is there for certain.
    pub fn full(&self) -> Option<&B> {
        match &self.state {
            State::Full(there) => Some(there),
            _ => None,
        }
    }

    /// What is there or about to be.
    pub fn bound(&self) -> Option<&B> {
        match &self.state {
            State::Full(there) | State::Filling(there) => Some(there),
            _ => None,
        }
    }

    /// Whether nothing is there for certain.
    pub fn is_empty(&self) -> bool {
        self.state == State::Empty
    }

    /// Whether it stays as it is until something else changes or time passes.
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Empty | State::Full(_) | State::Failed { .. })
    }

    /// Why the last action failed.
    pub fn failure(&self) -> Option<&str> {
        match &self.state {
            State::Failed { message, .. } => Some(message),
            _ => None,
        }
    }

    /// When a failed action is to be tried again.
    pub fn retry_at(&self) -> Option<Duration> {
        match &self.state {
            State::Failed { retry_at, .. } => Some(*retry_at),
            _ => None,
        }
    }

    fn fail(&mut self, wanted: Option<B>, message: String, now: Duration) {
        let pause = RETRY_FIRST.saturating_mul(2_u32.saturating_pow(self.failures)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1).min(8);
        self.state = State::Failed { wanted, message, retry_at: now + pause };
    }
}

impl<B: Clone + PartialEq> Default for Slot<B> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Rules = Rules { in_place: false, may_drain: true, retry: true };
    const ZERO: Duration = Duration::ZERO;

    #[test]
    fn a_slot_is_filled_changed_by_draining_and_emptied() {
        let mut slot = Slot::new();
        assert_eq!(slot.step(Some(&1), FREE, ZERO), Some(Action::Fill(1)));
        assert_eq!(slot.step(Some(&2), FREE, ZERO), None, "one action at a time");
        slot.done(Ok(()), ZERO);
        assert_eq!(slot.full(), Some(&1));
        assert_eq!(slot.step(Some(&2), Rules { may_drain: false, ..FREE }, ZERO), None);
        assert_eq!(slot.step(Some(&2), Rules { in_place: true, ..FREE }, ZERO), Some(Action::Fill(2)));
        slot.done(Ok(()), ZERO);
        assert_eq!(slot.step(Some(&3), FREE, ZERO), Some(Action::Drain));
        slot.done(Ok(()), ZERO);
        assert_eq!(slot.step(Some(&3), FREE, ZERO), Some(Action::Fill(3)));
        slot.done(Ok(()), ZERO);
        assert_eq!(slot.step(None, FREE, ZERO), Some(Action::Drain));
        slot.done(Ok(()), ZERO);
        assert!(slot.is_empty() && slot.step(None, FREE, ZERO).is_none());
    }

    #[test]
    fn an_unknown_slot_is_drained_before_it_counts_as_empty() {
        let mut slot = Slot::<u8>::new();
        assert!(!slot.is_empty());
        assert_eq!(slot.step(None, FREE, ZERO), Some(Action::Drain));
    }

    #[test]
    fn failures_are_tried_again_ever_more_slowly() {
        let mut slot = Slot::new();
        let mut now = ZERO;
        for pause_ms in [500, 1000, 2000, 4000, 8000, 8000] {
            assert_eq!(slot.step(Some(&1), FREE, now), Some(Action::Fill(1)));
            slot.done(Err("no".into()), now);
            assert_eq!(slot.retry_at(), Some(now + Duration::from_millis(pause_ms)));
            assert_eq!(slot.step(Some(&1), FREE, now), None);
            now += Duration::from_millis(pause_ms);
            assert_eq!(slot.step(Some(&1), Rules { retry: false, ..FREE }, now), None);
        }
        assert_eq!(slot.clone().step(Some(&2), FREE, ZERO), Some(Action::Fill(2)), "something else is tried at once");
        slot.forgive();
        assert_eq!(slot.step(Some(&1), FREE, ZERO), Some(Action::Fill(1)));
    }
}
