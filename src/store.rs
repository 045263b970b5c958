//! The current credential, and what keeps it current.
//!
//! A [`CredentialStore`] holds one credential for all requests, which [`load`](CredentialStore::load) it without a
//! lock. One task, the *driver*, is the only one that asks the [source](crate::source):
//!
//! 1. [`build`](CredentialStoreBuilder::build) loads once, so that a server without a key fails when it starts.
//! 2. The driver asks again at the source's own interval, ahead of the expiry of a token, when fal has refused the
//!    credential, and when [`reload`](CredentialStore::reload) is called. It says which of
//!    [these reasons](crate::source::LoadReason) it is.
//! 3. A credential that is valid and has changed becomes the next [`Generation`]. Content decides, not timestamps.
//! 4. After a failure (a missing file, half a key, a timeout, a panic) the last good credential stays in place. The
//!    failure is reported in the [`Status`], and the driver tries again after 1 s, 2 s, 4 s, up to the source's
//!    interval or a minute, whichever is shorter. (A source that is never polled waits for the next reload.)
//! 5. The driver ends when the last handle is dropped.
//!
//! With the feature `watch` the driver also loads when a file changes, and with the feature `signal` when the process
//! gets a SIGHUP. The [builder](CredentialStoreBuilder) turns both on.
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

use self::{
    clock::Clock,
    pace::Urgency,
    shared::{DEFAULT_NAME, Past, Shared, nothing_there},
    wait::finished,
};
use crate::{
    application::Application,
    credential::Credential,
    error::{Reason, SourceError},
    source::{CredentialSource as _, EnvSource},
};

mod builder;
mod clock;
mod driver;
mod evidence;
mod pace;
mod shared;
#[cfg(all(feature = "signal", unix))]
mod signal;
mod slot;
mod standby;
mod status;
mod subscription;
mod tries;
mod wait;
#[cfg(feature = "watch")]
mod watch;

pub use self::{
    builder::CredentialStoreBuilder,
    slot::Snapshot,
    status::{Degraded, DriverState, LastRefusal, PendingCredential, Status},
    subscription::Subscription,
};
pub(crate) use self::{
    evidence::Mark,
    pace::Claim,
    standby::Candidate,
    wait::{WaitFor, Waited},
};
pub use crate::{error::ReloadError, generation::Generation};

/// A handle to the current credential: cheap to clone, shared by every layer. See the [module docs](self).
#[doc(alias = "rotate")]
#[doc(alias = "rotation")]
#[doc(alias = "hot reload")]
#[derive(Clone)]
pub struct CredentialStore {
    shared: Arc<Shared>,
}

impl CredentialStore {
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
    /// When none of the variables is set or one is malformed. Also when `FAL_KEY_FILE` names the key, because a file
    /// has to be read again: use [`builder`](Self::builder) with [`EnvSource::file`] then.
    pub fn from_env() -> Result<Self, SourceError> {
        Self::from_fixed_env(&EnvSource::all())
    }

    fn from_fixed_env(source: &EnvSource) -> Result<Self, SourceError> {
        source.load_fixed()?.map(Self::fixed).ok_or_else(|| nothing_there(source.name().into()))
    }

    /// A store with one credential that never reloads; [`replace`](Self::replace) still works. Needs no runtime.
    ///
    /// Make no store for each request: put a customer's [`Credential`] into the request's extensions. With the feature
    /// `metrics` each key of a store is a series, and a recorder keeps a series for ever.
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
        Self { shared: Shared::new(DEFAULT_NAME.into(), credential, &"fixed".into(), None, Clock::system()) }
    }

    /// The current credential, for one request: no lock, no await, no allocation.
    ///
    /// (Only the first call on a thread allocates: `arc-swap` keeps a little state for each thread.) There always is a
    /// current credential. A token that has expired is still returned, because fal's clock decides and not ours.
    #[inline]
    pub fn load(&self) -> Snapshot {
        self.shared.load()
    }

    /// The generation of the current credential.
    pub fn generation(&self) -> Generation {
        self.load().generation()
    }

    /// Asks the source now, whatever its interval.
    ///
    /// The load begins after this call, so it sees whatever was written before it. Calls at the same time share one
    /// load. Dropping the future cancels nothing. After a [`replace`](Self::replace), a reload makes the source's
    /// credential the current one again.
    ///
    /// # Errors
    /// When the load fails (the last good credential stays), when the driver's runtime has ended, and when the store
    /// never reloads.
    pub async fn reload(&self) -> Result<Reloaded, ReloadError> {
        let driver = self.shared.driver.as_ref().ok_or(ReloadError::NeverReloads)?;
        let before = self.shared.newest();
        let result = finished(driver, self.shared.demand(driver)).await?;
        let now = self.shared.newest();
        if now > before {
            return Ok(Reloaded::Changed(now));
        }
        result.map(|()| Reloaded::Unchanged(now)).map_err(ReloadError::Failed)
    }

    /// Asks for a newer credential than one that fal has refused.
    ///
    /// If there is a newer one already, this returns at once. Otherwise all calls at the same time share one load, which
    /// tells the source [which one was refused](crate::source::LoadReason::Refused).
    /// When that load brings the same credential, or fails, the source is not asked again during a cool-down, and
    /// calls get the same answer: 1 s at first, then twice as long with each time, at most a minute (each ±20 %).
    /// Dropping the future cancels nothing.
    ///
    /// # Errors
    /// As [`reload`](Self::reload).
    pub async fn reload_past(&self, refused: Generation) -> Result<Reloaded, ReloadError> {
        let newest = self.shared.newest();
        if newest > refused {
            return Ok(Reloaded::Changed(newest));
        }
        let driver = self.shared.driver.as_ref().ok_or(ReloadError::NeverReloads)?;
        // Of no application: whoever calls this has judged the refusal.
        let claim = Claim { application: Application::at(None, ""), reason: Reason::UnknownCredential };
        loop {
            let (load, joined) = match self.shared.demand_past(driver, refused, claim, Urgency::Normal) {
                Past::Newer(generation) => return Ok(Reloaded::Changed(generation)),
                Past::CoolingDown { .. } if driver.is_gone() => return Err(ReloadError::DriverGone),
                Past::CoolingDown { answer, .. } => {
                    return answer.map(Reloaded::Unchanged).map_err(ReloadError::Failed);
                }
                Past::Load { number, joined } => (number, joined),
            };
            let result = finished(driver, load).await?;
            let now = self.shared.newest();
            if now > refused {
                return Ok(Reloaded::Changed(now));
            }
            // A load that was under way already may not have been told of the refusal. The next one is.
            if !joined {
                return result.map(|()| Reloaded::Unchanged(now)).map_err(ReloadError::Failed);
            }
        }
    }

    /// Makes a credential the current one, whatever the source says, and returns its generation.
    ///
    /// It stays until the source brings something *new*, or until a reload. If the credential is the current one
    /// already, nothing changes.
    pub fn replace(&self, credential: Credential) -> Generation {
        self.shared.replace(credential)
    }

    /// What the store holds, and whether its source answers.
    pub fn status(&self) -> Status {
        self.shared.status().borrow().clone()
    }

    /// Follows the [`status`](Self::status): each rotation, failure and recovery, and the first [refusal](LastRefusal)
    /// of many.
    ///
    /// ```no_run
    /// # async fn example(store: tower_fal::CredentialStore) {
    /// let mut subscription = store.subscribe();
    /// drop(store); // a subscription alone does not keep the driver running
    /// while let Some(status) = subscription.changed().await {
    ///     println!("now at generation {}", status.generation);
    /// }
    /// # }
    /// ```
    pub fn subscribe(&self) -> Subscription {
        Subscription::new(self.shared.status())
    }
}

/// What [`retry`](crate::retry) needs.
impl CredentialStore {
    pub(crate) fn name(&self) -> &Arc<str> {
        self.shared.name()
    }

    /// From now on, keeps the previous credential for so long after a rotation, until fal has accepted the current one.
    pub(crate) fn keep_previous_for(&self, overlap: Duration) {
        self.shared.keep_previous_for(overlap);
    }

    /// Whether this store has issued the snapshot, and not another one.
    pub(crate) fn issued(&self, snapshot: &Snapshot) -> bool {
        self.shared.issued(snapshot)
    }

    /// The credentials that a request to this application may be sent with, the best one first: the one in use, and the one
    /// beside it while fal has not accepted the newest one.
    pub(crate) fn candidates(&self, application: Application) -> [Option<Candidate>; 2] {
        self.shared.candidates(application)
    }

    /// What to send a request with, if not with the credential in use: see [`Standby`](standby::Standby). `carrier` is its
    /// application, if it may carry one of the store's. This costs one relaxed load when fal has accepted the newest one.
    #[inline]
    pub(crate) fn send_with(
        &self,
        carrier: impl FnOnce() -> Option<Application>,
        replayable: impl FnOnce() -> bool,
    ) -> Option<Snapshot> {
        self.shared.send_with(carrier, replayable)
    }

    /// fal, or the application behind it, has refused this credential of this store, in a request that was sent when the
    /// evidence stood at `sent`. Returns the evidence for it.
    pub(crate) fn note_refused(&self, refused: &Snapshot, sent: Mark, claim: Claim) -> Mark {
        self.shared.note_refused(refused, sent, claim)
    }

    /// Has the driver look for a newer credential than this one, as [`reload_past`](Self::reload_past), but does not
    /// wait for it.
    pub(crate) fn ask_past(&self, refused: Generation, claim: Claim) {
        if let Some(driver) = &self.shared.driver {
            self.shared.demand_past(driver, refused, claim, Urgency::Normal);
        }
    }

    /// Has the driver look for a newer credential than `refused`, and waits for it until `wait_for` or the timeout ends
    /// the wait. It also ends when the evidence for one of `tried` changes, which means that fal has accepted it.
    pub(crate) async fn wait_past(
        &self,
        refused: Generation,
        claim: Claim,
        tried: &[(Snapshot, Mark)],
        wait_for: WaitFor,
        timeout: Duration,
    ) -> Waited {
        wait::wait_past(&self.shared, refused, claim, tried, wait_for, timeout).await
    }
}

impl fmt::Debug for CredentialStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialStore").field("current", &self.load()).finish_non_exhaustive()
    }
}

/// The result of a reload that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reloaded {
    /// There is a newer credential than before.
    Changed(Generation),
    /// The source brought the same one, or it was not asked again, because it was asked a moment ago.
    Unchanged(Generation),
}

#[cfg(test)]
mod tests;
