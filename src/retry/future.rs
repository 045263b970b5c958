use std::{
    fmt,
    marker::PhantomData,
    ops::ControlFlow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response, Uri};
use http_body::Body;
use pin_project::pin_project;
use tower_service::Service;

use super::{
    Mode,
    attempt::{Ended, Sent},
    attempts::{Attempts, Next},
    body::{PeekedBody, Replay, ReplayBody},
    head::Head,
    mode::sealed,
    policy::{Examined, Policy},
};
use crate::{
    application::Application,
    error::{BoxError, FalAuthError, Refusal},
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
    call: Call<S, B>,
    mode: PhantomData<fn() -> M>,
}

/// Where a request stands.
#[pin_project(project = StateProjection)]
enum State<F, B, R: Body> {
    /// The request lacks what it has to bring.
    NotSent,
    /// An attempt is under way.
    Sent {
        #[pin]
        response: F,
    },
    /// The attempt was refused, and the refusal is looked at.
    Examining { examining: Pin<Box<dyn Future<Output = Examined<R>> + Send>> },
    /// There was a transient failure, and the next attempt has to wait.
    BackingOff { waiting: Pin<Box<dyn Future<Output = ()> + Send>>, body: ReplayBody<B> },
    /// The next attempt begins as soon as the service is ready.
    Readying { body: ReplayBody<B> },
}

/// What it takes to send a request again.
struct Call<S, B> {
    service: S,
    head: Head,
    body: Replay<B>,
    attempts: Attempts,
    /// Whether the last attempt has its response, while there is none for the caller yet.
    answered: bool,
}

impl<S, B, R, M> ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>>,
    B: Body,
    R: Body,
{
    /// The service that was made ready is called: it is `ready`, or `service` if that is `None`. Further attempts are made
    /// with `service`, which is made ready before each.
    pub(super) fn new(ready: Option<&mut S>, service: S, request: Request<B>, policy: Arc<Policy>) -> Self {
        let (mut head, body) = request.into_parts();
        let (first, body) = ReplayBody::new(body, policy.max_body, &policy.memory);
        let application = || Application::at(head.uri.host(), head.uri.path());
        let attempts = Attempts::new(policy, &head.extensions, application, || body.is_certain());
        let kept = Head::keep(&head);
        attempts.prepare(&mut head.extensions);
        let mut call = Call { service, head: kept, body, attempts, answered: false };
        if call.attempts.policy().misses_credential(&head.extensions) {
            return Self { state: State::NotSent, call, mode: PhantomData };
        }
        let response = ready.unwrap_or(&mut call.service).call(Request::from_parts(head, first));
        Self { state: State::Sent { response }, call, mode: PhantomData }
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
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::NotSent => ControlFlow::Break(Err(FalAuthError::NoCredential)),
                StateProjection::Sent { response } => this.call.ended::<R, M>(ready!(response.poll(cx))),
                StateProjection::Examining { examining } => {
                    this.call.examined::<R, M>(ready!(examining.as_mut().poll(cx)))
                }
                StateProjection::BackingOff { waiting, body } => {
                    ready!(waiting.as_mut().poll(cx));
                    ControlFlow::Continue(State::Readying { body: body.take() })
                }
                StateProjection::Readying { body } => match ready!(this.call.service.poll_ready(cx)) {
                    Ok(()) => ControlFlow::Continue(State::Sent { response: this.call.send(body.take()) }),
                    Err(error) => {
                        this.call.body.give_up();
                        ControlFlow::Break(Err(FalAuthError::from_inner(error)))
                    }
                },
            };
            match next {
                ControlFlow::Continue(state) => this.state.set(state),
                ControlFlow::Break(output) => return Poll::Ready(output),
            }
        }
    }
}

/// The next state, or the end.
type Turn<F, B, R, M> = ControlFlow<Result<Response<<M as sealed::Mode>::Body<R>>, FalAuthError>, State<F, B, R>>;

impl<S, B> Call<S, B>
where
    S: Service<Request<ReplayBody<B>>>,
{
    fn send(&mut self, body: ReplayBody<B>) -> S::Future {
        let mut request = self.head.request(body);
        self.attempts.prepare(request.extensions_mut());
        self.answered = false;
        self.service.call(request)
    }

    /// An attempt has ended: does what follows.
    fn ended<R, M>(&mut self, result: Result<Response<R>, S::Error>) -> Turn<S::Future, B, R, M>
    where
        S::Error: Into<BoxError>,
        M: Mode,
        R: Body + Send + 'static,
        R::Error: Send,
    {
        let result = result.map_err(|error| self.body.with_cause(FalAuthError::from_inner(error)));
        let Self { head: Head { method, uri, extensions, .. }, body, .. } = self;
        let sent = || body.is_possible().then(|| Sent { method, path: uri.path(), extensions });
        let ended = match &result {
            Ok(response) => Ended::Answered {
                status: response.status(),
                headers: response.headers(),
                extensions: response.extensions(),
            },
            Err(error) => Ended::Failed(error),
        };
        let next = self.attempts.ended(ended, sent, || origin_of(uri));
        if matches!(next, Next::Return) {
            return self.finish::<R, M>(result); // the usual end: a tuple would move the response once more
        }
        match (next, result) {
            (Next::Examine(stamp), Ok(response)) => {
                self.answered = true;
                let replayable = self.body.is_possible();
                if self.attempts.is_final(response.status()) {
                    self.body.keep_no_longer();
                }
                let application = Application::at(self.head.uri.host(), self.head.uri.path());
                let examining = self.attempts.examine::<R, M>(application, response, stamp, replayable);
                ControlFlow::Continue(State::Examining { examining: Box::pin(examining) })
            }
            (Next::BackOff(wait), result) => match self.body.start_over() {
                Some(body) => {
                    let failure = result.ok().map(Response::into_body);
                    let waiting = Arc::clone(self.attempts.policy()).back_off(failure, wait);
                    ControlFlow::Continue(State::BackingOff { waiting: Box::pin(waiting), body })
                }
                None => self.finish::<R, M>(result),
            },
            (Next::Refused(refusal), Ok(response)) => self.refuse::<R, M>(refusal, response.map(PeekedBody::whole)),
            (_, result) => self.finish::<R, M>(result),
        }
    }

    /// A refusal was looked at: sends the request again, or refuses it.
    fn examined<R, M>(&mut self, examined: Examined<R>) -> Turn<S::Future, B, R, M>
    where
        M: Mode,
        R: Body,
    {
        let Examined { response, parts, tried, replay } = examined;
        // Asked first, as this takes the upload away from the attempt that has it.
        if let Some((with, body)) = replay.and_then(|with| Some((with, self.body.start_over()?))) {
            self.attempts.replay(with, tried);
            return ControlFlow::Continue(State::Readying { body });
        }
        let refusal = self.attempts.refused(parts, self.body.is_possible());
        self.refuse::<R, M>(refusal, response)
    }

    /// The refusal is the request's end.
    fn refuse<R, M>(&mut self, refusal: Refusal, response: Response<PeekedBody<R>>) -> Turn<S::Future, B, R, M>
    where
        M: Mode,
        R: Body,
    {
        self.answered = false;
        if M::RETURNS_RESPONSE {
            self.body.keep_no_longer(); // the caller has the response, and ends the upload when it likes
        } else {
            self.body.give_up();
        }
        ControlFlow::Break(M::refused(refusal, response))
    }

    /// The attempt was the last one.
    fn finish<R, M>(&mut self, result: Result<Response<R>, FalAuthError>) -> Turn<S::Future, B, R, M>
    where
        M: Mode,
        R: Body,
    {
        match &result {
            Ok(_) => self.body.keep_no_longer(),
            Err(_) => self.body.give_up(),
        }
        ControlFlow::Break(result.map(M::not_refused))
    }
}

/// Without a user name, which may be a secret.
fn origin_of(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
    uri.scheme_str().map_or_else(String::new, |scheme| format!("{scheme}://{host}{port}"))
}

impl<S, B> Drop for Call<S, B> {
    fn drop(&mut self) {
        // The caller has gone away while the next attempt was prepared. The last one needs no more of the body, and
        // hyper may hold it for as long as the connection lives.
        if self.answered {
            self.body.give_up();
        }
    }
}

impl<S, B, R, M> fmt::Debug for ResponseFuture<S, B, R, M>
where
    S: Service<Request<ReplayBody<B>>>,
    R: Body,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("attempts", &self.call.attempts).finish_non_exhaustive()
    }
}
