//! [`MockFal`]: a fal inside your process, for your tests and for the examples of this crate.
//!
//! It plays fal and nothing else. It knows no store, no layer and no policy of this crate, so a test sees what fal
//! would have seen on the wire. A real [`hyper`] server listens on five ports of `127.0.0.1`: as `fal.run`,
//! `queue.fal.run`, `ws.fal.run`, `rest.fal.ai`, and the storage behind it. It speaks HTTP/1.1, and HTTP/2 with prior
//! knowledge, both without TLS; for TLS there is [`MockFal::serve_connection`].
//!
//! ```
//! use http::{Request, StatusCode};
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt as _};
//! use tower_fal::{
//!     Credential, CredentialStore, FalAuthLayer,
//!     mock::{MockFal, Presented},
//!     origin::FalOrigins,
//! };
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let credential = Credential::key("my-key-id:not-a-real-secret")?;
//!     let fal = MockFal::start().await?;
//!     fal.accept(&credential);
//!
//!     // What is under test. The mock is not fal, so without `loopback_http` it would not get the credential.
//!     let store = CredentialStore::fixed(credential.clone());
//!     let client = ServiceBuilder::new()
//!         .layer(FalAuthLayer::new(store).origins(FalOrigins::new().loopback_http()))
//!         .service(Client::builder(TokioExecutor::new()).build_http());
//!
//!     let request = Request::post(fal.run_url("/fal-ai/flux")).body(r#"{"prompt":"a cat"}"#.to_owned())?;
//!     assert_eq!(client.oneshot(request).await?.status(), StatusCode::OK);
//!
//!     let received = fal.received();
//!     assert_eq!(received[0].path, "/fal-ai/flux");
//!     assert_eq!(received[0].presented, Presented::Accepted(credential.key_id().cloned()));
//!     Ok(())
//! }
//! ```
//!
//! # What a test can do
//! | | |
//! |---|---|
//! | credentials | [`accept`](MockFal::accept), [`revoke`](MockFal::revoke), [`deny`](MockFal::deny), [`lock`](MockFal::lock) |
//! | what an application answers | [`answer`](MockFal::answer) with JSON, or with an [`Answer`] of any status, headers and body |
//! | failures | [`fail_next`](MockFal::fail_next), [`fail_next_on`](MockFal::fail_next_on) one path: see [`Failure`] |
//! | time | [`set_latency`](MockFal::set_latency), [`polls_until_completed`](MockFal::polls_until_completed), [`hold_events_after`](MockFal::hold_events_after) |
//! | what arrived | [`received`](MockFal::received), with [`keep_content`](MockFal::keep_content) also the query, the headers and the body; [`runs`](MockFal::runs) shows whether anything was billed twice |
//!
//! # How a program finds it
//! Make the base URL and the origin policy settings of your program. In a test they are [`MockFal::run_url`] and
//! [`FalOrigins::loopback_http`](crate::origin::FalOrigins::loopback_http), because the default policy gives no
//! credential to an origin that is not fal's.
//!
//! **hyper.** A connector for production takes `https` only. Build it with `https_or_http`, and it reaches the mock as
//! well; the policy still decides where the credential goes.
//!
//! ```
//! # use http::{Request, Uri};
//! # use tower_fal::{Credential, CredentialStore, FalAuthLayer, mock::MockFal};
//! use hyper_rustls::HttpsConnectorBuilder;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt as _};
//! use tower_fal::origin::FalOrigins;
//!
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let credential = Credential::key("my-key-id:not-a-real-secret")?;
//! # let fal = MockFal::start().await?;
//! # fal.accept(&credential);
//! # let store = CredentialStore::fixed(credential);
//! let https = HttpsConnectorBuilder::new()
//!     .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
//!     .https_or_http()
//!     .enable_all_versions()
//!     .build();
//! let client = ServiceBuilder::new()
//!     .layer(FalAuthLayer::new(store).origins(FalOrigins::new().loopback_http()))
//!     .service(Client::builder(TokioExecutor::new()).build(https));
//! let url: Uri = fal.run_url("/fal-ai/flux"); // with `mock_fal`: http://127.0.0.1:8443/run/fal-ai/flux
//! # let request = Request::post(url).body(String::new())?;
//! # assert_eq!(client.oneshot(request).await?.status(), 200);
//! # Ok(()) }
//! ```
//!
//! **reqwest** can keep fal's own URLs and the default policy. Start the example `mock_fal`, which is this mock as a
//! process with TLS (`cargo run --example mock_fal -- --tls --ca-out ca.pem --listen 127.0.0.1:8443 --key …`), and let
//! fal's names lead to it. `no_proxy` matters where `HTTPS_PROXY` is set: a proxy would look the names up itself.
//!
//! ```no_run
//! # fn client() -> Result<reqwest::Client, Box<dyn std::error::Error>> {
//! let mock = "127.0.0.1:8443".parse()?;
//! let ca = reqwest::Certificate::from_pem(&std::fs::read("ca.pem")?)?;
//! let client = reqwest::Client::builder()
//!     .no_proxy()
//!     .resolve("fal.run", mock)
//!     .resolve("queue.fal.run", mock)
//!     .tls_certs_only([ca])
//!     .build()?;
//! // `client.post("https://fal.run/fal-ai/flux")` now reaches the mock.
//! # Ok(client) }
//! ```
//!
//! **Other languages.** The same process plays fal for a program in any language; `mock_fal --help` says how to control
//! it. fal's Python client takes `FAL_RUN_HOST=127.0.0.1:8443/run`, `FAL_QUEUE_RUN_HOST=127.0.0.1:8443/queue` and
//! `SSL_CERT_FILE=ca.pem`. For a client whose hosts are fixed, let the names lead to the mock by DNS (an alias of its
//! container, with `--listen 0.0.0.0:443`), and have the client trust the CA (`NODE_EXTRA_CA_CERTS=ca.pem` for Node.js).
//!
//! # What happens to a request
//! 1. As soon as its head has arrived, it is [logged](MockFal::received), with the id of its key.
//! 2. A [failure](MockFal::fail_next) that the test set answers it or closes its connection, unless it is one that
//!    comes later: see [`Failure`].
//! 3. A path that fal would not know gets 404 `Path … not found`.
//! 4. Its credential is checked. Without a valid one the answer is 401. With one that
//!    [lacks a permission](MockFal::deny), or while the account is [locked](MockFal::lock), it is 403.
//! 5. An answer of these steps does not wait for the body. It is sent while the client still uploads, and the body is
//!    read and dropped meanwhile (or [not at all](MockFal::close_on_refusal)).
//! 6. Otherwise the body is read to its end, and the request is carried out. A run, a stream or a submit runs an
//!    application. That is [counted](MockFal::runs), and [what it answers](MockFal::answer) is up to the test.
//! 7. The head of every answer waits for the [latency](MockFal::set_latency) and carries `x-fal-request-id`.
//!
//! # What it answers
//! A request is for one of fal's hosts, on any port, if its `host` begins with `fal.`, `queue.`, `ws.`, `rest.`, `api.`
//! or `v3.`. `HOST` is an origin of the mock.
//!
//! | request | answer |
//! |---|---|
//! | run: any method on `/{owner}/{app}` and below | what the test [set](MockFal::answer), or `{"images":[],"seed":0,"path":"/owner/app","bytes":18,"prompt":"a cat"}`: the path without its query, the length of the body, and the `prompt` of a JSON body of at most 64 KiB, if it has one |
//! | run: `POST` or `GET /{owner}/{app}/stream`, or `…/stream` further below | `text/event-stream` of three events, `data: {…}`: each is what a run answers, with its number, `"event":0`. The test may [hold them back](MockFal::hold_events_after) |
//! | queue: `POST /{owner}/{app}` and below | `{"status":"IN_QUEUE","request_id":…,"queue_position":0,"response_url":…,"status_url":…,"cancel_url":…}` |
//! | queue: `GET /{owner}/{app}/requests/{id}/status` | the same, with `IN_QUEUE` at the first poll, `IN_PROGRESS` at the second and `COMPLETED` [from the third on](MockFal::polls_until_completed). After the first poll, `logs` takes the place of `queue_position`. A job that [failed](Failure::Job) or was cancelled is `COMPLETED` with `error` and `error_type`. With `?logs=1`, `logs` holds a line for each poll after the first, at most the last 100 |
//! | queue: `GET /{owner}/{app}/requests/{id}/status/stream` | `text/event-stream`, until the job is completed. Each event is a poll of the status, and its `logs` has the new line only. The test may [hold events back](MockFal::hold_events_after) |
//! | queue: `GET /{owner}/{app}/requests/{id}` | what a run would have answered. The status need not be polled before |
//! | queue: `PUT /{owner}/{app}/requests/{id}/cancel` | 202 `{"status":"CANCELLATION_REQUESTED"}`, and the result becomes 499 `client_cancelled`; or 400 `{"status":"ALREADY_COMPLETED"}` once a poll found it `COMPLETED` or the result was fetched |
//! | queue: status, result or cancel of an unknown id | 404 `{"status":"NOT_FOUND"}`, also without any credential |
//! | run: a WebSocket handshake on `/{owner}/{app}` and below, usually `…/realtime` | [the realtime protocol](#websockets) |
//! | ws: a WebSocket handshake on `/{owner}/{app}` and below | [HTTP over a WebSocket](#websockets) |
//! | rest: `POST /tokens/` with `{"allowed_apps":["flux"],"token_expiration":120}` | a [realtime token](#realtime-tokens) for the app of each alias, as a JSON string |
//! | rest: `POST /tokens/realtime` with `{"allowed_apps":["fal-ai/flux/realtime"],"duration":120}` | one for exactly these paths: `{"token":…}`. With `"app"` and one path in the place of `"allowed_apps"`, it is a JSON string |
//! | rest: `POST /storage/upload/initiate`, or `…/initiate-multipart` | `{"upload_url":"HOST/upload/{id}?signature=…","file_url":"HOST/files/{id}"}`, on an origin of their own |
//! | rest: `GET /.well-known/jwks.json` | with the feature `webhook`, the [public keys of the webhooks](#webhooks), also without any credential; or what the test [set](MockFal::answer) |
//! | storage: `PUT /upload/{id}/{n}`, a part of an upload that was begun as `initiate-multipart` | `{"partNumber":n,"etag":…}` |
//! | storage: `POST /upload/{id}/complete` with `{"parts":[{"partNumber":n,"etag":…}]}` | `{"ok":true}`, or 400 if these are not the parts that have arrived |
//! | storage: any other `PUT /upload/…` | `{"images":[],…}` as above. It needs no credential, and takes any: [`received`](MockFal::received) says whether there was one. The file is not stored |
//! | rest, api: any other method and path | `{"images":[],…}` as above |
//!
//! Before `{owner}/{app}` there may be `workflows/` or `comfy/`, which belongs to the id of the endpoint. A page of any
//! origin may upload to the storage, whose answers allow that (CORS); the other hosts say nothing about it.
//!
//! An answer of an application, which includes the result of a job, has the headers `x-fal-served-from`,
//! `x-fal-billable-units` and `x-fal-cdn-token`, unless the test [leaves them out](Answer::without_runner_headers).
//!
//! | status | `detail` | when |
//! |---|---|---|
//! | 401 | `Cannot access application "owner/app". Authentication is required to access this application.` | no `authorization` header |
//! | 401 | `Authorization header is required` | rest: no `authorization` header |
//! | 401 | `invalid key credentials` | run, queue, ws: unknown key |
//! | 401 | `No user found for Key ID and Secret` | rest: unknown key |
//! | 401 | `Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.` | a key without `:` |
//! | 401 | `bearer: unable to decode issuer` | a bearer that is no JWT, such as an API key |
//! | 401 | `bearer: invalid token` | an unknown JWT |
//! | 401 | `{"error":{"type":"authorization_error","message":"Authentication required"}}` | api: no valid credential |
//! | 403 | the same with `Access denied` | api: a valid credential that lacks a permission |
//! | 403 | `Insufficient permissions` | a valid credential that lacks a permission |
//! | 403 | `User is locked. Reason: <reason>.` | everything while the account is locked, but for status, result, cancel and uploads |
//!
//! # WebSockets
//! A handshake is a request like any other: it is logged, can fail as the test wants, and is refused with the answers
//! above. A malformed one gets 400, and an accepted one 101. Messages are not in the log, but each one is a
//! [run](MockFal::runs), can fail like one, and gets the [answer](MockFal::answer) that the test set.
//!
//! | on | a message | its answer |
//! |---|---|---|
//! | [realtime](MockFal::realtime_url) | text | one text: what a run answers |
//! | realtime | binary, which is msgpack at fal | the same bytes, because the mock reads no msgpack; or those of [`Answer::bytes`] |
//! | realtime | one that fails | `{"type":"x-fal-error","error":"INTERNAL_ERROR","reason":…}` |
//! | realtime with `?fal_jwt_token=` that is not valid | none needed | `{"status":"error","error":"Unauthorized"}` and a close without a code, after a 101 |
//! | [ws](MockFal::ws_url) | any | `{"type":"start","request_id":…,"status":200,"headers":{…}}`, the body of the response, `{"type":"end","request_id":…,"status":200,"time_to_first_byte_seconds":…}` |
//! | ws, on `…/stream` | any | the same, and each event of the stream is a message |
//!
//! An open socket stays open, whatever happens to its credential.
//!
//! # Realtime tokens
//! A token is valid for a handshake on the run host, and for a stream there, if it was minted for this app (or path) and
//! its life has not ended. It is also valid, for any app, if it was [accepted](MockFal::accept) as a bearer. If there is
//! an `authorization` header as well, only that counts. The life of a token is counted by Tokio's clock, which a test can
//! stop; the `exp` in it is of the system's clock.
//!
//! For a token, fal wants an alias at `/tokens/` and a whole path at `/tokens/realtime`: the other one is 403
//! `Forbidden`. Without a list of apps, or without a life between a second and a day, the answer is 422.
//!
//! # Webhooks
//! With the feature `webhook`, a submit to the queue with `?fal_webhook=URL` leads to a signed delivery, at once, if the
//! URL is `http` on a loopback address. It is `{"request_id":…,"gateway_request_id":…,"status":"OK","payload":…}` with
//! the four headers of fal's, or `"status":"ERROR"` with `error` for a job that fails. After a 5xx, and when there is no
//! answer in time, it is [sent again](MockFal::webhook_repeats). [`webhook_delivered`](MockFal::webhook_delivered) waits
//! for its end, [`rotate_webhook_key`](MockFal::rotate_webhook_key) changes the key, and
//! [`accept_for`](MockFal::accept_for) brings a second account.
//!
//! # Sources
//! The texts are those in fal's documentation, its clients, and reports of its users; the messages of WebSockets are
//! those of its documentation and clients. The following have no such source: the words after "Authentication is
//! required" and after "Insufficient permissions", the answer to a JWT that can be decoded and is not valid, the
//! `detail` of failures, the `error` of a job, what becomes of a cancelled job, how a handshake with a bad *key* is
//! answered, when fal closes a socket and with which code, what becomes of an open one when its key is revoked, the
//! answers to a wrong request for a token and to a stream with a token that is not valid, the answers of the storage
//! beyond `partNumber` and `etag`, and how long fal waits before it repeats a webhook.
//!
//! More than one `authorization` header is never valid. A body that is cut off before its end is answered with 400, if
//! the client is still there.

mod answer;
mod application;
#[cfg(feature = "login")]
mod authorization;
mod by_path;
mod connection;
mod failure;
mod handle;
mod job;
mod log;
mod received;
mod refusal;
mod request_id;
mod scope;
mod send;
mod server;
mod shared;
mod socket;
mod state;
mod storage;
mod target;
mod token;
mod upload;
#[cfg(feature = "webhook")]
mod webhook;
#[cfg(not(feature = "webhook"))]
#[path = "mock/no_webhook.rs"]
mod webhook;

use std::{
    fmt, io,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Uri, uri::Scheme};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
};

#[cfg(feature = "login")]
pub use self::authorization::{Endpoint, EndpointFailure, MockAuthorization};
pub use self::{
    answer::Answer,
    failure::{ErrorType, Failure, Lock},
    received::{Presented, Received},
};
use self::{
    scope::Scope,
    shared::Shared,
    target::{Host, Plays},
    webhook::Webhooks,
};
use crate::credential::Credential;

/// A fal inside your process, on loopback. See the [module docs](self) for an example and for all that it answers.
///
/// At first no credential is valid: until [`accept`](Self::accept) every request is answered with 401. A change holds
/// for the requests that arrive after it.
///
/// A clone is another handle on the same mock. When the last handle is dropped, the listeners, the connections and
/// all tasks of the mock end, as soon as the runtime gets to them.
#[derive(Clone)]
pub struct MockFal {
    shared: Arc<Shared>,
    // No task holds this: the tasks end when it is dropped.
    scope: Arc<Scope>,
}

impl MockFal {
    /// Binds its listeners to free ports of `127.0.0.1` and serves them on the current Tokio runtime.
    ///
    /// # Errors
    /// When no port can be bound.
    ///
    /// # Panics
    /// Outside a Tokio runtime, or in one whose I/O is not enabled.
    pub async fn start() -> io::Result<Self> {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (run, queue, ws) = (bind().await?, bind().await?, bind().await?);
        let (rest, storage) = (bind().await?, bind().await?);
        let scope = Scope::new();
        let shared = Arc::new(Shared {
            run: run.local_addr()?,
            queue: queue.local_addr()?,
            ws: ws.local_addr()?,
            rest: rest.local_addr()?,
            storage: storage.local_addr()?,
            state: Mutex::default(),
            events: watch::Sender::new(usize::MAX),
            webhooks: Webhooks::new(scope.tasks()),
        });
        let listeners =
            [(run, Host::Run), (queue, Host::Queue), (ws, Host::Ws), (rest, Host::Rest), (storage, Host::Storage)];
        for (listener, host) in listeners {
            let tasks = scope.tasks();
            tasks.spawn(server::listen(listener, host, Arc::clone(&shared), tasks.clone()));
        }
        Ok(Self { shared, scope: Arc::new(scope) })
    }

    /// Serves one connection that you accepted yourself, such as one on a fixed port or within TLS, until it ends or
    /// the last handle is dropped.
    ///
    /// It leads to all of fal's hosts. If the `host` of a request is none of fal's names, such as `localhost`, the path
    /// begins with the host: `/run/fal-ai/flux`, `/queue/…`, `/ws/…`, `/rest/…`, `/api/…`, `/storage/…`. Any other path
    /// is a run. The URLs in answers are of the same form, with this scheme.
    ///
    /// ```no_run
    /// # use http::uri::Scheme;
    /// # use tower_fal::mock::MockFal;
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let fal = MockFal::start().await?;
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    /// loop {
    ///     let (stream, _) = listener.accept().await?;
    ///     // For https, make a TLS handshake here: see `examples/mock_fal.rs`.
    ///     tokio::spawn(fal.serve_connection(stream, Scheme::HTTP));
    /// }
    /// # }
    /// ```
    pub fn serve_connection<I>(&self, io: I, scheme: Scheme) -> impl Future<Output = ()> + Send + use<I>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.scope.tasks().run(server::serve(io, Plays::All(scheme), Arc::clone(&self.shared)))
    }

    /// The origin that stands for `fal.run`, such as `http://127.0.0.1:40001`, without a slash at the end.
    pub fn run_origin(&self) -> String {
        self.shared.origin(Host::Run)
    }

    /// The origin that stands for `queue.fal.run`, such as `http://127.0.0.1:40002`, without a slash at the end.
    pub fn queue_origin(&self) -> String {
        self.shared.origin(Host::Queue)
    }

    /// The origin that stands for `rest.fal.ai`, such as `http://127.0.0.1:40003`, without a slash at the end.
    pub fn rest_origin(&self) -> String {
        self.shared.origin(Host::Rest)
    }

    /// The URL of a path on the [`run_origin`](Self::run_origin). The path may have a query, and needs no slash at the
    /// beginning.
    ///
    /// # Panics
    /// When the path cannot be part of a URL, such as one with a space.
    pub fn run_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Run, path)
    }

    /// The URL of a path on the [`queue_origin`](Self::queue_origin). The path may have a query, and needs no slash at the
    /// beginning.
    ///
    /// # Panics
    /// When the path cannot be part of a URL, such as one with a space.
    pub fn queue_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Queue, path)
    }

    /// The URL of a path on the [`rest_origin`](Self::rest_origin). The path may have a query, and needs no slash at the
    /// beginning.
    ///
    /// # Panics
    /// When the path cannot be part of a URL, such as one with a space.
    pub fn rest_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Rest, path)
    }

    /// The URL of a path on the origin that stands for `ws.fal.run`, such as `ws://127.0.0.1:40004/fal-ai/flux`: HTTP
    /// over a WebSocket. The path may have a query, and needs no slash at the beginning.
    ///
    /// # Panics
    /// When the path cannot be part of a URL, such as one with a space.
    pub fn ws_url(&self, path: &str) -> Uri {
        self.shared.socket_url(Host::Ws, path)
    }

    /// The URL of a path for the realtime protocol of `fal.run`, such as `ws://127.0.0.1:40001/fal-ai/flux/realtime`.
    /// The path may have a query, and needs no slash at the beginning.
    ///
    /// # Panics
    /// When the path cannot be part of a URL, such as one with a space.
    pub fn realtime_url(&self, path: &str) -> Uri {
        self.shared.socket_url(Host::Run, path)
    }

    /// Makes a credential valid, in addition to those that are. It undoes [`deny`](Self::deny).
    pub fn accept(&self, credential: &Credential) {
        self.shared.state().grant(credential, true);
    }

    /// Makes a credential valid without the permission to do anything: 403 `Insufficient permissions` everywhere.
    pub fn deny(&self, credential: &Credential) {
        self.shared.state().grant(credential, false);
    }

    /// Makes a credential invalid: 401. It does nothing if it was not valid.
    pub fn revoke(&self, credential: &Credential) {
        self.shared.state().revoke(credential);
    }

    /// Locks the account: with any valid credential, each run and submit gets 403 `User is locked`. As at fal, jobs
    /// that were submitted before can still be polled, fetched and cancelled.
    pub fn lock(&self, reason: Lock) {
        self.shared.state().lock = Some(reason);
    }

    /// Undoes [`lock`](Self::lock).
    pub fn unlock(&self) {
        self.shared.state().lock = None;
    }

    /// Sets what an application answers: a JSON value, or an [`Answer`] with a status and headers.
    ///
    /// `app` is a path such as `fal-ai/flux`. It includes all paths below it; if several include a request, the longest
    /// one counts. The answer is that of each run, of each message of a WebSocket, and the result of each job that is
    /// submitted from then on. In a stream, each event is this value, with its number if the value is an object.
    ///
    /// Only a request with a valid credential reaches its application. A [`Failure`] of the application comes before
    /// this answer.
    ///
    /// ```
    /// # use http::StatusCode;
    /// # use serde_json::json;
    /// # use tower_fal::mock::{Answer, MockFal};
    /// # #[tokio::main] async fn main() -> std::io::Result<()> {
    /// let fal = MockFal::start().await?;
    /// fal.answer("fal-ai/flux", json!({ "images": [{ "url": "https://v3.fal.media/files/cat.png" }] }));
    /// fal.answer("fal-ai/flux/dev", Answer::json(json!({ "detail": "Not today" })).status(StatusCode::FORBIDDEN));
    /// # Ok(()) }
    /// ```
    pub fn answer(&self, app: &str, answer: impl Into<Answer>) {
        let answer = answer.into();
        self.shared.state().set_answer(app, Some(answer));
    }

    /// Undoes [`answer`](Self::answer) for exactly this path.
    pub fn clear_answer(&self, app: &str) {
        self.shared.state().set_answer(app, None);
    }

    /// How long the head of each answer waits before it is sent. Zero at first. With zero, the runtime needs no timer.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.state().latency = latency;
    }

    /// Lets the next `n` requests fail. [`Failure`] says which requests each failure meets. A call replaces what is left
    /// of an earlier one, so `n = 0` ends it.
    pub fn fail_next(&self, n: usize, failure: Failure) {
        self.shared.state().fail_next("", n, failure);
    }

    /// Lets the next `n` requests to a path fail, on any host. `usize::MAX` means each request from then on.
    ///
    /// The path includes all paths below it: `/fal-ai/flux` is that application, and `/fal-ai/flux/requests/{id}` is
    /// one of its jobs. A call replaces what is left of an earlier one for the same path, so `n = 0` ends it. If
    /// several failures could meet a request, the one with the longest path does, and that of
    /// [`fail_next`](Self::fail_next) comes last.
    pub fn fail_next_on(&self, path: &str, n: usize, failure: Failure) {
        self.shared.state().fail_next(path, n, failure);
    }

    /// Sets which poll of its status finds a job `COMPLETED`. It is the third at first: `IN_QUEUE`, `IN_PROGRESS`,
    /// `COMPLETED`. With a larger `n` more polls find it `IN_PROGRESS`; with 1 or 0 the first one finds it `COMPLETED`.
    ///
    /// It holds for the jobs that are submitted from then on.
    pub fn polls_until_completed(&self, n: usize) {
        self.shared.state().polls_until_completed = n;
    }

    /// Lets each stream send its first `n` events and holds back the others, until a call with a larger `n`. So a test
    /// can send them one by one. At first, and after `usize::MAX`, nothing is held back.
    ///
    /// It holds for open streams as well as for later ones.
    pub fn hold_events_after(&self, n: usize) {
        self.shared.events.send_replace(n);
    }

    /// Whether a 401 or 403 ends its HTTP/1.1 connection at once, as proxies in front of a server do: with
    /// `connection: close`, and without reading the rest of the upload. `false` at first.
    ///
    /// A client that is still uploading then often gets a write error instead of the answer. On HTTP/2 only the
    /// stream ends. While this is `false`, up to 16 MiB of a refused upload are read, and a longer one is cut off.
    pub fn close_on_refusal(&self, close: bool) {
        self.shared.state().close_on_refusal = close;
    }

    /// Whether [`received`](Self::received) has the query, the headers and the body of each request: at most the first
    /// MiB of the body, and never the `authorization` header. `false` at first, because all of these may hold secrets.
    pub fn keep_content(&self, keep: bool) {
        self.shared.state().keep_content = keep;
    }

    /// The last 10,000 requests, oldest first, in the order in which their heads arrived.
    ///
    /// There are fewer if they are longer than 16 MiB together, [content](Self::keep_content) included.
    pub fn received(&self) -> Vec<Received> {
        self.shared.state().log.received()
    }

    /// Empties the log of [`received`](Self::received). [`requests`](Self::requests) goes on counting.
    pub fn clear_received(&self) {
        self.shared.state().log.clear();
    }

    /// How many requests have arrived since the start.
    pub fn requests(&self) -> u64 {
        self.shared.state().log.arrived()
    }

    /// How often an application was run since the start: by a run, a stream, a submit or a message of a WebSocket, also
    /// if the application refused it or if it was cancelled later. It shows whether anything was billed twice.
    pub fn runs(&self) -> u64 {
        self.shared.state().runs
    }
}

impl fmt::Debug for MockFal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockFal")
            .field("run", &self.shared.run)
            .field("queue", &self.shared.queue)
            .field("ws", &self.shared.ws)
            .field("rest", &self.shared.rest)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
