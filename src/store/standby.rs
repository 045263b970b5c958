//! The credential beside the one in use, for as long as fal has not accepted the newest one.

use std::time::Duration;

use tokio::time::Instant;

use super::{evidence::Mark, slot::Snapshot};
use crate::{
    application::{Application, ByApplication},
    backoff::{exponential, jittered},
};

/// A newest credential that fal refused is tried again after this pause, then after twice the time, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) enum Standby {
    /// fal has accepted the newest credential, or there is no other one.
    #[default]
    Nothing,
    /// The newest credential is in use. This is the previous one, the way back.
    Previous { snapshot: Snapshot, since: Instant },
    /// fal has refused the newest credential before it ever accepted it, so the previous one is in use again. This is
    /// the newest one.
    Newest { snapshot: Snapshot, first_try: Instant, tries: ByApplication<Tries> },
}

/// The requests to one application that have tried a newest credential which is not in use. An application that refuses
/// whatever it gets puts off only its own tries.
#[derive(Default)]
pub(super) struct Tries {
    /// Absent before the first one.
    next: Option<Instant>,
    made: u32,
    /// The evidence for the credential in use when this application last refused it in a doubt that was new.
    other_refused: Option<Mark>,
}

/// A credential that a request may be sent with.
#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) snapshot: Snapshot,
    /// Whether fal has refused it before it ever accepted it, so that an older one is in use.
    pub(crate) is_set_aside: bool,
}

impl Candidate {
    pub(super) fn is_accepted(&self) -> bool {
        self.snapshot.mark().is_accepted()
    }
}

impl Standby {
    pub(super) fn newest(snapshot: Snapshot) -> Self {
        Self::Newest { snapshot, first_try: Instant::now() + jittered(FIRST_PAUSE), tries: ByApplication::default() }
    }

    pub(super) fn is_newest(&self) -> bool {
        matches!(self, Self::Newest { .. })
    }

    /// The newest credential, if it is not in use.
    pub(super) fn newest_snapshot(&self) -> Option<&Snapshot> {
        match self {
            Self::Newest { snapshot, .. } => Some(snapshot),
            Self::Nothing | Self::Previous { .. } => None,
        }
    }

    /// The credential that may be tried in place of the one in use; a previous one that has been replaced for longer
    /// than `overlap` may not.
    pub(super) fn snapshot(&self, overlap: Duration) -> Option<&Snapshot> {
        match self {
            Self::Nothing => None,
            Self::Previous { snapshot, since } => (since.elapsed() < overlap).then_some(snapshot),
            Self::Newest { snapshot, .. } => Some(snapshot),
        }
    }

    /// The way back when another credential becomes the newest one. `current` is in use, and is replaced.
    pub(super) fn replaced(self, current: &Snapshot, current_was_refused: bool) -> Self {
        match self {
            // A credential that was never accepted does not end the way back to one that was, or may be.
            Self::Previous { snapshot, since }
                if !current.mark().was_ever_accepted()
                    && (snapshot.mark().was_ever_accepted() || current_was_refused) =>
            {
                Self::Previous { snapshot, since }
            }
            Self::Nothing if current_was_refused && !current.mark().was_ever_accepted() => Self::Nothing,
            _ => Self::Previous { snapshot: current.clone(), since: Instant::now() },
        }
    }

    /// This application has refused the credential in use, of which this is the evidence. If it is the first time in this
    /// doubt, the newest one is tried at once.
    pub(super) fn other_refused(&mut self, application: Application, in_use: Mark) {
        let Self::Newest { tries, .. } = self else { return };
        let tries = tries.of(application);
        if !tries.other_refused.is_some_and(|mark| mark.is_same_doubt(in_use)) {
            *tries = Tries { next: Some(Instant::now()), made: 0, other_refused: Some(in_use) };
        }
    }

    /// Whether this application has refused the credential in use, and nothing was proven since.
    pub(super) fn was_other_refused(&mut self, application: Application, in_use: Mark) -> bool {
        let Self::Newest { tries, .. } = self else { return false };
        tries.of(application).other_refused.is_some_and(|mark| mark.is_same_doubt(in_use))
    }

    /// The newest credential, if it is time to try it with a request to this application. The next time is later each
    /// time.
    pub(super) fn take_try(&mut self, application: Application) -> Option<Snapshot> {
        let Self::Newest { snapshot, first_try, tries } = self else { return None };
        let tries = tries.of(application);
        let now = Instant::now();
        if now < tries.next.unwrap_or(*first_try) {
            return None;
        }
        tries.made = tries.made.saturating_add(1);
        tries.next = Some(now + jittered(exponential(FIRST_PAUSE, tries.made, LONGEST_PAUSE)));
        Some(snapshot.clone())
    }
}
