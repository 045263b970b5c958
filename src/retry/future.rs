#[cfg(feature = "transient")]
use std::time::Duration;
use std::{
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response, StatusCode, request::Parts};
use http_body::Body;
use pin_project::pin_project;
use tower_service::Service;

#[cfg(feature = "transient")]
use super::transient::{Attempts, Ended};
use super::{
    Mode, Rules,
    decision::Replayed,
    judge::{Answer, ReplayWith, Verdict},
    peeked_body::{Peeked, PeekedBody},
    replay_body::{Replay, ReplayBody},
};
use crate::{
    auth::{SendWith, Stamp},
    error::{BoxError, FalAuthError},
    events,
};

/// Response future of [`FalRetry`](super::FalRetry).
#[pin_project]
pub struct ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>>,
    R: Body,
{
    #[pin]
    state: State<S::Future, B, R>,
    again: Again<S, B>,
    mode: PhantomData<fn() -> M>,
}

/// Where a request stands.
#[pin_project(project = StateProjection)]
enum State<F, B, R: Body> {
    /// It is on its way.
    Sent {
        #[pin]
        response: F,
    },
    /// It was refused, and what follows from that is being found out.
    Judged { judging: Pin<Box<dyn Future<Output = Judged<R>> + Send>> },
    /// It failed in passing, and waits before it is sent again.
    #[cfg(feature = "transient")]
    BackingOff { waiting: Pin<Box<dyn Future<Output = ()> + Send>>, body: ReplayBody<B> },
    /// It will be sent again as soon as the service is ready.
    Readying { body: ReplayBody<B> },
}

/// What it takes to send a request again.
struct Again<S, B> {
    service: S,
    head: Parts,
    body: Replay<B>,
    rules: Arc<Rules>,
    /// Whether it was sent again for the sake of the credential, and what it is sent with.
    replayed: Replayed,
    with: ReplayWith,
    /// The newest credential that was refused.
    refused: Option<Stamp>,
    /// Whether the last attempt has its answer while there is none for the caller yet.
    answered: bool,
    #[cfg(feature = "transient")]
    attempts: Option<Attempts>,
}

/// A refused response, of which as much was read as it takes to judge it.
struct Judged<R: Body> {
    response: Response<PeekedBody<R>>,
    verdict: Verdict,
}

impl<S, B, R, M> ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>> + Clone,
    B: Body,
    R: Body,
{
    pub(super) fn new(service: &mut S, request: Request<B>, rules: Arc<Rules>) -> Self {
        let (head, body) = request.into_parts();
        let (first, body) = ReplayBody::new(body, rules.max_body, &rules.memory);
        let kept = head.clone(); // and not the other way round: a clone has no room for another header
        let response = service.call(Request::from_parts(head, first));
        let again = Again {
            // The service that was made ready has been called; this one will be made ready before it is.
            service: service.clone(),
            head: kept,
            body,
            replayed: Replayed::Not,
            with: ReplayWith::Current,
            refused: None,
            answered: false,
            #[cfg(feature = "transient")]
            attempts: rules.transient.is_some().then(Attempts::first),
            rules,
        };
        Self { state: State::Sent { response }, again, mode: PhantomData }
    }
}

impl<S, B, R, M> Future for ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    M: Mode,
    R: Body + Send + 'static,
    R::Error: Send,
{
    type Output = Result<Response<M::Body<R>>, FalAuthError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let again = this.again;
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::Sent { response } => {
                    let response = match ready!(response.poll(cx)) {
                        Ok(response) => response,
                        Err(error) => {
                            let error = FalAuthError::from_inner(error);
                            // A refusal that comes as an error, from such a layer further in, is final.
                            #[cfg(feature = "transient")]
                            if matches!(error, FalAuthError::Transport(_))
                                && let Some((wait, body)) = again.repeat(&Ended::Failed(&error))
                            {
                                this.state.set(State::BackingOff { waiting: Box::pin(tokio::time::sleep(wait)), body });
                                continue;
                            }
                            again.body.give_up();
                            return Poll::Ready(Err(error));
                        }
                    };
                    let Some(stamp) = stamp_of(&response) else {
                        #[cfg(feature = "transient")]
                        if let Some((wait, body)) =
                            again.repeat(&Ended::Answered(response.status(), response.headers()))
                        {
                            let waiting = drain_and_wait(response.into_body(), again.rules.read_timeout, wait);
                            this.state.set(State::BackingOff { waiting: Box::pin(waiting), body });
                            continue;
                        }
                        again.body.keep_no_longer();
                        if again.replayed != Replayed::Not {
                            events::replayed(true);
                        }
                        return Poll::Ready(Ok(M::not_refused(response)));
                    };
                    let judging = judge::<R, M>(response, again.refused(stamp), Arc::clone(&again.rules));
                    State::Judged { judging: Box::pin(judging) }
                }
                StateProjection::Judged { judging } => {
                    let Judged { response, verdict: Verdict { replay, refusal } } = ready!(judging.as_mut().poll(cx));
                    // Asked first, as this takes the upload away from the attempt that has it.
                    match replay.and_then(|with| Some((with, again.body.start_over()?))) {
                        Some((with, body)) => {
                            again.replayed = match with {
                                ReplayWith::Current => Replayed::WithNewer,
                                ReplayWith::Previous(_) => Replayed::WithPrevious,
                            };
                            again.with = with;
                            State::Readying { body }
                        }
                        None => {
                            let refusal = if again.body.is_possible() { refusal } else { refusal.not_replayable() };
                            again.answered = false;
                            if M::HANDS_ON {
                                again.body.keep_no_longer(); // the upload is the caller's to end, as the answer is
                            } else {
                                again.body.give_up();
                            }
                            if again.replayed != Replayed::Not {
                                events::replayed(false);
                            }
                            return Poll::Ready(M::refused(refusal, response));
                        }
                    }
                }
                #[cfg(feature = "transient")]
                StateProjection::BackingOff { waiting, body } => {
                    ready!(waiting.as_mut().poll(cx));
                    State::Readying { body: body.take() }
                }
                StateProjection::Readying { body } => {
                    if let Err(error) = ready!(again.service.poll_ready(cx)) {
                        again.body.give_up();
                        return Poll::Ready(Err(FalAuthError::from_inner(error)));
                    }
                    again.answered = false;
                    let request = again.request(body.take());
                    State::Sent { response: again.service.call(request) }
                }
            };
            this.state.set(next);
        }
    }
}

impl<S, B> Drop for Again<S, B> {
    fn drop(&mut self) {
        // The caller has gone away while the next attempt was prepared. The last one needs no more of the body, and
        // hyper may hold it for as long as the connection lives.
        if self.answered {
            self.body.give_up();
        }
    }
}

impl<S, B> Again<S, B> {
    fn refused(&mut self, sent_with: Stamp) -> RefusedRequest {
        let newest = match self.refused.take() {
            Some(refused) if refused.generation() > sent_with.generation() => refused,
            _ => sent_with.clone(),
        };
        self.refused = Some(newest.clone());
        self.answered = true;
        RefusedRequest { sent_with, newest, replayable: self.body.is_possible(), replayed: self.replayed }
    }

    fn request(&self, body: ReplayBody<B>) -> Request<ReplayBody<B>> {
        let mut head = self.head.clone();
        if let ReplayWith::Previous(snapshot) = &self.with {
            head.extensions.insert(SendWith(snapshot.clone()));
        }
        Request::from_parts(head, body)
    }

    /// How long to wait before the request is sent again after a failure in passing, and the body for that.
    #[cfg(feature = "transient")]
    fn repeat(&mut self, ended: &Ended<'_>) -> Option<(Duration, ReplayBody<B>)> {
        let (transient, attempts) = (self.rules.transient.as_ref()?, self.attempts.as_mut()?);
        if !self.body.is_possible() {
            return None;
        }
        let wait = transient.wait(&self.head, attempts, ended)?;
        Some((wait, self.body.start_over()?))
    }
}

#[cfg(feature = "transient")]
async fn drain_and_wait<R: Body>(body: R, limit: Duration, wait: Duration) {
    drop(Peeked::read(body, limit).await); // a short body to its end, which frees the connection for others
    tokio::time::sleep(wait).await;
}

/// What a refused request was sent with; `None` for a response that was no refusal, or not of a credential of ours.
fn stamp_of<R>(response: &Response<R>) -> Option<Stamp> {
    matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
        .then(|| response.extensions().get().cloned())
        .flatten()
}

/// A request as it stands when it is refused.
struct RefusedRequest {
    sent_with: Stamp,
    newest: Stamp,
    replayable: bool,
    replayed: Replayed,
}

async fn judge<R: Body, M: Mode>(response: Response<R>, request: RefusedRequest, rules: Arc<Rules>) -> Judged<R> {
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

impl<S, B, R, M> fmt::Debug for ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>>,
    R: Body,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("replayed", &self.again.replayed).finish_non_exhaustive()
    }
}
