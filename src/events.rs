//! Every event and every metric that the crate emits, in one place. Without the features `tracing` and `metrics` they
//! are nothing.
//!
//! All of them are rare: nothing here is called for a request that went well.

use std::path::Path;
#[cfg(feature = "transient")]
use std::time::Duration;

use http::StatusCode;

#[cfg(feature = "axum")]
use crate::error::FalAuthError;
use crate::{
    credential::KeyId,
    error::{SourceError, report},
};

mod refusals;
#[cfg(feature = "tracing")]
mod runs;
mod store_metrics;

pub(crate) use self::refusals::Refusals;
pub(crate) use self::store_metrics::StoreMetrics;

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
///
/// `key_id` is of the credential that it keeps.
pub(crate) fn load_failed(error: &SourceError, key_id: Option<&KeyId>, failures: u32) {
    #[cfg(feature = "tracing")]
    {
        let (source, error) = (error.source_name(), report(error));
        macro_rules! tell {
            ($level:ident) => {
                tracing::$level!(
                    source,
                    key_id = key_id.map(tracing::field::display),
                    failures,
                    error,
                    "could not load the fal credential; keeping the last good one"
                )
            };
        }
        if failures.is_power_of_two() {
            tell!(warn);
        } else {
            tell!(debug);
        }
    }
    let _ = (error, key_id, failures, report); // used with the feature only
}

/// A load succeeded after some that did not.
pub(crate) fn recovered(source: &str, key_id: Option<&KeyId>, failures: u32) {
    #[cfg(feature = "tracing")]
    tracing::info!(
        source,
        key_id = key_id.map(tracing::field::display),
        failures,
        "the source of the fal credential answers again"
    );
    let _ = (source, key_id, failures);
}

/// The driver was dropped while stores still exist: their runtime has ended.
pub(crate) fn driver_ended(source: &str) {
    #[cfg(feature = "tracing")]
    tracing::warn!(source, "the runtime that reloads the fal credential has ended; it will not be rotated any more");
    let _ = source;
}

/// A 401 or 403 came back to a request that carried nothing of ours, or from where a redirect has led: it is passed
/// on, and for debugging. Whoever has not admitted an origin finds out here.
pub(crate) fn not_ours(status: StatusCode) {
    #[cfg(feature = "tracing")]
    tracing::debug!(
        status = status.as_u16(),
        "a request was refused that carried no credential of the store: was its origin admitted?"
    );
    let _ = status;
}

/// A request that was sent again has its answer.
pub(crate) fn replayed(accepted: bool) {
    let result = if accepted { "accepted" } else { "refused" };
    #[cfg(feature = "tracing")]
    tracing::debug!(result, "a request was sent again with another fal credential");
    #[cfg(feature = "metrics")]
    metrics::counter!("tower_fal_replays_total", "result" => result).increment(1);
    let _ = result;
}

/// Our caller was told that there is no answer from fal; this is the part that the operator is told, of some louder
/// than of others: see [`Runs`](runs::Runs).
#[cfg(feature = "axum")]
pub(crate) fn answered(status: StatusCode, reason: &'static str, error: &FalAuthError) {
    #[cfg(feature = "tracing")]
    {
        /// For the process: a response knows of no layer.
        static RUNS: runs::Runs<&str> = runs::Runs::new();

        let answers = RUNS.count(reason, None);
        macro_rules! tell {
            ($level:ident) => {
                tracing::$level!(
                    status = status.as_u16(),
                    reason,
                    answers,
                    error = without_queries(&report(error)),
                    "a request to fal failed, and so did the one that it was made for"
                )
            };
        }
        if answers.is_power_of_two() {
            tell!(warn);
        } else {
            tell!(debug);
        }
    }
    let _ = (status, reason, error);
}

/// A text in which URLs end where their queries begin: clients name the URL in their errors, and a query may hold a
/// token.
#[cfg(all(feature = "axum", feature = "tracing"))]
fn without_queries(text: &str) -> String {
    let mut parts = text.split('?');
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push('?');
        let query = part.find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '>' | ')'));
        kept.push_str(query.map_or("", |end| &part[end..]));
    }
    kept
}

/// A request's body could not be kept: if the request is refused, it cannot be sent again.
pub(crate) fn replay_memory_exhausted(limit: usize) {
    #[cfg(feature = "tracing")]
    tracing::debug!(limit, "the memory for replays is used up; a request is sent once");
    #[cfg(feature = "metrics")]
    metrics::counter!("tower_fal_replay_memory_exhausted_total").increment(1);
    let _ = limit;
}

/// A request is sent again because it failed in passing.
#[cfg(feature = "transient")]
pub(crate) fn retried(attempt: u32, wait: Duration) {
    #[cfg(feature = "tracing")]
    tracing::debug!(attempt, ?wait, "a request to fal failed in passing; it will be sent again");
    #[cfg(feature = "metrics")]
    metrics::counter!("tower_fal_transient_retries_total").increment(1);
    let _ = (attempt, wait);
}

/// A request was not sent again because too many have been.
#[cfg(feature = "transient")]
pub(crate) fn retry_budget_exhausted() {
    #[cfg(feature = "tracing")]
    tracing::debug!("the budget of retries is used up; a request is not sent again");
    #[cfg(feature = "metrics")]
    metrics::counter!("tower_fal_retry_budget_exhausted_total").increment(1);
}

/// The key's directory cannot be watched; the file is polled as ever.
#[cfg(feature = "watch")]
pub(crate) fn not_watched(source: &str, error: &dyn std::error::Error) {
    #[cfg(feature = "tracing")]
    tracing::warn!(source, %error, "the files of the fal credential cannot be watched; they are polled only");
    let _ = (source, error);
}

/// The key has changed, and the watcher heard nothing of it.
#[cfg(feature = "watch")]
pub(crate) fn watcher_deaf(source: &str) {
    #[cfg(feature = "tracing")]
    tracing::warn!(source, "the fal credential changed without a file event; its files are polled as if not watched");
    let _ = source;
}

/// A credential that can never change in this process stands before one that could.
pub(crate) fn shadowed(source: &str, key_id: Option<&KeyId>, shadowed: &str) {
    #[cfg(feature = "tracing")]
    tracing::warn!(
        source,
        key_id = key_id.map(tracing::field::display),
        shadowed,
        "the fal credential comes from a place that cannot be rotated, and shadows a file"
    );
    let _ = (source, key_id, shadowed);
}

/// Anyone on this machine may replace the key.
pub(crate) fn world_writable(path: &Path) {
    #[cfg(feature = "tracing")]
    tracing::warn!(path = %path.display(), "the fal key file is writable by everyone: chmod o-w it");
    let _ = path;
}

#[cfg(all(test, feature = "axum", feature = "tracing"))]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_left_out_of_a_text_and_nothing_else() {
        for (text, left) in [
            (
                "error sending request for url (https://fal.run/a?fal_jwt_token=hush&b=?c): broken",
                "error sending request for url (https://fal.run/a??): broken",
            ),
            ("at https://fal.run/a?hush", "at https://fal.run/a?"),
            ("what? \"/a?hush\" or `?hush` and <?hush>", "what? \"/a?\" or `?` and <?>"),
            ("no question", "no question"),
            ("?", "?"),
            ("", ""),
        ] {
            assert_eq!(without_queries(text), left);
        }
    }
}
