use std::error::Error;

use super::runs::Runs;
use crate::error::report;

/// The keys are others than before, or the first ones.
pub(crate) fn keys_changed(keys: usize) {
    event!(info, keys, "fal's webhook keys were fetched");
}

/// The keys were not fetched. The last good ones stay.
pub(crate) fn keys_not_fetched(error: &str, in_a_row: u32) {
    event_by_turn!(
        failures = in_a_row,
        failures,
        error,
        "could not fetch fal's webhook keys; keeping the last good ones"
    );
}

/// A delivery was not believed, or not handled now. With `observed` it was handed on all the same.
pub(crate) fn rejected(reason: &'static str, error: &(dyn Error + 'static), observed: bool) {
    /// One for the process, as a response does not know its layer.
    static REFUSED: Runs<&str> = Runs::new();
    static OBSERVED: Runs<&str> = Runs::new();

    let action = if observed { "observed" } else { "refused" };
    count!("tower_fal_webhook_rejections_total", "reason" => reason, "action" => action);
    if observed {
        event_by_turn!(
            rejections = OBSERVED.count(reason, None),
            reason,
            rejections,
            error = report(error),
            "a webhook delivery would have been refused"
        );
    } else {
        event_by_turn!(
            rejections = REFUSED.count(reason, None),
            reason,
            rejections,
            error = report(error),
            "a webhook delivery was refused"
        );
    }
}

/// A delivery was a repeat, and the handler did not get it.
pub(crate) fn skipped() {
    event!(debug, "a webhook delivery was handled before; it is answered without the handler");
    count!("tower_fal_webhook_repeats_skipped_total");
}

/// It could not be kept that a delivery was handled, or that it was not.
pub(crate) fn not_noted(error: &(dyn Error + 'static)) {
    event!(warn, error = report(error), "could not note how the handling of a webhook delivery ended");
}

/// It could not be found out whether a delivery is a repeat.
pub(crate) fn not_known(error: &(dyn Error + 'static)) {
    event!(warn, error = report(error), "could not find out whether a webhook delivery is a repeat");
}
