//! Who is told about which event.

use std::{
    collections::BTreeMap,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use notify::{
    Event, EventKind,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::Notify;

use super::directories::{Directory, Identity};

/// The events that one store has heard of.
#[derive(Default)]
pub(super) struct Heard {
    events: Notify,
    count: AtomicU64,
}

impl Heard {
    /// How many events there have been.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Waits for the next event.
    pub(super) async fn next(&self) {
        self.events.notified().await;
    }

    fn tell(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.events.notify_one();
    }
}

/// The directories that are watched, and the stores that listen to each.
///
/// It is never locked while a watcher is called, because a call waits for the thread of the watcher, which reports here.
#[derive(Default)]
pub(super) struct Listeners {
    watched: Mutex<BTreeMap<PathBuf, Watched>>,
}

/// A directory that is watched.
struct Watched {
    identity: Identity,
    /// The directory was moved or removed, or its watch may be gone.
    is_lost: bool,
    /// They are weak, so that a store which is gone listens no more.
    listeners: Vec<Weak<Heard>>,
}

/// What came of the wish to listen to a directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Joined {
    Already,
    /// It was watched for other stores, and now for this one, too.
    New,
    NotWatched,
}

impl Listeners {
    /// Tells the stores that listen to the directories of an event. The thread of the watcher calls this.
    pub(super) fn hear(&self, event: notify::Result<Event>) {
        match event {
            Ok(event) if is_reading(event.kind) => {}
            Ok(event) if event.paths.is_empty() => self.lock().values().for_each(Watched::tell),
            Ok(event) => {
                let may_be_lost = matches!(event.kind, EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)));
                let mut watched = self.lock();
                for path in &event.paths {
                    for directory in [Some(path.as_path()), path.parent()].into_iter().flatten() {
                        watched.get(directory).inspect(|watched| watched.tell());
                    }
                    if may_be_lost {
                        // A directory that is removed loses its watch, and so do those below it.
                        below(&mut watched, path).for_each(Watched::lose);
                    }
                }
            }
            Err(_) => self.lose_all(), // it does not say which of them has failed
        }
    }

    /// Whether nothing is to be done for a store that wants to listen to these directories, and for no other one.
    pub(super) fn is_settled(&self, heard: &Weak<Heard>, wanted: &BTreeMap<PathBuf, Directory>) -> bool {
        let watched = self.lock();
        let listens =
            |identity: &Identity| watched.values().any(|watched| watched.identity == *identity && watched.has(heard));
        wanted.values().all(|directory| listens(&directory.identity))
            && watched
                .values()
                .all(|watched| watched.is_useful() && (!watched.has(heard) || is_wanted(wanted, &watched.identity)))
    }

    /// Ends listening to directories that this store does not want any more. Returns those that nobody listens to, and
    /// those that are lost.
    pub(super) fn leave_others(&self, heard: &Weak<Heard>, wanted: &BTreeMap<PathBuf, Directory>) -> Vec<PathBuf> {
        let mut useless = Vec::new();
        self.lock().retain(|path, watched| {
            let is_wanted = is_wanted(wanted, &watched.identity);
            watched.listeners.retain(|other| is_wanted || !other.ptr_eq(heard));
            if !watched.is_useful() {
                useless.push(path.clone());
            }
            watched.is_useful()
        });
        useless
    }

    /// Listens to a directory if it is watched, whatever path it was watched by: with one watcher, a second watch on
    /// the same directory would take the place of the first.
    pub(super) fn join(&self, heard: &Weak<Heard>, identity: &Identity) -> Joined {
        let mut watched = self.lock();
        match watched.values_mut().find(|watched| watched.identity == *identity && !watched.is_lost) {
            Some(watched) if watched.has(heard) => Joined::Already,
            Some(watched) => {
                watched.listeners.push(Weak::clone(heard));
                Joined::New
            }
            None => Joined::NotWatched,
        }
    }

    /// Notes a directory that is about to be watched. Returns what has to be unwatched before: what was watched by the
    /// same path, and the same directory if it was lost under another path.
    pub(super) fn insert(&self, heard: &Weak<Heard>, path: &Path, identity: &Identity) -> Vec<PathBuf> {
        let mut watched = self.lock();
        let mut stale = vec![path.to_owned()];
        watched.retain(|other, watched| {
            let is_stale = other == path || watched.identity == *identity;
            if is_stale {
                watched.tell(); // the others have to look where their directory is
                stale.push(other.clone());
            }
            !is_stale
        });
        let listeners = vec![Weak::clone(heard)];
        watched.insert(path.to_owned(), Watched { identity: identity.clone(), is_lost: false, listeners });
        stale
    }

    /// Forgets a directory that could not be watched.
    pub(super) fn remove(&self, path: &Path) {
        self.lock().remove(path);
    }

    /// Notes that no directory may be watched any more.
    pub(super) fn lose_all(&self) {
        self.lock().values_mut().for_each(Watched::lose);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    fn has(&self, heard: &Weak<Heard>) -> bool {
        !self.is_lost && self.listeners.iter().any(|other| other.ptr_eq(heard))
    }

    fn is_useful(&self) -> bool {
        !self.is_lost && self.listeners.iter().any(|listener| listener.strong_count() > 0)
    }

    fn tell(&self) {
        self.listeners.iter().filter_map(Weak::upgrade).for_each(|heard| heard.tell());
    }

    fn lose(&mut self) {
        self.is_lost = true;
        self.tell();
    }
}

fn is_wanted(wanted: &BTreeMap<PathBuf, Directory>, identity: &Identity) -> bool {
    wanted.values().any(|directory| directory.identity == *identity)
}

/// What is watched at this path and below it.
fn below<'a>(
    watched: &'a mut BTreeMap<PathBuf, Watched>,
    path: &'a Path,
) -> impl Iterator<Item = &'a mut Watched> + use<'a> {
    let from_here = watched.range_mut::<Path, _>((Bound::Included(path), Bound::Unbounded));
    from_here.take_while(move |(other, _)| other.starts_with(path)).map(|(_, watched)| watched)
}

/// Ignore read accesses: our own loads cause them. Every other kind is a hint.
fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}
