#[cfg(feature = "transient")]
use std::time::Duration;
use std::{
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project::pin_project;
use tower_service::Service;

use super::{
    Mode, Rules,
    body::{Replay, ReplayBody},
    course::{Course, Judged, judge, stamp_of},
    head::Head,
    judge::Verdict,
};
#[cfg(feature = "transient")]
use super::{
    course::drain_and_wait,
    transient::{Ended, Repeat},
};
use crate::error::{BoxError, FalAuthError};

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
    head: Head,
    body: Replay<B>,
    rules: Arc<Rules>,
    course: Course,
    /// Whether the last attempt has its answer while there is none for the caller yet.
    answered: bool,
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
        let kept = Head::keep(&head);
        let response = service.call(Request::from_parts(head, first));
        let again = Again {
            // The service that was made ready has been called; this one will be made ready before it is.
            service: service.clone(),
            head: kept,
            body,
            course: Course::begin(&rules),
            answered: false,
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
                    let Some(stamp) = stamp_of(response.status(), response.extensions()) else {
                        #[cfg(feature = "transient")]
                        if let Some((wait, body)) =
                            again.repeat(&Ended::Answered(response.status(), response.headers()))
                        {
                            let waiting = drain_and_wait(response.into_body(), again.rules.read_timeout, wait);
                            this.state.set(State::BackingOff { waiting: Box::pin(waiting), body });
                            continue;
                        }
                        again.body.keep_no_longer();
                        again.course.ended(true);
                        return Poll::Ready(Ok(M::not_refused(response)));
                    };
                    again.answered = true;
                    let refused = again.course.refused(stamp, again.body.is_possible());
                    if again.rules.judge.is_final(response.status()) {
                        again.body.keep_no_longer();
                    }
                    let judging = judge::<R, M>(response, refused, Arc::clone(&again.rules));
                    State::Judged { judging: Box::pin(judging) }
                }
                StateProjection::Judged { judging } => {
                    let Judged { response, verdict: Verdict { replay, refusal } } = ready!(judging.as_mut().poll(cx));
                    // Asked first, as this takes the upload away from the attempt that has it.
                    match replay.and_then(|with| Some((with, again.body.start_over()?))) {
                        Some((with, body)) => {
                            again.course.replay(with);
                            State::Readying { body }
                        }
                        None => {
                            let is_as_it_was = again.rules.judge.is_final(refusal.status()) || again.body.is_possible();
                            let refusal = if is_as_it_was { refusal } else { refusal.not_replayable() };
                            again.answered = false;
                            if M::HANDS_ON {
                                again.body.keep_no_longer(); // the upload is the caller's to end, as the answer is
                            } else {
                                again.body.give_up();
                            }
                            again.course.ended(false);
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
    fn request(&self, body: ReplayBody<B>) -> Request<ReplayBody<B>> {
        let mut request = self.head.request(body);
        self.course.write_to(request.extensions_mut());
        request
    }

    /// How long to wait before the request is sent again after a failure in passing, and the body for that.
    #[cfg(feature = "transient")]
    fn repeat(&mut self, ended: &Ended<'_>) -> Option<(Duration, ReplayBody<B>)> {
        let Head { method, uri, extensions, .. } = &self.head;
        let repeat = Repeat { method, path: uri.path(), extensions };
        let wait = self.course.wait(&self.rules, self.body.is_possible().then_some(repeat), ended)?;
        Some((wait, self.body.start_over()?))
    }
}

impl<S, B, R, M> fmt::Debug for ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>>,
    R: Body,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("course", &self.again.course).finish_non_exhaustive()
    }
}
