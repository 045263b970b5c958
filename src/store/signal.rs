//! SIGHUP, by which an operator asks for a reload.

use std::sync::{Arc, Weak};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use super::shared::{Finished, Shared};
use crate::error::SourceError;

/// From now on SIGHUP does not end the process any more.
pub(super) fn hangups(source_name: &Arc<str>) -> Result<Signal, SourceError> {
    signal(SignalKind::hangup())
        .map_err(|error| SourceError::io(Arc::clone(source_name), "cannot listen to SIGHUP", error))
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
