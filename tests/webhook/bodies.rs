//! How the body is read, and how it is handed on.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full, StreamBody};
use tower::{Layer as _, ServiceBuilder, ServiceExt as _, limit::ConcurrencyLimitLayer, service_fn};
use tower_fal::{
    mock::MockFal,
    webhook::{VerifyWebhook, VerifyWebhookLayer, WebhookBody},
};

use crate::support::{BODY, Handler, PATIENCE, delivery, fixed_keys_of, layer, reason, signed, with_headers};

type Frames = Vec<Result<Frame<Bytes>, io::Error>>;

/// A body of frames that says of its length what it likes, and counts how often it is asked for one.
struct Claims<S> {
    frames: StreamBody<S>,
    hint: SizeHint,
    polls: Arc<AtomicUsize>,
}

impl<S: Stream<Item = Result<Frame<Bytes>, io::Error>> + Unpin> Body for Claims<S> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.polls.fetch_add(1, Ordering::SeqCst);
        Pin::new(&mut self.frames).poll_frame(cx)
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

fn data(bytes: &'static [u8]) -> Result<Frame<Bytes>, io::Error> {
    Ok(Frame::data(Bytes::from_static(bytes)))
}

/// A delivery of these bytes, whose body comes in these frames.
fn framed<B>(fal: &MockFal, bytes: &[u8], body: B) -> Request<B> {
    let headers = fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), bytes);
    with_headers(headers, Bytes::new()).map(|_| body)
}

fn frames(frames: Frames) -> StreamBody<impl Stream<Item = Result<Frame<Bytes>, io::Error>> + Unpin> {
    StreamBody::new(stream::iter(frames))
}

#[tokio::test]
async fn the_body_arrives_unchanged_with_its_trailers() {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let verify = layer(fixed_keys_of(&fal)).layer(handler.clone());
    let mut trailers = HeaderMap::new();
    trailers.insert("x-trailer", HeaderValue::from_static("1"));
    let (first, second) = BODY.split_at(10);
    for pieces in [
        vec![data(BODY)],
        vec![data(first), data(second)],
        vec![data(b""), data(first), data(b""), data(second), data(b"")],
        BODY.iter().map(|byte| Ok(Frame::data(Bytes::copy_from_slice(&[*byte])))).collect(),
        vec![data(first), data(second), Ok(Frame::trailers(trailers.clone()))],
    ] {
        let has_trailers = pieces.last().unwrap().as_ref().unwrap().is_trailers();
        let response = verify.clone().oneshot(framed(&fal, BODY, frames(pieces))).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "handled");
        let handled = handler.last();
        assert_eq!(handled.body.unwrap(), BODY);
        assert_eq!(handled.trailers, has_trailers.then(|| trailers.clone()));
        assert_eq!(handled.headers["x-fal-webhook-request-id"], "r-1");
    }
    assert_eq!(handler.count(), 5);
}

#[tokio::test]
async fn an_empty_body_is_a_body() {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let verify = layer(fixed_keys_of(&fal)).layer(handler.clone());
    let response = verify.oneshot(framed(&fal, b"", frames(vec![]))).await.unwrap();
    assert_eq!((response.status(), handler.last().body.unwrap()), (StatusCode::OK, Bytes::new()));
}

#[tokio::test]
async fn the_handler_is_told_the_length_of_the_body() {
    let fal = MockFal::start().await.unwrap();
    let verify = layer(fixed_keys_of(&fal)).layer(service_fn(async |request: Request<WebhookBody<_>>| {
        let mut body = request.into_body();
        assert_eq!(body.size_hint().exact(), Some(BODY.len() as u64));
        assert!(!body.is_end_stream());
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), BODY);
        assert!(body.is_end_stream() && body.frame().await.is_none());
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    }));
    let (first, second) = BODY.split_at(10);
    let response = verify.oneshot(framed(&fal, BODY, frames(vec![data(first), data(second)]))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}

fn capped(fal: &MockFal, most: usize) -> (Handler, VerifyWebhook<Handler>) {
    let handler = Handler::new();
    (handler.clone(), layer(fixed_keys_of(fal)).max_body(most).layer(handler))
}

#[tokio::test]
async fn a_body_longer_than_the_cap_is_refused() {
    let fal = MockFal::start().await.unwrap();
    let (handler, verify) = capped(&fal, BODY.len());
    let response = verify.clone().oneshot(framed(&fal, BODY, frames(vec![data(BODY)]))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);

    let (handler_of_less, verify) = capped(&fal, BODY.len() - 1);
    let (first, second) = BODY.split_at(10);
    for pieces in [vec![data(BODY)], vec![data(first), data(second)]] {
        let response = verify.clone().oneshot(framed(&fal, BODY, frames(pieces))).await.unwrap();
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(reason(response).await, "body_too_long");
    }
    assert_eq!((handler.count(), handler_of_less.count()), (1, 0));
}

#[tokio::test]
async fn a_body_that_says_it_is_too_long_is_not_read() {
    let fal = MockFal::start().await.unwrap();
    let (_, verify) = capped(&fal, 1024);
    let polls = Arc::new(AtomicUsize::new(0));
    let body = Claims { frames: frames(vec![data(BODY)]), hint: SizeHint::with_exact(1025), polls: Arc::clone(&polls) };
    let response = verify.oneshot(framed(&fal, BODY, body)).await.unwrap();
    assert_eq!((reason(response).await.as_str(), polls.load(Ordering::SeqCst)), ("body_too_long", 0));
}

#[tokio::test]
async fn a_body_that_lies_about_its_length_is_measured() {
    let fal = MockFal::start().await.unwrap();
    let (handler, verify) = capped(&fal, 1024);
    let polls = Arc::new(AtomicUsize::new(0));
    // It says one byte, and has no end.
    let endless = StreamBody::new(stream::repeat_with(|| data(&[b' '; 100])).boxed());
    let body = Claims { frames: endless, hint: SizeHint::with_exact(1), polls: Arc::clone(&polls) };
    let response = verify.oneshot(framed(&fal, BODY, body)).await.unwrap();
    assert_eq!((reason(response).await.as_str(), polls.load(Ordering::SeqCst)), ("body_too_long", 11));
    assert_eq!(handler.count(), 0);
}

#[tokio::test]
async fn a_body_that_is_cut_off_is_refused() {
    let fal = MockFal::start().await.unwrap();
    let (handler, verify) = capped(&fal, 1024);
    let cut = frames(vec![data(BODY), Err(io::ErrorKind::ConnectionReset.into())]);
    let response = verify.oneshot(framed(&fal, BODY, cut)).await.unwrap();
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    assert_eq!((reason(response).await.as_str(), handler.count()), ("body_cut_off", 0));
}

/// With paused time, and keys that need no socket.
#[tokio::test(start_paused = true)]
async fn a_body_that_comes_too_slowly_is_given_up() {
    let fal = MockFal::start().await.unwrap();
    let slow = || {
        let pieces = stream::iter(BODY).then(|byte| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, io::Error>(Frame::data(Bytes::copy_from_slice(&[*byte])))
        });
        StreamBody::new(pieces.boxed())
    };
    let handler = Handler::new();
    let before = tokio::time::Instant::now();
    let verify = layer(fixed_keys_of(&fal)).layer(handler.clone());
    let response = verify.oneshot(framed(&fal, BODY, slow())).await.unwrap();
    assert_eq!((response.status(), before.elapsed().as_secs()), (StatusCode::SERVICE_UNAVAILABLE, 8));
    assert_eq!((reason(response).await.as_str(), handler.count()), ("body_timeout", 0));

    let verify = layer(fixed_keys_of(&fal)).body_timeout(Duration::from_secs(100)).layer(handler.clone());
    let response = verify.oneshot(framed(&fal, BODY, slow())).await.unwrap();
    assert_eq!((response.status(), handler.last().body.unwrap()), (StatusCode::OK, Bytes::from_static(BODY)));
}

#[tokio::test]
async fn without_the_right_headers_no_body_is_read() {
    let fal = MockFal::start().await.unwrap();
    let (handler, verify) = capped(&fal, 1024);
    for (name, expected) in
        [("x-fal-webhook-signature", "missing_header"), ("x-fal-webhook-timestamp", "invalid_header")]
    {
        let polls = Arc::new(AtomicUsize::new(0));
        let body = Claims { frames: frames(vec![data(BODY)]), hint: SizeHint::new(), polls: Arc::clone(&polls) };
        let mut request = framed(&fal, BODY, body);
        match expected {
            "missing_header" => drop(request.headers_mut().remove(name)),
            _ => drop(request.headers_mut().insert(name, HeaderValue::from_static("+1"))),
        }
        let response = verify.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!((reason(response).await.as_str(), polls.load(Ordering::SeqCst)), (expected, 0));
    }
    assert_eq!(handler.count(), 0);
}

/// Whoever sends a body that never ends must not keep a place of the handler's.
#[tokio::test]
async fn a_strangers_slow_body_takes_no_place_of_the_handler() {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let verify = ServiceBuilder::new()
        .layer::<VerifyWebhookLayer>(layer(fixed_keys_of(&fal)))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(handler.clone());
    let endless = StreamBody::new(stream::pending::<Result<Frame<Bytes>, io::Error>>());
    let slow = tokio::spawn(verify.clone().oneshot(framed(&fal, BODY, endless)));
    tokio::task::yield_now().await;
    let answered = tokio::time::timeout(PATIENCE, verify.oneshot(delivery(&fal, "r-2"))).await;
    assert_eq!(answered.unwrap().unwrap().status(), StatusCode::OK);
    slow.abort();
}

/// A middleware in front that reads JSON and writes it again: the same document, and other bytes.
#[tokio::test]
async fn json_that_was_written_again_is_not_believed() {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let rewrites = tower::util::MapRequestLayer::new(|request: Request<Full<Bytes>>| {
        let (head, mut body) = request.into_parts();
        let bytes = body.frame();
        let bytes = futures_util::FutureExt::now_or_never(bytes).unwrap().unwrap().unwrap().into_data().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        Request::from_parts(head, Full::<Bytes>::from(document.to_string()))
    });
    let verify = ServiceBuilder::new().layer(rewrites).layer(layer(fixed_keys_of(&fal))).service(handler.clone());
    let response = verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap();
    assert_eq!((reason(response).await.as_str(), handler.count()), ("bad_signature", 0));
    // A document that happens to be written the same way passes.
    let same = serde_json::from_slice::<serde_json::Value>(BODY).unwrap().to_string();
    let response = verify.oneshot(signed(&fal, "r-1", same.as_bytes())).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}
