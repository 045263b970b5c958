//! Lets only those deliveries through that fal has signed for you.
//!
//! fal calls your server when a request of the queue that was submitted with `?fal_webhook=URL` has ended. Anybody else
//! can call that URL as well, so fal signs each delivery: with Ed25519, over the request's id, the account's user id, a
//! timestamp and the SHA-256 of the body. [`VerifyWebhookLayer`] goes around the route that takes deliveries:
//!
//! ```
//! use axum::{Extension, Json, Router, http::StatusCode, routing::post};
//! use tower_fal::webhook::{VerifiedWebhook, VerifyWebhookLayer, WebhookKeys, WebhookPayload};
//!
//! async fn delivered(Extension(webhook): Extension<VerifiedWebhook>, Json(payload): Json<WebhookPayload>) -> StatusCode {
//!     if !webhook.is_repeat() {
//!         println!("{}: {:?}", webhook.request_id(), payload.status);
//!     }
//!     StatusCode::OK // within 15 s: put what takes longer into a queue of yours
//! }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let client = tower::service_fn(async |_| Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Empty::<bytes::Bytes>::new())));
//! // `client` is any Tower service for HTTP: hyper-util's client, or a `ReqwestService`.
//! let keys = WebhookKeys::new(client);
//! let verify = VerifyWebhookLayer::for_accounts(keys, ["github|12345"])?;
//! let app: Router = Router::new().route("/webhook", post(delivered)).layer(verify);
//! # let _ = app;
//! # Ok(()) }
//! ```
//!
//! **The account matters.** fal signs for all of its customers with the same keys, and each of them can name your URL.
//! Without a list of accounts a good signature only says that somebody has paid fal. The
//! [page on webhooks](crate::docs::webhooks) says how to find your user id, and how to switch a server over.
//!
//! **Order:** outside of everything that reads or changes the body. The signature is over the bytes that arrived, so a
//! middleware in front that decompresses the body, or reads JSON and writes it again, breaks it: the numbers, the blanks
//! and the order of the members are others then, and so is the hash. In a `Router` the layer that is added last is the
//! outermost; in a `ServiceBuilder` it is the first.
//!
//! # What happens to a request
//! 1. Each of the four headers must be there once, and in its form. If not, none of the body is read.
//! 2. The body is read, up to [`max_body`](VerifyWebhookLayer::max_body) bytes and for
//!    [`body_timeout`](VerifyWebhookLayer::body_timeout).
//! 3. One of [fal's keys](WebhookKeys) must have signed it. If none has, and the delivery would be believed otherwise, the
//!    keys are fetched again, but only once a minute.
//! 4. The timestamp must not be further from this server's clock than the [`tolerance`](VerifyWebhookLayer::tolerance),
//!    and the account must be one of those that you named.
//! 5. The id is looked up in [`SeenIds`]. While a delivery with the same id is being handled, the second one has to wait.
//!    A delivery counts as handled when the inner service has answered it with a status of success (2xx); if it fails,
//!    panics or is dropped, the next one is new again. So nothing is lost when a handler fails, and fal's repeat is handled.
//! 6. The inner service gets the request with the same bytes as its body, and [`VerifiedWebhook`] in its extensions.
//!
//! # What it answers
//! | status | `reason` | when |
//! |---|---|---|
//! | 401 | `missing_header`, `repeated_header`, `invalid_header` | one of the four headers |
//! | 401 | `bad_signature` | no key of fal's has signed it |
//! | 401 | `stale` | signed by fal, and too long ago, or ahead of the clock |
//! | 403 | `other_account` | signed by fal, and for an account that you did not name |
//! | 413 | `body_too_long` | |
//! | 400 | `body_cut_off` | the connection broke |
//! | 503 | `body_timeout` | the body came too slowly |
//! | 503 | `no_keys` | fal's keys could not be fetched yet |
//! | 503 | `keys_held_back` | no known key has signed it, and the keys were fetched again less than a minute ago for another such delivery: fal may have a new key |
//! | 503 | `being_handled` | a delivery with the same id is being handled |
//! | 503 | `seen_ids_failed` | [`SeenIds`] could not answer |
//! | 200 | | a repeat, with [`skip_repeats`](VerifyWebhookLayer::skip_repeats) |
//!
//! The body is `{"type":"about:blank","title":"Unauthorized","status":401,"reason":"bad_signature"}` with the type
//! `application/problem+json`, and holds nothing of the request. Each 503 has `Retry-After`, and is for the sake of
//! deliveries that are fal's: fal sends a delivery again after a 5xx or when there is no answer within 15 s. The response
//! has its [`Rejection`] in its extensions.
//!
//! Without Tower, [`verify`] judges one delivery with keys that you have.

mod accounts;
mod body;
mod keys;
mod layer;
mod payload;
mod rejection;
mod seen;
mod signature;

pub use self::{
    accounts::{Accounts, InvalidAccounts},
    body::{ResponseBody, WebhookBody},
    keys::{InvalidKeysUrl, KeysStatus, WebhookKeys},
    layer::{ResponseFuture, VerifyWebhook, VerifyWebhookLayer},
    payload::{OutputError, WebhookPayload, WebhookStatus},
    rejection::Rejection,
    seen::{RecentIds, Seen, SeenIds},
    signature::{InvalidJwks, PublicKeys, VerifiedWebhook, verify},
};
