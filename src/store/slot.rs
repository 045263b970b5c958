use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::{credential::Credential, generation::Generation};

/// A credential as the store held it at one moment: what one request is sent with.
///
/// Cheap to clone. It keeps its secret in memory for as long as it lives, so it belongs to a request and not into
/// a struct.
#[derive(Clone)]
pub struct Snapshot {
    inner: Arc<Published>,
}

/// Aligned, so that the count of the references to it shares a cache line with nothing.
#[repr(align(128))]
struct Published {
    credential: Credential,
    generation: Generation,
    source: Arc<str>,
}

impl Snapshot {
    pub(super) fn new(credential: Credential, generation: Generation, source: Arc<str>) -> Self {
        Self { inner: Arc::new(Published { credential, generation, source }) }
    }

    /// The credential.
    #[must_use]
    pub fn credential(&self) -> &Credential {
        &self.inner.credential
    }

    /// Which of the store's credentials it is.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.inner.generation
    }

    /// Where the credential was found, such as `env:FAL_KEY`.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.inner.source
    }

    pub(crate) fn source_arc(&self) -> &Arc<str> {
        &self.inner.source
    }

    fn duplicate(&self) -> Self {
        Self::new(self.credential().duplicate(), self.generation(), Arc::clone(self.source_arc()))
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("credential", self.credential())
            .field("generation", &self.generation().get())
            .field("source", &self.source())
            .finish()
    }
}

/// Threads that count their references in one place slow each other down several times, so each has a copy of the
/// snapshot for itself, as long as there are no more of them than this. More copies are dearer to publish.
const COPIES: usize = 8;

type Copies = [Snapshot; COPIES];

fn copies(snapshot: Snapshot) -> Copies {
    let mut copies = [(); COPIES].map(|()| snapshot.duplicate());
    copies[0] = snapshot;
    copies
}

thread_local! {
    /// Which of the copies is this thread's.
    static COPY: usize = {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        THREADS.fetch_add(1, Ordering::Relaxed) % COPIES
    };
}

/// Where the current snapshot lies: many readers, who take no lock, and one writer at a time.
///
/// The only place that knows of `arc-swap`.
pub(super) struct Slot {
    current: ArcSwap<Copies>,
    /// That of `current`, or for a moment the one before.
    generation: AtomicU64,
}

impl Slot {
    pub(super) fn new(first: Snapshot) -> Self {
        Self { generation: AtomicU64::new(first.generation().get()), current: ArcSwap::from_pointee(copies(first)) }
    }

    pub(super) fn load(&self) -> Snapshot {
        // A whole reference, not a guard: it stays with the request until the response is there, and guards that
        // live long or pile up cost every other reader.
        self.current.load()[COPY.with(|copy| *copy)].clone()
    }

    /// The same for somebody who asks again and again: at half the price, as long as nothing was published.
    #[inline]
    pub(super) fn load_by(&self, hint: &mut Hint) -> Snapshot {
        if hint.generation == self.generation.load(Ordering::Acquire)
            && let Some(inner) = hint.snapshot.upgrade()
        {
            return Snapshot { inner };
        }
        self.load_and_note(hint)
    }

    fn load_and_note(&self, hint: &mut Hint) -> Snapshot {
        let snapshot = self.load();
        // Not the first time: a service that is cloned for each request asks once, and would count for nothing.
        if hint.generation != 0 {
            hint.snapshot = Arc::downgrade(&snapshot.inner);
        }
        hint.generation = snapshot.generation().get();
        snapshot
    }

    pub(super) fn publish(&self, next: Snapshot) {
        let generation = next.generation().get();
        self.current.store(Arc::new(copies(next)));
        self.generation.store(generation, Ordering::Release);
    }
}

/// Where somebody found the current snapshot the last time. It keeps no secret alive.
#[derive(Default)]
pub(crate) struct Hint {
    /// 0 before the first time.
    generation: u64,
    snapshot: Weak<Published>,
}

impl Clone for Hint {
    /// Knows nothing, as copying what is known would cost what it spares.
    fn clone(&self) -> Self {
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn snapshot(key: &str, generation: Generation) -> Snapshot {
        Snapshot::new(Credential::key(key).unwrap(), generation, "test".into())
    }

    fn two() -> (Slot, Snapshot) {
        let first = snapshot("first:secret", Generation::FIRST);
        let second = snapshot("second:secret", Generation::FIRST.next());
        (Slot::new(first), second)
    }

    #[test]
    fn each_copy_says_the_same_and_has_bytes_of_its_own() {
        let (slot, _) = two();
        let copies = slot.current.load();
        let places: HashSet<_> = copies.iter().map(|copy| copy.credential().header().as_bytes().as_ptr()).collect();
        assert_eq!(places.len(), COPIES);
        for copy in copies.iter() {
            assert_eq!(copy.credential().header(), "Key first:secret");
            assert!(copy.credential().header().is_sensitive());
            assert_eq!(format!("{copy:?}"), format!("{:?}", copies[0]));
        }
    }

    #[test]
    fn threads_have_copies_of_their_own() {
        let (slot, _) = two();
        let place = || slot.load().credential().header().as_bytes().as_ptr().addr();
        let (here, again) = (place(), place());
        assert_eq!(here, again);
        // Other tests start threads too, so no single one need get another copy than this one.
        let elsewhere: HashSet<_> =
            (0..COPIES).map(|_| std::thread::scope(|scope| scope.spawn(place).join().unwrap())).collect();
        assert!(elsewhere.len() > 1);
    }

    #[test]
    fn a_hint_is_used_from_the_third_time_on_and_never_outlives_a_publication() {
        let (slot, second) = two();
        let mut hint = Hint::default();
        for _ in 0..4 {
            assert_eq!(slot.load_by(&mut hint).generation(), Generation::FIRST);
        }
        assert!(hint.snapshot.upgrade().is_some());

        slot.publish(second);
        assert_eq!(slot.load_by(&mut hint).credential().header(), "Key second:secret");
        assert_eq!(slot.load_by(&mut hint).generation(), Generation::FIRST.next());
    }

    #[test]
    fn a_hint_keeps_nothing_alive_and_a_clone_knows_nothing() {
        let (slot, second) = two();
        let mut hint = Hint::default();
        for _ in 0..3 {
            slot.load_by(&mut hint);
        }
        assert_eq!(hint.clone().generation, 0);
        let held = slot.load_by(&mut hint);
        slot.publish(second);
        assert!(hint.snapshot.upgrade().is_some());
        drop(held);
        assert!(hint.snapshot.upgrade().is_none());
    }
}
