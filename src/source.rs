//! Where a credential comes from.
//!
//! A [`CredentialSource`] has three answers: *here it is* (`Ok(Some)`), *I have none, ask the next source*
//! (`Ok(None)`), and *I should have one, and something is broken* (`Err`). A source only fetches. The
//! [store](crate::store) decides when to load, what to do with a failure and how to publish the result.
//!
//! | source | reads | loaded again |
//! |---|---|---|
//! | [`EnvSource`] | `FAL_KEY`, `FAL_KEY_ID` and `FAL_KEY_SECRET`, or the file that `FAL_KEY_FILE` names | never; the file every 5 s |
//! | [`FileSource`] | a file with the key, or two with its halves, such as a mounted Kubernetes Secret | every 5 s |
//! | `DotenvSource` (feature `dotenv`) | the key in a `.env` file | every 5 s |
//! | `ProfileSource` (feature `profile`) | the key of a profile in fal's own `~/.fal/config.toml` | every 5 s |
//! | `LoginSource` (feature `login`) | the login that `fal auth login` has left, renewed before it expires | every 8 s |
//! | [`from_fn`] | what an async closure returns: a key from Vault or from a cloud's secret manager | at the interval that you give |
//! | [`ChainSource`] | the first of several sources that has a credential; [`fal_default`](ChainSource::fal_default) is where fal's own tools look | at the shortest interval of its sources |
//!
//! [`CredentialStore::from_default`](crate::CredentialStore::from_default) is a store over what fal's own tools would use.
//! [`from_env`](crate::CredentialStore::from_env) and [`fixed`](crate::CredentialStore::fixed) need no runtime and never
//! load again.
//!
//! ```
//! use std::time::Duration;
//! use tower_fal::{Credential, source};
//!
//! // A remote source: the store loads it every minute, and keeps the last good credential while Vault is down.
//! let vault = source::from_fn("vault:fal", Duration::from_secs(60), || async {
//!     let key = fetch_from_vault().await?;
//!     Ok(Credential::key(key)?)
//! });
//! # async fn fetch_from_vault() -> std::io::Result<String> { Ok("id:secret".into()) }
//! # let _ = vault;
//! ```

use std::{fmt, future::Future, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use crate::{
    credential::Credential,
    error::{BoxError, SourceError},
};

mod chain;
#[cfg(feature = "dotenv")]
mod dotenv;
mod env;
mod file;
#[cfg(feature = "profile")]
mod profile;
mod variables;

#[cfg(feature = "dotenv")]
pub use self::dotenv::DotenvSource;
#[cfg(feature = "profile")]
pub use self::profile::ProfileSource;
pub use self::{chain::ChainSource, env::EnvSource, file::FileSource};

/// While file events come in, polling is only a safety net.
const WATCHED_POLL_INTERVAL: Duration = Duration::from_secs(30);

/// How long a load may take if neither the store nor the source names a limit.
pub(crate) const DEFAULT_LOAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A place from which the current credential can be loaded. See the [module docs](self) for the three answers.
///
/// `async fn load` satisfies the trait as long as its future is `Send`:
///
/// ```
/// use tower_fal::{Credential, error::SourceError, source::CredentialSource};
///
/// struct Fixed(Credential);
///
/// impl CredentialSource for Fixed {
///     fn name(&self) -> &str {
///         "fixed"
///     }
///
///     async fn load(&self) -> Result<Option<Credential>, SourceError> {
///         Ok(Some(self.0.clone()))
///     }
/// }
/// ```
pub trait CredentialSource: Send + Sync + 'static {
    /// The name of this source in status, logs and errors, such as `file:/run/secrets/fal_key`. It is shown, so never
    /// put the secret in it.
    fn name(&self) -> &str;

    /// Loads the current credential.
    ///
    /// It must not block its thread: run blocking work in `tokio::task::spawn_blocking`. A timeout cannot end a load
    /// that blocks.
    ///
    /// The future is dropped when the store's load timeout is over. A load that uses something up (a refresh token)
    /// should run in a task of its own, which finishes even if the future is dropped.
    ///
    /// # Errors
    /// When the credential should be here and is missing, unreadable or malformed. The store then keeps the last
    /// good credential, reports the error and loads again later.
    fn load(&self) -> impl Future<Output = Result<Option<Credential>, SourceError>> + Send;

    /// Loads the current credential, and is told why it is asked for. This is what the store calls.
    ///
    /// Default: [`load`](Self::load), whatever the reason is. A source that has its credential renewed overrides this,
    /// because only the reason says that a credential which seems to be good is of no use any more:
    ///
    /// ```
    /// use tower_fal::{Credential, error::SourceError, source::{CredentialSource, LoadReason}};
    ///
    /// struct Login;
    ///
    /// impl CredentialSource for Login {
    ///     fn name(&self) -> &str {
    ///         "login"
    ///     }
    ///
    ///     async fn load(&self) -> Result<Option<Credential>, SourceError> {
    ///         self.load_because(LoadReason::Poll).await
    ///     }
    ///
    ///     async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
    ///         let stored = self.stored()?;
    ///         // If it is another one, somebody has renewed it since.
    ///         match reason {
    ///             LoadReason::Refused(old) | LoadReason::Expiring(old) if old.same_value(&stored) => self.renew().await,
    ///             _ => Ok(Some(stored)),
    ///         }
    ///     }
    /// }
    /// # impl Login {
    /// #     fn stored(&self) -> Result<Credential, SourceError> {
    /// #         Credential::bearer("first").map_err(|error| SourceError::new("login", error))
    /// #     }
    /// #     async fn renew(&self) -> Result<Option<Credential>, SourceError> {
    /// #         Credential::bearer("second").map(Some).map_err(|error| SourceError::new("login", error))
    /// #     }
    /// # }
    /// # tokio_test::block_on(async {
    /// # let first = Login.load().await?.unwrap();
    /// # assert!(Login.load_because(LoadReason::Poll).await?.unwrap().same_value(&first));
    /// # assert!(!Login.load_because(LoadReason::Refused(&first)).await?.unwrap().same_value(&first));
    /// # Ok::<(), SourceError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`load`](Self::load).
    fn load_because(
        &self,
        reason: LoadReason<'_>,
    ) -> impl Future<Output = Result<Option<Credential>, SourceError>> + Send {
        let _ = reason;
        self.load()
    }

    /// How long one load of this source may take, if the store's [builder] names no limit.
    ///
    /// Default: `None`, which means 10 s.
    ///
    /// [builder]: crate::store::CredentialStoreBuilder::load_timeout
    fn load_timeout(&self) -> Option<Duration> {
        None
    }

    /// How long the store waits before it loads again. It varies each wait by up to a fifth, so that replicas do not
    /// all load at once.
    ///
    /// Default: `None`. The store then loads again only for a reload, and before a token expires.
    fn poll_interval(&self) -> Option<Duration> {
        None
    }

    /// The files whose changes are a reason to load again. Such a change is only a hint: the answer of
    /// [`load`](Self::load) decides. Default: none.
    fn watched_paths(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// How long the store waits before it loads again while the [`watched_paths`](Self::watched_paths) are watched.
    ///
    /// Default: the [`poll_interval`](Self::poll_interval), and at least 30 s if there are such paths, because a
    /// change of these files is seen at once. A source that also reads from elsewhere overrides this.
    fn poll_interval_while_watched(&self) -> Option<Duration> {
        let every = self.poll_interval()?;
        Some(if self.watched_paths().is_empty() { every } else { every.max(WATCHED_POLL_INTERVAL) })
    }
}

/// Why a [source](CredentialSource::load_because) is asked for its credential.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum LoadReason<'a> {
    /// At the start, at an interval, after a change of a file, or for a [`reload`](crate::CredentialStore::reload).
    Poll,
    /// This credential, which the store holds, expires soon or has expired: the store looks for the next one.
    ///
    /// If the source brings the same one, it is asked again after half of the time that is left, at most a minute later.
    /// Once the token has expired, it is asked again after 1 s, 2 s, 4 s and so on, up to a minute. A source with a
    /// shorter interval is asked at that interval.
    Expiring(&'a Credential),
    /// fal has refused this credential, which the store holds. It says so for each load that a refusal asks for, so a
    /// source that renews its credential compares: one that has been replaced since must not be renewed again.
    ///
    /// It is said of a 401 by fal itself that another credential may cure, and for
    /// [`reload_past`](crate::CredentialStore::reload_past). An application's own 401 is none, nor is a 403.
    Refused(&'a Credential),
}

/// A source from an async closure without arguments.
///
/// `every` is the [`poll_interval`](CredentialSource::poll_interval): a [`Duration`], or `None` for a source that is
/// loaded only on [`reload`](crate::CredentialStore::reload) and
/// [`reload_past`](crate::CredentialStore::reload_past), and before a token expires. The closure returns a
/// [`Credential`] or an `Option` of one, and must not block. Its errors are boxed, which `?` does for errors of any type;
/// see [what is kept of them](SourceError#the-errors-of-other-crates). See the [module docs](self) for an example.
///
/// Use [`from_fn_with`] for a closure that needs a client or other state: an `async move ||` that uses what it has
/// captured is not `Fn`.
pub fn from_fn<F, Fut, T>(
    name: impl Into<Arc<str>>,
    every: impl Into<Option<Duration>>,
    load: F,
) -> impl CredentialSource
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<T, BoxError>> + Send,
    T: Into<Option<Credential>>,
{
    from_fn_with(name, every, (), move |()| load())
}

/// A source from an async closure and the state that it needs. The state is cloned for each load.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use tower_fal::{Credential, source};
///
/// # struct SecretManager;
/// # impl SecretManager { async fn get(&self, _name: &str) -> std::io::Result<String> { Ok("id:secret".into()) } }
/// let client = Arc::new(SecretManager);
/// let cloud = source::from_fn_with("cloud:fal-key", Duration::from_secs(300), client, async |client| {
///     let key = client.get("fal-key").await?;
///     Ok(Credential::key(key)?)
/// });
/// # let _ = cloud;
/// ```
pub fn from_fn_with<S, F, Fut, T>(
    name: impl Into<Arc<str>>,
    every: impl Into<Option<Duration>>,
    state: S,
    load: F,
) -> impl CredentialSource
where
    S: Clone + Send + Sync + 'static,
    F: Fn(S) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<T, BoxError>> + Send,
    T: Into<Option<Credential>>,
{
    FromFn { name: name.into(), every: every.into(), state, load }
}

struct FromFn<S, F> {
    name: Arc<str>,
    every: Option<Duration>,
    state: S,
    load: F,
}

impl<S, F, Fut, T> CredentialSource for FromFn<S, F>
where
    S: Clone + Send + Sync + 'static,
    F: Fn(S) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<T, BoxError>> + Send,
    T: Into<Option<Credential>>,
{
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        match (self.load)(self.state.clone()).await {
            Ok(loaded) => Ok(loaded.into()),
            Err(error) => Err(SourceError::new(self.name.clone(), error)),
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.every
    }
}

/// Any source as one type, for lists and struct fields. Cheap to clone.
///
/// ```
/// use tower_fal::source::{BoxSource, EnvSource, FileSource};
///
/// let sources = [BoxSource::new(EnvSource::key()), BoxSource::new(FileSource::new("/run/secrets/fal_key"))];
/// # let _ = sources;
/// ```
#[derive(Clone)]
pub struct BoxSource {
    inner: Arc<dyn ErasedSource>,
}

impl BoxSource {
    /// Erases the type of a source.
    pub fn new(source: impl CredentialSource) -> Self {
        Self { inner: Arc::new(source) }
    }
}

impl CredentialSource for BoxSource {
    fn name(&self) -> &str {
        self.inner.dyn_name()
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        self.inner.dyn_load().await
    }

    async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
        self.inner.dyn_load_because(reason).await
    }

    fn load_timeout(&self) -> Option<Duration> {
        self.inner.dyn_load_timeout()
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.inner.dyn_poll_interval()
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        self.inner.dyn_watched_paths()
    }

    fn poll_interval_while_watched(&self) -> Option<Duration> {
        self.inner.dyn_poll_interval_while_watched()
    }
}

impl fmt::Debug for BoxSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BoxSource").field(&self.name()).finish()
    }
}

type BoxLoad<'a> = Pin<Box<dyn Future<Output = Result<Option<Credential>, SourceError>> + Send + 'a>>;

/// [`CredentialSource`] with boxed futures: that trait is not object-safe, because it returns `impl Future`.
trait ErasedSource: Send + Sync {
    fn dyn_name(&self) -> &str;
    fn dyn_load(&self) -> BoxLoad<'_>;
    fn dyn_load_because<'a>(&'a self, reason: LoadReason<'a>) -> BoxLoad<'a>;
    fn dyn_load_timeout(&self) -> Option<Duration>;
    fn dyn_poll_interval(&self) -> Option<Duration>;
    fn dyn_watched_paths(&self) -> Vec<PathBuf>;
    fn dyn_poll_interval_while_watched(&self) -> Option<Duration>;
}

impl<S: CredentialSource> ErasedSource for S {
    fn dyn_name(&self) -> &str {
        CredentialSource::name(self)
    }

    fn dyn_load(&self) -> BoxLoad<'_> {
        Box::pin(CredentialSource::load(self))
    }

    fn dyn_load_because<'a>(&'a self, reason: LoadReason<'a>) -> BoxLoad<'a> {
        Box::pin(CredentialSource::load_because(self, reason))
    }

    fn dyn_load_timeout(&self) -> Option<Duration> {
        CredentialSource::load_timeout(self)
    }

    fn dyn_poll_interval(&self) -> Option<Duration> {
        CredentialSource::poll_interval(self)
    }

    fn dyn_watched_paths(&self) -> Vec<PathBuf> {
        CredentialSource::watched_paths(self)
    }

    fn dyn_poll_interval_while_watched(&self) -> Option<Duration> {
        CredentialSource::poll_interval_while_watched(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SourceErrorKind;

    #[tokio::test]
    async fn a_closure_is_a_source() {
        let source = from_fn("mine", Duration::from_secs(9), || async { Ok(Credential::key("id:secret")?) });
        assert_eq!(source.name(), "mine");
        assert_eq!(source.poll_interval(), Some(Duration::from_secs(9)));
        assert_eq!(source.load().await.unwrap().unwrap().header(), "Key id:secret");
    }

    #[tokio::test]
    async fn a_closure_may_have_nothing_or_fail() {
        let nothing = from_fn("nothing", None, || async { Ok(None) });
        assert!(nothing.load().await.unwrap().is_none());
        let fail = from_fn("fail", None, || async { Ok(Credential::key("")?) });
        let error = fail.load().await.unwrap_err();
        assert_eq!((error.kind(), error.source_name()), (SourceErrorKind::Invalid, "fail"));
    }

    #[tokio::test]
    async fn a_boxed_source_answers_as_the_source_inside() {
        let source = from_fn_with("state", Duration::from_secs(1), "id:secret".to_owned(), async |key: String| {
            Ok(Credential::key(key)?)
        });
        let boxed = BoxSource::new(BoxSource::new(source));
        assert_eq!(boxed.name(), "state");
        assert_eq!(boxed.poll_interval(), Some(Duration::from_secs(1)));
        assert!(boxed.watched_paths().is_empty());
        assert_eq!(boxed.load().await.unwrap().unwrap().header(), "Key id:secret");
        assert_eq!(format!("{boxed:?}"), r#"BoxSource("state")"#);
    }
}
