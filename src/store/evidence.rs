//! What fal has said about a credential. A success is proof that fal accepts it; a refusal is only a claim, as an
//! application behind fal can make it, too.

use std::{
    fmt,
    sync::{
        Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::generation::Generation;

/// A credential that fal has accepted counts as refused if it is refused for this long without being accepted. One
/// refusal alone may be an application's.
pub(super) const DOUBT_IS_CONFIRMED: Duration = Duration::from_secs(2);

/// The evidence for one credential, shared by all of its snapshots.
pub(super) struct Evidence {
    /// The latest [`Mark`].
    state: AtomicU32,
    /// Whether a request has succeeded since that was last asked which was sent too early to end the doubt.
    late_success: AtomicBool,
    /// The store that it belongs to.
    store: Weak<dyn Witness>,
}

/// Whoever wants to know that a credential was accepted.
pub(super) trait Witness: Send + Sync {
    /// For the first time, or for the first time since it was refused.
    fn accepted(&self, generation: Generation);

    /// A request was accepted that was sent with the previous one because this newer one was refused.
    fn worked_instead_of(&self, newer: Generation);
}

/// The evidence as it stood at one moment.
///
/// The lowest bit says whether the credential is accepted. The highest twelve are the number of the doubt: an accepted one
/// was refused so often. The bits between are the number of the refusal within a doubt; once the doubt has ended, of the
/// last one before the request was sent that has ended it. Both numbers are small, as nearly every request carries a mark
/// and nearly none looks at it. All are zero until the credential is accepted for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(u32);

const ACCEPTED: u32 = 1;
const ONE_REFUSAL: u32 = 2;
const ONE_DOUBT: u32 = 1 << 20;
const REFUSALS: u32 = ONE_DOUBT - ONE_REFUSAL;

impl Mark {
    pub(crate) fn is_accepted(self) -> bool {
        self.0 & ACCEPTED != 0
    }

    pub(crate) fn was_ever_accepted(self) -> bool {
        self.0 != 0
    }

    /// Whether a refused credential, of which this was the evidence right after that, was accepted since: in a request
    /// that was sent after the refusal. One that was under way when the credential was revoked proves nothing.
    pub(crate) fn was_accepted_until(self, now: Self) -> bool {
        if !self.was_ever_accepted() {
            return now != self;
        }
        let is_proof = self.doubt() != now.doubt() || now.refusals() >= self.refusals();
        !self.is_accepted() && now.is_accepted() && is_proof
    }

    /// Whether nothing was proven between the two.
    pub(crate) fn is_same_doubt(self, other: Self) -> bool {
        self.doubt() == other.doubt() && self.is_accepted() == other.is_accepted()
    }

    fn doubt(self) -> u32 {
        self.0 / ONE_DOUBT
    }

    fn refusals(self) -> u32 {
        self.0 & REFUSALS
    }
}

impl Evidence {
    pub(super) fn new(store: Weak<dyn Witness>) -> Self {
        Self { state: AtomicU32::new(0), late_success: AtomicBool::new(false), store }
    }

    #[inline]
    pub(super) fn mark(&self) -> Mark {
        Mark(self.state.load(Ordering::Relaxed))
    }

    /// fal accepted a request that was sent when the evidence stood at `sent`.
    #[cold]
    pub(super) fn accept(&self, generation: Generation, sent: Mark) {
        if !self.note(sent) {
            self.late_success.store(true, Ordering::Relaxed);
        } else if let Some(store) = self.store.upgrade() {
            store.accepted(generation);
        }
    }

    pub(super) fn worked_instead_of(&self, newer: Generation) {
        if let Some(store) = self.store.upgrade() {
            store.worked_instead_of(newer);
        }
    }

    /// Whether a request has succeeded since this was last asked that did not end the doubt, as it was sent before. When a
    /// credential is revoked, there are soon no more of these.
    pub(super) fn take_late_success(&self) -> bool {
        self.late_success.swap(false, Ordering::Relaxed)
    }

    /// Notes that a request was accepted, and returns whether the store has to hear of it.
    pub(super) fn note(&self, sent: Mark) -> bool {
        let accepted = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| {
            // A request that was sent before the refusal proves nothing about the time after it. One that was never
            // accepted is accepted now, whenever the request was sent: fal has only just come to know it.
            let now = Mark(now);
            let is_news = !now.is_accepted() && (!now.was_ever_accepted() || now.doubt() == sent.doubt());
            is_news.then_some((now.doubt() * ONE_DOUBT) | sent.refusals() | ACCEPTED)
        });
        accepted.is_ok()
    }

    /// A claim that fal does not know the credential. Until it is accepted again, it is in doubt.
    pub(super) fn doubt(&self) -> Mark {
        let doubted = |now: u32| {
            let mark = Mark(now);
            if !mark.was_ever_accepted() {
                None
            } else if mark.is_accepted() || mark.refusals() == REFUSALS {
                // When no number is left, the next doubt begins, so that a success still answers only what was refused
                // before it was sent. Zero would mean that it was never accepted.
                Some((mark.doubt() * ONE_DOUBT).wrapping_add(ONE_DOUBT).max(ONE_DOUBT))
            } else {
                Some(now + ONE_REFUSAL)
            }
        };
        let before = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, doubted);
        Mark(before.map_or_else(|unchanged| unchanged, |before| doubted(before).unwrap_or(before)))
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

        fn worked_instead_of(&self, _: Generation) {}
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
        assert!(evidence.doubt().is_same_doubt(doubted), "more refusals start no new doubt");

        evidence.accept(Generation::FIRST, before);
        assert!(!evidence.mark().is_accepted());
        evidence.accept(Generation::FIRST, doubted);
        assert!(evidence.mark().is_accepted());
        assert_eq!(store.0.load(Ordering::Relaxed), 2);
        assert!(!evidence.doubt().is_same_doubt(doubted), "the next doubt is another one");
    }

    #[test]
    fn a_success_answers_the_refusals_before_it_was_sent() {
        let (evidence, _store) = watched();
        let never = evidence.mark();
        evidence.accept(Generation::FIRST, never);
        assert!(never.was_accepted_until(evidence.mark()));

        let first = evidence.doubt();
        let sent = evidence.mark();
        let second = evidence.doubt();
        assert!(!first.was_accepted_until(evidence.mark()));
        evidence.accept(Generation::FIRST, sent);
        assert!(first.was_accepted_until(evidence.mark()));
        assert!(!second.was_accepted_until(evidence.mark()), "it was under way then");

        // The next doubt began after both.
        let third = evidence.doubt();
        assert!(!second.was_accepted_until(third) && never.was_accepted_until(third));
        evidence.accept(Generation::FIRST, third);
        for refused in [first, second, third] {
            assert!(refused.was_accepted_until(evidence.mark()));
        }
    }

    #[test]
    fn after_the_last_refusal_of_a_doubt_another_doubt_begins() {
        let (evidence, _store) = watched();
        evidence.state.store(ONE_DOUBT | (REFUSALS - ONE_REFUSAL), Ordering::Relaxed);
        let sent = evidence.mark();
        let last = evidence.doubt();
        assert_eq!(last.refusals(), REFUSALS);
        let next = evidence.doubt();
        assert_eq!((next, evidence.doubt()), (Mark(2 * ONE_DOUBT), Mark(2 * ONE_DOUBT + ONE_REFUSAL)));

        evidence.accept(Generation::FIRST, sent);
        assert!(!evidence.mark().is_accepted(), "it was sent before these refusals");
        evidence.accept(Generation::FIRST, next);
        assert!(last.was_accepted_until(evidence.mark()) && next.was_accepted_until(evidence.mark()));
    }

    #[test]
    fn after_the_last_doubt_comes_the_first() {
        let (evidence, _store) = watched();
        for state in [u32::MAX, u32::MAX - ACCEPTED] {
            evidence.state.store(state, Ordering::Relaxed);
            assert_eq!(evidence.doubt(), Mark(ONE_DOUBT));
        }
    }

    #[test]
    fn evidence_belongs_to_one_store() {
        let (evidence, store) = watched();
        let (_, other) = watched();
        assert!(evidence.is_of(Arc::as_ptr(&store).cast()));
        assert!(!evidence.is_of(Arc::as_ptr(&other).cast()));
    }
}
