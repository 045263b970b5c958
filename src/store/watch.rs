//! File events, which are hints that the driver should load now.
//!
//! This is one task, which ends with the driver. What blocks runs off the runtime's threads.
//!
//! 1. The task watches the directories of the source's files, never the files themselves, because those are replaced.
//! 2. After each event and after each load it checks whether these are still the same directories, and watches those
//!    that have taken their places.
//! 3. After an event the driver loads. It waits a few milliseconds first, so that events which belong together cause
//!    one load. The more events bring nothing new, the longer this wait becomes.
//! 4. The driver polls as often as without a watcher until an event has announced a change, and again while file events
//!    cannot be relied on (no directory, no watcher, a change that no event announced).

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use self::{directories::Directories, watcher::Listener};
use super::{
    driver::{Hints, sleep_until},
    shared::Finished,
};
use crate::{
    backoff::exponential,
    error::BoxError,
    events,
    source::{BoxSource, CredentialSource as _},
};

mod catch_unwind;
mod directories;
mod listeners;
mod watcher;

pub(super) use self::watcher::DirectoryWatcher;

/// How long to wait for more events. The wait doubles each time that nothing new was found.
const DEBOUNCE: Duration = Duration::from_millis(5);
const LONGEST_DEBOUNCE: Duration = Duration::from_secs(1);

/// How long after a load that saw a change the event of this change may come, before it counts as missed.
const GRACE: Duration = Duration::from_secs(1);

/// Watches a source's files until the driver ends.
pub(super) async fn run(
    source: BoxSource,
    watcher: Arc<DirectoryWatcher>,
    hints: Arc<Hints>,
    mut finished: watch::Receiver<Finished>,
) {
    let watch = Watch {
        source,
        hints,
        finished: finished.clone(),
        listener: Listener::new(watcher),
        delivery: Delivery::Unproven,
        doubtful_until: None,
        is_complete: false,
        heard_before: [0; 2],
        loads_since_watched: 0,
        answered: 0,
        last_change: 0,
        pace: Pace::default(),
        is_reported: false,
    };
    tokio::select! {
        () = watch.follow() => {}
        _ = finished.wait_for(|_| false) => {} // the driver is gone
    }
}

struct Watch {
    source: BoxSource,
    hints: Arc<Hints>,
    finished: watch::Receiver<Finished>,
    listener: Listener,
    /// Whether the directory of each file is watched.
    is_complete: bool,
    delivery: Delivery,
    /// There was a change without an event so far. If none comes until then, there will be none.
    doubtful_until: Option<Instant>,
    /// How many events there had been at the end of the load before the last one, and at the end of the last one.
    heard_before: [u64; 2],
    /// How many loads have ended since a directory was last watched that was not watched before.
    loads_since_watched: u64,
    /// How many events there had been when the driver last got a hint.
    answered: u64,
    last_change: u64,
    pace: Pace,
    is_reported: bool,
}

/// Whether events come when the source changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Delivery {
    /// There was no change yet that an event has announced. On a network file system there never is one.
    Unproven,
    Works,
    Fails,
}

impl Watch {
    async fn follow(mut self) {
        let mut is_hint = false;
        while let Some(rewatched) = self.rewatch().await {
            let is_watched = self.is_complete && self.delivery == Delivery::Works;
            // The next poll of a driver that relied on events may be far away.
            let must_poll = self.hints.set_watched(is_watched) && !is_watched;
            // A change that was made before the directory was watched has caused no event.
            if must_poll || rewatched || is_hint {
                self.hints.look();
            }
            is_hint = tokio::select! {
                () = self.listener.heard().next() => {
                    if self.doubtful_until.take().is_some() {
                        self.delivery = Delivery::Works; // it only came late
                    }
                    self.event_came().await
                }
                Ok(()) = self.finished.changed() => {
                    self.load_ended();
                    false
                }
                () = sleep_until(self.doubtful_until) => {
                    self.event_missed();
                    false
                }
            };
        }
        self.hints.set_watched(false);
        self.hints.look();
    }
}

impl Watch {
    /// Watches the directories that have to be watched now. Returns whether one of them was not watched before, and
    /// `None` when the runtime ends.
    async fn rewatch(&mut self) -> Option<bool> {
        let source = self.source.clone();
        let look = move || {
            let paths = catch_unwind(AssertUnwindSafe(|| source.watched_paths())).unwrap_or_default();
            (paths.is_empty(), Directories::of(paths))
        };
        let (is_empty, directories) = tokio::task::spawn_blocking(look).await.ok()?;
        let watching = self.listener.watch(directories.wanted).await?;
        let failure = directories.failure.map(BoxError::from).or(watching.failure);
        self.is_complete = !is_empty && failure.is_none();
        match failure {
            None => self.is_reported = false,
            Some(error) if !mem::replace(&mut self.is_reported, true) => {
                events::not_watched(self.source.name(), &*error);
            }
            Some(_) => {}
        }
        if watching.is_new {
            self.loads_since_watched = 0;
        }
        Some(watching.is_new)
    }

    /// Waits for more events. Returns whether there are any that were not answered yet.
    async fn event_came(&mut self) -> bool {
        if self.listener.heard().count() == self.answered {
            return false;
        }
        tokio::time::sleep(self.pace.next(self.last_change)).await;
        self.answered = self.listener.heard().count();
        true
    }

    /// Looks whether the source has changed, and whether an event has announced it.
    fn load_ended(&mut self) {
        let change = self.finished.borrow_and_update().last_change;
        let has_changed = mem::replace(&mut self.last_change, change) != change;
        let heard = self.listener.heard().count();
        let [before, last] = self.heard_before;
        self.heard_before = [last, heard];
        // The change was made after the previous load had begun, and that load began after the end of the load before it.
        // So if the directory was watched by then, the event came after that.
        let must_have_heard = self.is_complete && self.loads_since_watched >= 2;
        self.loads_since_watched += 1;
        if has_changed && heard > before {
            self.delivery = Delivery::Works;
            self.doubtful_until = None;
        } else if has_changed && must_have_heard {
            self.doubtful_until.get_or_insert(Instant::now() + GRACE);
        }
    }

    /// The source has changed, and no event came.
    fn event_missed(&mut self) {
        self.doubtful_until = None;
        if mem::replace(&mut self.delivery, Delivery::Fails) != Delivery::Fails {
            events::watcher_deaf(self.source.name());
        }
    }
}

/// How long to wait before an event is answered.
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    last_change: u64,
    /// How many answers in a row brought nothing new.
    without_change: u32,
}

impl Pace {
    /// `change` is the last load that brought something new.
    fn next(&mut self, change: u64) -> Duration {
        let now = Instant::now();
        let is_quiet = self.last.replace(now).is_none_or(|last| now - last > 2 * LONGEST_DEBOUNCE);
        let has_changed = mem::replace(&mut self.last_change, change) != change;
        self.without_change = if is_quiet || has_changed { 0 } else { self.without_change.saturating_add(1) };
        exponential(DEBOUNCE, self.without_change, LONGEST_DEBOUNCE)
    }
}

#[cfg(test)]
mod tests;
