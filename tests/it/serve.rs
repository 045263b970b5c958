//! `examples/serve`: what every example server does with connections, probes and browsers, whatever its routes are.

use std::{
    convert::Infallible,
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Body, response::IntoResponse as _};
use bytes::Bytes;
use futures_util::{future::join_all, stream};
use http::{Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{oneshot, watch},
    task::JoinSet,
    time::{Instant, timeout},
};
use tower_fal::mock::MockFal;

use self::parts::connection::{self, Limits, Phase};
use crate::{
    app::{Answer, App, Ended, Served, app, raise_limit},
    axum_byok::{self, ACME},
    support::{key, nobody},
};

/// What serves one connection, by itself.
#[path = "../../examples/serve"]
mod parts {
    pub(super) mod connection;
    mod seldom;
}

const NAME: &str = "axum_images";

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a probe may take. kubelet waits 1 s; the tests of a whole machine may run beside this one.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// The beginning of a connection of HTTP/2, with its settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// `GET /` for stream 1 of HTTP/2: complete.
const GET: &[u8] = b"\0\0\x0e\x01\x05\0\0\0\x01\x82\x84\x86\x41\x09localhost";

/// The beginning of a `GET` for stream 3: `HEADERS` without `END_HEADERS`.
const HALF_A_GET: &[u8] = b"\0\0\x01\x01\x01\0\0\0\x03\x82";

/// The beginning of a request of HTTP/1.1.
const HALF_A_HEAD: &[u8] = b"POST /images HTTP/1.1\r\nhost: localhost\r\nx-a: ";

fn order() -> Request<String> {
    let order = json!({ "prompt": "a cat" }).to_string();
    Request::post("/images").header("content-type", "application/json").body(order).unwrap()
}

/// The example that hands answers of any length on, and its tenants.
async fn byok(run_url: &str, more: &[&str]) -> (App, TempDir) {
    axum_byok::start(run_url, run_url, more).await
}

/// A fal that takes the key of the first tenant.
async fn fal_of_acme() -> MockFal {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal
}

fn run(path: &str) -> Request<String> {
    axum_byok::run(ACME, path)
}

/// A connection on which these bytes were sent.
async fn with_sent(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// Reads until the server closes the connection.
async fn until_closed(mut stream: TcpStream) {
    let mut read = vec![0; 64 * 1024];
    let closed = timeout(PATIENCE, async { while !matches!(stream.read(&mut read).await, Ok(0) | Err(_)) {} });
    closed.await.expect("it stays open");
}

#[tokio::test]
async fn a_connection_without_a_complete_request_is_closed() {
    let app = App::start(NAME, &["--demo", "--header-timeout", "1"]).await;
    let mut connections = JoinSet::new();
    for bytes in [
        b"".to_vec(),
        HALF_A_HEAD.to_vec(),
        b"PRI * HTT".to_vec(),
        PREFACE[..24].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, HALF_A_GET].concat(),
    ] {
        let address = app.address().to_owned();
        connections.spawn(async move {
            let began = Instant::now();
            until_closed(with_sent(&address, &bytes).await).await;
            assert!(began.elapsed() >= Duration::from_secs(1), "{bytes:?}: too early");
        });
    }
    connections.join_all().await;
    let log = app.end().await.well();
    assert_eq!(log.matches("no request was complete in time").count(), 1, "once a minute: {log}");
}

/// Bytes that come one by one do not give it more time.
#[tokio::test]
async fn a_head_that_trickles_is_cut_off() {
    let app = App::start(NAME, &["--demo", "--header-timeout", "1"]).await;
    let (mut read, mut write) = with_sent(app.address(), HALF_A_HEAD).await.into_split();
    let trickle = async {
        while write.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut answer = Vec::new();
    tokio::select! {
        () = trickle => {}
        _ = timeout(PATIENCE, read.read_to_end(&mut answer)) => {}
    }
    assert_eq!(answer, b"");
    app.end().await.well();
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_the_timeout() {
    let app = App::start(NAME, &["--demo", "--header-timeout", "600", "--idle-timeout", "1"]).await;
    let get = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut connections = JoinSet::new();
    for bytes in [
        get.to_vec(),
        [&get[..], HALF_A_HEAD].concat(),
        [PREFACE, GET].concat(),
        // After a complete request, too.
        [PREFACE, GET, HALF_A_GET].concat(),
    ] {
        let address = app.address().to_owned();
        connections.spawn(async move {
            let began = Instant::now();
            until_closed(with_sent(&address, &bytes).await).await;
            assert!(began.elapsed() >= Duration::from_secs(1), "{bytes:?}: too early");
        });
    }
    connections.join_all().await;
    app.end().await.well();
}

/// Tokio gives a task so many steps before others get their turn. A task that has used them up learns nothing of its timers.
#[tokio::test]
async fn an_idle_connection_is_closed_after_a_busy_answer() {
    let busy = || async {
        for _ in 0..1000 {
            tokio::task::consume_budget().await;
        }
    };
    let router = Router::new().fallback(busy);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let client = with_sent(&address, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let (_phase, phase) = watch::channel(Phase::Open);
    let times = Limits { header_timeout: PATIENCE, idle_timeout: Duration::from_millis(200) };
    let (stream, _) = listener.accept().await.unwrap();
    let served = tokio::spawn(connection::serve(stream, router, times, phase));
    until_closed(client).await;
    served.await.unwrap();
}

#[tokio::test]
async fn a_request_that_waits_for_fal_is_not_cut_off() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &["--header-timeout", "0.2", "--idle-timeout", "0.2"]).await;
    fal.set_latency(Duration::from_millis(600));
    assert_eq!(app.send(order()).await.status, 200);
    app.end().await.well();
}

#[tokio::test]
async fn a_stream_that_waits_for_its_next_event_is_not_cut_off() {
    let fal = fal_of_acme().await;
    let (app, _tenants) = byok(&fal.run_origin(), &["--header-timeout", "0.2", "--idle-timeout", "0.2"]).await;
    fal.hold_events_after(1);
    let mut stream = app.open(run("/run/fal-ai/flux/stream")).await.unwrap();
    stream.frame().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(800)).await;
    fal.hold_events_after(usize::MAX);
    let rest = Answer::of(stream).await.body;
    assert_eq!(rest.matches("data: ").count(), 2, "{rest}");
    app.end().await.well();
}

/// An app that answers without end, and says when nobody reads it any more.
async fn endless() -> (Served, oneshot::Receiver<Infallible>) {
    let (sender, dropped) = oneshot::channel();
    let sender = Arc::new(Mutex::new(Some(sender)));
    let answer = move || {
        let sender = sender.lock().unwrap().take();
        let frames = stream::repeat_with(move || {
            let _still_here = &sender;
            Ok::<_, Infallible>(Bytes::from_static(&[b'a'; 16 * 1024]))
        });
        std::future::ready(Body::from_stream(frames).into_response())
    };
    (Served::new(Router::new().fallback(answer)).await, dropped)
}

#[tokio::test]
async fn a_peer_that_does_not_read_its_answer_is_cut_off() {
    let head =
        "POST /run/a HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer hush-acme\r\ncontent-length: 0\r\n\r\n";
    let headers = b"\x83\x86\x41\x09localhost\x44\x06/run/a\x57\x10Bearer hush-acme";
    for (request, reads) in [
        (head.as_bytes().to_vec(), false),
        (head.as_bytes().to_vec(), true),
        // HTTP/2 has a window, which is never opened here.
        ([PREFACE, &[0, 0, headers.len() as u8], b"\x01\x05\0\0\0\x01", headers].concat(), false),
    ] {
        let (fal, mut dropped) = endless().await;
        let (app, _tenants) = byok(&fal.url, &["--idle-timeout", "1"]).await;
        let began = Instant::now();
        let mut stream = with_sent(app.address(), &request).await;
        if reads {
            let mut buffer = vec![0; 64 * 1024];
            while began.elapsed() < Duration::from_secs(3) {
                assert!(stream.read(&mut buffer).await.unwrap() > 0, "cut off although it reads");
            }
            assert!(dropped.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
        } else {
            assert!(timeout(PATIENCE, &mut dropped).await.expect("it waits for ever").is_err());
            assert!(began.elapsed() >= Duration::from_secs(1), "too early");
        }
        drop(stream);
        app.end().await.well();
    }
}

#[tokio::test]
async fn when_no_connection_is_left_those_without_a_request_make_room() {
    let fal = MockFal::start().await.unwrap();
    let times = ["--max-connections", "16", "--header-timeout", "600", "--idle-timeout", "600"];
    let (app, _key) = App::against(NAME, &fal, &times).await;
    fal.set_latency(Duration::from_secs(600));
    let under_way = tokio::spawn(app.open(order()));
    while fal.requests() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let get = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut without_request = Vec::new();
    for n in 0..60 {
        let bytes: &[u8] = [&b""[..], HALF_A_HEAD, PREFACE, get][n % 4];
        without_request.push(with_sent(app.address(), bytes).await);
    }
    assert_eq!(app.get("/healthz").await.status, 200);
    assert!(!under_way.is_finished(), "what has a request stays");
    under_way.abort();
    drop(without_request);
    let log = app.end().await.well();
    assert_eq!(log.matches("no connection is left").count(), 1, "once a minute: {log}");
}

/// The peak of the resident memory, in MiB.
fn peak(app: &App) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", app.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() / 1024
}

/// How many connections the public listener has.
async fn connections(app: &App) -> u64 {
    let answer = app.admin("/metrics").await;
    let line = answer.body.lines().find_map(|line| line.strip_prefix(r#"server_connections{listener="public"} "#));
    line.unwrap().parse().unwrap()
}

/// `count` half-sent heads and as many silent connections at once. Returns how long it took until the server had closed
/// them.
async fn flood(app: &App, count: usize, header_timeout: Duration) -> Duration {
    let began = Instant::now();
    let mut attackers = JoinSet::new();
    for n in 0..2 * count {
        let address = app.address().to_owned();
        attackers.spawn(async move {
            let stream = with_sent(&address, if n % 2 == 0 { HALF_A_HEAD } else { b"" }).await;
            until_closed(stream).await;
        });
    }
    while connections(app).await == 0 {}
    // Meanwhile probes are answered at once, and a caller with a complete request gets an answer in time.
    let call = async {
        let get = app.raw("GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let answer = timeout(header_timeout, get).await.expect("no answer in time");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    };
    let closed = async {
        while connections(app).await > 0 || began.elapsed() < header_timeout {
            for path in ["/healthz", "/readyz"] {
                let answer = timeout(PROBE_TIMEOUT, app.admin(path)).await.expect("a probe died");
                assert_eq!(answer.status, 200);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        began.elapsed()
    };
    let ((), closed) = tokio::join!(call, closed);
    closed
}

async fn survives_a_flood(count: usize, max_connections: usize, header_timeout: Duration) {
    raise_limit();
    let seconds = header_timeout.as_secs().to_string();
    let arguments = ["--demo", "--header-timeout", &seconds, "--drain-delay", "0", "--drain-timeout", "25"];
    let app = App::start(NAME, &[&arguments[..], &["--max-connections", &max_connections.to_string()]].concat()).await;
    let took = flood(&app, count, header_timeout).await;
    // Those that found no room wait in the system's queue, and come in as the others are closed.
    assert!(took < header_timeout + Duration::from_secs((2 * count / max_connections) as u64), "{took:?}");
    assert!(peak(&app) < 128, "{} MiB", peak(&app));

    // A shutdown does not wait for half-sent heads.
    let mut half = Vec::new();
    for _ in 0..50 {
        half.push(with_sent(app.address(), HALF_A_HEAD).await);
    }
    assert_eq!(app.get("/healthz").await.status, 200);
    let began = Instant::now();
    app.signal("TERM").await;
    let log = app.ended().await.well();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(!log.contains("still open"), "{log}");
    assert!(log.lines().count() < 20, "an attack is not a line for each connection: {log}");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn half_sent_heads_and_silent_connections_do_no_harm() {
    survives_a_flood(250, 100, Duration::from_secs(3)).await;
}

#[cfg(target_os = "linux")]
#[ignore = "needs more than ten thousand open files"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_connections_without_a_request_do_no_harm() {
    survives_a_flood(5000, 1000, Duration::from_secs(10)).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn with_few_open_files_probes_are_answered_and_the_log_says_it() {
    let inner = app(NAME);
    let mut command = Command::new("sh");
    command.args(["-c", r#"ulimit -n 256 && exec "$0" "$@""#]).arg(inner.as_std().get_program());
    command.args(["--demo", "--header-timeout", "2"]).kill_on_drop(true);
    let app = App::of(command).await;
    let mut streams = Vec::new();
    for _ in 0..200 {
        streams.push(with_sent(app.address(), HALF_A_HEAD).await);
        assert_eq!(timeout(PROBE_TIMEOUT, app.admin("/readyz")).await.unwrap().status, 200);
    }
    assert_eq!(app.get("/healthz").await.status, 200);
    let log = app.end().await.well();
    assert!(log.contains("the limit of open files") && log.contains("possible=96"), "{log}");
}

/// In clock ticks, of which there are a hundred in a second.
#[cfg(target_os = "linux")]
fn processor_time(app: &App) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", app.pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn without_a_free_file_accepting_waits_and_does_not_spin() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};

    let app = App::start(NAME, &["--demo"]).await;
    let pid = Pid::from_raw(i32::try_from(app.pid()).unwrap());
    let maximum = prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum: None })
        .or_else(|_| {
            let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
            prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum })
        })
        .unwrap()
        .maximum;
    let mut waiting = with_sent(app.address(), b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let before = processor_time(&app);
    let mut buffer = [0; 64];
    assert!(timeout(Duration::from_secs(2), waiting.read(&mut buffer)).await.is_err(), "it was accepted");
    assert!(processor_time(&app) - before < 50, "{} ticks in 2 s", processor_time(&app) - before);

    prlimit(pid, Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    assert!(timeout(PATIENCE, waiting.read(&mut buffer)).await.unwrap().unwrap() > 0);
    let log = app.end().await.well();
    assert_eq!(log.matches("cannot accept connections").count(), 1, "once a minute: {log}");
}

#[tokio::test]
async fn what_is_too_much_is_answered_with_503_and_logged_once() {
    let fal = MockFal::start().await.unwrap();
    let (app, _key) = App::against(NAME, &fal, &["--max-requests", "2"]).await;
    fal.set_latency(Duration::from_secs(600));
    let under_way: Vec<_> = (0..2).map(|_| tokio::spawn(app.open(order()))).collect();
    while fal.requests() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..20 {
        let answer = app.send(order()).await;
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!(answer.problem(), (503, "overloaded".to_owned()));
    }
    // Which a probe does not feel.
    assert_eq!(app.get("/readyz").await.status, 200);
    under_way.iter().for_each(tokio::task::JoinHandle::abort);
    fal.set_latency(Duration::ZERO);
    let again = timeout(PATIENCE, async { while app.send(order()).await.status != 200 {} });
    again.await.expect("the place of a caller that went away is not free again");
    assert_eq!(fal.requests() - 2, 5, "the others never came to fal");
    let log = app.end().await.well();
    assert_eq!(log.matches("--max-requests").count(), 1, "once a minute: {log}");
    assert!(log.lines().count() < 15, "{log}");
}

#[tokio::test]
async fn a_stream_counts_as_under_way_until_its_end() {
    let fal = fal_of_acme().await;
    let (app, _tenants) = byok(&fal.run_origin(), &["--max-requests", "1"]).await;
    fal.hold_events_after(1);
    let mut stream = app.open(run("/run/fal-ai/flux/stream")).await.unwrap();
    stream.frame().await.unwrap().unwrap();
    assert_eq!(app.send(run("/run/fal-ai/flux")).await.problem(), (503, "overloaded".to_owned()));
    fal.hold_events_after(usize::MAX);
    stream.collect().await.unwrap();
    let again = timeout(PATIENCE, async { while app.send(run("/run/fal-ai/flux")).await.status != 200 {} });
    again.await.expect("the place of a stream that has ended is not free again");
    app.end().await.well();
}

#[tokio::test]
async fn a_stream_that_is_open_at_a_shutdown_is_read_to_its_end() {
    let fal = fal_of_acme().await;
    // Less than the stream takes: the timeout is for the start of an answer.
    let (app, _tenants) = byok(&fal.run_origin(), &["--drain-delay", "0", "--request-timeout", "5"]).await;
    fal.hold_events_after(1);
    let mut stream = app.open(run("/run/fal-ai/flux/stream")).await.unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let first = stream.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first.starts_with(b"data: "));
    app.signal("TERM").await;
    app.refuses_connections().await;
    fal.hold_events_after(usize::MAX);
    let rest = Answer::of(stream).await.body;
    assert_eq!(rest.matches("data: ").count(), 2, "{rest}");
    let log = app.ended().await.well();
    assert!(!log.contains("closing"), "{log}");
}

/// All on one connection, which nothing closes before its last answer is there.
#[tokio::test]
async fn a_shutdown_loses_nothing_over_http_2_either() {
    let fal = fal_of_acme().await;
    let (app, _tenants) = byok(&fal.run_origin(), &["--drain-delay", "2"]).await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let send = async |path: &str| {
        let (mut head, body) = run(path).into_parts();
        head.uri = format!("{}{path}", app.url).parse().unwrap();
        client.request(Request::from_parts(head, Full::from(body))).await.unwrap()
    };
    fal.hold_events_after(1);
    let mut stream = send("/run/fal-ai/flux/stream").await;
    assert_eq!(stream.version(), Version::HTTP_2);
    stream.frame().await.unwrap().unwrap();
    app.signal("TERM").await;
    app.ready_where(|status, _| status == 503).await;
    // All at once, so that none of them is sent when the delay is over, however busy the machine is.
    for answer in join_all((0..20).map(|_| send("/run/fal-ai/flux"))).await {
        // Which HTTP/2 forbids.
        assert_eq!((answer.status().as_u16(), answer.headers().get("connection")), (200, None));
    }
    app.refuses_connections().await;
    fal.hold_events_after(usize::MAX);
    assert_eq!(Answer::of(stream).await.body.matches("data: ").count(), 2);
    let log = app.ended().await.well();
    assert!(!log.contains("closing"), "{log}");
}

#[tokio::test]
async fn a_second_signal_ends_what_the_first_one_waits_for() {
    for delay in ["0", "600"] {
        let fal = fal_of_acme().await;
        let (app, _tenants) = byok(&fal.run_origin(), &["--drain-delay", delay, "--drain-timeout", "600"]).await;
        fal.hold_events_after(1);
        let mut stream = app.open(run("/run/fal-ai/flux/stream")).await.unwrap();
        stream.frame().await.unwrap().unwrap();
        app.signal("TERM").await;
        if delay == "0" {
            app.refuses_connections().await;
        } else {
            app.ready_where(|status, _| status == 503).await;
        }
        app.signal("TERM").await;
        app.ended().await.well();
        // Cut off, and not as if it had come to its end.
        assert!(stream.into_body().collect().await.is_err());
    }
}

#[tokio::test]
async fn an_outage_does_not_fill_the_log() {
    let nobody = nobody();
    let nowhere = format!("http://{}", nobody.local_addr().unwrap());
    let (app, _tenants) = byok(&nowhere, &[]).await;
    for _ in 0..40 {
        assert_eq!(app.send(run("/run/fal-ai/flux")).await.problem(), (502, "transport".to_owned()));
    }
    let log = app.end().await.well();
    let lines = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    // The 1st, 2nd, 4th, 8th, 16th and 32nd, and a line for each request.
    assert_eq!((lines(" ERROR "), lines(" WARN request"), lines("finished processing request")), (0, 6, 40), "{log}");
}

#[tokio::test]
async fn key_ids_and_metrics_are_on_the_admin_listener_only() {
    let app = App::start(NAME, &["--demo"]).await;
    assert_eq!(app.send(order()).await.status, 200);
    let answer = app.get("/readyz").await;
    assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "ready\n"));
    assert_eq!(app.get("/metrics").await.status, 404);
    let answer = app.admin("/readyz").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["key_id"]), (200, &json!("demo-key")));
    assert_eq!(app.admin("/healthz").await.body, "ok\n");
    let metrics = app.admin("/metrics").await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    for line in [
        r#"tower_fal_credential_info{store="default",key_id="demo-key"} 1"#,
        r#"server_requests_total{status="200"} 1"#,
        r#"server_connections{listener="public"} 1"#,
    ] {
        assert!(metrics.body.lines().any(|found| found == line), "{line}: {}", metrics.body);
    }
    // It is the last one that says what the matter is.
    app.signal("TERM").await;
    app.ready_where(|status, report| status == 503 && report["draining"] == true).await;
    assert_eq!(app.get("/readyz").await.body, "not ready\n");
    app.signal("TERM").await;
    app.ended().await.well();
}

#[tokio::test]
async fn without_the_option_there_is_no_admin_listener() {
    use tokio::io::{AsyncBufReadExt as _, BufReader};

    let mut command = app(NAME);
    command.args(["--demo", "--listen", "127.0.0.1:0"]).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next_line().await.unwrap().unwrap().starts_with("listening on "));
    assert!(lines.next_line().await.unwrap().unwrap().starts_with("try: curl "));
    child.kill().await.unwrap();
}

/// What pages of other sites can make a browser send.
#[tokio::test]
async fn requests_of_other_sites_and_for_other_hosts_are_refused() {
    const CROSS_SITE: Option<(u16, &str)> = Some((403, "cross_site"));
    const FOREIGN: Option<(u16, &str)> = Some((421, "foreign_host"));
    let fal = fal_of_acme().await;
    let (app, _tenants) = byok(&fal.run_origin(), &["--host", "Fal.Example.com"]).await;
    let port = app.address().rsplit(':').next().unwrap();
    let own = format!("origin: http://localhost:{port}");
    let own_host = format!("localhost:{port}");
    let cases: [(&str, &[&str], Option<(u16, &str)>); 21] = [
        (&own_host, &[], None),
        (&own_host, &[&own], None),
        (&own_host, &["origin: http://LOCALHOST"], CROSS_SITE),
        (&own_host, &["origin: null"], CROSS_SITE),
        (&own_host, &["origin: https://evil.example"], CROSS_SITE),
        (&own_host, &["origin: http://localhost:1"], CROSS_SITE),
        (&own_host, &[&own, "origin: https://evil.example"], CROSS_SITE),
        (&own_host, &["sec-fetch-site: same-origin"], None),
        (&own_host, &["sec-fetch-site: none"], None),
        (&own_host, &["sec-fetch-site: same-site"], CROSS_SITE),
        (&own_host, &["sec-fetch-site: cross-site"], CROSS_SITE),
        (&own_host, &["sec-fetch-site: cross-site", &own], CROSS_SITE),
        (&own_host, &["sec-fetch-site: none", "sec-fetch-site: cross-site"], CROSS_SITE),
        ("127.0.0.2:80", &[], None),
        ("[::1]:80", &[], None),
        ("fal.example.com", &[], None),
        ("evil.example", &[], FOREIGN),
        ("fal.run", &[], FOREIGN),
        ("localhost.evil.example", &[], FOREIGN),
        ("192.0.2.1", &[], FOREIGN),
        ("a b", &[], FOREIGN),
    ];
    for (host, headers, refused) in cases {
        // What is not refused comes to the routes, of which there is none for GET.
        for (method, status, runs) in [("GET", 405, 0), ("POST", 200, 1)] {
            let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
            let token = "authorization: Bearer hush-acme\r\nconnection: close\r\ncontent-length: 0";
            let request = format!("{method} /run/fal-ai/flux HTTP/1.1\r\nhost: {host}\r\n{headers}{token}\r\n\r\n");
            let answer = app.raw(&request).await;
            let (status, reason) = refused.unwrap_or((status, ""));
            let is_so = answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(reason);
            assert!(is_so, "{method} {host} {headers}: {answer}");
            assert_eq!(fal.received().len(), if refused.is_none() { runs } else { 0 }, "{method} {host} {headers}");
            fal.clear_received();
        }
    }
    // An absolute URI names the host as well.
    for (uri, status) in [("http://evil.example/run/a", 421), ("https://hush:hush@fal.example.com/run/a", 405)] {
        let answer = app.raw(&format!("GET {uri} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    // And the admin listener is read by nobody's page either.
    let address = app.admin.strip_prefix("http://").unwrap();
    for header in ["host: evil.example", "host: localhost\r\nsec-fetch-site: cross-site"] {
        let request = format!("GET /readyz HTTP/1.1\r\n{header}\r\nconnection: close\r\n\r\n");
        let mut stream = with_sent(address, request.as_bytes()).await;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 4") && !answer.contains("key_id"), "{answer}");
    }
    let log = app.end().await.well();
    assert!(log.contains("host=\"fal.example.com\""), "{log}");
}

/// What an app answers is data: no browser may take it for a page of this server.
#[tokio::test]
async fn the_page_of_an_app_does_not_run_in_the_servers_origin() {
    let page = || std::future::ready(axum::response::Html("<script>hush()</script>"));
    let fal = Served::new(Router::new().fallback(page)).await;
    let (app, _tenants) = byok(&fal.url, &[]).await;
    for path in ["/run/a", "/none", "/readyz"] {
        let answer = app.send(run(path)).await;
        assert_eq!(path == "/run/a", answer.body.contains("<script>"), "{path}");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(answer.headers["content-security-policy"], "default-src 'none'; frame-ancestors 'none'; sandbox");
    }
    app.end().await.well();
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_a_502() {
    let answer = || {
        let head = [("upgrade", "hush"), ("connection", "upgrade")];
        std::future::ready((StatusCode::SWITCHING_PROTOCOLS, head, "hush"))
    };
    let fal = Served::new(Router::new().fallback(answer)).await;
    let (app, _tenants) = byok(&fal.url, &[]).await;
    let head = "host: localhost\r\nauthorization: Bearer hush-acme\r\nupgrade: hush\r\nconnection: upgrade";
    let request = format!("POST /run/a HTTP/1.1\r\n{head}, close\r\ncontent-length: 0\r\n\r\n");
    let answer = timeout(PATIENCE, app.raw(&request)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains(r#""reason":"answer""#), "{answer}");
    let Ended { code, .. } = app.end().await;
    assert_eq!(code, Some(0));
}
