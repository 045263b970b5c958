//! `examples/axum_byok`: whose key goes with a request, and when none does.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, Uri},
    response::{IntoResponse, Response},
};
use http::{Request, StatusCode, header::LOCATION};
use serde_json::json;
use tempfile::TempDir;
use tower_fal::mock::{Failure, Lock, MockFal, Presented};

use crate::{
    app::{App, Ended, Served, app, gives_up},
    support::{key, key_text},
};

/// The house's key, which fal takes and which is nobody's here.
const HOUSE: u64 = 9;

fn with_key(directory: &Path, tenant: &str, key: Option<u64>) {
    let directory = directory.join(tenant);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("token"), format!("hush-{tenant}\n")).unwrap();
    if let Some(key) = key {
        fs::write(directory.join("new"), key_text(key)).unwrap();
        fs::rename(directory.join("new"), directory.join("fal_key")).unwrap();
    }
}

/// acme has key 1, beta key 2, and zeta none. The environment holds the house's key.
pub(crate) async fn start(run_url: &str, queue_url: &str, more: &[&str]) -> (App, TempDir) {
    let tenants = tempfile::tempdir().unwrap();
    for (tenant, key) in [("acme", Some(1)), ("beta", Some(2)), ("zeta", None)] {
        with_key(tenants.path(), tenant, key);
    }
    let mut command = app("axum_byok");
    command.env("FAL_KEY", key_text(HOUSE)).arg("--tenants").arg(tenants.path());
    command.args(["--fal-run-url", run_url, "--fal-queue-url", queue_url]).args(more);
    (App::of(command).await, tenants)
}

async fn fal() -> MockFal {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.accept(&key(HOUSE));
    fal
}

pub(crate) fn run(authorization: Option<&str>, path: &str) -> Request<String> {
    let mut request = Request::post(path);
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    request.body(r#"{"prompt":"a cat"}"#.to_owned()).unwrap()
}

pub(crate) const ACME: Option<&str> = Some("Bearer hush-acme");
const BETA: Option<&str> = Some("Bearer hush-beta");
const ZETA: Option<&str> = Some("Bearer hush-zeta");

/// What fal was shown since it was last asked.
fn presented(fal: &MockFal) -> Vec<Presented> {
    let presented = fal.received().into_iter().map(|call| call.presented).collect();
    fal.clear_received();
    presented
}

#[tokio::test]
async fn each_tenant_runs_with_its_own_key_and_none_with_the_houses() {
    let fal = fal().await;
    let (app, tenants) = start(&fal.run_origin(), &fal.queue_origin(), &[]).await;
    let id = |n| key(n).key_id().cloned();

    let answer = app.send(run(ACME, "/run/fal-ai/flux/dev?token=hush")).await;
    assert_eq!((answer.status.as_u16(), answer.json()["path"].as_str()), (200, Some("/fal-ai/flux/dev")));
    assert_eq!(answer.json()["prompt"], "a cat");
    assert_eq!(presented(&fal), [Presented::Accepted(id(1))]);

    // Each of these is about the tenant's own key or account, so none of them is a 502.
    let refused = async |tenant| app.send(run(tenant, "/run/fal-ai/flux")).await.problem();
    assert_eq!(refused(BETA).await, (409, "unknown_credential".to_owned()));
    assert_eq!(presented(&fal), [Presented::Refused(id(2))]);

    assert_eq!(app.send(run(ZETA, "/run/fal-ai/flux")).await.problem(), (409, "no_key".to_owned()));
    for nobody in [None, Some("Bearer "), Some("Bearer hush-acm"), Some("hush-acme"), Some("Key id-1:secret-of-id-1")] {
        let answer = app.send(run(nobody, "/run/fal-ai/flux")).await;
        assert_eq!(answer.problem(), (401, "unknown_tenant".to_owned()), "{nobody:?}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    for path in ["/run/../a", "/run/a/%2e%2E/..", "/run/a%2f..%5cb"] {
        assert_eq!(app.send(run(ACME, path)).await.problem(), (404, "no_such_app".to_owned()), "{path}");
    }
    assert_eq!(presented(&fal), []);

    fal.lock(Lock::TopUp);
    assert_eq!(refused(ACME).await, (409, "account_locked".to_owned()));
    fal.unlock();
    fal.deny(&key(1));
    assert_eq!(refused(ACME).await, (409, "insufficient_permissions".to_owned()));
    fal.accept(&key(1));
    // The app's own 401 says nothing about the key.
    fal.fail_next(1, Failure::Application(StatusCode::UNAUTHORIZED));
    assert_eq!(refused(ACME).await, (502, "application".to_owned()));

    // A tenant's key is replaced while this runs.
    fal.accept(&key(3));
    with_key(tenants.path(), "beta", Some(3));
    let report = app.ready_where(|status, report| status == 200 && report["tenants"]["beta"]["key_id"] == "id-3").await;
    assert_eq!((&report["tenants"]["acme"]["key_id"], &report["tenants"]["zeta"]), (&json!("id-1"), &json!(null)));
    fal.clear_received();
    assert_eq!(app.send(run(BETA, "/run/fal-ai/flux")).await.status, 200);
    assert_eq!(presented(&fal), [Presented::Accepted(id(3))]);
    app.end().await.well();
}

/// What an app sees that answers with redirects: the paths that were asked for, and which of them with a key.
#[derive(Clone, Default)]
struct Redirects {
    to: Arc<Mutex<String>>,
    seen: Arc<Mutex<Vec<(String, Option<String>)>>>,
}

async fn redirect(State(redirects): State<Redirects>, uri: Uri, headers: HeaderMap, body: String) -> Response {
    let key = headers.get("authorization").map(|key| key.to_str().unwrap().to_owned());
    redirects.seen.lock().unwrap().push((uri.path().to_owned(), key));
    if uri.path() == "/a/b" {
        let to = redirects.to.lock().unwrap().clone();
        return (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, to)]).into_response();
    }
    body.into_response()
}

/// An app chooses where its redirects lead, and the tenant would pay for what runs there.
#[tokio::test]
async fn no_redirect_of_an_app_is_followed() {
    let fal = fal().await;
    let (app_of_fal, elsewhere) = (Redirects::default(), Redirects::default());
    let run_host = Served::new(Router::new().fallback(redirect).with_state(app_of_fal.clone())).await;
    let else_host = Served::new(Router::new().fallback(redirect).with_state(elsewhere.clone())).await;
    let (app, _tenants) = start(&run_host.url, &fal.queue_origin(), &[]).await;
    for to in ["/c/d?hush".to_owned(), fal.queue_url("/c/d?hush").to_string(), format!("{}/c/d", else_host.url)] {
        app_of_fal.to.lock().unwrap().clone_from(&to);
        assert_eq!(app.send(run(ACME, "/run/a/b")).await.problem(), (502, "answer".to_owned()), "{to}");
        let seen = std::mem::take(&mut *app_of_fal.seen.lock().unwrap());
        assert!(seen == [("/a/b".to_owned(), Some(format!("Key {}", key_text(1))))], "{to}");
    }
    assert_eq!(elsewhere.seen.lock().unwrap().len(), 0);
    assert_eq!(presented(&fal), []);
    app.end().await.well();
}

#[tokio::test]
async fn a_shutdown_waits_for_what_a_tenant_has_running() {
    let fal = fal().await;
    let (app, _tenants) = start(&fal.run_origin(), &fal.queue_origin(), &["--drain-delay", "0"]).await;
    fal.set_latency(Duration::from_secs(2));
    let running = tokio::spawn(app.open(run(ACME, "/run/fal-ai/flux")));
    while fal.requests() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    app.signal("TERM").await;
    app.refuses_connections().await;
    assert_eq!(running.await.unwrap().unwrap().status(), 200);
    app.ended().await.well();
}

/// What is wrong with one tenant, and what is answered to its token meanwhile.
#[tokio::test]
async fn a_tenant_without_a_key_does_not_keep_others_from_service() {
    const UNKNOWN: (u16, &str) = (401, "unknown_tenant");
    let with = |name: &'static str, content: &'static str| {
        Box::new(move |beta: &Path| fs::write(beta.join(name), content).unwrap()) as Box<dyn Fn(&Path)>
    };
    let long = "a".repeat(100);
    let cases: [(&str, Box<dyn Fn(&Path)>, &str, (u16, &str)); 8] = [
        ("beta", with("token", " \n"), "beta/token: it is empty", UNKNOWN),
        ("beta", Box::new(|beta| fs::remove_file(beta.join("token")).unwrap()), "beta/token: No such file", UNKNOWN),
        ("beta", with("token", "hush-acme"), "they have the same token", UNKNOWN),
        ("beta", with("fal_key", ""), "the key of this tenant cannot be used yet", (409, "unusable_key")),
        ("beta", with("fal_key", "hush"), "the key of this tenant cannot be used yet", (409, "unusable_key")),
        ("beta", Box::new(|beta| fs::remove_file(beta.join("fal_key")).unwrap()), "", (409, "no_key")),
        (&long, Box::new(|_| {}), "the key of this tenant cannot be used yet", (409, "unusable_key")),
        (
            "stray",
            Box::new(|stray| {
                fs::remove_dir_all(stray).unwrap();
                fs::write(stray, "hush").unwrap();
            }),
            "stray/token: Not a directory",
            UNKNOWN,
        ),
    ];
    let fal = fal().await;
    fal.accept(&key(3));
    for (name, spoil, says, answer) in cases {
        let tenants = tempfile::tempdir().unwrap();
        for (tenant, key) in [("acme", 1), ("gamma", 3), (name, 2)] {
            with_key(tenants.path(), tenant, Some(key));
        }
        spoil(&tenants.path().join(name));
        let mut command = app("axum_byok");
        command.arg("--tenants").arg(tenants.path()).args(["--fal-run-url", &fal.run_origin()]);
        let app = App::of(command).await;
        assert_eq!(app.get("/readyz").await.status, 200, "{says}");
        assert_eq!(app.send(run(Some("Bearer hush-gamma"), "/run/fal-ai/flux")).await.status, 200, "{says}");
        let token = format!("Bearer hush-{name}");
        let (status, reason) = app.send(run(Some(&token), "/run/fal-ai/flux")).await.problem();
        assert_eq!((status, reason.as_str()), answer, "{says}");
        let is_out = app.admin("/readyz").await.json()["left_out"].to_string().contains(name);
        assert_eq!(is_out, answer == UNKNOWN, "{says}");
        // Two that share a token could run with each other's key.
        let acme = if says.contains("same token") { 401 } else { 200 };
        assert_eq!(app.send(run(ACME, "/run/fal-ai/flux")).await.status, acme, "{says}");
        let Ended { code, log } = app.end().await;
        assert!(code == Some(0) && !log.contains("hush") && !log.contains("secret-of"), "{log}");
        assert!(log.contains(says) && log.contains(name) != says.is_empty(), "{says}: {log}");
    }
}

#[tokio::test]
async fn a_key_that_comes_after_the_start_is_used() {
    let fal = fal().await;
    let (app, tenants) = start(&fal.run_origin(), &fal.queue_origin(), &[]).await;
    assert_eq!(app.send(run(ZETA, "/run/fal-ai/flux")).await.problem(), (409, "no_key".to_owned()));
    with_key(tenants.path(), "zeta", Some(1));
    assert_eq!(app.send(run(ZETA, "/run/fal-ai/flux")).await.status, 200);
    app.end().await.well();
}

#[tokio::test]
async fn without_tenants_the_server_is_not_ready_or_does_not_start() {
    let tenants = tempfile::tempdir().unwrap();
    let mut command = app("axum_byok");
    command.arg("--tenants").arg(tenants.path());
    let app_without_tenants = App::of(command).await;
    assert_eq!(app_without_tenants.get("/readyz").await.status, 503);
    app_without_tenants.end().await.well();

    let mut command = app("axum_byok");
    command.arg("--tenants").arg(tenants.path().join("hush"));
    let (code, _, told) = gives_up(command.args(["--listen", "127.0.0.1:0"])).await;
    assert!(code == Some(1) && told.contains("No such file"), "{told}");
    let (code, _, told) = gives_up(app("axum_byok").env("FAL_KEY", key_text(HOUSE))).await;
    assert!(code == Some(2) && told.contains("--tenants <DIR> is missing"), "{told}");
}
