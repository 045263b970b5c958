use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Serialize, Serializer};

use super::{clock::Clock, slot::Snapshot};
use crate::{
    credential::{AccountId, KeyId, Scheme},
    error::{Reason, SourceError},
    generation::Generation,
};

/// How long after the last refusal a store counts as refused, if no request is accepted before.
const REFUSAL_STANDS: Duration = Duration::from_secs(60);

/// What a store holds and whether its source answers, without the secret.
///
/// # For a readiness probe
/// A store always holds a credential. A failing source, a refused key and a locked account are therefore no reason to
/// take a server out of service: a bad Secret would take out all of its replicas at once. They are a reason to alert
/// an operator. So [`is_ready`](Self::is_ready) and [`degraded`](Self::degraded) are two answers. Only the server
/// itself knows whether it is about to shut down:
///
/// ```
/// # use tower_fal::CredentialStore;
/// /// The answer to `GET /readyz`: a status and a body.
/// fn readyz(store: &CredentialStore, draining: bool) -> Result<(u16, String), serde_json::Error> {
///     let status = store.status();
///     let code = if status.is_ready() && !draining { 200 } else { 503 };
///     Ok((code, serde_json::to_string(&status)?))
/// }
/// # let store = CredentialStore::fixed(tower_fal::Credential::key("id:secret").unwrap());
/// # let (code, body) = readyz(&store, false).unwrap();
/// # assert!(code == 200 && body.starts_with(r#"{"ready":true,"degraded":[],"store":"default","generation":1,"#));
/// # assert_eq!(readyz(&store, true).unwrap().0, 503);
/// ```
///
/// # As JSON
/// It serialises as one flat object, whose names do not change:
///
/// | name | value |
/// |---|---|
/// | `ready` | [`is_ready`](Self::is_ready) |
/// | `degraded` | an array of the [names](Degraded::as_str) of what is [`degraded`](Self::degraded), empty if all is well |
/// | `store`, `source` | text |
/// | `generation`, `consecutive_failures` | numbers |
/// | `scheme` | `"Key"` or `"Bearer"` |
/// | `key_id` | text, or `null` for a login's token |
/// | `account` | text, or `null` if the credential names none |
/// | `loaded_at`, `checked_at`, `expires_at` | whole seconds since 1970; `expires_at` may be `null` |
/// | `last_error` | the [summary](SourceError::summary) of the error, or `null` |
/// | `driver` | the [name](DriverState::as_str) of its state |
/// | `accepted` | whether fal has accepted the current credential |
/// | `pending` | `{"generation", "key_id", "account"}` of the newest credential while fal does not accept it yet, else `null` |
///
/// The secret is not in it, but the key id and paths on this machine are: show it only to those who run the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The [name](super::CredentialStoreBuilder::name) of the store.
    pub store: Arc<str>,
    /// The generation of the current credential.
    pub generation: Generation,
    /// Where the credential was found, such as `env:FAL_KEY` or `file:/run/secrets/fal_key`.
    pub source: Arc<str>,
    /// Whether the credential is a key or a login's token.
    pub scheme: Scheme,
    /// The public half of a key.
    pub key_id: Option<KeyId>,
    /// The account that the credential acts for, if it [names one](crate::Credential::for_account).
    pub account: Option<AccountId>,
    /// When the credential became the current one.
    pub loaded_at: SystemTime,
    /// When the source last answered with a good credential, whether it had changed or not.
    pub checked_at: SystemTime,
    /// When a login's token expires.
    pub expires_at: Option<SystemTime>,
    /// Why the last load failed; `None` if it did not fail.
    pub last_error: Option<SourceError>,
    /// How many loads in a row have failed.
    pub consecutive_failures: u32,
    /// Whether the credential is kept current.
    pub driver: DriverState,
    /// Whether fal has accepted the current credential: a request that carried it had an answer that only an accepted
    /// credential gets. It stays `true` when a later request is refused.
    ///
    /// A 2xx of a public application counts as well, though fal may not have looked at the credential for it. The
    /// answer to a WebSocket handshake does not count, so a server that opens nothing else may never see `true`. What to
    /// do in both cases is on the page about [rotation](crate::docs::rotation#what-proves-nothing).
    pub accepted: bool,
    /// The newest credential, while fal does not accept it yet and requests are sent with the previous one: see
    /// [`PendingCredential`].
    pub pending: Option<PendingCredential>,
    /// The newest of the store's credentials, in use or not.
    pub(super) newest: Generation,
    /// The last refusal of the current credential.
    refused: Option<LastRefusal>,
    /// The last time that its account was locked.
    locked: Option<LastRefusal>,
    clock: Clock,
}

impl Status {
    /// Whether the store holds a usable credential: anything but a token that has expired.
    ///
    /// A server is ready if this is true and it is not about to shut down. What is [`degraded`](Self::degraded) does
    /// not matter here.
    pub fn is_ready(&self) -> bool {
        self.expires_at.is_none_or(|expiry| expiry > self.clock.now())
    }

    /// The problems that an operator should look at. Empty if all is well.
    ///
    /// ```
    /// # use tower_fal::{Credential, CredentialStore, store::Degraded};
    /// let store = CredentialStore::fixed(Credential::key("id:secret")?);
    /// assert_eq!(store.status().degraded().map(Degraded::as_str).collect::<Vec<_>>(), [""; 0]);
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    pub fn degraded(&self) -> impl Iterator<Item = Degraded> + '_ {
        let now = self.clock.now();
        let stands = |refusal: Option<LastRefusal>| refusal.is_some_and(|refusal| refusal.stands_at(now));
        let found = [
            (!self.is_ready()).then_some(Degraded::Expired),
            (self.consecutive_failures > 0).then_some(Degraded::ReloadFailing),
            (stands(self.refused) || self.pending.is_some()).then_some(Degraded::Refused),
            stands(self.locked).then_some(Degraded::AccountLocked),
            (self.driver == DriverState::Ended).then_some(Degraded::DriverEnded),
        ];
        found.into_iter().flatten()
    }

    /// The last [refusal](LastRefusal) of the current credential, if it was within the last 60 s.
    pub fn last_refusal(&self) -> Option<LastRefusal> {
        let now = self.clock.now();
        [self.refused, self.locked]
            .into_iter()
            .flatten()
            .filter(|refusal| refusal.stands_at(now))
            .max_by_key(|refusal| refusal.at)
    }

    pub(super) fn new(store: Arc<str>, snapshot: &Snapshot, clock: &Clock, driver: DriverState) -> Self {
        let credential = snapshot.credential();
        let now = clock.now();
        Self {
            store,
            generation: snapshot.generation(),
            source: Arc::clone(snapshot.source_arc()),
            scheme: credential.scheme(),
            key_id: credential.key_id().cloned(),
            account: credential.account().cloned(),
            loaded_at: now,
            checked_at: now,
            expires_at: credential.expires_at(),
            last_error: None,
            consecutive_failures: 0,
            driver,
            accepted: snapshot.mark().was_ever_accepted(),
            pending: None,
            newest: snapshot.generation(),
            refused: None,
            locked: None,
            clock: clock.clone(),
        }
    }

    /// The same store with another credential in use.
    pub(super) fn rotated(&self, next: &Snapshot, newest: Generation) -> Self {
        Self {
            newest,
            last_error: self.last_error.clone(),
            consecutive_failures: self.consecutive_failures,
            checked_at: self.checked_at,
            // The next key is most likely of the same account.
            locked: self.locked,
            ..Self::new(Arc::clone(&self.store), next, &self.clock, self.driver)
        }
    }

    /// The current credential was accepted, for the first time or since it was refused.
    pub(super) fn note_accepted(&mut self) {
        self.accepted = true;
        self.refused = None;
    }

    /// fal has refused the newest credential before it ever accepted it, and another one is in use again.
    pub(super) fn set_pending(&mut self, newest: &Snapshot, refused_at: SystemTime) {
        let credential = newest.credential();
        self.pending = Some(PendingCredential {
            generation: newest.generation(),
            source: Arc::clone(newest.source_arc()),
            scheme: credential.scheme(),
            key_id: credential.key_id().cloned(),
            account: credential.account().cloned(),
            refused_at,
        });
    }

    /// The newest credential is in use, or is gone.
    pub(super) fn nothing_pending(&mut self) {
        self.pending = None;
        self.newest = self.generation;
    }

    /// Notes that fal has refused the current credential. Returns whether that changes what is degraded.
    ///
    /// There may be thousands of refusals a second.
    pub(super) fn note_refusal(&mut self, reason: Reason) -> bool {
        let last = match reason {
            Reason::UnknownCredential
            | Reason::MalformedCredential
            | Reason::MissingCredential
            | Reason::WrongScheme => &mut self.refused,
            Reason::AccountLocked(_) => &mut self.locked,
            // These are about one app or one call, and not about the credential.
            Reason::InsufficientPermissions | Reason::AccessDenied | Reason::Application | Reason::Unknown => {
                return false;
            }
        };
        let at = self.clock.now();
        let stood = last.replace(LastRefusal { reason, at }).is_some_and(|refusal| refusal.stands_at(at));
        !stood
    }
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let body = Body {
            ready: self.is_ready(),
            degraded: self.degraded().map(Degraded::as_str).collect(),
            store: &self.store,
            generation: self.generation.get(),
            source: &self.source,
            scheme: self.scheme.as_str(),
            key_id: self.key_id.as_ref().map(KeyId::as_str),
            account: self.account.as_ref().map(AccountId::as_str),
            loaded_at: seconds(self.loaded_at),
            checked_at: seconds(self.checked_at),
            expires_at: self.expires_at.map(seconds),
            last_error: self.last_error.as_ref().map(SourceError::summary),
            consecutive_failures: self.consecutive_failures,
            driver: self.driver.as_str(),
            accepted: self.accepted,
            pending: self.pending.as_ref().map(|pending| PendingBody {
                generation: pending.generation.get(),
                key_id: pending.key_id.as_ref().map(KeyId::as_str),
                account: pending.account.as_ref().map(AccountId::as_str),
            }),
        };
        body.serialize(serializer)
    }
}

/// A [`Status`] as it is serialised.
#[derive(Serialize)]
struct Body<'a> {
    ready: bool,
    degraded: Vec<&'static str>,
    store: &'a str,
    generation: u64,
    source: &'a str,
    scheme: &'static str,
    key_id: Option<&'a str>,
    account: Option<&'a str>,
    loaded_at: u64,
    checked_at: u64,
    expires_at: Option<u64>,
    last_error: Option<String>,
    consecutive_failures: u32,
    driver: &'static str,
    accepted: bool,
    pending: Option<PendingBody<'a>>,
}

/// A [`PendingCredential`] as it is serialised.
#[derive(Serialize)]
struct PendingBody<'a> {
    generation: u64,
    key_id: Option<&'a str>,
    account: Option<&'a str>,
}

/// The newest credential of a store, while fal does not accept it yet.
///
/// fal refused it before it ever accepted it: it was rotated too early, is mistyped, or is no key. So requests are sent
/// with the previous credential again, and this one is tried from time to time, by single requests that can be sent
/// again with the other. Once fal accepts it, it becomes the current one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PendingCredential {
    /// Which of the store's credentials it is.
    pub generation: Generation,
    /// Where it was found.
    pub source: Arc<str>,
    /// Whether it is a key or a login's token.
    pub scheme: Scheme,
    /// The public half of a key.
    pub key_id: Option<KeyId>,
    /// The account that the credential acts for, if it [names one](crate::Credential::for_account).
    pub account: Option<AccountId>,
    /// When fal refused it first.
    pub refused_at: SystemTime,
}

/// A problem of a store, in the order in which [`Status::degraded`] lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Degraded {
    /// The current credential is a token that has expired. This is the only problem because of which a store is not
    /// ready.
    Expired,
    /// The last load failed: see [`Status::last_error`]. The store keeps the last good credential.
    ReloadFailing,
    /// fal refused the current credential with a 401 within the last 60 s. An application's own 401 does not count, nor
    /// does a 401 without a known reason. A rotation ends it, too.
    ///
    /// Only [`FalRetry`](crate::FalRetry) reads the answers, so without it this is never reported.
    Refused,
    /// fal said within the last 60 s that the account is locked. A rotation does not end it, because another key of the
    /// same account would not help. As with [`Refused`](Self::Refused), only `FalRetry` reports it.
    AccountLocked,
    /// The runtime on which the store was built has ended: the credential will not be rotated any more.
    DriverEnded,
}

impl Degraded {
    /// A short name that does not change, for logs and readiness bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::ReloadFailing => "reload_failing",
            Self::Refused => "refused",
            Self::AccountLocked => "account_locked",
            Self::DriverEnded => "driver_ended",
        }
    }
}

/// When fal last refused the current credential, and why.
///
/// Updated at every refusal. [Subscribers](super::CredentialStore::subscribe) are woken only when
/// [`degraded`](Status::degraded) changes, and not when the refusal expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastRefusal {
    /// Why.
    pub reason: Reason,
    /// When.
    pub at: SystemTime,
}

impl LastRefusal {
    /// A clock that was set back must not make a refusal stand for longer.
    fn stands_at(self, now: SystemTime) -> bool {
        let apart = now.duration_since(self.at).unwrap_or_else(|ahead| ahead.duration());
        apart < REFUSAL_STANDS
    }
}

/// Whether a store is kept current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DriverState {
    /// The store never reloads: it was made from a fixed credential, or from the environment.
    Absent,
    /// The driver polls the source and answers reloads.
    Running,
    /// The runtime on which the store was built has ended. The credential stays as it is.
    Ended,
}

impl DriverState {
    /// A short name that does not change, for logs and readiness bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Running => "running",
            Self::Ended => "ended",
        }
    }
}
