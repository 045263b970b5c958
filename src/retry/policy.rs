//! The options of a layer, and how it answers a refusal: it reads the response, asks the store, and follows the
//! [rule](super::rule).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{Extensions, Response, StatusCode};
use http_body::Body;
use tokio::time::Instant;

use super::{
    Mode,
    body::{Peeked, PeekedBody, ReplayMemory},
    places::Places,
    rule::{self, Decision, Other, Outcome},
    transient::Transient,
};
use crate::{
    application::{Application, ByApplication},
    auth::Stamp,
    credential::Credential,
    error::{Kept, Reason, RefusalParts, ReloadError, Replayed, classify},
    events,
    generation::Generation,
    store::{Candidate, Claim, CredentialStore, Mark, Snapshot, WaitFor},
};

const DEFAULT_MAX_BODY: u64 = 256 * 1024;
const DEFAULT_REPLAY_MEMORY: usize = 64 * 1024 * 1024;
const DEFAULT_RELOAD_WAIT: Duration = Duration::from_secs(2);
const DEFAULT_OVERLAP: Duration = Duration::from_secs(24 * 60 * 60);
const DEFAULT_MAX_WAITING: usize = 1024;
const DEFAULT_READ_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a 403 of one application may cause a load of the source, if it may at all.
const FORBIDDEN_INTERVAL: Duration = Duration::from_secs(60);

/// After one request has waited in full without a newer credential, others to the same application do not wait, for this
/// long.
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
    pub(super) require_credential: bool,
    pub(super) read_timeout: Duration,
    pub(super) transient: Option<Transient>,
    shared: Arc<LayerState>,
}

/// What the services of a layer share: those who wait for a newer credential, and the count of refusals.
#[derive(Debug)]
struct LayerState {
    places: Places,
    noted: Mutex<ByApplication<Noted>>,
    refusals: events::Refusals,
}

/// What came of the refusals of one application. It says nothing about requests to another one.
#[derive(Debug, Default)]
struct Noted {
    /// The last wait of each reason that brought no newer credential.
    futile_waits: BTreeMap<&'static str, FutileWait>,
    /// When a 403 last asked the source.
    last_forbidden: Option<Instant>,
}

/// A request has waited in full for a newer credential than this one, without getting one.
#[derive(Debug)]
struct FutileWait {
    generation: Generation,
    /// The evidence for it.
    mark: Mark,
    at: Instant,
}

/// The credentials that a request was refused with, and the evidence for each right after that.
pub(crate) type Tried = Vec<(Snapshot, Mark)>;

/// What was found out about a refused attempt.
pub(crate) struct Examined<R: Body> {
    pub(crate) response: Response<PeekedBody<R>>,
    pub(crate) parts: RefusalParts,
    pub(crate) tried: Tried,
    /// With what to send the request again, if at all.
    pub(crate) replay: Option<Replay>,
}

/// Another credential for a request.
pub(crate) struct Replay {
    pub(super) snapshot: Snapshot,
    pub(super) other: Other,
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
            require_credential: false,
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

    /// What to send a request with, if not with the credential in use: see
    /// [`send_with`](CredentialStore::send_with).
    pub(super) fn send_with(
        &self,
        carrier: impl FnOnce() -> Option<Application>,
        replayable: impl FnOnce() -> bool,
    ) -> Option<Snapshot> {
        self.store.as_ref()?.send_with(carrier, replayable)
    }

    /// A request was refused that carried no credential of a layer of ours.
    pub(super) fn tell_of_others(&self, status: StatusCode, origin: impl FnOnce() -> String) {
        self.shared.refusals.tell_of_others(status, origin);
    }

    /// Whether a request with these extensions lacks the credential that it has to bring.
    pub(crate) fn misses_credential(&self, extensions: &Extensions) -> bool {
        self.require_credential && extensions.get::<Credential>().is_none()
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

    /// Reads a refusal of a request to this application, and finds out what follows from it.
    pub(super) async fn examine<R: Body, M: Mode>(
        self: Arc<Self>,
        application: Application,
        response: Response<R>,
        sent_with: Stamp,
        mut tried: Tried,
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
        if let Some((store, (snapshot, mark))) = self.ours(&sent_with) {
            let mark = store.note_refused(snapshot, mark, Claim { application, reason: said.reason });
            // What was accepted between two attempts with it is over.
            tried.retain(|(earlier, _)| earlier.generation() != snapshot.generation());
            tried.push((snapshot.clone(), mark));
        }
        let newest = newest(&tried).map(|(snapshot, _)| snapshot);
        // If the previous credential was refused as well, report the newest one. Otherwise report the credential that
        // this attempt was sent with.
        let refused_by_fal = head.status == StatusCode::UNAUTHORIZED && said.reason != Reason::Application;
        let reported = newest.filter(|_| refused_by_fal).or_else(|| sent_with.snapshot());
        let refused = reported.map_or_else(|| sent_with.credential(), Snapshot::credential);
        let mut parts = RefusalParts {
            application,
            status: head.status,
            reason: said.reason,
            detail: said.detail,
            error_type: said.error_type,
            request_id: said.request_id,
            key_id: refused.key_id().cloned(),
            account: refused.account().cloned(),
            generation: reported.map(Snapshot::generation),
            newest: newest.map(Snapshot::generation),
            source: reported.map_or_else(|| sent_with.source().into(), |snapshot| Arc::clone(snapshot.source_arc())),
            kept: Kept::copy(&head.headers, &start),
            replayable,
            replayed,
            reload: None,
        };
        let replay = self.respond(&mut parts, &tried).await;
        Examined { response: Response::from_parts(head, PeekedBody::peeked(body)), parts, tried, replay }
    }

    /// The store and its credential, with the evidence for that when the request was sent. `None` if it was sent with
    /// another one than this policy's store had.
    fn ours<'a>(&'a self, sent_with: &'a Stamp) -> Option<(&'a CredentialStore, (&'a Snapshot, Mark))> {
        self.store.as_ref().zip(sent_with.issued()).filter(|(store, (snapshot, _))| store.issued(snapshot))
    }

    /// Follows the rule, and tells the operator.
    async fn respond(&self, parts: &mut RefusalParts, tried: &Tried) -> Option<Replay> {
        let (outcome, replay) = match self.store.as_ref().zip(newest(tried)) {
            Some((store, newest)) => self.follow_rule(parts, store, tried, newest).await,
            None => (Outcome::Refused, None),
        };
        let store = parts.newest.and(self.store.as_ref()).map(CredentialStore::name);
        self.shared.refusals.tell(parts, outcome.as_str(), store);
        match outcome {
            Outcome::Refused | Outcome::RefusedAndReloaded => None,
            Outcome::Replayed | Outcome::ReplayedWithPrevious => replay,
        }
    }

    async fn follow_rule(
        &self,
        parts: &mut RefusalParts,
        store: &CredentialStore,
        tried: &Tried,
        newest: &(Snapshot, Mark),
    ) -> (Outcome, Option<Replay>) {
        let (decision, replay) = self.decide(parts, store, tried);
        let asks = matches!(decision, Decision::Reload | Decision::Done(Outcome::RefusedAndReloaded));
        if asks && parts.status == StatusCode::FORBIDDEN && !self.shared.take_forbidden_reload(parts.application) {
            return (Outcome::Refused, None);
        }
        match decision {
            Decision::Done(outcome) => {
                if outcome == Outcome::RefusedAndReloaded {
                    store.ask_past(newest.0.generation(), claim(parts));
                }
                (outcome, replay)
            }
            Decision::Reload => {
                parts.reload = self.wait_for_newer(parts, store, tried, newest).await;
                let (decision, replay) = self.decide(parts, store, tried);
                (decision.after_reload(), replay)
            }
        }
    }

    fn decide(&self, parts: &RefusalParts, store: &CredentialStore, tried: &Tried) -> (Decision, Option<Replay>) {
        let replay = other(store.candidates(parts.application), tried, parts.replayed);
        (rule::decide(parts, replay.as_ref().map(|replay| replay.other), self.reload_on_forbidden), replay)
    }

    /// Has the store reload, and waits for a newer credential. Returns what went wrong with the reload, if anything
    /// did.
    async fn wait_for_newer(
        &self,
        parts: &RefusalParts,
        store: &CredentialStore,
        tried: &Tried,
        newest: &(Snapshot, Mark),
    ) -> Option<ReloadError> {
        let generation = newest.0.generation();
        let Some(_place) = self.shared.places.take(parts.application) else {
            store.ask_past(generation, claim(parts));
            return None;
        };
        // Keys are often revoked before their successor is in place, so wait even if the source still returns the old
        // one. If one full wait brought nothing, later requests skip it.
        let waits = parts.status == StatusCode::UNAUTHORIZED && !self.shared.is_wait_futile(parts, newest);
        let wait_for = if waits { WaitFor::Newer } else { WaitFor::OneAnswer };
        let waited = store.wait_past(generation, claim(parts), tried, wait_for, self.reload_wait).await;
        if waited.timed_out && waits {
            self.shared.note_futile_wait(parts, newest);
        }
        waited.error
    }
}

fn claim(refused: &RefusalParts) -> Claim {
    Claim { application: refused.application, reason: refused.reason }
}

/// The newest of the credentials that a request was refused with.
fn newest(tried: &Tried) -> Option<&(Snapshot, Mark)> {
    tried.iter().max_by_key(|(snapshot, _)| snapshot.generation())
}

/// Which of the candidates a request may be sent with next. Not with one of the same value as one that was refused,
/// unless fal has come to accept it since.
fn other(candidates: [Option<Candidate>; 2], tried: &Tried, replayed: Replayed) -> Option<Replay> {
    let ((newest, mark), (last, last_mark)) = (newest(tried)?, tried.last()?);
    let was_tried = |candidate: &Snapshot| {
        tried.iter().any(|(snapshot, _)| snapshot.credential().same_value(candidate.credential()))
    };
    let mut candidates = candidates.into_iter().flatten();
    // One that was set aside is newer than the one in use, but it is not the one that a request would wait for.
    let is_newer =
        |candidate: &Candidate| !candidate.is_set_aside && candidate.snapshot.generation() > newest.generation();
    let mut untried = candidates.clone().filter(|candidate| !was_tried(&candidate.snapshot));
    // A request is sent with a newer one only once. After that the previous one is left, even if there is a newer one.
    let is_left = |candidate: &Candidate| !(replayed.with_newer && is_newer(candidate));
    if let Some(candidate) = untried.clone().find(is_left).or_else(|| untried.next()) {
        let other = if is_newer(&candidate) { Other::Newer } else { Other::Previous };
        return Some(Replay { snapshot: candidate.snapshot, other });
    }
    // The newest one was accepted since it was refused, whatever was claimed after that. Or the previous one was refused
    // after it: then fal has switched from one to the other between the two attempts.
    let was_accepted_since = !mark.was_ever_accepted() && newest.mark().was_ever_accepted();
    let fal_has_switched =
        last.generation() < newest.generation() && last_mark.was_ever_accepted() && !mark.was_ever_accepted();
    if !was_accepted_since && !fal_has_switched {
        return None;
    }
    let again = candidates.find(|candidate| candidate.snapshot.generation() == newest.generation())?;
    Some(Replay { snapshot: again.snapshot, other: Other::Again })
}

impl LayerState {
    fn new(places: usize) -> Self {
        Self { places: Places::new(places), noted: Mutex::default(), refusals: events::Refusals::default() }
    }

    fn is_wait_futile(&self, refused: &RefusalParts, newest: &(Snapshot, Mark)) -> bool {
        let (generation, mark) = (newest.0.generation(), newest.1);
        let mut noted = self.noted();
        noted.of(refused.application).futile_waits.get(refused.reason.as_str()).is_some_and(|futile| {
            // If it was accepted since, that wait says nothing about this refusal.
            let still_holds =
                futile.generation > generation || (futile.generation == generation && futile.mark.is_same_doubt(mark));
            still_holds && futile.at.elapsed() < FUTILE_WAIT_STANDS
        })
    }

    fn note_futile_wait(&self, refused: &RefusalParts, newest: &(Snapshot, Mark)) {
        let futile = FutileWait { generation: newest.0.generation(), mark: newest.1, at: Instant::now() };
        self.noted().of(refused.application).futile_waits.insert(refused.reason.as_str(), futile);
    }

    /// Whether a 403 of this application may ask the source now. If so, the next one may not for a while.
    fn take_forbidden_reload(&self, application: Application) -> bool {
        let now = Instant::now();
        let mut noted = self.noted();
        let last = &mut noted.of(application).last_forbidden;
        let may = last.is_none_or(|last| now.duration_since(last) >= FORBIDDEN_INTERVAL);
        if may {
            *last = Some(now);
        }
        may
    }

    fn noted(&self) -> MutexGuard<'_, ByApplication<Noted>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
