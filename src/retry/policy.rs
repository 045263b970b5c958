//! The options of a layer, and how it answers a refusal: it reads the response, asks the store, and follows the
//! [rule](super::rule).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{Response, StatusCode};
use http_body::Body;
use tokio::{sync::Semaphore, time::Instant};

use super::{
    Mode,
    body::{Peeked, PeekedBody, ReplayMemory},
    rule::{self, Available, Decision, Outcome},
    transient::Transient,
};
use crate::{
    auth::Stamp,
    error::{Reason, RefusalParts, ReloadError, Replayed, classify},
    events,
    generation::Generation,
    store::{CredentialStore, Snapshot, WaitFor},
};

const DEFAULT_MAX_BODY: u64 = 256 * 1024;
const DEFAULT_REPLAY_MEMORY: usize = 64 * 1024 * 1024;
const DEFAULT_RELOAD_WAIT: Duration = Duration::from_secs(2);
const DEFAULT_OVERLAP: Duration = Duration::from_secs(30);
const DEFAULT_MAX_WAITING: usize = 1024;
const DEFAULT_READ_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a 403 may cause a load of the source, if it may at all.
const FORBIDDEN_INTERVAL: Duration = Duration::from_secs(60);

/// After one request has waited in full without a newer credential, others do not wait, for this long.
const FUTILE_WAIT_STANDS: Duration = Duration::from_secs(60);

/// The options of a layer, and what all services that come from it share.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// The store that is reloaded; `None` if requests bring their own credentials.
    store: Option<CredentialStore>,
    pub(super) max_body: u64,
    pub(super) memory: Arc<ReplayMemory>,
    pub(super) reload_wait: Duration,
    pub(super) reload_on_forbidden: bool,
    pub(super) overlap: Duration,
    pub(super) read_timeout: Duration,
    pub(super) transient: Option<Transient>,
    shared: Arc<LayerState>,
}

/// What the services of a layer share: those who wait for a newer credential, and the count of refusals.
#[derive(Debug)]
struct LayerState {
    places: Semaphore,
    /// The last credential for whose successor a request has waited in full without getting one, and when that was.
    futile_wait: Mutex<Option<(Generation, Instant)>>,
    last_forbidden: Mutex<Option<Instant>>,
    refusals: events::Refusals,
}

/// What was found out about a refused attempt.
pub(crate) struct Examined<R: Body> {
    pub(crate) response: Response<PeekedBody<R>>,
    pub(crate) parts: RefusalParts,
    /// With what to send the request again, if at all.
    pub(crate) replay: Option<ReplayWith>,
}

pub(crate) enum ReplayWith {
    /// The store's current credential.
    Current,
    /// The one before it.
    Previous(Snapshot),
}

impl Policy {
    pub(super) fn new(store: Option<CredentialStore>) -> Self {
        Self {
            store,
            max_body: DEFAULT_MAX_BODY,
            memory: Arc::new(ReplayMemory::new(DEFAULT_REPLAY_MEMORY)),
            reload_wait: DEFAULT_RELOAD_WAIT,
            reload_on_forbidden: false,
            overlap: DEFAULT_OVERLAP,
            read_timeout: DEFAULT_READ_TIMEOUT,
            transient: None,
            shared: Arc::new(LayerState::new(DEFAULT_MAX_WAITING)),
        }
    }

    pub(super) fn set_max_waiting(&mut self, requests: usize) {
        self.shared = Arc::new(LayerState::new(requests));
    }

    /// Has the store keep the previous credential for as long as this policy may use it.
    pub(super) fn arm(&self) {
        if let Some(store) = &self.store {
            store.keep_previous_for(self.overlap);
        }
    }

    /// Whether no other attempt follows a response with this status, whatever its body says.
    pub(super) fn is_final(&self, status: StatusCode) -> bool {
        rule::is_final(status, self.reload_on_forbidden)
    }

    /// Reads a transient failure to its end if it is short, which frees its connection for others, and waits.
    pub(crate) async fn back_off<R: Body>(self: Arc<Self>, failure: Option<R>, wait: Duration) {
        if let Some(body) = failure {
            drop(Peeked::read(body, self.read_timeout).await);
        }
        tokio::time::sleep(wait).await;
    }

    /// Reads a refusal, and finds out what follows from it. `newest` is the newest credential that the request was
    /// refused with, this time or earlier.
    pub(super) async fn examine<R: Body, M: Mode>(
        self: Arc<Self>,
        response: Response<R>,
        sent_with: Stamp,
        newest: Stamp,
        replayable: bool,
        replayed: Replayed,
    ) -> Examined<R> {
        let (head, body) = response.into_parts();
        let mut body = Peeked::read(body, self.read_timeout).await;
        if !M::RETURNS_RESPONSE {
            body.drop_rest(); // before any wait: other requests may need the connection
        }
        let start = body.start();
        let said = classify(head.status, &head.headers, &start, Some(sent_with.credential()));
        // If the previous credential was refused as well, report the newest one. Otherwise report the credential that
        // this attempt was sent with.
        let refused_by_fal = head.status == StatusCode::UNAUTHORIZED && said.reason != Reason::Application;
        let reported = if refused_by_fal { &newest } else { &sent_with };
        let mut parts = RefusalParts {
            status: head.status,
            reason: said.reason,
            detail: said.detail,
            error_type: said.error_type,
            request_id: said.request_id,
            key_id: reported.key_id().cloned(),
            generation: reported.generation(),
            newest: newest.generation(),
            source: Arc::clone(reported.source_arc()),
            headers: head.headers.clone(),
            body: start,
            replayable,
            replayed,
            reload: None,
        };
        let replay = self.respond(&mut parts, sent_with.generation()).await;
        Examined { response: Response::from_parts(head, PeekedBody::peeked(body)), parts, replay }
    }

    /// Tells the store, follows the rule, and tells the operator.
    async fn respond(&self, parts: &mut RefusalParts, sent_with: Option<Generation>) -> Option<ReplayWith> {
        if let (Some(store), Some(generation)) = (&self.store, sent_with) {
            store.note_refused(generation, parts.reason);
        }
        let (outcome, previous) = match (&self.store, parts.newest) {
            (Some(store), Some(newest)) => self.follow_rule(parts, store, newest).await,
            _ => (Outcome::Refused, None),
        };
        let store = parts.generation.and(self.store.as_ref()).map(CredentialStore::name);
        self.shared.refusals.tell(parts, outcome.as_str(), store);
        match outcome {
            Outcome::Refused | Outcome::RefusedAndReloaded => None,
            Outcome::Replayed => Some(ReplayWith::Current),
            Outcome::ReplayedWithPrevious => previous.map(ReplayWith::Previous),
        }
    }

    async fn follow_rule(
        &self,
        parts: &mut RefusalParts,
        store: &CredentialStore,
        newest: Generation,
    ) -> (Outcome, Option<Snapshot>) {
        let (decision, previous) = self.decide(parts, store);
        let asks = matches!(decision, Decision::Reload | Decision::Done(Outcome::RefusedAndReloaded));
        if asks && parts.status == StatusCode::FORBIDDEN && !self.shared.take_forbidden_reload() {
            return (Outcome::Refused, None);
        }
        match decision {
            Decision::Done(outcome) => {
                if outcome == Outcome::RefusedAndReloaded {
                    store.ask_past(newest);
                }
                (outcome, previous)
            }
            Decision::Reload => {
                parts.reload = self.wait_for_newer(parts, store, newest).await;
                let (decision, previous) = self.decide(parts, store);
                (decision.after_reload(), previous)
            }
        }
    }

    fn decide(&self, parts: &RefusalParts, store: &CredentialStore) -> (Decision, Option<Snapshot>) {
        let previous = store.previous(self.overlap);
        let available =
            Available { current: store.generation(), previous: previous.as_ref().map(Snapshot::generation) };
        (rule::decide(parts, available, self.reload_on_forbidden), previous)
    }

    /// Has the store reload, and waits for a newer credential. Returns what went wrong with the reload, if anything
    /// did.
    async fn wait_for_newer(
        &self,
        parts: &RefusalParts,
        store: &CredentialStore,
        newest: Generation,
    ) -> Option<ReloadError> {
        let Ok(_place) = self.shared.places.try_acquire() else {
            store.ask_past(newest);
            return None;
        };
        // Keys are often revoked before their successor is in place, so wait even if the source still returns the old
        // one. If one full wait brought nothing, later requests skip it.
        let waits = parts.status == StatusCode::UNAUTHORIZED && !self.shared.is_wait_futile(newest);
        let wait_for = if waits { WaitFor::Newer } else { WaitFor::OneAnswer };
        let waited = store.wait_past(newest, wait_for, self.reload_wait).await;
        if waited.timed_out && waits && matches!(parts.reason, Reason::UnknownCredential | Reason::Unknown) {
            self.shared.note_futile_wait(newest);
        }
        waited.error
    }
}

impl LayerState {
    fn new(places: usize) -> Self {
        Self {
            places: Semaphore::new(places.min(Semaphore::MAX_PERMITS)),
            futile_wait: Mutex::default(),
            last_forbidden: Mutex::default(),
            refusals: events::Refusals::default(),
        }
    }

    fn is_wait_futile(&self, generation: Generation) -> bool {
        let futile = *self.futile_wait.lock().unwrap_or_else(PoisonError::into_inner);
        futile.is_some_and(|(of, at)| of >= generation && at.elapsed() < FUTILE_WAIT_STANDS)
    }

    fn note_futile_wait(&self, generation: Generation) {
        *self.futile_wait.lock().unwrap_or_else(PoisonError::into_inner) = Some((generation, Instant::now()));
    }

    /// Whether a 403 may ask the source now. If so, the next one may not for a while.
    fn take_forbidden_reload(&self) -> bool {
        let now = Instant::now();
        let mut last = self.last_forbidden.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|last| now.duration_since(last) >= FORBIDDEN_INTERVAL);
        if may {
            *last = Some(now);
        }
        may
    }
}
