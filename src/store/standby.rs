//! The credential beside the one in use, for as long as fal has not accepted the newest one.

use std::time::Duration;

use tokio::time::Instant;

use super::{slot::Snapshot, tries::Tries};

#[derive(Default)]
pub(super) enum Standby {
    /// fal has accepted the newest credential, or there is no other one.
    #[default]
    Nothing,
    /// The newest credential is in use, but for the applications that have refused it. This is the previous one, the way
    /// back.
    Previous { snapshot: Snapshot, since: Instant, tries: Tries },
    /// fal has refused the newest credential before it ever accepted it, and has accepted the previous one after that. So
    /// that one is in use again. This is the newest one.
    Newest { snapshot: Snapshot, tries: Tries },
}

/// A credential that a request may be sent with.
#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) snapshot: Snapshot,
    /// Whether it was refused before fal ever accepted it, so that an older one is used.
    pub(crate) is_set_aside: bool,
}

impl Candidate {
    pub(super) fn is_accepted(&self) -> bool {
        self.snapshot.mark().is_accepted()
    }
}

impl Standby {
    pub(super) fn previous(snapshot: Snapshot) -> Self {
        Self::Previous { snapshot, since: Instant::now(), tries: Tries::default() }
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
            Self::Previous { snapshot, since, .. } => (since.elapsed() < overlap).then_some(snapshot),
            Self::Newest { snapshot, .. } => Some(snapshot),
        }
    }

    /// The way back when another credential becomes the newest one. `current` is in use, and is replaced.
    pub(super) fn replaced(self, current: &Snapshot, current_was_refused: bool) -> Self {
        match self {
            // A credential that was never accepted does not end the way back to one that was, or may be.
            Self::Previous { snapshot, since, .. }
                if !current.mark().was_ever_accepted()
                    && (snapshot.mark().was_ever_accepted() || current_was_refused) =>
            {
                Self::Previous { snapshot, since, tries: Tries::default() }
            }
            _ => Self::previous(current.clone()),
        }
    }
}
