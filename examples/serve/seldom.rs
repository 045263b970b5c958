use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const PAUSE: Duration = Duration::from_secs(60);

/// For a log line that an attack could cause thousands of times: it is written once a minute, with a count.
pub(crate) struct Seldom(Mutex<(u64, Option<Instant>)>);

impl Seldom {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new((0, None)))
    }

    /// If it is time for the line again: how many times it was due since the last one.
    pub(crate) fn count(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, last) = &mut *state;
        *count += 1;
        if last.is_some_and(|last| last.elapsed() < PAUSE) {
            return None;
        }
        *last = Some(Instant::now());
        Some(std::mem::take(count))
    }
}
