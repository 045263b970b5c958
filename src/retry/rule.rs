//! The 401 rule, in one place: what follows from a refusal, as a pure function.

use http::StatusCode;

use crate::{
    error::{Reason, RefusalParts, Replayed},
    generation::Generation,
};

/// What the store has at this moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Available {
    pub(super) current: Generation,
    /// The previous credential, while it may still be tried: see [`overlap`](super::FalRetryLayer::overlap).
    pub(super) previous: Option<Generation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Done(Outcome),
    /// Reload the store, wait for a newer credential, and decide again.
    Reload,
}

/// What becomes of a refused attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The caller gets the refusal.
    Refused,
    /// The caller gets the refusal, and the store looks for a newer credential for later requests.
    RefusedAndReloaded,
    /// The request is sent again with the store's current credential.
    Replayed,
    /// The request is sent again with the store's previous credential.
    ReplayedWithPrevious,
}

impl Decision {
    /// What is left of a decision once the store was reloaded for it.
    pub(super) fn after_reload(self) -> Outcome {
        match self {
            Self::Done(outcome) => outcome,
            Self::Reload => Outcome::Refused,
        }
    }
}

impl Outcome {
    /// A short name that does not change, for labels and logs.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::RefusedAndReloaded => "refused_and_reloaded",
            Self::Replayed => "replayed",
            Self::ReplayedWithPrevious => "replayed_with_previous",
        }
    }
}

/// Whether no other attempt follows a response with this status, whatever its body says. Another key seldom cures a 403.
pub(super) fn is_final(status: StatusCode, reload_on_forbidden: bool) -> bool {
    match status {
        StatusCode::UNAUTHORIZED => false,
        StatusCode::FORBIDDEN => !reload_on_forbidden,
        _ => true,
    }
}

/// A request is sent again only if its key may be at fault, only with another key, and at most once with a newer and
/// once with the previous one.
pub(super) fn decide(refused: &RefusalParts, store: Available, reload_on_forbidden: bool) -> Decision {
    // A credential that the request brought itself is not ours to renew.
    let Some(newest) = refused.newest else { return Decision::Done(Outcome::Refused) };
    let key_may_be_at_fault = match (refused.status, refused.reason) {
        // The application behind fal ran, and would run and bill again.
        (_, Reason::Application) => false,
        (StatusCode::UNAUTHORIZED, _) => true,
        // No key of this account helps.
        (_, Reason::AccountLocked(_)) => false,
        (status, _) => !is_final(status, reload_on_forbidden),
    };
    if !key_may_be_at_fault {
        return Decision::Done(Outcome::Refused);
    }
    let has_newer = store.current > newest;
    if refused.replayed == Replayed::WithNewer || !refused.replayable {
        return Decision::Done(if has_newer { Outcome::Refused } else { Outcome::RefusedAndReloaded });
    }
    let may_use_previous = refused.status == StatusCode::UNAUTHORIZED && refused.replayed == Replayed::Not;
    if has_newer {
        // The credential was rotated while the request was on its way.
        Decision::Done(Outcome::Replayed)
    } else if may_use_previous && store.previous.is_some() {
        // fal may not know the current key yet.
        Decision::Done(Outcome::ReplayedWithPrevious)
    } else {
        Decision::Reload
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::LockReason;

    const SAME: Available = Available { current: Generation::FIRST, previous: None };

    fn refused(status: StatusCode, reason: Reason) -> RefusalParts {
        RefusalParts {
            newest: Some(Generation::FIRST),
            replayable: true,
            ..RefusalParts::of_request(status, reason, "test".into())
        }
    }

    #[test]
    fn the_401_rule_as_a_table() {
        let newer = Available { current: Generation::FIRST.next(), ..SAME };
        let overlapping = Available { previous: Some(Generation::FIRST), ..SAME };
        let unauthorized = |reason| refused(StatusCode::UNAUTHORIZED, reason);
        let unknown_key = || unauthorized(Reason::UnknownCredential);
        let own = || RefusalParts { newest: None, ..unknown_key() };
        let replayed = || RefusalParts { replayed: Replayed::WithNewer, ..unknown_key() };
        let went_back = || RefusalParts { replayed: Replayed::WithPrevious, ..unknown_key() };
        let streamed = || RefusalParts { replayable: false, ..unknown_key() };

        let refuse = Decision::Done(Outcome::Refused);
        let ask = Decision::Done(Outcome::RefusedAndReloaded);
        let replay = Decision::Done(Outcome::Replayed);
        let previous = Decision::Done(Outcome::ReplayedWithPrevious);

        for (name, refused, store, decision) in [
            ("the same key", unknown_key(), SAME, Decision::Reload),
            ("a newer key", unknown_key(), newer, replay),
            ("a key that fal may not know yet", unknown_key(), overlapping, previous),
            (
                "a newer key and a previous one",
                unknown_key(),
                Available { current: newer.current, ..overlapping },
                replay,
            ),
            ("an unknown 401", unauthorized(Reason::Unknown), SAME, Decision::Reload),
            ("a missing credential", unauthorized(Reason::MissingCredential), SAME, Decision::Reload),
            ("a malformed credential", unauthorized(Reason::MalformedCredential), SAME, Decision::Reload),
            ("a wrong scheme", unauthorized(Reason::WrongScheme), SAME, Decision::Reload),
            ("the application's 401", unauthorized(Reason::Application), SAME, refuse),
            ("the application's 401, a newer key", unauthorized(Reason::Application), newer, refuse),
            ("its own key", own(), SAME, refuse),
            ("its own key, a newer one here", own(), newer, refuse),
            ("the second 401", replayed(), SAME, ask),
            ("the second 401, a newer key", replayed(), newer, refuse),
            ("the second 401, a previous key", replayed(), overlapping, ask),
            ("the previous key is refused as well", went_back(), SAME, Decision::Reload),
            ("the previous key is refused as well, a newer one", went_back(), newer, replay),
            ("the previous key is refused as well, another one", went_back(), overlapping, Decision::Reload),
            ("a body that is gone", streamed(), SAME, ask),
            ("a body that is gone, a newer key", streamed(), newer, refuse),
            ("another status", refused(StatusCode::IM_A_TEAPOT, Reason::UnknownCredential), newer, refuse),
        ] {
            assert_eq!(decide(&refused, store, false), decision, "{name}");
        }

        let forbidden = |reason| refused(StatusCode::FORBIDDEN, reason);
        let locked = Reason::AccountLocked(LockReason::ExhaustedBalance);
        for (name, reason, store, decision, if_it_may_reload) in [
            ("a 403", Reason::InsufficientPermissions, SAME, refuse, Decision::Reload),
            ("a 403, a newer key", Reason::InsufficientPermissions, newer, refuse, replay),
            ("a 403, a previous key", Reason::InsufficientPermissions, overlapping, refuse, Decision::Reload),
            ("a locked account", locked, SAME, refuse, refuse),
            ("the application's 403", Reason::Application, SAME, refuse, refuse),
        ] {
            assert_eq!(decide(&forbidden(reason), store, false), decision, "{name}");
            assert_eq!(decide(&forbidden(reason), store, true), if_it_may_reload, "{name} that may reload");
        }
    }

    #[test]
    fn after_a_reload_there_is_nothing_left_to_wait_for() {
        assert_eq!(Decision::Reload.after_reload(), Outcome::Refused);
        assert_eq!(Decision::Done(Outcome::Replayed).after_reload(), Outcome::Replayed);
    }
}
