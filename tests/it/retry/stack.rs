//! The layers among others: readiness, order, errors, and the names that a struct field may have.

use std::{convert::Infallible, error::Error, io, sync::Arc, time::Duration};

use axum::{Router, extract::State, routing};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{
    BoxError, Layer as _, Service, ServiceBuilder, ServiceExt, service_fn,
    util::{BoxCloneSyncService, BoxService},
};
use tower_fal::{
    CredentialStore, FalAuth, FalAuthError, FalAuthLayer, FalClient, FalRetry, FalRetryLayer,
    auth::Stamp,
    client::FalBody,
    mock::{Lock, MockFal},
    origin::FalOrigins,
    retry::{Passthrough, PeekedBody, ReplayBody},
};
use tower_test::mock;

use super::{ADMITTED, PROMPT, World, accepted, locked, post, request, unauthorized, unknown_key};
use crate::support::{key, nobody, status_where};

type Sent = Request<ReplayBody<Full<Bytes>>>;
type Answered = Response<Full<Bytes>>;

fn refused() -> Answered {
    Response::builder().status(401).body(Full::default()).unwrap()
}

// Readiness.

#[tokio::test(start_paused = true)]
async fn the_service_is_made_ready_again_before_the_second_attempt() {
    let world = World::new().await;
    let (inner, mut handle) = mock::pair::<Sent, Answered>();
    let service = tower_fal::layer(&world.store).layer(inner);
    handle.allow(1);
    let mut request = task::spawn(service.oneshot(post()));
    assert_pending!(request.poll());
    let (first, respond) = handle.next_request().await.unwrap();
    assert_eq!(first.headers()["authorization"], key(1).header());
    world.store.replace(key(2));
    respond.send_response(refused());
    assert!(request.is_woken());
    assert_pending!(request.poll());

    // Not ready: no second request yet.
    let mut next = task::spawn(handle.next_request());
    assert_pending!(next.poll());
    drop(next);
    handle.allow(1);
    assert!(request.is_woken());
    assert_pending!(request.poll());
    let (second, respond) = handle.next_request().await.unwrap();
    assert_eq!(second.headers()["authorization"], key(2).header());
    respond.send_response(Response::new(Full::from("done")));
    assert_eq!(assert_ready_ok!(request.poll()).into_body().collect().await.unwrap().to_bytes(), "done");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_is_not_called() {
    let world = World::new().await;
    let (inner, mut handle) = mock::pair::<Sent, Answered>();
    let mut service = task::spawn(tower_fal::layer(&world.store).layer(inner));
    handle.allow(0);
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    handle.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    // The ready one goes with the request, and the one that stays behind is not ready.
    let mut request = task::spawn(service.call(post()));
    assert_pending!(request.poll());
    handle.next_request().await.unwrap().1.send_response(Response::new(Full::default()));
    assert_ready_ok!(request.poll());
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_breaks_before_the_second_attempt_is_the_error() {
    let world = World::new().await;
    let (inner, mut handle) = mock::pair::<Sent, Answered>();
    let retry = world.retry();
    let service = retry.layer(FalAuthLayer::new(world.store.clone()).layer(inner));
    handle.allow(1);
    let mut request = task::spawn(service.oneshot(post()));
    assert_pending!(request.poll());
    let (first, respond) = handle.next_request().await.unwrap();
    first.into_body().collect().await.unwrap();
    world.store.replace(key(2));
    respond.send_response(refused());
    assert_pending!(request.poll());
    handle.send_error("the pool is closed");
    let error = assert_ready_err!(request.poll());
    assert!(matches!(&error, FalAuthError::Transport(_)), "{error:?}");
    assert!(error.source().unwrap().to_string().contains("the pool is closed"));
    assert_eq!(retry.replay_memory_used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_fails_is_the_error_and_nothing_is_sent_again() {
    let world = World::new().await;
    let retry = world.retry();
    world.fal.will_fail(io::Error::from(io::ErrorKind::ConnectionReset));
    let error = world.client_by(&retry).oneshot(post()).await.unwrap_err();
    assert!(error.source().unwrap().is::<io::Error>());
    assert!(!error.is_retryable());
    assert_eq!((world.fal.keys(), world.reloads(), retry.replay_memory_used()), (vec![1], 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_fails_at_the_second_attempt_is_the_error() {
    let world = World::new().await;
    world.source.brings(2);
    world.fal.will_answer(unknown_key());
    world.fal.will_fail("reset");
    assert!(matches!(world.client().oneshot(post()).await, Err(FalAuthError::Transport(_))));
    assert_eq!(world.fal.keys(), [1, 2]);
}

// Order.

#[tokio::test(start_paused = true)]
async fn the_wrong_order_compiles_and_hands_out_the_401() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let wrong = ServiceBuilder::new()
        .layer(FalAuthLayer::new(world.store.clone()))
        .layer(FalRetryLayer::new(world.store.clone()))
        .service(world.fal.clone());
    let response = wrong.oneshot(post()).await.unwrap();
    assert_eq!((response.status(), world.reloads()), (StatusCode::UNAUTHORIZED, 0));
    assert!(response.extensions().get::<Stamp>().is_some(), "too late for the layer inside");

    let right = ServiceBuilder::new()
        .layer(FalRetryLayer::new(world.store.clone()))
        .layer(FalAuthLayer::new(world.store.clone()))
        .service(world.fal.clone());
    accepted(right.oneshot(post()).await);
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 1, 2], 1));
}

#[tokio::test(start_paused = true)]
async fn two_pairs_around_each_other_send_again_once() {
    let world = World::new().await;
    world.fal.revoke(1);
    let pair = tower_fal::layer(&world.store);
    let twice = ServiceBuilder::new().layer(pair.clone()).layer(pair).service(world.fal.clone());
    let error = twice.oneshot(post()).await.unwrap_err();
    // The inner one's refusal, as it is, and not as a failure of the service inside.
    assert!(matches!(error, FalAuthError::Unauthorized(_)), "{error:?}");
    assert_eq!(world.fal.keys(), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_behind_a_box_is_unwrapped_and_not_wrapped_again() {
    let world = World::new().await;
    world.fal.will_answer(locked());
    let boxed = ServiceExt::<Sent>::map_err(world.client(), BoxError::from);
    let error = tower_fal::layer(&world.store).layer(boxed).oneshot(post()).await.unwrap_err();
    assert!(matches!(error, FalAuthError::Forbidden(_)), "{error:?}");
}

// Errors and types of the service inside. What compiles here is the test; that it works is a bonus.

/// One request through a service, as the trait bounds of a caller would have it.
async fn through<S, R>(service: S) -> Result<Response<R>, S::Error>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>, Future: Send> + Clone + Send + 'static,
{
    service.oneshot(post()).await
}

#[tokio::test(start_paused = true)]
async fn over_a_service_that_cannot_fail() {
    let world = World::new().await;
    let inner = service_fn(async |_: Sent| Ok::<_, Infallible>(Response::new(Full::<Bytes>::default())));
    assert!(through(tower_fal::layer(&world.store).layer(inner)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn over_a_service_with_boxed_errors() {
    let world = World::new().await;
    let inner = service_fn(async |_: Sent| Err::<Answered, BoxError>("closed".into()));
    let error = through(tower_fal::layer(&world.store).layer(inner)).await.unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "closed");
}

#[tokio::test]
async fn over_hyper_utils_client() {
    type Client = legacy::Client<HttpConnector, ReplayBody<Full<Bytes>>>;
    let store = CredentialStore::fixed(key(1));
    let nobody = nobody();
    let address = nobody.local_addr().unwrap();
    let client: FalRetry<FalAuth<Client>> = ServiceBuilder::new()
        .layer(tower_fal::layer(&store))
        .service(legacy::Client::builder(TokioExecutor::new()).build_http());
    let error = client.oneshot(request(Method::POST, &format!("http://{address}/"), PROMPT)).await.unwrap_err();
    assert!(error.source().unwrap().downcast_ref::<legacy::Error>().unwrap().is_connect());
    assert!(FalAuthError::find(&error).is_some());
}

#[tokio::test(start_paused = true)]
async fn behind_a_buffer() {
    let world = World::new().await;
    world.fal.will_answer(locked());
    let service = ServiceBuilder::new().buffer(8).service(world.client());
    let error = through(service).await.unwrap_err();
    assert!(matches!(FalAuthError::find(&*error), Some(FalAuthError::Forbidden(_))), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn around_a_buffer_a_limit_and_a_time_out() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let service = ServiceBuilder::new()
        .layer(tower_fal::layer(&world.store))
        .buffer(8)
        .concurrency_limit(1)
        .timeout(Duration::from_secs(1))
        .service(world.fal.clone());
    accepted(through(service.clone()).await);
    assert_eq!(world.fal.keys(), [1, 2], "with one place at a time, the first attempt has left it");

    world.fal.hold();
    let error = through(service).await.unwrap_err();
    assert!(error.source().unwrap().is::<tower::timeout::error::Elapsed>(), "{error:?}");
    assert_eq!(world.fal.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn behind_a_limit_and_a_time_out() {
    let world = World::new().await;
    world.fal.revoke(1);
    let limited = ServiceBuilder::new().concurrency_limit(1).service(world.client());
    unauthorized(through(limited).await);

    let hurried = ServiceBuilder::new().timeout(Duration::from_millis(500)).service(world.client());
    world.fal.hold();
    assert!(through(hurried.clone()).await.unwrap_err().is::<tower::timeout::error::Elapsed>());
    assert_eq!(world.fal.in_flight(), 0);
    world.fal.will_answer(locked());
    world.fal.release();
    let error = through(hurried).await.unwrap_err();
    assert!(matches!(FalAuthError::find(&*error), Some(FalAuthError::Forbidden(_))), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn in_boxes() {
    let world = World::new().await;
    let cloneable: BoxCloneSyncService<_, _, FalAuthError> = BoxCloneSyncService::new(world.client());
    accepted(through(cloneable).await);
    let boxed: BoxService<_, _, FalAuthError> = BoxService::new(world.client());
    accepted(boxed.oneshot(post()).await);
    let inside = tower_fal::layer(&world.store).layer(BoxCloneSyncService::new(world.fal.clone()));
    accepted(through(inside).await);
}

#[tokio::test(start_paused = true)]
async fn with_other_bodies() {
    let world = World::new().await;
    let empty: Request<Empty<Bytes>> = Request::get(ADMITTED).body(Empty::new()).unwrap();
    accepted(world.client().oneshot(empty).await);
    let text: Request<String> = Request::post(ADMITTED).body(PROMPT.to_owned()).unwrap();
    accepted(world.client().oneshot(text).await);
    let boxed = Request::post(ADMITTED).body(Full::<Bytes>::from(PROMPT).boxed_unsync()).unwrap();
    accepted(world.client().oneshot(boxed).await);
    let axums = Request::post(ADMITTED).body(axum::body::Body::from(PROMPT)).unwrap();
    accepted(world.client().oneshot(axums).await);
    assert_eq!(world.fal.arrived().iter().map(|arrived| arrived.body.len()).collect::<Vec<_>>(), [0, 18, 18, 18]);
}

#[test]
fn what_should_be_send_and_sync_is() {
    fn send_and_sync<T: Send + Sync + Unpin + 'static>() {}
    fn sendable<T: Send + 'static>() {}
    type Http = legacy::Client<HttpConnector, ReplayBody<Full<Bytes>>>;
    send_and_sync::<FalRetryLayer>();
    send_and_sync::<FalRetryLayer<Passthrough>>();
    send_and_sync::<tower_fal::FalLayer>();
    send_and_sync::<FalRetry<FalAuth<Http>>>();
    send_and_sync::<FalRetry<FalAuth<Http>, Passthrough>>();
    send_and_sync::<FalClient>();
    send_and_sync::<FalAuthError>();
    sendable::<<FalRetry<FalAuth<Http>> as Service<Request<Full<Bytes>>>>::Future>();
    sendable::<PeekedBody<hyper::body::Incoming>>();
    send_and_sync::<ReplayBody<Full<Bytes>>>();
}

// The short name.

#[derive(Clone)]
struct AppState {
    fal: FalClient,
}

async fn draw(State(state): State<AppState>) -> (StatusCode, String) {
    let answer = match state.fal.oneshot(post()).await {
        Ok(answer) => answer,
        Err(FalAuthError::Forbidden(refusal)) => return (StatusCode::SERVICE_UNAVAILABLE, refusal.to_string()),
        Err(error) => return (StatusCode::BAD_GATEWAY, error.to_string()),
    };
    let body: FalBody = answer.into_body();
    (StatusCode::OK, String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

async fn call(fal: FalClient) -> (StatusCode, String) {
    let router = Router::new().route("/draw", routing::get(draw)).with_state(AppState { fal });
    let response = router.oneshot(Request::get("/draw").body(axum::body::Body::empty()).unwrap()).await.unwrap();
    let status = response.status();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_fal_client_over_any_service_in_an_axum_state() {
    let world = World::new().await;
    let fal = FalClient::over(world.client());
    assert_eq!(call(fal.clone()).await, (StatusCode::OK, r#"{"images":[]}"#.to_owned()));
    world.fal.will_answer(locked());
    let (status, text) = call(fal.clone()).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.contains("top up at fal.ai/dashboard/billing"), "{text}");
    world.fal.knows_only(2);
    world.source.brings(2);
    assert_eq!(call(fal).await.0, StatusCode::OK);

    let proxy = FalClient::over(world.client_by(&world.retry().passthrough()));
    world.fal.will_answer(locked());
    assert_eq!(call(proxy).await.0, StatusCode::OK, "which the refusal's body is");
}

/// The origin was not admitted.
#[tokio::test]
async fn a_fal_client_keeps_its_key_from_other_origins() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let client: FalClient = FalClient::plain(&tower_fal::layer(&CredentialStore::fixed(key(1))));
    let response = client.oneshot(request(Method::POST, &fal.run_url("/fal-ai/flux").to_string(), "{}")).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(fal.received()[0].presented.key_id(), None);
    // And an answer keeps its length, for whoever passes it on.
    let length = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    assert_eq!(http_body::Body::size_hint(response.body()).exact(), Some(length));
}

#[tokio::test]
async fn a_fal_client_over_rustls_speaks_https_only() {
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let client: FalClient = FalClient::rustls(&tower_fal::layer(&CredentialStore::fixed(key(1))), config);
    assert_eq!(call(client).await.0, StatusCode::BAD_GATEWAY, "there is no network, or no trust");
}

#[tokio::test]
async fn over_sockets_a_story_from_a_revoked_key_to_a_locked_account() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let source = crate::support::Script::new(None, crate::support::Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    let origins = FalOrigins::new().and(&fal.run_origin()).unwrap();
    let client = FalClient::over(
        tower_fal::layer(&store)
            .auth(|auth| auth.origins(origins))
            .layer(legacy::Client::builder(TokioExecutor::new()).build_http::<ReplayBody<Full<Bytes>>>()),
    );
    let url = fal.run_url("/fal-ai/flux").to_string();
    let send = || client.clone().oneshot(request(Method::POST, &url, PROMPT));
    assert_eq!(send().await.unwrap().status(), StatusCode::OK);

    fal.revoke(&key(1));
    fal.accept(&key(2));
    let waiting = tokio::spawn(send());
    source.loads_reach(2).await;
    source.brings(2);
    store.reload().await.unwrap();
    let response = waiting.await.unwrap().unwrap();
    assert!(response.into_body().collect().await.unwrap().to_bytes().windows(5).any(|part| part == b"a cat"));
    status_where(&store, |status| status.generation.get() == 2).await;

    fal.lock(Lock::ExhaustedBalance);
    let error = send().await.unwrap_err();
    assert_eq!(
        error.to_string().split(" [").next(),
        Some(
            "the account of key `id-2` from script is locked: its balance is exhausted, top up at \
             fal.ai/dashboard/billing; another key of this account will not help"
        )
    );
    assert_eq!(fal.received().len(), 4);
}
