//! What the proxy does for whom, and how it is mounted.

use std::sync::{Arc, Mutex};

use axum::{Router, body::Body, routing::get};
use http::{Request, StatusCode, request::Parts, uri::Scheme};
use http_body_util::BodyExt as _;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
};
use tower::{ServiceExt as _, service_fn};
use tower_fal::{
    Credential, CredentialStore,
    caller::{Caller, Tokens},
    mock::{Lock, MockFal, Presented},
    proxy::{FalProxy, Finished, RequestOwnersInMemory},
    source,
};

use crate::support::{
    Answer, KEY, PATIENCE, Raw, RawFal, SECRET, Server, Task, Upstream, client, nobody, proxy, store,
};

const RUN: &str = "https://fal.run/fal-ai/flux/dev";
const SUBMIT: &str = "https://queue.fal.run/fal-ai/flux/dev";

/// A fal that knows its hosts by the `host` of a request, at one address.
pub(crate) struct Mock {
    pub(crate) fal: MockFal,
    pub(crate) address: std::net::SocketAddr,
    _serving: Task,
}

impl Mock {
    pub(crate) async fn new() -> Self {
        let fal = MockFal::start().await.unwrap();
        fal.accept(&Credential::key(KEY).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, served) = (listener.local_addr().unwrap(), fal.clone());
        let serving = Task::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(served.serve_connection(stream, Scheme::HTTP));
            }
        });
        Self { fal, address, _serving: serving }
    }

    pub(crate) fn proxy(&self) -> FalProxy<Upstream> {
        proxy(self.address)
    }
}

fn tokens() -> Tokens {
    Tokens::new([
        ("acme", Caller::tenant("acme")),
        ("zeta", Caller::tenant("zeta").endpoints(["fal-ai/other/**"]).unwrap()),
        ("own", Caller::tenant("own").credential(Credential::key("own:secret-of-id-own").unwrap())),
        ("one", Caller::tenant("one").max_in_flight(1)),
    ])
}

fn from<'a>(caller: &str, request: Raw<'a>) -> Raw<'a> {
    request.line(&format!("authorization: Bearer {caller}"))
}

fn json(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{answer:?}"))
}

#[tokio::test]
async fn it_is_merged_nested_and_put_at_another_path() {
    let fal = RawFal::ok().await;
    let router = Router::new()
        .route("/", get(async || "home"))
        .merge(proxy(fal.address).into_router())
        .merge(proxy(fal.address).path("/fal").unwrap().into_router())
        .nest("/app", proxy(fal.address).path("/p/").unwrap().into_router())
        .nest("/deep", proxy(fal.address).path("/").unwrap().into_router());
    let server = Server::new(router).await;
    let paths = ["/api/fal/proxy", "/api/fal/proxy/", "/fal", "/fal/", "/app/p", "/app/p/", "/deep", "/fal?x=y"];
    for path in paths {
        assert_eq!(server.send(Raw { path, ..Raw::post(RUN) }).await.status, 200, "{path}");
    }
    assert_eq!(server.send(Raw { path: "/other", ..Raw::post(RUN) }).await.status, 404);
    assert_eq!(server.send(Raw { path: "/api/fal/proxy/x", ..Raw::post(RUN) }).await.status, 404);
    assert_eq!(fal.sent().len(), paths.len());
    for path in ["", "fal", "/{x}", "/*"] {
        assert!(proxy(fal.address).path(path).is_err(), "{path}");
    }
}

/// Without axum: a service over hyper's own bodies.
#[tokio::test]
async fn it_is_a_plain_service_over_http2_too() {
    let fal = RawFal::ok().await;
    let upstream = Client::builder(TokioExecutor::new()).build(crate::support::ConnectTo::new(fal.address));
    let proxy = FalProxy::over(&store(), upstream).allow_anonymous();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _serving = Task::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let service = hyper_util::service::TowerToHyperService::new(proxy);
        let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
    });
    let http2 = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Body>();
    let request = Request::post(format!("http://{address}/anything"))
        .header("x-fal-target-url", RUN)
        .header("content-type", "application/json")
        .body(Body::from("{}"))
        .unwrap();
    let answer = http2.request(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(fal.sent()[0].head.starts_with("POST /fal-ai/flux/dev HTTP/1.1\r\n"));
}

#[tokio::test]
async fn nothing_of_the_inbound_request_goes_along_that_is_not_named() {
    let mock = Mock::new().await;
    let other = Credential::key("other:secret-of-id-other").unwrap();
    let router = mock.proxy().into_router().layer(axum::Extension(other));
    assert_eq!(Server::new(router).await.send(Raw::post(RUN)).await.status, 200);
    let ours = Presented::Accepted(Credential::key(KEY).unwrap().key_id().cloned());
    assert_eq!(mock.fal.received()[0].presented, ours);
}

#[tokio::test]
async fn a_caller_has_endpoints_and_a_credential_of_its_own() {
    let mock = Mock::new().await;
    let server = Server::new(mock.proxy().authenticate(tokens()).into_router()).await;
    assert_eq!(server.send(from("acme", Raw::post(RUN))).await.status, 200);
    let closed = server.send(from("zeta", Raw::post(RUN))).await;
    assert_eq!((closed.status, closed.rule()), (403, Some("endpoint")));
    assert_eq!(server.send(from("zeta", Raw::post("https://fal.run/fal-ai/other"))).await.status, 200);

    let own = Credential::key("own:secret-of-id-own").unwrap();
    assert_eq!(server.send(from("own", Raw::post(RUN))).await.status, 401, "fal does not know it");
    mock.fal.accept(&own);
    assert_eq!(server.send(from("own", Raw::post(RUN))).await.status, 200);
    assert_eq!(mock.fal.received().last().unwrap().presented, Presented::Accepted(own.key_id().cloned()));
}

#[tokio::test]
async fn a_caller_without_a_credential_never_gets_the_houses() {
    let mock = Mock::new().await;
    let per_request = FalProxy::per_request(client(mock.address)).authenticate(tokens());
    let server = Server::new(per_request.into_router()).await;
    let refused = server.send(from("acme", Raw::post(RUN))).await;
    assert_eq!((refused.status, refused.rule()), (403, Some("no_credential")));
    assert!(mock.fal.received().is_empty());
    mock.fal.accept(&Credential::key("own:secret-of-id-own").unwrap());
    assert_eq!(server.send(from("own", Raw::post(RUN))).await.status, 200);
}

#[tokio::test]
async fn nothing_of_a_body_is_read_before_the_caller_is_admitted() {
    let fal = RawFal::ok().await;
    let server = Server::new(proxy(fal.address).authenticate(tokens()).into_router()).await;
    let ask = |caller| {
        Raw { body: "", ..from(caller, Raw::post(RUN)) }.line("expect: 100-continue").line("content-length: 2")
    };
    let refused = server.raw(&ask("nobody").bytes()).await;
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    let mut stream = server.connect().await;
    stream.write_all(&ask("acme").bytes()).await.unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).await.unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
}

#[tokio::test]
async fn as_many_requests_are_under_way_as_a_caller_may_have() {
    let mock = Mock::new().await;
    mock.fal.hold_events_after(1);
    let server = Server::new(mock.proxy().authenticate(tokens()).into_router()).await;
    let mut stream = server.connect().await;
    stream.write_all(&from("one", Raw::post(&format!("{RUN}/stream"))).bytes()).await.unwrap();
    read_until(&mut stream, "data: ").await;

    let refused = server.send(from("one", Raw::post(RUN))).await;
    assert_eq!((refused.status, refused.rule(), refused.header("retry-after")), (429, Some("in_flight"), Some("1")));
    assert_eq!(server.send(from("acme", Raw::post(RUN))).await.status, 200);
    assert_eq!(mock.fal.received().len(), 2, "nothing was sent of what was refused");
    drop(stream);
    // The proxy learns of it from the connection.
    let served = async { while server.send(from("one", Raw::post(RUN))).await.status != 200 {} };
    tokio::time::timeout(PATIENCE, served).await.unwrap();
}

pub(crate) async fn read_until(stream: &mut tokio::net::TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&read).contains(end) {
            assert!(stream.read_buf(&mut read).await.unwrap() > 0, "{}", String::from_utf8_lossy(&read));
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("it does not come");
    String::from_utf8(read).unwrap()
}

#[tokio::test]
async fn an_event_is_handed_on_when_it_comes() {
    let mock = Mock::new().await;
    mock.fal.hold_events_after(1);
    let server = Server::new(mock.proxy().into_router()).await;
    let mut stream = server.connect().await;
    stream.write_all(&Raw::post(&format!("{RUN}/stream")).bytes()).await.unwrap();
    let begun = read_until(&mut stream, "\"event\":0").await;
    assert!(begun.contains("text/event-stream") && !begun.contains("\"event\":1"), "{begun}");
    mock.fal.hold_events_after(usize::MAX);
    read_until(&mut stream, "\"event\":2").await;
}

#[tokio::test]
async fn whoever_submitted_a_request_follows_it() {
    let mock = Mock::new().await;
    let proxy =
        mock.proxy().authenticate(Tokens::new([("acme", Caller::tenant("acme")), ("zeta", Caller::tenant("zeta"))]));
    let proxy = proxy.request_owners(RequestOwnersInMemory::default()).allow_endpoint("fal-ai/flux/dev").unwrap();
    let server = Server::new(proxy.into_router()).await;
    let submitted = server.send(from("acme", Raw::post(SUBMIT))).await;
    assert_eq!(submitted.status, 200);
    let id = json(&submitted)["request_id"].as_str().unwrap().to_owned();

    let base = format!("https://queue.fal.run/fal-ai/flux/requests/{id}");
    for path in ["", "/status", "/status?logs=1"] {
        let target = format!("{base}{path}");
        assert_eq!(server.send(from("acme", Raw::get(&target))).await.status, 200, "{path}");
        let theirs = server.send(from("zeta", Raw::get(&target))).await;
        assert_eq!((theirs.status, theirs.rule()), (404, Some("request_owner")), "{path}");
    }
    let cancel = format!("{base}/cancel");
    assert_eq!(server.send(from("zeta", Raw { method: "PUT", ..Raw::get(&cancel) })).await.status, 404);
    let streamed = format!("{base}/status/stream?logs=1");
    assert_eq!(server.send(from("zeta", Raw::get(&streamed))).await.status, 404);
    assert_eq!(mock.fal.received().len(), 4);
}

/// fal may send back an id that a client has put into a header. The queue's own one is in the body.
#[tokio::test]
async fn nobody_claims_a_request_by_a_header() {
    let fal = RawFal::new(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-fal-request-id: theirs\r\ncontent-length: 21\r\n\r\n\
         {\"request_id\":\"mine\"}",
    )
    .await;
    let server = Server::new(proxy(fal.address).request_owners(RequestOwnersInMemory::default()).into_router()).await;
    assert_eq!(server.send(Raw::post(SUBMIT).line("x-fal-request-id: theirs")).await.status, 200);
    let follow = |id| format!("https://queue.fal.run/fal-ai/flux/requests/{id}");
    assert_eq!(server.send(Raw::get(&follow("theirs"))).await.status, 404);
    assert_eq!(server.send(Raw::get(&follow("mine"))).await.status, 200);
}

#[tokio::test]
async fn nobody_is_told_of_what_was_not_sent() {
    let (tell, mut told) = mpsc::unbounded_channel::<Finished>();
    let nobody = nobody();
    let proxy = proxy(nobody.local_addr().unwrap()).allow_realtime("fal-ai/flux/dev").unwrap();
    let server = Server::new(proxy.on_finished(move |finished| drop(tell.send(finished.clone()))).into_router()).await;
    let tokens = "https://rest.fal.ai/tokens/";
    let ask = Raw { body: r#"{"allowed_apps":["other"]}"#, ..Raw::post(tokens) };
    assert_eq!(server.send(ask).await.status, 403);
    assert_eq!(server.send(Raw::get(tokens)).await.status, 405);
    assert_eq!(server.send(Raw::post(RUN)).await.status, 502);
    assert!(told.try_recv().is_err());
}

#[test]
fn a_path_that_no_router_can_have_is_refused() {
    for path in ["", "x", "/{x}", "/*x", "/a/:b", "/:", "/a b", "/a?b", "/a#b"] {
        assert!(proxy("127.0.0.1:1".parse().unwrap()).path(path).is_err(), "{path}");
    }
    drop(proxy("127.0.0.1:1".parse().unwrap()).path("/a:b").unwrap().into_router::<hyper::body::Incoming>());
}

#[tokio::test]
async fn those_who_meter_are_told_of_each_end() {
    let mock = Mock::new().await;
    let (tell, mut told) = mpsc::unbounded_channel::<Finished>();
    let proxy = mock.proxy().authenticate(tokens()).on_finished(move |finished| drop(tell.send(finished.clone())));
    let server = Server::new(proxy.into_router()).await;

    assert_eq!(server.send(from("acme", Raw::post(RUN))).await.status, 200);
    let finished = told.recv().await.unwrap();
    assert_eq!(finished.caller().name(), Some("acme"));
    assert_eq!((finished.host(), finished.endpoint()), ("fal.run", "fal-ai/flux/dev"));
    assert_eq!((finished.status(), finished.is_complete()), (Some(StatusCode::OK), true));
    assert!(finished.billable_units().is_some() && finished.request_id().is_some());

    // A refused one went nowhere, so nobody is told.
    assert_eq!(server.send(from("zeta", Raw::post(RUN))).await.status, 403);

    mock.fal.hold_events_after(1);
    let mut stream = server.connect().await;
    stream.write_all(&from("acme", Raw::post(&format!("{RUN}/stream"))).bytes()).await.unwrap();
    read_until(&mut stream, "data: ").await;
    drop(stream);
    let finished = tokio::time::timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
    assert_eq!((finished.endpoint(), finished.is_complete()), ("fal-ai/flux/dev/stream", false));

    mock.fal.set_latency(PATIENCE * 10);
    let mut stream = server.connect().await;
    stream.write_all(&from("acme", Raw::post(RUN)).bytes()).await.unwrap();
    while mock.fal.received().len() < 3 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    let finished = tokio::time::timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
    assert_eq!((finished.status(), finished.is_complete()), (None, false));
}

#[tokio::test]
async fn realtime_tokens_are_for_listed_applications() {
    let mock = Mock::new().await;
    mock.fal.keep_content(true);
    let server = Server::new(mock.proxy().allow_realtime("fal-ai/flux/dev").unwrap().into_router()).await;
    let ask = |target, body| Raw { body, ..Raw::post(target) };

    let old =
        server.send(ask("https://rest.fal.ai/tokens/", r#"{"allowed_apps":["flux"],"token_expiration":99999}"#)).await;
    assert_eq!(old.status, 200, "{old:?}");
    assert!(json(&old).as_str().is_some_and(|token| token.starts_with("e30.")), "{old:?}");
    assert_eq!(old.header("cache-control"), Some("no-store"));
    let sent = mock.fal.received().last().unwrap().body.clone().unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&sent).unwrap(),
        json!({"allowed_apps":["flux"],"token_expiration":3600})
    );

    let realtime = "https://rest.alpha.fal.ai/tokens/realtime";
    let new = server.send(ask(realtime, r#"{"allowed_apps":["fal-ai/flux/dev/realtime"]}"#)).await;
    assert_eq!(new.status, 200, "{new:?}");
    assert!(json(&new)["token"].is_string());
    assert_eq!(mock.fal.received().last().unwrap().host, "rest.alpha.fal.ai");

    let before = mock.fal.received().len();
    for (target, body, status) in [
        ("https://rest.fal.ai/tokens/", r#"{"allowed_apps":["other"]}"#, 403),
        ("https://rest.fal.ai/tokens/", r#"{"allowed_apps":["flux"],"allowed_apps":["other"]}"#, 400),
        ("https://rest.fal.ai/tokens/", "[]", 400),
        ("https://rest.fal.ai/tokens/x", r#"{"allowed_apps":["flux"]}"#, 412),
    ] {
        let refused = server.send(ask(target, body)).await;
        assert_eq!(refused.status, status, "{target} {body}: {refused:?}");
        assert!(refused.rule().is_some());
    }
    assert_eq!(server.send(Raw::get("https://rest.fal.ai/tokens/")).await.status, 405);
    let long = format!(r#"{{"allowed_apps":["flux"],"x":"{}"}}"#, "x".repeat(16 * 1024));
    assert_eq!(server.send(ask("https://rest.fal.ai/tokens/", &long)).await.status, 413);
    assert_eq!(mock.fal.received().len(), before);
}

#[tokio::test]
async fn a_revoked_key_is_replaced_and_the_request_sent_again() {
    let mock = Mock::new().await;
    let current = Arc::new(Mutex::new(KEY.to_owned()));
    let read = Arc::clone(&current);
    let source = source::from_fn("test", None, move || {
        let key = read.lock().unwrap().clone();
        async move { Ok(Credential::key(key)?) }
    });
    let store = CredentialStore::builder(source).build().await.unwrap();
    let server = Server::new(FalProxy::over(&store, client(mock.address)).allow_anonymous().into_router()).await;
    assert_eq!(server.send(Raw::post(RUN)).await.status, 200);
    let next = Credential::key("id-2:secret-of-id-2").unwrap();
    *current.lock().unwrap() = "id-2:secret-of-id-2".to_owned();
    mock.fal.accept(&next);
    mock.fal.revoke(&Credential::key(KEY).unwrap());
    assert_eq!(server.send(Raw::post(RUN)).await.status, 200);
    assert_eq!(mock.fal.runs(), 2);
    assert_eq!(mock.fal.received().last().unwrap().presented, Presented::Accepted(next.key_id().cloned()));
}

#[tokio::test]
async fn fals_own_refusals_come_through_as_they_are() {
    let mock = Mock::new().await;
    let server = Server::new(mock.proxy().into_router()).await;
    mock.fal.lock(Lock::TopUp);
    let locked = server.send(Raw::post(RUN)).await;
    assert_eq!(
        (locked.status, locked.rule(), &json(&locked)),
        (403, None, &json!({"detail": "User is locked. Reason: TOP_UP."}))
    );
    mock.fal.unlock();
    mock.fal.revoke(&Credential::key(KEY).unwrap());
    let unknown = server.send(Raw::post(RUN)).await;
    assert_eq!(
        (unknown.status, unknown.rule(), &json(&unknown)),
        (401, None, &json!({"detail": "invalid key credentials"}))
    );
    assert!(unknown.header("www-authenticate").is_none());
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_answered_so_that_nothing_is_sent_again() {
    let client = service_fn(async |_| {
        std::future::pending::<()>().await;
        Ok::<_, std::io::Error>(http::Response::new(Body::empty()))
    });
    let proxy = FalProxy::over(&store(), client).allow_anonymous();
    let ask = || {
        let request = Request::post("/").header("host", "localhost").header("x-fal-target-url", RUN);
        request.body(Body::empty()).unwrap()
    };
    let limited = proxy.clone().first_byte_timeout(std::time::Duration::from_secs(60));
    let answer = limited.oneshot(ask()).await.unwrap();
    assert_eq!(answer.status(), 504);
    assert_eq!(answer.headers()["x-fal-request-timeout-type"], "user");
    let day = std::time::Duration::from_secs(24 * 60 * 60);
    assert!(tokio::time::timeout(day, proxy.oneshot(ask())).await.is_err(), "there is no limit by default");
}

#[tokio::test]
async fn a_hook_refuses_with_a_response_of_its_own() {
    let fal = RawFal::ok().await;
    let router = proxy(fal.address).authenticate(async |head: &Parts| {
        assert!(head.headers.contains_key("x-fal-target-url"));
        let refused = http::Response::builder().status(402).header("content-type", "application/json");
        Err(refused.body(Body::from(r#"{"message":"pay first"}"#)).unwrap())
    });
    let answer = Server::new(router.into_router()).await.send(Raw::post(RUN)).await;
    assert_eq!((answer.status, &*answer.body, answer.rule()), (402, r#"{"message":"pay first"}"#, None));
    assert!(fal.sent().is_empty());
}

#[tokio::test]
async fn nothing_that_it_shows_holds_the_key() {
    let fal = RawFal::ok().await;
    let proxy = proxy(fal.address).authenticate(tokens()).on_finished(|_| ());
    assert!(!format!("{proxy:?}").contains(SECRET));
    let answer = proxy.oneshot(Request::post("/").body(Body::empty()).unwrap()).await.unwrap();
    assert!(!format!("{answer:?}").contains(SECRET));
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
}
