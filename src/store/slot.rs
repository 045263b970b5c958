use std::{
    cell::RefCell,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;

use super::evidence::{Evidence, Mark};
use crate::{credential::Credential, generation::Generation};

/// A credential as the store held it at one moment: what one request is sent with.
///
/// Cheap to clone. A snapshot keeps its secret in memory for as long as it lives, so keep it for one request and not in
/// a struct.
#[derive(Clone)]
pub struct Snapshot {
    inner: Arc<Published>,
}

/// Aligned, so that its reference count shares a cache line with nothing else.
#[repr(align(128))]
struct Published {
    credential: Credential,
    generation: Generation,
    source: Arc<str>,
    evidence: Arc<Evidence>,
    /// The newer one that was refused, so that a request is sent with this one.
    instead_of: Option<Generation>,
}

impl Snapshot {
    /// `source` is where the credential was found, unless it says so itself.
    pub(super) fn new(
        credential: Credential,
        generation: Generation,
        source: &Arc<str>,
        evidence: Arc<Evidence>,
    ) -> Self {
        let source = Arc::clone(credential.source_arc().unwrap_or(source));
        Self { inner: Arc::new(Published { credential, generation, source, evidence, instead_of: None }) }
    }

    /// The credential.
    pub fn credential(&self) -> &Credential {
        &self.inner.credential
    }

    /// Which of the store's credentials it is.
    pub fn generation(&self) -> Generation {
        self.inner.generation
    }

    /// Where the credential was found, such as `env:FAL_KEY`.
    pub fn source(&self) -> &str {
        &self.inner.source
    }

    pub(crate) fn source_arc(&self) -> &Arc<str> {
        &self.inner.source
    }

    /// The evidence for this credential as it stands now.
    #[inline]
    pub(crate) fn mark(&self) -> Mark {
        self.inner.evidence.mark()
    }

    /// The same for a request that is sent with it because this newer one was refused.
    pub(super) fn in_place_of(&self, newer: Generation) -> Self {
        let Published { credential, generation, source, evidence, .. } = &*self.inner;
        let (credential, source, evidence) = (credential.clone(), Arc::clone(source), Arc::clone(evidence));
        let inner = Published { credential, generation: *generation, source, evidence, instead_of: Some(newer) };
        Self { inner: Arc::new(inner) }
    }

    /// Whether it is news if fal accepts a request with this.
    #[inline]
    pub(crate) fn wants_proof(&self) -> bool {
        !self.mark().is_accepted() || self.inner.instead_of.is_some()
    }

    /// fal accepted a request with this credential, which was sent when the evidence stood at `sent`.
    #[inline]
    pub(crate) fn note_accepted(&self, sent: Mark) {
        if !self.mark().is_accepted() {
            self.inner.evidence.accept(self.generation(), sent);
        }
        if let Some(newer) = self.inner.instead_of {
            self.inner.evidence.worked_instead_of(newer);
        }
    }

    pub(super) fn evidence(&self) -> &Arc<Evidence> {
        &self.inner.evidence
    }

    fn duplicate(&self) -> Self {
        let evidence = Arc::clone(self.evidence());
        Self::new(self.credential().duplicate(), self.generation(), self.source_arc(), evidence)
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

/// How many copies of a snapshot there are. Threads that count references in one place slow each other down, so each of
/// the first threads has a copy of its own. More copies would make it slower to publish.
const COPIES: usize = 8;

type Copies = [Snapshot; COPIES];

fn copies(snapshot: Snapshot) -> Copies {
    let mut copies = [(); COPIES].map(|()| snapshot.duplicate());
    copies[0] = snapshot;
    copies
}

thread_local! {
    /// The index of this thread's copy.
    static COPY: usize = {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        THREADS.fetch_add(1, Ordering::Relaxed) % COPIES
    };
}

/// Holds the current snapshot, for many readers without a lock and one writer at a time.
///
/// Only this file uses `arc-swap`.
pub(super) struct Slot {
    current: ArcSwap<Copies>,
    /// The number under which `current` was published, or [`CHANGING`].
    publication: AtomicU64,
}

/// Marks a publish in progress: threads must not use their cached snapshot. Without it, one thread could still return
/// the old snapshot after another has returned the new one.
const CHANGING: u64 = 0;

/// A number that no publication ever has: a snapshot that is cached under it is never used again.
const NEVER: u64 = u64::MAX;

/// The snapshot that a thread has loaded last. The reference is weak, so that it keeps no secret alive.
///
/// One for each thread is enough, as few processes have several stores. A thread that takes turns between two slots
/// pays 20 ns each time.
struct Found {
    publication: u64,
    snapshot: Weak<Published>,
}

thread_local! {
    static FOUND: RefCell<Found> = const { RefCell::new(Found { publication: NEVER, snapshot: Weak::new() }) };
}

impl Slot {
    pub(super) fn new(first: Snapshot) -> Self {
        Self { current: ArcSwap::from_pointee(copies(first)), publication: AtomicU64::new(next_publication()) }
    }

    /// Costs half as much when this thread has already loaded the current publication.
    #[inline]
    pub(super) fn load(&self) -> Snapshot {
        let publication = self.publication.load(Ordering::Acquire);
        let found = FOUND.try_with(|found| {
            let found = found.borrow();
            if found.publication == publication { found.snapshot.upgrade() } else { None }
        });
        match found {
            Ok(Some(inner)) => Snapshot { inner },
            _ => self.load_and_note(publication),
        }
    }

    /// Caches under the publication number read *before* the load, so that a stale snapshot is never cached under a
    /// newer number.
    #[cold]
    fn load_and_note(&self, publication: u64) -> Snapshot {
        // A whole reference and not a guard: a request keeps it until the response is there, and guards that live long
        // or pile up slow down every other reader.
        let snapshot = self.current.load()[COPY.with(|copy| *copy)].clone();
        let publication = if publication == CHANGING { NEVER } else { publication };
        let found = Found { publication, snapshot: Arc::downgrade(&snapshot.inner) };
        let _ = FOUND.try_with(|last| last.replace(found)); // a thread that is ending caches nothing any more
        snapshot
    }

    /// Must be called by one writer at a time.
    pub(super) fn publish(&self, next: Snapshot) {
        let next = Arc::new(copies(next));
        // A thread that sees the next snapshot sees this as well, since `current` is released after it.
        self.publication.store(CHANGING, Ordering::Relaxed);
        let _dropped_at_the_end = self.current.swap(next);
        self.publication.store(next_publication(), Ordering::Release);
    }
}

/// A number that no other publication has, in any slot. It is never [`CHANGING`] or [`NEVER`].
fn next_publication() -> u64 {
    static PUBLICATIONS: AtomicU64 = AtomicU64::new(1);
    PUBLICATIONS.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{super::evidence::tests::of_no_store, *};

    fn snapshot(key: &str, generation: Generation) -> Snapshot {
        Snapshot::new(Credential::key(key).unwrap(), generation, &"test".into(), of_no_store())
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

    fn found() -> (u64, Option<Arc<Published>>) {
        FOUND.with_borrow(|found| (found.publication, found.snapshot.upgrade()))
    }

    #[test]
    fn what_a_thread_found_is_used_until_the_next_publication() {
        let (slot, second) = two();
        let first = slot.load();
        let (publication, noted) = found();
        assert_eq!(publication, slot.publication.load(Ordering::Relaxed));
        assert!(Arc::ptr_eq(&noted.unwrap(), &first.inner));

        // What is noted is what is handed out.
        let mark = snapshot("mark:secret", Generation::FIRST);
        FOUND.with_borrow_mut(|found| found.snapshot = Arc::downgrade(&mark.inner));
        assert_eq!(slot.load().credential().header(), "Key mark:secret");

        slot.publish(second);
        assert_eq!(slot.load().credential().header(), "Key second:secret");
        assert_eq!(slot.load().generation(), Generation::FIRST.next());
    }

    #[test]
    fn what_was_found_in_one_slot_is_not_handed_out_by_another() {
        let (one, _) = two();
        let other = Slot::new(snapshot("other:secret", Generation::FIRST));
        for _ in 0..3 {
            assert_eq!(one.load().credential().header(), "Key first:secret");
            assert_eq!(other.load().credential().header(), "Key other:secret");
        }
    }

    #[test]
    fn while_a_publication_is_made_nothing_is_found_again() {
        let (slot, second) = two();
        let _under_way = slot.load();
        slot.publication.store(CHANGING, Ordering::Relaxed);
        assert_eq!(slot.load().generation(), Generation::FIRST);
        slot.current.store(Arc::new(copies(second)));
        assert_eq!(slot.load().generation(), Generation::FIRST.next());
    }

    #[test]
    fn what_one_thread_has_handed_out_no_other_is_behind() {
        const PUBLICATIONS: u64 = if cfg!(miri) { 20 } else { 20_000 };
        let slot = Slot::new(snapshot("id:secret", Generation::FIRST));
        let seen = AtomicU64::new(0);
        let done = std::sync::atomic::AtomicBool::new(false);
        let look = || {
            while !done.load(Ordering::Relaxed) {
                let before = seen.load(Ordering::Acquire);
                let generation = slot.load().generation().get();
                assert!(generation >= before, "{generation} after {before}");
                seen.fetch_max(generation, Ordering::AcqRel);
            }
        };
        std::thread::scope(|threads| {
            let readers = [threads.spawn(look), threads.spawn(look)];
            let mut generation = Generation::FIRST;
            for _ in 0..PUBLICATIONS {
                generation = generation.next();
                slot.publish(snapshot("id:secret", generation));
            }
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                assert!(reader.join().is_ok());
            }
        });
    }

    #[test]
    fn what_was_found_keeps_nothing_alive() {
        let (slot, second) = two();
        let held = slot.load();
        slot.publish(second);
        assert!(found().1.is_some());
        drop(held);
        assert!(found().1.is_none());
    }

    #[test]
    fn a_thread_that_is_ending_still_loads() {
        thread_local! {
            static LAST: RefCell<Option<LoadsWhenDropped>> = const { RefCell::new(None) };
        }
        struct LoadsWhenDropped(Slot, std::sync::mpsc::Sender<(bool, Generation)>);
        impl Drop for LoadsWhenDropped {
            fn drop(&mut self) {
                let has_no_notes = FOUND.try_with(|_| ()).is_err();
                self.1.send((has_no_notes, self.0.load().generation())).unwrap();
            }
        }
        let (slot, _) = two();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // What was made last is dropped first.
            LAST.set(Some(LoadsWhenDropped(slot, sender)));
            FOUND.with(|_| ());
        });
        assert_eq!(receiver.recv(), Ok((true, Generation::FIRST)));
    }
}
