//! What only reqwest has: its redirects, its bodies, its errors. What all clients have in common is in `matrix`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    extract::{Request as ServerRequest, State},
    response::{IntoResponse as _, Redirect, Response as ServerResponse},
    routing::{any, get},
};
use bytes::Bytes;
use http::{
    Extensions, Method, Request, StatusCode,
    header::{AUTHORIZATION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use http_body_util::{BodyExt as _, Channel, Full};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware, Next};
use reqwest_retry::{RetryTransientMiddleware, policies::ExponentialBackoff};
use tokio::net::TcpListener;
use tower::{Layer as _, ServiceBuilder, ServiceExt as _};
use tower_fal::{
    FalAuth, FalAuthError, FalAuthLayer, FalLayer, FalRetry, FalRetryLayer,
    error::{Reason, Refusal, report},
    mock::MockFal,
    origin::FalOrigins,
    reqwest::{FalAuthMiddleware, FalRetryMiddleware, ReqwestService},
    retry::{Transient, Typed, connection_failed},
};

use crate::support::{self, Metrics, key, key_text};

const UNKNOWN_KEY: &str = r#"{"detail":"No user found for Key ID and Secret"}"#;

/// A server that is not fal, and what its handlers saw.
struct Server {
    address: SocketAddr,
    seen: Seen,
}

type Seen = Arc<Mutex<Vec<Option<String>>>>;

impl Server {
    async fn start(routes: Router<Seen>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Seen::default();
        let app = routes.layer(axum::middleware::from_fn_with_state(Arc::clone(&seen), note)).with_state(seen.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, seen }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The credentials that came, in order. Not shown by a test that fails: they are not real, but nor is the habit.
    fn keys(&self) -> Vec<Option<u64>> {
        let number = |header: &String| {
            (0..10).find(|n| key(*n).key_id().unwrap().as_str() == header["Key ".len()..].split(':').next().unwrap())
        };
        self.seen.lock().unwrap().iter().map(|header| header.as_ref().and_then(number)).collect()
    }
}

async fn note(State(seen): State<Seen>, request: ServerRequest, next: axum::middleware::Next) -> ServerResponse {
    let header = request.headers().get(AUTHORIZATION).map(|header| header.to_str().unwrap().to_owned());
    seen.lock().unwrap().push(header);
    next.run(request).await
}

async fn refuse() -> (StatusCode, &'static str) {
    (StatusCode::UNAUTHORIZED, UNKNOWN_KEY)
}

/// Each test has servers of its own, and every loopback origin is admitted.
type World = support::World<()>;

impl World {
    async fn new() -> Self {
        Self::around(()).await
    }

    fn layer(&self) -> FalLayer<Typed, FalOrigins> {
        tower_fal::layer(&self.store)
            .auth(|auth| auth.origins(FalOrigins::new().loopback_http()))
            .retry(|retry| retry.reload_wait(Duration::from_millis(50)))
    }

    fn plugin(&self) -> ClientWithMiddleware {
        self.layer().reqwest(builder()).unwrap()
    }

    fn service(&self) -> FalRetry<FalAuth<ReqwestService>> {
        self.layer().layer(ReqwestService::new(builder()).unwrap())
    }

    fn auth(&self) -> FalAuthLayer {
        FalAuthLayer::new(self.store.clone()).origins(FalOrigins::new().loopback_http())
    }
}

pub(crate) fn client() -> reqwest::Client {
    builder().build().unwrap()
}

fn builder() -> reqwest::ClientBuilder {
    // Without the proxies of whoever runs the tests, and without the roots of their system.
    reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls())
}

fn tls() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

fn get_from(url: String) -> Request<Full<Bytes>> {
    Request::get(url).body(Full::default()).unwrap()
}

#[track_caller]
fn refusal(error: &reqwest_middleware::Error) -> Refusal {
    FalAuthError::find(error).and_then(FalAuthError::refusal).unwrap_or_else(|| panic!("no refusal: {error:?}")).clone()
}

/// Wherever the redirect leads.
#[tokio::test]
async fn a_credential_never_leaves_with_a_redirect() {
    let routes = Router::new().route("/", any(async || Redirect::temporary("/on"))).route("/on", any(refuse));
    let elsewhere = Server::start(routes).await;
    let to = elsewhere.url("/");
    let start = Server::start(Router::new().route("/", any(async move || Redirect::temporary(&to)))).await;
    let world = World::new().await;

    let answer = world.plugin().post(start.url("/")).body("{}").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(answer.url().as_str(), start.url("/"));
    assert_eq!(answer.headers()["location"], elsewhere.url("/"));

    let answer = world.service().oneshot(get_from(start.url("/"))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(reqwest::Response::from(answer).url().as_str(), start.url("/"));

    assert_eq!(start.keys(), [Some(1), Some(1)]);
    assert_eq!(elsewhere.keys(), []);
}

/// Whatever the method, and also within the origin: an application must not choose what is called with the key.
#[tokio::test]
async fn the_clients_that_are_built_here_follow_no_redirect() {
    for status in [301, 302, 303, 307, 308] {
        let redirect = move || async move { (StatusCode::from_u16(status).unwrap(), [("location", "/other")]) };
        let server = Server::start(Router::new().route("/", any(redirect)).route("/other", any(async || "fine"))).await;
        let world = World::new().await;
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            let answer = world.plugin().request(method.clone(), server.url("/")).body("{}").send().await.unwrap();
            assert_eq!(answer.status(), status);
            let request =
                Request::builder().method(method).uri(server.url("/")).body(Full::<Bytes>::from("{}")).unwrap();
            let answer = world.service().oneshot(request).await.unwrap();
            assert_eq!(answer.status(), status);
            assert_eq!(answer.headers()["location"], "/other");
        }
        assert_eq!(server.keys(), [Some(1); 10]);
    }
}

#[tokio::test]
async fn reqwests_time_out_is_that_of_one_attempt() {
    const TIME_OUT: Duration = Duration::from_secs(1);
    let fal = MockFal::start().await.unwrap();
    let world = World::new().await;
    world.source.brings(2);
    fal.accept(&key(2));
    world.source.close();
    let plugin = world.layer().retry(|retry| retry.reload_wait(Duration::from_secs(60))).reqwest(builder()).unwrap();
    let request = plugin.post(fal.run_url("/fal-ai/flux").to_string()).body("{}").timeout(TIME_OUT);
    let request = tokio::spawn(request.send());
    world.source.loads_reach(2).await;
    tokio::time::sleep(TIME_OUT).await; // by a clock that sockets go by
    world.source.open();
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn what_another_origin_answers_reloads_nothing() {
    let elsewhere = Server::start(Router::new().route("/", get(refuse))).await;
    let to = elsewhere.url("/");
    let start = Server::start(Router::new().route("/", get(async move || Redirect::temporary(&to)))).await;
    let world = World::new().await;

    // With a client that goes wherever it is led to.
    let plugin = ClientBuilder::new(client())
        .with(FalRetryMiddleware::new(world.store.clone()))
        .with(FalAuthMiddleware::from(world.auth()))
        .build();
    let answer = plugin.get(start.url("/")).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(answer.url().as_str(), elsewhere.url("/"));
    assert_eq!(answer.text().await.unwrap(), UNKNOWN_KEY);

    let fal = ServiceBuilder::new().layer(world.layer()).service(ReqwestService::from(client()));
    let answer = fal.oneshot(get_from(start.url("/"))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(reqwest::Response::from(answer).url().as_str(), elsewhere.url("/"));

    assert_eq!(start.keys(), [Some(1), Some(1)]);
    assert_eq!(elsewhere.keys(), [None, None]);
    assert_eq!(world.reloads(), 0);
}

#[tokio::test]
async fn a_body_in_memory_is_replayed_and_a_stream_is_not() {
    let fal = MockFal::start().await.unwrap();
    let world = World::new().await;
    let plugin = world.plugin();
    let url = fal.run_url("/fal-ai/flux").to_string();
    world.source.brings(2);
    fal.accept(&key(2));

    let streaming = || reqwest::Body::wrap(Full::new(Bytes::from_static(b"{}")));
    let error = plugin.post(&url).body(streaming()).send().await.unwrap_err();
    let refusal = refusal(&error);
    assert!(!refusal.is_replayable() && !refusal.was_replayed(), "{refusal:?}");
    assert_eq!(fal.requests(), 1);

    // It has had the store look, all the same.
    world.store.reload().await.unwrap();
    let answer = plugin.post(&url).body(streaming()).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);

    fal.revoke(&key(2));
    fal.accept(&key(3));
    world.source.brings(3);
    let answer = plugin.post(&url).body(r#"{"prompt":"a cat"}"#).send().await.unwrap();
    assert!(answer.text().await.unwrap().contains("a cat"));
    assert_eq!((fal.requests(), fal.runs()), (4, 2));
}

#[tokio::test]
async fn passthrough_hands_the_whole_refusal_on() {
    const LONG: usize = 3 << 20;
    let locked = async || {
        let body = format!(r#"{{"detail":"User is locked. Reason: Exhausted balance.","x":"{}"}}"#, "x".repeat(LONG));
        (StatusCode::FORBIDDEN, [("x-fal-request-id", "a-request")], body)
    };
    let server = Server::start(Router::new().route("/refused", any(refuse)).route("/locked", any(locked))).await;
    let world = World::new().await;
    let plugin = world.layer().passthrough().reqwest(builder()).unwrap();

    let answer = plugin.get(server.url("/locked?a=b")).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    assert_eq!(answer.url().as_str(), server.url("/locked?a=b"));
    assert_eq!(answer.remote_addr(), Some(server.address));
    assert_eq!(answer.headers()["x-fal-request-id"], "a-request");
    assert_eq!(answer.extensions().get::<Refusal>().unwrap().request_id(), Some("a-request"));
    let length = answer.content_length().unwrap();
    assert!(length > LONG as u64);
    assert_eq!(answer.bytes().await.unwrap().len() as u64, length);

    let answer = plugin.get(server.url("/refused")).send().await.unwrap();
    assert_eq!(answer.extensions().get::<Refusal>().unwrap().reason(), Reason::UnknownCredential);
    assert_eq!(answer.text().await.unwrap(), UNKNOWN_KEY);
}

#[tokio::test]
async fn a_request_brings_its_own_credential_in_its_extensions() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let world = World::new().await;
    let url = fal.run_url("/fal-ai/flux").to_string();
    let error = world.plugin().post(&url).with_extension(key(9)).body("{}").send().await.unwrap_err();
    assert_eq!(refusal(&error).key_id(), key(9).key_id());
    assert_eq!((fal.requests(), world.reloads()), (1, 0));

    fal.accept(&key(9));
    let per_request = FalLayer::per_request().auth(|auth| auth.origins(FalOrigins::new().loopback_http()));
    let tenants = per_request.reqwest(builder()).unwrap();
    let answer = tenants.post(&url).with_extension(key(9)).body("{}").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(tenants.post(&url).body("{}").send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    let presented: Vec<_> = fal.received().iter().map(|request| request.presented.key_id().cloned()).collect();
    assert_eq!(presented, [key(9).key_id().cloned(), key(9).key_id().cloned(), None]);

    // Of these extensions no middleware knows.
    let request = Request::post(&url).extension(key(9)).body("{}").unwrap();
    assert_eq!(tenants.execute(request.try_into().unwrap()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
}

/// It is a replay with the previous key.
#[tokio::test]
async fn a_replay_leaves_nothing_in_the_extensions() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let world = World::new().await;
    let plugin = world.plugin();
    world.source.brings(2); // which fal does not know yet
    world.store.reload().await.unwrap();

    let mut extensions = Extensions::new();
    for (known, expected) in [(1, [2, 1].as_slice()), (2, &[1, 2]), (3, &[3])] {
        if known == 3 {
            world.source.brings(3);
            world.store.reload().await.unwrap();
        }
        (1..=3).for_each(|n| fal.revoke(&key(n)));
        fal.accept(&key(known));
        fal.clear_received();
        let request = reqwest::Request::new(Method::POST, fal.run_url("/fal-ai/flux").to_string().parse().unwrap());
        let answer = plugin.execute_with_extensions(request, &mut extensions).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let shown: Vec<_> = fal.received().iter().map(|request| request.presented.key_id().cloned()).collect();
        assert_eq!(shown, expected.iter().map(|n| key(*n).key_id().cloned()).collect::<Vec<_>>());
    }
}

/// Counts how often a request goes out.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

#[async_trait]
impl Middleware for Count {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.0.fetch_add(1, Ordering::Relaxed);
        next.run(request, extensions).await
    }
}

fn nobody_there() -> String {
    // Port 1 is not bound by anybody.
    "http://127.0.0.1:1/fal-ai/flux".to_owned()
}

fn patient() -> Transient {
    Transient::default().attempts(3).first_delay(Duration::ZERO)
}

/// The error stays reqwest's own.
#[tokio::test]
async fn a_failed_connection_is_retried_even_for_a_post() {
    let world = World::new().await;
    let count = Count::default();
    let plugin = ClientBuilder::new(client())
        .with(FalRetryMiddleware::from(FalRetryLayer::new(world.store.clone()).transient(patient())))
        .with(count.clone())
        .with(FalAuthMiddleware::new(world.store.clone()))
        .build();
    let error = plugin.post(nobody_there()).body("{}").send().await.unwrap_err();
    assert!(error.is_connect() && FalAuthError::find(&error).is_none(), "{error:?}");
    assert_eq!(count.0.swap(0, Ordering::Relaxed), 3);
    assert!(connection_failed(&client().post(nobody_there()).send().await.unwrap_err()));
    let streaming = reqwest::Body::wrap(Full::new(Bytes::from_static(b"{}")));
    plugin.post(nobody_there()).body(streaming).send().await.unwrap_err();
    assert_eq!(count.0.swap(0, Ordering::Relaxed), 1);

    let count = Count::default();
    let attempts = Arc::clone(&count.0);
    let fal = ServiceBuilder::new()
        .layer(world.layer().retry(|retry| retry.transient(patient())))
        .map_request(move |request: Request<_>| {
            attempts.fetch_add(1, Ordering::Relaxed);
            request
        })
        .service(ReqwestService::from(client()));
    let request = Request::post(nobody_there()).body(Full::new(Bytes::from_static(b"{}"))).unwrap();
    let error = fal.oneshot(request).await.unwrap_err();
    assert!(matches!(error, FalAuthError::Transport(_)), "{error:?}");
    assert_eq!(count.0.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_refusal_inside_a_middleware_error_is_found_and_final() {
    let world = World::new().await;
    let retry = || FalRetryLayer::new(world.store.clone()).reload_wait(Duration::ZERO);
    let count = Count::default();
    // Of a connection that failed reqwest says so itself; this asks for its error, which `source()` would skip.
    let reqwests = Transient::not_sent(patient(), |error| error.is::<reqwest::Error>());
    let plugin = ClientBuilder::new(client())
        .with(FalRetryMiddleware::from(retry().transient(reqwests)))
        .with(count.clone())
        .build();
    plugin.post(nobody_there()).body("{}").send().await.unwrap_err();
    assert_eq!(count.0.swap(0, Ordering::Relaxed), 3);

    let fal = MockFal::start().await.unwrap();
    let stacked = ClientBuilder::new(client())
        .with(FalRetryMiddleware::from(retry().transient(patient())))
        .with(count.clone())
        .with(FalRetryMiddleware::from(retry()))
        .with(FalAuthMiddleware::from(world.auth()))
        .build();
    let error = stacked.get(fal.run_url("/fal-ai/flux").to_string()).send().await.unwrap_err();
    assert_eq!(refusal(&error).reason(), Reason::UnknownCredential);
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
}

/// reqwest-retry is transparent, and so is the error of reqwest-middleware inside of it.
#[tokio::test]
async fn a_refusal_is_found_behind_reqwest_retry() {
    let server = Server::start(Router::new().route("/", any(refuse))).await;
    let world = World::new().await;
    let backoff = ExponentialBackoff::builder().build_with_max_retries(2);
    let retrying = ClientBuilder::new(client())
        .with(RetryTransientMiddleware::new_with_policy(backoff))
        .with(FalRetryMiddleware::from(FalRetryLayer::new(world.store.clone()).reload_wait(Duration::from_millis(50))))
        .with(FalAuthMiddleware::from(world.auth()))
        .build();
    for fal in [retrying, world.plugin()] {
        let error = fal.get(server.url("/")).send().await.unwrap_err();
        assert_eq!(refusal(&error).reason(), Reason::UnknownCredential);
        let sentence = "fal does not know key `id-1` from ";
        assert!(error.to_string().contains(sentence), "{error}");
        assert_eq!(report(&error).matches(sentence).count(), 1, "{}", report(&error));
    }
    assert_eq!(server.keys(), [Some(1), Some(1)], "a refusal is not retried");
}

#[tokio::test]
async fn a_busy_server_is_asked_again_and_a_post_is_not_repeated() {
    use tower_fal::mock::Failure;

    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let world = World::new().await;
    let plugin = world.layer().retry(|retry| retry.transient(patient())).reqwest(builder()).unwrap();
    let url = fal.run_url("/fal-ai/flux").to_string();
    fal.fail_next(2, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(plugin.get(&url).send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(fal.requests(), 3);
    fal.fail_next(1, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(plugin.post(&url).body("{}").send().await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(fal.requests(), 4);
}

#[tokio::test]
async fn what_makes_a_request_repeatable_is_looked_at() {
    use tower_fal::{mock::Failure, retry::Repeatable};

    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let world = World::new().await;
    let plugin = world.layer().retry(|retry| retry.transient(patient())).reqwest(builder()).unwrap();
    fal.fail_next(2, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    let run = plugin.post(fal.run_url("/fal-ai/flux").to_string()).with_extension(Repeatable).body("{}");
    assert_eq!(run.send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(fal.requests(), 3);

    fal.clear_received();
    fal.fail_next(1, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    let cancel = fal.queue_url("/fal-ai/flux/requests/no-such-request/cancel").to_string();
    assert_ne!(plugin.put(cancel).send().await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(fal.received().len(), 2);
}

#[tokio::test]
async fn a_header_that_is_there_is_kept_where_that_is_asked_for() {
    let server = Server::start(Router::new().route("/", get(async || "fine"))).await;
    let world = World::new().await;
    for (keep, expected) in [(false, Some(1)), (true, Some(2))] {
        let plugin =
            world.layer().auth(|auth| if keep { auth.keep_existing() } else { auth }).reqwest(builder()).unwrap();
        plugin.get(server.url("/")).header(AUTHORIZATION, key_header(2)).send().await.unwrap();
        assert_eq!(server.keys().last(), Some(&expected));
    }
    // Those of the client are put in further inside.
    let headers = http::HeaderMap::from_iter([(AUTHORIZATION, key_header(2))]);
    let plugin = world.layer().auth(|auth| auth.keep_existing()).reqwest(builder().default_headers(headers)).unwrap();
    plugin.get(server.url("/")).send().await.unwrap();
    assert_eq!(server.keys().last(), Some(&Some(1)));
}

/// As whoever has a header of their own would write it.
fn key_header(n: u64) -> http::HeaderValue {
    let mut value = http::HeaderValue::try_from(format!("Key {}", key_text(n))).unwrap();
    value.set_sensitive(true);
    value
}

#[test]
fn a_replay_is_counted_with_its_result() {
    let counted = Metrics::new();
    let story = async {
        let fal = MockFal::start().await.unwrap();
        for (accepted, brings) in [(2, 2), (3, 4)] {
            let world = World::new().await;
            world.source.brings(brings);
            fal.accept(&key(accepted));
            drop(world.plugin().post(fal.run_url("/fal-ai/flux").to_string()).body("{}").send().await);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(counted.recorder(), || runtime.block_on(story));
    let counters = counted.counters();
    let replays = ["accepted", "refused"].map(|result| counters[&format!("tower_fal_replays_total result={result}")]);
    assert_eq!(replays, [1, 1]);
}

/// The address of the peer comes back.
#[tokio::test]
async fn bodies_stream_both_ways_and_keep_their_size() {
    let echo = async |request: ServerRequest| {
        let framing = |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let framing = format!("{:?} {:?}", framing(CONTENT_LENGTH), framing(TRANSFER_ENCODING));
        ([("x-framing", framing)], request.into_body()).into_response()
    };
    let server = Server::start(Router::new().route("/", any(echo))).await;
    let world = World::new().await;
    let fal = ServiceBuilder::new().layer(world.auth()).service(ReqwestService::from(client()));
    let post = |body: Body| fal.clone().oneshot(Request::post(server.url("/?a=b")).body(body).unwrap());

    let answer = post(Body::from("twelve bytes")).await.unwrap();
    assert_eq!(answer.headers()["x-framing"], r#"Some("12") None"#);
    let answer = reqwest::Response::from(answer);
    assert_eq!(answer.url().as_str(), server.url("/?a=b"));
    assert_eq!(answer.remote_addr(), Some(server.address));
    assert_eq!(answer.text().await.unwrap(), "twelve bytes");

    // Not `Sync`, and without an end while the answer comes already.
    let (mut sender, body) = Channel::<Bytes>::new(1);
    sender.send_data(Bytes::from_static(b"first")).await.unwrap();
    let answer = post(Body::new(body)).await.unwrap();
    assert_eq!(answer.headers()["x-framing"], r#"None Some("chunked")"#);
    let mut answer = answer.into_body();
    assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    sender.send_data(Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), "second");
    drop(sender);
    assert!(answer.frame().await.is_none());

    let answer = post(Body::empty()).await.unwrap();
    assert_eq!(answer.headers()["x-framing"], "None None");
}

#[tokio::test]
async fn a_uri_that_reqwest_does_not_take_is_an_error() {
    let fal = ReqwestService::from(client());
    for uri in ["/no/origin", "ftp://127.0.0.1/", "wss://127.0.0.1/"] {
        let error = fal.clone().oneshot(Request::get(uri).body(Full::<Bytes>::default()).unwrap()).await.unwrap_err();
        assert!(error.is_builder(), "{uri}: {error:?}");
    }
}
