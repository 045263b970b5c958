use std::{fmt, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

#[cfg(all(feature = "signal", unix))]
use super::signal;
#[cfg(feature = "watch")]
use super::watch::{self, DirectoryWatcher};
use super::{
    CredentialStore,
    clock::Clock,
    driver::{self, Driver, Hints, Schedule, Told},
    shared::{self, DEFAULT_NAME, Shared, nothing_there},
};
use crate::{
    backoff::{exponential, jittered},
    credential::Credential,
    error::{SourceError, SourceErrorKind},
    events,
    source::{BoxSource, CredentialSource},
};

/// The longest name of a store, in bytes. Logs and labels repeat it.
const MAX_NAME_LEN: usize = 64;
/// The waits for a source that has no credential yet.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(2);
const DEFAULT_REFRESH_BEFORE: Duration = Duration::from_secs(5 * 60);

impl CredentialStore {
    /// A store that follows a source. See the [module docs](super) for an example.
    pub fn builder(source: impl CredentialSource) -> CredentialStoreBuilder {
        CredentialStoreBuilder {
            name: DEFAULT_NAME.into(),
            source: BoxSource::new(source),
            load_timeout: None,
            wait_for_source: Duration::ZERO,
            refresh_before: DEFAULT_REFRESH_BEFORE,
            clock: Clock::system(),
            #[cfg(all(feature = "signal", unix))]
            on_sighup: false,
            #[cfg(feature = "watch")]
            watcher: None,
        }
    }
}

/// Options of a [`CredentialStore`] that follows a source.
#[must_use = "a builder does nothing until `build` is called"]
pub struct CredentialStoreBuilder {
    name: Arc<str>,
    source: BoxSource,
    load_timeout: Option<Duration>,
    wait_for_source: Duration,
    refresh_before: Duration,
    clock: Clock,
    #[cfg(all(feature = "signal", unix))]
    on_sighup: bool,
    #[cfg(feature = "watch")]
    watcher: Option<Arc<DirectoryWatcher>>,
}

impl CredentialStoreBuilder {
    /// The name of the store in its [`Status`](super::Status), and in the `store` label of its metrics. Default:
    /// `default`, which is also the name of [`fixed`](CredentialStore::fixed) stores. At most 64 bytes, without control
    /// characters.
    ///
    /// A process with several stores should give each a name of its own, so that their metrics can be told apart.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How long one load may take. Default: [as the source says](CredentialSource::load_timeout), and 10 s if it does not
    /// say. It does not delay requests: they go on with the current credential
    /// while a load runs.
    pub fn load_timeout(mut self, limit: Duration) -> Self {
        self.load_timeout = Some(limit);
        self
    }

    /// How long [`build`](Self::build) waits for a source that has no credential yet. Default: not at all.
    ///
    /// For a credential that another container puts in place (a sidecar or an agent), which may be slower to start than
    /// this process. While the credential is missing or cannot be read, the source is asked again after 100 ms, 200 ms,
    /// 400 ms and so on, up to every 2 s (each ±20 %), and for the last time when this limit is reached. Any other
    /// failure, such as a malformed key, ends `build` at once. Such a wait is logged once.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tower_fal::SourceError> {
    /// use std::time::Duration;
    /// use tower_fal::{CredentialStore, source::FileSource};
    ///
    /// let source = FileSource::new("/run/secrets/fal/key");
    /// let store = CredentialStore::builder(source).wait_for_source(Duration::from_secs(30)).build().await?;
    /// # let _ = store;
    /// # Ok(()) }
    /// ```
    pub fn wait_for_source(mut self, limit: Duration) -> Self {
        self.wait_for_source = limit;
        self
    }

    /// How long before a token expires the source is asked for the next one. Default: 5 min. It is asked up to a fifth
    /// sooner, but never in the first half of the time that the token had left when it was loaded. It is told
    /// [which one expires](crate::source::LoadReason::Expiring).
    pub fn refresh_before(mut self, window: Duration) -> Self {
        self.refresh_before = window;
        self
    }

    /// Sees changes of the source's files as they come, within milliseconds, besides polling.
    ///
    /// The store watches directories: those of the source's [`watched_paths`](CredentialSource::watched_paths), and
    /// those to which links there lead. After an event it loads from the source, and what it then finds decides.
    ///
    /// Some places have no events: a network file system, Docker's mounts on a Mac, an overlay that is changed from
    /// below. So the store polls at the source's own interval until an event has announced a change, and less often from
    /// then on: every 30 s, or at the source's own interval if that is longer. If a change comes without an event, or if
    /// the directory cannot be watched (the system's limit of watches is reached), the store polls at the source's own
    /// interval again. Either case is logged once, and is never a failure.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tower_fal::SourceError> {
    /// use tower_fal::{CredentialStore, source::FileSource};
    ///
    /// let store = CredentialStore::builder(FileSource::new("/run/secrets/fal/key")).watch_files().build().await?;
    /// # let _ = store;
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "watch")]
    pub fn watch_files(self) -> Self {
        self.watch_files_with(DirectoryWatcher::of_process())
    }

    #[cfg(feature = "watch")]
    pub(super) fn watch_files_with(mut self, watcher: Arc<DirectoryWatcher>) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// Reloads when the process gets a SIGHUP, as operators are used to (`systemctl reload`, `kill -HUP`).
    ///
    /// This is a [`reload`](CredentialStore::reload): the load begins after the signal, even if another load is under
    /// way. The [`Status`](super::Status) and the log say how it ended. From [`build`](Self::build) on, SIGHUP does not
    /// end the process any more, not even when the store is gone.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tower_fal::SourceError> {
    /// use tower_fal::{CredentialStore, source::FileSource};
    ///
    /// let store = CredentialStore::builder(FileSource::new("/etc/fal/key")).reload_on_sighup().build().await?;
    /// # let _ = store;
    /// # Ok(()) }
    /// ```
    #[cfg(all(feature = "signal", unix))]
    pub fn reload_on_sighup(mut self) -> Self {
        self.on_sighup = true;
        self
    }

    /// The wall clock by which tokens expire.
    #[cfg(test)]
    pub(super) fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Loads the first credential and starts the driver on the current Tokio runtime.
    ///
    /// That runtime must keep running. On a runtime that exists but does not run (a `current_thread` runtime outside
    /// of `block_on`), nothing is polled and a `reload()` does not return.
    ///
    /// # Errors
    /// When the source has no credential (even after [`wait_for_source`](Self::wait_for_source)), fails, panics or takes
    /// longer than the [load timeout](Self::load_timeout);
    /// outside a Tokio runtime; when the process cannot listen to SIGHUP and should; and when the [name](Self::name) is
    /// empty, too long or has control characters.
    ///
    /// # Panics
    /// On a Tokio runtime without a timer, and on one without I/O if the store should listen to SIGHUP.
    pub async fn build(self) -> Result<CredentialStore, SourceError> {
        let source_name: Arc<str> = self.source.name().into();
        self.check(&source_name)?;
        #[cfg(all(feature = "signal", unix))]
        let hangups = self.on_sighup.then(|| signal::hangups(&source_name)).transpose()?;
        let first = self.load_first(&source_name).await?;

        let (link, handles) = shared::link();
        let shared = Shared::new(self.name, first, &source_name, Some(link), self.clock.clone());
        let driver = Driver {
            schedule: Schedule::new(self.refresh_before, driver::poll_interval(&self.source, false), self.clock),
            source: self.source,
            source_name,
            shared: Arc::downgrade(&shared),
            handles,
            hints: Arc::new(Hints::default()),
            load_timeout: self.load_timeout,
        };
        #[cfg(feature = "watch")]
        if let Some(watcher) = self.watcher {
            tokio::spawn(watch::run(
                driver.source.clone(),
                watcher,
                Arc::clone(&driver.hints),
                driver.handles.finished.subscribe(),
            ));
        }
        #[cfg(all(feature = "signal", unix))]
        if let Some(hangups) = hangups {
            tokio::spawn(signal::reload(hangups, driver.shared.clone(), driver.handles.finished.subscribe()));
        }
        tokio::spawn(driver.run());
        let first = shared.load();
        events::loaded(first.source(), first.credential(), first.generation().get());
        Ok(CredentialStore { shared })
    }

    fn check(&self, source_name: &Arc<str>) -> Result<(), SourceError> {
        let hint = if self.name.is_empty() || self.name.len() > MAX_NAME_LEN || self.name.chars().any(char::is_control)
        {
            "the name of a store has 1 to 64 bytes and no control characters: see `name` of its builder"
        } else if Handle::try_current().is_err() {
            "a store that reloads needs a Tokio runtime: build it inside one, or use `from_env` or `fixed`"
        } else {
            return Ok(());
        };
        Err(SourceError::new(Arc::clone(source_name), hint))
    }

    /// Loads the first credential, and waits for it as long as the options allow.
    async fn load_first(&self, source_name: &Arc<str>) -> Result<Credential, SourceError> {
        let began = Instant::now();
        let mut step = 0;
        loop {
            let error = match self.load_once(source_name).await {
                Err(error) if may_come_later(error.kind()) => error,
                loaded => return loaded,
            };
            let left = self.wait_for_source.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(self.gave_up(source_name, error));
            }
            if step == 0 {
                events::waiting_for_source(&error, self.wait_for_source);
            }
            sleep(jittered(exponential(FIRST_RETRY, step, LONGEST_RETRY)).min(left)).await;
            step += 1;
        }
    }

    fn gave_up(&self, source_name: &Arc<str>, error: SourceError) -> SourceError {
        if self.wait_for_source.is_zero() {
            return error;
        }
        let message = format!("brought no credential within {:?}", self.wait_for_source);
        SourceError::chained(Arc::clone(source_name), error.kind(), message, Some(error))
    }

    async fn load_once(&self, source_name: &Arc<str>) -> Result<Credential, SourceError> {
        let loaded = driver::load_once(&self.source, source_name, self.load_timeout, Told::Poll).await?;
        loaded.ok_or_else(|| nothing_there(Arc::clone(source_name)))
    }
}

/// Whether a source that failed like this may only need some more time to start.
fn may_come_later(kind: SourceErrorKind) -> bool {
    matches!(kind, SourceErrorKind::NotFound | SourceErrorKind::Unreadable)
}

impl fmt::Debug for CredentialStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialStoreBuilder")
            .field("name", &self.name)
            .field("source", &self.source)
            .field("load_timeout", &self.load_timeout)
            .field("wait_for_source", &self.wait_for_source)
            .field("refresh_before", &self.refresh_before)
            .finish_non_exhaustive()
    }
}
