//! The state that the handles and the driver share, and the rules by which one credential follows another.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    clock::Clock,
    slot::{Slot, Snapshot},
    status::{DriverState, Status},
};
use crate::{
    backoff::{exponential, jittered},
    credential::Credential,
    error::{Reason, SourceError},
    events::{self, StoreMetrics},
    generation::Generation,
};

/// How long the source is not asked again for the sake of a refusal, after it has been asked for one. The cool-down
/// doubles with each time and is jittered.
const COOL_DOWN: Duration = Duration::from_secs(1);
const LONGEST_COOL_DOWN: Duration = Duration::from_secs(60);

/// The previous credential is never kept longer than this.
const LONGEST_OVERLAP: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) struct Shared {
    slot: Slot,
    status: watch::Sender<Status>,
    writer: Mutex<Writer>,
    /// Absent in a store that never reloads. The driver ends when this is dropped together with the last handle.
    pub(super) driver: Option<DriverLink>,
    clock: Clock,
    metrics: StoreMetrics,
}

/// The handles' end of the two channels to the driver.
pub(super) struct DriverLink {
    /// The number of the last load that was asked for.
    pub(super) wanted: watch::Sender<u64>,
    /// The last load that has ended. The channel is closed when the driver is gone.
    pub(super) finished: watch::Receiver<Finished>,
}

/// The driver's end of the same channels.
pub(super) struct HandlesLink {
    pub(super) wanted: watch::Receiver<u64>,
    pub(super) finished: watch::Sender<Finished>,
}

/// The channels between the handles of a store and its driver.
pub(super) fn link() -> (DriverLink, HandlesLink) {
    let (wanted, wanted_by_handles) = watch::channel(0);
    let (finished_by_driver, finished) = watch::channel(Finished::first());
    (DriverLink { wanted, finished }, HandlesLink { wanted: wanted_by_handles, finished: finished_by_driver })
}

impl DriverLink {
    pub(super) fn is_gone(&self) -> bool {
        self.finished.has_changed().is_err()
    }
}

#[derive(Clone, Debug)]
pub(super) struct Finished {
    pub(super) load: u64,
    pub(super) result: Result<(), SourceError>,
    /// The last load that brought another credential than the previous load.
    #[cfg_attr(not(feature = "watch"), allow(dead_code))] // only the file watcher reads it
    pub(super) last_change: u64,
}

impl Finished {
    /// The load in `build`, which comes before those of the driver.
    fn first() -> Self {
        Self { load: 0, result: Ok(()), last_change: 0 }
    }
}

/// The state that only one writer at a time may touch. It is locked for a few instructions, never across an await.
#[derive(Default)]
struct Writer {
    /// The credential that the source brought last. After a `replace` it is not the current one.
    last_loaded: Option<Credential>,
    /// The first load that brought it.
    last_change: u64,
    loads_begun: u64,
    loading: bool,
    /// The current generation when a load was last asked for, as long as that load has not ended.
    current_when_asked: Option<Generation>,
    /// Whether the next load to end was asked for because fal refused the current credential.
    load_is_for_refusal: bool,
    cool_down: Option<CoolDown>,
    /// The generation for which a load was last made during a cool-down, and when.
    last_chance: Option<(Generation, Instant)>,
    /// When fal has last refused the current credential.
    refused_at: Option<Instant>,
    /// How long to keep the previous credential. Zero until a retry layer asks for more.
    overlap: Duration,
    previous: Option<Previous>,
}

/// The previous credential, for as long as fal may not know the current one yet.
struct Previous {
    snapshot: Snapshot,
    replaced_at: Instant,
}

struct CoolDown {
    step: u32,
    until: Instant,
}

/// How a load has ended.
struct Settled {
    load: u64,
    last_change: u64,
    /// The new snapshot, if there is one.
    result: Result<Option<Snapshot>, SourceError>,
    /// How many loads in a row had failed before this one.
    earlier_failures: u32,
}

/// The answer to a caller whose credential was refused.
pub(super) enum Past {
    /// There is a newer one.
    Newer(Generation),
    /// The source is not asked again before `until`. This was its last answer.
    CoolingDown { until: Instant, answer: Result<Generation, SourceError> },
    /// This load will answer. `joined` if it was asked for before.
    Load { number: u64, joined: bool },
}

impl Shared {
    pub(super) fn new(
        name: Arc<str>,
        first: Credential,
        source: &Arc<str>,
        driver: Option<DriverLink>,
        clock: Clock,
    ) -> Self {
        let state = if driver.is_some() { DriverState::Running } else { DriverState::Absent };
        let snapshot = Snapshot::new(first.clone(), Generation::FIRST, source);
        let shared = Self {
            metrics: StoreMetrics::new(Arc::clone(&name)),
            status: watch::Sender::new(Status::new(name, &snapshot, &clock, state)),
            slot: Slot::new(snapshot),
            // A store without a source should not keep a credential after it was replaced.
            writer: Mutex::new(Writer { last_loaded: driver.is_some().then_some(first), ..Writer::default() }),
            driver,
            clock,
        };
        shared.show();
        shared
    }

    pub(super) fn name(&self) -> &Arc<str> {
        self.metrics.store()
    }

    #[inline]
    pub(super) fn load(&self) -> Snapshot {
        self.slot.load()
    }

    pub(super) fn status(&self) -> &watch::Sender<Status> {
        &self.status
    }

    /// Makes a credential the current one whatever the source says.
    pub(super) fn replace(&self, credential: Credential) -> Generation {
        let mut writer = self.writer();
        let current = self.slot.load();
        if current.credential().same_value(&credential) {
            return current.generation();
        }
        let next = self.publish(&mut writer, &current, credential, &"replaced".into());
        writer.cool_down = None;
        drop(writer);
        announce(&next);
        self.show();
        if let Some(driver) = &self.driver {
            driver.wanted.send_modify(|_| {}); // wakes the driver, which looks at the new expiry
        }
        next.generation()
    }

    /// Asks for a load that begins after this call.
    pub(super) fn demand(&self, driver: &DriverLink) -> u64 {
        let mut writer = self.writer();
        writer.current_when_asked = Some(self.slot.load().generation());
        want(driver, writer.loads_begun + 1)
    }

    /// Asks for a newer credential than the one that was refused. One load answers all who ask at the same time.
    ///
    /// The last chance of a waiting request is a load even during a cool-down, but at most one a minute.
    pub(super) fn demand_past(&self, driver: &DriverLink, refused: Generation, last_chance: bool) -> Past {
        let mut writer = self.writer();
        let current = self.slot.load().generation();
        if current > refused {
            return Past::Newer(current);
        }
        let last_chance_used =
            writer.last_chance.is_some_and(|(of, at)| of == current && at.elapsed() < LONGEST_COOL_DOWN);
        let ignore_cool_down = last_chance && !last_chance_used;
        if ignore_cool_down {
            writer.last_chance = Some((current, Instant::now()));
        }
        if let Some(&CoolDown { until, .. }) =
            writer.cool_down.as_ref().filter(|cool_down| !ignore_cool_down && Instant::now() < cool_down.until)
        {
            return Past::CoolingDown {
                until,
                answer: self.status.borrow().last_error.clone().map_or(Ok(current), Err),
            };
        }
        writer.current_when_asked = Some(current);
        writer.load_is_for_refusal = true;
        let number = writer.loads_begun + u64::from(!writer.loading);
        let joined = writer.loading || *driver.wanted.borrow() >= number;
        Past::Load { number: want(driver, number), joined }
    }

    pub(super) fn begin_load(&self) {
        let mut writer = self.writer();
        writer.loads_begun += 1;
        writer.loading = true;
    }

    /// Publishes what a load brought, if it is valid and changed; otherwise the last good one stays.
    pub(super) fn finish_load(&self, source: &Arc<str>, loaded: Result<Option<Credential>, SourceError>) -> Finished {
        let settled = self.settle(source, loaded);
        self.tell(&settled);
        Finished { load: settled.load, result: settled.result.map(drop), last_change: settled.last_change }
    }

    /// Everything that changes when a load ends, under the lock.
    fn settle(&self, source: &Arc<str>, loaded: Result<Option<Credential>, SourceError>) -> Settled {
        let mut writer = self.writer();
        writer.loading = false;
        let is_for_refusal = writer.load_is_for_refusal;
        let result = self.accept(&mut writer, source, loaded);
        let earlier_failures = self.record(&result);
        writer.load_is_for_refusal = false;
        if is_for_refusal {
            cool_down(&mut writer);
        } else if matches!(result, Ok(Some(_))) {
            writer.cool_down = None;
        }
        if self.driver.as_ref().is_none_or(|driver| *driver.wanted.borrow() <= writer.loads_begun) {
            writer.current_when_asked = None;
        }
        Settled { load: writer.loads_begun, last_change: writer.last_change, result, earlier_failures }
    }

    /// The metrics and events of a load that has ended. The lock is not held, as whoever listens to the events may be
    /// slow, or look at the store.
    fn tell(&self, settled: &Settled) {
        self.metrics.loaded(match &settled.result {
            Ok(Some(_)) => "changed",
            Ok(None) => "unchanged",
            Err(_) => "failed",
        });
        self.show();
        let current = self.load();
        let key_id = current.credential().key_id();
        match &settled.result {
            Ok(next) => {
                if settled.earlier_failures > 0 {
                    events::recovered(current.source(), key_id, settled.earlier_failures);
                }
                next.iter().for_each(announce);
            }
            Err(error) => events::load_failed(error, key_id, settled.earlier_failures.saturating_add(1)),
        }
    }

    /// The new snapshot, if there is one.
    fn accept(
        &self,
        writer: &mut Writer,
        source: &Arc<str>,
        loaded: Result<Option<Credential>, SourceError>,
    ) -> Result<Option<Snapshot>, SourceError> {
        let Some(candidate) = loaded? else {
            return Err(SourceError::not_found(Arc::clone(source), "has no credential any more"));
        };
        let (current, now) = (self.slot.load(), self.clock.now());
        if candidate.is_expired_at(now) && !current.credential().is_expired_at(now) {
            return Err(SourceError::invalid(Arc::clone(source), "brought a token that has expired already"));
        }
        // A poll must not undo a `replace` with what the source had all along. An explicit reload may overwrite what
        // was current when it was asked for, but not a `replace()` made since.
        let is_new = !writer.last_loaded.as_ref().is_some_and(|last| last.same_value(&candidate));
        if is_new {
            writer.last_change = writer.loads_begun;
        }
        let is_wanted = is_new || writer.current_when_asked == Some(current.generation());
        writer.last_loaded = Some(candidate.clone());
        if !is_wanted || candidate.same_value(current.credential()) {
            return Ok(None);
        }
        Ok(Some(self.publish(writer, &current, candidate, source)))
    }

    fn publish(&self, writer: &mut Writer, current: &Snapshot, credential: Credential, source: &Arc<str>) -> Snapshot {
        let next = Snapshot::new(credential, current.generation().next(), source);
        writer.load_is_for_refusal = false; // the refusal was of the previous credential
        // Do not go back to a credential that was refused. And without a driver, nothing would ever forget it.
        let is_way_back =
            writer.refused_at.take().is_none_or(|at| at.elapsed() >= writer.overlap) && self.driver.is_some();
        writer.previous = (is_way_back && !writer.overlap.is_zero())
            .then(|| Previous { snapshot: current.clone(), replaced_at: Instant::now() });
        self.slot.publish(next.clone());
        self.status.send_modify(|status| *status = status.rotated(&next));
        next
    }

    /// Notes in the status how a load ended. Returns how many loads in a row had failed before it.
    fn record<T>(&self, result: &Result<T, SourceError>) -> u32 {
        let mut failures = 0;
        self.status.send_if_modified(|status| {
            failures = status.consecutive_failures;
            status.last_error = result.as_ref().err().cloned();
            status.consecutive_failures = if result.is_err() { failures.saturating_add(1) } else { 0 };
            if result.is_ok() {
                status.checked_at = self.clock.now();
            }
            result.is_err() || failures > 0
        });
        failures
    }

    pub(super) fn keep_previous_for(&self, overlap: Duration) {
        let mut writer = self.writer();
        writer.overlap = writer.overlap.max(overlap.min(LONGEST_OVERLAP));
    }

    pub(super) fn previous(&self, overlap: Duration) -> Option<Snapshot> {
        let writer = self.writer();
        let previous = writer.previous.as_ref().filter(|previous| previous.replaced_at.elapsed() < overlap)?;
        Some(previous.snapshot.clone())
    }

    pub(super) fn note_refused(&self, generation: Generation, reason: Reason) {
        let mut writer = self.writer();
        let is_current = self.slot.load().generation() == generation;
        if is_current {
            self.status.send_if_modified(|status| status.note_refusal(reason));
        }
        // Only an unknown key counts here. Any other 401, such as that of one private app, must not take the previous
        // credential away from all other requests.
        if reason != Reason::UnknownCredential {
            return;
        }
        // While there is a previous credential, the current one may only be too new: fal does not know it yet.
        if is_current && writer.previous.is_none() {
            writer.refused_at = Some(Instant::now());
        }
        if writer.previous.as_ref().is_some_and(|previous| previous.snapshot.generation() == generation) {
            writer.previous = None;
        }
    }

    /// Forgets the previous credential if its time is over, else returns when that will be.
    pub(super) fn forget_previous(&self) -> Option<Instant> {
        let mut writer = self.writer();
        let until = writer.previous.as_ref()?.replaced_at + writer.overlap;
        if until <= Instant::now() {
            writer.previous = None;
            return None;
        }
        Some(until)
    }

    pub(super) fn driver_ended(&self) {
        self.writer().previous = None; // nothing would forget it later
        self.status.send_modify(|status| status.driver = DriverState::Ended);
        events::driver_ended(self.load().source());
    }

    /// Sets the metrics to what the store holds.
    fn show(&self) {
        self.metrics.show(|| {
            let status = self.status.borrow();
            (status.key_id.clone(), status.loaded_at)
        });
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic cannot leave the state half-changed.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn announce(next: &Snapshot) {
    events::rotated(next.source(), next.credential().key_id(), next.generation().get());
}

/// Starts a cool-down after any load caused by a refusal, even if it brought a new credential: a source that keeps
/// producing credentials which fal rejects must not be loaded once per request.
fn cool_down(writer: &mut Writer) {
    let now = Instant::now();
    // A cool-down that ended long ago does not count any more.
    let recent = writer.cool_down.as_ref().filter(|last| now < last.until + LONGEST_COOL_DOWN);
    let step = recent.map_or(0, |last| last.step.saturating_add(1));
    let wait = jittered(exponential(COOL_DOWN, step, LONGEST_COOL_DOWN));
    writer.cool_down = Some(CoolDown { step, until: now + wait });
}

fn want(driver: &DriverLink, load: u64) -> u64 {
    driver.wanted.send_if_modified(|wanted| {
        let later = load > *wanted;
        *wanted = load.max(*wanted);
        later
    });
    load
}
