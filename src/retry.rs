//! Turn a refused credential into a reload and one replay, and what remains into a type.
//!
//! **Order:** this layer goes *around* [`FalAuth`](crate::auth), so that the second attempt gets the new credential.
//! [`layer`](crate::layer) puts the two together in the only order that works: the other one compiles, and returns
//! `Ok(401)`.
//!
//! 1. A response without a [`Stamp`] passes untouched, whatever its status: the request carried no credential of
//!    ours, or it was not refused.
//! 2. Of a stamped 401 or 403 the body is read (16 KiB, 1 s) and [classified](crate::error::classify).
//! 3. **403**, or a 401 that is the *application's*: a typed error at once. Another key would not help, and the
//!    application would run, and bill, twice.
//! 4. **401**, and the store's credential is newer by now: the request is sent again with that.
//! 5. **401**, and fal has never accepted the store's credential, so it may be too early or mistyped: the request is sent
//!    again with the previous one. Later requests to the same application are sent with that one only, and if fal accepts
//!    it, those to all applications. The new one is tried from time to time: see [`overlap`](FalRetryLayer::overlap). If
//!    the previous one is refused as well, step 6 follows.
//! 6. **401** because fal does not know the key, or for no known reason: the store reloads, once for everyone, and the
//!    request waits up to 2 s for a newer credential. When one comes, it is sent again; when none does, that is a typed
//!    error, with the reload's own error inside. Any other 401 is a typed error at once.
//!
//! While a key stays revoked, reloads back off: at 0, 1, 3, 7, 15 and 31 s and then once a minute (each ±20 %), plus
//! once 200 ms before the first waiting request gives up. After one request has waited in full without a newer key, the
//! next ones fail immediately for a minute. Both end when fal accepts the key again: a success is proof, and a refusal may
//! be an application's lie. For the same reason both are kept for each application: what one has claimed takes no reload
//! and no wait from requests to another. And a refusal of a key that fal accepts at that time takes nothing from other
//! requests.
//!
//! An application is a host and the first two segments of the path (three behind `workflows/` and `comfy/`). On a host that
//! is not fal's, such as a gateway, there is one segment more. The last 64 are remembered; when there are more, the oldest
//! one of the owner (what stands before the last segment) who has the most is forgotten. However many there are, refusals
//! cause at most seven reloads a second, and eight more after a quiet time.
//!
//! A request is sent again at most once with a newer credential and at most once with the previous one (and once with the
//! newest one again, if fal has come to accept that since), and only if its body can be sent again: see [`ReplayBody`].
//!
//! # Example
//! ```
//! use std::convert::Infallible;
//!
//! use bytes::Bytes;
//! use http::{Request, Response, StatusCode};
//! use http_body_util::Full;
//! use tower::{ServiceBuilder, ServiceExt as _, service_fn};
//! use tower_fal::{Credential, CredentialStore, FalAuthError, error::{LockReason, Reason}, retry::ReplayBody};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let client = service_fn(async |_: Request<ReplayBody<Full<Bytes>>>| {
//! #     let mut locked = Response::new(Full::<Bytes>::from(r#"{"detail":"User is locked. Reason: Exhausted balance."}"#));
//! #     *locked.status_mut() = StatusCode::FORBIDDEN;
//! #     Ok::<_, Infallible>(locked)
//! # });
//! let store = CredentialStore::fixed(Credential::key("id:secret")?);
//! let fal = ServiceBuilder::new().layer(tower_fal::layer(&store)).service(client);
//!
//! let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::<Bytes>::default())?;
//! match fal.oneshot(request).await {
//!     Ok(response) => println!("{}", response.status()),
//!     Err(FalAuthError::Forbidden(refusal)) => match refusal.reason() {
//!         Reason::AccountLocked(LockReason::ExhaustedBalance) => println!("top up: {refusal}"),
//!         _ => println!("{refusal}"),
//!     },
//!     Err(error) => println!("{error}"),
//! }
//! # Ok(()) }
//! ```

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use self::{body::ReplayMemory, policy::Policy};
use crate::{
    error::{BoxError, FalAuthError},
    store::CredentialStore,
};

mod attempt;
mod attempts;
pub(crate) mod body;
mod future;
mod head;
mod mode;
mod places;
pub(crate) mod policy;
#[cfg(feature = "transient")]
pub(crate) mod retry_after;
mod rule;
#[cfg(feature = "transient")]
mod transient;
#[cfg(not(feature = "transient"))]
#[path = "retry/no_transient.rs"]
mod transient;

#[cfg(doc)]
use crate::auth::Stamp;

#[cfg(feature = "transient")]
pub use self::transient::{Repeatable, Transient};
#[cfg(feature = "reqwest-middleware")]
pub(crate) use self::{
    attempt::{Ended, Sent},
    attempts::{Attempts, Next},
};
pub use self::{
    body::{PeekedBody, ReplayBody},
    future::ResponseFuture,
    mode::{Mode, Passthrough, Typed},
};
#[cfg(feature = "transient")]
pub use crate::error::foreign::connection_failed;

/// Layer that applies [`FalRetry`]. See the [module docs](self) for an example and for the order: around
/// [`FalAuthLayer`](crate::FalAuthLayer), as [`layer`](crate::layer) puts it.
///
/// All services that come from one layer and its clones share the memory for replays and the limit of waiting requests.
///
/// # Panics
/// The service's future panics outside of a Tokio runtime with a timer, once a 401 or 403 has come or a transient
/// failure is retried.
#[doc(alias = "401")]
#[doc(alias = "replay")]
#[must_use]
pub struct FalRetryLayer<M = Typed> {
    policy: Policy,
    mode: PhantomData<fn() -> M>,
}

impl FalRetryLayer {
    /// Reloads this store when fal refuses its credential: the store of the [`FalAuthLayer`](crate::FalAuthLayer)
    /// inside.
    pub fn new(store: CredentialStore) -> Self {
        Self { policy: Policy::new(Some(store)), mode: PhantomData }
    }

    /// For requests that bring their own credentials: nothing is reloaded, nothing is sent again, and a refusal is a
    /// typed error.
    pub fn per_request() -> Self {
        Self { policy: Policy::new(None), mode: PhantomData }
    }

    /// Hands the final refusal on as a response, with status, headers and the whole body as they came, and with the
    /// [`Refusal`](crate::error::Refusal) in its extensions. For proxies; reloads and replays are as before.
    ///
    /// The response's body is [`PeekedBody`] then. A refusal of more than 16 KiB holds its connection while the
    /// request waits for a newer credential.
    pub fn passthrough(self) -> FalRetryLayer<Passthrough> {
        FalRetryLayer { policy: self.policy, mode: PhantomData }
    }
}

impl<M> FalRetryLayer<M> {
    /// How many bytes of a request's body are kept so that it can be sent again, its trailers included. Default: 256 KiB.
    /// A longer body is sent once, as a stream.
    pub fn max_body(mut self, bytes: u64) -> Self {
        self.policy.max_body = bytes;
        self
    }

    /// How many bytes all kept bodies together may take up. Default: 64 MiB. Beyond it, a request is sent once.
    pub fn replay_memory(mut self, bytes: usize) -> Self {
        self.policy.memory = Arc::new(ReplayMemory::new(bytes));
        self
    }

    /// How long a refused request waits for a newer credential, the reload included. Default: 2 s.
    pub fn reload_wait(mut self, limit: Duration) -> Self {
        self.policy.reload_wait = limit;
        self
    }

    /// How long the previous credential is kept at most as the way back, while fal has not accepted the current one.
    /// Default: 24 h, which is the longest.
    ///
    /// A new key may reach this server before fal knows it, or may be mistyped. So the store keeps the last key that fal
    /// accepted until fal has accepted the new one. If the new one is refused first, requests are sent with the previous
    /// one again: those to the application that has refused it, and when fal has accepted the previous one there, all. The
    /// new one is tried from time to time. Zero turns this off. Of several layers of a store the longest time counts. A store without a driver ([`fixed`](CredentialStore::fixed)) keeps no previous credential.
    pub fn overlap(mut self, window: Duration) -> Self {
        self.policy.overlap = window;
        self
    }

    /// How many refused requests may wait for a newer credential at once. Default: 1,024. Others get their error
    /// immediately. Beyond that an eighth more may wait: a request gets one of these places as long as fewer requests to
    /// its owner, such as `fal-ai`, wait than places are left. Nine owners can take all of them.
    pub fn max_waiting(mut self, requests: usize) -> Self {
        self.policy.set_max_waiting(requests);
        self
    }

    /// Requires that each request brings a [`Credential`](crate::Credential) in its extensions. One without is not sent: it
    /// fails with [`FalAuthError::NoCredential`]. Default: off; such a request is sent with the store's credential, or under
    /// [`per_request`](Self::per_request) with none.
    ///
    /// For servers whose customers bring their own keys: a credential that was lost on the way is an error of the server,
    /// and need not go to fal to be noticed.
    pub fn require_credential(mut self) -> Self {
        self.policy.require_credential = true;
        self
    }

    /// How long the body of a refusal may take to arrive. Default: 1 s. Then the refusal is classified by what has come.
    pub fn read_timeout(mut self, limit: Duration) -> Self {
        self.policy.read_timeout = limit;
        self
    }

    /// Lets a 403 reload the store too, at most once a minute for each application. The request is sent again if that
    /// brings another credential. A locked account and the application's own 403 are left out. Default: off, since another
    /// key seldom cures a 403.
    pub fn reload_on_forbidden(mut self) -> Self {
        self.policy.reload_on_forbidden = true;
        self
    }

    /// Retries transient failures of requests that may be repeated: see [`Transient`]. Default: off.
    #[cfg(feature = "transient")]
    pub fn transient(mut self, transient: Transient) -> Self {
        self.policy.transient = Some(transient);
        self
    }

    /// How many bytes of request bodies are kept at this moment.
    pub fn replay_memory_used(&self) -> usize {
        self.policy.memory.used()
    }

    /// How many bodies were not kept because the [`replay_memory`](Self::replay_memory) was full.
    pub fn replay_memory_refused(&self) -> u64 {
        self.policy.memory.refused()
    }
}

impl<M> FalRetryLayer<M> {
    /// The policy for a service that is made now. The store is armed for it.
    pub(crate) fn arm(&self) -> Arc<Policy> {
        self.policy.arm();
        Arc::new(self.policy.clone())
    }
}

impl<S, M> Layer<S> for FalRetryLayer<M> {
    type Service = FalRetry<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        FalRetry { inner, policy: self.arm(), mode: PhantomData }
    }
}

impl<M> Clone for FalRetryLayer<M> {
    fn clone(&self) -> Self {
        Self { policy: self.policy.clone(), mode: PhantomData }
    }
}

impl<M> fmt::Debug for FalRetryLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalRetryLayer").field("policy", &self.policy).finish()
    }
}

/// Middleware that reloads and replays. See the [module docs](self) for an example and for the order: around
/// [`FalAuth`](crate::FalAuth).
///
/// The inner service takes [`ReplayBody<B>`], and is cloned for each request. Build it in place, so that its body
/// type is inferred:
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use hyper_util::{client::legacy::{Client, connect::HttpConnector}, rt::TokioExecutor};
/// use tower::ServiceBuilder;
/// use tower_fal::{FalAuth, FalRetry, retry::ReplayBody};
///
/// /// The concrete type, for a struct field. `FalClient`, with the `client` feature, is the short and boxed one.
/// type Fal = FalRetry<FalAuth<Client<HttpConnector, ReplayBody<Full<Bytes>>>>>;
///
/// # fn client(store: tower_fal::CredentialStore) -> Fal {
/// ServiceBuilder::new()
///     .layer(tower_fal::layer(&store))
///     .service(Client::builder(TokioExecutor::new()).build_http())
/// # }
/// ```
///
/// A ready-made `Client<_, Full<Bytes>>` does not fit: the compiler then says *"the method `oneshot` exists …, but its
/// trait bounds were not satisfied"* (E0599). Let the client's body be inferred, or name `ReplayBody<Full<Bytes>>`.
pub struct FalRetry<S, M = Typed> {
    inner: S,
    policy: Arc<Policy>,
    mode: PhantomData<fn() -> M>,
}

// For no particular service, so that `FalRetry::layer(store)` needs no type.
impl FalRetry<()> {
    /// The layer, for those who start from the service. See [`FalRetryLayer::new`].
    pub fn layer(store: CredentialStore) -> FalRetryLayer {
        FalRetryLayer::new(store)
    }
}

impl<S> FalRetry<S> {
    /// The service around another one. See [`FalRetryLayer::new`].
    pub fn new(inner: S, store: CredentialStore) -> Self {
        FalRetryLayer::new(store).layer(inner)
    }
}

impl<S, M> FalRetry<S, M> {
    /// A reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// A mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service, without this one.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// Sends one request when this service has been made ready. Nobody sends another one with it, so it is not cloned.
    #[cfg_attr(not(feature = "proxy"), allow(dead_code))] // others keep their service
    pub(crate) fn call_once<B, R>(self, request: Request<B>) -> ResponseFuture<S, B, R, M>
    where
        S: Service<Request<ReplayBody<B>>, Response = Response<R>>,
        B: Body,
        R: Body,
    {
        ResponseFuture::new(None, self.inner, request, self.policy)
    }
}

impl<S, M, B, R> Service<Request<B>> for FalRetry<S, M>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    M: Mode,
    B: Body + Unpin,
    B::Error: Into<BoxError>,
    R: Body + Send + 'static,
    R::Error: Send,
{
    type Response = Response<M::Body<R>>;
    type Error = FalAuthError;
    type Future = ResponseFuture<S, B, R, M>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Self::Error::from_inner)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let service = self.inner.clone();
        ResponseFuture::new(Some(&mut self.inner), service, request, Arc::clone(&self.policy))
    }
}

impl<S: Clone, M> Clone for FalRetry<S, M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), policy: Arc::clone(&self.policy), mode: PhantomData }
    }
}

impl<S: fmt::Debug, M> fmt::Debug for FalRetry<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalRetry").field("inner", &self.inner).field("policy", &self.policy).finish()
    }
}
