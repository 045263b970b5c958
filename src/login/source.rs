use std::{
    env,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower_service::Service;

use super::{
    account::{Accounts, NoAccount},
    base_url::BaseUrl,
    endpoints::{Endpoints, MAX_ANSWER, REQUEST_TIMEOUT},
    error::{LoginError, LoginErrorKind},
    https::Https,
    places,
    renewal::{CLI_LOCK_TIMEOUT, OWN_LOCK_TIMEOUT, Renewal, Usable},
    token_file::{Token, TokenFile},
};
use crate::{
    credential::Credential,
    error::{BoxError, SourceError},
    fetch::Fetch,
    source::{CredentialSource, LoadReason, ProfileSource},
};

/// So that a change shows within 12 s, as the store varies each wait by up to a fifth.
const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(8);

/// Both locks, two attempts to renew, the account with a renewal between, and files that are being written.
const LOAD_TIMEOUT: Duration =
    OWN_LOCK_TIMEOUT.saturating_add(CLI_LOCK_TIMEOUT).saturating_add(REQUEST_TIMEOUT.saturating_mul(5));

/// The login that fal's own tools, or a [`DeviceLogin`](super::DeviceLogin), have left on this machine. It is renewed
/// for as long as the process runs.
///
/// See the [module docs](super) for what is read, and for when and how it is renewed.
///
/// ```no_run
/// use tower_fal::{CredentialStore, login::LoginSource};
///
/// # #[tokio::main] async fn main() -> Result<(), tower_fal::SourceError> {
/// let store = CredentialStore::builder(LoginSource::new()).build().await?;
/// // …
/// # drop(store);
/// tower_fal::login::settled().await;
/// # Ok(()) }
/// ```
pub struct LoginSource {
    name: Arc<str>,
    home: Result<PathBuf, LoginError>,
    is_home_named: bool,
    /// Where the account was chosen.
    config: ProfileSource,
    if_present: bool,
    endpoints: Endpoints,
    every: Duration,
    /// Made at the first load, when the options are known.
    renewal: OnceLock<Renewal>,
    accounts: Accounts,
}

impl LoginSource {
    /// The login in `FAL_HOME_DIR`, or in `~/.fal`, and the account in `FAL_CONFIG_PATH`, or in `~/.fal/config.toml`.
    ///
    /// The variables are read here, once. The endpoints are asked by a client of its own, which uses the root
    /// certificates and the proxies of this system; see [`with_client`](Self::with_client) for another.
    #[must_use]
    pub fn new() -> Self {
        Self::with_client(Https::default())
    }

    /// The same, with another client for the requests to fal's login and to its REST API.
    ///
    /// It must be bare: no layer of this crate around it, no redirects followed, and nothing logged of what it sends,
    /// because that is the refresh token. Each request is given up after 30 s, and when its answer is longer than 1 MiB.
    #[must_use]
    pub fn with_client<S, B>(client: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let home = places::home(|name| env::var_os(name));
        Self {
            name: name(home.as_deref().ok()),
            home,
            is_home_named: false,
            config: ProfileSource::new(),
            if_present: false,
            endpoints: Endpoints::of_fal(Fetch::new(client, REQUEST_TIMEOUT, MAX_ANSWER)),
            every: DEFAULT_POLL_INTERVAL,
            renewal: OnceLock::new(),
            accounts: Accounts::default(),
        }
    }

    /// The directory of the login, in place of `FAL_HOME_DIR`. If there is no login in it, that is an error, unless you
    /// say [`if_present`](Self::if_present).
    #[must_use]
    pub fn home(mut self, directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        self.name = name(Some(&directory));
        self.home = Ok(directory);
        self.is_home_named = true;
        self
    }

    /// The configuration of fal's tools, where the account was chosen, in place of `FAL_CONFIG_PATH`. If it is missing,
    /// that is an error.
    #[must_use]
    pub fn config(mut self, path: impl Into<PathBuf>) -> Self {
        self.config = self.config.path(path);
        self
    }

    /// Lets a [named directory](Self::home) without a login mean "I have no credential, ask the next source" in place of
    /// an error. Without a named one that is the default.
    #[must_use]
    pub fn if_present(mut self) -> Self {
        self.if_present = true;
        self
    }

    /// The function that returns the value of a variable. Default: it reads the process's environment. The client takes
    /// the proxies and the root certificates from there in any case.
    #[must_use]
    pub fn environment(mut self, lookup: impl Fn(&str) -> Option<OsString> + Send + Sync + 'static) -> Self {
        if !self.is_home_named {
            self.home = places::home(&lookup);
            self.name = name(self.home.as_deref().ok());
        }
        self.config = self.config.environment(lookup);
        self
    }

    /// How often the files are looked at. Default: every 8 s, each wait varied by up to a fifth. A look takes no lock and
    /// no network while the token is good.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.every = every;
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

    /// Another server in place of `https://rest.alpha.fal.ai`, where the user id of the account is looked up, for tests.
    ///
    /// # Errors
    /// As [`authority`](Self::authority).
    pub fn rest(mut self, url: impl AsRef<str>) -> Result<Self, LoginError> {
        self.endpoints.rest = BaseUrl::parse(url.as_ref())?;
        Ok(self)
    }

    async fn current(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, Failed> {
        let renewal = self.renewal()?;
        let Some(found) = renewal.file.settled().await? else { return Ok(self.absent(renewal)?) };
        let usable = renewal.usable(&found);
        let is_refused = matches!((reason, &usable), (LoadReason::Refused(old), Some(now)) if is(old, &now.access));
        let is_expiring = matches!((reason, &usable), (LoadReason::Expiring(old), Some(now)) if is(old, &now.access));
        let is_wanted = |now: &Usable| now.life.is_good() && !is_refused && !(is_expiring && now.life.is_half_over());
        let access = match usable {
            Some(now) if is_wanted(&now) && renewal.unwritten(&found.tokens.refresh).is_none() => now.access,
            usable => {
                // One that is good has only to be written.
                let stale = usable.as_ref().filter(|now| !is_wanted(now)).map(|now| now.access.clone());
                match (renewal.renewed(found, stale).await, usable) {
                    (Ok(renewed), _) => renewed,
                    // It is still of use, and there is time to try again.
                    (Err(_), Some(now)) if !now.life.is_over() && !is_refused => now.access,
                    (Err(error), _) => return Err(error.into()),
                }
            }
        };
        self.credential(renewal, access).await.map(Some)
    }

    /// The token as a credential, for the account that was chosen.
    async fn credential(&self, renewal: &Renewal, mut access: Token) -> Result<Credential, Failed> {
        let Some(team) = self.config.team().await? else { return Ok(self.bearer(&access)?) };
        let mut is_renewed = false;
        let user_id = loop {
            match self.accounts.user_id(&self.endpoints, &access, &team).await {
                Ok(user_id) => break user_id,
                Err(NoAccount::Failed(error)) => return Err(error.into()),
                Err(NoAccount::Unauthorized) if is_renewed => return Err(self.accounts.refused(&access, &team).into()),
                // Its store cannot say so, as it has never had it.
                Err(NoAccount::Unauthorized) => {
                    let Some(found) = renewal.file.settled().await? else { return Err(renewal.file.no_login().into()) };
                    access = renewal.renewed(found, Some(access)).await?;
                    is_renewed = true;
                }
            }
        };
        let credential = self.bearer(&access)?.for_account(user_id).map_err(|error| {
            let message = format!("the account {team:?} cannot be used: choose another with `fal account set`");
            LoginError::because(LoginErrorKind::Account, message, &error)
        })?;
        Ok(credential)
    }

    fn bearer(&self, access: &Token) -> Result<Credential, LoginError> {
        let credential = Credential::bearer(access.as_str()).map_err(|error| {
            LoginError::because(
                LoginErrorKind::File,
                "the access token of the login cannot be used: run `fal auth login`",
                &error,
            )
        })?;
        Ok(credential.with_source(Arc::clone(&self.name)))
    }

    fn absent(&self, renewal: &Renewal) -> Result<Option<Credential>, LoginError> {
        if self.if_present || !self.is_home_named {
            return Ok(None);
        }
        Err(renewal.file.no_login())
    }

    fn renewal(&self) -> Result<&Renewal, LoginError> {
        let home = self.home.as_ref().map_err(LoginError::clone)?;
        Ok(self
            .renewal
            .get_or_init(|| Renewal::new(Arc::clone(&self.name), TokenFile::new(home.clone()), self.endpoints.clone())))
    }
}

/// Why there is no credential.
enum Failed {
    Login(LoginError),
    /// The configuration cannot be read.
    Config(SourceError),
}

impl From<LoginError> for Failed {
    fn from(error: LoginError) -> Self {
        Self::Login(error)
    }
}

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        Self::Config(error)
    }
}

/// Whether it is this token that a credential sends.
fn is(credential: &Credential, access: &Token) -> bool {
    let value = credential.header().as_bytes().strip_prefix(b"Bearer ");
    value.and_then(|value| std::str::from_utf8(value).ok()).and_then(Token::new).is_some_and(|token| token == *access)
}

fn name(home: Option<&Path>) -> Arc<str> {
    match home {
        Some(home) => format!("login:{}", TokenFile::new(home.to_owned()).path().display()).into(),
        None => "login".into(),
    }
}

impl CredentialSource for LoginSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        self.load_because(LoadReason::Poll).await
    }

    async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
        self.current(reason).await.map_err(|failed| match failed {
            Failed::Login(error) => error.of_source(&self.name),
            Failed::Config(error) => error,
        })
    }

    fn load_timeout(&self) -> Option<Duration> {
        Some(LOAD_TIMEOUT)
    }

    fn poll_interval(&self) -> Option<Duration> {
        Some(self.every)
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        let file = self.home.as_ref().ok().map(|home| TokenFile::new(home.clone()).path());
        file.into_iter().chain(self.config.watched_paths()).collect()
    }

    /// The end of a token is no event of a file.
    fn poll_interval_while_watched(&self) -> Option<Duration> {
        Some(self.every)
    }
}

impl Default for LoginSource {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for LoginSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginSource")
            .field("name", &self.name)
            .field("config", &self.config)
            .field("endpoints", &self.endpoints)
            .field("every", &self.every)
            .finish_non_exhaustive()
    }
}
