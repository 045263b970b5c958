use std::sync::Arc;

use http::StatusCode;

use super::runs::Runs;
use crate::error::RefusalParts;

/// Emits the refusals of one layer: an event, which [`Runs`] keeps from filling the log, and a count of each.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// By whether the credential was the store's, and the reason.
    runs: Runs<(bool, &'static str)>,
    not_ours: Runs<u16>,
}

impl Refusals {
    /// A 401 or 403 was passed on. It answers a request that carried no credential of ours, or it comes from another
    /// origin, to which a redirect led. Somebody who forgot to admit an origin learns it here.
    pub(crate) fn tell_of_others(&self, status: StatusCode, origin: impl FnOnce() -> String) {
        event_by_turn!(
            refusals = self.not_ours.count(status.as_u16(), None),
            status = status.as_u16(),
            origin = origin(),
            refusals,
            "a request was refused that carried no fal credential: is its origin admitted? (`FalOrigins::and`)"
        );
    }

    /// fal, or the application behind it, refused a credential, and this was done about it. `store` is the name of the
    /// credential's store; `None` when the request brought its own.
    pub(crate) fn tell(&self, refused: &RefusalParts, action: &'static str, store: Option<&Arc<str>>) {
        let RefusalParts { status, reason, generation, source, key_id, account, .. } = refused;
        event_by_turn!(
            refusals = self.runs.count((generation.is_some(), reason.as_str()), *generation),
            status = status.as_u16(),
            reason = reason.as_str(),
            action,
            source = &**source,
            key_id = key_id.as_ref().map(tracing::field::display),
            account = account.as_ref().map(tracing::field::display),
            refusals,
            "fal refused a request"
        );
        count!(
            "tower_fal_refusals_total",
            "store" => store.map_or_else(|| "".into(), Arc::clone),
            "status" => if *status == StatusCode::FORBIDDEN { "403" } else { "401" },
            "reason" => reason.as_str(),
            "action" => action,
        );
    }
}
