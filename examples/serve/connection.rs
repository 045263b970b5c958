//! One connection: HTTP/1.1 or HTTP/2, and a bound on the time in which nothing happens on it.
//!
//! There is one rule for both versions. A connection is closed when for some time nothing on it waits for *us*:
//!
//! * no complete request has arrived yet. That ends half a head, half a preface of HTTP/2, `HEADERS` without their end,
//!   and silence. hyper's own timeout for heads sees only the first of these;
//! * no request is open. That ends an idle connection;
//! * requests are open, but their answers wait until the peer reads them.

use std::{
    convert::Infallible,
    future::poll_fn,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
};
use http_body::{Frame, SizeHint};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use pin_project::pin_project;
use tokio::{
    net::TcpStream,
    sync::watch,
    task::coop::has_budget_remaining,
    time::{Instant, sleep_until},
};
use tower::ServiceExt as _;
use tower_fal::error::BoxError;
use tracing::info;

use super::seldom::Seldom;

/// How many bytes the head of a request may have. hyper answers a longer one with 431.
const MAX_HEAD: u32 = 16 * 1024;

/// How many requests of HTTP/2 may be open on one connection.
const MAX_STREAMS: u32 = 64;

/// How many bytes of an answer are kept for a peer that does not read them, for each request.
const MAX_UNSENT: usize = 64 * 1024;

/// How often HTTP/2 asks whether the peer is still there, and for how long it waits for the answer.
const PING: Duration = Duration::from_secs(20);

/// How long a connection may be without a request when there is no room for others. Clients that mean it send their
/// request at once.
const CROWDED: Duration = Duration::from_millis(250);

/// How long a connection may be without a request after it was asked to end, so that a request that is on its way is
/// still answered.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How long nothing may happen on a connection.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Until its first request is complete, without the body.
    pub(crate) header_timeout: Duration,
    /// Between two requests, and while the peer does not read an answer. It should be longer than that of a load
    /// balancer in front, which would otherwise send a request just as the connection is closed.
    pub(crate) idle_timeout: Duration,
}

/// Who is at the other end of a request's connection. That may be a load balancer. A router finds it in the extensions of
/// the request.
#[derive(Clone, Copy)]
#[allow(dead_code)] // not every server looks at it
pub(crate) struct Peer(pub(crate) IpAddr);

/// What the server as a whole is doing.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Phase {
    Open,
    /// There is no room for another connection.
    Crowded,
    /// No more requests are wanted.
    Draining,
}

/// What answers the requests of a connection.
pub(crate) trait Answers: Clone + Send + Sync + 'static {
    type Body: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static;

    fn answer(
        self,
        request: Request<Incoming>,
        peer: Option<Peer>,
    ) -> impl Future<Output = Response<Self::Body>> + Send + 'static;
}

impl Answers for Router {
    type Body = Body;

    fn answer(
        self,
        mut request: Request<Incoming>,
        peer: Option<Peer>,
    ) -> impl Future<Output = Response<Body>> + Send + 'static {
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        let answer = self.oneshot(request.map(Body::new));
        async move {
            match answer.await {
                Ok(answer) => answer,
                Err(never) => match never {},
            }
        }
    }
}

/// Returns when the connection has ended.
pub(crate) async fn serve<S: Answers>(
    stream: TcpStream,
    answers: S,
    limits: Limits,
    mut phase: watch::Receiver<Phase>,
) {
    /// One for all: a connection with one of its own would be a tenth larger.
    static BUILDER: LazyLock<auto::Builder<TokioExecutor>> = LazyLock::new(builder);
    static TOO_LATE: Seldom = Seldom::new();

    let activity = Arc::new(Activity::new());
    let peer = stream.peer_addr().ok().map(|address| Peer(address.ip().to_canonical()));
    let service = service_fn(|request: Request<Incoming>| {
        let mut open = Open::new(Arc::clone(&activity));
        let answer = answers.clone().answer(request, peer);
        async move {
            let response = answer.await;
            open.note(false);
            Ok::<_, Infallible>(response.map(|body| Tracked { body, open }))
        }
    });
    let mut connection = pin!(BUILDER.serve_connection(TokioIo::new(stream), service));
    // Since when it has been asked to end.
    let mut closing = None;
    loop {
        let now = Instant::now();
        let phase_now = *phase.borrow_and_update();
        if phase_now == Phase::Draining && closing.is_none() {
            connection.as_mut().graceful_shutdown();
            closing = Some(now);
        }
        let State { had_requests, open, waiting, since } = *activity.lock();
        let timeout = match (open, had_requests) {
            (0, _) if closing.is_some() => LAST_REQUEST,
            (0, _) if phase_now == Phase::Crowded => CROWDED,
            (0, false) => limits.header_timeout,
            _ => limits.idle_timeout,
        };
        let idle_since = if waiting > 0 { now } else { closing.map_or(since, |closing| since.max(closing)) };
        let deadline = idle_since + timeout;
        if deadline <= now {
            if closing.is_some() {
                return;
            }
            if !had_requests {
                if let Some(times) = TOO_LATE.count() {
                    info!(times, "closing connections on which no request was complete in time");
                }
                return;
            }
            connection.as_mut().graceful_shutdown();
            closing = Some(now);
            continue;
        }
        // What happens meanwhile may bring an earlier deadline, but not earlier than after this time.
        let mut timer = pin!(sleep_until(deadline.min(now + limits.idle_timeout)));
        let mut phases = phase.clone();
        let mut changed = pin!(phases.changed());
        // Nearly always it is the connection that has woken this task. What waits with the same waker already need not be
        // polled each time.
        let mut waits_with: Option<Waker> = None;
        let has_ended = poll_fn(|cx| {
            // An error concerns the peer, and there is nobody to tell.
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            let waits = waits_with.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            if waits && !timer.is_elapsed() && phase.has_changed().is_ok_and(|changed| !changed) {
                return Poll::Pending;
            }
            // Without budget they wait for nothing, and only say so.
            waits_with = has_budget_remaining().then(|| cx.waker().clone());
            match changed.as_mut().poll(cx) {
                Poll::Ready(changed) => Poll::Ready(changed.is_err()),
                Poll::Pending => timer.as_mut().poll(cx).map(|()| false),
            }
        });
        if has_ended.await {
            return;
        }
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().max_buf_size(MAX_HEAD as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_header_list_size(MAX_HEAD)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buf_size(MAX_UNSENT);
    builder
}

/// What happens on one connection.
struct Activity(Mutex<State>);

struct State {
    had_requests: bool,
    /// How many requests are open.
    open: usize,
    /// How many of them wait for us, and not for the peer.
    waiting: usize,
    /// When anything happened last after which none of them waited for us.
    since: Instant,
}

impl Activity {
    fn new() -> Self {
        Self(Mutex::new(State { had_requests: false, open: 0, waiting: 0, since: Instant::now() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        // While something waits for us, the time has not begun.
        if state.waiting == 0 {
            state.since = Instant::now();
        }
    }
}

/// One open request, which ends when this is dropped.
struct Open {
    activity: Arc<Activity>,
    /// Whether it waits for us.
    waits: bool,
}

impl Open {
    fn new(activity: Arc<Activity>) -> Self {
        activity.change(|state| {
            state.had_requests = true;
            state.open += 1;
            state.waiting += 1;
        });
        Self { activity, waits: true }
    }

    /// Something has happened, and the request waits for us now or it does not.
    fn note(&mut self, waits: bool) {
        let waited = std::mem::replace(&mut self.waits, waits);
        // If it still waits, nothing has happened.
        if !(waited && waits) {
            self.activity.change(|state| state.waiting = state.waiting + usize::from(waits) - usize::from(waited));
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.activity.change(|state| {
            state.open -= 1;
            state.waiting -= usize::from(self.waits);
        });
    }
}

/// The body of an answer. hyper asks for a frame when the peer has room for it.
#[pin_project]
struct Tracked<B> {
    #[pin]
    body: B,
    open: Open,
}

impl<B: HttpBody> HttpBody for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = this.body.poll_frame(cx);
        this.open.note(frame.is_pending());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        HttpBody::size_hint(&self.body)
    }
}
