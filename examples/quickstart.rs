//! A key that is rotated under load, without a network: `cargo run --example quickstart`.
//!
//! It starts a fal in this process, writes a key file into a temporary directory, and sends a steady stream of requests
//! through hyper-util's client and `tower_fal::layer`. Then it swaps the key in the file, as kubelet swaps a mounted
//! Secret, and revokes the old key at fal: once after the swap, and once before it. No request fails. At the end the
//! account is locked, and the error says what to do. It takes a few seconds.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Parser;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuth, FalAuthError, FalRetry,
    error::BoxError,
    mock::{Lock, MockFal},
    origin::FalOrigins,
    retry::ReplayBody,
    source::FileSource,
};

mod terminal;

/// The concrete type of the client, as a struct field would name it.
type FalHttp = FalRetry<FalAuth<Client<HttpConnector, ReplayBody<Full<Bytes>>>>>;

const STREAMS: u64 = 4;
const PHASE: Duration = Duration::from_millis(800);

/// Rotates a key under load, against a fal in this process. It takes no arguments.
#[derive(Parser)]
struct Arguments {}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |_: Arguments| rotate().await).await
}

async fn rotate() -> Result<(), BoxError> {
    let [first, second, third] = [
        Credential::key("first-key:quickstart-secret-1")?,
        Credential::key("second-key:quickstart-secret-2")?,
        Credential::key("third-key:quickstart-secret-3")?,
    ];

    println!("A fal in this process, a key file, and {STREAMS} streams of requests.\n");
    let fal = MockFal::start().await?;
    fal.accept(&first);
    let volume = tempfile::tempdir()?;
    write_like_kubelet(volume.path(), "first-key:quickstart-secret-1\n")?;

    // A server does this when it starts. The default interval is 5 s.
    let source = FileSource::new(volume.path().join("fal_key")).poll_every(Duration::from_millis(100));
    let store = CredentialStore::builder(source).build().await?;
    let client: FalHttp = ServiceBuilder::new()
        .layer(tower_fal::layer(&store).auth(|auth| auth.origins(FalOrigins::new().loopback_http())))
        .service(Client::builder(TokioExecutor::new()).build_http());

    let load = Load::start(&client, &fal);

    println!("1  The file holds first-key, and fal accepts it.");
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("2  kubelet puts second-key into the file; fal accepts both.");
    fal.accept(&second);
    let swapped = Instant::now();
    write_like_kubelet(volume.path(), "second-key:quickstart-secret-2\n")?;
    in_use(&store, "second-key", swapped, "the swap").await?;
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("3  fal revokes first-key.");
    fal.revoke(&first);
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("4  fal revokes second-key as well, before third-key is in the file. Requests are refused, wait,");
    println!("   and are replayed with third-key.");
    let revoked = Instant::now();
    fal.accept(&third);
    fal.revoke(&second);
    tokio::time::sleep(PHASE / 2).await;
    write_like_kubelet(volume.path(), "third-key:quickstart-secret-3\n")?;
    in_use(&store, "third-key", revoked, "the revocation").await?;
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    let (sent, failed) = load.stop().await?;
    println!("{sent} requests, {failed} failed\n");
    if failed > 0 {
        return Err("a rotation must not cost a request".into());
    }

    println!("5  fal locks the account. Another key would not help, so nothing is reloaded or replayed:");
    fal.lock(Lock::ExhaustedBalance);
    match send(client, &fal.run_url("/fal-ai/flux/dev")).await {
        Err(FalAuthError::Forbidden(refusal)) => println!("   {:?}\n   {refusal}", refusal.reason()),
        other => return Err(format!("fal should have refused the request. The result is {other:?}").into()),
    }
    Ok(())
}

/// Waits until the store has the key, and says how long that took.
async fn in_use(store: &CredentialStore, key: &str, since: Instant, what: &str) -> Result<(), BoxError> {
    store
        .subscribe()
        .wait_for(|status| status.key_id.as_ref().is_some_and(|id| id.as_str() == key))
        .await
        .ok_or("the store is gone")?;
    println!(
        "   {key} is in use {} ms after {what} (the store reads the file every 100 ms)",
        since.elapsed().as_millis()
    );
    Ok(())
}

/// Streams of requests, which run until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    streams: JoinSet<()>,
}

impl Load {
    fn start(client: &FalHttp, fal: &MockFal) -> Self {
        let (stop, sent, failed) = <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let mut streams = JoinSet::new();
        for _ in 0..STREAMS {
            let (client, url) = (client.clone(), fal.run_url("/fal-ai/flux/dev"));
            let (stop, sent, failed) = (stop.clone(), sent.clone(), failed.clone());
            streams.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let ok = send(client.clone(), &url).await.unwrap_or(false);
                    sent.fetch_add(1, Ordering::Relaxed);
                    failed.fetch_add(u64::from(!ok), Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            });
        }
        Self { stop, sent, failed, streams }
    }

    async fn stop(mut self) -> Result<(u64, u64), BoxError> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.streams.join_next().await {
            ended?;
        }
        Ok((self.sent.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed)))
    }
}

async fn send(client: FalHttp, url: &http::Uri) -> Result<bool, FalAuthError> {
    let mut request = Request::new(Full::new(Bytes::from_static(br#"{"prompt":"a lighthouse"}"#)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = url.clone();
    let response = client.oneshot(request).await?;
    let ok = response.status().is_success();
    // Read the whole body, so that the connection is reused.
    Ok(ok && response.into_body().collect().await.is_ok())
}

/// Prints what fal saw in this phase: how many requests with which key, and how many of them it refused.
fn print_phase(fal: &MockFal) {
    let received = fal.received();
    fal.clear_received();
    let mut by_key = BTreeMap::<String, u64>::new();
    for request in &received {
        let key_id = request.presented.key_id().map_or("no key", |key_id| key_id.as_str());
        *by_key.entry(key_id.to_owned()).or_default() += 1;
    }
    let refused = received.iter().filter(|request| request.status.is_some_and(|status| !status.is_success())).count();
    let by_key: Vec<_> = by_key.iter().map(|(key_id, count)| format!("{count} with {key_id}")).collect();
    println!("   fal saw {}; {refused} refused\n", by_key.join(", "));
}

/// Makes a new directory and a link to it under a temporary name, and renames the link. Every reader sees the old
/// content or the new content.
#[cfg(unix)]
fn write_like_kubelet(volume: &Path, key: &str) -> io::Result<()> {
    use std::os::unix::fs::symlink;

    let data = volume.join("..data");
    let old = fs::read_link(&data).ok();
    let new = tempfile::Builder::new().prefix("..2026_11_24_").tempdir_in(volume)?.keep();
    fs::write(new.join("fal_key"), key)?;
    let name = new.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    symlink(name, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), &data)?;
    match old {
        Some(old) => fs::remove_dir_all(volume.join(old)),
        None => symlink("..data/fal_key", volume.join("fal_key")),
    }
}

/// Links need privileges here. A rename over the file is atomic too.
#[cfg(not(unix))]
fn write_like_kubelet(volume: &Path, key: &str) -> io::Result<()> {
    fs::write(volume.join("fal_key.new"), key)?;
    fs::rename(volume.join("fal_key.new"), volume.join("fal_key"))
}
