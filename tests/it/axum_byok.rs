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
use tower_fal::mock::{Lock, MockFal, Presented};

use crate::{
    app::{App, Served, app, gives_up},
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
async fn start(run_url: &str, queue_url: &str, more: &[&str]) -> (App, TempDir) {
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

fn run(authorization: Option<&str>, path: &str) -> Request<String> {
    let mut request = Request::post(path);
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    request.body(r#"{"prompt":"a cat"}"#.to_owned()).unwrap()
}

const ACME: Option<&str> = Some("Bearer hush-acme");
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

    assert_eq!(app.send(run(BETA, "/run/fal-ai/flux")).await.problem(), (409, "key_refused".to_owned()));
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
    assert_eq!(app.send(run(ACME, "/run/fal-ai/flux")).await.problem(), (503, "account_locked".to_owned()));
    fal.unlock();

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

#[tokio::test]
async fn a_redirect_within_the_origin_keeps_the_key_and_one_to_another_has_none_at_all() {
    let fal = fal().await;
    let (app_of_fal, elsewhere) = (Redirects::default(), Redirects::default());
    let run_host = Served::new(Router::new().fallback(redirect).with_state(app_of_fal.clone())).await;
    let else_host = Served::new(Router::new().fallback(redirect).with_state(elsewhere.clone())).await;
    let (app, _tenants) = start(&run_host.url, &fal.queue_origin(), &[]).await;
    let led_to = async |to: String| {
        *app_of_fal.to.lock().unwrap() = to;
        let answer = app.send(run(ACME, "/run/a/b")).await;
        (answer, std::mem::take(&mut *app_of_fal.seen.lock().unwrap()))
    };
    let with_key = |path: &str| (path.to_owned(), Some(format!("Key {}", key_text(1))));

    let (answer, seen) = led_to("/c/d?hush".to_owned()).await;
    assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, r#"{"prompt":"a cat"}"#));
    assert!(seen == [with_key("/a/b"), with_key("/c/d")], "not twice with the tenant's key");

    // fal's other host, which is admitted: `FollowRedirect` drops the extension, and nothing takes its place.
    let (answer, seen) = led_to(fal.queue_url("/c/d?hush").to_string()).await;
    assert_eq!(answer.problem(), (502, "led_elsewhere".to_owned()));
    assert!(seen == [with_key("/a/b")]);
    assert_eq!(presented(&fal), [Presented::Nothing]);

    // No place for a server to go.
    let (answer, _) = led_to(format!("{}/c/d", else_host.url)).await;
    assert_eq!(answer.problem(), (502, "led_elsewhere".to_owned()));
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

#[tokio::test]
async fn tenants_that_cannot_be_told_apart_or_have_half_a_key_end_it_before_it_starts() {
    let file = |name, content| {
        move |tenants: &Path| {
            with_key(tenants, "beta", None);
            fs::write(tenants.join("beta").join(name), content).unwrap();
        }
    };
    let cases: [(&str, Box<dyn Fn(&Path)>); 5] = [
        ("it is empty, or another tenant's too", Box::new(file("token", " \n"))),
        ("it is empty, or another tenant's too", Box::new(file("token", "hush-acme"))),
        ("beta/fal_key: holds no credential", Box::new(file("fal_key", "hush"))),
        ("beta/token: No such file", Box::new(|tenants| fs::create_dir(tenants.join("beta")).unwrap())),
        ("No such file", Box::new(|tenants| fs::remove_dir_all(tenants).unwrap())),
    ];
    for (says, spoil) in cases {
        let tenants = tempfile::tempdir().unwrap();
        with_key(tenants.path(), "acme", Some(1));
        spoil(tenants.path());
        let mut command = app("axum_byok");
        let (code, _, told) =
            gives_up(command.args(["--listen", "127.0.0.1:0", "--tenants"]).arg(tenants.path())).await;
        assert_eq!(code, Some(1), "{told}");
        assert!(told.contains(says) && !told.contains("hush") && !told.contains("secret-of"), "{told}");
    }
    let (code, _, told) = gives_up(app("axum_byok").env("FAL_KEY", key_text(HOUSE))).await;
    assert!(code == Some(2) && told.contains("--tenants <DIR> is missing"), "{told}");
}
