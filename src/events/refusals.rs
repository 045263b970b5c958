use std::sync::Arc;

#[cfg(feature = "metrics")]
use http::StatusCode;

#[cfg(feature = "tracing")]
use super::runs::Runs;
use crate::error::RefusalParts;

/// Tells of the refusals of one layer, of some louder than of others: see [`Runs`]. A metric counts each one.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// By whether the credential was the store's, and the reason.
    #[cfg(feature = "tracing")]
    runs: Runs<(bool, &'static str)>,
}

impl Refusals {
    /// fal, or the application behind it, refused a credential, and this was done about it. `store` is the name of the
    /// credential's store; `None` when the request brought its own.
    pub(crate) fn tell(&self, refused: &RefusalParts, action: &'static str, store: Option<&Arc<str>>) {
        let RefusalParts { status, reason, generation, source, key_id, .. } = refused;
        #[cfg(feature = "tracing")]
        {
            let refusals = self.runs.count((generation.is_some(), reason.as_str()), *generation);
            macro_rules! tell {
                ($level:ident) => {
                    tracing::$level!(
                        status = status.as_u16(),
                        reason = reason.as_str(),
                        action,
                        source = &**source,
                        key_id = key_id.as_ref().map(tracing::field::display),
                        refusals,
                        "fal refused a request"
                    )
                };
            }
            if refusals.is_power_of_two() {
                tell!(warn);
            } else {
                tell!(debug);
            }
        }
        #[cfg(feature = "metrics")]
        metrics::counter!(
            "tower_fal_refusals_total",
            "store" => store.map_or_else(|| "".into(), Arc::clone),
            "status" => if *status == StatusCode::FORBIDDEN { "403" } else { "401" },
            "reason" => reason.as_str(),
            "action" => action,
        )
        .increment(1);
        let _ = (status, reason, action, store, generation, source, key_id);
    }
}
