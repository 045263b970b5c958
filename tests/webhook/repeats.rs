//! What becomes of a delivery that comes again.

use std::{
    convert::Infallible,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};
use tower::{Layer as _, Service, ServiceExt as _, service_fn};
use tower_fal::{
    error::BoxError,
    mock::MockFal,
    webhook::{
        RecentIds, ResponseBody, Seen, SeenIds, VerifiedWebhook, VerifyWebhook, VerifyWebhookLayer, WebhookBody,
    },
};

use crate::support::{BODY, Handler, PATIENCE, delivery, fixed_keys_of, layer, reason, with_headers};

type Delivery = Request<WebhookBody<Full<Bytes>>>;

fn answer(status: StatusCode) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::default()).unwrap()
}

async fn verifying() -> (MockFal, VerifyWebhookLayer) {
    let fal = MockFal::start().await.unwrap();
    let layer = layer(fixed_keys_of(&fal));
    (fal, layer)
}

#[tokio::test]
async fn a_repeat_is_flagged_and_not_refused() {
    let (fal, layer) = verifying().await;
    let handler = Handler::new();
    let verify = layer.layer(handler.clone());
    for id in ["r-1", "r-1", "r-2", "r-1"] {
        assert_eq!(verify.clone().oneshot(delivery(&fal, id)).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(handler.repeats(), [false, true, false, true]);
}

/// The example of an outage: nothing is lost, and nothing is done twice.
#[tokio::test]
async fn a_delivery_that_failed_is_new_when_it_comes_again() {
    let (fal, layer) = verifying().await;
    for status in [500, 404, 302, 400, 503] {
        let status = StatusCode::from_u16(status).unwrap();
        let handler = Handler::answering([status, status, StatusCode::ACCEPTED]);
        let verify = layer.clone().seen_ids(RecentIds::default()).skip_repeats().layer(handler.clone());
        let mut statuses = Vec::new();
        for _ in 0..4 {
            statuses.push(verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap().status());
        }
        assert_eq!(statuses, [status, status, StatusCode::ACCEPTED, StatusCode::OK]);
        assert_eq!(handler.repeats(), [false; 3]);
    }
}

#[tokio::test]
async fn an_inner_error_makes_it_new_again() {
    let (fal, layer) = verifying().await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let verify = layer.layer(service_fn(move |request: Delivery| {
        let call = counted.fetch_add(1, Ordering::SeqCst);
        assert!(!request.extensions().get::<VerifiedWebhook>().unwrap().is_repeat());
        async move { if call == 0 { Err("no database") } else { Ok(answer(StatusCode::OK)) } }
    }));
    assert_eq!(verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap_err(), "no database");
    assert_eq!(verify.oneshot(delivery(&fal, "r-1")).await.unwrap().status(), StatusCode::OK);
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn skipped_repeats_do_not_reach_the_handler() {
    let (fal, layer) = verifying().await;
    let handler = Handler::new();
    let verify = layer.skip_repeats().layer(handler.clone());
    for _ in 0..3 {
        assert_eq!(verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(handler.repeats(), [false]);
}

#[tokio::test]
async fn an_id_of_another_account_is_another_delivery() {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let verify = VerifyWebhookLayer::any_account(fixed_keys_of(&fal)).layer(handler.clone());
    for (user, request) in [("a", "bc"), ("ab", "c"), ("a", "bc")] {
        let headers = fal.sign_webhook(user, request, SystemTime::now(), BODY);
        let response = verify.clone().oneshot(with_headers(headers, Bytes::from_static(BODY))).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    }
    assert_eq!(handler.repeats(), [false, false, true]);
}

/// A handler that is inside until it is let out.
#[derive(Clone)]
struct Gate {
    entered: Arc<watch::Sender<usize>>,
    out: Arc<Semaphore>,
}

impl Gate {
    fn new() -> Self {
        Self { entered: Arc::new(watch::Sender::new(0)), out: Arc::new(Semaphore::new(0)) }
    }

    async fn pass(&self) {
        self.entered.send_modify(|entered| *entered += 1);
        self.out.acquire().await.unwrap().forget();
    }

    async fn entered(&self, count: usize) {
        let mut entered = self.entered.subscribe();
        timeout(PATIENCE, entered.wait_for(|entered| *entered >= count)).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn of_two_deliveries_at_once_one_has_to_wait() {
    let (fal, layer) = verifying().await;
    let gate = Gate::new();
    let inside = gate.clone();
    let verify = layer.layer(service_fn(move |_: Delivery| {
        let gate = inside.clone();
        async move {
            gate.pass().await;
            Ok::<_, Infallible>(answer(StatusCode::OK))
        }
    }));
    let first = tokio::spawn(verify.clone().oneshot(delivery(&fal, "r-1")));
    gate.entered(1).await;
    let second = timeout(PATIENCE, verify.clone().oneshot(delivery(&fal, "r-1"))).await.unwrap().unwrap();
    assert_eq!(
        (second.status(), second.headers()["retry-after"].as_bytes()),
        (StatusCode::SERVICE_UNAVAILABLE, &b"1"[..])
    );
    assert_eq!(reason(second).await, "being_handled");
    // Another one does not wait.
    let other = tokio::spawn(verify.clone().oneshot(delivery(&fal, "r-2")));
    gate.entered(2).await;

    gate.out.add_permits(3);
    assert_eq!(first.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(other.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(verify.oneshot(delivery(&fal, "r-1")).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn of_a_hundred_at_once_one_is_handled() {
    let (fal, layer) = verifying().await;
    let gate = Gate::new();
    let inside = gate.clone();
    let verify = layer.layer(service_fn(move |_: Delivery| {
        let gate = inside.clone();
        async move {
            gate.pass().await;
            Ok::<_, Infallible>(answer(StatusCode::OK))
        }
    }));
    let mut deliveries: FuturesUnordered<_> =
        (0..100).map(|_| tokio::spawn(verify.clone().oneshot(delivery(&fal, "r-1")))).collect();
    for _ in 0..99 {
        let one = timeout(PATIENCE, deliveries.next()).await.unwrap().unwrap();
        assert_eq!(reason(one.unwrap().unwrap()).await, "being_handled");
    }
    gate.out.add_permits(1);
    assert_eq!(deliveries.next().await.unwrap().unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(*gate.entered.borrow(), 1);
}

#[tokio::test]
async fn a_handler_that_panics_gives_the_id_free() {
    let (fal, layer) = verifying().await;
    for at_once in [true, false] {
        let panics = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&panics);
        let verify = layer.clone().layer(service_fn(move |_: Delivery| {
            let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
            assert!(!(first && at_once), "as told");
            async move {
                tokio::task::yield_now().await;
                assert!(!first, "as told");
                Ok::<_, Infallible>(answer(StatusCode::OK))
            }
        }));
        let id = if at_once { "r-1" } else { "r-2" };
        assert!(tokio::spawn(verify.clone().oneshot(delivery(&fal, id))).await.unwrap_err().is_panic());
        assert_eq!(verify.oneshot(delivery(&fal, id)).await.unwrap().status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn a_handler_whose_caller_goes_away_gives_the_id_free() {
    let (fal, layer) = verifying().await;
    let gate = Gate::new();
    let inside = gate.clone();
    let verify = layer.layer(service_fn(move |_: Delivery| {
        let gate = inside.clone();
        async move {
            gate.pass().await;
            Ok::<_, Infallible>(answer(StatusCode::OK))
        }
    }));
    let first = tokio::spawn(verify.clone().oneshot(delivery(&fal, "r-1")));
    gate.entered(1).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    gate.out.add_permits(1);
    assert_eq!(verify.oneshot(delivery(&fal, "r-1")).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn the_oldest_ids_are_forgotten_first() {
    let (fal, layer) = verifying().await;
    let handler = Handler::new();
    let verify = layer.seen_ids(RecentIds::new(NonZeroUsize::new(2).unwrap())).layer(handler.clone());
    for id in ["r-1", "r-2", "r-1", "r-3", "r-2", "r-1"] {
        verify.clone().oneshot(delivery(&fal, id)).await.unwrap();
    }
    // A repeat does not make an id younger: it has been handled once.
    assert_eq!(handler.repeats(), [false, false, true, false, true, false]);
}

#[tokio::test]
async fn clones_of_a_layer_share_their_ids() {
    let (fal, layer) = verifying().await;
    let handler = Handler::new();
    let (first, second) = (layer.clone().layer(handler.clone()), layer.layer(handler.clone()));
    first.oneshot(delivery(&fal, "r-1")).await.unwrap();
    second.oneshot(delivery(&fal, "r-1")).await.unwrap();
    assert_eq!(handler.repeats(), [false, true]);
}

/// A database far away: each call takes a second, and notes what it was asked.
#[derive(Clone, Default)]
struct FarAway {
    ids: Arc<RecentIds>,
    calls: Arc<Mutex<Vec<&'static str>>>,
    broken: Arc<Mutex<bool>>,
}

impl FarAway {
    async fn call(&self, name: &'static str) -> Result<(), BoxError> {
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.calls.lock().unwrap().push(name);
        if *self.broken.lock().unwrap() { Err("connection refused".into()) } else { Ok(()) }
    }

    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl SeenIds for FarAway {
    async fn begin(&self, webhook: &VerifiedWebhook) -> Result<Seen, BoxError> {
        self.call("begin").await?;
        self.ids.begin(webhook).await
    }

    async fn handled(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
        self.call("handled").await?;
        self.ids.handled(webhook).await
    }

    async fn failed(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
        self.call("failed").await?;
        self.ids.failed(webhook).await
    }
}

/// Two replicas with one database.
#[tokio::test(start_paused = true)]
async fn a_fleet_shares_its_ids() {
    let (fal, layer) = verifying().await;
    let database = FarAway::default();
    let handler = Handler::answering([StatusCode::INTERNAL_SERVER_ERROR]);
    let replica = || layer.clone().seen_ids(database.clone()).layer(handler.clone());
    for _ in 0..3 {
        replica().oneshot(delivery(&fal, "r-1")).await.unwrap();
    }
    assert_eq!(handler.repeats(), [false, false, true]);
    assert_eq!(database.calls(), ["begin", "failed", "begin", "handled", "begin"]);
}

/// Whatever the moment is at which the caller goes away, the id does not stay taken.
#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaves_nothing_in_the_database() {
    let (fal, layer) = verifying().await;
    for (after, calls) in [
        (500, vec!["begin", "failed"]),   // while the database is asked
        (1500, vec!["begin", "failed"]),  // while the handler works
        (2500, vec!["begin", "handled"]), // while the success is noted
    ] {
        let database = FarAway::default();
        let verify = layer.clone().seen_ids(database.clone()).layer(service_fn(async |_: Delivery| {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, Infallible>(answer(StatusCode::OK))
        }));
        let answered = timeout(Duration::from_millis(after), verify.oneshot(delivery(&fal, "r-1"))).await;
        assert!(answered.is_err());
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(database.calls(), calls, "{after}");
        let handler = Handler::new();
        layer.clone().seen_ids(database).layer(handler.clone()).oneshot(delivery(&fal, "r-1")).await.unwrap();
        assert_eq!(handler.repeats(), [calls[1] == "handled"], "{after}");
    }
}

/// The reason for which a delivery is not handled.
async fn told<S>(verify: &VerifyWebhook<S>, delivery: Request<Full<Bytes>>) -> String
where
    VerifyWebhook<S>: Service<Request<Full<Bytes>>, Response = Response<ResponseBody<Full<Bytes>>>, Error = Infallible>,
    VerifyWebhook<S>: Clone,
{
    reason(timeout(PATIENCE, verify.clone().oneshot(delivery)).await.unwrap().unwrap()).await
}

/// Somebody else's place is not given free by the one who was told to wait.
#[tokio::test(start_paused = true)]
async fn a_delivery_that_has_to_wait_frees_nothing() {
    let (fal, layer) = verifying().await;
    let database = FarAway::default();
    let gate = Gate::new();
    let inside = gate.clone();
    let verify = layer.seen_ids(database.clone()).layer(service_fn(move |_: Delivery| {
        let gate = inside.clone();
        async move {
            gate.pass().await;
            Ok::<_, Infallible>(answer(StatusCode::OK))
        }
    }));
    let first = tokio::spawn(verify.clone().oneshot(delivery(&fal, "r-1")));
    gate.entered(1).await;
    // One is told to wait, and one goes away while the database is asked.
    assert_eq!(told(&verify, delivery(&fal, "r-1")).await, "being_handled");
    let gone = timeout(Duration::from_millis(500), verify.clone().oneshot(delivery(&fal, "r-1"))).await;
    assert!(gone.is_err());
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(told(&verify, delivery(&fal, "r-1")).await, "being_handled");
    gate.out.add_permits(1);
    assert_eq!(first.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(database.calls(), ["begin", "begin", "begin", "begin", "handled"]);
}

#[tokio::test(start_paused = true)]
async fn a_database_that_is_away_is_answered_with_503() {
    let (fal, layer) = verifying().await;
    let database = FarAway::default();
    let handler = Handler::new();
    let verify = layer.seen_ids(database.clone()).layer(handler.clone());
    *database.broken.lock().unwrap() = true;
    let response = verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap();
    assert_eq!((reason(response).await.as_str(), handler.count()), ("seen_ids_failed", 0));

    *database.broken.lock().unwrap() = false;
    let breaks = database.clone();
    let breaking = layer_of(&fal, database.clone()).layer(service_fn(move |_: Delivery| {
        *breaks.broken.lock().unwrap() = true;
        async { Ok::<_, Infallible>(answer(StatusCode::OK)) }
    }));
    // The handler has done its work, and fal is told so.
    assert_eq!(breaking.oneshot(delivery(&fal, "r-1")).await.unwrap().status(), StatusCode::OK);
}

fn layer_of(fal: &MockFal, ids: impl SeenIds) -> VerifyWebhookLayer {
    layer(fixed_keys_of(fal)).seen_ids(ids)
}
