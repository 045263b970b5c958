//! A `reqwest::Client` that carries the credential: as a Tower service, or under `reqwest-middleware`.
//!
//! [`FalLayer::reqwest`](crate::FalLayer::reqwest) (feature `reqwest-middleware`) is the behaviour of
//! [`layer`](crate::layer) for a client as reqwest's users know it:
//!
//! ```no_run
//! use serde_json::json;
//! use tower_fal::{CredentialStore, FalAuthError, source::FileSource};
//!
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = CredentialStore::builder(FileSource::new("/run/secrets/fal/key")).build().await?;
//! let fal = tower_fal::layer(&store).reqwest(reqwest::Client::builder())?;
//!
//! let request = fal.post("https://fal.run/fal-ai/flux/dev").json(&json!({"prompt": "a lighthouse"}));
//! match request.send().await {
//!     Ok(response) => println!("{}", response.text().await?),
//!     Err(error) => match FalAuthError::find(&error) {
//!         Some(FalAuthError::Forbidden(refusal)) => println!("locked, or not permitted: {refusal}"),
//!         Some(refused) => println!("look at the key: {refused}"),
//!         None => println!("no answer: {error}"),
//!     },
//! }
//! # Ok(()) }
//! ```
//!
//! # A Tower service
//! reqwest's client is a Tower service for requests of its own type only, which no layer for `http` requests fits
//! around. [`ReqwestService`] translates:
//!
//! ```
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use tower::{ServiceBuilder, ServiceExt as _};
//! use tower_fal::{CredentialStore, reqwest::ReqwestService};
//!
//! # async fn call(store: CredentialStore) -> Result<(), Box<dyn std::error::Error>> {
//! let client = ReqwestService::new(reqwest::Client::builder())?;
//! let fal = ServiceBuilder::new()
//!     .layer(tower_fal::layer(&store))
//!     .service(client);
//!
//! let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::new(Bytes::from_static(b"{}")))?;
//! let response = fal.oneshot(request).await?;
//! # let _ = response;
//! # Ok(()) }
//! ```
//!
//! Bodies stream both ways, and their size is passed on. A response's final URL and remote address come with it:
//! `reqwest::Response::from(response)` has them, and reqwest's ways to read a body as well.
//!
//! # Redirects
//! reqwest follows redirects inside of the layers and the middlewares, where no origin policy is asked: an application
//! behind fal could have a `POST` sent again, with the key and the body, to an application of its choice. fal's API
//! redirects nothing, so the clients that are built here follow no redirect; the response is handed on. **Build a client
//! of your own with [`Policy::none`](reqwest::redirect::Policy::none), too.** reqwest's default policy takes
//! `authorization` off when a redirect leads to another origin, but puts it on again when that one redirects to itself
//! (reqwest 0.13.5). What another origin answers is passed on untouched: it reloads nothing and proves nothing.
//!
//! If you need redirects, put tower-http's `FollowRedirect` *around* the layers, so that the origin policy is asked on each
//! hop, with a policy that follows `GET` and `HEAD` within an origin only.
//!
//! # Proxies
//! reqwest takes the proxies of its environment, and a proxy reads what is sent in plain `http`, the credential
//! included: with [`loopback_http`](crate::origin::FalOrigins::loopback_http), call
//! [`no_proxy`](reqwest::ClientBuilder::no_proxy).
//!
//! # Logs
//! [`connection_verbose(true)`](reqwest::ClientBuilder::connection_verbose) makes reqwest log what it sends, the key
//! included, at the level `trace`: keep the target `reqwest::connect` above it.
//!
//! # Several middlewares
//! **Order:** [`FalRetryMiddleware`] goes before [`FalAuthMiddleware`], which is last: what comes later is further in,
//! and the second attempt has to get the new credential. [`FalLayer::reqwest`](crate::FalLayer::reqwest) puts them in that
//! order. Where there are others:
//!
//! ```
//! # use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware};
//! use std::time::Duration;
//! use tower_fal::{FalRetryLayer, reqwest::{FalAuthMiddleware, FalRetryMiddleware}};
//!
//! # fn client(store: tower_fal::CredentialStore, tracing: impl Middleware) -> reqwest::Result<ClientWithMiddleware> {
//! let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build()?;
//! let retry = FalRetryLayer::new(store.clone()).reload_wait(Duration::from_secs(5)); // options are the layers' own
//! let fal = ClientBuilder::new(client)
//!     .with(tracing)
//!     .with(FalRetryMiddleware::from(retry))
//!     .with(FalAuthMiddleware::new(store))
//!     .build();
//! # Ok(fal) }
//! ```
//!
//! # A request with its own credential
//! It brings it in its extensions, as with the layers: `fal.post(…).with_extension(Credential::key("…")?)`. Those of an
//! `http::Request` that is made a `reqwest::Request` are not seen by any middleware; where every request must bring its
//! own, [`FalLayer::per_request`](crate::FalLayer::per_request) has such a one go out without a header.
//!
//! # Replays
//! A request is sent again if its body is in memory; cloning it copies no body. A request whose body streams is sent once,
//! and [`Refusal::is_replayable`](crate::error::Refusal::is_replayable) says so. As nothing is copied,
//! [`max_body`](crate::FalRetryLayer::max_body) and [`replay_memory`](crate::FalRetryLayer::replay_memory) mean nothing
//! here.
//!
//! reqwest itself sends a request again that an HTTP/2 server has surely not looked at (`REFUSED_STREAM`, a `GOAWAY`). It
//! needs the body in memory for that, so it never does it for a [`ReqwestService`], whose bodies stream. There the option
//! [`transient`](crate::FalRetryLayer::transient) does.
//!
//! # Timeouts, and other statuses
//! reqwest's timeout is that of one attempt: the wait for a newer credential, up to
//! [`reload_wait`](crate::FalRetryLayer::reload_wait), comes on top, and a replay has the whole timeout again. Any status
//! but 401 and 403 is a response, as reqwest has it: call `error_for_status` if you want an error.
//!
//! The default headers of reqwest's client are not seen: ours goes before an `authorization` among them, with
//! [`keep_existing`](crate::FalAuthLayer::keep_existing) as well.

#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod service;

#[cfg(feature = "reqwest-middleware")]
pub use self::middleware::{FalAuthMiddleware, FalRetryMiddleware};
pub use self::service::{ReqwestService, ResponseFuture};
