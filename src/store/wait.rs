//! Waiting for a load to end, and for a credential that is newer than a refused one.

use std::{ops::ControlFlow, time::Duration};

use tokio::{
    sync::watch,
    time::{self, Instant, sleep_until, timeout_at},
};

use super::{
    evidence::Mark,
    pace::{Claim, Urgency},
    shared::{DriverLink, Past, Shared},
    slot::Snapshot,
    status::Status,
};
use crate::{
    error::{ReloadError, SourceError},
    generation::Generation,
};

/// How long before the end of a wait the source is asked once more, even during a cool-down.
const LAST_CHANCE: Duration = Duration::from_millis(200);

/// "For ever" must not overflow.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A timer that fires this much too late shows that the process was stopped, or got no time to run.
const LATE: Duration = Duration::from_millis(50);

/// What ends a wait before its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitFor {
    /// A credential that is newer than the refused one. The source is asked again and again.
    Newer,
    /// One answer of the source, whatever it is. If another caller has asked already, there is no wait at all.
    OneAnswer,
}

/// How a wait for a newer credential ended.
#[derive(Debug)]
pub(crate) struct Waited {
    /// Why there is no newer credential, if something went wrong.
    pub(crate) error: Option<ReloadError>,
    /// Whether it was the timeout that ended the wait.
    pub(crate) timed_out: bool,
}

/// Waits until this load has ended, and returns what came of it.
pub(super) async fn finished(driver: &DriverLink, load: u64) -> Result<Result<(), SourceError>, ReloadError> {
    let mut finished = driver.finished.clone();
    let last = finished.wait_for(|last| last.load >= load).await.map_err(|_| ReloadError::DriverGone)?;
    Ok(last.result.clone())
}

/// Has the driver look for a credential that is newer than `refused`, and waits for it, or for fal to accept one of
/// those that were `tried`.
///
/// While a process is stopped, the new credential may arrive and the wait time out. So when the timeout comes late, the
/// source is asked once more, which may take as long as the timeout again.
pub(super) async fn wait_past(
    shared: &Shared,
    refused: Generation,
    claim: Claim,
    tried: &[(Snapshot, Mark)],
    wait_for: WaitFor,
    timeout: Duration,
) -> Waited {
    let Some(driver) = &shared.driver else {
        return Waited { error: Some(ReloadError::NeverReloads), timed_out: false };
    };
    let deadline = Instant::now() + timeout.min(LONGEST_WAIT);
    let last_chance = deadline.checked_sub(LAST_CHANCE).filter(|_| wait_for == WaitFor::Newer);
    let status = shared.status().subscribe();
    let mut wait = Wait { shared, driver, refused, claim, tried, wait_for, last_chance, status, error: None };
    let mut timed_out = timeout_at(deadline, wait.run()).await.is_err();
    if timed_out && deadline.elapsed() > LATE {
        let found = time::timeout(timeout.min(LONGEST_WAIT), wait.look_since(deadline)).await;
        timed_out = found != Ok(true);
    }
    Waited { error: wait.error, timed_out }
}

struct Wait<'a> {
    shared: &'a Shared,
    driver: &'a DriverLink,
    refused: Generation,
    claim: Claim,
    tried: &'a [(Snapshot, Mark)],
    wait_for: WaitFor,
    last_chance: Option<Instant>,
    status: watch::Receiver<Status>,
    /// Why there is no newer credential so far. It is kept up to date, as a timeout may end the wait at any time.
    error: Option<ReloadError>,
}

impl Wait<'_> {
    async fn run(&mut self) {
        while self.turn().await.is_continue() {}
    }

    /// Asks for a newer credential, and waits until there is a reason to look again.
    async fn turn(&mut self) -> ControlFlow<()> {
        if is_accepted(self.tried) {
            return self.end(None);
        }
        let is_last_chance = self.last_chance.is_some_and(|at| at <= Instant::now());
        let urgency = if is_last_chance { Urgency::LastChance } else { Urgency::Normal };
        match self.shared.demand_past(self.driver, self.refused, self.claim, urgency) {
            Past::Newer(_) => self.end(None),
            Past::Load { joined: true, .. } if self.wait_for == WaitFor::OneAnswer => {
                self.end(Some(ReloadError::Pending))
            }
            Past::Load { number, .. } => self.load(number).await,
            Past::CoolingDown { .. } if self.driver.is_gone() => self.end(Some(ReloadError::DriverGone)),
            Past::CoolingDown { until, answer } => {
                self.error = answer.err().map(ReloadError::Failed);
                if self.wait_for == WaitFor::OneAnswer {
                    return ControlFlow::Break(());
                }
                self.cool_down(self.last_chance.filter(|_| !is_last_chance).map_or(until, |at| at.min(until))).await;
                ControlFlow::Continue(())
            }
        }
    }

    /// Waits for a load that began at this time or later. Returns whether there is a newer credential then, or fal has come
    /// to accept one of those that were tried.
    async fn look_since(&mut self, time: Instant) -> bool {
        while !is_accepted(self.tried) {
            match self.shared.demand_past(self.driver, self.refused, self.claim, Urgency::Since(time)) {
                Past::CoolingDown { until, .. } if !self.driver.is_gone() => self.cool_down(until).await,
                Past::Load { number, .. } => {
                    let _ = self.load(number).await;
                    break;
                }
                Past::CoolingDown { .. } | Past::Newer(_) => break,
            }
        }
        let found = self.shared.newest() > self.refused || is_accepted(self.tried);
        if found {
            self.error = None;
        }
        found
    }

    async fn load(&mut self, number: u64) -> ControlFlow<()> {
        self.error = Some(ReloadError::Pending);
        tokio::select! {
            result = finished(self.driver, number) => match result {
                Ok(result) => self.error = result.err().map(ReloadError::Failed),
                Err(gone) => return self.end(Some(gone)),
            },
            () = change(&mut self.status, self.refused, self.tried) => {}
        }
        ControlFlow::Continue(())
    }

    async fn cool_down(&mut self, until: Instant) {
        tokio::select! {
            () = sleep_until(until) => {}
            () = change(&mut self.status, self.refused, self.tried) => {}
        }
    }

    fn end(&mut self, error: Option<ReloadError>) -> ControlFlow<()> {
        self.error = error;
        ControlFlow::Break(())
    }
}

/// Returns when there is a newer credential, or one of those that were tried is accepted. The sender lives as long as
/// the store.
async fn change(status: &mut watch::Receiver<Status>, refused: Generation, tried: &[(Snapshot, Mark)]) {
    let _ = status.wait_for(|status| status.newest > refused || is_accepted(tried)).await;
}

/// Whether fal has accepted one of them since it was refused.
fn is_accepted(tried: &[(Snapshot, Mark)]) -> bool {
    tried.iter().any(|(snapshot, mark)| mark.was_accepted_until(snapshot.mark()))
}
