//! Tower middleware that authenticates Rust servers to [fal.ai](https://fal.ai).
//!
//! It puts the current fal credential on the right requests and on no others, and follows the credential when it is
//! rotated: without a restart, and without a failed request.
//!
//! ```no_run
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt as _};
//! use tower_fal::{CredentialStore, source::FileSource};
//!
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let connector = hyper_util::client::legacy::connect::HttpConnector::new();
//! let store = CredentialStore::builder(FileSource::new("/run/secrets/fal/key")).build().await?;
//! let fal = ServiceBuilder::new()
//!     .layer(tower_fal::layer(&store))
//!     .service(Client::builder(TokioExecutor::new()).build(connector));
//!
//! let request = Request::post("https://fal.run/fal-ai/flux/dev")
//!     .header("content-type", "application/json")
//!     .body(Full::new(Bytes::from_static(br#"{"prompt":"a lighthouse"}"#)))?;
//! let response = fal.oneshot(request).await?;
//! # let _ = response;
//! # Ok(()) }
//! ```
//!
//! # How a credential flows
//! ```text
//!  env / file / closure / a chain of them
//!    source            Ok(Some) here it is, Ok(None) not mine, Err mine and broken
//!       |
//!    Credential        header built once, sensitive, wiped on drop, printed as its id
//!       |  published only if valid and changed: generation 7 -> 8
//!    CredentialStore   one writer (the driver), many readers; status
//!       |  load(): one snapshot for one request, no lock, no await, no allocation
//!    FalAuth           the origin policy admits the URI? -> authorization header
//!       |  a 401 or 403 comes back stamped with what it was sent with: generation, key id, source
//!    FalRetry          fal's 401: current > g ? replay : reload past g, together, wait a little, replay once
//!       |  403, an application's own refusal, nothing newer
//!    FalAuthError      Unauthorized(Refusal), Forbidden(Refusal), ...: why, and what to do next
//! ```
//!
//! # Features
//! | feature | adds |
//! |---|---|
//! | `axum` | `FalAuthError` as an axum handler's response: 502, 503, 504 or 413, with a body that says nothing secret |
//! | `transient` | retries of what fails in passing, for requests that may be repeated |
//! | `client` | `FalClient`: a boxed client over hyper-util, for `State` and struct fields |
//! | `client-rustls` | `FalClient::rustls` |
//! | `reqwest` | `ReqwestService`: a `reqwest::Client` that the layers fit around |
//! | `reqwest-middleware` | `FalLayer::reqwest`, and the two middlewares that it is made of |
//! | `watch` | `CredentialStoreBuilder::watch_files`: a rotated file is seen within milliseconds |
//! | `signal` | `CredentialStoreBuilder::reload_on_sighup`: SIGHUP asks for a reload (Unix) |
//! | `dotenv` | `source::DotenvSource`: one variable of a `.env` file |
//! | `mock` | `mock::MockFal`: an in-process fal on loopback, for tests and examples |
//! | `tracing` | events: rotation and recovery (info), failures and refusals (warn), replays, retries and refusals of others (debug) |
//! | `metrics` | which key each store holds and since when; counters for reloads, refusals, replays and retries |
//! | `full` | all of them |
//!
//! Without features there are the two layers, the store, and the sources that read the environment, a file or a
//! closure, or several of them.

#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Without its feature an item is not there to be linked to.
#![cfg_attr(not(feature = "full"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(fuzzing)]
#[doc(hidden)]
pub mod __fuzz;
pub mod auth;
#[cfg(feature = "axum")]
pub mod axum;
mod backoff;
#[cfg(feature = "client")]
pub mod client;
pub mod credential;
#[cfg(doc)]
pub mod docs;
pub mod error;
mod events;
mod generation;
mod layer;
#[cfg(feature = "mock")]
pub mod mock;
pub mod origin;
#[cfg(feature = "reqwest")]
pub mod reqwest;
pub mod retry;
pub mod source;
pub mod store;
mod wire;

#[cfg(feature = "client")]
pub use self::client::FalClient;
pub use self::{
    auth::{FalAuth, FalAuthLayer},
    credential::{Credential, CredentialError, KeyId, Scheme},
    error::SourceError,
    store::{CredentialStore, Generation},
};
pub use self::{
    error::FalAuthError,
    layer::{FalLayer, layer},
    retry::{FalRetry, FalRetryLayer},
};

// The README's snippet is compiled like every other example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
