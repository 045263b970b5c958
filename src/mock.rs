//! [`MockFal`]: an in-process stand-in for fal on loopback, for your tests and for this crate's examples.
//!
//! It plays fal and nothing else: it knows no store, no layer and no policy of this crate, so what a test sees is
//! what fal would have seen on the wire. A real [`hyper`] server listens on two ports of `127.0.0.1`, one as
//! `fal.run` and one as `queue.fal.run`, and speaks HTTP/1.1 and HTTP/2 with prior knowledge, without TLS. This
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
//! 2. An [injected failure](MockFal::fail_next) answers it or closes its connection.
//! 3. A path that fal would not know gets 404 `Path … not found`.
//! 4. The credential is judged. Without a valid one the answer is 401; with one that
//!    [lacks a permission](MockFal::deny), or while the account is [locked](MockFal::lock), it is 403.
//! 5. A request that was answered up to here did not wait for its body: the answer is on its way while the client
//!    still uploads, and the body is read and dropped next to it
//!    (or [not at all](MockFal::close_on_refusal)).
//! 6. Otherwise the body is read to its end, and the run, submit, status or result is answered with 200.
//! 7. The head of every answer waits for the [latency](MockFal::set_latency) and carries `x-fal-request-id`.
//!
//! # What it answers
//! A request whose host begins with `queue.`, `rest.` or `api.` is one to that host, on either port.
//!
//! | request | answer |
//! |---|---|
//! | run: any method on `/{owner}/{app}` and below | `{"images":[],"seed":0,"path":"/owner/app","bytes":18,"prompt":"a cat"}`: the path without its query, how many bytes of body came, and the `prompt` of a JSON body of at most 64 KiB, if it has one |
//! | queue: `POST /{owner}/{app}` and below | `{"status":"IN_QUEUE","request_id":…,"queue_position":0,"response_url":…,"status_url":…,"cancel_url":…}` |
//! | queue: `GET /{owner}/{app}/requests/{id}/status` | the same with `IN_QUEUE` on the first poll, `IN_PROGRESS` on the second, `COMPLETED` from then on |
//! | queue: `GET /{owner}/{app}/requests/{id}` | what a run would have answered; polling the status first is not needed |
//! | rest, api: any method on any path | what a run answers |
//! | queue: status or result of an unknown id | 404 `{"status":"NOT_FOUND"}`, also without any credential |
//!
//! | status | `detail` | when |
//! |---|---|---|
//! | 401 | `Cannot access application "owner/app". Authentication is required to access this application.` | no `authorization` header |
//! | 401 | `Authorization header is required` | rest: no `authorization` header |
//! | 401 | `No user found for Key ID and Secret` | run, rest: unknown key |
//! | 401 | `invalid key credentials` | queue: unknown key |
//! | 401 | `Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.` | a key without `:` |
//! | 401 | `bearer: unable to decode issuer` | a bearer that is no JWT, such as an API key |
//! | 401 | `bearer: invalid token` | an unknown JWT |
//! | 401 | `{"error":{"type":"authorization_error","message":"Authentication required"}}` | api: no valid credential |
//! | 403 | the same with `Access denied` | api: a valid credential that lacks a permission |
//! | 403 | `Insufficient permissions` | a valid credential that lacks a permission |
//! | 403 | `User is locked. Reason: <reason>.` | run and submit while the account is locked; status and result go on |
//!
//! The texts are those that fal's documentation, its clients and its users' reports show. Three have no such
//! source: the words behind "Authentication is required", any that follow "Insufficient permissions", and the
//! answer to a JWT that decodes but is not valid. More than one `authorization` header is never valid. A body that
//! is cut off before its end is answered with 400, if there still is someone to answer.

mod answer;
mod connection;
mod server;
mod state;

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{Method, StatusCode, Uri, Version};
use tokio::net::TcpListener;

use self::{
    connection::{Host, Scope},
    state::State,
};
use crate::credential::{Credential, KeyId};

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
    _scope: Arc<Scope>,
}

/// What the handles and the connections have in common.
struct Shared {
    run: SocketAddr,
    queue: SocketAddr,
    state: Mutex<State>,
}

impl MockFal {
    /// Binds both listeners to free ports of `127.0.0.1` and serves them on the current Tokio runtime.
    ///
    /// # Errors
    /// When no port can be bound.
    ///
    /// # Panics
    /// Outside a Tokio runtime, or in one whose I/O is not enabled.
    pub async fn start() -> io::Result<Self> {
        let run = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let queue = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let shared = Arc::new(Shared { run: run.local_addr()?, queue: queue.local_addr()?, state: Mutex::default() });
        let scope = Scope::new();
        for (listener, host) in [(run, Host::Run), (queue, Host::Queue)] {
            let tasks = scope.tasks();
            tasks.spawn(server::listen(listener, host, Arc::clone(&shared), tasks.clone()));
        }
        Ok(Self { shared, _scope: Arc::new(scope) })
    }

    /// Where `fal.run` is played, such as `http://127.0.0.1:40001`: scheme, host and port without a slash.
    #[must_use]
    pub fn run_origin(&self) -> String {
        origin(self.shared.run)
    }

    /// Where `queue.fal.run` is played, such as `http://127.0.0.1:40002`: scheme, host and port without a slash.
    #[must_use]
    pub fn queue_origin(&self) -> String {
        self.shared.queue_origin()
    }

    /// The URL of a path on the [`run_origin`](Self::run_origin). A slash in front of the path is optional, a query
    /// may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn run_url(&self, path: &str) -> Uri {
        url(self.shared.run, path)
    }

    /// The URL of a path on the [`queue_origin`](Self::queue_origin). A slash in front of the path is optional, a
    /// query may follow it.
    ///
    /// # Panics
    /// When the path cannot stand in a URL, such as one with a blank.
    #[must_use]
    pub fn queue_url(&self, path: &str) -> Uri {
        url(self.shared.queue, path)
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
    /// the status and the result of queued requests are still answered, as fal does.
    pub fn lock(&self, reason: Lock) {
        self.shared.state().lock = Some(reason);
    }

    /// Takes back what [`lock`](Self::lock) did.
    pub fn unlock(&self) {
        self.shared.state().lock = None;
    }

    /// How long the head of each answer waits once it is decided. Zero at first; zero also needs no Tokio timer.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.state().latency = latency;
    }

    /// Lets the next `n` requests fail, whatever credential they show. It replaces what is left of an earlier call,
    /// so `n = 0` ends it.
    pub fn fail_next(&self, n: usize, failure: Failure) {
        self.shared.state().fail_next(n, failure);
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

    /// The last 10,000 requests, oldest first, in the order in which their heads arrived.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.shared.state().received()
    }

    /// Empties the log of [`received`](Self::received). [`requests`](Self::requests) goes on counting.
    pub fn clear_received(&self) {
        self.shared.state().clear_received();
    }

    /// How many requests have arrived since the start.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.state().requests()
    }
}

impl fmt::Debug for MockFal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockFal")
            .field("run", &self.shared.run)
            .field("queue", &self.shared.queue)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment or one collection call: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue_origin(&self) -> String {
        origin(self.queue)
    }
}

fn origin(address: SocketAddr) -> String {
    format!("http://{address}")
}

fn url(address: SocketAddr, path: &str) -> Uri {
    let path = path.trim_start_matches('/');
    format!("http://{address}/{path}").parse().unwrap_or_else(|error| panic!("`{path}` is no path of a URL: {error}"))
}

/// Why an account is locked: the `<reason>` in fal's `403 User is locked. Reason: <reason>.`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lock {
    /// `Exhausted balance. Top up your balance at fal.ai/dashboard/billing`
    ExhaustedBalance,
    /// `Admin lock. Please contact support@fal.ai`
    Admin,
    /// `TOP_UP`
    TopUp,
    /// `Please add a payment method at fal.ai/dashboard/billing`
    NoPaymentMethod,
    /// `This account has been archived. Please contact hello@fal.ai`
    Archived,
    /// `User budget is exceeded. Adjust it at fal.ai/dashboard/billing`
    BudgetExceeded,
    /// `Unknown. Please contact hello@fal.ai`
    Unknown,
}

impl Lock {
    /// The reason as it stands in the answer.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ExhaustedBalance => "Exhausted balance. Top up your balance at fal.ai/dashboard/billing",
            Self::Admin => "Admin lock. Please contact support@fal.ai",
            Self::TopUp => "TOP_UP",
            Self::NoPaymentMethod => "Please add a payment method at fal.ai/dashboard/billing",
            Self::Archived => "This account has been archived. Please contact hello@fal.ai",
            Self::BudgetExceeded => "User budget is exceeded. Adjust it at fal.ai/dashboard/billing",
            Self::Unknown => "Unknown. Please contact hello@fal.ai",
        }
    }
}

/// How a request fails that [`fail_next`](MockFal::fail_next) picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// An answer with this status and the status' own words as `detail`, without waiting for the body. The status of a
    /// final answer: one below 200 comes out as hyper will have it.
    Status(StatusCode),
    /// The connection is closed with no answer, and with it every other request on it.
    Disconnect,
}

/// One request that arrived. It holds no secret: neither the credential nor the query is kept.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Received {
    /// The method.
    pub method: Method,
    /// Whom the request was meant for: host and port of `:authority` or `host`, as they were sent. Empty if neither
    /// was.
    pub host: String,
    /// The path, never the query.
    pub path: String,
    /// [`Version::HTTP_11`] or [`Version::HTTP_2`], seldom anything else.
    pub version: Version,
    /// The credential that it showed.
    pub presented: Presented,
    /// The status that it was answered with. `None` until then, and for good if it was never answered.
    pub status: Option<StatusCode>,
}

/// The credential of a request, as far as it may be shown. The id is there if it was a well-formed key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Presented {
    /// No `authorization` header.
    Nothing,
    /// A credential that was valid. The answer may have been 403 all the same.
    Accepted(Option<KeyId>),
    /// Anything else.
    Refused(Option<KeyId>),
}

impl Presented {
    /// The id of the key, valid or not, if it was a well-formed key.
    #[must_use]
    pub fn key_id(&self) -> Option<&KeyId> {
        match self {
            Self::Nothing => None,
            Self::Accepted(key_id) | Self::Refused(key_id) => key_id.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
        time::Instant,
    };

    use bytes::Bytes;
    use http::{Request, Response, header};
    use http_body_util::{BodyExt as _, Full};
    use hyper::body::{Body, Frame, Incoming};
    use hyper_util::{
        client::legacy::{Client, connect::HttpConnector},
        rt::TokioExecutor,
    };
    use serde_json::{Value, json};
    use tokio::{
        io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream},
        net::TcpStream,
    };

    use super::*;

    const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

    fn client<B: Body + Send + 'static + Unpin>(version: Version) -> Client<HttpConnector, B>
    where
        B::Data: Send,
    {
        Client::builder(TokioExecutor::new()).http2_only(version == Version::HTTP_2).build_http()
    }

    fn key(text: &str) -> Credential {
        Credential::key(text).unwrap()
    }

    fn authorized(method: Method, url: Uri, authorization: &str) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::from(r#"{"prompt":"a cat"}"#));
        *request.method_mut() = method;
        *request.uri_mut() = url;
        if !authorization.is_empty() {
            request.headers_mut().insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        request
    }

    async fn json(response: Response<Incoming>) -> (u16, Value) {
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn send(method: Method, url: Uri, authorization: &str) -> (u16, Value) {
        json(client(Version::HTTP_11).request(authorized(method, url, authorization)).await.unwrap()).await
    }

    async fn post(url: Uri, authorization: &str) -> (u16, Value) {
        send(Method::POST, url, authorization).await
    }

    async fn get(url: Uri, authorization: &str) -> (u16, Value) {
        send(Method::GET, url, authorization).await
    }

    fn detail(status: u16, detail: &str) -> (u16, Value) {
        (status, json!({ "detail": detail }))
    }

    async fn accepting(text: &str) -> (MockFal, Credential) {
        let (fal, credential) = (MockFal::start().await.unwrap(), key(text));
        fal.accept(&credential);
        (fal, credential)
    }

    async fn until(reached: impl Fn() -> bool) {
        let wait = async {
            while !reached() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
    }

    /// HTTP/1.1 by hand.
    struct Raw(BufStream<TcpStream>);

    impl Raw {
        async fn connect(address: SocketAddr) -> Self {
            Self(BufStream::new(TcpStream::connect(address).await.unwrap()))
        }

        async fn write(&mut self, bytes: impl AsRef<[u8]>) {
            self.0.write_all(bytes.as_ref()).await.unwrap();
            self.0.flush().await.unwrap();
        }

        /// The head, in lower case, and as much body as its `content-length` says.
        async fn read_answer(&mut self) -> (String, String) {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(self.0.read_line(&mut head).await.unwrap(), 0, "closed after {head:?}");
            }
            let head = head.to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            let mut body = vec![0; length.parse().unwrap()];
            self.0.read_exact(&mut body).await.unwrap();
            (head, String::from_utf8(body).unwrap())
        }

        /// Whether the other side closed the connection, with or without having read everything.
        async fn is_closed(&mut self) -> bool {
            !matches!(self.0.read(&mut [0]).await, Ok(1..))
        }
    }

    /// An upload that never ends.
    struct Endless {
        begun: bool,
    }

    impl Body for Endless {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            if std::mem::replace(&mut self.begun, true) {
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"the beginning")))))
        }
    }

    #[tokio::test]
    async fn no_credential_is_valid_at_first() {
        let fal = MockFal::start().await.unwrap();
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 401);
        assert_eq!(post(fal.queue_url("a/b"), "Key id:secret").await.0, 401);
    }

    #[tokio::test]
    async fn a_run_says_what_came_on_both_versions() {
        let (fal, credential) = accepting("id:secret").await;
        for version in VERSIONS {
            let mut request = authorized(Method::POST, fal.run_url("/fal-ai/flux/dev?sync=1"), "");
            request.headers_mut().insert(header::AUTHORIZATION, credential.header().clone());
            let response = client(version).request(request).await.unwrap();
            assert_eq!(response.version(), version);
            assert!(response.headers().contains_key("x-fal-request-id"));
            let output = json!({"images": [], "seed": 0, "path": "/fal-ai/flux/dev", "bytes": 18, "prompt": "a cat"});
            assert_eq!(json(response).await, (200, output));
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_to_be_parsed_is_counted() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut request = authorized(Method::PUT, fal.run_url("a/b"), "Key id:secret");
        *request.body_mut() = Full::from(format!(r#"{{"prompt":"{}"}}"#, "x".repeat(9 * 1024 * 1024)));
        let (status, output) = json(client(Version::HTTP_2).request(request).await.unwrap()).await;
        assert_eq!((status, &output["bytes"]), (200, &json!(9 * 1024 * 1024 + 13)));
        assert_eq!(output.get("prompt"), None);
    }

    #[tokio::test]
    async fn an_invalid_credential_gets_the_words_of_its_host() {
        let (fal, _credential) = accepting("id:secret").await;
        let (run, queue) = (fal.run_url("a/b/c"), fal.queue_url("a/b/c"));
        let no_key = "Cannot access application \"a/b\". Authentication is required to access this application.";
        let no_colon = "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.";
        for (authorization, at_run, at_queue) in [
            ("", no_key, no_key),
            ("Key id:other", "No user found for Key ID and Secret", "invalid key credentials"),
            ("Key id", no_colon, no_colon),
            ("Key", no_colon, no_colon),
            ("Bearer id:secret", "bearer: unable to decode issuer", "bearer: unable to decode issuer"),
            ("Bearer a.b.c", "bearer: unable to decode issuer", "bearer: unable to decode issuer"),
            ("Bearer e30.e30.c2ln", "bearer: invalid token", "bearer: invalid token"),
        ] {
            assert_eq!(post(run.clone(), authorization).await, detail(401, at_run), "{authorization}");
            assert_eq!(post(queue.clone(), authorization).await, detail(401, at_queue), "{authorization}");
        }
        let status = fal.queue_url("a/b/requests/1/status");
        assert_eq!(get(status, "Key id:other").await, detail(401, "invalid key credentials"));
    }

    #[tokio::test]
    async fn two_authorization_headers_are_never_valid() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
        request.headers_mut().append(header::AUTHORIZATION, "Key id:secret".parse().unwrap());
        assert_eq!(client(Version::HTTP_11).request(request).await.unwrap().status(), 401);
    }

    #[tokio::test]
    async fn several_credentials_are_valid_until_each_is_revoked() {
        let (fal, old) = accepting("old:secret").await;
        let login = Credential::bearer("e30.e30.c2ln").unwrap();
        fal.accept(&login);
        fal.accept(&login);
        for authorization in ["Key old:secret", "Bearer e30.e30.c2ln"] {
            assert_eq!(post(fal.run_url("a/b"), authorization).await.0, 200);
        }
        fal.revoke(&login);
        fal.revoke(&login);
        assert_eq!(post(fal.run_url("a/b"), "Bearer e30.e30.c2ln").await.0, 401);
        assert_eq!(post(fal.run_url("a/b"), "Key old:secret").await.0, 200);
        fal.revoke(&old);
        assert_eq!(post(fal.run_url("a/b"), "Key old:secret").await.0, 401);
    }

    #[tokio::test]
    async fn a_locked_account_neither_runs_nor_submits_but_sees_what_it_has_queued() {
        let (fal, _credential) = accepting("id:secret").await;
        let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
        let url = |name: &str| job[name].as_str().unwrap().parse::<Uri>().unwrap();
        for (lock, text) in [
            (
                Lock::ExhaustedBalance,
                "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing.",
            ),
            (Lock::Admin, "User is locked. Reason: Admin lock. Please contact support@fal.ai."),
            (Lock::TopUp, "User is locked. Reason: TOP_UP."),
        ] {
            fal.lock(lock);
            assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(403, text));
            assert_eq!(post(fal.queue_url("a/b"), "Key id:secret").await, detail(403, text));
            assert_eq!(post(fal.queue_url("a/b"), "Key id:other").await.0, 401);
            assert_eq!(get(url("status_url"), "Key id:secret").await.0, 200);
            assert_eq!(get(url("response_url"), "Key id:secret").await.0, 200);
        }
        fal.unlock();
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    }

    #[tokio::test]
    async fn a_denied_credential_lacks_a_permission_until_it_is_accepted_again() {
        let (fal, credential) = accepting("id:secret").await;
        fal.deny(&credential);
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(403, "Insufficient permissions"));
        assert_eq!(fal.received()[0].presented, Presented::Accepted(credential.key_id().cloned()));
        fal.accept(&credential);
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    }

    #[tokio::test]
    async fn a_queued_request_is_followed_from_its_urls_to_its_result() {
        let (fal, _credential) = accepting("id:secret").await;
        let (status, job) = post(fal.queue_url("fal-ai/flux/dev"), "Key id:secret").await;
        let url = format!("{}/fal-ai/flux/requests/{}", fal.queue_origin(), job["request_id"].as_str().unwrap());
        let expected = json!({
            "status": "IN_QUEUE",
            "queue_position": 0,
            "request_id": job["request_id"],
            "response_url": url,
            "status_url": format!("{url}/status"),
            "cancel_url": format!("{url}/cancel"),
        });
        assert_eq!((status, &job), (200, &expected));

        for expected in ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "COMPLETED"] {
            let (status, poll) = get(format!("{url}/status").parse().unwrap(), "Key id:secret").await;
            assert_eq!((status, poll["status"].as_str().unwrap()), (200, expected));
        }
        let (status, output) = get(url.parse().unwrap(), "Key id:secret").await;
        assert_eq!((status, &output["prompt"]), (200, &json!("a cat")));
        assert_eq!(get(url.parse().unwrap(), "").await.0, 401);
    }

    #[tokio::test]
    async fn an_unknown_request_id_is_not_found_with_a_valid_key_and_with_none() {
        let (fal, _credential) = accepting("id:secret").await;
        let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
        let id = job["request_id"].as_str().unwrap();
        for path in ["a/b/requests/no-id", "a/b/requests/no-id/status", &format!("a/other/requests/{id}")] {
            for authorization in ["Key id:secret", ""] {
                let answer = get(fal.queue_url(path), authorization).await;
                assert_eq!(answer, (404, json!({"status": "NOT_FOUND"})), "{path}");
            }
        }
    }

    #[tokio::test]
    async fn a_path_that_fal_does_not_know_is_not_found() {
        let (fal, _credential) = accepting("id:secret").await;
        for url in [fal.run_url("/"), fal.run_url("a"), fal.run_url("a/"), fal.queue_url("a")] {
            let text = format!("Path {} not found", url.path());
            assert_eq!(post(url, "Key id:secret").await, detail(404, &text));
        }
        assert_eq!(get(fal.queue_url("a/b"), "Key id:secret").await.0, 404);
    }

    #[tokio::test]
    async fn a_host_that_begins_with_queue_is_the_queue_on_either_port() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
        request.headers_mut().insert(header::HOST, "Queue.fal.run".parse().unwrap());
        let (_, job) = json(client(Version::HTTP_11).request(request).await.unwrap()).await;
        assert_eq!(job["status"], "IN_QUEUE");
        assert_eq!(fal.received()[0].host, "Queue.fal.run");
    }

    #[tokio::test]
    async fn the_rest_and_the_platform_host_refuse_in_words_of_their_own() {
        let (fal, credential) = accepting("id:secret").await;
        let ask = async |host: &str, authorization: &str| {
            let mut request = authorized(Method::GET, fal.run_url("v1/models"), authorization);
            request.headers_mut().insert(header::HOST, host.parse().unwrap());
            json(client(Version::HTTP_11).request(request).await.unwrap()).await
        };
        let platform =
            |status, message| (status, json!({ "error": { "type": "authorization_error", "message": message } }));
        assert_eq!(ask("rest.fal.ai", "").await, detail(401, "Authorization header is required"));
        assert_eq!(ask("rest.fal.ai", "Key a:b").await, detail(401, "No user found for Key ID and Secret"));
        assert_eq!(ask("api.fal.ai", "").await, platform(401, "Authentication required"));
        assert_eq!(ask("api.fal.ai", "Key id:secret").await.0, 200);
        fal.deny(&credential);
        assert_eq!(ask("api.fal.ai", "Key id:secret").await, platform(403, "Access denied"));
    }

    #[tokio::test]
    async fn the_log_holds_what_was_asked_shown_and_answered_but_no_secret_and_no_query() {
        let (fal, credential) = accepting("id:hush").await;
        for (version, authorization) in VERSIONS.into_iter().zip(["Key id:hush", "Key other:hush-hush"]) {
            let url = fal.run_url("a/b?fal_jwt_token=hush");
            client(version).request(authorized(Method::POST, url, authorization)).await.unwrap();
        }
        for authorization in ["", "Key hush", "Bearer hush", "Basic hush:hush"] {
            post(fal.queue_url("a/b"), authorization).await;
        }

        let log = fal.received();
        assert_eq!((log.len(), fal.requests()), (6, 6));
        assert_eq!((&log[0].method, log[0].path.as_str()), (&Method::POST, "/a/b"));
        assert_eq!(log[0].host, fal.run_origin().strip_prefix("http://").unwrap());
        assert_eq!((log[0].version, log[1].version), (Version::HTTP_11, Version::HTTP_2));
        assert_eq!((log[0].status, log[1].status), (Some(StatusCode::OK), Some(StatusCode::UNAUTHORIZED)));
        assert_eq!(log[0].presented, Presented::Accepted(credential.key_id().cloned()));
        assert_eq!(log[1].presented, Presented::Refused(key("other:x").key_id().cloned()));
        assert_eq!(log[1].presented.key_id().unwrap().as_str(), "other");
        assert_eq!(log[2].presented, Presented::Nothing);
        for received in &log[3..] {
            assert_eq!(received.presented, Presented::Refused(None));
        }
        let shown = format!("{log:?} {fal:?}");
        assert!(!shown.contains("hush"), "{shown}");

        fal.clear_received();
        assert_eq!((fal.received().len(), fal.requests()), (0, 6));
    }

    #[tokio::test]
    async fn a_password_in_front_of_the_host_stays_out_of_the_log() {
        let fal = MockFal::start().await.unwrap();
        let mut raw = Raw::connect(fal.shared.run).await;
        raw.write("GET http://me:hush@fal.run/a/b HTTP/1.1\r\nhost: fal.run\r\n\r\n").await;
        raw.read_answer().await;
        assert_eq!(fal.received()[0].host, "fal.run");
    }

    #[test]
    fn the_log_is_bounded_and_drops_the_oldest() {
        let mut state = State::default();
        for n in 0..10_001 {
            let number = state.arrived(Received {
                method: Method::GET,
                host: String::new(),
                path: n.to_string(),
                version: Version::HTTP_11,
                presented: Presented::Nothing,
                status: None,
            });
            state.answered(number, StatusCode::OK);
        }
        state.answered(1, StatusCode::OK);
        let log = state.received();
        assert_eq!((log.len(), state.requests()), (10_000, 10_001));
        assert_eq!((log[0].path.as_str(), log[9_999].path.as_str()), ("1", "10000"));
    }

    #[tokio::test]
    async fn the_head_of_every_answer_waits_for_the_latency() {
        let (fal, _credential) = accepting("id:secret").await;
        let latency = Duration::from_millis(30);
        fal.set_latency(latency);
        for (authorization, status) in [("Key id:secret", 200), ("", 401)] {
            let begun = Instant::now();
            assert_eq!(post(fal.run_url("a/b"), authorization).await.0, status);
            assert!(begun.elapsed() >= latency);
        }
    }

    #[tokio::test]
    async fn the_next_n_requests_fail_with_a_status_and_those_after_them_do_not() {
        let (fal, _credential) = accepting("id:secret").await;
        fal.fail_next(2, Failure::Status(StatusCode::BAD_GATEWAY));
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(502, "Bad Gateway"));
        assert_eq!(post(fal.queue_url("a/b"), "").await, detail(502, "Bad Gateway"));
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);

        fal.fail_next(2, Failure::Status(StatusCode::BAD_GATEWAY));
        fal.fail_next(0, Failure::Disconnect);
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    }

    #[tokio::test]
    async fn a_disconnect_closes_the_connection_without_an_answer_on_both_versions() {
        let (fal, _credential) = accepting("id:secret").await;
        for version in VERSIONS {
            fal.fail_next(1, Failure::Disconnect);
            let request = || authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
            client(version).request(request()).await.unwrap_err();
            assert_eq!(fal.received().pop().unwrap().status, None);
            assert_eq!(client(version).request(request()).await.unwrap().status(), 200);
        }
    }

    #[tokio::test]
    async fn a_refusal_does_not_wait_for_the_upload_on_both_versions() {
        let (fal, _credential) = accepting("id:secret").await;
        for version in VERSIONS {
            let request = Request::post(fal.run_url("a/b")).body(Endless { begun: false }).unwrap();
            assert_eq!(client(version).request(request).await.unwrap().status(), 401);
        }
    }

    #[tokio::test]
    async fn a_refused_upload_is_read_to_its_end_so_that_the_connection_can_be_used_again() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut raw = Raw::connect(fal.shared.run).await;
        let half = vec![b'x'; 512 * 1024];
        raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
        raw.write(&half).await;
        let (head, body) = raw.read_answer().await;
        assert!(head.starts_with("http/1.1 401"), "{head}");
        assert!(body.contains("Cannot access application"), "{body}");

        raw.write(&half).await;
        let next = "POST /a/b HTTP/1.1\r\nhost: fal.run\r\nauthorization: Key id:secret\r\ncontent-length: 0\r\n\r\n";
        raw.write(next).await;
        let (head, body) = raw.read_answer().await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(body.contains(r#""bytes":0"#), "{body}");
    }

    #[tokio::test]
    async fn a_refused_upload_without_end_is_cut_off() {
        let fal = MockFal::start().await.unwrap();
        let mut raw = Raw::connect(fal.shared.run).await;
        raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1000000000\r\n\r\n").await;
        assert!(raw.read_answer().await.0.starts_with("http/1.1 401"));
        let chunk = vec![b'x'; 1024 * 1024];
        let mut written = 0;
        while raw.0.write_all(&chunk).await.is_ok() && raw.0.flush().await.is_ok() {
            written += chunk.len();
            assert!(written < 100 * 1024 * 1024, "nothing stops it");
        }
        assert!(written >= 15 * 1024 * 1024, "{written}");
    }

    #[tokio::test]
    async fn a_mock_that_closes_on_refusal_does_not_read_the_upload() {
        let fal = MockFal::start().await.unwrap();
        fal.close_on_refusal(true);
        let mut raw = Raw::connect(fal.shared.run).await;
        raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
        let (head, _) = raw.read_answer().await;
        assert!(head.starts_with("http/1.1 401") && head.contains("\r\nconnection: close\r\n"), "{head}");
        assert!(raw.is_closed().await);
        assert_eq!(
            client(Version::HTTP_2).request(authorized(Method::POST, fal.run_url("a/b"), "")).await.unwrap().status(),
            401
        );
    }

    #[tokio::test]
    async fn the_last_handle_takes_listeners_connections_and_tasks_along() {
        let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(alive(), 0);
        let fal = MockFal::start().await.unwrap();
        let clone = fal.clone();
        let (run, queue) = (fal.shared.run, fal.shared.queue);
        drop(fal);

        // A connection that idles, one whose upload is discarded, and one answer on each version that waits.
        let mut idle = Raw::connect(queue).await;
        let mut uploading = Raw::connect(run).await;
        uploading.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
        uploading.read_answer().await;
        clone.set_latency(Duration::from_secs(3600));
        let waiting = VERSIONS.map(|version| {
            let request = authorized(Method::POST, clone.run_url("a/b"), "");
            tokio::spawn(async move { client(version).request(request).await.unwrap_err() })
        });
        until(|| clone.requests() == 3).await;

        drop(clone);
        assert!(idle.is_closed().await);
        assert!(uploading.is_closed().await);
        for waiting in waiting {
            waiting.await.unwrap();
        }
        until(|| alive() == 0).await;
        for address in [run, queue] {
            assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[tokio::test]
    async fn a_path_gets_exactly_one_slash_in_front() {
        let fal = MockFal::start().await.unwrap();
        for path in ["a/b?c=d", "/a/b?c=d", "//a/b?c=d"] {
            assert_eq!(fal.run_url(path).to_string(), format!("{}/a/b?c=d", fal.run_origin()));
            assert_eq!(fal.queue_url(path).to_string(), format!("{}/a/b?c=d", fal.queue_origin()));
        }
        assert_eq!(fal.run_url("").path(), "/");
    }

    #[tokio::test]
    #[should_panic(expected = "`a b` is no path of a URL")]
    async fn a_path_that_cannot_stand_in_a_url_panics_with_its_name() {
        let _ = MockFal::start().await.unwrap().run_url("a b");
    }
}
