//! `examples/webhook_receiver`, as a process and over sockets.

use std::{path::PathBuf, process::Stdio, sync::LazyLock, time::SystemTime};

use bytes::Bytes;
use http::{Request, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use tower_fal::{
    Credential,
    mock::{Failure, MockFal},
};

use crate::support::{BODY, PATIENCE, client, fetches};

/// The example, built once and killed when its handle is dropped.
fn example() -> Command {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(build);
    let mut command = Command::new(&*BUILT);
    command.kill_on_drop(true);
    command
}

/// With the profile and in the target directory of these tests, so that `cargo test` has left nothing to do.
fn build() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let directory = tests.ancestors().nth(2).unwrap();
    let profile = directory.file_name().unwrap().to_str().unwrap();
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo
        .args(["build", "--frozen", "--message-format=json", "--example", "webhook_receiver"])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
        .args(["--profile", if profile == "debug" { "dev" } else { profile }])
        .arg("--target-dir")
        .arg(directory.parent().unwrap());
    // What Cargo tells a test of its package, ring's build script would take for a reason to build ring anew.
    for (variable, _) in std::env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(variable);
        }
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let artifacts = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>().map(Result::unwrap);
    let executable = artifacts
        .filter(|artifact| artifact["target"]["name"] == "webhook_receiver")
        .find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from));
    executable.unwrap()
}

/// A running receiver.
struct Receiver {
    child: Child,
    url: String,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Receiver {
    async fn start(arguments: &[&str]) -> Self {
        let mut command = example();
        command.args(["--listen", "127.0.0.1:0"]).args(arguments).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let url = first.strip_prefix("listening on ").unwrap().to_owned();
        Self { child, url, lines }
    }

    async fn line(&mut self) -> Value {
        let line = timeout(PATIENCE, self.lines.next_line()).await.unwrap().unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Sends these bytes below the signature of others.
    async fn post(&self, fal: &MockFal, user: &str, signed: &[u8], sent: &'static [u8]) -> StatusCode {
        let mut request = Request::post(format!("{}/webhook", self.url)).body(Full::from(sent)).unwrap();
        request.headers_mut().extend(fal.sign_webhook(user, "r-1", SystemTime::now(), signed));
        client().request(request).await.unwrap().status()
    }

    async fn readyz(&self) -> (u16, Value) {
        let url = format!("{}/readyz", self.url).parse().unwrap();
        let (head, body) = client().get(url).await.unwrap().into_parts();
        (head.status.as_u16(), serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap())
    }
}

async fn submit(fal: &MockFal, receiver: &Receiver) -> String {
    let credential = Credential::key("id:secret").unwrap();
    fal.accept(&credential);
    let to: String = url::form_urlencoded::byte_serialize(format!("{}/webhook", receiver.url).as_bytes()).collect();
    let request = Request::post(fal.queue_url(&format!("/fal-ai/flux?fal_webhook={to}")))
        .header(AUTHORIZATION, credential.header())
        .body(Full::<Bytes>::from("{}"))
        .unwrap();
    let body = client().request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice::<Value>(&body).unwrap()["request_id"].as_str().unwrap().to_owned()
}

async fn delivered(fal: &MockFal, id: &str) -> Vec<u16> {
    let attempts = timeout(PATIENCE, fal.webhook_delivered(id)).await.unwrap();
    attempts.into_iter().map(|status| status.unwrap().as_u16()).collect()
}

#[tokio::test]
async fn the_receiver_prints_a_line_for_each_delivery() {
    let fal = MockFal::start().await.unwrap();
    let keys = fal.webhook_keys_url().to_string();
    let mut receiver =
        Receiver::start(&["--account", "somebody|2", MockFal::USER_ID, "--jwks-url", &keys, "--fail-first"]).await;
    let id = submit(&fal, &receiver).await;
    assert_eq!(delivered(&fal, &id).await, [500, 200]);
    assert!(fal.deliver_webhook_again(&id));
    assert_eq!(delivered(&fal, &id).await, [500, 200, 200]);
    for repeat in [false, false, true] {
        let expected = json!({ "request_id": id, "user_id": MockFal::USER_ID, "repeat": repeat });
        assert_eq!(receiver.line().await, expected);
    }
    assert_eq!(receiver.post(&fal, MockFal::USER_ID, BODY, b"{}").await, StatusCode::UNAUTHORIZED);
    assert_eq!(receiver.post(&fal, "stranger|3", BODY, BODY).await, StatusCode::FORBIDDEN);
    assert_eq!(receiver.post(&fal, "somebody|2", BODY, BODY).await, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(receiver.line().await["user_id"], "somebody|2");
    assert_eq!(fetches(&fal), 2);
    assert!(receiver.child.try_wait().unwrap().is_none());
}

#[tokio::test]
async fn the_receiver_takes_its_options() {
    let fal = MockFal::start().await.unwrap();
    let keys = fal.webhook_keys_url().to_string();
    let options = ["--any-account", "--jwks-url", &keys, "--skip-repeats", "--max-body", "1000", "--tolerance", "1000"];
    let mut receiver = Receiver::start(&options).await;
    let id = submit(&fal, &receiver).await;
    assert_eq!(delivered(&fal, &id).await, [200]);
    assert!(fal.deliver_webhook_again(&id));
    assert_eq!(delivered(&fal, &id).await, [200, 200]);
    assert_eq!(receiver.post(&fal, "anybody", BODY, BODY).await, StatusCode::OK);
    assert_eq!(receiver.post(&fal, "anybody", &[b' '; 1001], &[b' '; 1001]).await, StatusCode::PAYLOAD_TOO_LARGE);
    let mut old = Request::post(format!("{}/webhook", receiver.url)).body(Full::from(BODY)).unwrap();
    let at = SystemTime::now() - std::time::Duration::from_secs(900);
    old.headers_mut().extend(fal.sign_webhook("anybody", "r-2", at, BODY));
    assert_eq!(client().request(old).await.unwrap().status(), StatusCode::OK);
    // The repeat was not handled.
    assert_eq!(receiver.line().await["request_id"], id.as_str());
    assert_eq!(receiver.line().await["request_id"], "r-1");
    assert_eq!(receiver.line().await["request_id"], "r-2");
}

#[tokio::test]
async fn the_receiver_is_ready_when_it_has_keys() {
    let fal = MockFal::start().await.unwrap();
    fal.fail_next(1, Failure::Status(StatusCode::BAD_GATEWAY));
    let keys = fal.webhook_keys_url().to_string();
    let receiver = Receiver::start(&["--account", MockFal::USER_ID, "--jwks-url", &keys]).await;
    let became_ready = async {
        loop {
            let (status, body) = receiver.readyz().await;
            assert_eq!(body["ready"], status == 200);
            if status == 200 {
                return body;
            }
            assert_eq!(status, 503);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let body = timeout(PATIENCE, became_ready).await.unwrap();
    assert_eq!((&body["keys"], &body["degraded"]), (&json!(1), &json!(false)));
    assert_eq!(fetches(&fal), 2);
}

#[tokio::test]
async fn the_demonstration_shows_the_whole_loop() {
    let output = example().args(["--demo", "--listen", "127.0.0.1:0", "--skip-repeats"]).output().await.unwrap();
    let (printed, told) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{printed}{told}");
    let handled: Vec<Value> = printed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(handled.len(), 1, "{printed}"); // once, however often it came
    assert_eq!(handled[0]["repeat"], false);
    let answers: Vec<_> = printed.lines().filter_map(|line| line.split_once("was answered with ")).collect();
    let answers: Vec<_> = answers.into_iter().map(|(_, status)| status).collect();
    assert_eq!(answers, ["200", "200", "403", "401"], "{printed}");
}

#[tokio::test]
async fn a_receiver_that_cannot_start_says_what_to_do() {
    for (arguments, says) in [
        (&["--account", ""][..], "a user id is 1 to 256 visible characters"),
        (&["--account", "x", "--ca-file", "/nowhere/ca.pem"], "cannot read certificates from /nowhere/ca.pem: "),
        (&["--account", "x", "--listen", "192.0.2.1:1"], "Choose another address with --listen."),
        (&["--demo", "--listen", "192.0.2.1:1"], "cannot listen on 192.0.2.1:1: "),
    ] {
        let output = example().args(arguments).output().await.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]), "{arguments:?}: {told}");
        assert!(told.contains(says), "{arguments:?}: {told}");
    }
}

#[tokio::test]
async fn wrong_arguments_end_the_receiver_with_2_and_one_line() {
    for arguments in [
        &[][..],
        &["--hush"],
        &["--account"],
        &["--account", "hush", "--any-account"],
        &["--account", "hush", "--demo"],
        &["--any-account", "--jwks-url", "http://hush.example/"],
        &["--any-account", "--tolerance", "hush"],
        &["--any-account", "--max-body", "-1"],
    ] {
        let output = example().args(arguments).output().await.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(2), &b""[..]), "{arguments:?}: {told}");
        let is_one_line = told.matches('\n').count() == 1 && told.ends_with(" See --help.\n");
        assert!(is_one_line && !told.contains("hush"), "{arguments:?}: {told}");
    }
    let output = example().arg("--help").output().await.unwrap();
    assert!(output.status.success() && String::from_utf8(output.stdout).unwrap().contains("--fail-first"));
}
