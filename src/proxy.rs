//! Browsers talk to fal through your server, and the key stays on it.
//!
//! fal's browser and mobile clients send every request to a proxy on the app's own server (`proxyUrl`), with the URL that
//! they mean in `x-fal-target-url`. [`FalProxy`] is that proxy: it judges the target, asks you who calls, makes a request
//! of its own with the current credential, and streams body and answer through. A rotated key is picked up without a
//! restart and without a failed request, as everywhere in this crate.
//!
//! ```
//! use axum::Router;
//! use http::request::Parts;
//! use tower_fal::{CredentialStore, caller::Caller, proxy::FalProxy};
//!
//! # fn app(store: &CredentialStore) -> Result<Router, Box<dyn std::error::Error>> {
//! let proxy = FalProxy::new(store)?
//!     // A gateway in front sets this header, and takes it away from what clients send.
//!     .authenticate(async |head: &Parts| match head.headers.get("x-user") {
//!         Some(name) => Ok(Caller::tenant(name.to_str().unwrap_or_default())),
//!         None => Err(axum::response::IntoResponse::into_response(http::StatusCode::UNAUTHORIZED)),
//!     })
//!     .allow_endpoint("fal-ai/flux/**")?;
//! let app = Router::new().merge(proxy.into_router()); // at /api/fal/proxy
//! # Ok(app) }
//! ```
//!
//! In the browser that is `fal.config({ proxyUrl: "/api/fal/proxy" })`.
//!
//! [`docs::proxy`](crate::docs::proxy) tells how to mount it, what it does differently from fal's JavaScript package, and
//! which layers around it break a stream.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, Request, Response, uri::PathAndQuery};
use http_body::Body;
use tower_layer::Layer as _;
use tower_service::Service;

use self::{
    finished::OnFinished, forward::Config, headers::Forwarded, in_flight::InFlight, owners::Owners, target::Targets,
    tokens::Applications,
};
use crate::{
    answer::RULE,
    auth::FalAuth,
    caller::{Authenticate, Callers, InvalidPattern},
    error::BoxError,
    layer::FalLayer,
    origin::FalOrigins,
    realtime::InvalidApp,
    retry::{FalRetry, FalRetryLayer, Passthrough, ReplayBody},
    store::CredentialStore,
    wire::header::{
        BILLABLE_UNITS, ERROR_TYPE, NEEDS_RETRY, REQUEST_ID, REQUEST_TIMEOUT_TYPE, RETRYABLE, RUNNER_HINTS, SERVED_FROM,
    },
};

mod answers;
mod body;
mod finished;
mod forward;
mod headers;
mod in_flight;
mod owners;
mod pattern;
mod router;
pub(crate) mod target;
mod tokens;
#[cfg(feature = "client-rustls")]
mod upstream;

pub use self::{
    body::{ProxyBody, UploadBody},
    finished::Finished,
    owners::{RequestOwners, RequestOwnersInMemory},
};

/// The longest body of a request, in bytes, unless [`FalProxy::max_body`] says otherwise.
///
/// Source: fal-ai/fal-js pull request #224.
const MAX_BODY: u64 = 32 * 1024 * 1024;

/// The path of the proxy, unless [`FalProxy::path`] says otherwise.
///
/// Source: `@fal-ai/server-proxy` 1.2.1 (`index.ts`).
const PATH: &str = "/api/fal/proxy";

/// The headers of an answer that a page of another origin needs to see, for `expose_headers` of a layer for CORS:
///
/// ```
/// # use tower_fal::proxy::{EXPOSED_HEADERS, FalProxy};
/// # use tower_http::cors::{AllowHeaders, CorsLayer};
/// # fn router(router: axum::Router, origin: http::HeaderValue) -> axum::Router {
/// router.layer(
///     CorsLayer::new()
///         .allow_origin(origin)
///         .allow_methods([http::Method::GET, http::Method::POST, http::Method::PUT])
///         .allow_headers(AllowHeaders::mirror_request())
///         .expose_headers(EXPOSED_HEADERS),
/// )
/// # }
/// ```
pub const EXPOSED_HEADERS: [HeaderName; 9] = [
    REQUEST_ID,
    ERROR_TYPE,
    RETRYABLE,
    NEEDS_RETRY,
    REQUEST_TIMEOUT_TYPE,
    BILLABLE_UNITS,
    SERVED_FROM,
    RUNNER_HINTS,
    RULE,
];

/// The server proxy: a [`Service`] that answers each request by itself or with what fal answered. See the
/// [module docs](self) for an example.
///
/// `S` is the client that it sends with. It answers always: its error is [`Infallible`]. All answers of its own have the
/// header `x-tower-fal-rule`, which names the rule, and a JSON body with a `message` that fal's official client shows.
#[must_use]
pub struct FalProxy<S> {
    upstream: Upstream<S>,
    /// What `upstream` was made with, so that it can be made anew.
    layer: Arc<FalLayer<Passthrough>>,
    config: Arc<Config>,
    path: Arc<str>,
}

/// What requests are sent with. Each one has a clone, which is moved from place to place, and clients are large: hyper-util's
/// has 360 bytes. So it is in a box.
type Upstream<S> = FalRetry<Box<FalAuth<S>>, Passthrough>;

fn upstream<S>(layer: &FalLayer<Passthrough>, client: S) -> Upstream<S> {
    let (retry, auth) = layer.clone().into_layers();
    retry.layer(Box::new(auth.layer(client)))
}

impl<S> FalProxy<S> {
    /// The proxy over a client of yours: any service that takes a [`ReplayBody`] of an [`UploadBody`] of the bodies that
    /// the server has, such as hyper-util's client. Its requests carry the store's current credential.
    ///
    /// The client must follow no redirects: an app chooses where they lead.
    ///
    /// ```
    /// use axum::body::Body;
    /// use hyper_util::{client::legacy::{Client, connect::HttpConnector}, rt::TokioExecutor};
    /// use tower_fal::{CredentialStore, proxy::FalProxy};
    ///
    /// # fn proxy(store: &CredentialStore, https: HttpConnector) -> axum::Router {
    /// let client = Client::builder(TokioExecutor::new()).build(https);
    /// FalProxy::over(store, client).allow_anonymous().into_router()
    /// # }
    /// ```
    pub fn over(store: &CredentialStore, client: S) -> Self {
        Self::with_layer(crate::layer(store).passthrough(), client)
    }

    /// The proxy without a credential of its own: each [`Caller`](crate::caller::Caller) brings one. A caller who has none
    /// gets a 403, and never the house's key.
    pub fn per_request(client: S) -> Self {
        Self::with_layer(FalLayer::per_request().retry(FalRetryLayer::require_credential).passthrough(), client)
    }

    fn with_layer(layer: FalLayer<Passthrough>, client: S) -> Self {
        let config = Config {
            targets: Targets::new(),
            endpoints: None,
            realtime: Applications::default(),
            callers: Callers::default(),
            forwarded: Forwarded::default(),
            max_body: MAX_BODY,
            max_in_flight: None,
            in_flight: InFlight::default(),
            first_byte_timeout: None,
            owners: None,
            on_finished: None,
        };
        Self { upstream: upstream(&layer, client), layer: layer.into(), config: config.into(), path: PATH.into() }
    }

    fn config(&mut self) -> &mut Config {
        Arc::make_mut(&mut self.config)
    }

    fn change_layer(self, change: impl FnOnce(FalLayer<Passthrough>) -> FalLayer<Passthrough>) -> Self {
        let layer = change(Arc::unwrap_or_clone(self.layer));
        Self { upstream: upstream(&layer, self.upstream.into_inner().into_inner()), layer: layer.into(), ..self }
    }

    fn change_targets(
        mut self,
        change: impl FnOnce(Targets) -> Result<Targets, InvalidPattern>,
    ) -> Result<Self, InvalidPattern> {
        let config = self.config();
        config.targets = change(config.targets.clone())?;
        Ok(self)
    }
}

/// # Who may call
impl<S> FalProxy<S> {
    /// Asks this for each request who calls, before anything of the body is read. It replaces what was said before.
    /// Default: nobody may call.
    pub fn authenticate(mut self, authenticate: impl Authenticate) -> Self {
        self.config().callers.authenticate(authenticate);
        self
    }

    /// Lets everyone call. It replaces what was said before.
    ///
    /// Whoever can reach the server spends from your account then. Against pages of other sites, only requests for this
    /// machine are let in (`localhost`, `127.0.0.1`, `[::1]`), and those for names that [`allow_host`](Self::allow_host)
    /// adds.
    pub fn allow_anonymous(mut self) -> Self {
        self.config().callers.allow_anonymous();
        self
    }

    /// A name under which the server is called, such as `app.example.com`, without a port; `*` is any. Requests for others
    /// get a 400. Default: with [`allow_anonymous`](Self::allow_anonymous) none but those of this machine, and with
    /// [`authenticate`](Self::authenticate) any.
    ///
    /// # Errors
    /// When it is not the name of a host.
    pub fn allow_host(mut self, name: &str) -> Result<Self, InvalidPattern> {
        self.config().callers.allow_host(name)?;
        Ok(self)
    }

    /// How many requests of one tenant may be under way at once, until their answers have ended. Others get a 429 with
    /// `Retry-After`, before anything is sent. All callers without a name are one tenant. Default: no limit. A
    /// [`Caller`](crate::caller::Caller) may have one of its own.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.config().max_in_flight = Some(requests);
        self
    }
}

/// # What they may call
impl<S> FalProxy<S> {
    /// One more target that may be called, such as `wma.fal.run/session`: a host, a path, and behind a `?` exactly this
    /// query (without a `?`, any). `*` stands for a part of one label or segment, `**` for any number of segments; a `/**`
    /// at the end matches the bare path too. All other characters stand for themselves.
    ///
    /// Default: `fal.run/**`, `queue.fal.run/**`, and of `rest.fal.ai` and `rest.alpha.fal.ai` the calls
    /// `storage/upload/initiate`, `initiate-multipart` and `complete-multipart` with `?storage_type=fal-cdn-v3`.
    ///
    /// Tokens and the account are not opened so, whatever the pattern: see [`allow_account_target`].
    ///
    /// # Errors
    /// When it cannot be a pattern, when it is for the account, and when the [origins](Self::origins) do not admit its
    /// host: what is listed always carries the credential.
    ///
    /// [`allow_account_target`]: Self::allow_account_target
    pub fn allow_target(self, pattern: &str) -> Result<Self, InvalidPattern> {
        self.change_targets(|targets| targets.and(pattern))
    }

    /// These targets in the place of all others, the default ones too. See [`allow_target`](Self::allow_target).
    ///
    /// # Errors
    /// As [`allow_target`](Self::allow_target).
    pub fn targets<T: AsRef<str>>(self, patterns: impl IntoIterator<Item = T>) -> Result<Self, InvalidPattern> {
        self.change_targets(|targets| targets.only(patterns))
    }

    /// One target of what mints keys or reads the account: `api.fal.ai`, and of fal's REST API all but the tokens and the
    /// uploads. Such as `api.fal.ai/v1/models`; the first segment of the path must be written out. Default: none.
    ///
    /// Whoever may call then acts on the account with the server's credential.
    ///
    /// # Errors
    /// When it cannot be such a pattern.
    pub fn allow_account_target(self, pattern: &str) -> Result<Self, InvalidPattern> {
        self.change_targets(|targets| targets.and_of_account(pattern))
    }

    /// Which origins may carry the credential, such as [`subdomains`](FalOrigins::subdomains) or
    /// [`backups`](FalOrigins::backups), so that patterns can name them. Default: [`FalOrigins::new`].
    ///
    /// # Errors
    /// When a target that is listed is of none of them: set [`targets`](Self::targets) first.
    pub fn origins(self, origins: FalOrigins) -> Result<Self, InvalidPattern> {
        let proxy = self.change_targets(|targets| targets.with_origins(origins.clone()))?;
        Ok(proxy.change_layer(|layer| layer.auth(|auth| auth.origins(origins))))
    }

    /// One endpoint that may be used, such as `fal-ai/flux/dev` or `fal-ai/flux/**`. With the first one, all that are not
    /// named are closed, for each method. Default: all endpoints.
    ///
    /// An endpoint covers its own `/stream`. Its requests in the queue can be followed: there fal names them by owner and
    /// app only, so that `fal-ai/flux/dev` is followed at `fal-ai/flux/requests/…`.
    ///
    /// # Errors
    /// When it cannot be a pattern, or is so short that it covers no endpoint.
    pub fn allow_endpoint(mut self, pattern: &str) -> Result<Self, InvalidPattern> {
        let config = self.config();
        config.endpoints = Some(config.endpoints.clone().unwrap_or_default().and(pattern)?);
        Ok(self)
    }

    /// An application for which realtime tokens are handed out, such as `fal-ai/fast-lcm-diffusion`. Default: none, as
    /// whoever has a token spends from your account.
    ///
    /// It opens `POST` to `/tokens/` and `/tokens/realtime` of fal's REST API. The proxy reads what a client asks for and
    /// sends its own: for listed applications only, and for at most 3,600 s (120 s if nothing or nonsense is asked for).
    /// The older call, `/tokens/`, names applications by their second segment alone, so a token of it is good for the
    /// applications of that name of every owner.
    ///
    /// # Errors
    /// When it is not the name of an application.
    pub fn allow_realtime(mut self, app: &str) -> Result<Self, InvalidApp> {
        let config = self.config();
        config.realtime = config.realtime.clone().and(app)?;
        config.targets.tokens = true;
        Ok(self)
    }

    /// A host to which fal may send results (`fal_webhook`), such as `app.example.com`, or `app.example.com:8443` for
    /// another port than 443; `*` is any. Default: none, so that a browser cannot have your results sent elsewhere.
    ///
    /// # Errors
    /// When it is not the name of a host.
    pub fn allow_webhook(self, host: &str) -> Result<Self, InvalidPattern> {
        self.change_targets(|targets| targets.allow_webhook(host))
    }

    /// Lets only those who have submitted a request to the queue follow it: others get a 404. Default: off, and then
    /// everyone who knows a request's id can.
    ///
    /// ```
    /// # use tower_fal::proxy::{FalProxy, RequestOwnersInMemory};
    /// # fn with<S>(proxy: FalProxy<S>) -> FalProxy<S> {
    /// proxy.request_owners(RequestOwnersInMemory::default())
    /// # }
    /// ```
    pub fn request_owners(mut self, owners: impl RequestOwners) -> Self {
        self.config().owners = Some(Owners::new(owners));
        self
    }
}

/// # How it is sent
impl<S> FalProxy<S> {
    /// These headers of a client go to fal, and no others but `content-type` and `content-encoding`, which belong to the
    /// body. Default: `accept`, `x-app-fal-disable-fallback`, and all that begin with `x-fal-` but `x-fal-target-url`,
    /// `x-fal-client-proxy`, `x-fal-user-id` and `x-fal-cdn-token`.
    ///
    /// # Errors
    /// When one of them never goes to fal: a credential, the host, one of the connection, or one that is the proxy's own.
    pub fn forward_request_headers(
        mut self,
        names: impl IntoIterator<Item = HeaderName>,
    ) -> Result<Self, InvalidPattern> {
        self.config().forwarded = Forwarded::these(names)?;
        Ok(self)
    }

    /// How many bytes the body of a request may have; beyond that the client gets a 413. Default: 32 MiB.
    pub fn max_body(mut self, bytes: u64) -> Self {
        self.config().max_body = bytes;
        self
    }

    /// How long fal's answer may take to begin. Then the request is given up with a 504 which says that it may still be
    /// running. Default: no limit, as models take minutes.
    pub fn first_byte_timeout(mut self, limit: Duration) -> Self {
        self.config().first_byte_timeout = Some(limit);
        self
    }

    /// Sets options of the layer that reloads and replays.
    pub fn retry(self, set: impl FnOnce(FalRetryLayer<Passthrough>) -> FalRetryLayer<Passthrough>) -> Self {
        self.change_layer(|layer| layer.retry(set))
    }

    /// Is told of each request that went to fal when it has ended, for those who meter. It must not block. Default: nobody
    /// is told.
    ///
    /// It is told of every end, also when the client leaves; fal may bill such a request all the same.
    ///
    /// ```
    /// # use tower_fal::proxy::FalProxy;
    /// # fn with<S>(proxy: FalProxy<S>) -> FalProxy<S> {
    /// proxy.on_finished(|finished| println!("{:?} used {:?}", finished.caller().name(), finished.billable_units()))
    /// # }
    /// ```
    pub fn on_finished(mut self, tell: impl Fn(&Finished) + Send + Sync + 'static) -> Self {
        self.config().on_finished = Some(OnFinished(Arc::new(tell)));
        self
    }

    /// The path of the router that [`into_router`](Self::into_router) makes. Default: `/api/fal/proxy`.
    ///
    /// # Errors
    /// When it does not begin with a slash, or has a `{`, `}` or `*` in it, or a `:` behind a slash, or what no path of a
    /// request has, such as a blank or a `?`.
    pub fn path(mut self, path: &str) -> Result<Self, InvalidPattern> {
        let is_whole = |read: PathAndQuery| read.path() == path;
        // axum's router panics at some of them.
        if !path.starts_with('/')
            || path.contains(['{', '}', '*'])
            || path.contains("/:")
            || !PathAndQuery::try_from(path).is_ok_and(is_whole)
        {
            return Err(InvalidPattern::of("path", "cannot be that of a route: write it like `/api/fal/proxy`"));
        }
        self.path = path.into();
        Ok(self)
    }
}

impl<S> FalProxy<S> {
    /// Answers a request. The proxy is ready for each at any time, and several can be under way.
    ///
    /// The same as the call of the [`Service`], without `&mut`, so that no clone is needed for each request.
    pub fn request<B, R>(&self, request: Request<B>) -> ResponseFuture<R>
    where
        S: Service<Request<ReplayBody<UploadBody<B>>>, Response = Response<R>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send,
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
        R: Body<Data: Send> + Send + 'static,
        R::Error: Into<BoxError> + Send,
    {
        ResponseFuture { inner: Box::pin(forward::serve(Arc::clone(&self.config), self.upstream.clone(), request)) }
    }
}

impl<S, B, R> Service<Request<B>> for FalProxy<S>
where
    S: Service<Request<ReplayBody<UploadBody<B>>>, Response = Response<R>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
    R: Body<Data: Send> + Send + 'static,
    R::Error: Into<BoxError> + Send,
{
    type Response = Response<ProxyBody<R>>;
    type Error = Infallible;
    type Future = ResponseFuture<R>;

    /// Always ready: the client inside is made ready when there is something to send.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.request(request)
    }
}

impl<S: Clone> Clone for FalProxy<S> {
    fn clone(&self) -> Self {
        let Self { upstream, layer, config, path } = self;
        Self {
            upstream: upstream.clone(),
            layer: Arc::clone(layer),
            config: Arc::clone(config),
            path: Arc::clone(path),
        }
    }
}

impl<S> fmt::Debug for FalProxy<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalProxy").field("config", &self.config).field("layer", &self.layer).finish_non_exhaustive()
    }
}

/// Response future of [`FalProxy`].
pub struct ResponseFuture<R: Body> {
    inner: Pin<Box<dyn Future<Output = Response<ProxyBody<R>>> + Send>>,
}

impl<R: Body> Future for ResponseFuture<R> {
    type Output = Result<Response<ProxyBody<R>>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.inner.as_mut().poll(cx).map(Ok)
    }
}

impl<R: Body> fmt::Debug for ResponseFuture<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
