//! The current credential, and what keeps it current.
//!
//! A [`CredentialStore`] holds one credential for everybody. Requests [`load`](CredentialStore::load) it without a
//! lock; one task, the *driver*, is the only one that asks the [source](crate::source):
//!
//! 1. [`build`](CredentialStoreBuilder::build) loads once, so that a server without a key fails when it starts.
//! 2. The driver asks again at the source's own interval, ahead of the expiry of a token, and when
//!    [`reload`](CredentialStore::reload) or [`reload_past`](CredentialStore::reload_past) is called.
//! 3. What is valid and has changed becomes the next [`Generation`]. Content decides, not timestamps.
//! 4. Anything else (a missing file, half a key, a time-out, a panic) leaves the last good credential in place, is
//!    reported in the [`Status`], and is tried again: after 1 s, 2 s, 4 s, up to the source's interval or a minute,
//!    whichever is shorter. (A source that is never polled waits for the next reload.)
//! 5. The driver ends when the last handle is dropped.
//!
//! With the feature `watch` it also looks when a file changes, and with `signal` at a SIGHUP; both are asked for on
//! the [builder](CredentialStoreBuilder).
//!
//! ```
//! use tower_fal::{CredentialStore, source::FileSource};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("fal_key");
//! std::fs::write(&path, "first-id:secret")?;
//! let store = CredentialStore::builder(FileSource::new(&path)).build().await?;
//! assert_eq!(store.status().key_id.unwrap().as_str(), "first-id");
//!
//! std::fs::write(&path, "second-id:secret")?; // the driver sees it within 5 s,
//! store.reload().await?; // or now
//! assert_eq!(store.status().key_id.unwrap().as_str(), "second-id");
//! # Ok(()) }
//! ```

use std::{fmt, sync::Arc, time::Duration};

use tokio::sync::watch as channel;

use self::{
    clock::Clock,
    driver::{Driver, Hints, Schedule},
    shared::{DriverLink, Finished, Past, Shared},
    wait::finished,
};
use crate::{
    credential::Credential,
    error::{Reason, SourceError},
    source::{BoxSource, CredentialSource, EnvSource},
};

mod clock;
mod driver;
mod shared;
#[cfg(all(feature = "signal", unix))]
mod signal;
mod slot;
mod status;
mod wait;
#[cfg(feature = "watch")]
mod watch;

pub(crate) use self::wait::{WaitFor, Waited};
pub use self::{
    slot::Snapshot,
    status::{Degraded, DriverState, LastRefusal, Status},
};
pub use crate::{error::ReloadError, generation::Generation};

const DEFAULT_NAME: &str = "default";
/// The longest name of a store, in bytes. It ends up in logs and labels.
const MAX_NAME_LEN: usize = 64;
const DEFAULT_LOAD_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_REFRESH_BEFORE: Duration = Duration::from_secs(5 * 60);

/// A handle to the current credential: cheap to clone, shared by every layer. See the [module docs](self).
#[derive(Clone)]
pub struct CredentialStore {
    shared: Arc<Shared>,
}

impl CredentialStore {
    /// A store that follows a source. See the [module docs](self) for an example.
    pub fn builder(source: impl CredentialSource) -> CredentialStoreBuilder {
        CredentialStoreBuilder {
            name: DEFAULT_NAME.into(),
            source: BoxSource::new(source),
            load_timeout: DEFAULT_LOAD_TIMEOUT,
            refresh_before: DEFAULT_REFRESH_BEFORE,
            clock: Clock::system(),
            #[cfg(all(feature = "signal", unix))]
            on_sighup: false,
            #[cfg(feature = "watch")]
            watcher: None,
        }
    }

    /// A store with the key in `FAL_KEY`, or in `FAL_KEY_ID` and `FAL_KEY_SECRET`, that never reloads.
    ///
    /// The environment of a running process does not change, so there is nothing to reload and no runtime is needed.
    ///
    /// ```no_run
    /// let store = tower_fal::CredentialStore::from_env()?;
    /// # Ok::<(), tower_fal::error::SourceError>(())
    /// ```
    ///
    /// # Errors
    /// When none of the variables is set or one is malformed; and when it is `FAL_KEY_FILE` that names the key, as
    /// a file wants to be read again: use [`builder`](Self::builder) with [`EnvSource::file`] then.
    pub fn from_env() -> Result<Self, SourceError> {
        Self::from_fixed_env(&EnvSource::all())
    }

    fn from_fixed_env(source: &EnvSource) -> Result<Self, SourceError> {
        source.load_fixed()?.map(Self::fixed).ok_or_else(|| nothing_there(source.name().into()))
    }

    /// A store with one credential that never reloads; [`replace`](Self::replace) still works. Needs no runtime.
    ///
    /// ```
    /// use tower_fal::{Credential, CredentialStore};
    ///
    /// let store = CredentialStore::fixed(Credential::key("id:secret")?);
    /// assert_eq!(store.load().credential().header(), "Key id:secret");
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    #[must_use]
    pub fn fixed(credential: Credential) -> Self {
        let source = credential.source_arc().map_or_else(|| "fixed".into(), Arc::clone);
        let shared = Shared::new(DEFAULT_NAME.into(), credential, source, None, Clock::system());
        Self { shared: Arc::new(shared) }
    }

    /// The current credential, for one request: no lock, no await, no allocation.
    ///
    /// (But for the first time on a thread, when `arc-swap` makes itself a place there.) There always is one. A token
    /// past its expiry is still handed out, since fal's clock decides and not ours.
    #[must_use]
    #[inline]
    pub fn load(&self) -> Snapshot {
        self.shared.load()
    }

    /// The generation of the current credential.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.load().generation()
    }

    /// Asks the source now, whatever its interval.
    ///
    /// The load begins after this call, so it sees whatever was written before it. Calls at the same time share one
    /// load. Dropping the future cancels nothing. After a [`replace`](Self::replace) it goes back to what the source
    /// has.
    ///
    /// # Errors
    /// When the load fails (the last good credential stays), when the driver's runtime has ended, and when the store
    /// never reloads.
    pub async fn reload(&self) -> Result<Reloaded, ReloadError> {
        let driver = self.shared.driver.as_ref().ok_or(ReloadError::NeverReloads)?;
        let before = self.generation();
        let result = finished(driver, self.shared.demand(driver)).await?;
        let now = self.generation();
        if now > before {
            return Ok(Reloaded::Changed(now));
        }
        result.map(|()| Reloaded::Unchanged(now)).map_err(ReloadError::Failed)
    }

    /// Asks for a newer credential than one that fal has refused.
    ///
    /// If there is a newer one already, this returns at once. Otherwise everyone who asks at the same time shares
    /// one load. When that brings the same credential, or fails, the answer stands for a while without asking the
    /// source again: 1 s at first, then twice as long with each time, at most a minute, each varied by a fifth.
    /// Dropping the future cancels nothing.
    ///
    /// # Errors
    /// As [`reload`](Self::reload).
    pub async fn reload_past(&self, refused: Generation) -> Result<Reloaded, ReloadError> {
        let current = self.generation();
        if current > refused {
            return Ok(Reloaded::Changed(current));
        }
        let driver = self.shared.driver.as_ref().ok_or(ReloadError::NeverReloads)?;
        let load = match self.shared.demand_past(driver, refused, false) {
            Past::Newer(generation) => return Ok(Reloaded::Changed(generation)),
            Past::CoolingDown { .. } if driver.is_gone() => return Err(ReloadError::DriverGone),
            Past::CoolingDown { answer, .. } => return answer.map(Reloaded::Unchanged).map_err(ReloadError::Failed),
            Past::Load { number, .. } => number,
        };
        let result = finished(driver, load).await?;
        let now = self.generation();
        if now > refused {
            return Ok(Reloaded::Changed(now));
        }
        result.map(|()| Reloaded::Unchanged(now)).map_err(ReloadError::Failed)
    }

    /// Makes a credential the current one, whatever the source says, and returns its generation.
    ///
    /// It stays until the source brings something *new*, or somebody asks for a reload. The credential that is
    /// current already is no change.
    pub fn replace(&self, credential: Credential) -> Generation {
        let source = credential.source_arc().map_or_else(|| "replaced".into(), Arc::clone);
        self.shared.replace(credential, source)
    }

    /// What the store holds and how its source fares.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status().borrow().clone()
    }

    /// Follows the [`status`](Self::status): each rotation, failure and recovery, and the first [refusal](LastRefusal)
    /// of many.
    ///
    /// ```no_run
    /// # async fn example(store: tower_fal::CredentialStore) {
    /// let mut status = store.subscribe();
    /// drop(store); // a subscription alone does not keep the driver
    /// while status.changed().await.is_ok() {
    ///     println!("now at generation {}", status.borrow().generation);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn subscribe(&self) -> channel::Receiver<Status> {
        self.shared.status().subscribe()
    }
}

/// What [`retry`](crate::retry) needs.
impl CredentialStore {
    pub(crate) fn name(&self) -> &Arc<str> {
        self.shared.name()
    }

    /// From now on, keeps the credential before the current one for so long after a rotation.
    pub(crate) fn keep_previous_for(&self, overlap: Duration) {
        self.shared.keep_previous_for(overlap);
    }

    /// The credential before the current one, if the rotation is not longer ago than `overlap` and fal has not
    /// refused it.
    pub(crate) fn previous(&self, overlap: Duration) -> Option<Snapshot> {
        self.shared.previous(overlap)
    }

    /// fal, or the application behind it, has refused this credential.
    pub(crate) fn note_refused(&self, generation: Generation, reason: Reason) {
        self.shared.note_refused(generation, reason);
    }

    /// Has the driver look for a newer credential than this one, as [`reload_past`](Self::reload_past), but does not
    /// wait for it.
    pub(crate) fn ask_past(&self, refused: Generation) {
        if let Some(driver) = &self.shared.driver {
            self.shared.demand_past(driver, refused, false);
        }
    }

    /// Has the driver look for a newer credential than `refused`, and waits for it until `wait_for` or the timeout ends
    /// the wait.
    pub(crate) async fn wait_past(&self, refused: Generation, wait_for: WaitFor, timeout: Duration) -> Waited {
        wait::wait_past(&self.shared, refused, wait_for, timeout).await
    }
}

fn nothing_there(source: Arc<str>) -> SourceError {
    let message = match source.strip_prefix("env:").and_then(|variables| variables.split(',').next()) {
        Some(first) => format!("nothing is set: set {first}; keys are at fal.ai/dashboard/keys"),
        None => "has no credential".to_owned(),
    };
    SourceError::not_found(source, message)
}

impl fmt::Debug for CredentialStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialStore").field("current", &self.load()).finish_non_exhaustive()
    }
}

/// Options of a [`CredentialStore`] that follows a source.
#[must_use = "a builder does nothing until `build` is called"]
pub struct CredentialStoreBuilder {
    name: Arc<str>,
    source: BoxSource,
    load_timeout: Duration,
    refresh_before: Duration,
    clock: Clock,
    #[cfg(all(feature = "signal", unix))]
    on_sighup: bool,
    #[cfg(feature = "watch")]
    watcher: Option<watch::MakeWatcher>,
}

impl CredentialStoreBuilder {
    /// What to call the store in its [`Status`], and in the `store` label of its metrics. Default: `default`, which is
    /// also what [`fixed`](CredentialStore::fixed) stores are called. At most 64 bytes, none of them control
    /// characters.
    ///
    /// A process with several stores gives each a name of its own, or nobody can tell their metrics apart.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How long one load may take. Default: 10 s. It has nothing to do with the time-outs of requests, which never
    /// wait for a load while there is a credential.
    pub fn load_timeout(mut self, limit: Duration) -> Self {
        self.load_timeout = limit;
        self
    }

    /// How long before a token expires its successor is asked for. Default: 5 min; up to a fifth sooner, and never
    /// in the first half of what was left of the token's life when it came.
    pub fn refresh_before(mut self, window: Duration) -> Self {
        self.refresh_before = window;
        self
    }

    /// Sees changes of the source's files as they come, within milliseconds, besides polling.
    ///
    /// It is the directories that are watched, those of the source's
    /// [`watched_paths`](CredentialSource::watched_paths) and those to which links there lead. An event is a hint
    /// that the store should look now; what it then finds decides. Meanwhile polls are a safety net, every 30 s or at
    /// the source's own interval if that is longer. Where events do not come (the system's limit of watches is
    /// reached, a network file system, Docker's mounts on a Mac), polls go on at the source's own interval: at once if
    /// the directory cannot be watched, from the first change on that no event announced otherwise. Either is logged
    /// once, and never a failure.
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
    #[cfg_attr(docsrs, doc(cfg(feature = "watch")))]
    pub fn watch_files(self) -> Self {
        self.watch_files_with(watch::recommended())
    }

    #[cfg(feature = "watch")]
    fn watch_files_with(mut self, watcher: watch::MakeWatcher) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// Reloads when the process gets a SIGHUP, as operators are used to (`systemctl reload`, `kill -HUP`).
    ///
    /// It is a [`reload`](CredentialStore::reload): the load begins after the signal, also when one is under way, and
    /// what comes of it is in the [`Status`] and the log. From [`build`](Self::build) on, SIGHUP does not end the
    /// process any more, also when the store is gone.
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
    #[cfg_attr(docsrs, doc(cfg(all(feature = "signal", unix))))]
    pub fn reload_on_sighup(mut self) -> Self {
        self.on_sighup = true;
        self
    }

    /// The wall clock, against which tokens expire.
    #[cfg(test)]
    fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Loads the first credential and starts the driver on the current Tokio runtime.
    ///
    /// That runtime must go on running: one that is kept but not driven (a `current_thread` runtime outside of
    /// `block_on`) polls nothing and lets a `reload()` wait.
    ///
    /// # Errors
    /// When the source has no credential, fails, panics or takes longer than the
    /// [load time-out](Self::load_timeout); outside a Tokio runtime; when SIGHUP is wanted and cannot be had; and when
    /// the [name](Self::name) is empty, too long or not printable.
    ///
    /// # Panics
    /// On a Tokio runtime whose timer is not enabled, or, when SIGHUP is wanted, its I/O.
    pub async fn build(self) -> Result<CredentialStore, SourceError> {
        let Self { name, source, load_timeout, refresh_before, clock, .. } = self;
        let source_name: Arc<str> = source.name().into();
        if name.is_empty() || name.len() > MAX_NAME_LEN || name.chars().any(char::is_control) {
            let hint = "the name of a store has 1 to 64 bytes and no control characters: see `name` of its builder";
            return Err(SourceError::new(source_name, hint));
        }
        if tokio::runtime::Handle::try_current().is_err() {
            let hint = "a store that reloads needs a Tokio runtime: build it inside one, or use `from_env` or `fixed`";
            return Err(SourceError::new(source_name, hint));
        }
        #[cfg(all(feature = "signal", unix))]
        let hangups = if self.on_sighup {
            let failed = |error| SourceError::io(Arc::clone(&source_name), "cannot listen to SIGHUP", error);
            Some(signal::hangups().map_err(failed)?)
        } else {
            None
        };
        let first = driver::load_once(&source, &source_name, load_timeout)
            .await?
            .ok_or_else(|| nothing_there(Arc::clone(&source_name)))?;

        let (wanted, wanted_by_handles) = channel::channel(0);
        let (finished_by_driver, finished) = channel::channel(Finished::first());
        let first_source = first.source_arc().unwrap_or(&source_name).clone();
        let hints = Arc::new(Hints::default());
        #[cfg(feature = "watch")]
        if let Some(watcher) = self.watcher {
            tokio::spawn(watch::run(source.clone(), watcher, Arc::clone(&hints), finished.clone()));
        }
        #[cfg(all(feature = "signal", unix))]
        let until_driver_ends = finished.clone();
        let link = DriverLink { wanted, finished };
        let shared = Arc::new(Shared::new(name, first, first_source, Some(link), clock.clone()));
        let driver = Driver {
            schedule: Schedule::new(refresh_before, driver::poll_interval(&source, false), clock),
            source,
            source_name,
            shared: Arc::downgrade(&shared),
            wanted: wanted_by_handles,
            finished: finished_by_driver,
            hints,
            load_timeout,
        };
        tokio::spawn(driver.run());
        #[cfg(all(feature = "signal", unix))]
        if let Some(hangups) = hangups {
            tokio::spawn(signal::reload(hangups, Arc::downgrade(&shared), until_driver_ends));
        }
        Ok(CredentialStore { shared })
    }
}

impl fmt::Debug for CredentialStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialStoreBuilder")
            .field("name", &self.name)
            .field("source", &self.source)
            .field("load_timeout", &self.load_timeout)
            .field("refresh_before", &self.refresh_before)
            .finish_non_exhaustive()
    }
}

/// What came of a reload that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reloaded {
    /// There is a newer credential than before.
    Changed(Generation),
    /// The source brought the same one, or was asked so short a time ago that it was not asked again.
    Unchanged(Generation),
}

#[cfg(test)]
mod tests;
