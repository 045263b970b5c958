//! The credential beside the one in use, for as long as fal has not accepted the newest one.

use std::time::Duration;

use tokio::time::Instant;

use super::slot::Snapshot;
use crate::backoff::{exponential, jittered};

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
    Newest { snapshot: Snapshot, tries: u32, next_try: Instant },
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
        Self::Newest { snapshot, tries: 1, next_try: Instant::now() + jittered(FIRST_PAUSE) }
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

    /// The newest credential, if it is time to try it again. The next time is later each time.
    pub(super) fn take_try(&mut self) -> Option<Snapshot> {
        let Self::Newest { snapshot, tries, next_try } = self else { return None };
        let now = Instant::now();
        if now < *next_try {
            return None;
        }
        *next_try = now + jittered(exponential(FIRST_PAUSE, *tries, LONGEST_PAUSE));
        *tries = tries.saturating_add(1);
        Some(snapshot.clone())
    }
}
