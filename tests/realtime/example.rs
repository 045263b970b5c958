//! `examples/realtime_token` as a process: its options, its limits, and what it answers.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Request, uri::Scheme};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower_fal::mock::{MockFal, Presented};

use crate::{
    app::{Answer, App, KeyFile, app, gives_up, raise_limit},
    support::{key, key_text},
    world::{APP, PATIENCE, opens},
};

const NAME: &str = "realtime_token";
const PATH: &str = "/api/fal/token?app=acme/cats/realtime";

/// A fal behind TLS that takes key 1, with a certificate for this host.
struct TlsFal {
    fal: MockFal,
    address: SocketAddr,
    directory: TempDir,
    task: JoinHandle<()>,
}

impl TlsFal {
    async fn start(host: &str) -> Self {
        let fal = MockFal::start().await.unwrap();
        fal.accept(&key(1));
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(vec![host.to_owned()]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), cert.pem()).unwrap();
        let own_key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], own_key)
            .unwrap();
        let tls = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = fal.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, fal) = (tls.clone(), served.clone());
                connections.spawn(async move {
                    if let Ok(stream) = tls.accept(stream).await {
                        fal.serve_connection(stream, Scheme::HTTPS).await;
                    }
                });
            }
        });
        Self { fal, address, directory, task }
    }

    fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A server that has key 1 from a file.
    async fn server(&self, more: &[&str]) -> (App, KeyFile) {
        let file = KeyFile::new(&key_text(1));
        let (path, address, ca) = (file.path(), self.address.to_string(), self.ca());
        let mut arguments = vec!["--allow-app", "acme/*", "--key-file", path.to_str().unwrap()];
        arguments.extend(["--connect-to", &address, "--ca-file", ca.to_str().unwrap()]);
        arguments.extend(more);
        (App::start(NAME, &arguments).await, file)
    }

    fn mints(&self) -> Vec<Presented> {
        let calls = self.fal.received().into_iter().filter(|call| call.path.starts_with("/tokens/"));
        calls.map(|call| call.presented).collect()
    }
}

impl Drop for TlsFal {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Asks with these headers.
async fn ask(app: &App, path: &str, headers: &[(&'static str, &str)]) -> Answer {
    let mut request = Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    app.send(request.body(String::new()).unwrap()).await
}

fn rule(answer: &Answer) -> (u16, String) {
    assert_eq!(answer.headers["cache-control"], "no-store");
    (answer.status.as_u16(), answer.json()["rule"].as_str().unwrap().to_owned())
}

fn token(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_demo_needs_nothing_and_has_a_page() {
    let app = App::start(NAME, &["--demo"]).await;
    let answer = app.get("/api/fal/token?app=fal-ai/fast-lcm-diffusion/realtime").await;
    assert!(!token(&answer).is_empty());
    assert_eq!(answer.json()["expires_in"], 120);
    let page = app.get("/").await;
    assert!(page.body.contains(r#"data-app="fal-ai/fast-lcm-diffusion""#) && page.body.contains("/page.js"));
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("connect-src 'self' ws://127.0.0.1:"), "{policy}");
    for file in ["/page.js", "/page.css"] {
        assert_eq!(app.get(file).await.status, 200);
    }
    assert_eq!(app.get("/api/fal/token?app=fal-ai/other/realtime").await.status, 403);
    let none = app.get("/none").await;
    assert_eq!((none.status.as_u16(), none.headers["x-content-type-options"].to_str().unwrap()), (404, "nosniff"));
    app.end().await.well();
}

#[tokio::test]
async fn tokens_are_minted_at_fals_own_host_over_tls() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let (app, _key) = fal.server(&["--allow-anonymous", "--lifetime", "60"]).await;
    let answer = app.get(PATH).await;
    assert_eq!(answer.json()["expires_in"], 60);
    assert!(opens(&fal.fal, APP, &token(&answer)).await);
    let [call] =
        fal.fal.received().into_iter().filter(|call| call.method == "POST").collect::<Vec<_>>().try_into().unwrap();
    assert_eq!((call.host.as_str(), call.path.as_str()), ("rest.fal.ai", "/tokens/realtime"));
    assert_eq!(call.presented, Presented::Accepted(key(1).key_id().cloned()));
    assert_eq!(app.get("/").await.status, 404, "the page is for --demo only");
    app.end().await.well();
}

#[tokio::test]
async fn a_certificate_of_another_host_gets_no_request() {
    let fal = TlsFal::start("fal.run").await;
    let (app, _key) = fal.server(&["--allow-anonymous"]).await;
    let answer = app.get(PATH).await;
    assert_eq!(rule(&answer), (503, "no_token".to_owned()));
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(fal.fal.requests(), 0);
    let log = app.end().await.well();
    assert!(log.contains("a realtime token could not be minted") && log.contains("certificate"), "{log}");
}

#[tokio::test]
async fn callers_have_tokens_and_those_can_change() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let callers = KeyFile::new("# those who may ask\nann token-of-ann\n\ntoken-of-bob\n");
    let path = callers.path();
    let (app, _key) = fal.server(&["--auth-token-file", path.to_str().unwrap()]).await;
    for headers in [&[][..], &[("authorization", "Bearer other")], &[("authorization", "ann token-of-ann")]] {
        assert_eq!(rule(&ask(&app, PATH, headers).await), (401, "caller".to_owned()), "{headers:?}");
        let other = ask(&app, "/api/fal/token?app=other/cats", headers).await;
        assert_eq!(rule(&other), (401, "caller".to_owned()), "{headers:?}");
    }
    for value in ["Bearer token-of-ann", "Key token-of-ann", "Bearer token-of-bob"] {
        // The name by which a load balancer calls it.
        token(&ask(&app, PATH, &[("authorization", value), ("host", "app.example")]).await);
    }
    let ann = &[("authorization", "Bearer token-of-ann")];
    let other = ask(&app, "/api/fal/token?app=other/cats", ann).await;
    assert_eq!(rule(&other), (403, "realtime".to_owned()));
    assert_eq!(fal.mints().len(), 1);

    callers.replace("new-token-of-ann\n");
    let replaced = timeout(PATIENCE, async {
        while ask(&app, PATH, ann).await.status != 401 {
            sleep(Duration::from_millis(50)).await;
        }
    });
    replaced.await.expect("the file is not read again");
    token(&ask(&app, PATH, &[("authorization", "Bearer new-token-of-ann")]).await);
    let log = app.end().await.well();
    assert!(!log.contains("token-of-ann"), "{log}");
}

#[tokio::test]
async fn everybody_may_ask_by_a_name_of_this_machine_and_those_given() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let (app, _key) = fal.server(&["--allow-anonymous", "--host", "app.example"]).await;
    for host in ["evil.example", "127.0.0.1.evil.example"] {
        assert_eq!(rule(&ask(&app, PATH, &[("host", host)]).await), (400, "host".to_owned()), "{host}");
    }
    assert_eq!(fal.fal.requests(), 0);
    for host in ["localhost", "127.0.0.1", "app.example:443"] {
        token(&ask(&app, PATH, &[("host", host)]).await);
    }
    app.end().await.well();
}

#[tokio::test]
async fn a_caller_who_asks_too_often_is_told_when_to_come_back() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let callers = KeyFile::new("token-of-ann\ntoken-of-bob\n");
    let path = callers.path();
    let (app, _key) = fal.server(&["--auth-token-file", path.to_str().unwrap()]).await;
    let refused = timeout(PATIENCE, async {
        for count in 0.. {
            // Whatever it says about the address.
            let from = format!("192.0.2.{}", count % 250);
            let headers = [("authorization", "Bearer token-of-ann"), ("x-forwarded-for", &from)];
            let answer = ask(&app, PATH, &headers).await;
            if answer.status != 200 {
                return (count, answer);
            }
        }
        unreachable!()
    });
    let (count, refused) = refused.await.expect("there is no limit");
    assert!(count >= 60, "{count}");
    assert_eq!(rule(&refused), (429, "rate".to_owned()));
    token(&ask(&app, PATH, &[("authorization", "Bearer token-of-bob")]).await);
    let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=2).contains(&seconds), "{seconds}");
    sleep(Duration::from_secs(seconds)).await;
    token(&ask(&app, PATH, &[("authorization", "Bearer token-of-ann")]).await);
    assert_eq!(fal.mints().len(), 1);
    app.end().await.well();
}

#[tokio::test]
async fn everybody_is_counted_by_the_address_of_the_connection() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let (app, _key) = fal.server(&["--allow-anonymous"]).await;
    let limited = timeout(PATIENCE, async {
        let mut count = 0_u32;
        loop {
            let from = format!("192.0.2.{}", count % 250);
            let headers = [("x-forwarded-for", from.as_str()), ("forwarded", &format!("for={from}"))];
            if ask(&app, PATH, &headers).await.status == 429 {
                return;
            }
            count += 1;
        }
    });
    limited.await.expect("there is no limit");
    app.end().await.well();
}

#[tokio::test]
async fn hundreds_of_callers_cause_one_call() {
    raise_limit();
    let fal = TlsFal::start("rest.fal.ai").await;
    fal.fal.set_latency(Duration::from_millis(300));
    // As many connections as the server takes where 1,024 files are all that there is.
    let lines: Vec<_> = (0..400).map(|number| format!("token-of-caller-{number}")).collect();
    let callers = KeyFile::new(&lines.join("\n"));
    let path = callers.path();
    let (app, _key) = fal.server(&["--auth-token-file", path.to_str().unwrap()]).await;
    let mut asking = JoinSet::new();
    for line in &lines {
        let request = Request::get(PATH).header("authorization", format!("Bearer {line}")).body(String::new());
        let answer = app.open(request.unwrap());
        asking.spawn(async move { token(&Answer::of(answer.await.unwrap()).await) });
    }
    let mut tokens = asking.join_all().await;
    tokens.dedup();
    assert_eq!((tokens.len(), fal.mints().len()), (1, 1));
    app.end().await.well();
}

#[tokio::test]
async fn a_key_is_rotated_and_nobody_notices() {
    let fal = TlsFal::start("rest.fal.ai").await;
    let (app, file) = fal.server(&["--allow-anonymous"]).await;
    token(&app.get(PATH).await);
    fal.fal.accept(&key(2));
    file.replace(&key_text(2));
    fal.fal.revoke(&key(1));
    token(&app.get("/api/fal/token?app=acme/dogs/realtime").await);
    assert_eq!(fal.mints().last().unwrap().key_id(), key(2).key_id());
    app.end().await.well();
}

#[tokio::test]
async fn a_fal_that_does_not_answer_is_a_503_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let held = tokio::spawn(async move {
        let mut streams = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            streams.push(stream);
        }
    });
    let file = KeyFile::new(&key_text(1));
    let path = file.path();
    let arguments = ["--allow-app", "acme/*", "--allow-anonymous", "--key-file", path.to_str().unwrap()];
    let app = App::start(NAME, &[&arguments[..], &["--connect-to", &address]].concat()).await;
    let began = Instant::now();
    let answer = app.get(PATH).await;
    assert_eq!(rule(&answer), (503, "no_token".to_owned()));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    app.end().await.well();
    held.abort();
}

#[tokio::test]
async fn what_is_missing_is_named() {
    for (arguments, told) in [
        (&["--allow-app", "a/b"][..], "--auth-token-file or --allow-anonymous is missing"),
        (&["--allow-anonymous"], "--allow-app <PATTERN>... is missing."),
        (&["--allow-app", "a/b", "--allow-anonymous", "--auth-token-file", "x"], "cannot be used together with"),
        (&["--demo", "--lifetime", "0"], "The value of --lifetime <SECS> cannot be used"),
        (&["--demo", "--lifetime", "3541"], "The value of --lifetime <SECS> cannot be used"),
        (&["--demo", "--connect-to", "127.0.0.1:1"], "cannot be used together with"),
        (&["--demo", "--connect-to", "hush"], "The value of --connect-to <HOST:PORT> cannot be used"),
    ] {
        let (code, printed, explained) = gives_up(app(NAME).args(arguments)).await;
        assert_eq!((code, printed.as_str()), (Some(2), ""), "{arguments:?}: {explained}");
        let is_one_line = explained.matches('\n').count() == 1 && explained.ends_with(" See --help.\n");
        assert!(is_one_line && explained.contains(told) && !explained.contains("hush"), "{arguments:?}: {explained}");
    }
}

#[tokio::test]
async fn it_does_not_start_without_what_it_needs() {
    let anonymous = ["--allow-app", "acme/*", "--allow-anonymous"];
    let no_key = gives_up(app(NAME).args(anonymous)).await;
    assert_eq!((no_key.0, no_key.1.as_str()), (Some(1), ""));
    assert!(no_key.2.contains("--key-file"), "{}", no_key.2);

    let (key, empty) = (KeyFile::new(&key_text(1)), KeyFile::new("# nobody\n"));
    let (key, empty) = (key.path().to_str().unwrap().to_owned(), empty.path().to_str().unwrap().to_owned());
    for (arguments, told) in [
        (vec!["--allow-app", "acme//x", "--allow-anonymous", "--key-file", &key], "an application of the list"),
        (vec!["--allow-app", "a/b", "--auth-token-file", &empty, "--key-file", &key], "there must be one"),
        (vec!["--allow-app", "a/b", "--auth-token-file", "/nowhere", "--key-file", &key], "cannot read /nowhere"),
        (vec!["--allow-app", "a/b", "--allow-anonymous", "--key-file", &key, "--ca-file", &key], "no certificate"),
        (vec!["--allow-app", "a/b", "--allow-anonymous", "--key-file", &key, "--host", "a b"], "cannot be one"),
    ] {
        let (code, printed, explained) = gives_up(app(NAME).args(&arguments)).await;
        assert_eq!((code, printed.as_str()), (Some(1), ""), "{arguments:?}: {explained}");
        assert!(explained.contains(told) && !explained.contains("secret"), "{arguments:?}: {explained}");
    }
}
