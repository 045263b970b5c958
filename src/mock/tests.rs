use std::{
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream},
    net::TcpStream,
};

use super::*;

const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

fn client<B: Body + Send + 'static + Unpin>(version: Version) -> Client<HttpConnector, B>
where
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).http2_only(version == Version::HTTP_2).build_http()
}

fn key(text: &str) -> Credential {
    Credential::key(text).unwrap()
}

fn authorized(method: Method, url: Uri, authorization: &str) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::from(r#"{"prompt":"a cat"}"#));
    *request.method_mut() = method;
    *request.uri_mut() = url;
    if !authorization.is_empty() {
        request.headers_mut().insert(header::AUTHORIZATION, authorization.parse().unwrap());
    }
    request
}

async fn json(response: Response<Incoming>) -> (u16, Value) {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

async fn send(method: Method, url: Uri, authorization: &str) -> (u16, Value) {
    json(client(Version::HTTP_11).request(authorized(method, url, authorization)).await.unwrap()).await
}

async fn post(url: Uri, authorization: &str) -> (u16, Value) {
    send(Method::POST, url, authorization).await
}

async fn get(url: Uri, authorization: &str) -> (u16, Value) {
    send(Method::GET, url, authorization).await
}

fn detail(status: u16, detail: &str) -> (u16, Value) {
    (status, json!({ "detail": detail }))
}

async fn accepting(text: &str) -> (MockFal, Credential) {
    let (fal, credential) = (MockFal::start().await.unwrap(), key(text));
    fal.accept(&credential);
    (fal, credential)
}

async fn until(reached: impl Fn() -> bool) {
    let wait = async {
        while !reached() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
}

/// A client for HTTP/1.1 that sends exactly what it is given.
struct Raw(BufStream<TcpStream>);

impl Raw {
    async fn connect(address: SocketAddr) -> Self {
        Self(BufStream::new(TcpStream::connect(address).await.unwrap()))
    }

    async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
        self.0.flush().await.unwrap();
    }

    /// The head, in lower case, and as much body as its `content-length` says.
    async fn read_answer(&mut self) -> (String, String) {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.0.read_line(&mut head).await.unwrap(), 0, "closed after {head:?}");
        }
        let head = head.to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        self.0.read_exact(&mut body).await.unwrap();
        (head, String::from_utf8(body).unwrap())
    }

    /// Whether the other side closed the connection, with or without having read everything.
    async fn is_closed(&mut self) -> bool {
        !matches!(self.0.read(&mut [0]).await, Ok(1..))
    }
}

/// An upload that never ends.
struct Endless {
    begun: bool,
}

impl Body for Endless {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if std::mem::replace(&mut self.begun, true) {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"the beginning")))))
    }
}

#[tokio::test]
async fn no_credential_is_valid_at_first() {
    let fal = MockFal::start().await.unwrap();
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 401);
    assert_eq!(post(fal.queue_url("a/b"), "Key id:secret").await.0, 401);
}

#[tokio::test]
async fn a_run_answers_with_its_input() {
    let (fal, credential) = accepting("id:secret").await;
    for version in VERSIONS {
        let mut request = authorized(Method::POST, fal.run_url("/fal-ai/flux/dev?sync=1"), "");
        request.headers_mut().insert(header::AUTHORIZATION, credential.header().clone());
        let response = client(version).request(request).await.unwrap();
        assert_eq!(response.version(), version);
        assert!(response.headers().contains_key("x-fal-request-id"));
        let output = json!({"images": [], "seed": 0, "path": "/fal-ai/flux/dev", "bytes": 18, "prompt": "a cat"});
        assert_eq!(json(response).await, (200, output));
    }
}

#[tokio::test]
async fn a_body_that_is_too_long_to_be_parsed_is_counted() {
    let (fal, _credential) = accepting("id:secret").await;
    let mut request = authorized(Method::PUT, fal.run_url("a/b"), "Key id:secret");
    *request.body_mut() = Full::from(format!(r#"{{"prompt":"{}"}}"#, "x".repeat(9 * 1024 * 1024)));
    let (status, output) = json(client(Version::HTTP_2).request(request).await.unwrap()).await;
    assert_eq!((status, &output["bytes"]), (200, &json!(9 * 1024 * 1024 + 13)));
    assert_eq!(output.get("prompt"), None);
}

#[tokio::test]
async fn an_invalid_credential_is_refused_with_fals_reason() {
    let (fal, _credential) = accepting("id:secret").await;
    let (run, queue) = (fal.run_url("a/b/c"), fal.queue_url("a/b/c"));
    let no_key = "Cannot access application \"a/b\". Authentication is required to access this application.";
    let no_colon = "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.";
    for (authorization, text) in [
        ("", no_key),
        ("Key id:other", "invalid key credentials"),
        ("Key id", no_colon),
        ("Key", no_colon),
        ("Bearer id:secret", "bearer: unable to decode issuer"),
        ("Bearer a.b.c", "bearer: unable to decode issuer"),
        ("Bearer e30.e30.c2ln", "bearer: invalid token"),
    ] {
        assert_eq!(post(run.clone(), authorization).await, detail(401, text), "{authorization}");
        assert_eq!(post(queue.clone(), authorization).await, detail(401, text), "{authorization}");
    }
    let status = fal.queue_url("a/b/requests/1/status");
    assert_eq!(get(status, "Key id:other").await, detail(401, "invalid key credentials"));
}

#[tokio::test]
async fn two_authorization_headers_are_never_valid() {
    let (fal, _credential) = accepting("id:secret").await;
    let mut request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
    request.headers_mut().append(header::AUTHORIZATION, "Key id:secret".parse().unwrap());
    assert_eq!(client(Version::HTTP_11).request(request).await.unwrap().status(), 401);
}

#[tokio::test]
async fn several_credentials_are_valid_until_each_is_revoked() {
    let (fal, old) = accepting("old:secret").await;
    let login = Credential::bearer("e30.e30.c2ln").unwrap();
    fal.accept(&login);
    fal.accept(&login);
    for authorization in ["Key old:secret", "Bearer e30.e30.c2ln"] {
        assert_eq!(post(fal.run_url("a/b"), authorization).await.0, 200);
    }
    fal.revoke(&login);
    fal.revoke(&login);
    assert_eq!(post(fal.run_url("a/b"), "Bearer e30.e30.c2ln").await.0, 401);
    assert_eq!(post(fal.run_url("a/b"), "Key old:secret").await.0, 200);
    fal.revoke(&old);
    assert_eq!(post(fal.run_url("a/b"), "Key old:secret").await.0, 401);
}

#[tokio::test]
async fn a_locked_account_can_only_follow_its_jobs() {
    let (fal, _credential) = accepting("id:secret").await;
    let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
    let url = |name: &str| job[name].as_str().unwrap().parse::<Uri>().unwrap();
    for (lock, text) in [
        (
            Lock::ExhaustedBalance,
            "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing.",
        ),
        (Lock::Admin, "User is locked. Reason: Admin lock. Please contact support@fal.ai."),
        (Lock::TopUp, "User is locked. Reason: TOP_UP."),
    ] {
        fal.lock(lock);
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(403, text));
        assert_eq!(post(fal.queue_url("a/b"), "Key id:secret").await, detail(403, text));
        assert_eq!(post(fal.queue_url("a/b"), "Key id:other").await.0, 401);
        assert_eq!(get(url("status_url"), "Key id:secret").await.0, 200);
        assert_eq!(get(url("response_url"), "Key id:secret").await.0, 200);
    }
    fal.unlock();
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
}

#[tokio::test]
async fn a_denied_credential_lacks_a_permission_until_accepted() {
    let (fal, credential) = accepting("id:secret").await;
    fal.deny(&credential);
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(403, "Insufficient permissions"));
    assert_eq!(fal.received()[0].presented, Presented::Accepted(credential.key_id().cloned()));
    fal.accept(&credential);
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
}

#[tokio::test]
async fn the_urls_of_a_job_lead_to_its_result() {
    let (fal, _credential) = accepting("id:secret").await;
    let (status, job) = post(fal.queue_url("fal-ai/flux/dev"), "Key id:secret").await;
    let url = format!("{}/fal-ai/flux/requests/{}", fal.queue_origin(), job["request_id"].as_str().unwrap());
    let expected = json!({
        "status": "IN_QUEUE",
        "queue_position": 0,
        "request_id": job["request_id"],
        "response_url": url,
        "status_url": format!("{url}/status"),
        "cancel_url": format!("{url}/cancel"),
    });
    assert_eq!((status, &job), (200, &expected));

    for expected in ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "COMPLETED"] {
        let (status, poll) = get(format!("{url}/status").parse().unwrap(), "Key id:secret").await;
        assert_eq!((status, poll["status"].as_str().unwrap()), (200, expected));
    }
    let (status, output) = get(url.parse().unwrap(), "Key id:secret").await;
    assert_eq!((status, &output["prompt"]), (200, &json!("a cat")));
    assert_eq!(get(url.parse().unwrap(), "").await.0, 401);
}

#[tokio::test]
async fn an_unknown_job_is_not_found_with_a_key_and_without() {
    let (fal, _credential) = accepting("id:secret").await;
    let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
    let id = job["request_id"].as_str().unwrap();
    for path in ["a/b/requests/no-id", "a/b/requests/no-id/status", &format!("a/other/requests/{id}")] {
        for authorization in ["Key id:secret", ""] {
            let answer = get(fal.queue_url(path), authorization).await;
            assert_eq!(answer, (404, json!({"status": "NOT_FOUND"})), "{path}");
        }
    }
}

#[tokio::test]
async fn a_path_that_fal_does_not_know_is_not_found() {
    let (fal, _credential) = accepting("id:secret").await;
    for url in [fal.run_url("/"), fal.run_url("a"), fal.run_url("a/"), fal.queue_url("a")] {
        let text = format!("Path {} not found", url.path());
        assert_eq!(post(url, "Key id:secret").await, detail(404, &text));
    }
    assert_eq!(get(fal.queue_url("a/b"), "Key id:secret").await.0, 404);
}

#[tokio::test]
async fn a_host_that_begins_with_queue_is_the_queue() {
    let (fal, _credential) = accepting("id:secret").await;
    let mut request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
    request.headers_mut().insert(header::HOST, "Queue.fal.run".parse().unwrap());
    let (_, job) = json(client(Version::HTTP_11).request(request).await.unwrap()).await;
    assert_eq!(job["status"], "IN_QUEUE");
    assert_eq!(fal.received()[0].host, "Queue.fal.run");
}

#[tokio::test]
async fn the_rest_and_the_platform_host_have_their_own_refusals() {
    let (fal, credential) = accepting("id:secret").await;
    let ask = async |host: &str, authorization: &str| {
        let mut request = authorized(Method::GET, fal.run_url("v1/models"), authorization);
        request.headers_mut().insert(header::HOST, host.parse().unwrap());
        json(client(Version::HTTP_11).request(request).await.unwrap()).await
    };
    let platform =
        |status, message| (status, json!({ "error": { "type": "authorization_error", "message": message } }));
    assert_eq!(ask("rest.fal.ai", "").await, detail(401, "Authorization header is required"));
    assert_eq!(ask("rest.fal.ai", "Key a:b").await, detail(401, "No user found for Key ID and Secret"));
    assert_eq!(ask("api.fal.ai", "").await, platform(401, "Authentication required"));
    assert_eq!(ask("api.fal.ai", "Key id:secret").await.0, 200);
    fal.deny(&credential);
    assert_eq!(ask("api.fal.ai", "Key id:secret").await, platform(403, "Access denied"));
}

#[tokio::test]
async fn the_log_holds_no_secret_and_no_query() {
    let (fal, credential) = accepting("id:hush").await;
    for (version, authorization) in VERSIONS.into_iter().zip(["Key id:hush", "Key other:hush-hush"]) {
        let url = fal.run_url("a/b?fal_jwt_token=hush");
        client(version).request(authorized(Method::POST, url, authorization)).await.unwrap();
    }
    for authorization in ["", "Key hush", "Bearer hush", "Basic hush:hush"] {
        post(fal.queue_url("a/b"), authorization).await;
    }

    let log = fal.received();
    assert_eq!((log.len(), fal.requests()), (6, 6));
    assert_eq!((&log[0].method, log[0].path.as_str()), (&Method::POST, "/a/b"));
    assert_eq!(log[0].host, fal.run_origin().strip_prefix("http://").unwrap());
    assert_eq!((log[0].version, log[1].version), (Version::HTTP_11, Version::HTTP_2));
    assert_eq!((log[0].status, log[1].status), (Some(StatusCode::OK), Some(StatusCode::UNAUTHORIZED)));
    assert_eq!(log[0].presented, Presented::Accepted(credential.key_id().cloned()));
    assert_eq!(log[1].presented, Presented::Refused(key("other:x").key_id().cloned()));
    assert_eq!(log[1].presented.key_id().unwrap().as_str(), "other");
    assert_eq!(log[2].presented, Presented::Nothing);
    for received in &log[3..] {
        assert_eq!(received.presented, Presented::Refused(None));
    }
    let shown = format!("{log:?} {fal:?}");
    assert!(!shown.contains("hush"), "{shown}");

    fal.clear_received();
    assert_eq!((fal.received().len(), fal.requests()), (0, 6));
}

#[tokio::test]
async fn the_log_has_no_password_of_a_url() {
    let fal = MockFal::start().await.unwrap();
    let mut raw = Raw::connect(fal.shared.run).await;
    raw.write("GET http://me:hush@fal.run/a/b HTTP/1.1\r\nhost: fal.run\r\n\r\n").await;
    raw.read_answer().await;
    assert_eq!(fal.received()[0].host, "fal.run");
}

#[tokio::test]
async fn content_is_kept_only_when_the_test_asks_for_it() {
    let (fal, _credential) = accepting("id:secret").await;
    for (keep, version) in [(false, Version::HTTP_11), (true, Version::HTTP_11), (true, Version::HTTP_2)] {
        fal.clear_received();
        fal.keep_content(keep);
        for authorization in ["Key id:secret", "Key id:other-hush"] {
            let mut request = authorized(Method::POST, fal.run_url("a/b?token=hush"), authorization);
            request.headers_mut().insert("x-fal-queue-priority", "hush-low".parse().unwrap());
            *request.body_mut() = Full::from(r#"{"prompt":"hush"}"#);
            client(version).request(request).await.unwrap();
        }
        // The body of a refused request is read while the answer is sent.
        until(|| fal.received().iter().all(|received| received.body_length.is_some())).await;
        for received in fal.received() {
            assert_eq!(received.query.as_deref(), keep.then_some("token=hush"));
            assert_eq!(received.body.as_deref(), keep.then_some(br#"{"prompt":"hush"}"#.as_slice()));
            assert_eq!(received.headers.get("x-fal-queue-priority").is_some(), keep);
            assert_eq!(received.headers.get(header::AUTHORIZATION), None);
            assert_eq!(received.body_length, Some(17));
            let shown = format!("{received:?}");
            assert!(!shown.contains("hush") && shown.contains("x-fal-queue-priority") == keep, "{shown}");
        }
    }
}

#[tokio::test]
async fn of_a_long_body_the_beginning_is_kept() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.keep_content(true);
    let mut request = authorized(Method::PUT, fal.run_url("a/b"), "Key id:secret");
    *request.body_mut() = Full::from([vec![b'x'; 1024 * 1024], vec![b'y'; 1024 * 1024]].concat());
    let (status, output) = json(client(Version::HTTP_2).request(request).await.unwrap()).await;
    assert_eq!((status, &output["bytes"]), (200, &json!(2 * 1024 * 1024)));
    let received = fal.received().pop().unwrap();
    assert_eq!(received.body_length, Some(2 * 1024 * 1024));
    assert_eq!(received.body.unwrap(), vec![b'x'; 1024 * 1024]);
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_not_in_the_log() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.keep_content(true);
    let mut raw = Raw::connect(fal.shared.run).await;
    raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\nauthorization: Key id:secret\r\ncontent-length: 9\r\n\r\nhalf")
        .await;
    until(|| fal.requests() == 1).await;
    drop(raw);
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    let [cut, whole] = fal.received().try_into().unwrap();
    assert_eq!((cut.body_length, cut.body), (None, None));
    assert_eq!(whole.body_length, Some(18));
    assert_eq!(fal.runs(), 1);
}

#[tokio::test]
async fn the_head_of_every_answer_waits_for_the_latency() {
    let (fal, _credential) = accepting("id:secret").await;
    let latency = Duration::from_millis(30);
    fal.set_latency(latency);
    for (authorization, status) in [("Key id:secret", 200), ("", 401)] {
        let begun = Instant::now();
        assert_eq!(post(fal.run_url("a/b"), authorization).await.0, status);
        assert!(begun.elapsed() >= latency);
    }
}

#[tokio::test]
async fn the_next_n_requests_fail_and_no_others() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.fail_next(2, Failure::Status(StatusCode::BAD_GATEWAY));
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await, detail(502, "Bad Gateway"));
    assert_eq!(post(fal.queue_url("a/b"), "").await, detail(502, "Bad Gateway"));
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);

    fal.fail_next(2, Failure::Status(StatusCode::BAD_GATEWAY));
    fal.fail_next(0, Failure::Disconnect);
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
}

#[tokio::test]
async fn a_failure_on_a_path_meets_it_and_all_below_it() {
    let (fal, _credential) = accepting("id:secret").await;
    let run = async |path: &str| post(fal.run_url(path), "Key id:secret").await.0;
    fal.fail_next_on("/a/b", 2, Failure::Status(StatusCode::BAD_GATEWAY));
    fal.fail_next_on("a/b/c", 1, Failure::Status(StatusCode::GATEWAY_TIMEOUT));
    assert_eq!((run("a/other").await, run("a/bb").await, run("a/b/c").await), (200, 200, 504));
    assert_eq!((run("a/b/c").await, post(fal.queue_url("a/b"), "").await.0, run("a/b").await), (502, 502, 200));

    // The longest path comes first, and `fail_next` last.
    fal.fail_next(1, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    fal.fail_next_on("a/b", 1, Failure::Status(StatusCode::BAD_GATEWAY));
    assert_eq!((run("a/b").await, run("a/b").await, run("a/b").await), (502, 503, 200));

    // A failure of fal's comes before one of the application, whatever their paths.
    fal.fail_next(1, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
    fal.fail_next_on("a/b", 1, Failure::Application(StatusCode::IM_A_TEAPOT));
    assert_eq!((run("a/b").await, run("a/b").await, run("a/b").await), (503, 418, 200));

    fal.fail_next_on("a/b", usize::MAX, Failure::Status(StatusCode::BAD_GATEWAY));
    assert_eq!((run("a/b").await, run("a/b").await), (502, 502));
    fal.fail_next_on("a/b", 0, Failure::Disconnect);
    assert_eq!(run("a/b").await, 200);
}

#[tokio::test]
async fn a_failure_meets_one_job_by_its_path() {
    let (fal, _credential) = accepting("id:secret").await;
    let (_, first) = post(fal.queue_url("a/b"), "Key id:secret").await;
    let (_, second) = post(fal.queue_url("a/b"), "Key id:secret").await;
    fal.fail_next_on(url_in(&second, "status_url").path(), 1, Failure::Status(StatusCode::BAD_GATEWAY));
    let poll = async |job: &Value| get(url_in(job, "status_url"), "Key id:secret").await.0;
    assert_eq!((poll(&first).await, poll(&second).await, poll(&second).await), (200, 502, 200));
}

#[tokio::test]
async fn a_failure_can_say_any_detail_before_anything_runs() {
    let (fal, _credential) = accepting("id:secret").await;
    let text = "Cannot access application \"a/private\".";
    fal.fail_next_on("a/private", usize::MAX, Failure::Detail(StatusCode::UNAUTHORIZED, text));
    for url in [fal.run_url("a/private"), fal.queue_url("a/private"), fal.run_url("a/private/stream")] {
        let request = authorized(Method::POST, url, "Key id:secret");
        let response = client(Version::HTTP_11).request(request).await.unwrap();
        assert!(runner_headers(&response).is_empty());
        assert_eq!(json(response).await, detail(401, text));
    }
    assert_eq!(fal.runs(), 0);
}

#[tokio::test]
async fn a_disconnect_closes_the_connection_without_an_answer() {
    let (fal, _credential) = accepting("id:secret").await;
    for version in VERSIONS {
        fal.fail_next(1, Failure::Disconnect);
        let request = || authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
        client(version).request(request()).await.unwrap_err();
        assert_eq!(fal.received().pop().unwrap().status, None);
        assert_eq!(client(version).request(request()).await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_refusal_does_not_wait_for_the_upload() {
    let (fal, _credential) = accepting("id:secret").await;
    for version in VERSIONS {
        let request = Request::post(fal.run_url("a/b")).body(Endless { begun: false }).unwrap();
        assert_eq!(client(version).request(request).await.unwrap().status(), 401);
    }
}

#[tokio::test]
async fn a_connection_can_be_used_again_after_a_refused_upload() {
    let (fal, _credential) = accepting("id:secret").await;
    let mut raw = Raw::connect(fal.shared.run).await;
    let half = vec![b'x'; 512 * 1024];
    raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
    raw.write(&half).await;
    let (head, body) = raw.read_answer().await;
    assert!(head.starts_with("http/1.1 401"), "{head}");
    assert!(body.contains("Cannot access application"), "{body}");

    raw.write(&half).await;
    let next = "POST /a/b HTTP/1.1\r\nhost: fal.run\r\nauthorization: Key id:secret\r\ncontent-length: 0\r\n\r\n";
    raw.write(next).await;
    let (head, body) = raw.read_answer().await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert!(body.contains(r#""bytes":0"#), "{body}");
}

#[tokio::test]
async fn a_refused_upload_without_end_is_cut_off() {
    let fal = MockFal::start().await.unwrap();
    let mut raw = Raw::connect(fal.shared.run).await;
    raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1000000000\r\n\r\n").await;
    assert!(raw.read_answer().await.0.starts_with("http/1.1 401"));
    let chunk = vec![b'x'; 1024 * 1024];
    let mut written = 0;
    while raw.0.write_all(&chunk).await.is_ok() && raw.0.flush().await.is_ok() {
        written += chunk.len();
        assert!(written < 100 * 1024 * 1024, "nothing stops it");
    }
    assert!(written >= 15 * 1024 * 1024, "{written}");
}

#[tokio::test]
async fn with_close_on_refusal_the_upload_is_not_read() {
    let fal = MockFal::start().await.unwrap();
    fal.close_on_refusal(true);
    let mut raw = Raw::connect(fal.shared.run).await;
    raw.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
    let (head, _) = raw.read_answer().await;
    assert!(head.starts_with("http/1.1 401") && head.contains("\r\nconnection: close\r\n"), "{head}");
    assert!(raw.is_closed().await);
    assert_eq!(
        client(Version::HTTP_2).request(authorized(Method::POST, fal.run_url("a/b"), "")).await.unwrap().status(),
        401
    );
}

#[tokio::test]
async fn dropping_the_last_handle_ends_everything() {
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(alive(), 0);
    let fal = MockFal::start().await.unwrap();
    let clone = fal.clone();
    let (run, queue) = (fal.shared.run, fal.shared.queue);
    drop(fal);

    // An idle connection, one whose upload is still being read, and on each version an answer that waits.
    let mut idle = Raw::connect(queue).await;
    let mut uploading = Raw::connect(run).await;
    uploading.write("POST /a/b HTTP/1.1\r\nhost: fal.run\r\ncontent-length: 1048576\r\n\r\n").await;
    uploading.read_answer().await;
    clone.set_latency(Duration::from_secs(3600));
    let waiting = VERSIONS.map(|version| {
        let request = authorized(Method::POST, clone.run_url("a/b"), "");
        tokio::spawn(async move { client(version).request(request).await.unwrap_err() })
    });
    until(|| clone.requests() == 3).await;

    drop(clone);
    assert!(idle.is_closed().await);
    assert!(uploading.is_closed().await);
    for waiting in waiting {
        waiting.await.unwrap();
    }
    until(|| alive() == 0).await;
    for address in [run, queue] {
        assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn a_path_gets_exactly_one_slash_in_front() {
    let fal = MockFal::start().await.unwrap();
    for path in ["a/b?c=d", "/a/b?c=d", "//a/b?c=d"] {
        assert_eq!(fal.run_url(path).to_string(), format!("{}/a/b?c=d", fal.run_origin()));
        assert_eq!(fal.queue_url(path).to_string(), format!("{}/a/b?c=d", fal.queue_origin()));
    }
    assert_eq!(fal.run_url("").path(), "/");
}

#[tokio::test]
#[should_panic(expected = "`a b` is no path of a URL")]
async fn a_path_that_cannot_be_in_a_url_panics_with_its_name() {
    let _ = MockFal::start().await.unwrap().run_url("a b");
}

/// The URL that an answer holds under a name.
fn url_in(answer: &Value, name: &str) -> Uri {
    answer[name].as_str().unwrap().parse().unwrap()
}

/// The events of a stream. An event may be spread over frames in any way.
struct Events {
    body: Incoming,
    text: String,
}

impl Events {
    fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), text: String::new() }
    }

    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
                self.text = rest.to_owned();
                return Some(event);
            }
            let Some(frame) = self.body.frame().await else {
                assert_eq!(self.text, "");
                return None;
            };
            // HTTP/2 may end with a frame that is empty.
            if let Ok(data) = frame.unwrap().into_data() {
                self.text.push_str(std::str::from_utf8(&data).unwrap());
            }
        }
    }
}

#[tokio::test]
async fn a_job_is_cancelled_once_and_its_result_says_so() {
    let (fal, _credential) = accepting("id:secret").await;
    let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
    let put = async |authorization: &str| send(Method::PUT, url_in(&job, "cancel_url"), authorization).await;
    assert_eq!(put("").await.0, 401);
    assert_eq!(put("Key id:other").await, detail(401, "invalid key credentials"));
    fal.lock(Lock::Admin);
    assert_eq!(put("Key id:secret").await, (202, json!({"status": "CANCELLATION_REQUESTED"})));
    fal.unlock();
    assert_eq!(put("Key id:secret").await, (400, json!({"status": "ALREADY_COMPLETED"})));
    assert_eq!(get(url_in(&job, "status_url"), "Key id:secret").await.1["status"], "COMPLETED");
    let cancelled = json!({"detail": "client cancelled", "error_type": "client_cancelled"});
    assert_eq!(get(url_in(&job, "response_url"), "Key id:secret").await, (499, cancelled));
}

#[tokio::test]
async fn only_a_job_that_nobody_saw_completed_can_be_cancelled() {
    let (fal, _credential) = accepting("id:secret").await;
    let cancel = async |url: Uri| send(Method::PUT, url, "Key id:secret").await;

    let (_, in_progress) = post(fal.queue_url("a/b"), "Key id:secret").await;
    for status in ["IN_QUEUE", "IN_PROGRESS"] {
        assert_eq!(get(url_in(&in_progress, "status_url"), "Key id:secret").await.1["status"], status);
    }
    assert_eq!(cancel(url_in(&in_progress, "cancel_url")).await.0, 202);

    let (_, completed) = post(fal.queue_url("a/b"), "Key id:secret").await;
    for _ in 0..3 {
        get(url_in(&completed, "status_url"), "Key id:secret").await;
    }
    let (_, fetched) = post(fal.queue_url("a/b"), "Key id:secret").await;
    get(url_in(&fetched, "response_url"), "Key id:secret").await;
    for job in [completed, fetched] {
        assert_eq!(cancel(url_in(&job, "cancel_url")).await, (400, json!({"status": "ALREADY_COMPLETED"})));
        assert_eq!(get(url_in(&job, "response_url"), "Key id:secret").await.0, 200);
    }
    for authorization in ["Key id:secret", ""] {
        let answer = send(Method::PUT, fal.queue_url("a/b/requests/no-id/cancel"), authorization).await;
        assert_eq!(answer, (404, json!({"status": "NOT_FOUND"})));
    }
}

#[tokio::test]
async fn a_job_is_completed_at_the_poll_that_the_test_sets() {
    let (fal, _credential) = accepting("id:secret").await;
    let (queued, running, done) = ("IN_QUEUE", "IN_PROGRESS", "COMPLETED");
    for (polls, expected) in [
        (0, vec![done]),
        (1, vec![done, done]),
        (2, vec![queued, done, done]),
        (5, vec![queued, running, running, running, done, done]),
    ] {
        fal.polls_until_completed(polls);
        let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
        fal.polls_until_completed(100);
        for (at, expected) in expected.into_iter().enumerate() {
            let (_, status) = get(url_in(&job, "status_url"), "Key id:secret").await;
            assert_eq!(status["status"], expected, "poll {at} of {polls}");
        }
    }
}

#[tokio::test]
async fn a_job_can_end_in_an_error() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.fail_next(1, Failure::Job(ErrorType::RunnerDisconnected));
    // A run is not a job, and a refused submit does not become one.
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    assert_eq!(post(fal.queue_url("a/b"), "Key id:other").await.0, 401);
    let (_, failing) = post(fal.queue_url("a/b"), "Key id:secret").await;
    let (_, working) = post(fal.queue_url("a/b"), "Key id:secret").await;
    assert_eq!((&failing["status"], fal.runs()), (&json!("IN_QUEUE"), 2));

    for (job, error, error_type) in
        [(&failing, json!("runner disconnected"), json!("runner_disconnected")), (&working, Value::Null, Value::Null)]
    {
        for expected in ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"] {
            let (code, status) = get(url_in(job, "status_url"), "Key id:secret").await;
            assert_eq!((code, &status["status"]), (200, &json!(expected)));
            let ended = expected == "COMPLETED";
            assert_eq!(status["error"], if ended { error.clone() } else { Value::Null });
            assert_eq!(status["error_type"], if ended { error_type.clone() } else { Value::Null });
        }
    }
    let expected = json!({"detail": "runner disconnected", "error_type": "runner_disconnected"});
    assert_eq!(get(url_in(&failing, "response_url"), "Key id:secret").await, (503, expected));
    assert_eq!(get(url_in(&working, "response_url"), "Key id:secret").await.0, 200);
}

#[tokio::test]
async fn a_stream_sends_its_events_and_ends() {
    let (fal, _credential) = accepting("id:secret").await;
    for version in VERSIONS {
        let request = authorized(Method::POST, fal.run_url("fal-ai/flux/dev/stream"), "Key id:secret");
        let response = client(version).request(request).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        let mut events = Events::of(response);
        for event in 0..3 {
            let expected = json!({
                "images": [], "seed": 0, "path": "/fal-ai/flux/dev/stream", "bytes": 18, "prompt": "a cat", "event": event,
            });
            assert_eq!(events.next().await, Some(expected));
        }
        assert_eq!(events.next().await, None);
    }
    assert_eq!(post(fal.run_url("a/b/stream"), "Key id:other").await.0, 401);
    assert_eq!(fal.runs(), 2);
}

#[tokio::test]
async fn a_stream_waits_until_the_test_allows_its_next_event() {
    let (fal, credential) = accepting("id:secret").await;
    fal.hold_events_after(0);
    let request = authorized(Method::POST, fal.run_url("a/b/stream"), "Key id:secret");
    let mut events = Events::of(client(Version::HTTP_11).request(request).await.unwrap());
    // A stream that has begun goes on.
    fal.revoke(&credential);
    for event in 0..3 {
        let early = tokio::time::timeout(Duration::from_millis(20), events.next()).await;
        assert!(early.is_err(), "event {event} came too early");
        fal.hold_events_after(event + 1);
        assert_eq!(events.next().await.unwrap()["event"], event);
    }
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn an_upload_goes_to_another_origin_without_the_key() {
    let (fal, credential) = accepting("id:secret").await;
    let initiate = fal.rest_url("/storage/upload/initiate?storage_type=fal-cdn-v3");
    assert_eq!(post(initiate.clone(), "").await, detail(401, "Authorization header is required"));
    let (status, urls) = post(initiate, "Key id:secret").await;
    assert_eq!(status, 200);
    let (upload, file) = (url_in(&urls, "upload_url"), url_in(&urls, "file_url"));
    assert_eq!(upload.authority(), file.authority());
    for origin in [fal.run_origin(), fal.queue_origin(), fal.rest_origin()] {
        assert_ne!(format!("http://{}", upload.authority().unwrap()), origin);
    }

    fal.clear_received();
    for authorization in ["", "Key id:secret"] {
        let (status, output) = send(Method::PUT, upload.clone(), authorization).await;
        assert_eq!((status, &output["bytes"]), (200, &json!(18)));
    }
    let log = fal.received();
    assert_eq!((&log[0].method, log[0].path.as_str()), (&Method::PUT, upload.path()));
    assert_eq!(log[0].presented, Presented::Nothing);
    assert_eq!(log[1].presented, Presented::Accepted(credential.key_id().cloned()));
    assert_eq!(get(file, "").await.0, 404);
    assert_eq!(fal.runs(), 0);
}

#[tokio::test]
async fn a_failure_has_the_headers_and_the_body_of_its_kind() {
    let (fal, _credential) = accepting("id:secret").await;
    let unprocessable = StatusCode::UNPROCESSABLE_ENTITY;
    let model = |retryable| Failure::Model { status: unprocessable, error: "image_load_error", retryable };
    let list = json!({"detail": [{"loc": ["body"], "msg": "image load error", "type": "image_load_error"}]});
    let typed = |words: &str, name: &str| json!({"detail": words, "error_type": name});
    let told = |text: &str| json!({"detail": text});
    let later = |millis| Failure::RetryAfter(StatusCode::SERVICE_UNAVAILABLE, Duration::from_millis(millis));
    let of_the_application = [
        ("x-fal-served-from", "00000000-0000-4000-9000-000000000001"),
        ("x-fal-billable-units", "1"),
        ("x-fal-cdn-token", "cdn-token-of-the-mock"),
    ];
    let with = |more: (&'static str, &'static str)| of_the_application.into_iter().chain([more]).collect();
    let rows = [
        (later(1_001), 503, told("Service Unavailable"), vec![("retry-after", "2")]),
        (later(0), 503, told("Service Unavailable"), vec![("retry-after", "0")]),
        (
            Failure::Platform(ErrorType::StartupTimeout),
            504,
            typed("startup timeout", "startup_timeout"),
            vec![("x-fal-error-type", "startup_timeout")],
        ),
        (
            Failure::Platform(ErrorType::RunnerDisconnected),
            503,
            typed("runner disconnected", "runner_disconnected"),
            vec![("x-fal-error-type", "runner_disconnected")],
        ),
        (
            Failure::Platform(ErrorType::ConcurrentRequestsLimit),
            429,
            typed("concurrent requests limit", "concurrent_requests_limit"),
            vec![("x-fal-error-type", "concurrent_requests_limit"), ("x-fal-needs-retry", "1")],
        ),
        (
            Failure::CallersTimeout,
            504,
            typed("request timeout", "request_timeout"),
            vec![("x-fal-error-type", "request_timeout"), ("x-fal-request-timeout-type", "user")],
        ),
        (model(false), 422, list.clone(), with(("x-fal-retryable", "false"))),
        (model(true), 422, list, with(("x-fal-retryable", "true"))),
        (
            Failure::Application(StatusCode::UNAUTHORIZED),
            401,
            told("The application has rules of its own"),
            of_the_application.to_vec(),
        ),
    ];
    for (failure, status, body, headers) in rows {
        fal.fail_next(1, failure);
        let request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
        let response = client(Version::HTTP_11).request(request).await.unwrap();
        let common = ["content-length", "content-type", "date", "x-fal-request-id"];
        let mut found: Vec<_> =
            response.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        found.retain(|(name, _)| !common.contains(name));
        found.sort_unstable();
        let mut headers = headers;
        headers.sort_unstable();
        assert_eq!(found, headers, "{failure:?}");
        assert_eq!(json(response).await, (status, body), "{failure:?}");
        assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 200);
    }
}

/// The names of the headers that only a runner's answer has.
fn runner_headers(response: &Response<Incoming>) -> Vec<&str> {
    let names = response.headers().keys().map(header::HeaderName::as_str);
    names.filter(|name| ["x-fal-served-from", "x-fal-billable-units"].contains(name)).collect()
}

#[tokio::test]
async fn an_application_answers_what_the_test_sets() {
    let (fal, _credential) = accepting("id:secret").await;
    let cat = json!({"images": [{"url": "https://v3.fal.media/files/cat.png"}]});
    fal.answer("/fal-ai/flux/", cat.clone());
    fal.answer("fal-ai/flux/dev", json!([1, 2]));
    assert_eq!(post(fal.run_url("fal-ai/flux"), "Key id:secret").await, (200, cat.clone()));
    assert_eq!(post(fal.run_url("fal-ai/flux/pro"), "Key id:secret").await, (200, cat.clone()));
    assert_eq!(post(fal.run_url("fal-ai/flux/dev"), "Key id:secret").await, (200, json!([1, 2])));
    assert_eq!(post(fal.run_url("fal-ai/fluxx"), "Key id:secret").await.1["path"], "/fal-ai/fluxx");
    assert_eq!(post(fal.run_url("fal-ai/flux"), "Key id:other").await.0, 401);

    let (_, job) = post(fal.queue_url("fal-ai/flux/pro"), "Key id:secret").await;
    fal.clear_answer("fal-ai/flux");
    assert_eq!(get(url_in(&job, "response_url"), "Key id:secret").await, (200, cat));
    assert_eq!(post(fal.run_url("fal-ai/flux"), "Key id:secret").await.1["path"], "/fal-ai/flux");
    assert_eq!(post(fal.run_url("fal-ai/flux/dev"), "Key id:secret").await.1, json!([1, 2]));
    assert_eq!(fal.runs(), 7);
}

#[tokio::test]
async fn an_application_can_forge_a_refusal_of_fals() {
    let (fal, _credential) = accepting("id:secret").await;
    for text in ["No user found for Key ID and Secret", "Cannot access application \"a/b\"."] {
        let forged = Answer::json(json!({ "detail": text })).status(StatusCode::UNAUTHORIZED);
        let forged = forged.header("x-fal-runner-hints", "a-hint");
        for (answer, expected) in [
            (forged.clone(), vec!["x-fal-served-from", "x-fal-billable-units"]),
            (forged.without_runner_headers(), vec![]),
        ] {
            fal.answer("a/b", answer);
            for _ in 0..2 {
                let request = authorized(Method::POST, fal.run_url("a/b"), "Key id:secret");
                let response = client(Version::HTTP_11).request(request).await.unwrap();
                assert_eq!(runner_headers(&response), expected);
                assert_eq!(response.headers()["x-fal-runner-hints"], "a-hint");
                assert_eq!(json(response).await, detail(401, text));
            }
            let (status, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
            assert_eq!(status, 200);
            let request = authorized(Method::GET, url_in(&job, "response_url"), "Key id:secret");
            let response = client(Version::HTTP_11).request(request).await.unwrap();
            assert_eq!(runner_headers(&response), expected);
            assert_eq!(json(response).await, detail(401, text));
            assert_eq!(post(fal.run_url("a/other"), "Key id:secret").await.0, 200);
        }
    }
}

#[tokio::test]
async fn an_answer_may_be_bytes_of_any_type() {
    let (fal, _credential) = accepting("id:secret").await;
    let page = Answer::bytes("text/html", "<title>502</title>").status(StatusCode::BAD_GATEWAY);
    fal.answer("a/b", page.header("content-encoding", "gzip"));
    for path in ["a/b", "a/b/stream"] {
        let request = authorized(Method::POST, fal.run_url(path), "Key id:secret");
        let response = client(Version::HTTP_2).request(request).await.unwrap();
        assert_eq!(response.status(), 502);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/html");
        assert_eq!(response.headers()[header::CONTENT_ENCODING], "gzip");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "<title>502</title>");
    }
}

#[tokio::test]
async fn an_answer_is_streamed_where_a_stream_is_asked_for() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.answer("a/object", json!({"text": "meow"}));
    fal.answer("a/list", json!([1]));
    for (app, expected) in [("a/object", json!({"text": "meow", "event": 0})), ("a/list", json!([1]))] {
        let request = authorized(Method::POST, fal.run_url(&format!("{app}/stream")), "Key id:secret");
        let response = client(Version::HTTP_11).request(request).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        let mut events = Events::of(response);
        assert_eq!(events.next().await, Some(expected));
        let rest = [events.next().await, events.next().await, events.next().await];
        assert_eq!(rest.map(|event| event.is_some()), [true, true, false]);
    }
}

#[test]
#[should_panic(expected = "`not a name` is not the name of a header")]
fn an_answer_panics_at_a_header_that_cannot_be() {
    let _ = Answer::json(Value::Null).header("not a name", "x");
}

#[tokio::test]
async fn only_what_reaches_an_application_counts_as_a_run() {
    let (fal, _credential) = accepting("id:secret").await;
    fal.fail_next(1, Failure::Application(StatusCode::FORBIDDEN));
    let (_, job) = post(fal.queue_url("a/b"), "Key id:other").await;
    assert_eq!(job["detail"], "invalid key credentials");
    assert_eq!(post(fal.rest_url("users/current"), "Key id:secret").await.0, 200);
    assert_eq!(get(fal.queue_url("a/b/requests/no-id"), "Key id:secret").await.0, 404);
    assert_eq!(fal.runs(), 0);
    assert_eq!(post(fal.run_url("a/b"), "Key id:secret").await.0, 403);
    assert_eq!((fal.runs(), post(fal.run_url("a/b"), "Key id:secret").await.0), (1, 200));

    // The queue accepts the request, and the result is what the application answered.
    fal.fail_next(1, Failure::Application(StatusCode::UNAUTHORIZED));
    let (status, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
    assert_eq!((status, fal.runs()), (200, 3));
    for _ in 0..2 {
        assert_eq!(get(url_in(&job, "response_url"), "Key id:secret").await.0, 401);
    }
    // A stream that fails is no stream.
    fal.fail_next(1, Failure::Application(StatusCode::UNAUTHORIZED));
    assert_eq!(post(fal.run_url("a/b/stream"), "Key id:secret").await.0, 401);

    fal.fail_next(1, Failure::Platform(ErrorType::RunnerServerError));
    assert_eq!((post(fal.run_url("a/b"), "Key id:secret").await.0, fal.runs()), (500, 4));
}

#[tokio::test]
async fn dropping_the_last_handle_ends_a_waiting_stream() {
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let (fal, _credential) = accepting("id:secret").await;
    fal.hold_events_after(0);
    let client = client(Version::HTTP_11);
    let request = authorized(Method::POST, fal.run_url("a/b/stream"), "Key id:secret");
    let response = client.request(request).await.unwrap();
    drop((fal, client));
    let _ = response.into_body().collect().await;
    until(|| alive() == 0).await;
}

/// Sends one request on a connection that the test accepted itself.
async fn ask(fal: &MockFal, scheme: Scheme, host: &str, method: &str, path: &str) -> (String, Value) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    tokio::spawn(fal.serve_connection(theirs, scheme));
    let mut ours = BufStream::new(ours);
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Key id:secret\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    ours.write_all(request.as_bytes()).await.unwrap();
    ours.flush().await.unwrap();
    let mut answer = String::new();
    ours.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), serde_json::from_str(body).unwrap())
}

#[tokio::test]
async fn a_served_connection_leads_to_every_host() {
    let (fal, _credential) = accepting("id:secret").await;
    for (scheme, host, prefix, queue, storage) in [
        (
            Scheme::HTTPS,
            "localhost:8443",
            ["/run", "/queue", "/rest"],
            "https://localhost:8443/queue",
            "https://localhost:8443/storage",
        ),
        (Scheme::HTTP, "[::1]:80", ["/run", "/queue", "/rest"], "http://[::1]:80/queue", "http://[::1]:80/storage"),
        (Scheme::HTTP, "mock", ["", "/queue", "/rest"], "http://mock/queue", "http://mock/storage"),
    ] {
        let post = async |path: String| ask(&fal, scheme.clone(), host, "POST", &path).await.1;
        assert_eq!(post(format!("{}/a/b", prefix[0])).await["path"], "/a/b");
        let url = post(format!("{}/a/b", prefix[1])).await["response_url"].clone();
        assert!(url.as_str().unwrap().starts_with(&format!("{queue}/a/b/requests/")), "{url}");
        let url = post(format!("{}/storage/upload/initiate", prefix[2])).await["upload_url"].clone();
        assert!(url.as_str().unwrap().starts_with(&format!("{storage}/upload/")), "{url}");
    }

    for (host, queue, storage) in [
        ("fal.ai", "https://queue.fal.run/a/b/requests/", "https://v3.fal.media/upload/"),
        ("fal.ai:8443", "https://queue.fal.run:8443/a/b/requests/", "https://v3.fal.media:8443/upload/"),
    ] {
        let post = async |host: String, path: &str| ask(&fal, Scheme::HTTPS, &host, "POST", path).await.1;
        assert_eq!(post(host.to_owned(), "/queue/a").await["path"], "/queue/a");
        let url = post(format!("queue.{host}"), "/a/b").await["response_url"].clone();
        assert!(url.as_str().unwrap().starts_with(queue), "{url}");
        let url = post(format!("rest.{host}"), "/storage/upload/initiate").await["upload_url"].clone();
        assert!(url.as_str().unwrap().starts_with(storage), "{url}");
    }
    let (head, answer) = ask(&fal, Scheme::HTTP, "localhost", "POST", "/run/a").await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    assert_eq!(answer, json!({"detail": "Path /a not found"}));
    let last = fal.received().pop().unwrap();
    assert_eq!((last.host.as_str(), last.path.as_str()), ("localhost", "/run/a"));
}

#[tokio::test]
async fn dropping_the_last_handle_ends_a_served_connection() {
    let fal = MockFal::start().await.unwrap();
    let (_ours, theirs) = tokio::io::duplex(1024);
    let served = tokio::spawn(fal.serve_connection(theirs, Scheme::HTTP));
    drop(fal);
    tokio::time::timeout(Duration::from_secs(30), served).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_status_of_a_job_is_a_stream_until_its_end() {
    let (fal, _credential) = accepting("id:secret").await;
    let follow = async |job: &Value, query: &str| {
        let url = format!("{}/stream{query}", url_in(job, "status_url")).parse().unwrap();
        let response = client(Version::HTTP_11).request(authorized(Method::GET, url, "Key id:secret")).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        Events::of(response)
    };
    fal.polls_until_completed(4);
    let (_, job) = post(fal.queue_url("a/b/c"), "Key id:secret").await;
    fal.hold_events_after(1);
    let mut events = follow(&job, "?logs=1").await;
    let first = events.next().await.unwrap();
    assert_eq!((&first["status"], first.get("logs")), (&json!("IN_QUEUE"), None));
    assert_eq!(first["response_url"], job["response_url"]);
    let early = tokio::time::timeout(Duration::from_millis(20), events.next()).await;
    assert!(early.is_err(), "an event came too early");
    fal.hold_events_after(usize::MAX);
    for (status, message) in [("IN_PROGRESS", "step 1"), ("IN_PROGRESS", "step 2"), ("COMPLETED", "step 3")] {
        let event = events.next().await.unwrap();
        assert_eq!((&event["status"], &event["logs"][0]["message"]), (&json!(status), &json!(message)));
        assert_eq!(event["logs"].as_array().map(Vec::len), Some(1));
    }
    assert_eq!(events.next().await, None);

    // Without `logs=1` there is none, and a completed job is one event.
    let mut events = follow(&job, "?logs=0").await;
    assert_eq!(events.next().await.unwrap()["logs"], Value::Null);
    assert_eq!(events.next().await, None);

    // A poll has all lines until now.
    let url = format!("{}?logs=1", url_in(&job, "status_url")).parse().unwrap();
    let messages: Vec<_> = get(url, "Key id:secret").await.1["logs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["message"].clone())
        .collect();
    assert_eq!(messages, ["step 1", "step 2", "step 3", "step 4", "step 5"]);

    let unknown = fal.queue_url("a/b/requests/no-id/status/stream");
    assert_eq!(get(unknown, "Key id:secret").await, (404, json!({"status": "NOT_FOUND"})));
}

#[tokio::test]
async fn a_namespace_belongs_to_the_id_of_an_endpoint() {
    let (fal, _credential) = accepting("id:secret").await;
    for namespace in ["workflows", "comfy"] {
        let (_, job) = post(fal.queue_url(&format!("{namespace}/owner/app/below")), "Key id:secret").await;
        let url = url_in(&job, "response_url");
        assert!(url.path().starts_with(&format!("/{namespace}/owner/app/requests/")), "{url}");
        assert_eq!(get(url, "Key id:secret").await.0, 200);
        let refused = post(fal.run_url(&format!("{namespace}/owner/app")), "").await.1["detail"].to_string();
        assert!(refused.contains(&format!("{namespace}/owner/app")), "{refused}");
        let path = format!("/{namespace}/owner");
        let not_found = detail(404, &format!("Path {path} not found"));
        assert_eq!(post(fal.run_url(&path), "Key id:secret").await, not_found);
    }
}

#[tokio::test]
async fn a_stream_may_be_asked_for_by_get() {
    let (fal, _credential) = accepting("id:secret").await;
    let request = authorized(Method::GET, fal.run_url("a/b/stream?prompt=a+cat"), "Key id:secret");
    let mut events = Events::of(client(Version::HTTP_11).request(request).await.unwrap());
    for event in 0..3 {
        assert_eq!(events.next().await.unwrap()["event"], event);
    }
    assert_eq!((events.next().await, fal.runs()), (None, 1));
}

#[tokio::test]
async fn an_answer_of_a_runner_holds_a_token_for_the_storage() {
    let (fal, _credential) = accepting("id:secret").await;
    let token = async |method, url, authorization| {
        let response = client(Version::HTTP_11).request(authorized(method, url, authorization)).await.unwrap();
        response.headers().contains_key("x-fal-cdn-token")
    };
    let (_, job) = post(fal.queue_url("a/b"), "Key id:secret").await;
    assert!(token(Method::POST, fal.run_url("a/b"), "Key id:secret").await);
    assert!(token(Method::GET, url_in(&job, "response_url"), "Key id:secret").await);
    assert!(!token(Method::GET, url_in(&job, "status_url"), "Key id:secret").await);
    assert!(!token(Method::POST, fal.run_url("a/b"), "Key id:other").await);
    fal.answer("a/b", Answer::json(json!({})).without_runner_headers());
    assert!(!token(Method::POST, fal.run_url("a/b"), "Key id:secret").await);
}

/// Sends a body of its own.
async fn put_in(method: Method, url: Uri, authorization: &str, body: &Value) -> (u16, Value) {
    let mut request = authorized(method, url, authorization);
    *request.body_mut() = Full::from(body.to_string());
    json(client(Version::HTTP_11).request(request).await.unwrap()).await
}

#[tokio::test]
async fn a_file_is_uploaded_in_parts() {
    let (fal, _credential) = accepting("id:secret").await;
    let initiate = fal.rest_url("/storage/upload/initiate-multipart?storage_type=fal-cdn-v3");
    assert_eq!(post(initiate.clone(), "").await.0, 401);
    let (status, urls) = post(initiate, "Key id:secret").await;
    assert_eq!(status, 200);
    let upload = url_in(&urls, "upload_url");
    let at = |below: &str| -> Uri {
        format!("http://{}{}/{below}?{}", upload.authority().unwrap(), upload.path(), upload.query().unwrap())
            .parse()
            .unwrap()
    };
    let mut parts = Vec::new();
    for number in [2, 1] {
        let (status, part) = send(Method::PUT, at(&number.to_string()), "").await;
        assert_eq!((status, &part["partNumber"]), (200, &json!(number)));
        parts.push(part);
    }
    let complete = async |parts: &[Value]| put_in(Method::POST, at("complete"), "", &json!({ "parts": parts })).await;
    // A part that is missing, one that never arrived, and none.
    assert_eq!(complete(&parts[..1]).await.0, 400);
    let strange = json!({"partNumber": 3, "etag": "x"});
    assert_eq!(complete(&[parts[0].clone(), parts[1].clone(), strange]).await.0, 400);
    assert_eq!(complete(&[]).await.0, 400);
    assert_eq!(complete(&parts).await, (200, json!({"ok": true})));
    assert_eq!(complete(&parts).await.0, 404);
    for number in ["0", "x", "10001"] {
        let begun =
            url_in(&post(fal.rest_url("/storage/upload/initiate-multipart"), "Key id:secret").await.1, "upload_url");
        let url = format!("http://{}{}/{number}", begun.authority().unwrap(), begun.path()).parse().unwrap();
        assert_eq!(send(Method::PUT, url, "").await.0, 400, "{number}");
    }
    // An upload that was begun in one piece has no parts.
    let whole = url_in(&post(fal.rest_url("/storage/upload/initiate"), "Key id:secret").await.1, "upload_url");
    let part = format!("http://{}{}/1", whole.authority().unwrap(), whole.path()).parse().unwrap();
    assert_eq!(send(Method::PUT, part, "").await.0, 404);
    assert_eq!(fal.runs(), 0);
}

#[tokio::test]
async fn the_storage_alone_allows_pages_of_any_origin() {
    let (fal, _credential) = accepting("id:secret").await;
    let (_, urls) = post(fal.rest_url("/storage/upload/initiate"), "Key id:secret").await;
    let upload = url_in(&urls, "upload_url");
    for (method, url, allowed) in [
        (Method::OPTIONS, upload.clone(), true),
        (Method::PUT, upload, true),
        (Method::POST, fal.rest_url("/storage/upload/initiate"), false),
        (Method::POST, fal.run_url("a/b"), false),
        (Method::POST, fal.queue_url("a/b"), false),
    ] {
        let is_preflight = method == Method::OPTIONS;
        let request = authorized(method, url.clone(), "Key id:secret");
        let response = client(Version::HTTP_11).request(request).await.unwrap();
        assert_eq!(response.status().as_u16(), if is_preflight { 204 } else { 200 }, "{url}");
        let header = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header("access-control-allow-origin"), allowed.then(|| "*".to_owned()), "{url}");
        assert_eq!(header("access-control-allow-methods").is_some_and(|methods| methods.contains("PUT")), allowed);
    }
}

#[tokio::test]
async fn each_form_of_a_request_for_a_token_has_its_answer() {
    let (fal, credential) = accepting("id:secret").await;
    let mint = async |path: &str, authorization: &str, body: Value| {
        put_in(Method::POST, fal.rest_url(path), authorization, &body).await
    };
    let aliases = json!({"allowed_apps": ["flux"], "token_expiration": 120});
    let paths = json!({"allowed_apps": ["fal-ai/flux/realtime"], "duration": 120});
    let app = json!({"app": "fal-ai/flux/realtime", "duration": 120});
    assert_eq!(mint("/tokens/", "", aliases.clone()).await, detail(401, "Authorization header is required"));
    let (status, token) = mint("/tokens/", "Key id:secret", aliases.clone()).await;
    assert!(status == 200 && token.is_string(), "{token}");
    let (status, token) = mint("/tokens/realtime", "Key id:secret", paths.clone()).await;
    assert!(status == 200 && token["token"].is_string(), "{token}");
    let (status, token) = mint("/tokens/realtime", "Key id:secret", app.clone()).await;
    assert!(status == 200 && token.is_string(), "{token}");
    assert_eq!(fal.runs(), 0);

    // Each endpoint wants its own names of apps, and its own names of fields.
    for (path, body, status) in [
        ("/tokens/", json!({"allowed_apps": ["fal-ai/flux"], "token_expiration": 120}), 403),
        ("/tokens/realtime", json!({"allowed_apps": ["flux"], "duration": 120}), 403),
        ("/tokens/", paths, 403),
        ("/tokens/", json!({"allowed_apps": ["flux"], "duration": 120}), 422),
        ("/tokens/realtime", aliases.clone(), 403),
        ("/tokens/realtime", json!({"allowed_apps": ["a/b"], "token_expiration": 120}), 422),
        ("/tokens/", app, 422),
        ("/tokens/", json!({"allowed_apps": [], "token_expiration": 120}), 422),
        ("/tokens/", json!({"allowed_apps": ["flux"], "token_expiration": 0}), 422),
        ("/tokens/", json!({"allowed_apps": ["flux"], "token_expiration": "120"}), 422),
        ("/tokens/", json!({"allowed_apps": ["flux"], "token_expiration": 86_401}), 422),
        ("/tokens/realtime", json!({"app": "a/b", "allowed_apps": ["a/b"], "duration": 120}), 422),
        ("/tokens/", json!("flux"), 422),
    ] {
        assert_eq!(mint(path, "Key id:secret", body.clone()).await.0, status, "{path} {body}");
    }
    fal.deny(&credential);
    assert_eq!(mint("/tokens/", "Key id:secret", aliases).await, detail(403, "Insufficient permissions"));
    assert_eq!(fal.runs(), 0);
}
