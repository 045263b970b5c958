use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::generation::Generation;

/// A run ends after so long without an event.
const RUN_ENDS: Duration = Duration::from_secs(60);

/// Counts events by their reason, so that an outage at a thousand requests a second does not fill the log: see
/// `event_by_turn!`.
///
/// The count starts again with another credential, and after a minute without an event.
#[derive(Debug)]
pub(super) struct Runs<K>(Mutex<BTreeMap<K, Run>>);

/// Events for one reason, each soon after the previous one.
#[derive(Debug)]
struct Run {
    generation: Option<Generation>,
    count: u64,
    last: Instant,
}

impl<K: Ord> Runs<K> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// The number of this event within its run. `generation` is that of the store's credential, if it is about one.
    pub(super) fn count(&self, reason: K, generation: Option<Generation>) -> u64 {
        let now = Instant::now();
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let run = runs.entry(reason).or_insert(Run { generation, count: 0, last: now });
        // A late event, for an earlier credential, starts no new run.
        if generation > run.generation || now.duration_since(run.last) >= RUN_ENDS {
            run.count = 0;
        }
        run.generation = run.generation.max(generation);
        run.count += 1;
        run.last = now;
        run.count
    }
}

impl<K: Ord> Default for Runs<K> {
    fn default() -> Self {
        Self::new()
    }
}
