//! What follows from the end of each attempt of one request. It does no I/O: it says what to do, and
//! [`ResponseFuture`](super::ResponseFuture) and the reqwest middleware do it.
//!
//! 1. [`prepare`](Attempts::prepare) before each attempt.
//! 2. [`ended`](Attempts::ended) when it has ended: return what came, wait and send again, or look at the refusal.
//! 3. [`examine`](Attempts::examine) looks at a refusal. Its result says with what to send again: if the request can
//!    be, [`replay`](Attempts::replay), and else [`refused`](Attempts::refused).

use std::{fmt, sync::Arc, time::Duration};

use http::{Extensions, Response, StatusCode};
use http_body::Body;

use super::{
    Mode,
    attempt::{Ended, Sent},
    policy::{Examined, Policy, Replay, Tried},
    rule::Other,
    transient::Progress,
};
use crate::{
    application::Application,
    auth::{SendWith, Stamp, is_refusal},
    credential::Credential,
    error::{FalAuthError, Refusal, RefusalParts, Replayed},
    events,
    store::Snapshot,
};

/// The retry state of one request.
pub(crate) struct Attempts {
    policy: Arc<Policy>,
    /// What it is sent with now, if not with the current credential.
    send_with: Option<Snapshot>,
    replayed: Replayed,
    tried: Tried,
    /// Only with the option `transient`.
    progress: Option<Progress>,
}

/// What to do when an attempt has ended.
pub(crate) enum Next {
    /// Return what came.
    Return,
    /// Wait for so long, and send the request again. Only for a request that can be sent again.
    BackOff(Duration),
    /// A credential that this crate had put on the request was refused: look at the response.
    Examine(Stamp),
    /// A layer further in has looked at the refusal already. There is no further attempt.
    Refused(Refusal),
}

impl Attempts {
    /// For a request with these extensions. `application` says where it goes, and `replayable` whether it can be sent
    /// again for sure.
    pub(crate) fn new(
        policy: Arc<Policy>,
        extensions: &Extensions,
        application: impl FnOnce() -> Application,
        replayable: impl FnOnce() -> bool,
    ) -> Self {
        let carrier = || extensions.get::<Credential>().is_none().then(application);
        let send_with = policy.send_with(carrier, replayable);
        let progress = policy.transient.is_some().then(Progress::first);
        Self { policy, send_with, replayed: Replayed::default(), tried: Tried::new(), progress }
    }

    pub(crate) fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// Tells [`FalAuth`](crate::FalAuth) what to send the request with, if not with the current credential.
    pub(crate) fn prepare(&self, extensions: &mut Extensions) {
        match &self.send_with {
            Some(snapshot) => extensions.insert(SendWith(snapshot.clone())),
            // An earlier request may have left one: a reqwest middleware may get the same extensions again.
            None => extensions.remove::<SendWith>(),
        };
    }

    /// An attempt has ended. `sent` is asked for the request if it may be repeated, and brings it if it can be; `origin`
    /// is asked for the origin that has answered, for the log.
    pub(crate) fn ended<'a>(
        &mut self,
        ended: Ended<'_>,
        sent: impl FnOnce() -> Option<Sent<'a>>,
        origin: impl FnOnce() -> String,
    ) -> Next {
        match ended {
            Ended::Answered { status, extensions, .. } if is_refusal(status) => {
                if let Some(refusal) = extensions.get::<Refusal>() {
                    return Next::Refused(refusal.clone());
                }
                match extensions.get::<Stamp>() {
                    Some(stamp) => return Next::Examine(stamp.clone()),
                    None => self.policy.tell_of_others(status, origin),
                }
            }
            // A refusal that comes as an error, from such a layer further in, is final.
            Ended::Failed(error) if FalAuthError::find(error).is_some_and(|error| error.refusal().is_some()) => {
                return Next::Return;
            }
            Ended::Answered { .. } | Ended::Failed(_) => {}
        }
        if let (Some(transient), Some(progress)) = (&self.policy.transient, &mut self.progress)
            && let Some(sent) = sent()
            && let Some(wait) = transient.plan_retry(sent, progress, ended)
        {
            return Next::BackOff(wait);
        }
        if matches!(ended, Ended::Answered { .. }) {
            self.tell_of_replay(true);
        }
        Next::Return
    }

    /// Whether a response with this status is the last one, whatever its body says.
    pub(crate) fn is_final(&self, status: StatusCode) -> bool {
        self.policy.is_final(status)
    }

    /// Looks at a refusal of a request to this application. `replayable` says whether the request can be sent again as
    /// things stand.
    pub(crate) fn examine<R, M>(
        &mut self,
        application: Application,
        response: Response<R>,
        sent_with: Stamp,
        replayable: bool,
    ) -> impl Future<Output = Examined<R>> + Send + use<R, M>
    where
        R: Body + Send + 'static,
        R::Error: Send,
        M: Mode,
    {
        let tried = std::mem::take(&mut self.tried);
        let policy = Arc::clone(&self.policy);
        policy.examine::<R, M>(application, response, sent_with, tried, replayable, self.replayed)
    }

    /// The next attempt is a replay.
    pub(crate) fn replay(&mut self, with: Replay, tried: Tried) {
        match with.other {
            Other::Newer => self.replayed.with_newer = true,
            Other::Previous => self.replayed.with_previous = true,
            Other::Again => self.replayed.again = true,
        }
        self.send_with = Some(with.snapshot);
        self.tried = tried;
    }

    /// There is no further attempt. `replayable` says whether there could have been one, until the very end.
    pub(crate) fn refused(&self, mut parts: RefusalParts, replayable: bool) -> Refusal {
        // Where no other attempt could follow, the body was given up early, and says nothing.
        if !self.is_final(parts.status) {
            parts.replayable &= replayable;
        }
        self.tell_of_replay(false);
        Refusal::new(parts)
    }

    fn tell_of_replay(&self, accepted: bool) {
        if self.replayed.is_any() {
            events::replayed(accepted);
        }
    }
}

impl fmt::Debug for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempts").field("replayed", &self.replayed).finish_non_exhaustive()
    }
}
