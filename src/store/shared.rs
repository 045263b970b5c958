//! The state that the handles and the driver share, and the rules by which one credential follows another.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    clock::Clock,
    evidence::{DOUBT_IS_CONFIRMED, Evidence, Mark, Witness},
    pace::{Claim, Paces, Urgency},
    slot::{Slot, Snapshot},
    standby::{Candidate, Standby},
    status::{DriverState, Status},
};
use crate::{
    application::Application,
    credential::Credential,
    error::{Reason, SourceError},
    events::{self, StoreMetrics},
    generation::Generation,
};

/// A credential that was replaced is kept no longer than this, whatever a layer asks for.
const LONGEST_OVERLAP: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) const DEFAULT_NAME: &str = "default";

pub(super) struct Shared {
    slot: Slot,
    status: watch::Sender<Status>,
    writer: Mutex<Writer>,
    /// Whether some requests go out with another credential than the one in use.
    has_tries: AtomicBool,
    /// What makes evidence tell this store.
    me: Weak<Self>,
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
struct Writer {
    /// The credential that the source brought last. After a `replace` it is not the current one.
    last_loaded: Option<Credential>,
    /// The first load that brought it.
    last_change: u64,
    loads_begun: u64,
    last_load_began: Option<Instant>,
    loading: bool,
    /// The credential of which the source is to be told that fal has refused it.
    refused: Option<Snapshot>,
    /// The refused credential of which the last load was told.
    told: Option<Generation>,
    /// The current generation when a load was last asked for, as long as that load has not ended.
    current_when_asked: Option<Generation>,
    paces: Paces,
    /// The generation that was given last. Its credential may be gone, as the source may take it back.
    newest: Generation,
    /// Since when the credential in use has been refused without being accepted.
    doubted: Option<(Mark, Instant)>,
    /// How long to keep the previous credential. Not at all, unless a layer asks for it.
    overlap: Duration,
    standby: Standby,
}

impl Writer {
    fn new(last_loaded: Option<Credential>) -> Self {
        Self {
            last_loaded,
            last_change: 0,
            loads_begun: 0,
            last_load_began: None,
            loading: false,
            refused: None,
            told: None,
            current_when_asked: None,
            paces: Paces::default(),
            newest: Generation::FIRST,
            doubted: None,
            overlap: Duration::ZERO,
            standby: Standby::Nothing,
        }
    }
}

/// How a load has ended.
struct Settled {
    load: u64,
    last_change: u64,
    /// The rotation, if there was one.
    result: Result<Option<Rotation>, SourceError>,
    /// How many loads in a row had failed before this one.
    earlier_failures: u32,
}

/// The snapshots before and after a rotation.
struct Rotation {
    previous: Snapshot,
    next: Snapshot,
}

impl Rotation {
    fn announce(&self) {
        events::rotated(
            self.next.source(),
            self.next.credential(),
            self.next.generation().get(),
            self.previous.credential(),
            self.previous.generation().get(),
        );
    }
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
    ) -> Arc<Self> {
        let state = if driver.is_some() { DriverState::Running } else { DriverState::Absent };
        let shared = Arc::new_cyclic(|me: &Weak<Self>| {
            let evidence = Arc::new(Evidence::new(me.clone()));
            let snapshot = Snapshot::new(first.clone(), Generation::FIRST, source, evidence);
            Self {
                metrics: StoreMetrics::new(Arc::clone(&name)),
                status: watch::Sender::new(Status::new(name, &snapshot, &clock, state)),
                slot: Slot::new(snapshot),
                // A store without a source should not keep a credential after it was replaced.
                writer: Mutex::new(Writer::new(driver.is_some().then_some(first))),
                has_tries: AtomicBool::new(false),
                me: me.clone(),
                driver,
                clock,
            }
        });
        shared.show();
        shared
    }

    /// Whether this store has issued the snapshot.
    pub(super) fn issued(&self, snapshot: &Snapshot) -> bool {
        snapshot.evidence().is_of(std::ptr::from_ref(self).cast())
    }

    pub(super) fn name(&self) -> &Arc<str> {
        self.metrics.store()
    }

    #[inline]
    pub(super) fn load(&self) -> Snapshot {
        self.slot.load()
    }

    /// The newest credential, in use or not.
    pub(super) fn newest(&self) -> Generation {
        self.status.borrow().newest
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
        let rotation = self.publish(&mut writer, current, credential, &"replaced".into());
        writer.paces.reset();
        drop(writer);
        rotation.announce();
        self.show();
        if let Some(driver) = &self.driver {
            driver.wanted.send_modify(|_| {}); // wakes the driver, which looks at the new expiry
        }
        rotation.next.generation()
    }

    /// Asks for a load that begins after this call.
    pub(super) fn demand(&self, driver: &DriverLink) -> u64 {
        let mut writer = self.writer();
        writer.current_when_asked = Some(self.slot.load().generation());
        want(driver, writer.loads_begun + 1)
    }

    /// Asks for a newer credential than the one that was refused, because of this claim. One load answers all who ask at
    /// the same time.
    pub(super) fn demand_past(&self, driver: &DriverLink, refused: Generation, claim: Claim, urgency: Urgency) -> Past {
        let mut writer = self.writer();
        let newest = self.newest();
        if newest > refused {
            return Past::Newer(newest);
        }
        let current = self.slot.load().generation();
        let last_counts = match urgency {
            Urgency::Normal | Urgency::LastChance => writer.loading,
            Urgency::Since(time) => writer.last_load_began.is_some_and(|began| began >= time),
        };
        let is_answered = last_counts && matches!(urgency, Urgency::Since(_));
        if !is_answered && let Some(until) = writer.paces.cooling_until(claim, current, urgency) {
            return Past::CoolingDown {
                until,
                answer: self.status.borrow().last_error.clone().map_or(Ok(current), Err),
            };
        }
        if !last_counts || writer.loading {
            writer.current_when_asked = Some(current);
            writer.paces.asked(claim);
        }
        // A load under way may bring a newer one all the same. If it does not, another one follows at once.
        if claim.reason.is_cured_by_another_key() && !(last_counts && writer.told == Some(refused)) {
            let newest = writer.standby.newest_snapshot().cloned().unwrap_or_else(|| self.slot.load());
            writer.refused = Some(newest).filter(|newest| newest.generation() == refused);
        }
        let number = writer.loads_begun + u64::from(!last_counts);
        let joined = last_counts || *driver.wanted.borrow() >= number;
        Past::Load { number: want(driver, number), joined }
    }

    /// Whether fal has refused the newest credential, and the source was not told so.
    pub(super) fn is_refusal_untold(&self) -> bool {
        self.writer().refused.is_some()
    }

    /// Returns the credential of which the source is to be told that fal has refused it.
    pub(super) fn begin_load(&self) -> Option<Credential> {
        let mut writer = self.writer();
        writer.loads_begun += 1;
        writer.last_load_began = Some(Instant::now());
        writer.loading = true;
        let refused = writer.refused.take();
        writer.told = refused.as_ref().map(Snapshot::generation);
        refused.map(|snapshot| snapshot.credential().clone())
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
        // If the source was not told of a refusal yet, the next load ends what that has asked for.
        let is_told = writer.refused.is_none();
        let is_for_refusal = writer.paces.load_ended(is_told);
        let result = self.accept(&mut writer, source, loaded);
        let earlier_failures = self.record(&result);
        if !is_for_refusal && matches!(result, Ok(Some(_))) {
            writer.paces.reset();
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
        let credential = current.credential();
        match &settled.result {
            Ok(rotation) => {
                if settled.earlier_failures > 0 {
                    events::recovered(current.source(), credential, settled.earlier_failures);
                }
                rotation.iter().for_each(Rotation::announce);
            }
            Err(error) => events::load_failed(error, credential, settled.earlier_failures.saturating_add(1)),
        }
    }

    /// Publishes what was loaded if it has changed and may follow the current credential.
    fn accept(
        &self,
        writer: &mut Writer,
        source: &Arc<str>,
        loaded: Result<Option<Credential>, SourceError>,
    ) -> Result<Option<Rotation>, SourceError> {
        let loaded = loaded.map_err(|error| {
            let current = self.slot.load();
            let standby = writer.standby.snapshot(Duration::MAX).map(Snapshot::credential);
            let known = [Some(current.credential()), standby, writer.last_loaded.as_ref()];
            error.without(known.into_iter().flatten())
        });
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
        if !is_wanted {
            return Ok(None);
        }
        if let Standby::Newest { snapshot, .. } = &writer.standby {
            if snapshot.credential().same_value(&candidate) {
                return Ok(None); // fal does not take it yet
            }
            if current.credential().same_value(&candidate) {
                self.set_standby(writer, Standby::Nothing); // the source has taken the newest one back
                return Ok(None);
            }
        }
        if candidate.same_value(current.credential()) {
            return Ok(None);
        }
        Ok(Some(self.publish(writer, current, candidate, source)))
    }

    fn publish(&self, writer: &mut Writer, current: Snapshot, credential: Credential, source: &Arc<str>) -> Rotation {
        let (standby, evidence) = match std::mem::take(&mut writer.standby) {
            // The source has gone back to the previous credential. What is known of that stays known.
            Standby::Previous { snapshot, .. } if snapshot.credential().same_value(&credential) => {
                (Standby::Nothing, Arc::clone(snapshot.evidence()))
            }
            // Where no driver sees to it, a previous credential would be kept for ever.
            _ if self.driver.is_none() || writer.overlap.is_zero() => (Standby::Nothing, self.no_evidence()),
            standby => (standby.replaced(&current, writer.doubted.is_some()), self.no_evidence()),
        };
        writer.newest = writer.newest.next();
        let next = Snapshot::new(credential, writer.newest, source, evidence);
        writer.paces.nothing_asked();
        writer.refused = None;
        self.set_standby(writer, standby);
        self.use_snapshot(writer, &next);
        Rotation { previous: current, next }
    }

    fn no_evidence(&self) -> Arc<Evidence> {
        Arc::new(Evidence::new(self.me.clone()))
    }

    /// From now on requests are sent with this one.
    fn use_snapshot(&self, writer: &mut Writer, next: &Snapshot) {
        writer.doubted = None;
        self.slot.publish(next.clone());
        self.status.send_modify(|status| *status = status.rotated(next, writer.newest));
    }

    fn set_standby(&self, writer: &mut Writer, standby: Standby) {
        if writer.standby.is_newest() && !standby.is_newest() {
            self.status.send_modify(Status::nothing_pending);
        }
        self.has_tries.store(standby.is_newest(), Ordering::Relaxed); // and when the newest one is refused
        writer.standby = standby;
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

    /// The credentials that a request to this application may be sent with: the one in use, and the one beside it. A
    /// credential that fal accepts comes first.
    pub(super) fn candidates(&self, application: Application) -> [Option<Candidate>; 2] {
        let writer = self.writer();
        let current = self.slot.load();
        let has_refused = matches!(&writer.standby, Standby::Previous { tries, .. } if tries.has_refused(application));
        let is_set_aside = writer.standby.is_newest();
        let other = writer.standby.snapshot(writer.overlap).map(|other| {
            let snapshot = if has_refused { other.in_place_of(current.generation()) } else { other.clone() };
            Candidate { snapshot, is_set_aside }
        });
        let current = Candidate { snapshot: current, is_set_aside: has_refused };
        match other {
            Some(other) if other.is_accepted() && !current.is_accepted() => [Some(other), Some(current)],
            other => [Some(current), other],
        }
    }

    /// What to send a request with, if not with the credential in use. `carrier` is its application, if it may carry one of
    /// the store's.
    #[inline]
    pub(super) fn send_with(
        &self,
        carrier: impl FnOnce() -> Option<Application>,
        replayable: impl FnOnce() -> bool,
    ) -> Option<Snapshot> {
        if !self.has_tries.load(Ordering::Relaxed) {
            return None;
        }
        let (application, replayable) = (carrier()?, replayable());
        let mut writer = self.writer();
        let overlap = writer.overlap;
        match &mut writer.standby {
            Standby::Nothing => None,
            Standby::Previous { snapshot, since, tries } => {
                let may_work = snapshot.mark().was_ever_accepted() || !tries.has_refused_both(application);
                let is_way_back = since.elapsed() < overlap && tries.has_refused(application) && may_work;
                let newest = self.slot.load().generation();
                (is_way_back && !tries.take(application, replayable, snapshot.mark()))
                    .then(|| snapshot.in_place_of(newest))
            }
            Standby::Newest { snapshot, tries } => {
                let in_use = self.slot.load().mark();
                tries.take(application, replayable, in_use).then(|| snapshot.clone())
            }
        }
    }

    /// fal, or an application behind it, has refused this credential, in a request that was sent when the evidence stood
    /// at `sent`. Returns the evidence as it stands now.
    pub(super) fn note_refused(&self, refused: &Snapshot, sent: Mark, claim: Claim) -> Mark {
        let Claim { application, reason } = claim;
        let mut writer = self.writer();
        // Only this reason says that fal does not know the key. Any other 401, for one app that the key may not use,
        // must take nothing from other requests.
        let is_unknown = reason == Reason::UnknownCredential;
        if is_unknown && !sent.was_ever_accepted() && refused.mark().was_ever_accepted() {
            return sent; // fal has come to know it while the refusal was on its way
        }
        let mark = if is_unknown { refused.evidence().doubt() } else { refused.mark() };
        let current = self.slot.load();
        let is_in_use = current.generation() == refused.generation();
        if is_unknown && self.note_for_tries(&mut writer, application, refused, is_in_use, mark) {
            self.set_aside(writer, &current);
            return mark;
        }
        if !is_in_use {
            // An application that has refused the newest one gets this one only.
            let is_only_one = matches!(&writer.standby, Standby::Previous { snapshot, tries, .. }
                if snapshot.generation() == refused.generation() && tries.has_refused(application));
            if is_unknown && is_only_one && writer.doubted.is_some() {
                self.status.send_if_modified(|status| status.note_refusal(reason));
            }
            return mark;
        }
        // What is being accepted elsewhere is refused by an application, or has just been revoked: time tells.
        let counts = if mark.was_ever_accepted() {
            is_unknown && is_doubt_confirmed(&mut writer, mark, refused.evidence())
        } else {
            if is_unknown {
                writer.doubted.get_or_insert((mark, Instant::now()));
            }
            true
        };
        if counts || matches!(reason, Reason::AccountLocked(_)) {
            self.status.send_if_modified(|status| status.note_refusal(reason));
        }
        mark
    }

    /// While fal has not accepted the newest credential, an application that refuses it gets the previous one. When it
    /// refuses both, the newest one is tried again. Returns whether so many have refused the newest one that all are to get
    /// the previous one.
    fn note_for_tries(
        &self,
        writer: &mut Writer,
        application: Application,
        refused: &Snapshot,
        is_in_use: bool,
        mark: Mark,
    ) -> bool {
        match &mut writer.standby {
            Standby::Previous { snapshot, tries, .. } if is_in_use && !mark.was_ever_accepted() => {
                tries.refused(application, self.clock.now());
                self.has_tries.store(true, Ordering::Relaxed);
                return tries.have_several_refused() && snapshot.mark().was_ever_accepted();
            }
            Standby::Previous { snapshot, tries, .. }
                if snapshot.generation() == refused.generation() && tries.has_refused(application) =>
            {
                tries.other_refused(application, mark);
            }
            Standby::Newest { tries, .. } if is_in_use => tries.other_refused(application, mark),
            _ => {}
        }
        false
    }

    /// Requests go out with the previous credential, until fal accepts this newest one.
    fn set_aside(&self, mut writer: MutexGuard<'_, Writer>, newest: &Snapshot) {
        let (previous, mut tries) = match std::mem::take(&mut writer.standby) {
            Standby::Previous { snapshot, tries, .. } => (snapshot, tries),
            other => {
                writer.standby = other;
                return;
            }
        };
        let refused_at = tries.set_aside().unwrap_or_else(|| self.clock.now());
        self.set_standby(&mut writer, Standby::Newest { snapshot: newest.clone(), tries });
        self.use_snapshot(&mut writer, &previous);
        self.status.send_modify(|status| status.set_pending(newest, refused_at));
        drop(writer);
        let (credential, generation) = (newest.credential(), newest.generation().get());
        events::set_aside(newest.source(), credential, generation, previous.credential());
        self.show();
    }

    /// Forgets the previous credential if its time is over, else says when it will be.
    pub(super) fn forget_previous(&self) -> Option<Instant> {
        let mut writer = self.writer();
        let Standby::Previous { since, .. } = &writer.standby else { return None };
        let until = *since + writer.overlap;
        if until <= Instant::now() {
            self.set_standby(&mut writer, Standby::Nothing);
            return None;
        }
        Some(until)
    }

    pub(super) fn driver_ended(&self) {
        self.set_standby(&mut self.writer(), Standby::Nothing); // nothing is left to forget it later
        self.status.send_modify(|status| status.driver = DriverState::Ended);
        events::driver_ended(self.load().source());
    }

    /// Sets the metrics to what the store holds.
    fn show(&self) {
        self.metrics.show(|| {
            let status = self.status.borrow();
            (status.key_id.clone(), status.loaded_at, status.accepted)
        });
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic cannot leave the state half-changed.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Witness for Shared {
    fn worked_instead_of(&self, newer: Generation) {
        let writer = self.writer();
        let current = self.slot.load();
        if current.generation() == newer && !current.mark().was_ever_accepted() {
            self.set_aside(writer, &current);
        }
    }

    fn accepted(&self, generation: Generation) {
        let mut writer = self.writer();
        writer.paces.accepted();
        writer.refused.take_if(|refused| refused.mark().is_accepted());
        let current = self.slot.load();
        let newest = match &writer.standby {
            Standby::Newest { snapshot, .. } if snapshot.generation() == generation => Some(snapshot.clone()),
            _ => None,
        };
        // Not its generation: the source may have gone back to this credential, which has another one since.
        if newest.is_none() && !current.mark().is_accepted() {
            // Who waits for it looks at its evidence.
            self.status.send_modify(|_| {});
            return;
        }
        writer.doubted = None;
        let is_first = newest.is_some() || !self.status.borrow().accepted;
        if let Some(newest) = &newest {
            self.use_snapshot(&mut writer, newest);
        }
        if writer.newest == generation {
            self.set_standby(&mut writer, Standby::Nothing);
        }
        self.status.send_modify(Status::note_accepted);
        drop(writer);
        if let Some(next) = &newest {
            Rotation { previous: current.clone(), next: next.clone() }.announce();
        }
        if is_first {
            let current = newest.as_ref().unwrap_or(&current);
            events::accepted(current.source(), current.credential(), current.generation().get());
        }
        self.show();
    }
}

fn is_doubt_confirmed(writer: &mut Writer, mark: Mark, evidence: &Evidence) -> bool {
    let had_success = evidence.take_late_success();
    match writer.doubted {
        Some((doubted, since)) if doubted.is_same_doubt(mark) && !had_success => since.elapsed() >= DOUBT_IS_CONFIRMED,
        _ => {
            writer.doubted = Some((mark, Instant::now()));
            false
        }
    }
}

fn want(driver: &DriverLink, load: u64) -> u64 {
    driver.wanted.send_if_modified(|wanted| {
        let later = load > *wanted;
        *wanted = load.max(*wanted);
        later
    });
    load
}

/// The error of a source that has no credential at the start.
pub(super) fn nothing_there(source: Arc<str>) -> SourceError {
    let message = match source.strip_prefix("env:").and_then(|variables| variables.split(',').next()) {
        Some(first) => format!("nothing is set: set {first}; keys are at fal.ai/dashboard/keys"),
        None => "has no credential".to_owned(),
    };
    SourceError::not_found(source, message)
}
