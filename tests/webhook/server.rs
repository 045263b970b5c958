//! The whole way, over sockets: a submit, fal's delivery, a server of axum's or hyper's, and fal's repeats.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use axum::{
    Extension, Json, Router,
    body::{Body, to_bytes},
    extract::Request,
    middleware::{Next, from_fn},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use http::{StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};
use tower::Layer as _;
use tower_fal::{
    Credential,
    mock::{Answer, ErrorType, Failure, MockFal},
    webhook::{VerifiedWebhook, VerifyWebhookLayer, WebhookPayload, WebhookStatus},
};

use crate::support::{BODY, Handler, PATIENCE, Served, client, fetches, fixed_keys_of, keys_of, layer};

fn key(n: u32) -> Credential {
    Credential::key(format!("id-{n}:secret-of-id-{n}")).unwrap()
}

/// Submits a request whose result is delivered to this URL, and returns its id.
async fn submit(fal: &MockFal, credential: &Credential, to: &http::Uri) -> String {
    let to: String = url::form_urlencoded::byte_serialize(to.to_string().as_bytes()).collect();
    let request = http::Request::post(fal.queue_url(&format!("/fal-ai/flux?fal_webhook={to}")))
        .header(AUTHORIZATION, credential.header())
        .body(Full::from(r#"{"prompt":"a cat"}"#))
        .unwrap();
    let response = client().request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let body: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    body["request_id"].as_str().unwrap().to_owned()
}

async fn delivered(fal: &MockFal, id: &str) -> Vec<Option<u16>> {
    let attempts = tokio::time::timeout(PATIENCE, fal.webhook_delivered(id)).await.unwrap();
    attempts.into_iter().map(|status| status.map(|status| status.as_u16())).collect()
}

async fn mock() -> MockFal {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.webhook_repeats(10, Duration::from_millis(5));
    fal
}

type Seen = Arc<Mutex<Vec<(VerifiedWebhook, WebhookPayload)>>>;

/// A server whose handler answers with these statuses, and then with 200.
async fn receiver(layer: VerifyWebhookLayer, statuses: &[u16]) -> (Served, Seen) {
    let seen = Seen::default();
    let statuses = Arc::new(Mutex::new(statuses.iter().rev().copied().collect::<Vec<_>>()));
    let noted = Arc::clone(&seen);
    let handler = move |Extension(webhook): Extension<VerifiedWebhook>, Json(payload): Json<WebhookPayload>| {
        noted.lock().unwrap().push((webhook, payload));
        let status = StatusCode::from_u16(statuses.lock().unwrap().pop().unwrap_or(200)).unwrap();
        async move { status }
    };
    let router = Router::new().route("/webhook", post(handler)).layer(layer);
    (Served::new(router).await, seen)
}

#[tokio::test]
async fn a_submit_leads_to_a_delivery_that_is_believed() {
    let fal = mock().await;
    fal.answer("fal-ai/flux", json!({ "images": [{ "url": "https://v3.fal.media/files/cat.png" }] }));
    let (server, seen) = receiver(layer(keys_of(&fal)), &[]).await;
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);
    let seen = seen.lock().unwrap();
    let [(webhook, payload)] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!((webhook.request_id(), webhook.user_id()), (id.as_str(), MockFal::USER_ID));
    assert_eq!((payload.request_id.as_str(), payload.status), (id.as_str(), WebhookStatus::Ok));
    assert_eq!(payload.payload.as_ref().unwrap()["images"][0]["url"], "https://v3.fal.media/files/cat.png");
}

#[tokio::test]
async fn a_job_that_failed_is_delivered_as_an_error() {
    let fal = mock().await;
    let (server, seen) = receiver(layer(keys_of(&fal)), &[]).await;
    fal.fail_next(1, Failure::Job(ErrorType::StartupTimeout));
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);
    fal.answer("fal-ai/flux", Answer::json(json!({ "detail": [] })).status(StatusCode::UNPROCESSABLE_ENTITY));
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);
    let seen = seen.lock().unwrap();
    let said: Vec<_> =
        seen.iter().map(|(_, said)| (said.status, said.error.as_deref(), said.payload.clone())).collect();
    assert_eq!(
        said,
        [
            (WebhookStatus::Error, Some("startup timeout"), None),
            (WebhookStatus::Error, Some("Unexpected status code: 422"), Some(json!({ "detail": [] }))),
        ]
    );
}

/// The first attempt fails, and the key is rotated before the second one.
#[tokio::test]
async fn a_handler_that_fails_first_gets_the_delivery_again() {
    let fal = mock().await;
    let (server, seen) = receiver(layer(keys_of(&fal)).skip_repeats(), &[500, 503]).await;
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(500), Some(503), Some(200)]);
    fal.rotate_webhook_key();
    assert!(fal.deliver_webhook_again(&id));
    assert_eq!(delivered(&fal, &id).await, [Some(500), Some(503), Some(200), Some(200)]);
    // It was handled once, and the repeat that came after the rotation was verified with the new key.
    let repeats: Vec<_> = seen.lock().unwrap().iter().map(|(webhook, _)| webhook.is_repeat()).collect();
    assert_eq!((repeats, fetches(&fal)), (vec![false; 3], 2));
}

#[tokio::test]
async fn a_repeat_that_keeps_its_signature_is_believed() {
    let fal = mock().await;
    fal.keep_webhook_signature(true);
    let (server, seen) = receiver(layer(keys_of(&fal)), &[500]).await;
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(500), Some(200)]);
    // The key with which it was signed is the one before, which is still published.
    fal.rotate_webhook_key();
    assert!(fal.deliver_webhook_again(&id));
    assert_eq!(delivered(&fal, &id).await, [Some(500), Some(200), Some(200)]);
    let seen = seen.lock().unwrap();
    let repeats: Vec<_> = seen.iter().map(|(webhook, _)| webhook.is_repeat()).collect();
    assert_eq!(repeats, [false, false, true]);
    assert!(seen.windows(2).all(|pair| pair[0].0.timestamp() == pair[1].0.timestamp()));
}

#[tokio::test]
async fn a_delivery_of_another_account_is_refused() {
    let fal = mock().await;
    fal.accept_for("mock|2", &key(2));
    let (server, seen) = receiver(layer(keys_of(&fal)), &[]).await;
    let id = submit(&fal, &key(2), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(403)]);
    assert_eq!(seen.lock().unwrap().len(), 0);

    let (server, seen) = receiver(VerifyWebhookLayer::any_account(keys_of(&fal)), &[]).await;
    let id = submit(&fal, &key(2), &server.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);
    assert_eq!(seen.lock().unwrap()[0].0.user_id(), "mock|2");
}

/// fal gives up waiting while the handler works, and comes again before it has ended.
#[tokio::test]
async fn a_handler_that_is_slower_than_fal_waits_is_started_once() {
    let fal = mock().await;
    // However many attempts end before the handler has begun.
    fal.webhook_repeats(10_000, Duration::from_millis(5));
    fal.webhook_timeout(Duration::from_millis(50));
    let (runs, open) = (Arc::new(watch::Sender::new(0)), Arc::new(watch::Sender::new(false)));
    let (counted, opened) = (Arc::clone(&runs), Arc::clone(&open));
    let handler = move || {
        counted.send_modify(|runs| *runs += 1);
        let opened = Arc::clone(&opened);
        async move {
            opened.subscribe().wait_for(|open| *open).await.unwrap();
        }
    };
    let verify = layer(keys_of(&fal));
    let detached = tower::util::MapFutureLayer::new(|future| async {
        // It goes on when the connection is closed.
        tokio::spawn(future).await.unwrap()
    });
    let router = Router::new().route("/webhook", post(handler)).layer(verify).layer(detached);
    let server = Served::new(router).await;
    let id = submit(&fal, &key(1), &server.url("/webhook")).await;
    let runs_reach = async |count| {
        let mut runs = runs.subscribe();
        tokio::time::timeout(PATIENCE, runs.wait_for(|runs| *runs >= count)).await.unwrap().unwrap();
    };
    runs_reach(1).await;
    fal.webhook_timeout(Duration::from_secs(15));
    // The next attempt finds it being handled; then the handler ends, and one that follows is a repeat.
    let open_later = async {
        while !fal_has_seen(&fal, &id, 503).await {
            tokio::task::yield_now().await;
        }
        assert_eq!(*runs.borrow(), 1);
        open.send_replace(true);
    };
    tokio::time::timeout(PATIENCE, open_later).await.unwrap();
    let attempts = delivered(&fal, &id).await;
    let [None, between @ .., Some(200)] = &attempts[..] else { panic!("{attempts:?}") };
    assert!(between.iter().all(|status| matches!(status, None | Some(503))), "{attempts:?}");
}

/// Whether an attempt so far had this answer.
async fn fal_has_seen(fal: &MockFal, id: &str, status: u16) -> bool {
    tokio::time::sleep(Duration::from_millis(1)).await;
    fal.webhook_attempts(id).contains(&Some(StatusCode::from_u16(status).unwrap()))
}

#[tokio::test]
async fn the_mock_delivers_to_this_machine_only_and_gives_up() {
    let fal = mock().await;
    fal.webhook_repeats(2, Duration::from_millis(1));
    for url in ["https://127.0.0.1:1/webhook", "http://example.com/webhook", "/webhook"] {
        let id = submit(&fal, &key(1), &url.parse().unwrap()).await;
        assert_eq!(delivered(&fal, &id).await, [], "{url}");
    }
    // A port that nobody listens at, and that no other test is given.
    let nobody = TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let id = submit(&fal, &key(1), &format!("http://{}/", nobody.local_addr().unwrap()).parse().unwrap()).await;
    assert_eq!(delivered(&fal, &id).await, [None; 3]);
    assert!(!fal.deliver_webhook_again("another"));
}

/// hyper's own server, over HTTP/1.1 and HTTP/2: its body is `Incoming`, and the handler is a Tower service.
#[tokio::test]
async fn a_server_of_hypers_takes_the_layer_as_well() {
    let fal = mock().await;
    let handler = Handler::new();
    let service = layer(keys_of(&fal)).layer(handler.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(service.clone());
            tokio::spawn(async move {
                let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let id = submit(&fal, &key(1), &format!("http://{address}/webhook").parse().unwrap()).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);

    let http2 = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    for body in [Bytes::from_static(BODY), Bytes::from_static(b"{}")] {
        let mut request =
            http::Request::post(format!("http://{address}/webhook")).body(Full::new(body.clone())).unwrap();
        request.headers_mut().extend(fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), BODY));
        let status = http2.request(request).await.unwrap().status();
        assert_eq!(status, if body == BODY { StatusCode::OK } else { StatusCode::UNAUTHORIZED });
    }
    assert_eq!(handler.count(), 2);
    server.abort();
}

/// A middleware that is added later is further outside, and this one reads JSON and writes it again.
#[tokio::test]
async fn a_middleware_that_writes_json_again_breaks_the_signature() {
    async fn rewrite(request: Request, next: Next) -> Response {
        let (head, body) = request.into_parts();
        let document: Value = serde_json::from_slice(&to_bytes(body, 1024).await.unwrap()).unwrap();
        next.run(Request::from_parts(head, Body::from(serde_json::to_string_pretty(&document).unwrap()))).await
    }

    let fal = mock().await;
    let handler = || Router::new().route("/webhook", post(async |Json(_): Json<Value>| ()));
    let in_front = Served::new(handler().layer(layer(keys_of(&fal))).layer(from_fn(rewrite))).await;
    let behind = Served::new(handler().layer(from_fn(rewrite)).layer(layer(keys_of(&fal)))).await;
    let id = submit(&fal, &key(1), &in_front.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(401)]);
    let id = submit(&fal, &key(1), &behind.url("/webhook")).await;
    assert_eq!(delivered(&fal, &id).await, [Some(200)]);
}

/// Sends these bytes as they are, and returns what comes back.
async fn raw(server: &Served, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

/// What a client of HTTP would not send.
#[tokio::test]
async fn a_raw_request_is_read_as_strictly() {
    let fal = mock().await;
    let (server, seen) =
        receiver(layer(fixed_keys_of(&fal)).max_body(1024).body_timeout(Duration::from_millis(200)), &[]).await;
    let body = br#"{"request_id":"r","status":"OK"}"#;
    let headers = fal.sign_webhook(MockFal::USER_ID, "r", SystemTime::now(), body);
    let lines: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    let text = std::str::from_utf8(body).unwrap();
    let request = |lines: &str, length: usize, body: &str| {
        format!(
            "POST /webhook HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{lines}\r\n\r\n{body}"
        )
    };
    let all = lines.join("\r\n");
    let capitals = all.replace("x-fal-webhook", "X-FAL-Webhook");
    let mut reversed = lines.clone();
    reversed.reverse();
    let chunked = format!(
        "POST /webhook HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n{all}\r\n\r\n1\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        &text[..1],
        text.len() - 1,
        &text[1..]
    );
    for (sent, status, reason) in [
        (request(&all, body.len(), text), 200, ""),
        (request(&capitals, body.len(), text), 200, ""),
        (request(&reversed.join("\r\n"), body.len(), text), 200, ""),
        (chunked, 200, ""),
        (request(&format!("{all}\r\n{}", lines[0]), body.len(), text), 401, "repeated_header"),
        (request(&lines[1..].join("\r\n"), body.len(), text), 401, "missing_header"),
        // A line break that somebody would like to have in the message.
        (request(&all.replace("request-id: r", "request-id: r x"), body.len(), text), 401, "invalid_header"),
        // One that says that it is shorter, so that the rest is another request.
        (request(&all, body.len() - 1, text), 401, "bad_signature"),
        // One that says that it is longer, and does not send the rest.
        (request(&all, body.len() + 1, text), 503, "body_timeout"),
        (request(&all, 1025, text), 413, "body_too_long"),
        (request(&all, 1 << 60, text), 413, "body_too_long"),
    ] {
        let answer = raw(&server, sent.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{sent}\n{answer}");
        assert!(answer.contains(reason), "{sent}\n{answer}");
    }
    assert_eq!(seen.lock().unwrap().len(), 4);
}

/// A connection that breaks in the middle of a body is nothing that was handled.
#[tokio::test]
async fn a_connection_that_breaks_leaves_the_id_free() {
    let fal = mock().await;
    let (server, seen) = receiver(layer(fixed_keys_of(&fal)), &[]).await;
    let body = br#"{"request_id":"r","status":"OK"}"#;
    let headers = fal.sign_webhook(MockFal::USER_ID, "r", SystemTime::now(), body);
    let lines: String =
        headers.iter().map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap())).collect();
    let head = format!(
        "POST /webhook HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n{lines}\r\n",
        body.len()
    );
    let mut broken = TcpStream::connect(server.address).await.unwrap();
    broken.write_all(&[head.as_bytes(), &body[..10]].concat()).await.unwrap();
    drop(broken);
    let answer = raw(&server, &[head.as_bytes(), body].concat()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(!seen.lock().unwrap()[0].0.is_repeat());
}

/// The body of a response of the handler's comes through as it is.
#[tokio::test]
async fn a_streamed_response_comes_through() {
    let fal = mock().await;
    let pieces = || futures_util::stream::iter([Ok::<_, Infallible>("a"), Ok("b")]);
    let router = Router::new().route("/webhook", post(async move || Body::from_stream(pieces())));
    let server = Served::new(router.layer(layer(fixed_keys_of(&fal)))).await;
    let mut request = http::Request::post(server.url("/webhook")).body(Full::from(BODY)).unwrap();
    request.headers_mut().extend(fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), BODY));
    let response = client().request(request).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ab");
}
