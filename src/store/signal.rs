//! SIGHUP: somebody asks for a reload from outside.

use std::{io, sync::Weak};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use super::shared::{Finished, Shared};

/// From now on SIGHUP ends the process no more.
pub(super) fn hangups() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Reloads at each SIGHUP, until the driver ends.
pub(super) async fn reload(mut hangups: Signal, shared: Weak<Shared>, mut finished: watch::Receiver<Finished>) {
    loop {
        tokio::select! {
            Some(()) = hangups.recv() => {
                let Some(shared) = shared.upgrade() else { return };
                if let Some(driver) = &shared.driver {
                    shared.demand(driver);
                }
            }
            _ = finished.wait_for(|_| false) => return,
        }
    }
}
