//! Short-lived tokens for browsers, minted with the server's own credential.
//!
//! A browser or an app opens its realtime sockets to fal by itself, and the key must never be in it. So it asks your
//! server for a token, which is good for a few applications and a few minutes:
//!
//! 1. [`token_route`] looks at who asks: `401` for strangers, before anything else is looked at.
//! 2. The application has to be on the [`TokenMinter`]'s list, and on the caller's own if there is one: `403`.
//! 3. The minter calls fal through your layers, so that the call is sent with the current key, and made again with a newer
//!    one if that was rotated. Many callers at a time cause one call, which does not end when one of them goes away.
//! 4. A token is minted for the advertised life and a [reuse window](TokenMinterBuilder::reuse_window). It is handed out
//!    to all who ask within the window, so **each token that is handed out lives at least as long as advertised**.
//!
//! ```
//! use axum::Router;
//! use tower_fal::{
//!     CredentialStore, FalClient,
//!     caller::{Caller, Tokens},
//!     realtime::{TokenMinter, token_route},
//! };
//!
//! # #[cfg(feature = "client-rustls")]
//! fn app(store: &CredentialStore) -> Result<Router, Box<dyn std::error::Error>> {
//!     let fal: FalClient = FalClient::https(&tower_fal::layer(store))?;
//!     let minter = TokenMinter::builder(fal).allow_app("fal-ai/fast-lcm-diffusion").build()?;
//!     // Or a closure that looks at a session: see `caller`.
//!     let callers = Tokens::new([("token-of-ann", Caller::tenant("ann"))]);
//!     let route = token_route(minter).authenticate(callers).into_route();
//!     Ok(Router::new().route("/api/fal/token", route))
//! }
//! ```
//!
//! fal's JavaScript client asks the route in its `tokenProvider`: [the page about it](crate::docs::realtime) has the code
//! for the browser, and what a limit for each caller looks like. `examples/realtime_token.rs` is a whole server.
//!
//! # The answers of the route
//! | status | `rule` | when |
//! |---|---|---|
//! | 200 | | `{"token":"…","expires_in":120}`, with the advertised life in seconds; or the bare token for `Accept: text/plain` |
//! | 400 | `host` | nobody has to log in, and the `host` is no name of this machine, or there is not one `host` |
//! | 400 | `app` | the query does not name one application, as in `?app=owner/app/realtime` |
//! | 401 | `caller` | the caller is not admitted; or what your [`Authenticate`](crate::caller::Authenticate) says |
//! | 403 | `realtime` | the application is not on the list |
//! | 405 | | the method is not `GET` or `HEAD` |
//! | 503 | `no_token` | fal gave no token, for whatever reason, or gave none within the [timeout](TokenMinterBuilder::timeout). `Retry-After` is a second |
//!
//! The answers of this crate are JSON with a `message` and a `rule`, and say nothing about the key or about fal's reason:
//! an event does (feature `tracing`), and the [`MintError`] is in the extensions of the response, which do not leave the
//! server. All answers have `Cache-Control: no-store`, and none has a CORS header: put tower-http's `CorsLayer` around
//! the route if pages of other origins may ask.

#[allow(dead_code)] // some of it is for the proxy only
pub(crate) mod app;
#[allow(dead_code)] // some of it is for the proxy only
pub(crate) mod body;
mod cache;
mod error;
mod minter;
mod route;
mod token;

pub use self::{
    app::InvalidApp,
    body::{Body, Endpoint},
    error::{InvalidMinter, MintError},
    minter::{TokenMinter, TokenMinterBuilder},
    route::{TokenRoute, token_route},
    token::{SocketUrl, Token},
};
