//! `examples/axum_layer`: what it forwards, to where, and what not.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, Method, Uri},
    response::IntoResponse,
};
use http::Version;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::json;
use tower_fal::mock::{MockFal, Presented};

use crate::{
    app::{Answer, App, KeyFile, Served},
    support::{key, key_text},
};

const NAME: &str = "axum_layer";

/// The two ways in, of which one has the layer on a router and the other a client behind it.
const WAYS: [&str; 2] = ["/layer", "/client"];

fn post(path: &str) -> http::Request<String> {
    http::Request::post(path)
        .header("content-type", "application/json")
        .body(r#"{"prompt":"a cat"}"#.to_owned())
        .unwrap()
}

fn accepted() -> Presented {
    Presented::Accepted(key(1).key_id().cloned())
}

/// What a fal sees that looks at everything.
type Heads = Arc<Mutex<Vec<(Method, Uri, HeaderMap)>>>;

async fn look(State(heads): State<Heads>, request: Request) -> impl IntoResponse {
    let (head, _) = request.into_parts();
    heads.lock().unwrap().push((head.method, head.uri, head.headers));
    let back = [
        ("content-type", "text/x-fal"),
        ("x-fal-request-id", "r-1"),
        ("set-cookie", "fal=hush"),
        ("keep-alive", "timeout=5"),
        ("location", "http://127.0.0.1:1/"),
        ("x-other", "hush"),
    ];
    (back, "from fal")
}

async fn looked_at() -> (Heads, Served, App, KeyFile) {
    let heads = Heads::default();
    let fal = Served::new(Router::new().fallback(look).with_state(heads.clone())).await;
    let file = KeyFile::new(&key_text(1));
    // With a path of its own, as of a gateway.
    let url = format!("{}/gateway/", fal.url);
    // fal's hosts are names of this server, or it would refuse them before it forwards anything.
    let hosts = ["--host", "fal.run", "--host=queue.fal.run"];
    let path = file.path();
    let arguments = [&["--key-file", path.to_str().unwrap(), "--fal-run-url", &url], &hosts[..]].concat();
    let app = App::start(NAME, &arguments).await;
    (heads, fal, app, file)
}

#[tokio::test]
async fn what_is_forwarded_has_the_servers_key_and_few_other_headers() {
    let (heads, fal, app, _file) = looked_at().await;
    for way in WAYS {
        let mut request = post(&format!("{way}/a/b%2Fc?d=hush"));
        for (name, value) in [
            ("accept", "text/event-stream"),
            ("authorization", "Bearer hush"),
            ("cookie", "session=hush"),
            ("host", "fal.run"),
            ("connection", "x-secret, keep-alive"),
            ("x-secret", "hush"),
            ("keep-alive", "timeout=9"),
            ("proxy-authorization", "Basic hush"),
            ("te", "trailers"),
            ("trailer", "x-hush"),
            ("upgrade", "websocket"),
            ("x-fal-user-id", "hush"),
            ("x-fal-target-url", "http://127.0.0.1:1/hush"),
            ("x-forwarded-for", "192.0.2.1"),
        ] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        request.headers_mut().append("accept", "application/json".parse().unwrap());
        let answer = app.send(request).await;
        let (method, uri, headers) = heads.lock().unwrap().pop().unwrap();
        assert_eq!((method.as_str(), uri.to_string().as_str()), ("POST", "/gateway/a/b%2Fc?d=hush"), "{way}");
        let mut headers: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        headers.sort_unstable();
        let expected = [
            ("accept", "application/json"),
            ("accept", "text/event-stream"),
            ("authorization", "Key id-1:secret-of-id-1"),
            ("content-length", "18"),
            ("content-type", "application/json"),
            ("host", fal.url.strip_prefix("http://").unwrap()),
        ];
        // `assert_eq` would show a key if it failed, but this one is nobody's.
        assert_eq!(headers, expected, "{way}");

        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "from fal"));
        let mut returned: Vec<_> = answer.headers.keys().map(http::HeaderName::as_str).collect();
        returned.sort_unstable();
        let expected = [
            "content-length",
            "content-security-policy",
            "content-type",
            "date",
            "x-content-type-options",
            "x-fal-request-id",
            "x-request-id",
        ];
        assert_eq!(returned, expected, "{way}");
    }
    app.end().await.well();
}

#[tokio::test]
async fn a_host_of_fals_in_an_inbound_request_opens_nothing() {
    let (heads, fal, app, _file) = looked_at().await;
    let ours = fal.url.strip_prefix("http://").unwrap();
    for (target, forwarded) in [
        ("/a/b", None),
        ("/layers/a", None),
        ("http://fal.run/a/b", None),
        ("https://fal.run/a/b", None),
        ("https://fal.run/", None),
        ("*", None),
        ("http://fal.run/layer/a/b", Some("/gateway/a/b")),
        ("https://fal.run/client/a/b?c=d", Some("/gateway/a/b?c=d")),
        ("https://hush:hush@queue.fal.run/client/a/b", Some("/gateway/a/b")),
        // Which stays a path, whatever it looks like.
        ("/client/@fal.run/a", Some("/gateway/@fal.run/a")),
        ("/layer//fal.run/a", Some("/gateway/fal.run/a")),
        ("/client//fal.run/a", Some("/gateway/fal.run/a")),
    ] {
        let answer = app.raw(&format!("OPTIONS {target} HTTP/1.1\r\nhost: fal.run\r\nconnection: close\r\n\r\n")).await;
        let status = if forwarded.is_some() { "HTTP/1.1 200" } else { "HTTP/1.1 404" };
        assert!(answer.starts_with(status), "{target}: {answer}");
        assert!(!answer.contains("secret"), "{target}: {answer}");

        let seen = heads.lock().unwrap().pop();
        let seen = seen.as_ref().map(|(_, uri, headers)| (uri.to_string(), headers["host"].to_str().unwrap()));
        assert_eq!(seen, forwarded.map(|path| (path.to_owned(), ours)), "{target}");
    }

    // Each request of HTTP/2 names an origin.
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Empty<bytes::Bytes>>();
    for (path, status) in [("/a/b", 404), ("/layer/a/b", 200), ("/client/a/b", 200)] {
        let request =
            http::Request::get(format!("{}{path}", app.url)).version(Version::HTTP_2).body(Empty::new()).unwrap();
        assert_eq!(client.request(request).await.unwrap().status(), status, "{path}");
    }
    assert_eq!(heads.lock().unwrap().len(), 2);
    drop(client);
    let log = app.end().await.well();
    assert!(log.contains("host=\"queue.fal.run\""), "{log}");
}

/// The server's key goes below the URL that was named, for what fal is asked by, and nowhere else.
#[tokio::test]
async fn paths_outside_of_the_url_and_other_methods_are_refused() {
    let (heads, _fal, app, _file) = looked_at().await;
    for way in WAYS {
        for (method, path, expected) in [
            // It would have the server that is asked send back what it was sent: the key.
            ("TRACE", "/a/b", "HTTP/1.1 405"),
            ("CONNECT", "/a/b", "HTTP/1.1 405"),
            ("HUSH", "/a/b", "HTTP/1.1 405"),
            ("GET", "/../a", "HTTP/1.1 404"),
            ("GET", "/a/../../b", "HTTP/1.1 404"),
            ("GET", "/a/..", "HTTP/1.1 404"),
            ("GET", "/%2e%2E/a", "HTTP/1.1 404"),
            ("GET", "/.%2e/a", "HTTP/1.1 404"),
            ("GET", "/a%2f..%2F..%2fb", "HTTP/1.1 404"),
            ("GET", "/..%5ca", "HTTP/1.1 404"),
            ("GET", "/..\\a", "HTTP/1.1 404"),
            ("GET", "/..;/a", "HTTP/1.1 404"),
            ("GET", "/a/..b/c..?d=/../", "HTTP/1.1 200"),
        ] {
            let head = "host: localhost\r\nconnection: close";
            let answer = app.raw(&format!("{method} {way}{path} HTTP/1.1\r\n{head}\r\n\r\n")).await;
            assert!(answer.starts_with(expected), "{method} {way}{path}: {answer}");
            let seen = heads.lock().unwrap().pop().map(|(_, uri, _)| uri.to_string());
            let is_forwarded = expected.ends_with("200");
            assert_eq!(seen, is_forwarded.then(|| format!("/gateway{path}")), "{method} {way}{path}");
        }
    }
    app.end().await.well();
}

#[tokio::test]
async fn only_the_bare_layer_hands_a_refused_key_to_the_caller() {
    let fal = MockFal::start().await.unwrap();
    let (app, file) = App::against(NAME, &fal, &[]).await;
    for way in WAYS {
        let answer = app.send(post(&format!("{way}/fal-ai/flux"))).await;
        assert_eq!((answer.status.as_u16(), answer.json()["prompt"].as_str()), (200, Some("a cat")));
    }
    assert!(fal.received().iter().all(|call| call.presented == accepted() && call.path == "/fal-ai/flux"));

    fal.revoke(&key(1));
    let answer = app.send(post("/layer/fal-ai/flux")).await;
    assert_eq!((answer.status.as_u16(), answer.body.contains("invalid key credentials")), (401, true));
    let answer = app.send(post("/client/fal-ai/flux")).await;
    assert_eq!(answer.problem(), (502, "unknown_credential".to_owned()));
    fal.accept(&key(2));
    file.replace(&key_text(2));
    app.ready_where(|_, report| report["key_id"] == "id-2").await;
    for way in WAYS {
        assert_eq!(app.send(post(&format!("{way}/fal-ai/flux"))).await.status, 200);
    }
    drop(fal);
    for way in WAYS {
        assert_eq!(
            app.send(post(&format!("{way}/fal-ai/flux"))).await.problem(),
            (502, "transport".to_owned()),
            "{way}"
        );
    }
    let answer = app.admin("/readyz").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["ready"]), (200, &json!(true)));
    app.end().await.well();
}

#[tokio::test]
async fn a_stream_that_is_open_at_a_shutdown_is_read_to_its_end() {
    let fal = MockFal::start().await.unwrap();
    // Less than the stream takes: the timeout is for the start of an answer.
    let (app, _file) = App::against(NAME, &fal, &["--drain-delay", "0", "--request-timeout", "5"]).await;
    fal.hold_events_after(1);
    let mut streams = Vec::new();
    for way in WAYS {
        let mut stream = app.open(post(&format!("{way}/fal-ai/flux/stream"))).await.unwrap();
        assert_eq!(stream.headers()["content-type"], "text/event-stream");
        let first = stream.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(first.starts_with(b"data: "), "{way}");
        streams.push(stream);
    }
    app.signal("TERM").await;
    app.refuses_connections().await;
    fal.hold_events_after(usize::MAX);
    for stream in streams {
        let rest = Answer::of(stream).await.body;
        assert_eq!(rest.matches("data: ").count(), 2, "{rest}");
    }
    let log = app.ended().await.well();
    assert!(!log.contains("closing"), "{log}");
}

/// All on one connection, which nothing closes before its last answer is there.
#[tokio::test]
async fn a_shutdown_loses_nothing_over_http_2_either() {
    let fal = MockFal::start().await.unwrap();
    let (app, _file) = App::against(NAME, &fal, &["--drain-delay", "2"]).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<bytes::Bytes>>();
    let send = async |path: &str| {
        let request = http::Request::post(format!("{}{path}", app.url)).body(Full::from("{}")).unwrap();
        client.request(request).await.unwrap()
    };
    fal.hold_events_after(1);
    let mut stream = send("/client/fal-ai/flux/stream").await;
    assert_eq!(stream.version(), Version::HTTP_2);
    stream.frame().await.unwrap().unwrap();
    app.signal("TERM").await;
    app.ready_where(|status, _| status == 503).await;
    for _ in 0..20 {
        let answer = send("/client/fal-ai/flux").await;
        // Which HTTP/2 forbids.
        assert_eq!((answer.status().as_u16(), answer.headers().get("connection")), (200, None));
    }
    app.refuses_connections().await;
    fal.hold_events_after(usize::MAX);
    assert_eq!(Answer::of(stream).await.body.matches("data: ").count(), 2);
    let log = app.ended().await.well();
    assert!(!log.contains("closing"), "{log}");
}

#[tokio::test]
async fn a_second_signal_ends_what_the_first_one_waits_for() {
    for delay in ["0", "600"] {
        let fal = MockFal::start().await.unwrap();
        let (app, _file) = App::against(NAME, &fal, &["--drain-delay", delay, "--drain-timeout", "600"]).await;
        fal.hold_events_after(1);
        let mut stream = app.open(post("/client/fal-ai/flux/stream")).await.unwrap();
        stream.frame().await.unwrap().unwrap();
        app.signal("TERM").await;
        if delay == "0" {
            app.refuses_connections().await;
        } else {
            app.ready_where(|status, _| status == 503).await;
        }
        app.signal("TERM").await;
        app.ended().await.well();
        // Cut off, and not as if it had come to its end.
        assert!(stream.into_body().collect().await.is_err());
    }
}

#[tokio::test]
async fn a_body_has_a_limit_and_an_answer_must_begin_in_time() {
    let fal = MockFal::start().await.unwrap();
    let (app, _file) = App::against(NAME, &fal, &["--request-timeout", "2"]).await;
    for way in WAYS {
        assert!(app.refuses_body_of(1024 * 1024 + 1, &format!("{way}/fal-ai/flux")).await, "{way}");
    }
    assert_eq!(fal.requests(), 0);
    // One whose length nobody has stated is found out when it is on its way.
    for way in WAYS {
        let head = "host: localhost\r\nconnection: close\r\ntransfer-encoding: chunked";
        let (length, chunk) = (1024 * 1024 + 1, "a".repeat(1024 * 1024 + 1));
        let answer = app.raw(&format!("POST {way}/fal-ai/flux HTTP/1.1\r\n{head}\r\n\r\n{length:x}\r\n{chunk}")).await;
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_long"), "{way}: {answer}");
    }
    fal.set_latency(Duration::from_secs(600));
    for way in WAYS {
        assert_eq!(app.send(post(&format!("{way}/fal-ai/flux"))).await.status, 504, "{way}");
    }
    app.end().await.well();
}
