//! What becomes of one request: how often it was refused, and what it is sent with next.

#[cfg(feature = "transient")]
use std::time::Duration;
use std::{fmt, sync::Arc};

use http::{Extensions, Response, StatusCode};
use http_body::Body;

#[cfg(feature = "transient")]
use super::transient::{Attempts, Ended, Repeat};
use super::{
    Mode, Rules,
    body::{Peeked, PeekedBody},
    decision::Replayed,
    judge::{Answer, ReplayWith, Verdict},
};
use crate::{
    auth::{SendWith, Stamp, is_refusal},
    events,
};

/// How far one request has come.
pub(crate) struct Course {
    /// Whether it was sent again for the sake of the credential, and what it is sent with.
    replayed: Replayed,
    with: ReplayWith,
    /// The newest credential that was refused.
    refused: Option<Stamp>,
    #[cfg(feature = "transient")]
    attempts: Option<Attempts>,
}

/// A request as it stands when it is refused.
pub(crate) struct RefusedRequest {
    sent_with: Stamp,
    newest: Stamp,
    replayable: bool,
    replayed: Replayed,
}

/// A refused response, of which as much was read as it takes to judge it.
pub(crate) struct Judged<R: Body> {
    pub(crate) response: Response<PeekedBody<R>>,
    pub(crate) verdict: Verdict,
}

impl Course {
    pub(crate) fn begin(rules: &Rules) -> Self {
        let _ = rules; // used with the feature only
        Self {
            replayed: Replayed::Not,
            with: ReplayWith::Current,
            refused: None,
            #[cfg(feature = "transient")]
            attempts: rules.transient.is_some().then(Attempts::first),
        }
    }

    pub(crate) fn refused(&mut self, sent_with: Stamp, replayable: bool) -> RefusedRequest {
        let newest = match self.refused.take() {
            Some(refused) if refused.generation() > sent_with.generation() => refused,
            _ => sent_with.clone(),
        };
        self.refused = Some(newest.clone());
        RefusedRequest { sent_with, newest, replayable, replayed: self.replayed }
    }

    pub(crate) fn replay(&mut self, with: ReplayWith) {
        self.replayed = match with {
            ReplayWith::Current => Replayed::WithNewer,
            ReplayWith::Previous(_) => Replayed::WithPrevious,
        };
        self.with = with;
    }

    /// Tells [`FalAuth`](crate::FalAuth) what to send the request with, where that is not the current credential.
    pub(crate) fn write_to(&self, extensions: &mut Extensions) {
        match &self.with {
            // There may be one of an earlier attempt: a reqwest middleware has the same extensions for each.
            ReplayWith::Current => extensions.remove::<SendWith>(),
            ReplayWith::Previous(snapshot) => extensions.insert(SendWith(snapshot.clone())),
        };
    }

    /// How long to wait before it is sent again after a failure in passing, if it is. `request` is there if it can be.
    #[cfg(feature = "transient")]
    pub(crate) fn wait(&mut self, rules: &Rules, request: Option<Repeat<'_>>, ended: &Ended<'_>) -> Option<Duration> {
        rules.transient.as_ref()?.wait(request?, self.attempts.as_mut()?, ended)
    }

    /// It has its answer.
    pub(crate) fn ended(&self, accepted: bool) {
        if self.replayed != Replayed::Not {
            events::replayed(accepted);
        }
    }
}

impl fmt::Debug for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Course").field("replayed", &self.replayed).finish_non_exhaustive()
    }
}

/// What a refused request was sent with; `None` for a response that was no refusal, or not of a credential of ours.
pub(crate) fn stamp_of(status: StatusCode, extensions: &Extensions) -> Option<Stamp> {
    let stamp = is_refusal(status).then(|| extensions.get().cloned())?;
    if stamp.is_none() {
        events::not_ours(status);
    }
    stamp
}

pub(crate) async fn judge<R: Body, M: Mode>(
    response: Response<R>,
    request: RefusedRequest,
    rules: Arc<Rules>,
) -> Judged<R> {
    let (head, body) = response.into_parts();
    let mut body = Peeked::read(body, rules.read_timeout).await;
    if !M::HANDS_ON {
        body.drop_rest(); // before any wait: others may need the connection
    }
    let RefusedRequest { sent_with, newest, replayable, replayed } = &request;
    let answer = Answer {
        status: head.status,
        headers: &head.headers,
        body: body.start(),
        sent_with,
        newest,
        replayable: *replayable,
        replayed: *replayed,
    };
    let verdict = rules.judge.judge(answer).await;
    Judged { response: Response::from_parts(head, PeekedBody::peeked(body)), verdict }
}

#[cfg(feature = "transient")]
pub(crate) async fn drain_and_wait<R: Body>(body: R, limit: Duration, wait: Duration) {
    drop(Peeked::read(body, limit).await); // a short body to its end, which frees the connection for others
    tokio::time::sleep(wait).await;
}
