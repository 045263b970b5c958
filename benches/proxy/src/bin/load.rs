//! Sends requests through a proxy on one thread, over connections that stay open, and prints one line of JSON.

#![forbid(unsafe_code)]

use std::{
    cell::RefCell,
    fs,
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http_body_util::{BodyExt as _, Either, Full, channel::Channel};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpStream, task::LocalSet};
use tokio_rustls::TlsConnector;
use tower_fal_proxy_bench::{AUTHORIZATION, BoxError, EVENTS, trusting};

#[derive(Parser)]
struct Options {
    #[arg(long)]
    connect: SocketAddr,
    /// The path of the proxy. Without it, requests go straight to the upstream, with the key
    #[arg(long)]
    proxy_path: Option<String>,
    /// Straight to the upstream over TLS
    #[arg(long, conflicts_with = "proxy_path")]
    ca_file: Option<PathBuf>,
    #[arg(long)]
    kind: Kind,
    #[arg(long, default_value_t = 16)]
    connections: usize,
    #[arg(long, default_value_t = 1)]
    requests: usize,
    /// How many requests begin in a second, if there is a connection for each. Without it, as many as possible. What a
    /// request waits for a connection is part of its time
    #[arg(long)]
    rate: Option<f64>,
    /// The process whose CPU time and memory are of interest
    #[arg(long)]
    pid: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    /// 1 KiB of JSON in both directions
    Json,
    /// 64 KiB of JSON back
    Large,
    /// 300 KiB of JSON there, which a proxy does not keep to send them again
    Long,
    /// A stream of 50 events
    Stream,
    /// Streams of one event that stay open
    Idle,
    /// 1 GiB up
    Upload,
    /// 1 GiB down
    Download,
}

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Json | Self::Long => "/bench/app/json",
            Self::Large => "/bench/app/large",
            Self::Stream => "/bench/app/stream",
            Self::Idle => "/bench/idle",
            Self::Upload => "/bench/upload",
            Self::Download => "/bench/download",
        }
    }
}

#[derive(Default)]
struct Seen {
    latencies: Vec<Duration>,
    first_events: Vec<Duration>,
    failures: usize,
    bytes: u64,
    open: usize,
}

type Sender = http1::SendRequest<Either<Full<Bytes>, Channel<Bytes>>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), BoxError> {
    LocalSet::new().run_until(run(Arc::new(Options::parse()))).await
}

async fn run(options: Arc<Options>) -> Result<(), BoxError> {
    let mut senders = Vec::new();
    for _ in 0..options.connections {
        senders.push(connect(&options).await?);
    }
    // The pool of the proxy fills before the clock starts.
    let warm = Rc::new(RefCell::new(Seen::default()));
    let warm_up = if options.requests > options.connections { options.requests / 10 } else { 0 };
    senders = all(senders, warm_up, &warm, &options).await?;

    let seen = Rc::new(RefCell::new(Seen::default()));
    let (before, begun) = (cpu(options.pid), Instant::now());
    let senders = all(senders, options.requests, &seen, &options).await?;
    let (seconds, after) = (begun.elapsed().as_secs_f64(), cpu(options.pid));
    if options.kind == Kind::Idle {
        // What is released after the burst is not what a stream costs.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let mut seen = seen.borrow_mut();
    seen.latencies.sort_unstable();
    seen.first_events.sort_unstable();
    let percent = |of: &[Duration], percent: usize| {
        of.get((of.len() * percent / 100).min(of.len().saturating_sub(1))).map(|found| found.as_secs_f64() * 1000.0)
    };
    println!(
        "{}",
        json!({
            "requests": options.requests,
            "failures": seen.failures + warm.borrow().failures,
            "open": seen.open,
            "bytes": seen.bytes,
            "seconds": seconds,
            "per_second": options.requests as f64 / seconds,
            "cpu_per_10000": (after - before) / options.requests as f64 * 10_000.0,
            "p50_ms": percent(&seen.latencies, 50),
            "p99_ms": percent(&seen.latencies, 99),
            "first_event_p50_ms": percent(&seen.first_events, 50),
            "first_event_p99_ms": percent(&seen.first_events, 99),
            "rss_mib": memory(options.pid, "VmRSS:"),
            "peak_mib": memory(options.pid, "VmHWM:"),
        })
    );
    drop(senders);
    Ok(())
}

/// Sends `count` requests over all connections.
async fn all(
    senders: Vec<Sender>,
    count: usize,
    seen: &Rc<RefCell<Seen>>,
    options: &Arc<Options>,
) -> Result<Vec<Sender>, BoxError> {
    let (begun, left) = (Instant::now(), Rc::new(RefCell::new(count)));
    let tasks: Vec<_> = senders
        .into_iter()
        .map(|mut sender| {
            let (left, seen, options) = (Rc::clone(&left), Rc::clone(seen), Arc::clone(options));
            tokio::task::spawn_local(async move {
                while let Some(number) = take(&left) {
                    let due = match options.rate {
                        None => Instant::now(),
                        Some(rate) => {
                            let due = begun + Duration::from_secs_f64((count - number) as f64 / rate);
                            tokio::time::sleep_until(due.into()).await;
                            due
                        }
                    };
                    if let Err(error) = one(&mut sender, due, &seen, &options).await {
                        if seen.borrow().failures == 0 {
                            eprintln!("{error}");
                        }
                        seen.borrow_mut().failures += 1;
                        sender = connect(&options).await?;
                    }
                }
                Ok::<_, BoxError>(sender)
            })
        })
        .collect();
    let mut senders = Vec::new();
    for task in tasks {
        senders.push(task.await??);
    }
    Ok(senders)
}

/// How many were left, this one included.
fn take(left: &RefCell<usize>) -> Option<usize> {
    let mut left = left.borrow_mut();
    let before = *left;
    *left = before.saturating_sub(1);
    (before > 0).then_some(before)
}

async fn connect(options: &Options) -> Result<Sender, BoxError> {
    let stream = TcpStream::connect(options.connect).await?;
    stream.set_nodelay(true)?;
    match &options.ca_file {
        None => handshake(stream).await,
        Some(ca_file) => {
            let tls = TlsConnector::from(Arc::new(trusting(ca_file)?));
            handshake(tls.connect("fal.run".try_into()?, stream).await?).await
        }
    }
}

async fn handshake<I>(io: I) -> Result<Sender, BoxError>
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
    tokio::task::spawn_local(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

async fn one(sender: &mut Sender, begun: Instant, seen: &RefCell<Seen>, options: &Options) -> Result<(), BoxError> {
    sender.ready().await?;
    let response = sender.send_request(request(options)?).await?;
    if response.status() != 200 {
        return Err(format!("{}: {:?}", response.status(), response.into_body().collect().await?.to_bytes()).into());
    }
    let (bytes, first_event) = read(response, options.kind, begun, seen).await?;
    let mut seen = seen.borrow_mut();
    seen.latencies.push(begun.elapsed());
    seen.first_events.extend(first_event);
    seen.bytes += bytes;
    Ok(())
}

fn request(options: &Options) -> Result<Request<Either<Full<Bytes>, Channel<Bytes>>>, BoxError> {
    let path = options.kind.path();
    let request = Request::builder().header("content-type", "application/json").header("accept", "application/json");
    let request = match &options.proxy_path {
        // What Chromium sends is longer; these are the headers that matter to a proxy.
        Some(proxy) => request
            .uri(proxy)
            .header("host", "127.0.0.1")
            .header("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36")
            .header("x-fal-queue-priority", "normal")
            .header("x-fal-target-url", format!("https://fal.run{path}")),
        None => request.uri(path).header("host", "fal.run").header("authorization", AUTHORIZATION),
    };
    Ok(match options.kind {
        Kind::Download => request.method(Method::GET).body(Either::Left(Full::default()))?,
        Kind::Upload => request.method(Method::POST).body(Either::Right(gibibyte()))?,
        Kind::Long => request.method(Method::POST).body(Either::Left(Full::from(LONG.clone())))?,
        _ => request.method(Method::POST).body(Either::Left(Full::from(SHORT.clone())))?,
    })
}

static SHORT: LazyLock<Bytes> = LazyLock::new(|| prompt(1024));
static LONG: LazyLock<Bytes> = LazyLock::new(|| prompt(300 * 1024));

fn prompt(length: usize) -> Bytes {
    format!("{{\"prompt\":\"{}\"}}", "x".repeat(length - 13)).into()
}

fn gibibyte() -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(1);
    tokio::task::spawn_local(async move {
        let piece = Bytes::from(vec![b'x'; 64 * 1024]);
        for _ in 0..16 * 1024 {
            if sender.send_data(piece.clone()).await.is_err() {
                return;
            }
        }
    });
    body
}

/// Reads an answer, and says when its first event came.
async fn read(
    response: Response<Incoming>,
    kind: Kind,
    begun: Instant,
    seen: &RefCell<Seen>,
) -> Result<(u64, Option<Duration>), BoxError> {
    let mut body = response.into_body();
    let (mut bytes, mut events, mut first) = (0, 0, None);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        bytes += data.len() as u64;
        if matches!(kind, Kind::Stream | Kind::Idle) {
            first.get_or_insert_with(|| begun.elapsed());
            events += data.windows(2).filter(|pair| pair == b"\n\n").count();
        }
        if kind == Kind::Idle {
            seen.borrow_mut().open += 1;
            // The stream stays open until the process ends.
            std::mem::forget(body);
            return Ok((bytes, first));
        }
    }
    match kind {
        Kind::Stream if events != EVENTS => Err(format!("{events} events").into()),
        Kind::Large if bytes < 60_000 => Err(format!("{bytes} bytes").into()),
        _ => Ok((bytes, first)),
    }
}

/// The CPU time of all threads of a process, in seconds.
fn cpu(pid: Option<u32>) -> f64 {
    let Some(pid) = pid else { return f64::NAN };
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return f64::NAN };
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// A line of `/proc/PID/status`, in MiB.
fn memory(pid: Option<u32>, name: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid?)).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}
