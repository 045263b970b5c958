//! What fal or the proxy refuses: the client learns why, and sends nothing twice that is billed.

use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::json;
use tower_fal::mock::{ErrorType, Failure, Lock};

use crate::servers::Servers;

const RUN: &str = "return await fal.run('fal-ai/flux', { input: { prompt: 'a cat' } })";

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn the_client_learns_what_fal_refuses() {
    let mut servers = Servers::start(&[]).await;
    servers.fal.lock(Lock::ExhaustedBalance);
    let error = servers.page.run(RUN).await.unwrap_err();
    assert_eq!(error["status"], 403);
    let reason = "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing.";
    assert_eq!(error["body"]["detail"], reason);
    servers.fal.unlock();

    let unprocessable = StatusCode::UNPROCESSABLE_ENTITY;
    let model = Failure::Model { status: unprocessable, error: "content_policy_violation", retryable: false };
    servers.fal.fail_next(1, model);
    let error = servers.page.run(RUN).await.unwrap_err();
    assert_eq!((&error["name"], &error["status"]), (&json!("ValidationError"), &json!(422)));
    assert_eq!(error["body"]["detail"][0]["type"], "content_policy_violation");
    assert!(error["requestId"].as_str().is_some_and(|id| !id.is_empty()), "{error}");
    assert_eq!((servers.fal.runs(), servers.fal.requests()), (1, 2));

    // fal did not run it, so the client may send it again, and does.
    servers.fal.fail_next(1, Failure::Platform(ErrorType::ConcurrentRequestsLimit));
    servers.page.call(RUN).await;
    assert_eq!((servers.fal.runs(), servers.fal.requests()), (2, 4));
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn a_401_that_remains_reaches_the_client_once() {
    let mut servers = Servers::start(&[]).await;
    servers.page.call(RUN).await;
    servers.fal.fail_next(usize::MAX, Failure::Detail(StatusCode::UNAUTHORIZED, "invalid key credentials"));
    let error = servers.page.run(RUN).await.unwrap_err();
    assert_eq!((&error["status"], &error["body"]["detail"]), (&json!(401), &json!("invalid key credentials")));
    assert_eq!((servers.fal.runs(), servers.fal.requests()), (1, 2));
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn the_client_shows_what_the_proxy_refuses() {
    let mut servers = Servers::start(&["--allow-endpoint", "fal-ai/flux", "--max-body", "1000"]).await;
    let long = "return await fal.run('fal-ai/flux', { input: { prompt: 'x'.repeat(2000) } })";
    let hook = "return await fal.queue.submit('fal-ai/flux', { input: {}, webhookUrl: 'https://evil.example/' })";
    for (body, status) in [
        ("return await fal.run('fal-ai/sdxl', { input: {} })", 403),
        ("return await fal.run('https://api.fal.ai', { path: 'v1/keys', input: { alias: 'x' } })", 412),
        ("return await fal.realtime.connect, fal.run('https://rest.fal.ai', { path: 'tokens/', input: {} })", 403),
        (hook, 403),
        (long, 413),
    ] {
        let error = servers.page.run(body).await.unwrap_err();
        assert_eq!(error["status"], status, "{body}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.starts_with("HTTP "), "{message}");
        assert_eq!((&error["body"]["message"], error["body"]["rule"].is_string()), (&json!(message), true), "{error}");
    }
    assert_eq!(servers.fal.requests(), 0);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn nothing_that_is_billed_is_sent_twice() {
    let mut servers = Servers::start(&["--first-byte-timeout", "1"]).await;
    let posts = |servers: &Servers| {
        let all = servers.fal.received().into_iter();
        all.filter(|request| request.method == Method::POST).count()
    };
    servers.page.call(RUN).await;
    // fal closes the connection, and nobody knows whether it has run.
    servers.fal.fail_next(usize::MAX, Failure::Disconnect);
    let error = servers.page.run(RUN).await.unwrap_err();
    assert!(error["status"].is_number(), "{error}");
    assert_eq!(posts(&servers), 2, "{error}");
    servers.fal.fail_next(0, Failure::Disconnect);

    // fal answers too late, and has run by then.
    servers.fal.set_latency(Duration::from_secs(4));
    for body in [RUN, "return await fal.queue.submit('fal-ai/flux', { input: {} })"] {
        let before = posts(&servers);
        let error = servers.page.run(body).await.unwrap_err();
        assert!(error["status"].is_number(), "{error}");
        // The client would have sent it again after a second or two.
        assert_eq!(posts(&servers) - before, 1, "{error}");
    }
    assert_eq!(servers.fal.runs(), 3);
    servers.stop().await;
}
