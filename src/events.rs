//! Every event that the crate emits, in one place. Without the `tracing` feature they are nothing.
//!
//! All of them are rare: nothing here is called for a request that went well.

use std::path::Path;

use crate::{
    credential::KeyId,
    error::{SourceError, report},
};

/// The store holds another credential than before.
pub(crate) fn rotated(source: &str, key_id: Option<&KeyId>, generation: u64) {
    #[cfg(feature = "tracing")]
    tracing::info!(source, key_id = key_id.map(tracing::field::display), generation, "the fal credential was rotated");
    let _ = (source, key_id, generation);
}

/// A load failed; the store keeps what it has.
///
/// An outage of a day must not fill the log: the first failure is a warning, then each one whose number is a power
/// of two; those between are for debugging.
pub(crate) fn load_failed(error: &SourceError, failures: u32) {
    #[cfg(feature = "tracing")]
    {
        let (source, error) = (error.source_name(), report(error));
        if failures.is_power_of_two() {
            tracing::warn!(source, failures, error, "could not load the fal credential; keeping the last good one");
        } else {
            tracing::debug!(source, failures, error, "could not load the fal credential; keeping the last good one");
        }
    }
    let _ = (error, failures, report);
}

/// A load succeeded after some that did not.
pub(crate) fn recovered(source: &str, failures: u32) {
    #[cfg(feature = "tracing")]
    tracing::info!(source, failures, "the source of the fal credential answers again");
    let _ = (source, failures);
}

/// The driver was dropped while stores still exist: their runtime has ended.
pub(crate) fn driver_ended(source: &str) {
    #[cfg(feature = "tracing")]
    tracing::warn!(source, "the runtime that reloads the fal credential has ended; it will not be rotated any more");
    let _ = source;
}

/// Anyone on this machine may replace the key.
pub(crate) fn world_writable(path: &Path) {
    #[cfg(feature = "tracing")]
    tracing::warn!(path = %path.display(), "the fal key file is writable by everyone: chmod o-w it");
    let _ = path;
}
