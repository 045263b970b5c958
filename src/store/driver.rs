//! The one task that asks the source. It polls, answers reloads and refreshes tokens before they expire. No failure of
//! the source ends it; it ends with the last handle.

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    clock::Clock,
    shared::{HandlesLink, Shared},
    slot::Snapshot,
};
use crate::{
    backoff::{exponential, jittered},
    credential::Credential,
    error::{SourceError, report},
    generation::Generation,
    source::{BoxSource, CredentialSource as _, DEFAULT_LOAD_TIMEOUT, LoadReason},
};

/// How long to wait after a failed load before the source is asked again. The wait doubles with each failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The longest wait after a failed load. A source with a shorter interval is asked at that interval.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// How often the wall clock is compared with an expiry. A timer alone would be late after the machine has slept.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

pub(super) struct Driver {
    pub(super) source: BoxSource,
    pub(super) source_name: Arc<str>,
    /// Weak, because the driver ends when the last strong reference is dropped.
    pub(super) shared: Weak<Shared>,
    pub(super) handles: HandlesLink,
    pub(super) hints: Arc<Hints>,
    /// The limit of the store; `None` for that of the source.
    pub(super) load_timeout: Option<Duration>,
    pub(super) schedule: Schedule,
}

impl Driver {
    pub(super) async fn run(mut self) {
        while self.turn().await.is_continue() {}
    }

    /// Waits for the next reason to load, and loads if it is one.
    async fn turn(&mut self) -> ControlFlow<()> {
        let shared = self.shared()?;
        self.schedule.follow(&shared.load());
        let forget_at = shared.forget_previous();
        let is_refused = shared.is_refusal_untold();
        drop(shared);
        if is_refused || self.is_demanded() || self.schedule.is_due() {
            return self.load().await;
        }
        tokio::select! {
            asked = self.handles.wanted.changed() => match asked {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()), // the last handle is gone
            },
            () = self.hints.look.notified() => self.load().await,
            () = self.schedule.wait() => ControlFlow::Continue(()),
            () = sleep_until(forget_at) => ControlFlow::Continue(()),
        }
    }

    async fn load(&mut self) -> ControlFlow<()> {
        let shared = self.shared()?;
        let told = match shared.begin_load() {
            Some(refused) => Told::Refused(refused),
            None if self.schedule.is_overdue() => Told::Expiring(shared.load().credential().clone()),
            None => Told::Poll,
        };
        drop(shared);
        let loaded = tokio::select! {
            loaded = load_once(&self.source, &self.source_name, self.load_timeout, told) => loaded,
            () = last_handle_gone(&mut self.handles.wanted) => return ControlFlow::Break(()),
        };
        let shared = self.shared()?;
        let finished = shared.finish_load(&self.source_name, loaded);
        self.schedule.follow(&shared.load());
        // A failing load can start working again without a file event (permissions, a mount), so keep polling at the
        // normal interval.
        let watched = finished.result.is_ok() && self.hints.watched.load(Ordering::Relaxed);
        self.schedule.after_load(&finished.result, poll_interval(&self.source, watched));
        self.handles.finished.send_replace(finished);
        ControlFlow::Continue(())
    }

    fn shared(&self) -> ControlFlow<(), Arc<Shared>> {
        self.shared.upgrade().map_or(ControlFlow::Break(()), ControlFlow::Continue)
    }

    fn is_demanded(&self) -> bool {
        *self.handles.wanted.borrow() > self.handles.finished.borrow().load
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // There are handles left, so the runtime has ended.
        if let Some(shared) = self.shared.upgrade() {
            shared.driver_ended();
        }
    }
}

/// How the file watcher speaks to the driver.
#[derive(Default)]
pub(super) struct Hints {
    look: Notify,
    watched: AtomicBool,
}

#[cfg(feature = "watch")]
impl Hints {
    /// Has the driver load now, because something may have changed. This is not a reload: it does not undo a `replace`.
    pub(super) fn look(&self) {
        self.look.notify_one();
    }

    /// Says whether file events announce changes from now on. Returns whether it was said differently before.
    pub(super) fn set_watched(&self, watched: bool) -> bool {
        self.watched.swap(watched, Ordering::Relaxed) != watched
    }
}

/// What a source is told, in a form that a task can own.
pub(super) enum Told {
    Poll,
    Expiring(Credential),
    Refused(Credential),
}

impl Told {
    fn reason(&self) -> LoadReason<'_> {
        match self {
            Self::Poll => LoadReason::Poll,
            Self::Expiring(credential) => LoadReason::Expiring(credential),
            Self::Refused(credential) => LoadReason::Refused(credential),
        }
    }
}

/// One load of a source that may panic or hang.
pub(super) async fn load_once(
    source: &BoxSource,
    name: &Arc<str>,
    limit: Option<Duration>,
    told: Told,
) -> Result<Option<Credential>, SourceError> {
    let limit = limit.unwrap_or_else(|| load_timeout(source));
    let mut task = JoinSet::new(); // it takes the task with it when it is dropped
    let source = source.clone();
    // Format the error inside the task, in case its `Display` panics.
    task.spawn(async move { source.load_because(told.reason()).await.inspect_err(|error| drop(report(error))) });
    match tokio::time::timeout(limit, task.join_next()).await {
        Ok(Some(Ok(loaded))) => loaded,
        Ok(panicked) => {
            // Dropping the panic payload can panic, too.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(panicked)));
            Err(SourceError::panicked(Arc::clone(name)))
        }
        Err(_) => Err(SourceError::timed_out(Arc::clone(name), limit)),
    }
}

/// The poll interval of the source. If the source panics here, it is polled like one that fails.
pub(super) fn poll_interval(source: &BoxSource, watched: bool) -> Option<Duration> {
    let ask = || if watched { source.poll_interval_while_watched() } else { source.poll_interval() };
    catch_unwind(AssertUnwindSafe(ask)).unwrap_or(Some(LONGEST_RETRY))
}

/// The limit for a load of the source. If the source panics here, the load itself will tell.
fn load_timeout(source: &BoxSource) -> Duration {
    let own = catch_unwind(AssertUnwindSafe(|| source.load_timeout())).ok().flatten();
    own.unwrap_or(DEFAULT_LOAD_TIMEOUT)
}

async fn last_handle_gone(wanted: &mut watch::Receiver<u64>) {
    while wanted.changed().await.is_ok() {}
}

/// When to load next if nothing asks for it.
pub(super) struct Schedule {
    refresh_before: Duration,
    clock: Clock,
    /// The credential to which `refresh_at` belongs.
    generation: Option<Generation>,
    expires_at: Option<SystemTime>,
    /// When the current credential has to be refreshed, by the wall clock.
    refresh_at: Option<SystemTime>,
    /// The next poll, or the next attempt after a failure.
    next: Option<Instant>,
    /// Whether `next` is an attempt to get another credential than the one that is to be refreshed.
    retries: bool,
    /// How many loads in a row have failed, or have brought a token that has expired.
    failures: u32,
}

impl Schedule {
    /// The schedule after the first load, which was successful.
    pub(super) fn new(refresh_before: Duration, poll: Option<Duration>, clock: Clock) -> Self {
        Self {
            refresh_before,
            clock,
            generation: None,
            expires_at: None,
            refresh_at: None,
            next: poll.map(|every| Instant::now() + jittered(every)),
            retries: false,
            failures: 0,
        }
    }

    /// Notes the expiry of the current credential if it is a new one.
    fn follow(&mut self, current: &Snapshot) {
        if self.generation.replace(current.generation()) == Some(current.generation()) {
            return;
        }
        self.expires_at = current.credential().expires_at();
        self.refresh_at = self.expires_at.map(|expiry| {
            let left = expiry.duration_since(self.clock.now()).unwrap_or_default();
            // Up to a fifth sooner, so that replicas with the same token do not ask at the same time. But not in the
            // first half of the time that is left, or a short-lived token would be refreshed again and again.
            let ahead = self.refresh_before.min(left).mul_f64(fastrand::f64().mul_add(0.2, 1.0)).min(left / 2);
            // And not immediately: tokens that have almost expired would make a hot loop.
            if left.is_zero() { expiry } else { (expiry - ahead).max(self.clock.now() + FIRST_RETRY) }
        });
        // Unless it is overdue already, as every token is if our clock is far off.
        if !self.is_overdue() {
            (self.retries, self.failures) = (false, 0);
        }
    }

    fn after_load(&mut self, result: &Result<(), SourceError>, poll: Option<Duration>) {
        self.retries = self.is_overdue();
        let left = self.expires_at.and_then(|expiry| expiry.duration_since(self.clock.now()).ok()).unwrap_or_default();
        let retry = if self.retries && result.is_ok() && !left.is_zero() {
            // The source keeps the token for now, so it is not in a hurry.
            self.failures = 0;
            Some((left / 2).clamp(FIRST_RETRY, LONGEST_RETRY))
        } else if self.retries || (result.is_err() && poll.is_some()) {
            let longest = poll.unwrap_or(LONGEST_RETRY).min(LONGEST_RETRY);
            self.failures = self.failures.saturating_add(1);
            Some(exponential(FIRST_RETRY, self.failures - 1, longest))
        } else {
            self.failures = 0;
            None
        };
        let wait = [retry, poll].into_iter().flatten().min();
        self.next = wait.map(|wait| Instant::now() + jittered(wait));
    }

    fn is_due(&self) -> bool {
        self.next.is_some_and(|next| next <= Instant::now()) || (!self.retries && self.is_overdue())
    }

    fn is_overdue(&self) -> bool {
        self.refresh_at.is_some_and(|at| at <= self.clock.now())
    }

    /// Returns when a load may be due; [`is_due`](Self::is_due) says whether it is.
    async fn wait(&self) {
        // A refresh that brought nothing new waits for its next attempt instead.
        let refresh = self.refresh_at.filter(|_| !self.retries).map(|at| {
            let left = at.duration_since(self.clock.now()).unwrap_or_default();
            Instant::now() + left.min(CLOCK_CHECK)
        });
        sleep_until([self.next, refresh].into_iter().flatten().min()).await;
    }
}

/// Sleeps until then; without a time, for ever.
pub(super) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
