//! A client that goes away, in each state of a request: nothing is left behind, and no reload is cancelled.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer as _, Service as _, ServiceExt as _};
use tower_fal::{
    FalAuthLayer, FalRetryLayer,
    retry::{ReplayBody, Transient},
};

use super::{Lazy, World, answer, answer_with, post, request};
use crate::support::status_where;

/// A request is kept in memory, and then it is not.
struct Kept(FalRetryLayer);

impl Kept {
    #[track_caller]
    fn assert_some(&self) {
        assert_eq!(self.0.replay_memory_used(), super::PROMPT.len());
    }

    #[track_caller]
    fn assert_nothing(&self) {
        assert_eq!(self.0.replay_memory_used(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn while_it_is_on_its_way() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    world.fal.hold();
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(post()));
    assert_pending!(request.poll());
    assert_eq!((world.fal.keys().len(), world.fal.in_flight()), (1, 1));
    kept.assert_some();
    drop(request);
    assert_eq!(world.fal.in_flight(), 0);
    kept.assert_nothing();
}

#[tokio::test(start_paused = true)]
async fn after_its_answer_has_begun() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    world.fal.hold();
    let mut client = world.client_by(&kept.0);
    let mut request = task::spawn(client.call(post()));
    assert_pending!(request.poll());
    kept.assert_some();
    world.fal.release();
    let _answer = assert_ready_ok!(request.poll());
    kept.assert_nothing(); // although the future is still there
}

#[tokio::test(start_paused = true)]
async fn while_the_refusal_is_read() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    let body = Lazy::new(1, "{").hangs();
    let read = body.read();
    world.fal.will_answer(answer_with(401, body));
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(post()));
    assert_pending!(request.poll());
    assert_eq!((world.fal.in_flight(), read.pieces(), read.is_dropped()), (0, 1, false));
    kept.assert_some();
    drop(request);
    assert!(read.is_dropped());
    kept.assert_nothing();
    tokio::task::yield_now().await;
    assert_eq!(world.reloads(), 0);
}

#[tokio::test(start_paused = true)]
async fn while_the_source_is_asked() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    world.fal.revoke(1);
    world.source.brings(2);
    world.source.close();
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(post()));
    assert_pending!(request.poll());
    world.source.loads_reach(2).await;
    assert_pending!(request.poll());
    kept.assert_some();
    drop(request);
    kept.assert_nothing();
    world.source.open();
    status_where(&world.store, |status| status.generation.get() == 2).await;
    assert_eq!((world.reloads(), world.fal.keys()), (1, vec![1]));
}

#[tokio::test(start_paused = true)]
async fn before_the_load_that_it_asked_for_has_begun() {
    let world = World::new().await;
    world.fal.revoke(1);
    world.source.brings(2);
    let mut request = task::spawn(world.client().oneshot(post()));
    assert_pending!(request.poll());
    assert_eq!(world.reloads(), 0);
    drop(request);
    status_where(&world.store, |status| status.generation.get() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn while_it_waits_for_a_key_that_is_late() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    world.fal.revoke(1);
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(post()));
    assert_pending!(request.poll());
    world.source.loads_reach(2).await;
    tokio::task::yield_now().await;
    assert_pending!(request.poll());
    kept.assert_some();
    drop(request);
    kept.assert_nothing();
}

#[tokio::test(start_paused = true)]
async fn while_the_service_is_not_ready_for_the_second_attempt() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    let (inner, mut handle) = tower_test::mock::pair::<Request<ReplayBody<Full<Bytes>>>, Response<Full<Bytes>>>();
    let service = kept.0.layer(FalAuthLayer::new(world.store.clone()).layer(inner));
    handle.allow(1);
    let mut request = task::spawn(service.oneshot(post()));
    assert_pending!(request.poll());
    let (first, respond) = handle.next_request().await.unwrap();
    assert_eq!(first.into_body().collect().await.unwrap().to_bytes(), super::PROMPT);
    world.store.replace(crate::support::key(2));
    respond.send_response(Response::builder().status(401).body(Full::default()).unwrap());
    assert_pending!(request.poll());
    assert!(!request.is_woken(), "it is not ready");
    kept.assert_some();
    drop(request);
    kept.assert_nothing();
    assert!(handle.next_request().await.is_none(), "the service is gone, and no second request was made");
}

#[tokio::test(start_paused = true)]
async fn while_the_second_attempt_is_on_its_way() {
    let world = World::new().await;
    let kept = Kept(world.retry());
    world.fal.revoke(1);
    world.source.brings(2);
    world.fal.hold_key(2);
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(post()));
    assert_pending!(request.poll());
    status_where(&world.store, |status| status.generation.get() == 2).await;
    assert_pending!(request.poll());
    assert_eq!((world.fal.keys(), world.fal.in_flight()), (vec![1, 2], 1));
    kept.assert_some();
    drop(request);
    assert_eq!(world.fal.in_flight(), 0);
    kept.assert_nothing();
}

#[tokio::test(start_paused = true)]
async fn while_it_waits_after_a_failure_in_passing() {
    let world = World::new().await;
    let kept = Kept(world.retry().transient(Transient::default()));
    let mut busy = answer(503, "busy");
    busy.headers_mut().insert("retry-after", "5".parse().unwrap());
    world.fal.will_answer(busy);
    let get = request(Method::GET, super::ADMITTED, super::PROMPT);
    let mut request = task::spawn(world.client_by(&kept.0).oneshot(get));
    assert_pending!(request.poll());
    kept.assert_some();
    drop(request);
    kept.assert_nothing();
}

/// It never ends, and is held by the service as hyper may hold it: for as long as the connection lives.
#[tokio::test(start_paused = true)]
async fn the_body_goes_along_although_the_attempt_is_still_held() {
    let alive = Arc::new(());
    let held = Arc::new(Mutex::new(Vec::new()));
    let service = {
        let held = Arc::clone(&held);
        tower::service_fn(move |request: Request<ReplayBody<Endless>>| {
            held.lock().unwrap().push(request.into_body());
            std::future::ready(Ok::<_, std::convert::Infallible>(super::unknown_key()))
        })
    };
    let world = World::new().await;
    let client = world.retry().layer(FalAuthLayer::new(world.store.clone()).layer(service));
    let body = Endless(Arc::clone(&alive));
    let mut request = task::spawn(client.oneshot(Request::post(super::ADMITTED).body(body).unwrap()));
    assert_pending!(request.poll());
    world.source.loads_reach(2).await;
    assert_pending!(request.poll());
    assert_eq!(Arc::strong_count(&alive), 2);
    drop(request);
    assert_eq!((Arc::strong_count(&alive), held.lock().unwrap().len()), (1, 1));
}

struct Endless(#[allow(dead_code)] Arc<()>);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        Poll::Pending
    }
}
