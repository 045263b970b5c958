//! The 401 rule, in one place: what follows from a refusal, as a pure function.

use http::StatusCode;

use crate::error::{Reason, RefusalParts};

/// Which other credential the store has for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Other {
    /// One that is newer than all that the request was sent with.
    Newer,
    /// The previous one: fal may not accept the newest one yet.
    Previous,
    /// One that was refused, while fal has come to accept it since.
    Again,
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
    /// The request is sent again with another credential, not the previous one.
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

/// A request is sent again only if its key may be at fault, only with another key (or one that fal has come to accept
/// since), and at most once with each kind of these.
pub(super) fn decide(refused: &RefusalParts, other: Option<Other>, reload_on_forbidden: bool) -> Decision {
    let (status, reason, replayed) = (refused.status, refused.reason, refused.replayed);
    let may_be_cured = match (status, reason) {
        // The application behind fal ran, and would run and bill again.
        (_, Reason::Application) => false,
        (StatusCode::UNAUTHORIZED, _) => true,
        // No key of this account helps.
        (_, Reason::AccountLocked(_)) => false,
        (status, _) => !is_final(status, reload_on_forbidden),
    };
    // A credential that the request brought itself, or that another store issued, is not ours to renew.
    if !may_be_cured || refused.newest.is_none() {
        return Decision::Done(Outcome::Refused);
    }
    let is_unknown = status == StatusCode::UNAUTHORIZED && reason.is_cured_by_another_key();
    match other {
        _ if !refused.replayable => {}
        Some(Other::Newer) if !replayed.with_newer => return Decision::Done(Outcome::Replayed),
        Some(Other::Previous) if !replayed.with_previous && is_unknown => {
            return Decision::Done(Outcome::ReplayedWithPrevious);
        }
        Some(Other::Again) if !replayed.again && reason == Reason::UnknownCredential => {
            return Decision::Done(Outcome::Replayed);
        }
        _ => {}
    }
    // What another key does not cure costs no load and no wait: it may be about one application only.
    if status == StatusCode::UNAUTHORIZED && !is_unknown {
        Decision::Done(Outcome::Refused)
    } else if refused.replayable && !replayed.with_newer {
        Decision::Reload
    } else if other == Some(Other::Newer) {
        Decision::Done(Outcome::Refused)
    } else {
        Decision::Done(Outcome::RefusedAndReloaded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{LockReason, Replayed},
        generation::Generation,
    };

    fn refused(status: StatusCode, reason: Reason) -> RefusalParts {
        RefusalParts {
            newest: Some(Generation::FIRST),
            replayable: true,
            ..RefusalParts::of_request(status, reason, "test".into())
        }
    }

    #[test]
    fn the_401_rule_as_a_table() {
        let unauthorized = |reason| refused(StatusCode::UNAUTHORIZED, reason);
        let unknown_key = || unauthorized(Reason::UnknownCredential);
        let after = |replayed| RefusalParts { replayed, ..unknown_key() };
        let newer = || after(Replayed { with_newer: true, ..Replayed::default() });
        let previous = || after(Replayed { with_previous: true, ..Replayed::default() });
        let all = || after(Replayed { with_newer: true, with_previous: true, again: true });
        let strangers = || RefusalParts { newest: None, ..unknown_key() };
        let streamed = || RefusalParts { replayable: false, ..unknown_key() };

        let refuse = Decision::Done(Outcome::Refused);
        let ask = Decision::Done(Outcome::RefusedAndReloaded);
        let replay = Decision::Done(Outcome::Replayed);
        let go_back = Decision::Done(Outcome::ReplayedWithPrevious);
        let reload = Decision::Reload;

        // What follows if the store has no other credential, a newer one, a previous one, the refused one again.
        for (name, refused, decisions) in [
            ("an unknown key", unknown_key(), [reload, replay, go_back, replay]),
            ("an unknown 401", unauthorized(Reason::Unknown), [reload, replay, go_back, reload]),
            ("a missing credential", unauthorized(Reason::MissingCredential), [refuse, replay, refuse, refuse]),
            ("a malformed credential", unauthorized(Reason::MalformedCredential), [refuse, replay, refuse, refuse]),
            ("a wrong scheme", unauthorized(Reason::WrongScheme), [refuse, replay, refuse, refuse]),
            ("the application's 401", unauthorized(Reason::Application), [refuse; 4]),
            ("its own key, or a stranger's", strangers(), [refuse; 4]),
            ("replayed with a newer key", newer(), [ask, refuse, go_back, replay]),
            ("replayed with the previous key", previous(), [reload, replay, reload, replay]),
            ("replayed with all", all(), [ask, refuse, ask, ask]),
            ("a body that is gone", streamed(), [ask, refuse, ask, ask]),
            ("another status", refused(StatusCode::IM_A_TEAPOT, Reason::UnknownCredential), [refuse; 4]),
        ] {
            let others = [None, Some(Other::Newer), Some(Other::Previous), Some(Other::Again)];
            assert_eq!(others.map(|other| decide(&refused, other, false)), decisions, "{name}");
        }

        let locked = Reason::AccountLocked(LockReason::ExhaustedBalance);
        for (name, reason, decisions) in [
            ("a 403", Reason::InsufficientPermissions, [reload, replay, reload, reload]),
            ("a locked account", locked, [refuse; 4]),
            ("the application's 403", Reason::Application, [refuse; 4]),
        ] {
            let others = [None, Some(Other::Newer), Some(Other::Previous), Some(Other::Again)];
            let forbidden = refused(StatusCode::FORBIDDEN, reason);
            assert_eq!(others.map(|other| decide(&forbidden, other, true)), decisions, "{name} that may reload");
            assert_eq!(others.map(|other| decide(&forbidden, other, false)), [refuse; 4], "{name}");
        }
    }

    #[test]
    fn after_a_reload_there_is_nothing_left_to_wait_for() {
        assert_eq!(Decision::Reload.after_reload(), Outcome::Refused);
        assert_eq!(Decision::Done(Outcome::Replayed).after_reload(), Outcome::Replayed);
    }
}
