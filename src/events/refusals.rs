use std::sync::Arc;

use http::StatusCode;

use crate::{credential::KeyId, error::Reason, generation::Generation};

/// fal, or the application behind it, refused a credential, and this was done about it.
pub(crate) struct Refused<'a> {
    pub(crate) status: StatusCode,
    pub(crate) reason: Reason,
    pub(crate) action: &'static str,
    /// The name of the store; `None` when the request brought its own credential, as with `generation`.
    pub(crate) store: Option<&'a Arc<str>>,
    pub(crate) generation: Option<Generation>,
    pub(crate) source: &'a str,
    pub(crate) key_id: Option<&'a KeyId>,
}

pub(crate) fn refused(refused: &Refused<'_>) {
    let Refused { status, reason, action, store, generation, source, key_id } = *refused;
    #[cfg(feature = "tracing")]
    tracing::warn!(
        status = status.as_u16(),
        reason = reason.as_str(),
        action,
        source,
        key_id = key_id.map(tracing::field::display),
        "fal refused a request"
    );
    #[cfg(feature = "metrics")]
    metrics::counter!(
        "tower_fal_refusals_total",
        "store" => store.map_or_else(|| "".into(), Arc::clone),
        "status" => if status == StatusCode::FORBIDDEN { "403" } else { "401" },
        "reason" => reason.as_str(),
        "action" => action,
    )
    .increment(1);
    let _ = (status, reason, action, store, generation, source, key_id);
}
