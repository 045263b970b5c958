//! Every event and every metric that the crate emits, in one place. Without the features `tracing` and `metrics` they
//! are nothing.
//!
//! All of them are rare: nothing here is called for a request that succeeds at once.

// Without the features, what only an event or a metric shows is not used.
#![cfg_attr(not(all(feature = "tracing", feature = "metrics")), allow(dead_code, unused_imports, unused_variables))]

use std::{path::Path, time::Duration};

use http::StatusCode;

use self::runs::Runs;
use crate::{
    credential::{Credential, KeyId},
    error::{SourceError, report},
};

#[macro_use]
mod shim;
mod refusals;
mod runs;
mod store_metrics;
#[cfg(feature = "webhook")]
pub(crate) mod webhook;

pub(crate) use self::refusals::Refusals;
pub(crate) use self::store_metrics::StoreMetrics;

/// A store was built, and holds its first credential.
pub(crate) fn loaded(source: &str, credential: &Credential, generation: u64) {
    event!(
        info,
        source,
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        generation,
        "the fal credential was loaded"
    );
}

/// A store is being built, and waits until its source has a credential.
pub(crate) fn waiting_for_source(error: &SourceError, limit: Duration) {
    event!(
        warn,
        source = error.source_name(),
        error = report(error),
        ?limit,
        "waiting for the source of the fal credential"
    );
}

/// The store holds another credential than before.
pub(crate) fn rotated(
    source: &str,
    credential: &Credential,
    generation: u64,
    previous: &Credential,
    previous_generation: u64,
) {
    event!(
        info,
        source,
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        generation,
        previous_key_id = previous.key_id().map(tracing::field::display),
        previous_account = previous.account().map(tracing::field::display),
        previous_generation,
        "the fal credential was rotated"
    );
}

/// fal has accepted the current credential for the first time.
pub(crate) fn accepted(source: &str, credential: &Credential, generation: u64) {
    event!(
        info,
        source,
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        generation,
        "fal has accepted the fal credential"
    );
}

/// fal refused the newest credential before it ever accepted it, and the previous one is in use again.
pub(crate) fn set_aside(source: &str, credential: &Credential, generation: u64, previous: &Credential) {
    event!(
        warn,
        source,
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        generation,
        previous_key_id = previous.key_id().map(tracing::field::display),
        previous_account = previous.account().map(tracing::field::display),
        "fal does not accept the new fal credential yet; requests are sent with the previous one, and the new one is tried again"
    );
}

/// A load failed. The store keeps what it has: this credential.
///
/// `in_a_row` is the number of failures since the last success, so that an outage of a day does not fill the log.
pub(crate) fn load_failed(error: &SourceError, credential: &Credential, in_a_row: u32) {
    event_by_turn!(
        failures = in_a_row,
        source = error.source_name(),
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        failures,
        error = report(error),
        "could not load the fal credential; keeping the last good one"
    );
}

/// A load succeeded after some that did not.
pub(crate) fn recovered(source: &str, credential: &Credential, failures: u32) {
    event!(
        info,
        source,
        key_id = credential.key_id().map(tracing::field::display),
        account = credential.account().map(tracing::field::display),
        failures,
        "the source of the fal credential answers again"
    );
}

/// The driver was dropped while stores still exist: their runtime has ended.
pub(crate) fn driver_ended(source: &str) {
    event!(warn, source, "the runtime that reloads the fal credential has ended; it will not be rotated any more");
}

/// A replayed request has its answer.
pub(crate) fn replayed(accepted: bool) {
    let result = if accepted { "accepted" } else { "refused" };
    event!(debug, result, "a request was replayed with another fal credential");
    count!("tower_fal_replays_total", "result" => result);
}

/// A `FalAuthError` became an HTTP response. The response says little; this event carries the whole error, and
/// [`Runs`] limits how often it is a warning.
#[cfg(feature = "axum")]
pub(crate) fn answered(status: StatusCode, reason: &'static str, error: &crate::error::FalAuthError) {
    /// One for the process: a response does not know the layer that its error came from.
    static RUNS: Runs<&str> = Runs::new();

    event_by_turn!(
        answers = RUNS.count(reason, None),
        status = status.as_u16(),
        reason,
        answers,
        error = without_queries(&report(error)),
        "a request to fal failed, and the caller of this server got an error"
    );
}

/// There is no realtime token for a caller, and the response says little about it. [`Runs`] limits how often it is a
/// warning.
#[cfg(feature = "realtime")]
pub(crate) fn not_minted(error: &crate::realtime::MintError) {
    static RUNS: Runs<()> = Runs::new();

    event_by_turn!(
        answers = RUNS.count((), None),
        answers,
        error = without_queries(&report(error)),
        "a realtime token could not be minted, and the caller of this server got an error"
    );
}

/// A text in which URLs end where their queries begin: clients name the URL in their errors, and a query may hold a
/// token.
#[cfg(feature = "axum")]
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

/// There was no memory left to keep a request's body: if the request is refused, it cannot be replayed.
pub(crate) fn replay_memory_exhausted(limit: usize) {
    event!(debug, limit, "the memory for replays is used up; a request cannot be replayed");
    count!("tower_fal_replay_memory_exhausted_total");
}

/// A request is retried after a transient failure.
#[cfg(feature = "transient")]
pub(crate) fn retried(attempt: u32, wait: std::time::Duration) {
    event!(debug, attempt, ?wait, "a request to fal failed for a transient reason; it will be retried");
    count!("tower_fal_transient_retries_total");
}

/// A request was not retried because the retry budget is used up.
#[cfg(feature = "transient")]
pub(crate) fn retry_budget_exhausted() {
    event!(debug, "the retry budget is used up; a request is not retried");
    count!("tower_fal_retry_budget_exhausted_total");
}

/// The directory of the key cannot be watched. The file is polled as before.
#[cfg(feature = "watch")]
pub(crate) fn not_watched(source: &str, error: &dyn std::error::Error) {
    event!(warn, source, %error, "the files of the fal credential cannot be watched; they are polled only");
}

/// The key has changed without a file event.
#[cfg(feature = "watch")]
pub(crate) fn watcher_deaf(source: &str) {
    event!(
        warn,
        source,
        "the fal credential changed without a file event; its files are polled at their usual interval"
    );
}

/// A credential that can never change in this process is used in place of one that could.
pub(crate) fn shadowed(source: &str, key_id: Option<&KeyId>, shadowed: &str) {
    event!(
        warn,
        source,
        key_id = key_id.map(tracing::field::display),
        shadowed,
        "the fal credential comes from a place that cannot be rotated, and shadows a file"
    );
}

/// A login could not be renewed. While its token is good, nothing else tells of this.
#[cfg(feature = "login")]
pub(crate) fn renewal_failed(source: &str, error: &(dyn std::error::Error + 'static), in_a_row: u32) {
    event_by_turn!(failures = in_a_row, source, failures, error = report(error), "the fal login could not be renewed");
}

/// Every user of this machine may replace the key, as its file or a directory of it lets them.
pub(crate) fn world_writable(path: &Path) {
    event!(warn, path = %path.display(), "the file of the fal key, or its directory, is writable by everyone: chmod o-w it");
}

#[cfg(all(test, feature = "axum"))]
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
