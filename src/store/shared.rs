//! What the handles and the driver share: the slot, the status, and the rules by which one becomes the next.

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

/// How long `reload_past` asks no more after the source brought a refused credential again: this long at first,
/// then twice as long with each time, each varied by a fifth.
const COOL_DOWN: Duration = Duration::from_secs(1);
const LONGEST_COOL_DOWN: Duration = Duration::from_secs(60);

/// A credential that was replaced is kept no longer than this, whatever somebody asks for.
const LONGEST_OVERLAP: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) struct Shared {
    slot: Slot,
    status: watch::Sender<Status>,
    writer: Mutex<Writer>,
    /// Absent in a store that never reloads. Dropping it, with the last handle, ends the driver.
    pub(super) driver: Option<DriverLink>,
    clock: Clock,
    metrics: StoreMetrics,
}

/// The handles' end of the two channels to the driver.
pub(super) struct DriverLink {
    /// The number of the load that somebody waits for.
    pub(super) wanted: watch::Sender<u64>,
    /// The last load that came to an end. Closed when the driver is gone.
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
    /// The last load that brought something else than the one before.
    #[cfg_attr(not(feature = "watch"), allow(dead_code))] // it is for those who watch
    pub(super) last_change: u64,
}

impl Finished {
    /// The load before the driver's first one.
    fn first() -> Self {
        Self { load: 0, result: Ok(()), last_change: 0 }
    }
}

/// What only one writer at a time may touch. Held for a few instructions, never across an await.
#[derive(Default)]
struct Writer {
    /// What the source brought last. It is not the current credential after a `replace`.
    last_loaded: Option<Credential>,
    /// The load that brought it first.
    last_change: u64,
    loads_begun: u64,
    loading: bool,
    /// What was the current one when somebody last asked for a load that is still to come or to end.
    current_when_asked: Option<Generation>,
    /// Somebody waits for a load because fal refused the current credential.
    load_is_for_refusal: bool,
    cool_down: Option<CoolDown>,
    /// The generation for which a load was made during a cool-down, and when.
    last_chance: Option<(Generation, Instant)>,
    /// When fal has last refused the current credential.
    refused_at: Option<Instant>,
    /// How long to keep the credential before the current one. Not at all, unless somebody says so.
    overlap: Duration,
    previous: Option<Previous>,
}

/// The credential before the current one: fal may not know the current one yet.
struct Previous {
    snapshot: Snapshot,
    replaced_at: Instant,
}

struct CoolDown {
    step: u32,
    until: Instant,
}

/// What came of a load.
struct Settled {
    load: u64,
    last_change: u64,
    /// The new snapshot, if there is one.
    result: Result<Option<Snapshot>, SourceError>,
    /// How many loads in a row had failed before.
    earlier_failures: u32,
}

/// What there is to do for somebody whose credential was refused.
pub(super) enum Past {
    /// Nothing: a newer one is here.
    Newer(Generation),
    /// Nothing for now: the source was asked a moment ago.
    CoolingDown { until: Instant, answer: Result<Generation, SourceError> },
    /// To wait for the end of this load, which somebody may have begun already.
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
            // Where there is no source, a credential that was replaced should not be kept any longer.
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
            driver.wanted.send_modify(|_| {}); // it looks at the new expiry
        }
        next.generation()
    }

    /// Asks for a load that begins after this call.
    pub(super) fn demand(&self, driver: &DriverLink) -> u64 {
        let mut writer = self.writer();
        writer.current_when_asked = Some(self.slot.load().generation());
        want(driver, writer.loads_begun + 1)
    }

    /// Asks for a newer credential than the one that was refused. One load answers everyone who asks meanwhile.
    ///
    /// The last chance of somebody who waits is a load even during a cool-down, but one a minute at most.
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
        // A poll must not undo a `replace` with what the source had all along. Whoever asks for a load wants what the
        // source has in place of what was current then, and not in place of a replacement that came since.
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
        writer.load_is_for_refusal = false; // that was the one before
        // One that was refused is no way back. And where no driver sees to it, it would be kept for ever.
        let is_way_back =
            writer.refused_at.take().is_none_or(|at| at.elapsed() >= writer.overlap) && self.driver.is_some();
        writer.previous = (is_way_back && !writer.overlap.is_zero())
            .then(|| Previous { snapshot: current.clone(), replaced_at: Instant::now() });
        self.slot.publish(next.clone());
        self.status.send_modify(|status| *status = status.rotated(&next));
        next
    }

    /// Returns how many loads in a row had failed before.
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
        // Only what says that fal does not know the key: any other 401, for one app that nobody may use, must not take
        // the way back from everybody else.
        if reason != Reason::UnknownCredential {
            return;
        }
        // As long as there is a way back from it, it may only be early: fal does not know it yet.
        if is_current && writer.previous.is_none() {
            writer.refused_at = Some(Instant::now());
        }
        if writer.previous.as_ref().is_some_and(|previous| previous.snapshot.generation() == generation) {
            writer.previous = None;
        }
    }

    /// Forgets the credential before the current one if its time is over, else says when it will be.
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
        self.writer().previous = None; // nobody is left to forget it later
        self.status.send_modify(|status| status.driver = DriverState::Ended);
        events::driver_ended(self.load().source());
    }

    /// Has the metrics say what the store holds.
    fn show(&self) {
        self.metrics.show(|| {
            let status = self.status.borrow();
            (status.key_id.clone(), status.loaded_at)
        });
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // Nothing in here leaves the state half-changed when it panics.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn announce(next: &Snapshot) {
    events::rotated(next.source(), next.credential().key_id(), next.generation().get());
}

/// After a load that a refusal asked for. Also when it brought another credential: a source that has a new one each
/// time, of which fal takes none, must not be asked for each request.
fn cool_down(writer: &mut Writer) {
    let now = Instant::now();
    // One that has been over for long belongs to another story.
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
