//! `examples/axum_images`, and what the three `axum_*` examples have in common.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Json, Router, extract::State};
use http::{Request, StatusCode, Uri};
use serde_json::{Value, json};
use tokio::time::Instant;
use tower_fal::mock::{Failure, Lock, MockFal, Presented};

use crate::{
    app::{Answer, App, KeyFile, Served, app, gives_up},
    support::{key, key_text},
};

const NAME: &str = "axum_images";

fn order(prompt: &str) -> Request<String> {
    let order = json!({ "prompt": prompt }).to_string();
    Request::post("/images?token=hush").header("content-type", "application/json").body(order).unwrap()
}

#[tokio::test]
async fn an_order_goes_through_the_queue_with_the_key_on_every_call() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &[]).await;
    let answer = app.send(order("a lighthouse")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!((answer.json()["prompt"].as_str(), fal.runs()), (Some("a lighthouse"), 1));

    let calls: Vec<_> = fal.received().into_iter().map(|call| (call.method.to_string(), call.path)).collect();
    let (submit, job) = (calls[0].clone(), calls.last().unwrap().1.clone());
    assert_eq!(submit, ("POST".to_owned(), "/fal-ai/flux/schnell".to_owned()));
    assert!(job.starts_with("/fal-ai/flux/requests/"));
    let looks = &calls[1..calls.len() - 1];
    assert_eq!(looks, vec![("GET".to_owned(), format!("{job}/status")); 3], "{calls:?}");
    let accepted = Presented::Accepted(key(1).key_id().cloned());
    assert!(fal.received().iter().all(|call| call.presented == accepted));

    let id = answer.headers["x-request-id"].to_str().unwrap().to_owned();
    let log = app.end().await.well();
    assert!(log.contains(&id) && log.contains("/images") && log.contains("status=200"), "{log}");
}

#[tokio::test]
async fn a_refusal_tells_the_caller_little_and_the_log_all() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &[]).await;
    let problem = async || app.send(order("a cat")).await.problem();

    fal.lock(Lock::ExhaustedBalance);
    assert_eq!(problem().await, (503, "account_locked".to_owned()));
    let locked = app.ready_where(|_, report| report["degraded"] != json!([])).await;
    assert_eq!((&locked["ready"], &locked["degraded"]), (&json!(true), &json!(["account_locked"])));
    fal.unlock();
    fal.deny(&key(1));
    assert_eq!(problem().await, (502, "insufficient_permissions".to_owned()));
    fal.revoke(&key(1));
    assert_eq!(problem().await, (502, "unknown_credential".to_owned()));
    fal.accept(&key(1));
    fal.fail_next(1, Failure::Application(StatusCode::UNAUTHORIZED));
    assert_eq!(problem().await, (502, "application".to_owned()));
    fal.fail_next(1, Failure::Disconnect);
    assert_eq!(problem().await, (502, "transport".to_owned()));
    let model = Failure::Model {
        status: StatusCode::UNPROCESSABLE_ENTITY,
        error: "content_policy_violation",
        retryable: false,
    };
    fal.fail_next(1, model);
    assert_eq!(problem().await, (422, "input".to_owned()));
    fal.fail_next(1, Failure::Status(StatusCode::TOO_MANY_REQUESTS));
    assert_eq!(problem().await, (503, "busy".to_owned()));

    let log = app.end().await.well();
    assert!(log.contains("the account of key `id-1` from file:"), "{log}");
    assert!(log.contains("top up at fal.ai/dashboard/billing"), "{log}");
}

#[tokio::test]
async fn a_replaced_key_is_used_and_an_invalid_one_is_not() {
    let fal = MockFal::start().await.unwrap();
    let (app, file) = App::against(NAME, &fal, &[]).await;
    assert_eq!(app.admin("/readyz").await.json()["key_id"], "id-1");
    fal.accept(&key(2));
    file.replace(&key_text(2));
    app.ready_where(|status, report| status == 200 && report["key_id"] == "id-2").await;
    fal.revoke(&key(1));
    assert_eq!(app.send(order("a cat")).await.status, 200);

    file.replace("half a key");
    let report = app.ready_where(|_, report| report["degraded"] != json!([])).await;
    assert_eq!((&report["ready"], &report["degraded"]), (&json!(true), &json!(["reload_failing"])));
    let answer = app.admin("/readyz").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["key_id"]), (200, &json!("id-2")));
    assert!(!answer.body.contains("half"), "{}", answer.body);
    assert_eq!(app.send(order("a cat")).await.status, 200);
    app.end().await.well();
}

/// Whatever its answers say: where a job is followed is not for them to decide.
#[tokio::test]
async fn no_url_and_no_path_of_an_answer_is_followed() {
    async fn queue(State((id, seen)): State<(Value, Seen)>, uri: Uri) -> Json<Value> {
        seen.lock().unwrap().push(uri.path().to_owned());
        let url = "http://127.0.0.1:1/fal-ai/flux";
        Json(json!({"request_id": id, "status": "COMPLETED", "status_url": url, "response_url": url}))
    }
    type Seen = Arc<Mutex<Vec<String>>>;

    for (id, paths) in [
        (json!("a-1"), vec!["/fal-ai/flux/schnell", "/fal-ai/flux/requests/a-1/status", "/fal-ai/flux/requests/a-1"]),
        (json!("../../../hush"), vec!["/fal-ai/flux/schnell"]),
        (json!("a?hush"), vec!["/fal-ai/flux/schnell"]),
        (json!(""), vec!["/fal-ai/flux/schnell"]),
        (json!("a".repeat(65)), vec!["/fal-ai/flux/schnell"]),
        (json!(7), vec!["/fal-ai/flux/schnell"]),
    ] {
        let seen = Seen::default();
        let fake = Served::new(Router::new().fallback(queue).with_state((id.clone(), seen.clone()))).await;
        let file = KeyFile::new(&key_text(1));
        let app = App::start(NAME, &["--key-file", file.path().to_str().unwrap(), "--fal-queue-url", &fake.url]).await;
        let answer = app.send(order("a cat")).await;
        if paths.len() > 1 {
            assert_eq!(answer.status, 200);
        } else {
            assert_eq!(answer.problem(), (502, "answer".to_owned()));
        }
        assert_eq!(*seen.lock().unwrap(), paths, "{id}");
        app.end().await.well();
    }
}

/// An answer may be long, and may hold what nobody should read: what it says is not for the log.
#[tokio::test]
async fn an_unreadable_answer_is_reported_without_its_content() {
    for answer in [r#""hush""#, r#"{"request_id":{"hush":1}}"#, r#"{"request_id":["hush"]}"#, "hush", r#"{"hush":1}"#] {
        let fake = Served::new(Router::new().fallback(move || std::future::ready(answer))).await;
        let file = KeyFile::new(&key_text(1));
        let app = App::start(NAME, &["--key-file", file.path().to_str().unwrap(), "--fal-queue-url", &fake.url]).await;
        assert_eq!(app.send(order("a cat")).await.problem(), (502, "answer".to_owned()));
        let log = app.end().await.well();
        assert!(log.contains("fal's answer cannot be read"), "{log}");
    }
}

// What the examples have in common.

#[tokio::test]
async fn a_shutdown_loses_no_request() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &["--drain-delay", "3"]).await;
    // Five calls to fal each, so what comes during the delay is not through when it is over.
    fal.set_latency(Duration::from_secs(1));
    let under_way: Vec<_> = (0..8).map(|_| tokio::spawn(app.open(order("early")))).collect();
    while fal.runs() < 8 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(under_way.iter().all(|order| !order.is_finished()), "they should have taken longer");
    let began = Instant::now();
    app.signal("TERM").await;
    app.ready_where(|status, report| status == 503 && report["draining"] == true).await;
    let still_coming: Vec<_> = (0..8).map(|_| tokio::spawn(app.open(order("late")))).collect();
    assert_eq!(app.get("/healthz").await.status, 200);
    app.refuses_connections().await;
    assert!(began.elapsed() >= Duration::from_secs(3), "it did not wait");
    fal.set_latency(Duration::ZERO);

    for (orders, prompt) in [(under_way, "early"), (still_coming, "late")] {
        for order in orders {
            let response = order.await.unwrap().unwrap();
            // So that a client takes its next request somewhere else.
            assert_eq!(response.headers()["connection"], "close");
            let answer = Answer::of(response).await;
            assert_eq!((answer.status.as_u16(), answer.json()["prompt"].as_str()), (200, Some(prompt)));
        }
    }
    app.ended().await.well();
    assert_eq!(fal.runs(), 16);
}

#[tokio::test]
async fn a_shutdown_without_requests_takes_the_delay_and_no_more() {
    for signal in ["TERM", "INT"] {
        let app = App::start(NAME, &["--demo", "--drain-delay", "0.2"]).await;
        assert_eq!(app.send(order("a cat")).await.status, 200);
        app.signal(signal).await;
        let began = Instant::now();
        app.ended().await.well();
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "it waited for {took:?}, with nothing to wait for");
    }
}

#[tokio::test]
async fn what_is_open_when_the_drain_is_over_is_closed() {
    let fal = MockFal::start().await.unwrap();
    let times = ["--drain-delay", "0", "--drain-timeout", "0.2", "--request-timeout", "600"];
    let (app, _key) = App::against(NAME, &fal, &times).await;
    fal.set_latency(Duration::from_secs(600));
    let order = tokio::spawn(app.open(order("a cat")));
    while fal.requests() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    app.signal("TERM").await;
    let log = app.ended().await.well();
    assert!(log.contains("closing the connections that are still open"), "{log}");
    assert!(order.await.unwrap().is_err());
}

#[tokio::test]
async fn a_request_has_a_time_out_and_its_body_a_limit() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &["--request-timeout", "0.2"]).await;
    assert!(app.refuses_body_of(1024 * 1024 + 1, "/images").await);
    assert_eq!(fal.requests(), 0);
    fal.set_latency(Duration::from_secs(600));
    assert_eq!(app.send(order("a cat")).await.status, 504);
    app.end().await.well();
}

#[tokio::test]
async fn a_request_id_is_the_callers_if_it_looks_like_one() {
    let app = App::start(NAME, &["--demo"]).await;
    for (id, is_kept) in [("a-1_b.C", true), ("a b", false), ("a\tb", false), ("", false), (&"a".repeat(65), false)] {
        let mut request = order("");
        request.headers_mut().insert("x-request-id", id.parse().unwrap());
        *request.body_mut() = String::new();
        let answer = app.send(request).await;
        let returned = answer.headers["x-request-id"].to_str().unwrap();
        assert_eq!(returned == id, is_kept, "{id}: {returned}");
        assert!(is_kept || returned.len() == 36, "{returned}");
    }
    let log = app.end().await.well();
    assert!(log.contains("a-1_b.C") && !log.contains("a b"), "{log}");
}

#[tokio::test]
async fn an_error_at_start_names_the_option_and_not_the_value() {
    let file = KeyFile::new("hush");
    let file = file.path();
    let file = file.to_str().unwrap();
    for (code, arguments, says) in [
        (1, vec![], "set FAL_KEY"),
        (1, vec![], "Or use --key-file PATH, or --demo."),
        (1, vec!["--key-file", file], "holds no credential"),
        (1, vec!["--demo", "--listen", "192.0.2.1:1"], "cannot listen on 192.0.2.1:1"),
        (1, vec!["--demo", "--listen", "192.0.2.1:1"], "Choose another address with --listen."),
        (1, vec!["--demo", "--listen", "127.0.0.1:0", "--admin", "192.0.2.1:1"], "another address with --admin."),
        (2, vec!["--fal-run-url", "http://hush.example"], "--fal-run-url <URL> cannot be used: the origin would carry"),
        (
            2,
            vec!["--fal-queue-url=https://hush:hush@fal.run"],
            "--fal-queue-url <URL> cannot be used: the origin is not",
        ),
        (2, vec!["--fal-queue-url", "hush"], "--fal-queue-url <URL> cannot be used: it must be like"),
        (2, vec!["--fal-queue-url", "hush hush"], "--fal-queue-url <URL> cannot be used: it is not a URL"),
        (2, vec!["--demo", "--key-file", file], "--demo cannot be used together with --key-file <PATH>"),
        (2, vec!["--listen", "hush"], "--listen <ADDR> cannot be used: invalid socket address"),
        (2, vec!["--drain-delay", "-1"], "--drain-delay <SECONDS> cannot be used: it must be a number of seconds"),
        (2, vec!["--key-file"], "--key-file <PATH> needs a value"),
        (2, vec!["--tenants", "hush"], "an argument that this example does not know"),
        (2, vec!["--listen", "127.0.0.1:0", "hush"], "an argument that this example does not know"),
    ] {
        let (exit, printed, told) = gives_up(app(NAME).args(&arguments)).await;
        assert_eq!(exit, Some(code), "{arguments:?}: {told}");
        assert!(told.contains(says) && !told.contains("hush"), "{arguments:?}: {told}");
        assert_eq!(printed, "");
    }
    let (code, help, _) = gives_up(app(NAME).arg("--help")).await;
    assert!(code == Some(0) && help.contains("--key-file") && help.contains("--drain-timeout"), "{help}");
}
