//! Server-sent events through the whole stack, over real sockets: each arrives before the next one is sent.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Body;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalLayer,
    mock::{MockFal, Presented},
    origin::FalOrigins,
    retry::ReplayBody,
};

use crate::support::{Says, Script, example, key};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

fn layer(store: &CredentialStore) -> FalLayer {
    tower_fal::layer(store).auth(|auth| auth.origins(FalOrigins::new().loopback_http()))
}

fn client(http2: bool) -> Client<HttpConnector, ReplayBody<Full<Bytes>>> {
    Client::builder(TokioExecutor::new()).http2_only(http2).build_http()
}

fn request(fal: &MockFal) -> Request<Full<Bytes>> {
    Request::post(fal.run_url("a/b/stream")).body(Full::from("{}")).unwrap()
}

/// The mock sends an event only when it is told to, and it is told once the one before is here.
async fn arrives_event_by_event<B>(fal: &MockFal, response: Response<B>)
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
    let mut body = response.into_body();
    for n in 0..3 {
        fal.hold_events_after(n + 1);
        let mut event = Vec::new();
        while !event.ends_with(b"\n\n") {
            let frame = tokio::time::timeout(PATIENCE, body.frame()).await.expect("the event is held back");
            event.extend(frame.unwrap().unwrap().into_data().unwrap());
        }
        let event: Value = serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap();
        assert_eq!(event["event"], n);
    }
    assert!(body.collect().await.unwrap().to_bytes().is_empty());
}

/// The key that the store has is refused, the one that it reloads is not: the answer is that of the second attempt.
async fn refused_at_first() -> (MockFal, CredentialStore) {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(2));
    fal.hold_events_after(0);
    let script = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(script.clone()).build().await.unwrap();
    script.brings(2);
    (fal, store)
}

fn second_attempt(fal: &MockFal) {
    let presented: Vec<_> = fal.received().into_iter().map(|received| received.presented).collect();
    let id = |n| key(n).key_id().cloned();
    assert_eq!(presented, [Presented::Refused(id(1)), Presented::Accepted(id(2))]);
    assert_eq!(fal.runs(), 1);
}

#[tokio::test]
async fn a_stream_arrives_event_by_event_after_a_refusal_and_a_reload() {
    for http2 in [false, true] {
        let (fal, store) = refused_at_first().await;
        let client = ServiceBuilder::new().layer(layer(&store)).service(client(http2));
        let response = tokio::time::timeout(PATIENCE, client.oneshot(request(&fal))).await.unwrap().unwrap();
        arrives_event_by_event(&fal, response).await;
        second_attempt(&fal);
    }
}

/// There was a refusal and a reload before it.
#[tokio::test]
async fn a_stream_arrives_event_by_event_after_a_replay() {
    for http2 in [false, true] {
        let (fal, store) = refused_at_first().await;
        let client = ServiceBuilder::new().layer(layer(&store).passthrough()).service(client(http2));
        let response = tokio::time::timeout(PATIENCE, client.oneshot(request(&fal))).await.unwrap().unwrap();
        arrives_event_by_event(&fal, response).await;
        second_attempt(&fal);
    }
}

#[tokio::test]
async fn the_example_prints_each_event() {
    let output = example("stream").output().await.unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> = printed.lines().collect();
    let [first, second, third, end] = lines[..] else { panic!("{printed}") };
    for (n, line) in [first, second, third].into_iter().enumerate() {
        assert_eq!(serde_json::from_str::<Value>(line).unwrap()["event"], n);
    }
    assert_eq!(end, "3 events, and fal sent each one only after the previous one was printed");
    assert!(!printed.contains("stream-secret"));
}
