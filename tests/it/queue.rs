//! `examples/queue` as a process: what it sends, what it prints, and what ctrl-c does.

use std::{
    process::{Output, Stdio},
    time::Duration,
};

use axum::{Json, Router, http::Uri};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};
use tower_fal::mock::{Failure, MockFal, Presented};

use crate::{
    app::{Served, app, gives_up},
    support::{key, key_text, nobody},
};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// The example with key number 1, which runs an app at these URLs.
fn queue(queue_url: &str, rest_url: &str, more: &[&str]) -> Command {
    let mut command = app("queue");
    command.env("FAL_KEY", key_text(1)).args(["--queue-url", queue_url, "--rest-url", rest_url]).args(more);
    command
}

async fn fal() -> MockFal {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal
}

/// Standard output and standard error, in which there is no secret.
fn texts(output: Output) -> (String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (printed, told) = (text(output.stdout), text(output.stderr));
    assert!(!printed.contains("secret") && !told.contains("secret"), "{printed}{told}");
    (printed, told)
}

#[tokio::test]
async fn the_demonstration_needs_no_arguments() {
    let (code, printed, told) = gives_up(&mut app("queue")).await;
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(serde_json::from_str::<Value>(&printed).unwrap()["prompt"], "a dog");
    for says in ["uploaded 21 bytes: http://127.0.0.1:", "\nIN_QUEUE, position 0\n", "\nCOMPLETED\n"] {
        assert!(told.contains(says) && !told.contains('\r'), "{told}");
    }
}

#[tokio::test]
async fn the_key_goes_with_each_call_but_the_upload() {
    let fal = fal().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cat.PNG");
    std::fs::write(&file, "the bytes").unwrap();
    let live = ["--file", file.to_str().unwrap(), "--live", "fal-ai/flux/dev/image-to-image", r#"{"prompt":"a dog"}"#];
    let output = queue(&fal.queue_origin(), &fal.rest_origin(), &live).output().await.unwrap();
    assert!(output.status.success());
    let (printed, _) = texts(output);
    assert_eq!(serde_json::from_str::<Value>(&printed).unwrap()["prompt"], "a dog");

    let calls: Vec<_> = fal.received().into_iter().map(|call| (call.method, call.path, call.presented)).collect();
    let (initiate, upload, submit, rest) = (&calls[0], &calls[1], &calls[2], &calls[3..]);
    let with_key = Presented::Accepted(key(1).key_id().cloned());
    assert_eq!((&initiate.1, &initiate.2), (&"/storage/upload/initiate".to_owned(), &with_key));
    assert_eq!((&upload.0, &upload.2), (&Method::PUT, &Presented::Nothing));
    assert_eq!((&submit.1, &submit.2), (&"/fal-ai/flux/dev/image-to-image".to_owned(), &with_key));
    // The queue knows the jobs of an app without what follows its name.
    assert!(rest.iter().all(|call| call.1.starts_with("/fal-ai/flux/requests/") && call.2 == with_key), "{rest:?}");
    assert_eq!(fal.runs(), 1);
}

#[cfg(unix)]
#[tokio::test]
async fn ctrl_c_cancels_the_job() {
    let fal = fal().await;
    let mut command = queue(&fal.queue_origin(), &fal.rest_origin(), &["--live", "a/b", "{}"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let calls = |method: &Method| fal.received().iter().filter(|call| call.method == *method).count();
    while calls(&Method::POST) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // It has not polled the job to its end, as that takes three polls, and from now on none is answered.
    fal.set_latency(Duration::from_secs(600));
    while calls(&Method::GET) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fal.set_latency(Duration::ZERO);
    let kill = format!("kill -INT {}", child.id().unwrap());
    assert!(Command::new("sh").args(["-c", &kill]).status().await.unwrap().success());
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("it goes on").unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (printed, told) = texts(output);
    assert!(printed.is_empty() && told.ends_with("interrupted, and the job is cancelled\n"), "{printed}{told}");
    let cancelled = fal.received().into_iter().find(|call| call.method == Method::PUT).unwrap();
    assert!(cancelled.path.ends_with("/cancel") && cancelled.status == Some(StatusCode::ACCEPTED), "{cancelled:?}");
}

#[tokio::test]
async fn an_error_is_printed_with_its_causes() {
    let nobody = nobody();
    let nowhere = format!("http://{}", nobody.local_addr().unwrap());
    let unknown = MockFal::start().await.unwrap();
    let fal = fal().await;
    fal.fail_next(1, Failure::Application(StatusCode::INTERNAL_SERVER_ERROR));
    for (queue_url, live, says) in [
        (&nowhere, ["a/b", "{}"], "Connection refused"),
        (&unknown.queue_origin(), ["a/b", "{}"], "fal does not know key `id-1`"),
        (&fal.queue_origin(), ["a/b", "{}"], "fal answers 500 Internal Server Error"),
        (&fal.queue_origin(), ["a/b", "hush"], "INPUT is not JSON"),
        (&fal.queue_origin(), ["hush", "{}"], "APP must be like"),
        (&fal.queue_origin(), ["a/../b", "{}"], "APP must be like"),
        (&fal.queue_origin(), ["a/b?c", "{}"], "APP must be like"),
    ] {
        let output = queue(queue_url, &nowhere, &["--live", live[0], live[1]]).output().await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{says}");
        let (printed, told) = texts(output);
        assert!(printed.is_empty() && told.contains(says) && !told.contains("hush"), "{told}");
    }
    let submitted = fal.received().iter().filter(|call| call.method == Method::POST).count();
    assert_eq!(submitted, 1, "what is wrong with the arguments is found before anything is sent");
}

/// What an app answers could move the cursor, or set the title of the window.
#[tokio::test]
async fn the_control_characters_of_an_answer_are_escaped() {
    const TITLE: &str = "\u{1b}]0;hush\u{7}";
    async fn answer(uri: Uri) -> (StatusCode, Json<Value>) {
        let answer = match uri.path().rsplit('/').next().unwrap() {
            "status" => json!({ "status": "COMPLETED", "queue_position": null }),
            "b" | "d" => json!({ "request_id": "a-1" }),
            _ => json!({ "text": TITLE, TITLE: 1 }),
        };
        let failed = uri.path().starts_with("/c/d/requests/a-1") && !uri.path().ends_with("/status");
        (if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK }, Json(answer))
    }
    let fake = Served::new(Router::new().fallback(answer)).await;
    for (app, succeeds) in [("a/b", true), ("c/d", false)] {
        let output = queue(&fake.url, &fake.url, &["--live", app, "{}"]).output().await.unwrap();
        assert_eq!(output.status.success(), succeeds);
        let (printed, told) = texts(output);
        assert!((printed.clone() + &told).contains("hush"), "{printed}{told}");
        let is_plain = |text: &str| text.chars().all(|character| !character.is_control() || character == '\n');
        assert!(is_plain(&printed) && is_plain(&told), "{printed:?}{told:?}");
    }
}

#[tokio::test]
async fn a_request_id_that_is_not_one_is_not_followed() {
    let answer = || std::future::ready(Json(json!({ "request_id": "../../hush" })));
    let fake = Served::new(Router::new().fallback(answer)).await;
    let output = queue(&fake.url, &fake.url, &["--live", "a/b", "{}"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (_, told) = texts(output);
    assert!(told.contains("the request id in fal's answer is not one") && !told.contains("hush"), "{told}");
}
