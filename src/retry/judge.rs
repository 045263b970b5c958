//! What follows from a refusal: reads it, asks the store, and says whether to send the request again.
//!
//! Everyone who talks to fal comes here: the Tower layer, and whatever else sends requests with a store's credential.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::{sync::Semaphore, time::Instant};

use super::decision::{Action, Offer, Refused, Replayed, decide, is_final};
use crate::{
    auth::Stamp,
    error::{Reason, Refusal, RefusalParts, ReloadError, classify},
    events,
    generation::Generation,
    store::{CredentialStore, Snapshot},
};

/// How often a 403 may cause a load of the source, when it may at all.
const FORBIDDEN_INTERVAL: Duration = Duration::from_secs(60);

/// "For ever" must not overflow.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// For how long nobody waits for a successor of a credential that somebody has waited for in vain.
const IN_VAIN: Duration = Duration::from_secs(60);

/// By what rules a refusal is answered; shared by all clones of a service.
#[derive(Clone, Debug)]
pub(crate) struct Judge {
    pub(crate) store: Option<CredentialStore>,
    pub(crate) reload_wait: Duration,
    pub(crate) reload_on_forbidden: bool,
    /// How long after a rotation a request may be sent with the credential before it.
    pub(crate) overlap: Duration,
    pub(crate) waiting: Arc<Waiting>,
}

/// What all services of a layer share: those who wait for a newer credential, and the count of refusals.
#[derive(Debug)]
pub(crate) struct Waiting {
    places: Semaphore,
    /// The generation that somebody has waited for in vain for the whole time that one may wait, and when.
    in_vain: Mutex<Option<(Generation, Instant)>>,
    last_forbidden: Mutex<Option<Instant>>,
    refusals: events::Refusals,
}

/// A refused request and its answer.
pub(crate) struct Answer<'a> {
    pub(crate) status: StatusCode,
    pub(crate) headers: &'a HeaderMap,
    /// As much of the body as was read.
    pub(crate) body: Bytes,
    /// What the request was sent with this time, and the newest that it was ever sent with.
    pub(crate) sent_with: &'a Stamp,
    pub(crate) newest: &'a Stamp,
    /// Whether the request can be sent again, and whether it was.
    pub(crate) replayable: bool,
    pub(crate) replayed: Replayed,
}

/// What follows: the refusal, unless the request is sent again.
pub(crate) struct Verdict {
    pub(crate) replay: Option<ReplayWith>,
    pub(crate) refusal: Refusal,
}

pub(crate) enum ReplayWith {
    /// The store's current credential.
    Current,
    /// The one before it.
    Previous(Snapshot),
}

impl Waiting {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            places: Semaphore::new(most.min(Semaphore::MAX_PERMITS)),
            in_vain: Mutex::default(),
            last_forbidden: Mutex::default(),
            refusals: events::Refusals::default(),
        }
    }

    /// It lapses: what was in vain an hour ago may not be so today.
    fn was_in_vain(&self, generation: Generation) -> bool {
        let in_vain = *self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        in_vain.is_some_and(|(of, at)| of >= generation && at.elapsed() < IN_VAIN)
    }

    fn set_in_vain(&self, generation: Generation) {
        *self.in_vain.lock().unwrap_or_else(PoisonError::into_inner) = Some((generation, Instant::now()));
    }

    fn may_reload_for_forbidden(&self) -> bool {
        let now = Instant::now();
        let mut last = self.last_forbidden.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|last| now.duration_since(last) >= FORBIDDEN_INTERVAL);
        if may {
            *last = Some(now);
        }
        may
    }
}

impl Judge {
    /// Whether no other attempt follows from this status.
    pub(crate) fn is_final(&self, status: StatusCode) -> bool {
        is_final(status, self.reload_on_forbidden)
    }

    pub(crate) async fn judge(&self, answer: Answer<'_>) -> Verdict {
        let Answer { status, headers, body, sent_with, newest, replayable, replayed } = answer;
        let read = classify(status, headers, &body, Some(sent_with.credential()));
        let refused_by_fal = status == StatusCode::UNAUTHORIZED && read.reason != Reason::Application;
        if let (Some(store), Some(generation)) = (&self.store, sent_with.generation()) {
            store.note_refused(generation, read.reason);
        }
        // That the one before the newest does not work either is no news. Any other answer is about the one that it
        // was given to.
        let stamp = if refused_by_fal { newest } else { sent_with };
        let refused = Refused { status, reason: read.reason, generation: newest.generation(), replayable, replayed };
        let Acted { action, previous, reload } = match (&self.store, newest.generation()) {
            (Some(store), Some(generation)) => self.act(refused, store, generation).await,
            _ => Action::Refuse.into(),
        };
        self.waiting.refusals.tell(&events::Refused {
            status,
            reason: read.reason,
            action: action.as_str(),
            store: stamp.generation().and(self.store.as_ref()).map(CredentialStore::name),
            generation: stamp.generation(),
            source: stamp.source(),
            key_id: stamp.key_id(),
        });
        let replay = match action {
            Action::Replay => Some(ReplayWith::Current),
            Action::ReplayWithPrevious => previous.map(ReplayWith::Previous),
            Action::Refuse | Action::RefuseAndReload | Action::Reload => None,
        };
        let refusal = Refusal::new(RefusalParts {
            status,
            reason: read.reason,
            detail: read.detail,
            error_type: read.error_type,
            request_id: read.request_id,
            key_id: stamp.key_id().cloned(),
            generation: stamp.generation(),
            source: Arc::clone(stamp.source_arc()),
            headers: headers.clone(),
            body,
            replayable,
            replayed: replayed != Replayed::Not,
            reload,
        });
        Verdict { replay, refusal }
    }

    /// Decides, reloads if that is the decision, and decides again.
    async fn act(&self, refused: Refused, store: &CredentialStore, sent_with: Generation) -> Acted {
        let unauthorized = refused.status == StatusCode::UNAUTHORIZED;
        match self.decide(refused, store, true) {
            Acted { action: Action::Reload | Action::RefuseAndReload, .. }
                if !unauthorized && !self.waiting.may_reload_for_forbidden() =>
            {
                Action::Refuse.into()
            }
            Acted { action: Action::RefuseAndReload, .. } => {
                store.ask_past(sent_with);
                Action::RefuseAndReload.into()
            }
            Acted { action: Action::Reload, .. } => {
                let reload = self.wait_for_newer(store, sent_with, refused).await;
                Acted { reload, ..self.decide(refused, store, false) }
            }
            acted => acted,
        }
    }

    fn decide(&self, refused: Refused, store: &CredentialStore, may_reload: bool) -> Acted {
        let previous = store.previous(self.overlap);
        let offer = Offer {
            current: store.generation(),
            previous: previous.as_ref().map(Snapshot::generation),
            may_reload,
            may_reload_on_forbidden: self.reload_on_forbidden,
        };
        Acted { action: decide(refused, offer), previous, reload: None }
    }

    /// Has the store reload, and waits for a newer credential; says what went wrong with the reload, if anything did.
    async fn wait_for_newer(
        &self,
        store: &CredentialStore,
        newest: Generation,
        refused: Refused,
    ) -> Option<ReloadError> {
        let Ok(_place) = self.waiting.places.try_acquire() else {
            store.ask_past(newest);
            return None;
        };
        // A key is often revoked before its successor arrives, so there is a wait even if the source still brings
        // the old one. Once that was in vain, those who come later do not wait as well.
        let is_patient = refused.status == StatusCode::UNAUTHORIZED && !self.waiting.was_in_vain(newest);
        let deadline = is_patient.then(|| Instant::now() + self.reload_wait.min(LONGEST_WAIT));
        let mut error = None;
        let newer = store.wait_past(newest, deadline, &mut error);
        if tokio::time::timeout(self.reload_wait, newer).await.is_err()
            && is_patient
            && matches!(refused.reason, Reason::UnknownCredential | Reason::Unknown)
        {
            self.waiting.set_in_vain(newest);
        }
        error
    }
}

/// What was decided, with what it takes to do it.
struct Acted {
    action: Action,
    previous: Option<Snapshot>,
    reload: Option<ReloadError>,
}

impl From<Action> for Acted {
    fn from(action: Action) -> Self {
        Self { action, previous: None, reload: None }
    }
}
