//! What becomes of a refused credential: a reload, one replay, and a type that says why.
//!
//! Most of it without a socket and on paused time: [`Fal`] answers in memory, a [`Script`](support::Script) is the source. Uploads have
//! tests of their own.

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    future::pending,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use tokio::{sync::watch, time::Instant};
use tower::{Layer as _, Service};
use tower_fal::{
    FalAuth, FalAuthError, FalAuthLayer, FalRetry, FalRetryLayer,
    error::{BoxError, Refusal},
    retry::Typed,
};

use crate::support::{self, PATIENCE, key};

mod applications;

mod crowd;
mod early_keys;
mod events;
mod evidence;
mod forbidden;
mod gone;
mod lies;
mod passthrough;
mod refusals;
mod rule;
mod stack;
mod two_keys;

pub(crate) const ADMITTED: &str = "https://fal.run/fal-ai/flux/dev";
const ELSEWHERE: &str = "https://example.com/fal-ai/flux/dev";
const PROMPT: &str = r#"{"prompt":"a cat"}"#;

/// How long a refused request waits by default.
const RELOAD_WAIT: Duration = Duration::from_secs(2);

pub(crate) type AnswerBody = UnsyncBoxBody<Bytes, BoxError>;
pub(crate) type Answer = Response<AnswerBody>;
type Client<M = Typed> = FalRetry<FalAuth<Fal>, M>;

type World = support::World<Fal>;

impl World {
    async fn new() -> Self {
        let fal = Fal::default();
        fal.accept(1);
        Self::around(fal).await
    }

    fn retry(&self) -> FalRetryLayer {
        FalRetryLayer::new(self.store.clone())
    }

    fn client(&self) -> Client {
        self.client_by(&self.retry())
    }

    fn client_by<M>(&self, retry: &FalRetryLayer<M>) -> Client<M> {
        retry.layer(FalAuthLayer::new(self.store.clone()).layer(self.fal.clone()))
    }

    /// Key `n` is in the source and in the store, and nobody had to load it.
    fn rotate(&self, n: u64) {
        self.source.brings(n);
        self.store.replace(key(n));
    }
}

pub(crate) fn request(method: Method, uri: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri(uri).body(Full::new(body.into())).unwrap()
}

fn post() -> Request<Full<Bytes>> {
    request(Method::POST, ADMITTED, PROMPT)
}

/// The customer's key is number 9.
fn customers_post() -> Request<Full<Bytes>> {
    let mut request = post();
    request.extensions_mut().insert(key(9));
    request
}

#[track_caller]
fn refusal(result: Result<Answer, FalAuthError>) -> Refusal {
    let error = result.expect_err("an answer where a refusal should be");
    error.refusal().unwrap_or_else(|| panic!("no refusal: {error:?}")).clone()
}

#[track_caller]
fn unauthorized(result: Result<Answer, FalAuthError>) -> Refusal {
    assert!(matches!(result, Err(FalAuthError::Unauthorized(_))), "{result:?}");
    refusal(result)
}

#[track_caller]
fn accepted(result: Result<Answer, FalAuthError>) {
    assert_eq!(result.unwrap().status(), StatusCode::OK);
}

/// What came of it, and how much of paused time it took.
pub(crate) async fn timed<F: Future>(future: F) -> (F::Output, Duration) {
    let began = Instant::now();
    let output = future.await;
    (output, began.elapsed())
}

/// Timers tick in milliseconds and never fire early.
#[track_caller]
pub(crate) fn assert_took(took: Duration, about: Duration) {
    assert!(about <= took && took <= about + Duration::from_millis(2), "{took:?}, and not {about:?}");
}

pub(crate) fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
    answer_with(status, Full::new(body.into()).map_err(Into::into))
}

pub(crate) fn answer_with(status: u16, body: impl Body<Data = Bytes, Error = BoxError> + Send + 'static) -> Answer {
    Response::builder().status(status).body(body.boxed_unsync()).unwrap()
}

pub(crate) fn unknown_key() -> Answer {
    answer(401, r#"{"detail":"No user found for Key ID and Secret"}"#)
}

fn locked() -> Answer {
    answer(
        403,
        r#"{"detail":"User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}"#,
    )
}

/// fal without a socket: it knows keys by their number and notes what arrives. The applications of the owner `liar`
/// answer in its words that it knows none of them.
#[derive(Clone, Default)]
pub(crate) struct Fal {
    at: Arc<At>,
}

#[derive(Default)]
struct At {
    accepted: Mutex<BTreeSet<String>>,
    next: Mutex<VecDeque<Result<Answer, BoxError>>>,
    arrived: watch::Sender<Vec<Arrived>>,
    held: watch::Sender<Held>,
    in_flight: AtomicUsize,
}

/// Which requests are not judged for now.
#[derive(Default)]
enum Held {
    #[default]
    None,
    Key(u64),
    All,
}

#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    /// The number of the key; 0 if there was none.
    pub(crate) key: u64,
    pub(crate) body: Bytes,
    pub(crate) method: Method,
    pub(crate) at: Instant,
}

impl Fal {
    pub(crate) fn accept(&self, n: u64) {
        self.at.accepted.lock().unwrap().insert(key(n).header().to_str().unwrap().to_owned());
    }

    fn revoke(&self, n: u64) {
        self.at.accepted.lock().unwrap().remove(key(n).header().to_str().unwrap());
    }

    /// Key `n` is the only one from now on.
    fn knows_only(&self, n: u64) {
        self.at.accepted.lock().unwrap().clear();
        self.accept(n);
    }

    /// The next request that has no answer yet gets this one, whatever its key.
    pub(crate) fn will_answer(&self, answer: Answer) {
        self.at.next.lock().unwrap().push_back(Ok(answer));
    }

    pub(crate) fn will_fail(&self, error: impl Into<BoxError>) {
        self.at.next.lock().unwrap().push_back(Err(error.into()));
    }

    /// From now on no request is judged, until [`release`](Self::release).
    fn hold(&self) {
        self.at.held.send_replace(Held::All);
    }

    fn hold_key(&self, n: u64) {
        self.at.held.send_replace(Held::Key(n));
    }

    fn release(&self) {
        self.at.held.send_replace(Held::None);
    }

    pub(crate) fn arrived(&self) -> Vec<Arrived> {
        self.at.arrived.borrow().clone()
    }

    /// The keys that it was shown, in order.
    pub(crate) fn keys(&self) -> Vec<u64> {
        self.at.arrived.borrow().iter().map(|arrived| arrived.key).collect()
    }

    /// Waits until so many requests have arrived, with their bodies.
    async fn arrivals_reach(&self, count: usize) {
        let mut arrived = self.at.arrived.subscribe();
        let reached = tokio::time::timeout(PATIENCE, arrived.wait_for(|arrived| arrived.len() >= count)).await;
        assert!(reached.is_ok(), "{} requests arrived, {count} wanted", self.arrived().len());
    }

    /// How many requests it has not answered yet, and nobody has dropped.
    fn in_flight(&self) -> usize {
        self.at.in_flight.load(Ordering::SeqCst)
    }
}

impl<B> Service<Request<B>> for Fal
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: fmt::Debug,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let at = Arc::clone(&self.at);
        let in_flight = InFlight::new(Arc::clone(&at));
        Box::pin(async move {
            let _in_flight = in_flight;
            let (head, body) = request.into_parts();
            let shown = head.headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
            // All of it, or what is kept of it could not be seen.
            let body = body.collect().await.expect("the upload broke off").to_bytes();
            let number = |shown: &str| shown.strip_prefix("Key id-")?.split(':').next()?.parse().ok();
            let arrived = Arrived {
                key: shown.as_deref().map_or(0, |shown| number(shown).expect("no key of these tests")),
                body,
                method: head.method,
                at: Instant::now(),
            };
            let key = arrived.key;
            at.arrived.send_modify(|all| all.push(arrived));
            let may_go_on = |held: &Held| match held {
                Held::None => true,
                Held::Key(held) => *held != key,
                Held::All => false,
            };
            let _ = at.held.subscribe().wait_for(may_go_on).await;
            if let Some(answer) = at.next.lock().unwrap().pop_front() {
                return answer;
            }
            let lies = head.uri.path().starts_with("/liar/");
            let known = !lies && shown.is_some_and(|shown| at.accepted.lock().unwrap().contains(&shown));
            Ok(if known { answer(200, r#"{"images":[]}"#) } else { unknown_key() })
        })
    }
}

struct InFlight(Arc<At>);

impl InFlight {
    fn new(at: Arc<At>) -> Self {
        at.in_flight.fetch_add(1, Ordering::SeqCst);
        Self(at)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The body of an answer that is made while it is read.
pub(crate) struct Lazy {
    pieces: u64,
    piece: Bytes,
    then: Option<Then>,
    hint: SizeHint,
    read: Arc<Read>,
}

enum Then {
    Hang,
    Fail,
    Trailers(HeaderMap),
}

/// What became of a [`Lazy`] body.
#[derive(Default)]
pub(crate) struct Read {
    pieces: AtomicU64,
    to_its_end: AtomicBool,
    dropped: AtomicBool,
}

impl Lazy {
    /// So many times this piece.
    pub(crate) fn new(pieces: u64, piece: impl Into<Bytes>) -> Self {
        Self { pieces, piece: piece.into(), then: None, hint: SizeHint::default(), read: Arc::default() }
    }

    /// It never comes to its end.
    pub(crate) fn hangs(mut self) -> Self {
        self.then = Some(Then::Hang);
        self
    }

    fn fails(mut self) -> Self {
        self.then = Some(Then::Fail);
        self
    }

    fn trailers(mut self, trailers: HeaderMap) -> Self {
        self.then = Some(Then::Trailers(trailers));
        self
    }

    fn exact(mut self) -> Self {
        self.hint = SizeHint::with_exact(self.pieces * self.piece.len() as u64);
        self
    }

    pub(crate) fn read(&self) -> Arc<Read> {
        Arc::clone(&self.read)
    }
}

impl Read {
    pub(crate) fn pieces(&self) -> u64 {
        self.pieces.load(Ordering::SeqCst)
    }

    pub(crate) fn to_its_end(&self) -> bool {
        self.to_its_end.load(Ordering::SeqCst)
    }

    pub(crate) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::SeqCst)
    }
}

impl Body for Lazy {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.pieces > 0 {
            this.pieces -= 1;
            this.read.pieces.fetch_add(1, Ordering::SeqCst);
            if this.hint.exact().is_some() {
                this.hint = SizeHint::with_exact(this.pieces * this.piece.len() as u64);
            }
            return Poll::Ready(Some(Ok(Frame::data(this.piece.clone()))));
        }
        match this.then.take() {
            Some(Then::Hang) => {
                this.then = Some(Then::Hang);
                std::pin::pin!(pending()).poll(cx)
            }
            Some(Then::Fail) => Poll::Ready(Some(Err("the connection was reset".into()))),
            Some(Then::Trailers(trailers)) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            None => {
                this.read.to_its_end.store(true, Ordering::SeqCst);
                Poll::Ready(None)
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.read.dropped.store(true, Ordering::SeqCst);
    }
}
