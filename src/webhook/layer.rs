use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    Accounts, InvalidAccounts, RecentIds, Rejection, ResponseBody, SeenIds, VerifiedWebhook, WebhookBody, WebhookKeys,
    seen::{Begun, BoxSeenIds, Place},
    signature::{Headers, TOLERANCE},
};
use crate::events;

/// The longest body of a delivery, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// How long a body may take. With the time to fetch keys it is less than the 15 s that fal waits for an answer.
const BODY_TIMEOUT: Duration = Duration::from_secs(8);

/// Layer that applies [`VerifyWebhook`]: it lets only those deliveries through that fal has signed for you. See the
/// [module docs](super) for an example and for all that it answers.
#[derive(Clone, Debug)]
#[must_use]
pub struct VerifyWebhookLayer {
    rules: Arc<Rules>,
}

/// What a delivery has to meet.
#[derive(Clone, Debug)]
struct Rules {
    keys: WebhookKeys,
    accounts: Accounts,
    tolerance: Duration,
    max_body: usize,
    body_timeout: Duration,
    seen: BoxSeenIds,
    skip_repeats: bool,
    observe: bool,
    clock: Clock,
}

/// Where the wall clock is read.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl VerifyWebhookLayer {
    /// Deliveries for these accounts, by their user ids, and for no others.
    ///
    /// # Errors
    /// When there is no id, or one that no delivery can have. See [`Accounts::only`].
    pub fn for_accounts<I>(keys: WebhookKeys, user_ids: I) -> Result<Self, InvalidAccounts>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        Ok(Self::new(keys, Accounts::only(user_ids)?))
    }

    /// Deliveries for every account. **Any customer of fal's can have a delivery signed and sent to your URL**, with any
    /// content: this is for handlers that look at [`VerifiedWebhook::user_id`] themselves.
    pub fn any_account(keys: WebhookKeys) -> Self {
        Self::new(keys, Accounts::any())
    }

    fn new(keys: WebhookKeys, accounts: Accounts) -> Self {
        let rules = Rules {
            keys,
            accounts,
            tolerance: TOLERANCE,
            max_body: MAX_BODY,
            body_timeout: BODY_TIMEOUT,
            seen: BoxSeenIds::new(RecentIds::default()),
            skip_repeats: false,
            observe: false,
            clock: Clock(Arc::new(SystemTime::now)),
        };
        Self { rules: Arc::new(rules) }
    }

    /// How far the timestamp of a delivery and the clock of this server may be apart, in either direction. Default: 300 s,
    /// as fal documents it. It counts in whole seconds.
    ///
    /// fal does not say whether a repeat has the timestamp of the first delivery. If you see
    /// [`stale`](Rejection::Stale) ones whose clock is right, raise it to the time for which fal repeats (two hours), and
    /// rely on [`SeenIds`] against deliveries that somebody else repeats.
    pub fn tolerance(self, tolerance: Duration) -> Self {
        self.with(|rules| rules.tolerance = tolerance)
    }

    /// The longest body, in bytes. Default: 16 MiB. A longer one is answered with 413.
    ///
    /// Whoever can reach the server can have so much memory taken for each request, for the time of
    /// [`body_timeout`](Self::body_timeout): a layer around this one that limits how many requests are under way bounds
    /// the sum.
    pub fn max_body(self, bytes: usize) -> Self {
        self.with(|rules| rules.max_body = bytes)
    }

    /// How long the body may take to arrive. Default: 8 s. fal waits 15 s for the whole answer.
    pub fn body_timeout(self, timeout: Duration) -> Self {
        self.with(|rules| rules.body_timeout = timeout)
    }

    /// Where the ids of handled deliveries are kept. Default: [`RecentIds`] in this process, which all clones of this layer
    /// share.
    pub fn seen_ids(self, ids: impl SeenIds) -> Self {
        self.with(|rules| rules.seen = BoxSeenIds::new(ids))
    }

    /// Answers a repeat of a delivery that was handled with 200, without the handler. Default: off, and the handler gets
    /// it with [`is_repeat`](VerifiedWebhook::is_repeat).
    pub fn skip_repeats(self) -> Self {
        self.with(|rules| rules.skip_repeats = true)
    }

    /// Hands every request on, and only logs what would have been refused: for the day on which a server that takes
    /// deliveries without verifying them is switched over. Default: off.
    ///
    /// **Anybody can then reach the handler.** A request that was verified has a [`VerifiedWebhook`] in its extensions, and
    /// any other one a [`Rejection`]. The log needs the feature `tracing`, and the feature `metrics` counts.
    pub fn observe(self) -> Self {
        self.with(|rules| rules.observe = true)
    }

    /// Where the wall clock is read that timestamps are compared with. Default: the system's. A test that replays a
    /// recorded delivery hands in the time of that.
    pub fn clock(self, now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.with(|rules| rules.clock = Clock(Arc::new(now)))
    }

    fn with(mut self, change: impl FnOnce(&mut Rules)) -> Self {
        change(Arc::make_mut(&mut self.rules));
        self
    }
}

impl<S> Layer<S> for VerifyWebhookLayer {
    type Service = VerifyWebhook<S>;

    fn layer(&self, inner: S) -> Self::Service {
        VerifyWebhook { inner, rules: Arc::clone(&self.rules) }
    }
}

/// Middleware that verifies deliveries. See the [module docs](super) for an example.
#[derive(Clone, Debug)]
pub struct VerifyWebhook<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> VerifyWebhook<S> {
    /// A reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// A mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service, without this one.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B, R> Service<Request<B>> for VerifyWebhook<S>
where
    S: Service<Request<WebhookBody<B>>, Response = Response<R>, Future: Send> + Clone + Send + 'static,
    S::Error: Send,
    B: Body<Data: Send, Error: Send> + Send + 'static,
    R: Send + 'static,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<R, S::Error>;

    /// Always ready. The inner service is asked when there is a delivery that was verified: a stranger's request must not
    /// take a place of those that the inner service has, for as long as its body takes.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ResponseFuture { inner: Box::pin(handle(Arc::clone(&self.rules), self.inner.clone(), request)) }
    }
}

/// Response future of [`VerifyWebhook`]. It is boxed, which is nothing beside the work of a signature.
pub struct ResponseFuture<R, E> {
    inner: Pin<Box<dyn Future<Output = Result<Response<ResponseBody<R>>, E>> + Send>>,
}

impl<R, E> Future for ResponseFuture<R, E> {
    type Output = Result<Response<ResponseBody<R>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.inner.as_mut().poll(cx)
    }
}

impl<R, E> fmt::Debug for ResponseFuture<R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

async fn handle<S, B, R>(
    rules: Arc<Rules>,
    mut service: S,
    request: Request<B>,
) -> Result<Response<ResponseBody<R>>, S::Error>
where
    S: Service<Request<WebhookBody<B>>, Response = Response<R>>,
    B: Body,
{
    let (mut head, body) = request.into_parts();
    let mut body = WebhookBody::new(body);
    // Only what this layer says counts.
    head.extensions.remove::<VerifiedWebhook>();
    head.extensions.remove::<Rejection>();
    let mut place = None;
    match rules.judge(&head.headers, &mut body).await {
        Ok(Judged::Handle(webhook, its)) => {
            head.extensions.insert(webhook);
            place = its;
        }
        Ok(Judged::Skip) => {
            events::webhook::skipped();
            return Ok(Response::new(ResponseBody::own(Bytes::new())));
        }
        Err(rejection) => {
            events::webhook::rejected(rejection.as_str(), &rejection, rules.observe);
            if !rules.observe {
                return Ok(rejection.into_response());
            }
            head.extensions.insert(rejection);
        }
    }
    poll_fn(|cx| service.poll_ready(cx)).await?;
    let response = service.call(Request::from_parts(head, body)).await?;
    if let Some(place) = place {
        place.end(response.status().is_success()).await;
    }
    Ok(response.map(ResponseBody::inner))
}

/// What becomes of a delivery that may be believed.
enum Judged {
    /// The handler gets it. The place is there for a new one, and is given free when it is dropped.
    Handle(VerifiedWebhook, Option<Place>),
    /// It was handled before.
    Skip,
}

impl Rules {
    /// The cheap questions first: a request without the right headers has none of its body read.
    async fn judge<B: Body>(&self, headers: &HeaderMap, body: &mut WebhookBody<B>) -> Result<Judged, Rejection> {
        let headers = Headers::read(headers)?;
        tokio::time::timeout(self.body_timeout, body.read_whole(self.max_body))
            .await
            .map_err(|_| Rejection::BodyTimeout(self.body_timeout))??;
        let webhook = self.verify(headers, body.bytes()).await?;
        self.note(webhook).await
    }

    async fn verify(&self, headers: Headers, body: &[u8]) -> Result<VerifiedWebhook, Rejection> {
        let signed = headers.over(body);
        let current = self.keys.current().await?;
        let acceptable = signed.is_for(&self.accounts, self.tolerance, (self.clock.0)());
        if !signed.is_by(&current.keys) {
            // Newer keys are worth a fetch only for what would then be believed.
            acceptable.map_err(|_| Rejection::BadSignature)?;
            if !signed.is_by(&self.keys.after(&current).await?) {
                return Err(Rejection::BadSignature);
            }
            return Ok(signed.verified());
        }
        // Said of what fal has signed, and of nothing else: nobody else learns which accounts are expected.
        acceptable?;
        Ok(signed.verified())
    }

    async fn note(&self, mut webhook: VerifiedWebhook) -> Result<Judged, Rejection> {
        let begun = self.seen.begin(&webhook).await.map_err(|error| {
            events::webhook::not_known(&*error);
            Rejection::SeenIdsFailed
        });
        match begun {
            Ok(Begun::New(place)) => Ok(Judged::Handle(webhook, Some(place))),
            Ok(Begun::Handled) if self.skip_repeats && !self.observe => Ok(Judged::Skip),
            Ok(Begun::Handled) => {
                webhook.repeat = true;
                Ok(Judged::Handle(webhook, None))
            }
            // It was verified all the same, which the handler is to know.
            Ok(Begun::BeingHandled) | Err(_) if self.observe => {
                let rejection = begun.err().unwrap_or(Rejection::BeingHandled);
                events::webhook::rejected(rejection.as_str(), &rejection, true);
                Ok(Judged::Handle(webhook, None))
            }
            Ok(Begun::BeingHandled) => Err(Rejection::BeingHandled),
            Err(rejection) => Err(rejection),
        }
    }
}
