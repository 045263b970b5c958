use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
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
/// snapshot for itself, as long as there are no more of them than this.
const COPIES: usize = 16;

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
}

impl Slot {
    pub(super) fn new(first: Snapshot) -> Self {
        Self { current: ArcSwap::from_pointee(copies(first)) }
    }

    pub(super) fn load(&self) -> Snapshot {
        // A whole reference, not a guard: it stays with the request until the response is there, and guards that
        // live long or pile up cost every other reader.
        self.current.load()[COPY.with(|copy| *copy)].clone()
    }

    pub(super) fn publish(&self, next: Snapshot) {
        self.current.store(Arc::new(copies(next)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn snapshot(key: &str, generation: Generation) -> Snapshot {
        Snapshot::new(Credential::key(key).unwrap(), generation, "test".into())
    }

    fn first() -> Slot {
        Slot::new(snapshot("first:secret", Generation::FIRST))
    }

    #[test]
    fn each_copy_says_the_same_and_has_bytes_of_its_own() {
        let slot = first();
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
        let slot = first();
        let place = || slot.load().credential().header().as_bytes().as_ptr().addr();
        let (here, again) = (place(), place());
        assert_eq!(here, again);
        // Other tests start threads too, so no single one need get another copy than this one.
        let elsewhere: HashSet<_> =
            (0..COPIES).map(|_| std::thread::scope(|scope| scope.spawn(place).join().unwrap())).collect();
        assert!(elsewhere.len() > 1);
    }
}
