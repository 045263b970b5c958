//! One watcher for all stores of the process, as a user may have only a few (128 with inotify, by default).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{
    catch_unwind::{BoxWatcher, CatchUnwindWatcher},
    directories::{Directory, Identity},
    listeners::{Heard, Joined, Listeners},
};
use crate::error::BoxError;

/// Makes the watcher of the system, which reports to the [`Listeners`]. A test hands in one that fails or is deaf.
pub(super) type MakeWatcher = Box<dyn Fn(Arc<Listeners>) -> notify::Result<BoxWatcher> + Send + Sync>;

/// Watches directories for many stores. It makes the watcher of the system when the first store wants one, and drops it
/// together with the last store.
pub(in crate::store) struct DirectoryWatcher {
    listeners: Arc<Listeners>,
    /// Tokio's mutex: a call may block for long, and a store that waits for its turn must not hold a thread.
    system: Arc<tokio::sync::Mutex<SystemWatcher>>,
}

impl DirectoryWatcher {
    pub(super) fn new(make: MakeWatcher) -> Self {
        let listeners = Arc::<Listeners>::default();
        let system = SystemWatcher { make, watcher: None, listeners: Arc::clone(&listeners) };
        Self { listeners, system: Arc::new(tokio::sync::Mutex::new(system)) }
    }

    /// The one of this process.
    pub(in crate::store) fn of_process() -> Arc<Self> {
        static OF_PROCESS: Mutex<Weak<DirectoryWatcher>> = Mutex::new(Weak::new());
        let mut of_process = OF_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        of_process.upgrade().unwrap_or_else(|| {
            let watcher = Arc::new(Self::new(Box::new(|listeners| {
                let watcher = notify::recommended_watcher(move |event| listeners.hear(event))?;
                Ok(Box::new(watcher))
            })));
            *of_process = Arc::downgrade(&watcher);
            watcher
        })
    }
}

/// The part of one store in a [`DirectoryWatcher`]. When it is dropped, nothing is watched for this store any more.
pub(super) struct Listener {
    watcher: Arc<DirectoryWatcher>,
    heard: Arc<Heard>,
}

/// What came of an attempt to watch directories.
#[derive(Debug, Default)]
pub(super) struct Watching {
    /// A directory is watched that was not watched before.
    pub(super) is_new: bool,
    /// Why a directory that is needed is not watched.
    pub(super) failure: Option<BoxError>,
}

impl Listener {
    pub(super) fn new(watcher: Arc<DirectoryWatcher>) -> Self {
        Self { watcher, heard: Arc::default() }
    }

    pub(super) fn heard(&self) -> &Heard {
        &self.heard
    }

    /// Listens to these directories, and to no others. `None` when the runtime ends.
    pub(super) async fn watch(&self, wanted: BTreeMap<PathBuf, Directory>) -> Option<Watching> {
        let heard = Arc::downgrade(&self.heard);
        if self.watcher.listeners.is_settled(&heard, &wanted) {
            return Some(Watching::default());
        }
        let mut system = Arc::clone(&self.watcher.system).lock_owned().await;
        tokio::task::spawn_blocking(move || system.watch(&heard, &wanted)).await.ok()
    }
}

/// The watcher of the system. Its methods may block.
struct SystemWatcher {
    make: MakeWatcher,
    watcher: Option<CatchUnwindWatcher>,
    listeners: Arc<Listeners>,
}

impl SystemWatcher {
    fn watch(&mut self, heard: &Weak<Heard>, wanted: &BTreeMap<PathBuf, Directory>) -> Watching {
        for useless in self.listeners.leave_others(heard, wanted) {
            self.unwatch(&useless);
        }
        let mut watching = Watching::default();
        for (path, directory) in wanted {
            let result = match self.listeners.join(heard, &directory.identity) {
                Joined::Already => continue,
                Joined::New => Ok(()),
                Joined::NotWatched => self.add(heard, path, &directory.identity),
            };
            match result {
                Ok(()) => watching.is_new = true,
                Err(error) if directory.is_needed => {
                    watching.failure.get_or_insert(error);
                }
                Err(_) => {} // its files are polled
            }
        }
        watching
    }

    fn add(&mut self, heard: &Weak<Heard>, path: &Path, identity: &Identity) -> Result<(), BoxError> {
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            None => self.watcher.insert(CatchUnwindWatcher::new((self.make)(Arc::clone(&self.listeners))?)),
        };
        // It is noted before it is watched, because an event that comes in between may say that it is lost again.
        for stale in self.listeners.insert(heard, path, identity) {
            watcher.unwatch(&stale);
        }
        let result = watcher.watch(path);
        if result.is_err() {
            self.listeners.remove(path);
        }
        self.forget_dead();
        result
    }

    fn unwatch(&mut self, path: &Path) {
        if let Some(watcher) = &mut self.watcher {
            watcher.unwatch(path);
        }
        self.forget_dead();
    }

    /// Forgets a watcher that has panicked, so that the next call makes another one.
    fn forget_dead(&mut self) {
        if self.watcher.as_ref().is_some_and(CatchUnwindWatcher::is_dead) {
            self.watcher = None;
            self.listeners.lose_all();
        }
    }
}
