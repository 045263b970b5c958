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
    collections::BTreeMap,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use notify::{
    Event, EventKind,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use self::{
    catch_unwind::{BoxWatcher, CatchUnwindWatcher},
    directories::{Identity, behind_links, directory_of, identify},
};
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

/// How long to wait for more events. The wait doubles each time that nothing new was found.
const DEBOUNCE: Duration = Duration::from_millis(5);
const LONGEST_DEBOUNCE: Duration = Duration::from_secs(1);

/// How long after a load that saw a change the event of this change may come, before it counts as missed.
const GRACE: Duration = Duration::from_secs(1);

/// Makes a watcher that reports to [`Heard`]. A test hands in one that fails or is deaf.
pub(super) type MakeWatcher = Arc<dyn Fn(Arc<Heard>) -> notify::Result<BoxWatcher> + Send + Sync>;

/// The watcher that is best on this system.
pub(super) fn recommended() -> MakeWatcher {
    Arc::new(|heard| {
        let watcher = notify::recommended_watcher(move |event| heard.hear(event))?;
        Ok(Box::new(watcher))
    })
}

/// Watches a source's files until the driver ends.
pub(super) async fn run(
    source: BoxSource,
    make: MakeWatcher,
    hints: Arc<Hints>,
    mut finished: watch::Receiver<Finished>,
) {
    let heard = Arc::<Heard>::default();
    let watch = Watch {
        watched: Some(Watched { source: source.clone(), make, watcher: None, heard: Arc::clone(&heard) }),
        source,
        hints,
        finished: finished.clone(),
        heard,
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
    heard: Arc<Heard>,
    /// Absent while a blocking thread uses it.
    watched: Option<Watched>,
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
                () = self.heard.events.notified() => {
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
        let mut watched = self.watched.take()?;
        let outside = tokio::task::spawn_blocking(move || {
            let result = watched.rewatch();
            (watched, result)
        });
        let (watched, result) = outside.await.ok()?;
        self.watched = Some(watched);
        self.is_complete = result.is_complete;
        match result.failure {
            None => self.is_reported = false,
            Some(error) if !mem::replace(&mut self.is_reported, true) => {
                events::not_watched(self.source.name(), &*error);
            }
            Some(_) => {}
        }
        if result.is_new {
            self.loads_since_watched = 0;
        }
        Some(result.is_new)
    }

    /// Waits for more events. Returns whether there are any that were not answered yet.
    async fn event_came(&mut self) -> bool {
        if self.heard.count.load(Ordering::SeqCst) == self.answered {
            return false;
        }
        tokio::time::sleep(self.pace.next(self.last_change)).await;
        self.answered = self.heard.count.load(Ordering::SeqCst);
        true
    }

    /// Looks whether the source has changed, and whether an event has announced it.
    fn load_ended(&mut self) {
        let change = self.finished.borrow_and_update().last_change;
        let has_changed = mem::replace(&mut self.last_change, change) != change;
        let heard = self.heard.count.load(Ordering::SeqCst);
        let [before, last] = self.heard_before;
        self.heard_before = [last, heard];
        // The change was made after the previous load had begun, and that load began after the end of the one before.
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

/// What the thread of the watcher reports.
#[derive(Default)]
pub(super) struct Heard {
    events: Notify,
    count: AtomicU64,
    /// The directories that are watched. Never locked while the watcher is called, because a call waits for the thread
    /// of the watcher.
    directories: Mutex<BTreeMap<PathBuf, Identity>>,
}

impl Heard {
    fn hear(&self, event: notify::Result<Event>) {
        match event {
            Ok(event) if is_reading(event.kind) => return,
            Ok(Event { kind: EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)), paths, .. }) => {
                // A directory that is removed loses its watch, and so do those below it.
                self.directories().retain(|directory, _| !paths.iter().any(|gone| directory.starts_with(gone)));
            }
            Ok(_) => {}
            Err(_) => self.directories().clear(), // it does not say which of them has failed
        }
        self.count.fetch_add(1, Ordering::SeqCst);
        self.events.notify_one();
    }

    fn directories(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Identity>> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ignore read accesses: our own loads cause them. Every other kind is a hint.
fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// The watcher and what it needs. Its methods may block.
struct Watched {
    source: BoxSource,
    make: MakeWatcher,
    watcher: Option<CatchUnwindWatcher>,
    heard: Arc<Heard>,
}

struct Rewatched {
    /// A directory is watched that was not watched before.
    is_new: bool,
    /// The directory of each file is watched.
    is_complete: bool,
    failure: Option<BoxError>,
}

impl Watched {
    fn rewatch(&mut self) -> Rewatched {
        let paths = catch_unwind(AssertUnwindSafe(|| self.source.watched_paths())).unwrap_or_default();
        let mut result = Rewatched { is_new: false, is_complete: !paths.is_empty(), failure: None };
        let mut wanted = BTreeMap::new();
        let mut needed = Vec::new();
        for path in paths {
            match identify(directory_of(&path)) {
                Ok((directory, identity)) => {
                    needed.push(directory.clone());
                    wanted.insert(directory, identity);
                }
                Err(error) => result.fail(error),
            }
            wanted.extend(behind_links(path).filter_map(|directory| identify(&directory).ok()));
        }
        let watched = self.heard.directories().clone();
        for gone in watched.iter().filter(|(directory, identity)| wanted.get(*directory) != Some(identity)) {
            self.unwatch(gone.0);
        }
        for (directory, identity) in wanted {
            if watched.get(&directory) == Some(&identity) {
                continue;
            }
            match self.watch(&directory, identity) {
                Ok(()) => result.is_new = true,
                Err(error) if needed.contains(&directory) => result.fail(error),
                Err(_) => {} // its files are polled
            }
        }
        result
    }

    fn watch(&mut self, directory: &Path, identity: Identity) -> Result<(), BoxError> {
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            None => self.watcher.insert(CatchUnwindWatcher::new((self.make)(Arc::clone(&self.heard))?)),
        };
        // It is noted before it is watched, because an event that comes in between may remove it again.
        self.heard.directories().insert(directory.to_owned(), identity);
        watcher.unwatch(directory); // the watcher may still have an earlier directory of this name
        let result = watcher.watch(directory);
        if result.is_err() {
            self.heard.directories().remove(directory);
        }
        if watcher.is_dead() {
            self.watcher = None;
            self.heard.directories().clear();
        }
        result
    }

    fn unwatch(&mut self, directory: &Path) {
        self.heard.directories().remove(directory);
        if let Some(watcher) = &mut self.watcher {
            watcher.unwatch(directory);
        }
    }
}

impl Rewatched {
    fn fail(&mut self, error: impl Into<BoxError>) {
        self.is_complete = false;
        self.failure.get_or_insert(error.into());
    }
}

#[cfg(test)]
mod tests;
