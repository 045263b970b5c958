//! Signals. The whole process gets them: the stores of one test are the only ones that listen to SIGHUP, and the process
//! that is stopped is a child.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalAuthLayer, FalRetryLayer, mock::MockFal, origin::FalOrigins, retry::ReplayBody,
    source::FileSource,
};

use crate::support::{Says, Script, current, key, key_text};

#[tokio::test]
async fn sighup_asks_for_a_load_that_begins_after_it() {
    tokio::time::timeout(Duration::from_secs(60), hang_up_and_look()).await.expect("a SIGHUP was not heard");
}

async fn hang_up_and_look() {
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).reload_on_sighup().build().await.unwrap();

    source.brings(2);
    hang_up().await;
    source.loads_reach(2).await;
    reaches(&store, 2).await;

    // While a load is under way that has made up its mind already.
    source.close();
    let reload = tokio::spawn({
        let store = store.clone();
        async move { store.reload().await }
    });
    source.loads_reach(3).await;
    source.brings(3);
    hang_up().await;
    source.open();
    reload.await.unwrap().unwrap();
    reaches(&store, 3).await;
    assert_eq!((current(&store), source.loads()), ("id-3".to_owned(), 4));

    // What goes wrong is no end of it.
    source.says(Says::Error);
    hang_up().await;
    source.loads_reach(5).await;
    source.brings(4);
    hang_up().await;
    reaches(&store, 4).await;

    // The last handle ends it all; the process goes on.
    drop(store);
    hang_up().await;
    let store = CredentialStore::builder(source).reload_on_sighup().build().await.unwrap();
    assert_eq!(current(&store), "id-4");
}

/// Sends it to this process, and returns when everybody who listens has it.
async fn hang_up() {
    let mut hangups = signal(SignalKind::hangup()).unwrap();
    // A shell's own `kill`, as not every system has the program.
    assert!(Command::new("sh").args(["-c", "kill -HUP $PPID"]).status().unwrap().success());
    hangups.recv().await.unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

async fn reaches(store: &CredentialStore, generation: u64) {
    store.subscribe().wait_for(|status| status.generation.get() == generation).await.unwrap();
}

const FILE: &str = "TOWER_FAL_STOPPED_TEST";
const REQUESTS: usize = 8;
const RELOAD_WAIT: Duration = Duration::from_secs(3);

#[test]
fn a_process_that_was_stopped_sends_with_the_new_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fal_key");
    fs::write(&path, key_text(1)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "signal::stopped_child", "--nocapture", "--test-threads=1"])
        .env(FILE, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("all are refused") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the child ended early");
    }

    let kill = |signal: &str| {
        let command = format!("kill -{signal} {}", child.id());
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
    };
    kill("STOP");
    let aside = path.with_extension("aside");
    fs::write(&aside, key_text(2)).unwrap();
    fs::rename(aside, &path).unwrap();
    std::thread::sleep(RELOAD_WAIT + Duration::from_millis(500)); // for so long it is stopped
    kill("CONT");

    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("8 of 8 accepted"), "{rest}");
}

/// No test of its own: without the variable it does nothing.
#[test]
fn stopped_child() {
    let Some(path) = std::env::var_os(FILE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let fal = runtime.block_on(MockFal::start()).unwrap();
    let requests = runtime.block_on(refused(&fal, Path::new(&path)));
    println!("all are refused");
    let answers = runtime.block_on(requests.join_all());
    let accepted = answers.iter().filter(|status| **status == Some(StatusCode::OK)).count();
    println!("{accepted} of {REQUESTS} accepted");
}

/// Requests that were refused, and wait for a newer key.
async fn refused(fal: &MockFal, path: &Path) -> JoinSet<Option<StatusCode>> {
    fal.accept(&key(2));
    let source = FileSource::new(path).poll_every(Duration::from_secs(60 * 60));
    let store = CredentialStore::builder(source).build().await.unwrap();
    let client = ServiceBuilder::new()
        .layer(FalRetryLayer::new(store.clone()).reload_wait(RELOAD_WAIT))
        .layer(FalAuthLayer::new(store.clone()).origins(FalOrigins::new().and(&fal.run_origin()).unwrap()))
        .service(Client::builder(TokioExecutor::new()).build_http::<ReplayBody<Full<Bytes>>>());
    let mut requests = JoinSet::new();
    for _ in 0..REQUESTS {
        let request = Request::post(fal.run_url("/fal-ai/flux")).body(Full::new(Bytes::from_static(b"{}"))).unwrap();
        let answer = client.clone().oneshot(request);
        requests.spawn(async { answer.await.ok().map(|answer| answer.status()) });
    }
    // The source has brought the old key once more, and the requests wait for another one.
    let asked = store.status().checked_at;
    while fal.requests() < REQUESTS as u64 || store.status().checked_at == asked {
        tokio::task::yield_now().await;
    }
    requests
}
