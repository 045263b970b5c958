//! Put the current fal credential on every request that may carry it.
//!
//! **Order:** this layer belongs *inside* everything that may send a request again (retries, redirects), so that each
//! attempt gets the credential of its own moment and each hop is looked at again. `tower_fal::layer` puts it
//! inside `FalRetryLayer`.
//!
//! 1. The [policy](crate::origin) does not admit the request's URI, or the method is `TRACE`, whose answer echoes the
//!    request: the request passes untouched.
//! 2. Otherwise `authorization` becomes the header of the [`Credential`](crate::Credential) in the request's extensions if there is one,
//!    and else that of the store's current credential.
//! 3. A `401` or `403` to such a request leaves with a [`Stamp`] in its extensions, which says what it was sent with.
//!
//! The layer adds no error, no box, no lock and no allocation of its own to a request. (A header map that is full
//! grows to take the header, and the first request on a thread makes `arc-swap` allocate its state for that thread.)
//!
//! # Example
//! ```
//! use http::{Request, Response};
//! use tower::{ServiceBuilder, ServiceExt as _, service_fn};
//! use tower_fal::{Credential, CredentialStore, FalAuthLayer};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = CredentialStore::fixed(Credential::key("id:secret")?);
//! let client = ServiceBuilder::new()
//!     .layer(FalAuthLayer::new(store))
//!     .service(service_fn(async |request: Request<&'static str>| {
//!         assert_eq!(request.headers()["authorization"], "Key id:secret");
//!         Ok::<_, std::convert::Infallible>(Response::new(()))
//!     }));
//! client.oneshot(Request::post("https://fal.run/fal-ai/flux/dev").body("{}")?).await?;
//! # Ok(()) }
//! ```
//!
//! # A request with its own credential
//! A server that calls fal with each customer's own key puts that [`Credential`](crate::Credential) into the request's extensions. It
//! goes to the same origins and no others. With [`FalAuthLayer::per_request`] there is nothing but it: when the
//! extension is lost on the way, the request goes out without a header and never with the house's key.
//!
//! ```
//! # use http::Request;
//! # use tower_fal::Credential;
//! let request = Request::post("https://fal.run/fal-ai/flux/dev").extension(Credential::key("customer:secret")?).body(())?;
//! # let _ = request;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # In an axum router
//! The common use is an outgoing client in the router's `State`. `Router::layer(FalAuthLayer::new(store))` compiles
//! too, but there the layer looks at *inbound* requests, and who writes their URI is the caller:
//!
//! - `GET /x` with whatever `Host` names no origin. It gets no header.
//! - `GET https://fal.run/x`, the absolute form of HTTP/1.1, and **every** HTTP/2 request, whose `:authority` and
//!   `:scheme` become its URI, name the origin that the caller wrote. If that is fal's, the layer adds the secret.
//!
//! It is added to the request that the handlers see; nothing goes to the caller or to fal by itself. But whatever
//! is behind the layer then holds it: a handler that echoes or logs headers, or one that forwards them, to wherever
//! it forwards. So put this layer on a router only around routes that forward to fal and to nothing else.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use self::stamp::SentWith;
use crate::{
    origin::{BoundOrigin, FalOrigins, InvalidOrigin, OriginPolicy},
    store::CredentialStore,
};

mod authorizer;
pub(crate) mod stamp;

pub use self::stamp::Stamp;
pub(crate) use self::{
    authorizer::Authorizer,
    stamp::{SendWith, is_refusal},
};

/// Layer that applies [`FalAuth`]. See the [module docs](self) for an example and for the order: inside
/// `FalRetryLayer` and whatever else sends a request again.
#[derive(Clone)]
#[must_use]
pub struct FalAuthLayer<P = FalOrigins> {
    authorizer: Authorizer<P>,
}

impl FalAuthLayer {
    /// The store's current credential, to [fal's own origins](FalOrigins).
    pub fn new(store: CredentialStore) -> Self {
        Self::with_policy(Some(store), FalOrigins::new())
    }

    /// No credential but the one in the extensions of each request, to [fal's own origins](FalOrigins).
    pub fn per_request() -> Self {
        Self::with_policy(None, FalOrigins::new())
    }
}

impl FalAuthLayer<BoundOrigin> {
    /// The store's current credential, for a service that is bound to one connection: see [`BoundOrigin`].
    ///
    /// hyper's own `SendRequest` is such a connection. It is no Tower service by itself, and wants a `host` header:
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use bytes::Bytes;
    /// use http::Request;
    /// use http_body_util::Full;
    /// use hyper::client::conn::http1::SendRequest;
    /// use tokio::sync::Mutex;
    /// use tower::{ServiceBuilder, ServiceExt as _, service_fn};
    /// use tower_fal::{CredentialStore, FalAuthLayer};
    ///
    /// # async fn call(
    /// #     store: CredentialStore, connection: SendRequest<Full<Bytes>>,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let connection = Arc::new(Mutex::new(connection)); // to fal.run, over TLS
    /// let fal = ServiceBuilder::new()
    ///     .layer(FalAuthLayer::for_origin(store, "https://fal.run")?)
    ///     .service(service_fn(move |request| {
    ///         let connection = Arc::clone(&connection);
    ///         async move { connection.lock().await.send_request(request).await }
    ///     }));
    /// let request = Request::post("/fal-ai/flux/dev").header("host", "fal.run").body(Full::default())?;
    /// let response = fal.oneshot(request).await?;
    /// # let _ = response;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the text is no origin, or one that would carry the credential in clear.
    pub fn for_origin(store: CredentialStore, origin: &str) -> Result<Self, InvalidOrigin> {
        Ok(Self::with_policy(Some(store), BoundOrigin::new(origin)?))
    }
}

impl<P> FalAuthLayer<P> {
    fn with_policy(store: Option<CredentialStore>, origins: P) -> Self {
        Self { authorizer: Authorizer::new(store, origins) }
    }

    /// Which origins may carry the credential. Default: [`FalOrigins::new`].
    pub fn origins<Q: OriginPolicy>(self, origins: Q) -> FalAuthLayer<Q> {
        FalAuthLayer { authorizer: self.authorizer.with_origins(origins) }
    }

    /// Lets a request that has an `authorization` header already keep it; it is then passed untouched. Default: off, and
    /// the credential replaces the header.
    pub fn keep_existing(mut self) -> Self {
        self.authorizer.keep_existing = true;
        self
    }

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn into_authorizer(self) -> Authorizer<P> {
        self.authorizer
    }

    /// Puts the credential on a request that is sent without Tower, such as a WebSocket handshake, by the same rules.
    /// Returns whether the request carries it now.
    ///
    /// A WebSocket client makes its handshake itself: with tokio-tungstenite that is
    /// `"wss://…".into_client_request()?`, and the result comes here. `examples/websocket.rs` shows that, and how
    /// to have the handshake within the layers instead: then a refused one is sent again with a newer credential, or
    /// becomes an error that says why.
    ///
    /// From here on the header is in that client's hands. One that follows redirects by itself takes it along to any
    /// host: the blocking `tungstenite::connect` does, tokio-tungstenite does not. And tungstenite logs its handshakes
    /// at the level `trace`, this header included: keep the target `tungstenite` above it.
    ///
    /// ```
    /// # use tower_fal::{Credential, CredentialStore, FalAuthLayer};
    /// # let store = CredentialStore::fixed(Credential::key("id:secret")?);
    /// let mut handshake = http::Request::get("wss://ws.fal.run/fal-ai/flux/dev").body(())?;
    /// assert!(FalAuthLayer::new(store).authorize(&mut handshake));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use = "`false` means that the request goes out without a credential"]
    pub fn authorize<B>(&self, request: &mut Request<B>) -> bool
    where
        P: OriginPolicy,
    {
        self.authorizer.authorize_handshake(request)
    }
}

impl<S, P: Clone> Layer<S> for FalAuthLayer<P> {
    type Service = FalAuth<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        FalAuth { inner, authorizer: self.authorizer.clone() }
    }
}

impl<P> fmt::Debug for FalAuthLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalAuthLayer").field("authorizer", &self.authorizer).finish()
    }
}

// Here and not beside the store, as imports run one way.
impl CredentialStore {
    /// Puts the current credential on a request that is sent without Tower, such as a WebSocket handshake. Returns
    /// whether the request carries it now.
    ///
    /// By the rules of [`FalAuthLayer::new`]; [`FalAuthLayer::authorize`] does the same by other rules.
    ///
    /// ```
    /// # use tower_fal::{Credential, CredentialStore};
    /// # let store = CredentialStore::fixed(Credential::key("id:secret")?);
    /// let mut handshake = http::Request::get("wss://ws.fal.run/fal-ai/flux/dev").body(())?;
    /// assert!(store.authorize(&mut handshake));
    ///
    /// let mut elsewhere = http::Request::get("wss://example.com/").body(())?;
    /// assert!(!store.authorize(&mut elsewhere));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use = "`false` means that the request goes out without a credential"]
    pub fn authorize<B>(&self, request: &mut Request<B>) -> bool {
        FalAuthLayer::new(self.clone()).authorize(request)
    }
}

/// Middleware that puts the credential on requests. See the [module docs](self) for an example.
#[derive(Clone)]
pub struct FalAuth<S, P = FalOrigins> {
    inner: S,
    authorizer: Authorizer<P>,
}

// For no service in particular, so that `FalAuth::layer(store)` needs no type.
impl FalAuth<()> {
    /// The layer, for those who start from the service. See [`FalAuthLayer::new`].
    pub fn layer(store: CredentialStore) -> FalAuthLayer {
        FalAuthLayer::new(store)
    }
}

impl<S> FalAuth<S> {
    /// The service around another one. See [`FalAuthLayer::new`].
    pub fn new(inner: S, store: CredentialStore) -> Self {
        FalAuthLayer::new(store).layer(inner)
    }
}

impl<S, P> FalAuth<S, P> {
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
}

impl<S, P, B, R> Service<Request<B>> for FalAuth<S, P>
where
    S: Service<Request<B>, Response = Response<R>>,
    P: OriginPolicy,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let mut sent_with = self.authorizer.authorize(&mut request);
        ResponseFuture::send(&mut self.inner, request, &mut sent_with)
    }
}

impl<S: fmt::Debug, P> fmt::Debug for FalAuth<S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalAuth").field("inner", &self.inner).field("authorizer", &self.authorizer).finish()
    }
}

/// Response future of [`FalAuth`].
#[pin_project]
pub struct ResponseFuture<F> {
    #[pin]
    inner: F,
    sent_with: Option<SentWith>,
}

impl<F> ResponseFuture<F> {
    /// A function of its own, which owns nothing that would be dropped if the call panicked: then the future inside is
    /// written to where it is returned, and not moved on the way.
    #[inline]
    fn send<S, B>(service: &mut S, request: Request<B>, sent_with: &mut Option<SentWith>) -> Self
    where
        S: Service<Request<B>, Future = F>,
    {
        let mut future = Self { inner: service.call(request), sent_with: None };
        future.sent_with = sent_with.take();
        future
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        // One variable, so that the response is written to where it is returned, and is not moved on the way.
        let mut polled = this.inner.poll(cx);
        if let (Poll::Ready(Ok(response)), Some(sent_with)) = (&mut polled, this.sent_with) {
            sent_with.observe(response.status(), response.headers(), response.extensions());
            if is_refusal(response.status()) {
                sent_with.stamp(response.extensions_mut());
            }
        }
        polled
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("sent_with", &self.sent_with).finish_non_exhaustive()
    }
}
