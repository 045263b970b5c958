//! Tower middleware that authenticates Rust servers to [fal.ai](https://fal.ai).
//!
//! It puts the current fal credential on the requests that may carry it, follows the credential when it is rotated
//! (without a restart and without a failed request), and says in a type why fal answered 401 or 403. It logs *your*
//! HTTP client in; it is not a fal client, and it is unofficial.
//!
//! With reqwest (the whole program compiles when it is copied):
//!
//! ```sh
//! export FAL_KEY=…   # from fal.ai/dashboard/keys
//! cargo add tower-fal --features reqwest-middleware
//! cargo add reqwest serde_json
//! cargo add reqwest-middleware --features json
//! cargo add tokio --features macros,rt-multi-thread
//! ```
//!
//! ```no_run
//! use serde_json::json;
//! use tower_fal::{CredentialStore, FalAuthError, error::report, source::EnvSource};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // Fails if there is no key. A `FileSource` would follow a rotated file.
//!     let store = CredentialStore::builder(EnvSource::all()).build().await?;
//!     let fal = tower_fal::layer(&store).reqwest(reqwest::Client::builder())?;
//!
//!     let request = fal
//!         .post("https://fal.run/fal-ai/flux/schnell")
//!         .json(&json!({"prompt": "a lighthouse"}));
//!     match request.send().await {
//!         Ok(response) => println!("{}", response.text().await?),
//!         Err(error) => match FalAuthError::find(&error) {
//!             Some(FalAuthError::Forbidden(refusal)) => println!("not allowed: {refusal}"),
//!             Some(FalAuthError::Unauthorized(refusal)) => println!("the key: {refusal}"),
//!             _ => println!("no answer: {}", report(&error)),
//!         },
//!     }
//!     Ok(())
//! }
//! ```
//!
//! With any other client that speaks Tower, [`layer`] goes around it (`cargo add tower-fal tower`):
//!
//! ```
//! use tower::ServiceBuilder;
//! use tower_fal::{CredentialStore, FalAuth, FalRetry};
//!
//! fn with_credential<S>(store: &CredentialStore, client: S) -> FalRetry<FalAuth<S>> {
//!     ServiceBuilder::new().layer(tower_fal::layer(store)).service(client)
//! }
//! ```
//!
//! # How a credential flows
//! ```text
//!  env / file / profile / login / closure / a chain of them
//!    source           Ok(Some) here it is, Ok(None) ask the next one, Err here and broken
//!       |             asked with a reason: an interval, an expiry ahead, a refusal by fal
//!    Credential       a ready header, marked sensitive, wiped on drop, printed as its id; may name an account
//!       |             published only if it is valid and has changed: generation 7 -> 8
//!    CredentialStore  one writer (the driver), many readers; a status
//!       |             load(): one snapshot for one request; no lock, no await
//!    FalAuth          does the origin policy admit the URI? then: authorization header
//!       |             a 401 or 403 is stamped with what the request was sent with
//!    FalRetry         fal's own 401: is there a newer credential? then: replay once;
//!       |             else: reload, one for all requests, and wait a little for one
//!    FalAuthError     Unauthorized(Refusal), Forbidden(Refusal), Transport(error)
//! ```
//!
//! # Where next
//! | you want to | look at |
//! |---|---|
//! | know which part of this crate your server needs | [`docs::servers`] |
//! | say where the key comes from | [`source`] |
//! | use what fal's own tools use on a developer's machine | [`CredentialStore::from_default`] |
//! | know what the store does with it | [`store`] |
//! | admit another host | [`origin`] |
//! | know what an error means and what to do about it | [`error`] |
//! | give customers' own keys to their requests | [`auth`](auth#a-request-with-its-own-credential) |
//! | use reqwest, axum, or one type for `State` | [`reqwest`](mod@reqwest), [`axum`](mod@axum), [`client`] |
//! | use the login of `fal auth login`, or make one | [`docs::login`], [`login`] |
//! | let browsers call fal through your server | [`docs::proxy`] |
//! | rotate a key in a fleet | [`docs::rotation`] |
//! | answer a readiness probe | [`docs::readiness`] |
//! | let browsers open realtime sockets | [`realtime`], [`docs::realtime`] |
//! | take fal's webhooks | [`webhook`], [`docs::webhooks`] |
//! | read logs and metrics | [`docs::observability`] |
//! | test without fal | [`docs::testing`], [`mock`] |
//! | put the layers together with others, or understand a compile error | [`docs::stacks`] |
//! | know what it costs | [`docs::performance`] |
//! | know where the secret goes and what is wiped | [`docs::secrets`] |
//!
//! # Features
//! None is on by default: the two layers, the store, and the sources that read the environment, a file or a closure
//! are always there.
//!
//! | feature | adds |
//! |---|---|
//! | `axum` | [`FalAuthError`] as an axum handler's response: [the table](mod@axum) |
//! | `client` | [`FalClient`]: one boxed type for a client, for `State` and struct fields |
//! | `client-rustls` | [`FalClient::https`] and [`FalClient::rustls`]: the same over TLS |
//! | `dotenv` | [`DotenvSource`](source::DotenvSource): the key in a `.env` file |
//! | `login` | [`login`]: the login with GitHub |
//! | `metrics` | [gauges and counters](docs::observability#metrics) |
//! | `mock` | [`MockFal`](mock::MockFal): an in-process fal on loopback, for tests |
//! | `profile` | [`ProfileSource`](source::ProfileSource): the key of a profile in fal's own `~/.fal/config.toml` |
//! | `proxy` | [`proxy`]: browsers talk to fal through your server, and the key stays on it |
//! | `realtime` | [`realtime`]: short-lived tokens for browsers |
//! | `reqwest` | [`ReqwestService`](reqwest::ReqwestService): a `reqwest::Client` that the layers fit around |
//! | `reqwest-middleware` | [`FalLayer::reqwest`], and the two middlewares that it is made of |
//! | `signal` | `CredentialStoreBuilder::reload_on_sighup`: a reload on SIGHUP (Unix) |
//! | `tracing` | [events](docs::observability#events) for rotation, failure and recovery |
//! | `transient` | [`Transient`](retry::Transient): retries of requests that may be repeated |
//! | `watch` | [`watch_files`](store::CredentialStoreBuilder::watch_files): a rotated file is seen within milliseconds |
//! | `webhook` | [`webhook`]: lets through only the deliveries that fal has signed for you |
//! | `full` | all of them |

#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Without its feature an item is not there to be linked to.
#![cfg_attr(not(feature = "full"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(fuzzing)]
#[doc(hidden)]
pub mod __fuzz;
#[cfg(feature = "realtime")]
#[allow(dead_code)] // the proxy uses all of it
mod answer;
mod application;
#[doc(alias = "inject", alias = "bring your own key")]
pub mod auth;
#[cfg(feature = "axum")]
pub mod axum;
mod backoff;
#[cfg(feature = "realtime")]
#[doc(alias = "authentication", alias = "login")]
pub mod caller;
#[cfg(feature = "client")]
pub mod client;
#[doc(alias = "api key", alias = "token", alias = "zeroize")]
pub mod credential;
mod default_chain;
#[cfg(doc)]
pub mod docs;
#[cfg(feature = "realtime")]
#[allow(dead_code)] // the proxy uses all of it
mod endpoint;
#[doc(alias = "401", alias = "403", alias = "unauthorized", alias = "forbidden")]
#[doc(alias = "balance", alias = "billing", alias = "locked")]
pub mod error;
mod events;
#[cfg(any(feature = "login", feature = "realtime", feature = "webhook"))]
#[allow(dead_code)] // what is used of it depends on the features
mod fetch;
mod generation;
#[cfg(any(feature = "login", feature = "webhook"))]
#[allow(dead_code)] // what is used of it depends on the features
mod jwks;
mod layer;
#[cfg(feature = "login")]
#[doc(alias = "github", alias = "oauth", alias = "device flow")]
pub mod login;
#[cfg(feature = "mock")]
#[doc(alias = "test", alias = "fake")]
pub mod mock;
#[doc(alias = "allow list", alias = "allowlist", alias = "host", alias = "redirect")]
pub mod origin;
#[cfg(feature = "realtime")]
#[allow(dead_code)] // the proxy uses all of it
mod pattern;
#[cfg(feature = "proxy")]
#[doc(alias = "browser", alias = "server proxy")]
pub mod proxy;
#[cfg(feature = "realtime")]
#[doc(alias = "token provider", alias = "jwt")]
pub mod realtime;
#[cfg(feature = "reqwest")]
pub mod reqwest;
#[doc(alias = "401", alias = "replay", alias = "backoff")]
pub mod retry;
#[doc(alias = "vault", alias = "secret manager", alias = "environment")]
pub mod source;
#[doc(alias = "rotate", alias = "rotation", alias = "hot reload", alias = "reload")]
pub mod store;
#[cfg(feature = "webhook")]
#[doc(alias = "signature", alias = "ed25519")]
pub mod webhook;
mod wire;

#[cfg(feature = "client")]
#[doc(inline)]
pub use self::client::FalClient;
#[doc(inline)]
pub use self::{
    auth::{FalAuth, FalAuthLayer},
    credential::{AccountId, Credential, CredentialError, KeyId, Scheme},
    error::SourceError,
    store::{CredentialStore, Generation},
};
#[doc(inline)]
pub use self::{
    error::FalAuthError,
    layer::{FalLayer, layer},
    retry::{FalRetry, FalRetryLayer},
};

// The README's programs are compiled like every other example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
