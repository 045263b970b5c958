//! The server of fal's login, inside your process.

mod answer;
mod signing;
mod state;

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::service::service_fn;
use hyper_util::{rt::TokioIo, server::conn::auto};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tower_service::Service;

use self::state::{Decision, State, Team};
use super::scope::Scope;
use crate::{credential::Credential, error::BoxError};

/// The server of fal's login inside your process, and what a login needs of fal's REST API and of its website: tests of
/// a program that [logs in](crate::login) need no account and no network.
///
/// It hands out codes and tokens, rotates refresh tokens, and ends a login when one of its refresh tokens is spent for
/// the second time, as fal's login does. Its clock goes with Tokio's, so a test may pause it.
///
/// A clone is another handle on the same mock, and a client: `LoginSource::with_client(mock.clone())` asks it without a
/// socket. After [`start`](Self::start) it also listens on a port of `127.0.0.1`, and ends with its last handle.
///
/// ```
/// use tower_fal::{CredentialStore, Scheme, login::{LoginSource, settled}, mock::MockAuthorization};
///
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let authorization = MockAuthorization::start().await?;
/// let home = tempfile::tempdir()?;
/// std::fs::write(home.path().join("auth0_token"), authorization.log_in())?;
///
/// let source = LoginSource::new().home(home.path()).authority(authorization.url())?.rest(authorization.url())?;
/// # let source = source.environment(|_| None);
/// let store = CredentialStore::builder(source).build().await?;
/// assert_eq!(store.load().credential().scheme(), Scheme::Bearer);
/// assert!(authorization.accepts(store.load().credential()));
/// assert_eq!(authorization.refreshes(), 1);
/// settled().await;
/// # Ok(()) }
/// ```
///
/// # What it answers
/// | request | answer |
/// |---|---|
/// | `POST /oauth/device/code` | a code, `interval`, `expires_in`, and a URL of its own that confirms the login when it is opened |
/// | `POST /oauth/token` with a device code | 403 `authorization_pending`, `slow_down` when it comes too early, `access_denied`, `expired_token`; else tokens |
/// | `POST /oauth/token` with a refresh token | tokens; 403 `invalid_grant` for one that is unknown, spent, or of a login that has ended |
/// | `POST /oauth/revoke` | 200, and the login has ended |
/// | `GET /.well-known/jwks.json` | the key of its tokens |
/// | `GET /users/teams` | the [teams](Self::add_team) behind the personal account `mock` |
/// | `GET /users/current` | the account that `x-fal-user-id` names; 403 `Insufficient permissions` for one of somebody else |
/// | `GET /api/auth/cli/session-seed`, `GET /activate` | confirms the login with this `user_code`, as a user does |
/// | `GET /v2/logout` | a redirect to `returnTo` |
///
/// Each error has an `error_description` with an escape sequence, which nobody should ever see.
#[derive(Clone)]
pub struct MockAuthorization {
    shared: Arc<Shared>,
    // No task holds this: the tasks end when it is dropped.
    scope: Arc<Scope>,
}

struct Shared {
    address: Option<SocketAddr>,
    state: Mutex<State>,
    /// How many bytes of endless answers were taken.
    endless: Arc<AtomicU64>,
}

/// One of the endpoints that a login asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// `POST /oauth/device/code`
    DeviceCode,
    /// `POST /oauth/token`
    Token,
    /// `POST /oauth/revoke`
    Revoke,
    /// `GET /.well-known/jwks.json`
    Keys,
    /// `GET /users/teams`
    Teams,
    /// `GET /users/current`
    CurrentUser,
}

/// How a request to an [`Endpoint`] fails.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EndpointFailure {
    /// An answer of OAuth: this status, and this code as `error`.
    Error(StatusCode, &'static str),
    /// Any other answer: its status, its content type, and its body.
    Body(StatusCode, &'static str, Bytes),
    /// A redirect to this URL.
    Redirect(String),
    /// No answer, and nothing is carried out.
    Hang,
    /// The request is carried out, and there is no answer.
    HangAfter,
    /// The connection is closed, and nothing is carried out.
    Disconnect,
    /// The request is carried out, and the connection is closed in place of an answer.
    DisconnectAfter,
    /// An answer of 1 GiB.
    Endless,
}

/// The scheme of the connection on which a request came.
#[derive(Clone, Copy)]
struct Scheme(&'static str);

impl MockAuthorization {
    /// A mock without a port: it is [a client](Self#impl-Service<Request<B>>-for-MockAuthorization) of its own.
    #[must_use]
    pub fn new() -> Self {
        Self::at(None)
    }

    /// A mock on a free port of `127.0.0.1`, served on the current Tokio runtime. It speaks HTTP/1.1 and, with prior
    /// knowledge, HTTP/2, without TLS.
    ///
    /// # Errors
    /// When no port can be bound.
    ///
    /// # Panics
    /// Outside a Tokio runtime, or in one without I/O or a timer.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let mock = Self::at(Some(listener.local_addr()?));
        let (tasks, shared) = (mock.scope.tasks(), Arc::clone(&mock.shared));
        tasks.clone().spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => tasks.spawn(serve(stream, "http", Arc::clone(&shared))),
                    // The client has gone again, or too many files are open. Both end by themselves.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(mock)
    }

    fn at(address: Option<SocketAddr>) -> Self {
        let shared = Shared { address, state: Mutex::new(State::new()), endless: Arc::default() };
        Self { shared: Arc::new(shared), scope: Arc::new(Scope::new()) }
    }

    /// The URL for `authority`, `rest` and `website`, such as `http://127.0.0.1:49152`. Without a port it is
    /// `https://auth.fal.ai`.
    #[must_use]
    pub fn url(&self) -> String {
        self.shared.address.map_or_else(|| "https://auth.fal.ai".to_owned(), |address| format!("http://{address}"))
    }

    /// Serves one connection that you accepted yourself, within TLS, until it ends or the last handle is dropped.
    pub fn serve_connection<I>(&self, io: I) -> impl Future<Output = ()> + Send + use<I>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.scope.tasks().run(serve(io, "https", Arc::clone(&self.shared)))
    }

    /// A new login of the [user](Self::set_user). Returns its refresh token, which is the content of a token file as
    /// `fal auth login` leaves it.
    #[must_use]
    pub fn log_in(&self) -> String {
        self.shared.state().log_in().1
    }

    /// A new login. Returns the content of a token file with an access token that lives this long from now on; one that
    /// has expired already has no time left.
    #[must_use]
    pub fn log_in_with_access(&self, life: Duration) -> String {
        let mut state = self.shared.state();
        let (login, refresh) = state.log_in();
        let access = state.access_token(login, life);
        format!("{refresh}\n{access}")
    }

    /// Who logs in from now on: the `sub` of the tokens. Default: `github|1`.
    pub fn set_user(&self, subject: impl Into<String>) {
        self.shared.state().subject = subject.into();
    }

    /// Adds a team that each user is in.
    pub fn add_team(&self, nickname: impl Into<String>, user_id: impl Into<String>) {
        let team = Team { nickname: nickname.into(), user_id: user_id.into(), is_archived: false };
        self.shared.state().teams.push(team);
    }

    /// Locks the team, as fal does it with one that is archived.
    pub fn archive_team(&self, nickname: &str) {
        let mut state = self.shared.state();
        state.teams.iter_mut().filter(|team| team.nickname == nickname).for_each(|team| team.is_archived = true);
    }

    /// How long the access tokens live from now on. Default: an hour.
    pub fn set_token_life(&self, life: Duration) {
        self.shared.state().token_life = life;
    }

    /// From now on a refresh token stays good when it is spent, and the answer has no other. Default: it is rotated.
    pub fn keep_refresh_tokens(&self) {
        self.shared.state().rotates = false;
    }

    /// From now on the answers do not say how long a token lives.
    pub fn omit_expires_in(&self) {
        self.shared.state().states_expires_in = false;
    }

    /// How far the mock's clock, by which it dates tokens, is ahead of this machine's, in seconds. Default: 0.
    pub fn set_clock_offset(&self, seconds: f64) {
        self.shared.state().clock_offset = seconds;
    }

    /// How long a client has to wait between two polls, and how long a code is good, from the next one on. Default: 5 s,
    /// and 15 min.
    pub fn set_device_code(&self, interval: Duration, life: Duration) {
        let mut state = self.shared.state();
        (state.interval, state.device_life) = (interval, life);
    }

    /// The user confirms each login after this many polls that were in vain. Default: only by [`confirm`](Self::confirm),
    /// or by opening the URL.
    pub fn confirm_after(&self, polls: u32) {
        self.shared.state().confirm_after = Some(polls);
    }

    /// The user confirms all logins that wait for it.
    pub fn confirm(&self) {
        self.decide(Decision::Confirmed);
    }

    /// The user does not allow the logins that wait for it.
    pub fn deny(&self) {
        self.decide(Decision::Denied);
    }

    fn decide(&self, decision: Decision) {
        let mut state = self.shared.state();
        let pending = state.devices.iter_mut().filter(|device| device.decision == Decision::Pending);
        pending.for_each(|device| device.decision = decision);
    }

    /// Ends all logins: no token of theirs is good any more.
    pub fn end_logins(&self) {
        let mut state = self.shared.state();
        let logins: Vec<_> = state.logins.keys().copied().collect();
        logins.into_iter().for_each(|login| state.end(login));
    }

    /// This access token is refused from now on. Its login goes on.
    pub fn refuse(&self, credential: &Credential) {
        if let Some(token) = self.shared.state().access_tokens.get_mut(token_of(credential)) {
            token.is_refused = true;
        }
    }

    /// Whether a credential is an access token of the mock, and good.
    #[must_use]
    pub fn accepts(&self, credential: &Credential) -> bool {
        self.shared.state().user_of(token_of(credential)).is_some()
    }

    /// Changes the header and the claims of each id_token before it is signed. A header whose `alg` is not `RS256` gets
    /// an empty signature.
    pub fn forge_id_tokens(&self, forge: impl Fn(&mut Value, &mut Value) + Send + Sync + 'static) {
        self.shared.state().forge = Some(Arc::new(forge));
    }

    /// Signs with a key of another id from now on. The next answer with keys does not have it yet.
    pub fn rotate_keys(&self) {
        self.shared.state().rotate_keys();
    }

    /// The next request to this endpoint fails. Several calls make several requests fail, in this order.
    pub fn fail_next(&self, endpoint: Endpoint, failure: EndpointFailure) {
        self.shared.state().next.entry(endpoint).or_default().push_back(failure);
    }

    /// Each request to this endpoint fails, until [`recover`](Self::recover).
    pub fn fail(&self, endpoint: Endpoint, failure: EndpointFailure) {
        self.shared.state().always.insert(endpoint, failure);
    }

    /// No request fails any more.
    pub fn recover(&self) {
        let mut state = self.shared.state();
        state.always.clear();
        state.next.clear();
    }

    /// How long each answer waits after its request was carried out. Default: not at all.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.state().latency = latency;
    }

    /// How many requests this endpoint has received.
    #[must_use]
    pub fn received(&self, endpoint: Endpoint) -> usize {
        self.shared.state().received.get(&endpoint).copied().unwrap_or_default()
    }

    /// How many refresh tokens were spent for new tokens.
    #[must_use]
    pub fn refreshes(&self) -> usize {
        self.shared.state().refreshes
    }

    /// How many refresh tokens were sent although they had been spent. Each has ended its login.
    #[must_use]
    pub fn reuses(&self) -> usize {
        self.shared.state().reuses
    }

    /// How many bytes of [endless](EndpointFailure::Endless) answers were taken.
    #[must_use]
    pub fn endless_taken(&self) -> u64 {
        self.shared.endless.load(Ordering::Relaxed)
    }
}

impl Default for MockAuthorization {
    fn default() -> Self {
        Self::new()
    }
}

impl<B> Service<Request<B>> for MockAuthorization
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<UnsyncBoxBody<Bytes, std::convert::Infallible>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        Box::pin(answer::answer(request, Arc::clone(&self.shared)))
    }
}

impl fmt::Debug for MockAuthorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockAuthorization").field("url", &self.url()).finish_non_exhaustive()
    }
}

async fn serve<I>(io: I, scheme: &'static str, shared: Arc<Shared>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let scope = Scope::new();
    let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Scheme(scheme));
        answer::answer(request, Arc::clone(&shared))
    });
    // A client may end its connection as it likes, and an error here concerns nobody.
    let _ = auto::Builder::new(scope.tasks()).serve_connection(TokioIo::new(io), service).await;
}

/// The token that a credential sends.
fn token_of(credential: &Credential) -> &str {
    credential.header().to_str().ok().and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default()
}
