//! The 401 rule, in one place: what follows from an answer, as a pure function.

use http::StatusCode;

use crate::{error::Reason, generation::Generation};

/// A refused request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) reason: Reason,
    /// The newest credential that it was sent with; `None` is a credential of its own.
    pub(crate) generation: Option<Generation>,
    /// Whether it can be sent again.
    pub(crate) replayable: bool,
    /// Whether it was sent again already: with a newer credential, or with the one before.
    pub(crate) replayed: Replayed,
}

/// Each is done once at most. The one before is tried first, if at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Replayed {
    #[default]
    Not,
    WithPrevious,
    WithNewer,
}

/// What the store has to offer at this moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) current: Generation,
    /// The one before it, while it may still be tried: see [`overlap`](super::FalRetryLayer::overlap).
    pub(crate) previous: Option<Generation>,
    /// Whether the store may still be asked for a newer one on behalf of this request.
    pub(crate) may_reload: bool,
    /// Whether a 403 may ask, too.
    pub(crate) may_reload_on_forbidden: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Tell the caller.
    Refuse,
    /// Tell the caller, and have the store look for a newer credential for those who come after.
    RefuseAndReload,
    /// Send it again, with the store's current credential.
    Replay,
    /// Send it again, with the credential before the current one.
    ReplayWithPrevious,
    /// Wait for a newer credential, then decide again.
    Reload,
}

impl Action {
    /// A short name that does not change, for labels and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refused",
            Self::RefuseAndReload => "refused_and_reloaded",
            Self::Replay => "replayed",
            Self::ReplayWithPrevious => "replayed_with_previous",
            Self::Reload => "reloaded",
        }
    }
}

/// Whether no other attempt follows from this status, whatever the answer's body says: another key seldom cures a 403.
pub(crate) fn is_final(status: StatusCode, may_reload_on_forbidden: bool) -> bool {
    match status {
        StatusCode::UNAUTHORIZED => false,
        StatusCode::FORBIDDEN => !may_reload_on_forbidden,
        _ => true,
    }
}

/// A request is sent again only for a key that may be at fault, with another key, and with each kind of other key once.
pub(crate) fn decide(refused: Refused, store: Offer) -> Action {
    // Somebody else's credential is somebody else's to renew.
    let Some(sent_with) = refused.generation else { return Action::Refuse };
    let key_may_be_at_fault = match (refused.status, refused.reason) {
        // The application behind fal ran, and would run and bill again.
        (_, Reason::Application) => false,
        (StatusCode::UNAUTHORIZED, _) => true,
        // No key of this account will do.
        (_, Reason::AccountLocked(_)) => false,
        (status, _) => !is_final(status, store.may_reload_on_forbidden),
    };
    if !key_may_be_at_fault {
        return Action::Refuse;
    }
    let newer = store.current > sent_with;
    if refused.replayed == Replayed::WithNewer || !refused.replayable {
        let look = !newer && store.may_reload;
        return if look { Action::RefuseAndReload } else { Action::Refuse };
    }
    if newer {
        // Late: the credential was rotated while the request was under way.
        Action::Replay
    } else if store.previous.is_some()
        && refused.replayed == Replayed::Not
        && refused.status == StatusCode::UNAUTHORIZED
    {
        // Early: we have a key that fal does not know yet.
        Action::ReplayWithPrevious
    } else if store.may_reload {
        Action::Reload
    } else {
        Action::Refuse
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::LockReason;

    const UNAUTHORIZED: Refused = Refused {
        status: StatusCode::UNAUTHORIZED,
        reason: Reason::UnknownCredential,
        generation: Some(Generation::FIRST),
        replayable: true,
        replayed: Replayed::Not,
    };
    const FORBIDDEN: Refused =
        Refused { status: StatusCode::FORBIDDEN, reason: Reason::InsufficientPermissions, ..UNAUTHORIZED };
    const SAME: Offer =
        Offer { current: Generation::FIRST, previous: None, may_reload: true, may_reload_on_forbidden: false };

    #[test]
    fn the_401_rule_as_a_table() {
        let newer = Offer { current: Generation::FIRST.next(), ..SAME };
        let overlapping = Offer { previous: Some(Generation::FIRST), ..SAME };
        let asked = Offer { may_reload: false, ..SAME };
        let forbidden_too = Offer { may_reload_on_forbidden: true, ..SAME };
        let own = Refused { generation: None, ..UNAUTHORIZED };
        let replayed = Refused { replayed: Replayed::WithNewer, ..UNAUTHORIZED };
        let went_back = Refused { replayed: Replayed::WithPrevious, ..UNAUTHORIZED };
        let streamed = Refused { replayable: false, ..UNAUTHORIZED };
        let because = |reason| Refused { reason, ..UNAUTHORIZED };
        let forbidden = |reason| Refused { reason, ..FORBIDDEN };
        let locked = Reason::AccountLocked(LockReason::ExhaustedBalance);

        for (name, refused, store, action) in [
            ("the same key", UNAUTHORIZED, SAME, Action::Reload),
            ("the same key, asked in vain", UNAUTHORIZED, asked, Action::Refuse),
            ("a newer key", UNAUTHORIZED, newer, Action::Replay),
            ("a newer key that was asked for", UNAUTHORIZED, Offer { may_reload: false, ..newer }, Action::Replay),
            ("a key that fal may not know yet", UNAUTHORIZED, overlapping, Action::ReplayWithPrevious),
            (
                "a newer key and one before it",
                UNAUTHORIZED,
                Offer { previous: Some(Generation::FIRST), ..newer },
                Action::Replay,
            ),
            ("an unknown 401", because(Reason::Unknown), SAME, Action::Reload),
            ("a missing credential", because(Reason::MissingCredential), SAME, Action::Reload),
            ("a malformed credential", because(Reason::MalformedCredential), SAME, Action::Reload),
            ("a wrong scheme", because(Reason::WrongScheme), SAME, Action::Reload),
            ("the application's 401", because(Reason::Application), SAME, Action::Refuse),
            ("the application's 401, a newer key", because(Reason::Application), newer, Action::Refuse),
            ("its own key", own, SAME, Action::Refuse),
            ("its own key, a newer one here", own, newer, Action::Refuse),
            ("the second 401", replayed, SAME, Action::RefuseAndReload),
            ("the second 401, a newer key", replayed, newer, Action::Refuse),
            ("the second 401, an older key", replayed, overlapping, Action::RefuseAndReload),
            ("the one before is refused as well", went_back, SAME, Action::Reload),
            ("the one before is refused as well, a newer key", went_back, newer, Action::Replay),
            ("the one before is refused as well, yet another one", went_back, overlapping, Action::Reload),
            ("a body that is gone", streamed, SAME, Action::RefuseAndReload),
            ("a body that is gone, a newer key", streamed, newer, Action::Refuse),
            ("a body that is gone, asked in vain", streamed, asked, Action::Refuse),
            ("a 403", FORBIDDEN, SAME, Action::Refuse),
            ("a 403, a newer key", FORBIDDEN, newer, Action::Refuse),
            ("a 403, an older key", FORBIDDEN, overlapping, Action::Refuse),
            ("a 403 that may reload", FORBIDDEN, forbidden_too, Action::Reload),
            (
                "a 403 that may reload, a newer key",
                FORBIDDEN,
                Offer { may_reload_on_forbidden: true, ..newer },
                Action::Replay,
            ),
            (
                "a 403 that may reload, an older key",
                FORBIDDEN,
                Offer { may_reload_on_forbidden: true, ..overlapping },
                Action::Reload,
            ),
            ("a locked account that may reload", forbidden(locked), forbidden_too, Action::Refuse),
            ("the application's 403 that may reload", forbidden(Reason::Application), forbidden_too, Action::Refuse),
            ("another status", Refused { status: StatusCode::IM_A_TEAPOT, ..UNAUTHORIZED }, newer, Action::Refuse),
        ] {
            assert_eq!(decide(refused, store), action, "{name}");
        }
    }
}
