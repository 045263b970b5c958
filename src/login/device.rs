use std::{
    env, fmt, fs,
    path::PathBuf,
    str::FromStr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body::Body;
use http_body_util::Full;
use tokio::time::Instant;
use tower_service::Service;
use zeroize::Zeroizing;

use super::{
    base_url::BaseUrl,
    endpoints::{CLIENT_ID, DeviceCode, Endpoints, Granted, MAX_ANSWER, NoTokens, REQUEST_TIMEOUT, Refusal},
    error::{LoginError, LoginErrorKind},
    files::blocking,
    https::Https,
    id_token::{Expected, Untrusted, check},
    lock::Locks,
    places,
    renewal::{CLI_LOCK_TIMEOUT, OWN_LOCK_TIMEOUT},
    settled,
    token_file::{TokenFile, Tokens},
};
use crate::{error::BoxError, fetch::Fetch};

/// How long to wait between two polls if the answer does not say it (RFC 8628, section 3.2).
const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// How much longer to wait after `slow_down` (RFC 8628, section 3.5).
const SLOW_DOWN: Duration = Duration::from_secs(5);

/// How long the user has if the answer does not say it, and at most.
const DEFAULT_LIFE: Duration = Duration::from_secs(15 * 60);
const LONGEST_LIFE: Duration = Duration::from_secs(60 * 60);

/// How often the keys of the provider are fetched for one login, at most.
const MOST_FETCHES: u32 = 2;

/// The login as `fal auth login` makes it: the user confirms a code in a browser, on any machine.
///
/// The tokens are written where fal's own tools find them, and so does a [`LoginSource`](super::LoginSource).
///
/// ```no_run
/// use tower_fal::login::{Connection, DeviceLogin};
///
/// # #[tokio::main] async fn main() -> Result<(), tower_fal::login::LoginError> {
/// let pending = DeviceLogin::new().connection(Connection::GitHub).start().await?;
/// println!("Open {}", pending.url());
/// println!("It has to show the code {}", pending.user_code());
/// pending.wait().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct DeviceLogin {
    home: Result<PathBuf, LoginError>,
    connection: Option<Connection>,
    endpoints: Endpoints,
    website: BaseUrl,
}

/// With whom the user has an account.
///
/// ```
/// use tower_fal::login::Connection;
///
/// assert_eq!("github".parse::<Connection>()?, Connection::GitHub);
/// assert_eq!("example.com".parse::<Connection>()?, Connection::Sso("example.com".into()));
/// # Ok::<(), tower_fal::login::LoginError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Connection {
    /// GitHub: `github`.
    GitHub,
    /// Google: `google`.
    Google,
    /// The single sign-on of the organisation with this domain.
    Sso(String),
}

impl Connection {
    /// The name as fal's login knows it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::GitHub => "github",
            Self::Google => "google",
            Self::Sso(domain) => domain,
        }
    }
}

impl FromStr for Connection {
    type Err = LoginError;

    /// `github`, `google`, or the domain of a single sign-on.
    fn from_str(text: &str) -> Result<Self, LoginError> {
        let is_domain = |text: &str| {
            (1..=253).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
        };
        match text.trim() {
            "github" => Ok(Self::GitHub),
            "google" => Ok(Self::Google),
            domain if is_domain(domain) => Ok(Self::Sso(domain.to_owned())),
            _ => {
                let message = "a connection is github, google, or the domain of a single sign-on, such as example.com";
                Err(LoginError::new(LoginErrorKind::Setting, message))
            }
        }
    }
}

impl DeviceLogin {
    /// A login that is kept in `FAL_HOME_DIR`, or in `~/.fal`. The variables are read here, once.
    #[must_use]
    pub fn new() -> Self {
        Self::with_client(Https::default())
    }

    /// The same, with another client for the requests to fal's login. See
    /// [`LoginSource::with_client`](super::LoginSource::with_client) for what it must be like.
    #[must_use]
    pub fn with_client<S, B>(client: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        Self {
            home: places::home(|name| env::var_os(name)),
            connection: None,
            endpoints: Endpoints::of_fal(Fetch::new(client, REQUEST_TIMEOUT, MAX_ANSWER)),
            website: BaseUrl::of_fal("https://fal.ai"),
        }
    }

    /// With whom the user has an account. Default: the user is asked in the browser.
    #[must_use]
    pub fn connection(mut self, connection: Connection) -> Self {
        self.connection = Some(connection);
        self
    }

    /// The directory of the login, in place of `FAL_HOME_DIR`. It is made if it is missing.
    #[must_use]
    pub fn home(mut self, directory: impl Into<PathBuf>) -> Self {
        self.home = Ok(directory.into());
        self
    }

    /// Another server in place of `https://auth.fal.ai`, for tests.
    ///
    /// # Errors
    /// When it is no URL, or one of another scheme than `https`. `http` is taken for this machine only.
    pub fn authority(mut self, url: impl AsRef<str>) -> Result<Self, LoginError> {
        self.endpoints.authority = BaseUrl::parse(url.as_ref())?;
        Ok(self)
    }

    /// Another server in place of `https://fal.ai`, where the user chooses a [connection](Self::connection), for tests.
    ///
    /// # Errors
    /// As [`authority`](Self::authority).
    pub fn website(mut self, url: impl AsRef<str>) -> Result<Self, LoginError> {
        self.website = BaseUrl::parse(url.as_ref())?;
        Ok(self)
    }

    /// Asks for a code that the user can confirm.
    ///
    /// # Errors
    /// When the tokens could not be written later, so that nobody confirms a login in vain, and when fal's login cannot
    /// be reached or does not follow the protocol.
    pub async fn start(&self) -> Result<PendingLogin, LoginError> {
        let file = self.file()?;
        let directory = file.directory().to_owned();
        blocking(move || {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true);
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            let what = "cannot be made: make it, or name another directory with FAL_HOME_DIR";
            builder.create(&directory).map_err(|error| LoginError::file(&directory, what, error))
        })
        .await?;
        // Whoever has the locks may have made room already, and it must stay.
        let locks = Locks::take(file.directory(), OWN_LOCK_TIMEOUT, CLI_LOCK_TIMEOUT).await?;
        drop(file.make_room().await?);
        drop(locks);

        let asked_at = Instant::now();
        let code = self.endpoints.device_code().await?;
        let url = self.url(&code)?;
        let interval = code.interval.filter(|interval| !interval.is_zero()).unwrap_or(DEFAULT_INTERVAL);
        Ok(PendingLogin {
            url,
            user_code: code.user_code,
            device_code: code.device_code,
            interval: interval.clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL),
            ends_at: asked_at + code.life.unwrap_or(DEFAULT_LIFE).min(LONGEST_LIFE),
            endpoints: self.endpoints.clone(),
            file,
        })
    }

    /// Has fal forget the login, and removes it from this machine. Returns whether there was one.
    ///
    /// What was chosen with `fal account set` stays in the configuration. It runs to its end even if its future is
    /// dropped: see [`settled`](super::settled).
    ///
    /// # Errors
    /// When fal did not revoke it: then the file stays, and it can be tried again. When the file cannot be locked, read
    /// or removed.
    pub async fn logout(&self) -> Result<bool, LoginError> {
        let (file, endpoints) = (self.file()?, self.endpoints.clone());
        settled::run(logout(file, endpoints)).await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    fn file(&self) -> Result<TokenFile, LoginError> {
        self.home.clone().map(TokenFile::new)
    }

    /// What the user opens.
    ///
    /// Source: `fal` 1.83.0 (`auth/auth0.py`).
    fn url(&self, code: &DeviceCode) -> Result<String, LoginError> {
        let refused = |rule| {
            let message = format!("{} answered {rule}: try again later", self.endpoints.authority.as_str());
            LoginError::new(LoginErrorKind::Answer, message)
        };
        let is_code = (1..=64).contains(&code.user_code.len())
            && code.user_code.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_code {
            return Err(refused("with a code that is not shown, as it has other characters than a code"));
        }
        let verification = &code.verification_url;
        let scheme = verification.parse::<Uri>().ok().and_then(|url| url.scheme_str().map(str::to_owned));
        let is_url = match scheme.as_deref() {
            Some("https") => true,
            Some("http") => self.endpoints.authority.is_this_machine() && BaseUrl::parse(origin(verification)).is_ok(),
            _ => false,
        };
        if !is_url || verification.len() > 2048 || !verification.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused("with a URL that is not shown, as it is none of https"));
        }
        let query = form_urlencoded::Serializer::new(String::new());
        Ok(match &self.connection {
            Some(connection) => {
                let query = [
                    ("user_code", code.user_code.as_str()),
                    ("verification_uri_complete", verification),
                    ("connection", connection.as_str()),
                ]
                .iter()
                .fold(query, |mut query, (name, value)| {
                    query.append_pair(name, value);
                    query
                })
                .finish();
                format!("{}/api/auth/cli/session-seed?{query}", self.website.as_str())
            }
            None => {
                let mut query = query;
                query.append_pair("client_id", CLIENT_ID).append_pair("returnTo", verification);
                format!("{}/v2/logout?{}", self.endpoints.authority.as_str(), query.finish())
            }
        })
    }
}

impl Default for DeviceLogin {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for DeviceLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceLogin")
            .field("home", &self.home)
            .field("connection", &self.connection)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

/// A URL without its query.
fn origin(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or_default()
}

/// A login that waits for the user. Dropping it, or the future of [`wait`](Self::wait), cancels it.
#[must_use = "the login is made by `wait`"]
pub struct PendingLogin {
    url: String,
    user_code: String,
    device_code: Zeroizing<String>,
    interval: Duration,
    ends_at: Instant,
    endpoints: Endpoints,
    file: TokenFile,
}

impl PendingLogin {
    /// The URL to open in a browser: visible ASCII, and `https` unless the [authority](DeviceLogin::authority) is on this
    /// machine.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The code that the browser has to show: letters, digits and `-`.
    pub fn user_code(&self) -> &str {
        &self.user_code
    }

    /// How much time the user has left.
    pub fn time_left(&self) -> Duration {
        self.ends_at.saturating_duration_since(Instant::now())
    }

    /// Waits for the user's confirmation, checks who has made the tokens, and writes them.
    ///
    /// It asks as often as fal's login wants, and goes on while that cannot be reached. Dropping the future cancels the
    /// login until the user has confirmed it; the check and the write run to their end: see [`settled`](super::settled).
    ///
    /// # Errors
    /// When the user did not allow it, or not in time; when the answer does not follow the protocol, or the identity in
    /// it is not to be trusted; and when the tokens cannot be written.
    pub async fn wait(self) -> Result<(), LoginError> {
        let granted = self.confirmed().await?;
        let Self { endpoints, file, .. } = self;
        settled::run(accept(granted, endpoints, file)).await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    async fn confirmed(&self) -> Result<Granted, LoginError> {
        let mut interval = self.interval;
        loop {
            tokio::time::sleep(interval.min(self.time_left())).await;
            if self.time_left().is_zero() {
                return Err(too_late());
            }
            match self.endpoints.poll(&self.device_code).await {
                Ok(granted) => return Ok(granted),
                Err(NoTokens::Refused(Refusal::AuthorizationPending)) => {}
                Err(NoTokens::Refused(Refusal::SlowDown)) => interval += SLOW_DOWN,
                Err(NoTokens::Refused(Refusal::AccessDenied)) => {
                    let message = "the login was not allowed: start it again, and confirm it in the browser";
                    return Err(LoginError::new(LoginErrorKind::Denied, message));
                }
                Err(NoTokens::Refused(Refusal::ExpiredToken | Refusal::InvalidGrant)) => return Err(too_late()),
                // As RFC 8628 asks for, section 3.5.
                Err(NoTokens::Failed(error)) if error.kind() == LoginErrorKind::Unreachable => {
                    interval = (interval * 2).min(LONGEST_INTERVAL.max(interval));
                }
                Err(NoTokens::Failed(error)) => return Err(error),
            }
        }
    }
}

impl fmt::Debug for PendingLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingLogin")
            .field("url", &self.url)
            .field("user_code", &self.user_code)
            .field("time_left", &self.time_left())
            .finish_non_exhaustive()
    }
}

/// Checks and writes what was given out for a login.
async fn accept(granted: Granted, endpoints: Endpoints, file: TokenFile) -> Result<(), LoginError> {
    let authority = endpoints.authority.as_str();
    let lacks = |what| {
        let message = format!("{authority} answered without {what}: start the login again");
        LoginError::new(LoginErrorKind::Answer, message)
    };
    let refresh = granted.refresh.ok_or_else(|| lacks("a refresh token"))?;
    let id_token = granted.id_token.ok_or_else(|| lacks("an id_token"))?;
    check_identity(&endpoints, &id_token).await?;
    let _locks = Locks::take(file.directory(), OWN_LOCK_TIMEOUT, CLI_LOCK_TIMEOUT).await?;
    // fal's own tools write the refresh token alone.
    file.make_room().await?.fill(Tokens { refresh, access: None }).await
}

async fn check_identity(endpoints: &Endpoints, id_token: &str) -> Result<(), LoginError> {
    let issuer = format!("{}/", endpoints.authority.as_str());
    let mut fetches = 0;
    loop {
        fetches += 1;
        let checked = match endpoints.keys().await {
            Ok(keys) => {
                check(id_token, &keys, &Expected { issuer: &issuer, audience: CLIENT_ID, now: SystemTime::now() })
            }
            Err(_) if fetches < MOST_FETCHES => continue,
            Err(error) => return Err(error),
        };
        match checked {
            // It may have been made after the keys were.
            Err(Untrusted::UnknownKey) if fetches < MOST_FETCHES => {}
            Err(rule) => {
                let message =
                    format!("the identity in the answer is not to be trusted, as {rule}: start the login again");
                return Err(LoginError::new(LoginErrorKind::Identity, message));
            }
            Ok(()) => return Ok(()),
        }
    }
}

async fn logout(file: TokenFile, endpoints: Endpoints) -> Result<bool, LoginError> {
    let directory = file.directory().to_owned();
    if !blocking(move || Ok(directory.is_dir())).await? {
        return Ok(false);
    }
    let _locks = Locks::take(file.directory(), OWN_LOCK_TIMEOUT, CLI_LOCK_TIMEOUT).await?;
    let Some(found) = file.now().await? else { return Ok(false) };
    endpoints.revoke(&found.tokens.refresh).await.map_err(|error| {
        let message = format!("fal did not revoke the login, so {} stays: try again", file.path().display());
        LoginError::because(error.kind(), message, &error)
    })?;
    // fal's Python client takes no lock while it renews a login.
    match file.now().await? {
        Some(now) if now.tokens.refresh != found.tokens.refresh => {
            let message = format!("{} was renewed meanwhile: log out again", file.path().display());
            Err(LoginError::new(LoginErrorKind::File, message))
        }
        _ => file.remove().await.map(|()| true),
    }
}

fn too_late() -> LoginError {
    LoginError::new(LoginErrorKind::TooLate, "the login was not confirmed in time: start it again")
}

fn runtime_ended() -> LoginError {
    let message = "it was ended by the end of its runtime: call `login::settled` before that";
    LoginError::new(LoginErrorKind::Unreachable, message)
}
