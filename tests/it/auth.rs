//! `FalAuth` as its users stack it: what reaches the service inside, and what a refusal says.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, ready},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{AUTHORIZATION, HOST},
    request::Parts,
};
use tokio::sync::oneshot;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok};
use tower::{Layer, Service, ServiceBuilder, ServiceExt as _, service_fn, util::BoxCloneSyncService};
use tower_fal::{
    Credential, CredentialStore, FalAuth, FalAuthLayer,
    auth::{ResponseFuture, Stamp},
    origin::{BoundOrigin, EveryRequest, FalOrigins, OriginPolicy},
};

const ADMITTED: &str = "https://fal.run/fal-ai/flux/dev";
const ELSEWHERE: &str = "https://example.com/fal-ai/flux/dev";
const OURS: &str = "Key house-id:house-secret";
const CUSTOMERS: &str = "Key customer-id:customer-secret";

fn house() -> CredentialStore {
    CredentialStore::fixed(Credential::key("house-id:house-secret").unwrap())
}

fn customer() -> Credential {
    Credential::key("customer-id:customer-secret").unwrap()
}

fn request(uri: &str) -> Request<()> {
    Request::get(uri).body(()).unwrap()
}

fn customers_request(uri: &str) -> Request<()> {
    Request::get(uri).extension(customer()).body(()).unwrap()
}

/// Answers each request with its own head: what is in the body is what arrived.
fn echo(
    status: StatusCode,
) -> impl Service<Request<()>, Response = Response<Parts>, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static
{
    service_fn(move |request: Request<()>| {
        ready(Ok(Response::builder().status(status).body(request.into_parts().0).unwrap()))
    })
}

/// What a request looks like behind the layer.
async fn arrived<P: OriginPolicy + Clone>(layer: FalAuthLayer<P>, request: Request<()>) -> Parts {
    layer.layer(echo(StatusCode::OK)).oneshot(request).await.unwrap().into_body()
}

/// The credential of a request behind the layer.
async fn sent<P: OriginPolicy + Clone>(layer: FalAuthLayer<P>, request: Request<()>) -> Option<String> {
    authorization(&arrived(layer, request).await.headers)
}

async fn stamp<P: OriginPolicy + Clone>(
    layer: FalAuthLayer<P>,
    status: StatusCode,
    request: Request<()>,
) -> Option<Stamp> {
    layer.layer(echo(status)).oneshot(request).await.unwrap().extensions().get().cloned()
}

/// The one `authorization` value; more than one is a failure of the test.
fn authorization(headers: &HeaderMap) -> Option<String> {
    let values: Vec<_> = headers.get_all(AUTHORIZATION).iter().map(|value| value.to_str().unwrap()).collect();
    assert!(values.len() <= 1, "{} authorization headers", values.len());
    values.first().map(|&value| value.to_owned())
}

// What is put on which request.

#[tokio::test]
async fn an_admitted_request_carries_the_stores_credential() {
    let head = arrived(FalAuthLayer::new(house()), request(ADMITTED)).await;
    assert_eq!(authorization(&head.headers).unwrap(), OURS);
    assert!(head.headers[AUTHORIZATION].is_sensitive());
    assert_eq!(head.uri, ADMITTED);
}

#[tokio::test]
async fn ours_replaces_every_authorization_header_there_is() {
    let mut request = request(ADMITTED);
    for value in ["Basic old", "Key other:one", "Bearer third"] {
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static(value));
    }
    assert_eq!(sent(FalAuthLayer::new(house()), request).await.unwrap(), OURS);
}

#[tokio::test]
async fn an_existing_authorization_stays_when_asked_for() {
    let mut with_one = request(ADMITTED);
    with_one.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    let layer = FalAuthLayer::new(house()).keep_existing();
    assert_eq!(sent(layer.clone(), with_one).await.unwrap(), "Basic callers");
    assert_eq!(sent(layer, request(ADMITTED)).await.unwrap(), OURS);
}

#[tokio::test]
async fn a_kept_authorization_beats_the_requests_own_credential() {
    let mut request = customers_request(ADMITTED);
    request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    let layer = FalAuthLayer::new(house()).keep_existing();
    assert_eq!(sent(layer, request).await.unwrap(), "Basic callers");
}

#[tokio::test]
async fn a_request_that_is_not_admitted_passes_untouched() {
    let mut given = customers_request(ELSEWHERE);
    given.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    given.headers_mut().append("x-other", HeaderValue::from_static("value"));
    let headers = given.headers().clone();
    for layer in [FalAuthLayer::new(house()), FalAuthLayer::per_request()] {
        let head = arrived(layer, given.clone()).await;
        assert_eq!((&head.headers, head.uri), (&headers, Uri::from_static(ELSEWHERE)));
        assert!(head.extensions.get::<Credential>().is_some());
    }
    assert_eq!(sent(FalAuthLayer::new(house()), request(ELSEWHERE)).await, None);
}

#[tokio::test]
async fn a_trace_would_have_the_credential_echoed_and_gets_none() {
    for mut request in [request("https://fal.run/a/b"), customers_request("https://fal.run/a/b")] {
        *request.method_mut() = Method::TRACE;
        assert_eq!(sent(FalAuthLayer::new(house()).origins(EveryRequest), request).await, None);
    }
}

#[tokio::test]
async fn a_requests_own_credential_wins_over_the_stores() {
    for layer in [FalAuthLayer::new(house()), FalAuthLayer::per_request()] {
        assert_eq!(sent(layer, customers_request(ADMITTED)).await.unwrap(), CUSTOMERS);
    }
}

#[tokio::test]
async fn a_requests_own_credential_goes_to_no_other_origins() {
    for layer in [FalAuthLayer::new(house()), FalAuthLayer::per_request()] {
        assert_eq!(sent(layer, customers_request(ELSEWHERE)).await, None);
    }
    let narrower = FalAuthLayer::per_request().origins(|uri: &Uri| uri.host() == Some("gateway.internal"));
    assert_eq!(sent(narrower.clone(), customers_request(ADMITTED)).await, None);
    assert_eq!(sent(narrower, customers_request("http://gateway.internal/")).await.unwrap(), CUSTOMERS);
}

#[tokio::test]
async fn per_request_sends_nothing_without_an_extension() {
    assert_eq!(sent(FalAuthLayer::per_request(), request(ADMITTED)).await, None);
    let mut with_one = request(ADMITTED);
    with_one.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    assert_eq!(sent(FalAuthLayer::per_request(), with_one).await.unwrap(), "Basic callers");
}

#[tokio::test]
async fn each_request_takes_the_credential_of_its_own_moment() {
    let store = house();
    let service = FalAuthLayer::new(store.clone()).layer(echo(StatusCode::OK));
    let first = service.clone().oneshot(request(ADMITTED)).await.unwrap();
    store.replace(customer());
    let second = service.oneshot(request(ADMITTED)).await.unwrap();
    assert_eq!(authorization(&first.body().headers).unwrap(), OURS);
    assert_eq!(authorization(&second.body().headers).unwrap(), CUSTOMERS);
}

#[tokio::test]
async fn the_whole_layer_reads_uris_as_the_policy_does() {
    for uri in ["https://FAL.Run/a", "HTTPS://queue.fal.run:443/a?b=c", "HTTPS://REST.FAL.AI:443/a"] {
        assert_eq!(sent(FalAuthLayer::new(house()), request(uri)).await.as_deref(), Some(OURS), "{uri}");
    }
    for uri in [
        "http://fal.run/a",
        "ws://fal.run/a",
        "wss://ws.fal.run/a", // an HTTP client may send it in clear
        "WSS://fal.run:443/a",
        "https://fal.run:8443/a",
        "https://fal.run:80/a",
        "https://fal.run:/a",
        "https://fal.run./a",
        "https://fal.run.example.com/a",
        "https://notfal.run/a",
        "https://fal.run@example.com/a",
        "https://example.com@fal.run/a",
        "https://user:password@fal.run/a",
        "https://[::1]/a",
        "https://[::1]:443/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://127.0.0.1/a",
        "/a",
        "//fal.run/a",
        "*",
        "fal.run:443",
    ] {
        for given in [request(uri), customers_request(uri)] {
            assert_eq!(sent(FalAuthLayer::new(house()), given).await, None, "{uri}");
        }
    }
}

/// A request with these `host` headers.
fn with_hosts(uri: &str, hosts: &[&str]) -> Request<()> {
    hosts.iter().fold(Request::get(uri), |request, host| request.header(HOST, *host)).body(()).unwrap()
}

#[tokio::test]
async fn a_host_header_admits_nothing() {
    for uri in ["/fal-ai/flux/dev", "https://example.com/", "http://fal.run/"] {
        assert_eq!(sent(FalAuthLayer::new(house()), with_hosts(uri, &["fal.run"])).await, None, "{uri}");
    }
    let every = FalAuthLayer::new(house()).origins(EveryRequest);
    assert_eq!(sent(every, with_hosts("/fal-ai/flux/dev", &["fal.run"])).await.unwrap(), OURS);
}

#[tokio::test]
async fn a_host_header_of_another_host_gets_no_credential() {
    let layer = || FalAuthLayer::new(house());
    let bound = || FalAuthLayer::for_origin(house(), "https://fal.run").unwrap();
    for hosts in [&["fal.run"][..], &["FAL.run:443"], &[]] {
        assert_eq!(sent(layer(), with_hosts("https://fal.run/a", hosts)).await.unwrap(), OURS, "{hosts:?}");
        assert_eq!(sent(bound(), with_hosts("/a", hosts)).await.unwrap(), OURS, "{hosts:?}");
    }
    for hosts in [&["tenant.example"][..], &["queue.fal.run"], &[""], &["fal.run", "fal.run"]] {
        assert_eq!(sent(layer(), with_hosts("https://fal.run/a", hosts)).await, None, "{hosts:?}");
        assert_eq!(sent(bound(), with_hosts("/a", hosts)).await, None, "{hosts:?}");
        assert_eq!(sent(bound(), with_hosts("https://fal.run/a", hosts)).await, None, "{hosts:?}");
        let mut handshake = with_hosts("wss://fal.run/a", hosts);
        assert!(!layer().authorize(&mut handshake), "{hosts:?}");
        assert_eq!(authorization(handshake.headers()), None, "{hosts:?}");
    }
}

#[tokio::test]
async fn a_layer_that_is_bound_to_an_origin_takes_uris_that_name_none() {
    let bound = FalAuthLayer::for_origin(house(), "https://fal.run").unwrap();
    for uri in ["/fal-ai/flux/dev", "/a?b=c", ADMITTED, "https://FAL.run:443/"] {
        assert_eq!(sent(bound.clone(), request(uri)).await.as_deref(), Some(OURS), "{uri}");
        assert_eq!(sent(bound.clone(), customers_request(uri)).await.as_deref(), Some(CUSTOMERS), "{uri}");
    }
    for uri in [ELSEWHERE, "https://queue.fal.run/a", "http://fal.run/a", "fal.run:443"] {
        assert_eq!(sent(bound.clone(), request(uri)).await, None, "{uri}");
    }
    assert!(FalAuthLayer::for_origin(house(), "http://fal.run").is_err());
}

#[test]
fn authorize_treats_a_handshake_by_the_same_rules() {
    let (store, layer, own_only) = (house(), FalAuthLayer::new(house()), FalAuthLayer::per_request());
    let mut handshake = request("wss://ws.fal.run/fal-ai/flux/dev");
    assert!(store.authorize(&mut handshake));
    assert_eq!(authorization(handshake.headers()).unwrap(), OURS);

    let mut own = customers_request("wss://ws.fal.run/fal-ai/flux/dev");
    assert!(layer.authorize(&mut own));
    assert_eq!(authorization(own.headers()).unwrap(), CUSTOMERS);

    for uri in ["ws://ws.fal.run/", "wss://example.com/", "/fal-ai/flux/dev"] {
        let mut elsewhere = customers_request(uri);
        assert!(!store.authorize(&mut elsewhere) && !layer.authorize(&mut elsewhere), "{uri}");
        assert_eq!(authorization(elsewhere.headers()), None, "{uri}");
    }
    let mut without = request(ADMITTED);
    assert!(!own_only.authorize(&mut without));
    assert_eq!(authorization(without.headers()), None);
}

#[test]
fn authorize_does_not_claim_a_header_that_it_kept() {
    let mut kept = request(ADMITTED);
    kept.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    assert!(!FalAuthLayer::new(house()).keep_existing().authorize(&mut kept));
    assert_eq!(authorization(kept.headers()).unwrap(), "Basic callers");
}

// Stamps.

#[tokio::test]
async fn a_401_and_a_403_say_what_was_refused() {
    let store = CredentialStore::fixed(Credential::key("old-id:old-secret").unwrap());
    store.replace(Credential::key("house-id:house-secret").unwrap().with_source("env:FAL_KEY"));
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        let stamp = stamp(FalAuthLayer::new(store.clone()), status, request(ADMITTED)).await.unwrap();
        assert_eq!(stamp.generation(), Some(store.generation()));
        assert_eq!(stamp.generation().unwrap().get(), 2);
        assert_eq!(stamp.key_id().unwrap().as_str(), "house-id");
        assert_eq!(stamp.source(), "env:FAL_KEY");
    }
}

#[tokio::test]
async fn a_refused_token_has_a_stamp_without_a_key_id() {
    let store = CredentialStore::fixed(Credential::bearer("token").unwrap());
    let stamp = stamp(FalAuthLayer::new(store), StatusCode::UNAUTHORIZED, request(ADMITTED)).await.unwrap();
    assert!(stamp.key_id().is_none());
    assert_eq!((stamp.generation().unwrap().get(), stamp.source()), (1, "fixed"));
}

#[tokio::test]
async fn no_other_status_is_stamped() {
    for status in [100, 200, 204, 301, 400, 402, 404, 407, 422, 429, 500, 503] {
        let status = StatusCode::from_u16(status).unwrap();
        for layer in [FalAuthLayer::new(house()), FalAuthLayer::per_request()] {
            assert!(stamp(layer, status, customers_request(ADMITTED)).await.is_none(), "{status}");
        }
    }
}

#[tokio::test]
async fn what_carried_nothing_of_ours_is_not_stamped() {
    let mut kept = request(ADMITTED);
    kept.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic callers"));
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        let store = || FalAuthLayer::new(house());
        assert!(stamp(store(), status, request(ELSEWHERE)).await.is_none());
        assert!(stamp(store(), status, customers_request(ELSEWHERE)).await.is_none());
        assert!(stamp(store().keep_existing(), status, kept.clone()).await.is_none());
        assert!(stamp(FalAuthLayer::per_request(), status, request(ADMITTED)).await.is_none());
    }
}

#[tokio::test]
async fn the_stamp_of_a_requests_own_credential_has_no_generation() {
    let noted = Request::get(ADMITTED).extension(customer().with_source("vault:customer-7")).body(()).unwrap();
    for layer in [FalAuthLayer::new(house()), FalAuthLayer::per_request()] {
        let plain = stamp(layer.clone(), StatusCode::UNAUTHORIZED, customers_request(ADMITTED)).await.unwrap();
        assert_eq!((plain.generation(), plain.source()), (None, "request"));
        assert_eq!(plain.key_id().unwrap().as_str(), "customer-id");
        let noted = stamp(layer, StatusCode::FORBIDDEN, noted.clone()).await.unwrap();
        assert_eq!((noted.generation(), noted.source()), (None, "vault:customer-7"));
    }
}

#[tokio::test]
async fn of_nested_layers_the_inner_ones_stamp_survives() {
    let inner = CredentialStore::fixed(Credential::key("inner-id:secret").unwrap());
    let service = ServiceBuilder::new()
        .layer(FalAuthLayer::new(house()))
        .layer(FalAuthLayer::new(inner))
        .service(echo(StatusCode::UNAUTHORIZED));
    let response = service.oneshot(request(ADMITTED)).await.unwrap();
    assert_eq!(authorization(&response.body().headers).unwrap(), "Key inner-id:secret");
    assert_eq!(response.extensions().get::<Stamp>().unwrap().key_id().unwrap().as_str(), "inner-id");
}

/// The store rotates while the request is under way.
#[tokio::test]
async fn the_stamp_names_what_was_sent_before_a_rotation() {
    let (answer, held) = oneshot::channel::<StatusCode>();
    let mut held = Some(held);
    let store = house();
    let mut service = FalAuthLayer::new(store.clone()).layer(service_fn(move |request: Request<()>| {
        let held = held.take().unwrap();
        async move {
            let status = held.await.unwrap();
            Ok::<_, Infallible>(Response::builder().status(status).body(request.into_parts().0).unwrap())
        }
    }));
    let mut in_flight = tokio_test::task::spawn(service.ready().await.unwrap().call(request(ADMITTED)));
    assert_pending!(in_flight.poll());

    store.replace(customer());
    answer.send(StatusCode::UNAUTHORIZED).unwrap();
    let response = assert_ready_ok!(in_flight.poll());
    assert_eq!(authorization(&response.body().headers).unwrap(), OURS);
    let stamp = response.extensions().get::<Stamp>().unwrap();
    assert_eq!((stamp.generation().unwrap().get(), store.generation().get()), (1, 2));
    assert_eq!(stamp.key_id().unwrap().as_str(), "house-id");
}

// A good citizen of Tower.

#[test]
fn the_response_and_the_error_are_those_of_the_service_inside() {
    fn is<S: Service<Request<()>, Response = Response<R>, Error = E>, R, E>(_: &S) {}

    #[derive(Debug)]
    struct Mine;

    let layer = FalAuthLayer::new(house());
    is::<_, Parts, Infallible>(&layer.layer(echo(StatusCode::OK)));
    is::<_, &str, Mine>(&layer.layer(service_fn(async |_: Request<()>| Err::<Response<&str>, _>(Mine))));
}

#[tokio::test]
async fn an_error_of_the_service_inside_comes_out_as_it_is() {
    let service = FalAuthLayer::new(house()).layer(service_fn(async |_: Request<()>| Err::<Response<()>, _>(7_u8)));
    assert_eq!(service.oneshot(request(ADMITTED)).await.unwrap_err(), 7);
}

#[tokio::test]
async fn readiness_is_that_of_the_service_inside() {
    let (mut service, mut inner) =
        tower_test::mock::spawn_layer::<Request<()>, Response<()>, _>(FalAuthLayer::new(house()));
    inner.allow(0);
    assert_pending!(service.poll_ready());
    inner.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.poll_ready());

    let response = tokio::spawn(service.call(request(ADMITTED)));
    let (sent, answer) = inner.next_request().await.unwrap();
    assert_eq!(authorization(sent.headers()).unwrap(), OURS);
    answer.send_response(Response::new(()));
    response.await.unwrap().unwrap();
    assert_pending!(service.poll_ready());

    inner.send_error("the service inside is broken");
    assert_eq!(assert_ready_err!(service.poll_ready()).to_string(), "the service inside is broken");
}

#[test]
fn everything_is_send_sync_clone_and_debug_where_the_inside_is() {
    fn everything<T: Clone + Send + Sync + Unpin + fmt::Debug + 'static>() {}
    fn future<T: Future + Send + Sync + Unpin + fmt::Debug + 'static>() {}

    #[derive(Clone, Debug)]
    struct Inside;

    everything::<FalAuthLayer>();
    everything::<FalAuthLayer<BoundOrigin>>();
    everything::<FalAuthLayer<EveryRequest>>();
    everything::<FalAuth<Inside>>();
    everything::<FalAuth<Inside, FalOrigins>>();
    everything::<Stamp>();
    future::<ResponseFuture<std::future::Ready<Result<Response<()>, Infallible>>>>();
}

#[tokio::test]
async fn it_stacks_with_towers_own_middleware_on_either_side() {
    let service = ServiceBuilder::new()
        .layer_fn(BoxCloneSyncService::new)
        .buffer(4)
        .timeout(Duration::from_secs(60))
        .concurrency_limit(2)
        .layer(FalAuth::<()>::layer(house()))
        .concurrency_limit(2)
        .timeout(Duration::from_secs(60))
        .buffer(4)
        .service(echo(StatusCode::UNAUTHORIZED));
    for _ in 0..3 {
        let response = service.clone().oneshot(request(ADMITTED)).await.unwrap();
        assert_eq!(authorization(&response.body().headers).unwrap(), OURS);
        assert_eq!(response.extensions().get::<Stamp>().unwrap().key_id().unwrap().as_str(), "house-id");
    }
    let response = service.oneshot(request(ELSEWHERE)).await.unwrap();
    assert_eq!(authorization(&response.body().headers), None);
}

#[tokio::test]
async fn the_service_inside_can_be_had_back() {
    let mut service = FalAuthLayer::new(house()).layer(echo(StatusCode::OK));
    assert_eq!(authorization(&call(service.get_mut()).await), None);
    let inside = service.get_ref().clone();
    assert_eq!(authorization(&call(inside).await), None);
    assert_eq!(authorization(&call(service.into_inner()).await), None);

    async fn call(inside: impl Service<Request<()>, Response = Response<Parts>, Error = Infallible>) -> HeaderMap {
        inside.oneshot(request(ADMITTED)).await.unwrap().into_body().headers
    }
}

// Around an axum router, over a real socket. The handler answers with the target and the credential that it sees.

async fn serve() -> SocketAddr {
    let handler =
        async |request: axum::extract::Request| format!("{} {:?}", request.uri(), authorization(request.headers()));
    let app = axum::Router::new().fallback(handler).layer(FalAuthLayer::new(house()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, app).into_future());
    address
}

/// What the handler saw of a request with this target and `Host: fal.run`, sent as raw bytes.
async fn seen_over_http1(target: &'static str) -> String {
    let address = serve().await;
    let exchange = move || {
        let mut connection = TcpStream::connect(address).unwrap();
        write!(connection, "GET {target} HTTP/1.1\r\nHost: fal.run\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = tokio::task::spawn_blocking(exchange).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body.to_owned()
}

/// What the handler saw of a request with this URI over HTTP/2, where the client sends scheme and authority.
async fn seen_over_http2(uri: &'static str) -> String {
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let connection = tokio::net::TcpStream::connect(serve().await).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(connection)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(uri).body(Empty::<bytes::Bytes>::new()).unwrap();
    let body = client.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

#[tokio::test]
async fn an_inbound_request_whose_host_is_fals_gets_no_header() {
    assert_eq!(seen_over_http1("/x").await, "/x None");
    assert_eq!(seen_over_http1("//fal.run/x").await, "//fal.run/x None");
}

/// A router is not the layer's place: here the *caller* names the origin, and hyper takes its word for the URI.
#[tokio::test]
async fn an_inbound_absolute_uri_is_taken_for_an_outgoing_one() {
    assert_eq!(seen_over_http1("https://fal.run/x").await, format!("https://fal.run/x Some({OURS:?})"));
    assert_eq!(seen_over_http1("http://fal.run/x").await, "http://fal.run/x None");
}

/// Over HTTP/2 every request names an origin, so there this is the rule and no curiosity.
#[tokio::test]
async fn an_inbound_http2_request_to_fal_is_taken_for_outgoing() {
    assert_eq!(seen_over_http2("https://fal.run/x").await, format!("https://fal.run/x Some({OURS:?})"));
    assert_eq!(seen_over_http2("https://example.com/x").await, "https://example.com/x None");
}
