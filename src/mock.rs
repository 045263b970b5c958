//! [`MockFal`]: an in-process stand-in for fal on loopback, for your tests and for this crate's examples.
//!
//! It plays fal and nothing else: it knows no store, no layer and no policy of this crate, so what a test sees is
//! what fal would have seen on the wire. A real [`hyper`] server listens on five ports of `127.0.0.1`, as
//! `fal.run`, `queue.fal.run`, `ws.fal.run`, `rest.fal.ai` and the storage behind it, and speaks HTTP/1.1 and HTTP/2
//! with prior knowledge, without TLS (which [`MockFal::serve_connection`] is for). This
//! crate's default policy gives such origins no credential: a test admits them by
//! [`FalOrigins::loopback_http`](crate::origin::FalOrigins::loopback_http), and a server under test wants its base URL
//! and its policy to be settings.
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
//!     // What is under test. Without `loopback_http` the credential would stay here: the mock is not fal.
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
//! # What happens to a request
//! 1. As soon as its head is there, it is [logged](MockFal::received): what it asked for and which key it showed.
//! 2. An [injected failure](MockFal::fail_next) answers it or closes its connection, unless it is a failure of an
//!    application.
//! 3. A path that fal would not know gets 404 `Path … not found`.
//! 4. The credential is judged. Without a valid one the answer is 401; with one that
//!    [lacks a permission](MockFal::deny), or while the account is [locked](MockFal::lock), it is 403.
//! 5. A request that was answered up to here did not wait for its body: the answer is on its way while the client
//!    still uploads, and the body is read and dropped next to it
//!    (or [not at all](MockFal::close_on_refusal)).
//! 6. Otherwise the body is read to its end, and what is asked is done. A run, a stream or a submit sets an
//!    application to work, which is [counted](MockFal::runs) and may fail as injected.
//! 7. The head of every answer waits for the [latency](MockFal::set_latency) and carries `x-fal-request-id`.
//!
//! # What it answers
//! A request whose `host` begins with `fal.`, `queue.`, `ws.`, `rest.`, `api.` or `v3.` is one to that host of fal's, on
//! any port. `HOST` is an origin of the mock.
//!
//! | request | answer |
//! |---|---|
//! | run: any method on `/{owner}/{app}` and below | `{"images":[],"seed":0,"path":"/owner/app","bytes":18,"prompt":"a cat"}`: the path without its query, how many bytes of body came, and the `prompt` of a JSON body of at most 64 KiB, if it has one |
//! | run: `POST /{owner}/{app}/stream`, or `…/stream` further below | `text/event-stream` of three events, `data: {…}`, each what a run answers and its number, `"event":0`; the test may [hold them back](MockFal::hold_events_after) |
//! | queue: `POST /{owner}/{app}` and below | `{"status":"IN_QUEUE","request_id":…,"queue_position":0,"response_url":…,"status_url":…,"cancel_url":…}` |
//! | queue: `GET /{owner}/{app}/requests/{id}/status` | the same with `IN_QUEUE` on the first poll, `IN_PROGRESS` on the second, `COMPLETED` [from then on](MockFal::polls_until_completed); `logs` in place of `queue_position`; `error` and `error_type` of a job that [failed](Failure::Job) or was cancelled |
//! | queue: `GET /{owner}/{app}/requests/{id}` | what a run would have answered; polling the status first is not needed |
//! | queue: `PUT /{owner}/{app}/requests/{id}/cancel` | 202 `{"status":"CANCELLATION_REQUESTED"}`, and the result becomes 499 `client_cancelled`; 400 `{"status":"ALREADY_COMPLETED"}` once the status was seen as `COMPLETED` or the result was fetched |
//! | queue: status, result or cancel of an unknown id | 404 `{"status":"NOT_FOUND"}`, also without any credential |
//! | run: a WebSocket handshake on `/{owner}/{app}` and below, usually `…/realtime` | [the realtime protocol](#websockets) |
//! | ws: a WebSocket handshake on `/{owner}/{app}` and below | [HTTP over a WebSocket](#websockets) |
//! | rest: `POST /storage/upload/initiate` | `{"upload_url":"HOST/upload/{id}?signature=…","file_url":"HOST/files/{id}"}`, on an origin of their own |
//! | storage: `PUT /upload/…` | what a run answers, whichever credential is shown, and none is needed: [`received`](MockFal::received) tells whether one came. Nothing is kept of the file |
//! | rest, api: any other method and path | what a run answers |
//!
//! An answer of an application, which includes the result of a job, carries `x-fal-served-from` and
//! `x-fal-billable-units`.
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
//! What else can go wrong, and the headers that tell: [`Failure`].
//!
//! # WebSockets
//! A handshake is a request like any other: it is logged, can fail as injected, and is refused with the answers above;
//! one that is malformed, with 400. Accepted, its status is 101. The log does not hold messages, but each one is a
//! [run](MockFal::runs), and may fail as one.
//!
//! | on | a message | its answer |
//! |---|---|---|
//! | [realtime](MockFal::realtime_url) | text | one text: what a run answers |
//! | realtime | binary, which is msgpack at fal | the same bytes: the mock reads no msgpack |
//! | realtime | one that fails | `{"type":"x-fal-error","error":"INTERNAL_ERROR","reason":…}` |
//! | realtime with `?fal_jwt_token=` that is not valid | none needed | `{"status":"error","error":"Unauthorized"}` and a close without a code, after a 101 |
//! | [ws](MockFal::ws_url) | any | `{"type":"start","request_id":…,"status":200,"headers":{…}}`, the body of the response, `{"type":"end","request_id":…,"status":200,"time_to_first_byte_seconds":…}` |
//! | ws, on `…/stream` | any | the same, and each event of the stream is a message |
//!
//! A realtime token is valid if it was [accepted](MockFal::accept) as a bearer; an `authorization` header goes before
//! it. An open socket stays open, whatever becomes of its credential.
//!
//! The messages are those of fal's documentation and clients. No such source says how a handshake with a bad *key* is
//! answered, when a socket is closed and with which code, or what becomes of an open one when its key is revoked.
//!
//! The texts are those that fal's documentation, its clients and its users' reports show. These have no such
//! source: the words behind "Authentication is required", any that follow "Insufficient permissions", the answer to
//! a JWT that decodes but is not valid, the `detail` of injected failures, and what becomes of a job that was
//! cancelled. More than one `authorization` header is never valid. A body that is cut off before its end is answered
//! with 400, if there still is someone to answer.

mod answer;
mod application;
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
mod target;
mod upload;

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

pub use self::{
    answer::Answer,
    failure::{ErrorType, Failure, Lock},
    received::{Presented, Received},
};
use self::{
    scope::Scope,
    shared::Shared,
    target::{Host, Plays},
};
use crate::credential::Credential;

/// An in-process fal on loopback. See the [module docs](self) for an example and for all that it answers.
///
/// It starts with no valid credential: until [`accept`](Self::accept) every request is answered with 401. Every
/// change holds for the requests whose head arrives after it.
///
/// A clone is another handle on the same mock. When the last one is dropped, its listeners, its connections and
/// all its tasks end, as soon as the runtime gets to them.
#[derive(Clone)]
pub struct MockFal {
    shared: Arc<Shared>,
    // Tasks hold `shared`, never this: it is what they end with.
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
        let shared = Arc::new(Shared {
            run: run.local_addr()?,
            queue: queue.local_addr()?,
            ws: ws.local_addr()?,
            rest: rest.local_addr()?,
            storage: storage.local_addr()?,
            state: Mutex::default(),
            events: watch::Sender::new(usize::MAX),
        });
        let scope = Scope::new();
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
    /// All of fal's hosts are played on it. Where the `host` of a request is none of fal's names, such as
    /// `localhost`, the path begins with the host: `/run/fal-ai/flux`, `/queue/…`, `/ws/…`, `/rest/…`,
    /// `/api/…`, `/storage/…`; without any of these it is a run. URLs in answers lead back the same way, with this scheme.
    ///
    /// ```no_run
    /// # use http::uri::Scheme;
    /// # use tower_fal::mock::MockFal;
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let fal = MockFal::start().await?;
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    /// loop {
    ///     let (stream, _) = listener.accept().await?;
    ///     // Here would be a TLS handshake: see `examples/mock_fal.rs`.
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

    /// Where `fal.run` is played, such as `http://127.0.0.1:40001`: scheme, host and port without a slash.
    #[must_use]
    pub fn run_origin(&self) -> String {
        self.shared.origin(Host::Run)
    }

    /// Where `queue.fal.run` is played, such as `http://127.0.0.1:40002`: scheme, host and port without a slash.
    #[must_use]
    pub fn queue_origin(&self) -> String {
        self.shared.origin(Host::Queue)
    }

    /// Where `rest.fal.ai` is played, such as `http://127.0.0.1:40003`: scheme, host and port without a slash.
    #[must_use]
    pub fn rest_origin(&self) -> String {
        self.shared.origin(Host::Rest)
    }

    /// The URL of a path on the [`run_origin`](Self::run_origin). A slash in front of the path is optional, a query
    /// may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn run_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Run, path)
    }

    /// The URL of a path on the [`queue_origin`](Self::queue_origin). A slash in front of the path is optional, a
    /// query may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn queue_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Queue, path)
    }

    /// The URL of a path on the [`rest_origin`](Self::rest_origin). A slash in front of the path is optional, a query
    /// may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn rest_url(&self, path: &str) -> Uri {
        self.shared.url(Host::Rest, path)
    }

    /// The URL of a path where `ws.fal.run` is played, such as `ws://127.0.0.1:40004/fal-ai/flux`: HTTP over a
    /// WebSocket. A slash in front of the path is optional, a query may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn ws_url(&self, path: &str) -> Uri {
        self.shared.socket_url(Host::Ws, path)
    }

    /// The URL of a path where the realtime protocol of `fal.run` is played, such as
    /// `ws://127.0.0.1:40001/fal-ai/flux/realtime`. A slash in front of the path is optional, a query may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn realtime_url(&self, path: &str) -> Uri {
        self.shared.socket_url(Host::Run, path)
    }

    /// Makes a credential valid, next to those that already are. It takes back what [`deny`](Self::deny) did.
    pub fn accept(&self, credential: &Credential) {
        self.shared.state().grant(credential, true);
    }

    /// Makes a credential valid but short of a permission: 403 `Insufficient permissions`, wherever it is used.
    pub fn deny(&self, credential: &Credential) {
        self.shared.state().grant(credential, false);
    }

    /// Makes a credential invalid again: 401. One that was not valid stays so.
    pub fn revoke(&self, credential: &Credential) {
        self.shared.state().revoke(credential);
    }

    /// Locks the account, whichever valid credential is used: 403 `User is locked` to every run and submit, while
    /// queued requests can still be followed and cancelled, as fal does.
    pub fn lock(&self, reason: Lock) {
        self.shared.state().lock = Some(reason);
    }

    /// Takes back what [`lock`](Self::lock) did.
    pub fn unlock(&self) {
        self.shared.state().lock = None;
    }

    /// What an application answers from now on: a JSON value, or an [`Answer`] with a status and headers.
    ///
    /// `app` is a path such as `fal-ai/flux`, and holds for all below it as well; where several hold, the longest
    /// one counts. It is the answer to a run, to each message of a WebSocket, and the result of each job that is
    /// submitted from then on. The events of a stream are each the same value, with their number if it is an object.
    ///
    /// The application is asked only by requests with a valid credential, and a [`Failure`] of its own goes first.
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

    /// Takes back what [`answer`](Self::answer) did for this very path.
    pub fn clear_answer(&self, app: &str) {
        self.shared.state().set_answer(app, None);
    }

    /// How long the head of each answer waits once it is decided. Zero at first; zero also needs no Tokio timer.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.state().latency = latency;
    }

    /// Lets the next `n` requests fail: see [`Failure`] for which requests that means. It replaces what is left of an
    /// earlier call, so `n = 0` ends it.
    pub fn fail_next(&self, n: usize, failure: Failure) {
        self.shared.state().fail_next("", n, failure);
    }

    /// Lets the next `n` requests to a path fail, on any host: `/fal-ai/flux` with all below it, or the path of one
    /// job, `/fal-ai/flux/requests/{id}`. `usize::MAX` means each request from then on.
    ///
    /// Each path has a failure of its own, which replaces what is left of an earlier call for this path, so `n = 0`
    /// ends it. Where several could meet a request, the one with the longest path does; one of
    /// [`fail_next`](Self::fail_next) comes last.
    pub fn fail_next_on(&self, path: &str, n: usize, failure: Failure) {
        self.shared.state().fail_next(path, n, failure);
    }

    /// At which poll of its status a job is `COMPLETED`: 3 at first, which is `IN_QUEUE`, `IN_PROGRESS`, `COMPLETED`.
    /// With a larger `n` it is `IN_PROGRESS` for longer; with 1 or 0 it is `COMPLETED` at once.
    ///
    /// It holds for the jobs that are submitted from then on.
    pub fn polls_until_completed(&self, n: usize) {
        self.shared.state().polls_until_completed = n;
    }

    /// Lets each stream send its first `n` events and holds back the rest, until a call with a larger `n`: so a test
    /// sends them one by one. Nothing is held back at first, nor after `usize::MAX`.
    ///
    /// It holds for the streams that are open as well as for those to come.
    pub fn hold_events_after(&self, n: usize) {
        self.shared.events.send_replace(n);
    }

    /// Whether a 401 or 403 ends its HTTP/1.1 connection at once, with `connection: close` and the rest of the
    /// upload unread, as proxies in front of a server do. `false` at first.
    ///
    /// A client that is still uploading then often gets a write error in place of the answer. On HTTP/2 only the
    /// stream ends. While `false`, up to 16 MiB of a refused upload are read; a longer one is cut off in the same
    /// manner.
    pub fn close_on_refusal(&self, close: bool) {
        self.shared.state().close_on_refusal = close;
    }

    /// Whether the query, the headers and the body of each request are kept for [`received`](Self::received): the
    /// body up to 1 MiB, and never the `authorization` header. `false` at first, as they may hold secrets.
    pub fn keep_content(&self, keep: bool) {
        self.shared.state().keep_content = keep;
    }

    /// The last 10,000 requests, oldest first, in the order in which their heads arrived.
    ///
    /// There are fewer if what they hold, [content](Self::keep_content) included, is longer than 16 MiB.
    pub fn received(&self) -> Vec<Received> {
        self.shared.state().log.received()
    }

    /// Empties the log of [`received`](Self::received). [`requests`](Self::requests) goes on counting.
    pub fn clear_received(&self) {
        self.shared.state().log.clear();
    }

    /// How many requests have arrived since the start.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.state().log.arrived()
    }

    /// How often an application was set to work since the start: by a run, a stream or a submit, even one that the
    /// application refused or that was cancelled. It tells whether anything was billed twice.
    #[must_use]
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
