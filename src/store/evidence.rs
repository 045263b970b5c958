//! What fal has said about a credential. A success is proof that fal accepts it; a refusal is only a claim, as an
//! application behind fal can make it, too.

use std::{
    fmt,
    sync::{
        Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::generation::Generation;

/// The evidence for one credential, shared by all of its snapshots.
pub(super) struct Evidence {
    /// Whether it is accepted, in the lowest bit; above that, how often an accepted one was refused.
    state: AtomicU32,
    /// The store that it belongs to.
    store: Weak<dyn Witness>,
}

/// Whoever wants to know that a credential was accepted.
pub(super) trait Witness: Send + Sync {
    /// For the first time, or for the first time since it was refused.
    fn accepted(&self, generation: Generation);
}

/// The evidence as it stood at one moment. It changes when the credential is accepted, and when an accepted one is
/// refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(u32);

const ACCEPTED: u32 = 1;
const ONE_REFUSAL: u32 = 2;

impl Mark {
    pub(crate) fn is_accepted(self) -> bool {
        self.0 & ACCEPTED != 0
    }

    pub(crate) fn was_ever_accepted(self) -> bool {
        self.0 != 0
    }

    /// Whether a refused credential, of which this was the evidence then, was accepted since.
    pub(crate) fn was_accepted_until(self, now: Self) -> bool {
        !self.is_accepted() && now != self
    }
}

impl Evidence {
    pub(super) fn new(store: Weak<dyn Witness>) -> Self {
        Self { state: AtomicU32::new(0), store }
    }

    #[inline]
    pub(super) fn mark(&self) -> Mark {
        Mark(self.state.load(Ordering::Relaxed))
    }

    /// fal accepted a request that was sent when the evidence stood at `sent`.
    #[cold]
    pub(super) fn accept(&self, generation: Generation, sent: Mark) {
        if self.note(sent)
            && let Some(store) = self.store.upgrade()
        {
            store.accepted(generation);
        }
    }

    /// Notes that a request was accepted, and returns whether the store has to hear of it.
    pub(super) fn note(&self, sent: Mark) -> bool {
        let accepted = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| {
            // A request that was sent before the refusal proves nothing about the time after it. One that was never
            // accepted is accepted now, whenever the request was sent: fal has only just come to know it.
            let is_news = now & ACCEPTED == 0 && (now == 0 || now == sent.0 & !ACCEPTED);
            is_news.then_some(now | ACCEPTED)
        });
        accepted.is_ok()
    }

    /// A claim that fal does not know the credential. Until it is accepted again, it is in doubt.
    pub(super) fn doubt(&self) -> Mark {
        let doubted = |now: u32| (now & ACCEPTED != 0).then(|| (now & !ACCEPTED).wrapping_add(ONE_REFUSAL));
        match self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, doubted) {
            Ok(before) => Mark((before & !ACCEPTED).wrapping_add(ONE_REFUSAL)),
            Err(unchanged) => Mark(unchanged),
        }
    }

    /// Whether it belongs to the store at this address.
    pub(super) fn is_of(&self, store: *const ()) -> bool {
        self.store.as_ptr().cast::<()>() == store
    }
}

impl fmt::Debug for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evidence").field("mark", &self.mark()).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[derive(Default)]
    pub(crate) struct Counts(AtomicUsize);

    impl Witness for Counts {
        fn accepted(&self, _: Generation) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The evidence of a store that is not there.
    pub(crate) fn of_no_store() -> Arc<Evidence> {
        Arc::new(Evidence::new(Weak::<Counts>::new()))
    }

    fn watched() -> (Evidence, Arc<Counts>) {
        let store = Arc::new(Counts::default());
        let weak: Weak<Counts> = Arc::downgrade(&store);
        (Evidence::new(weak), store)
    }

    #[test]
    fn the_first_success_is_told_once() {
        let (evidence, store) = watched();
        let sent = evidence.mark();
        assert!(!sent.is_accepted() && !sent.was_ever_accepted());
        evidence.accept(Generation::FIRST, sent);
        evidence.accept(Generation::FIRST, sent);
        assert!(evidence.mark().is_accepted());
        assert_eq!(store.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_refusal_of_one_never_accepted_changes_nothing() {
        let (evidence, _store) = watched();
        let before = evidence.mark();
        assert_eq!(evidence.doubt(), before);
        evidence.accept(Generation::FIRST, before);
        assert!(evidence.mark().is_accepted());
    }

    #[test]
    fn only_a_request_sent_after_the_refusal_ends_the_doubt() {
        let (evidence, store) = watched();
        evidence.accept(Generation::FIRST, evidence.mark());
        let before = evidence.mark();
        let doubted = evidence.doubt();
        assert!(!doubted.is_accepted() && doubted.was_ever_accepted());
        assert_eq!(evidence.doubt(), doubted, "more refusals start no new doubt");

        evidence.accept(Generation::FIRST, before);
        assert_eq!(evidence.mark(), doubted);
        evidence.accept(Generation::FIRST, doubted);
        assert!(evidence.mark().is_accepted());
        assert_eq!(store.0.load(Ordering::Relaxed), 2);
        assert_ne!(evidence.doubt(), doubted, "the next doubt is another one");
    }

    #[test]
    fn evidence_belongs_to_one_store() {
        let (evidence, store) = watched();
        let (_, other) = watched();
        assert!(evidence.is_of(Arc::as_ptr(&store).cast()));
        assert!(!evidence.is_of(Arc::as_ptr(&other).cast()));
    }
}
