//! fal's public keys, fetched and kept.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body::Body;
use http_body_util::Full;
use serde::{Serialize, Serializer, ser::SerializeStruct as _};
use tokio::{sync::watch, time::Instant};
use tower_service::Service;

use self::driver::Driver;
use super::{PublicKeys, Rejection};
use crate::{error::BoxError, fetch::Fetch, origin::FalOrigins, wire};

mod driver;
mod freshness;

/// How long a fetch may take. With the time for the body it is less than the 15 s that fal waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The longest set, in bytes. fal's has some hundred.
const LONGEST: usize = 64 * 1024;

/// fal's public keys, fetched from fal and kept up to date by a task of their own. Cheap to clone; clones are the same.
///
/// * They are fetched when this is made, and again when their HTTP headers say so (`Cache-Control`, `Expires`), after 60 s
///   at the earliest and 24 h at the latest; after an hour if the headers say nothing.
/// * When a fetch fails, the last good set is kept, and the next fetch is a minute later. Without any set it is sooner:
///   after one second, then two, four, and so on.
/// * When a delivery has a signature that no key fits, but is right in all else, the keys are fetched at once, since fal
///   may have a new one. This happens once a minute at most.
/// * Of a thousand deliveries that wait for the keys, all wait for one fetch.
///
/// The task ends when the last clone and the last layer with it is dropped.
#[derive(Clone)]
pub struct WebhookKeys {
    state: watch::Receiver<State>,
    /// After how many fetches there may be another one, for the sake of a signature that nobody knows. `None` if nothing is
    /// ever fetched.
    wanted: Option<Arc<watch::Sender<u64>>>,
}

/// What is known of the keys.
#[derive(Debug)]
struct State {
    keys: Option<PublicKeys>,
    /// When those were fetched.
    fetched_at: Option<SystemTime>,
    /// How many fetches have ended, and whether one is under way.
    ended: u64,
    fetching: bool,
    /// When the next fetch begins by itself.
    next: Instant,
    /// When the next one may begin for the sake of a signature that nobody knows.
    refetch_from: Instant,
    failures: u32,
    last_error: Option<String>,
}

impl WebhookKeys {
    /// The keys at `https://rest.fal.ai/.well-known/jwks.json`, fetched through this client.
    ///
    /// The client is any Tower service for HTTP that can reach fal over TLS and follows no redirects, such as
    /// hyper-util's client or `ReqwestService`. It must be a bare one, without the layers of this crate: the document is
    /// public, and a key has no business there.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn new<S, B>(client: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        Self::fetched(client, Uri::from_static(wire::WEBHOOK_KEYS))
    }

    /// The same from another URL, such as that of a [`MockFal`](crate::mock::MockFal).
    ///
    /// # Errors
    /// When the URL is neither `https` nor `http` on a loopback address: somebody on the way could put a key of their own
    /// into the set.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn from_url<S, B>(client: S, url: Uri) -> Result<Self, InvalidKeysUrl>
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let scheme = url.scheme_str().unwrap_or_default();
        let authority = url.authority().map_or("", |authority| authority.as_str());
        // The rule is that for the origins to which a credential may go.
        let origin = format!("{scheme}://{authority}");
        let _: FalOrigins =
            FalOrigins::only([]).and_then(|origins| origins.and(&origin)).map_err(|_| InvalidKeysUrl)?;
        Ok(Self::fetched(client, url))
    }

    fn fetched<S, B>(client: S, url: Uri) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let (state, keys) = watch::channel(State::new(None));
        let (wanted, asked) = watch::channel(0);
        tokio::spawn(Driver::new(Fetch::new(client, TIMEOUT, LONGEST), url, state, asked).run());
        Self { state: keys, wanted: Some(Arc::new(wanted)) }
    }

    /// These keys for ever, without any fetch. fal changes its keys without notice, so this is for tests, and for servers
    /// that get the keys in a way of their own and are started again when they change.
    #[must_use]
    pub fn fixed(keys: PublicKeys) -> Self {
        Self { state: watch::channel(State::new(Some(keys))).1, wanted: None }
    }

    /// How it stands with the keys, for a readiness probe.
    #[must_use]
    pub fn status(&self) -> KeysStatus {
        let state = self.state.borrow();
        KeysStatus {
            keys: state.keys.as_ref().map_or(0, PublicKeys::len),
            fetched_at: state.fetched_at,
            consecutive_failures: state.failures,
            last_error: state.last_error.clone(),
        }
    }

    /// The keys of this moment. Without any, this waits for the fetch that is under way.
    pub(super) async fn current(&self) -> Result<Current, Rejection> {
        {
            let state = self.state.borrow();
            match &state.keys {
                Some(keys) => return Ok(Current { keys: keys.clone(), ended: state.ended, waited: false }),
                None if !state.fetching => return Err(state.no_keys()),
                None => {}
            }
        }
        let mut changes = self.state.clone();
        // The error says that the task has ended with its runtime.
        let state = changes.wait_for(|state| !state.fetching).await.map_err(|_| gone())?;
        match &state.keys {
            Some(keys) => Ok(Current { keys: keys.clone(), ended: state.ended, waited: true }),
            None => Err(state.no_keys()),
        }
    }

    /// Keys that were fetched after these, because none of these has signed a delivery.
    pub(super) async fn after(&self, current: &Current) -> Result<PublicKeys, Rejection> {
        // Whoever has waited has keys that are newer than the delivery.
        let (Some(wanted), false) = (&self.wanted, current.waited) else { return Err(Rejection::BadSignature) };
        {
            let state = self.state.borrow();
            if state.ended == current.ended && !state.fetching {
                let wait = state.refetch_from.saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    return Err(Rejection::KeysHeldBack { retry_after: wait });
                }
            }
        }
        wanted.send_if_modified(|wanted| {
            let is_new = *wanted < current.ended + 1;
            *wanted = (*wanted).max(current.ended + 1);
            is_new
        });
        let mut changes = self.state.clone();
        let state = changes.wait_for(|state| state.ended > current.ended).await.map_err(|_| gone())?;
        match &state.keys {
            Some(keys) if state.failures == 0 => Ok(keys.clone()),
            _ => Err(state.no_keys()),
        }
    }
}

/// The keys that a delivery is verified with.
pub(super) struct Current {
    pub(super) keys: PublicKeys,
    ended: u64,
    waited: bool,
}

impl State {
    fn new(keys: Option<PublicKeys>) -> Self {
        let now = Instant::now();
        Self {
            fetching: keys.is_none(),
            keys,
            fetched_at: None,
            ended: 0,
            next: now,
            refetch_from: now,
            failures: 0,
            last_error: None,
        }
    }

    fn no_keys(&self) -> Rejection {
        Rejection::NoKeys { retry_after: self.next.saturating_duration_since(Instant::now()) }
    }
}

/// The task that fetches has ended.
fn gone() -> Rejection {
    Rejection::NoKeys { retry_after: driver::MINUTE }
}

impl fmt::Debug for WebhookKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WebhookKeys").field(&self.status()).finish()
    }
}

/// The URL of the keys is one from which they cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the public keys are taken from an `https` URL, or from an `http` URL of this machine")]
#[non_exhaustive]
pub struct InvalidKeysUrl;

/// How it stands with the keys. It serialises as one flat object: `ready`, `degraded`, `keys`, `fetched_at` in seconds
/// since 1970, `consecutive_failures` and `last_error`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeysStatus {
    /// How many keys there are.
    pub keys: usize,
    /// When they were fetched. `None` before the first fetch has succeeded, and for fixed keys.
    pub fetched_at: Option<SystemTime>,
    /// How many fetches have failed since the last one that succeeded.
    pub consecutive_failures: u32,
    /// What the last fetch failed for, in this crate's own words. `None` when it succeeded.
    pub last_error: Option<String>,
}

impl KeysStatus {
    /// Whether deliveries can be verified. Without keys each is answered with 503.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.keys > 0
    }

    /// Whether a person should look: there are no keys, or they cannot be fetched any more, so that deliveries that are
    /// signed with the next key will not be believed.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        !self.is_ready() || self.consecutive_failures > 0
    }
}

impl Serialize for KeysStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut object = serializer.serialize_struct("KeysStatus", 6)?;
        object.serialize_field("ready", &self.is_ready())?;
        object.serialize_field("degraded", &self.is_degraded())?;
        object.serialize_field("keys", &self.keys)?;
        object.serialize_field("fetched_at", &self.fetched_at.map(seconds))?;
        object.serialize_field("consecutive_failures", &self.consecutive_failures)?;
        object.serialize_field("last_error", &self.last_error)?;
        object.end()
    }
}
