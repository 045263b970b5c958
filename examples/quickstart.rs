//! A key that is rotated under load, without a network: `cargo run --example quickstart`.
//!
//! An in-process fal, a key file in a temporary directory, and a steady stream of requests through hyper-util's
//! client and `tower_fal::layer`. The key in the file is swapped the way kubelet swaps a mounted Secret, and the old
//! one is revoked at fal: first after the swap, then before it. The stream goes on. In the end the account is locked,
//! and the error says what to do. It ends by itself in a few seconds.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // an example is there to be read

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
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
    mock::{Lock, MockFal},
    origin::FalOrigins,
    retry::ReplayBody,
    source::FileSource,
};

/// The concrete type of the client: what a struct field would say.
type FalHttp = FalRetry<FalAuth<Client<HttpConnector, ReplayBody<Full<Bytes>>>>>;

const STREAMS: u64 = 4;
const PHASE: Duration = Duration::from_millis(800);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    match env::args().nth(1).as_deref() {
        None => {}
        Some("--help" | "-h") => {
            println!("A key rotated under load, against a fal in this process. It takes no arguments.");
            return Ok(());
        }
        Some(_) => return Err("it takes no arguments".into()),
    }
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

    // What a server does when it starts. It polls every 5 s unless told otherwise.
    let source = FileSource::new(volume.path().join("fal_key")).poll_every(Duration::from_millis(100));
    let store = CredentialStore::builder(source).build().await?;
    let client: FalHttp = ServiceBuilder::new()
        .layer(tower_fal::layer(&store).auth(|auth| auth.origins(FalOrigins::new().loopback_http())))
        .service(Client::builder(TokioExecutor::new()).build_http());

    let load = Load::start(&client, &fal);

    println!("1  The file holds first-key, and fal knows it.");
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("2  kubelet swaps second-key in; fal knows both.");
    fal.accept(&second);
    let swapped = Instant::now();
    write_like_kubelet(volume.path(), "second-key:quickstart-secret-2\n")?;
    in_use(&store, "second-key", swapped, "the swap").await?;
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("3  first-key is revoked at fal.");
    fal.revoke(&first);
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("4  second-key is revoked as well, before third-key is in the file: requests are refused, wait,");
    println!("   and are sent again.");
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

    println!("5  The account is locked. Another key would not help, so nothing is reloaded or sent again:");
    fal.lock(Lock::ExhaustedBalance);
    match send(client, &fal.run_url("/fal-ai/flux/dev")).await {
        Err(FalAuthError::Forbidden(refusal)) => println!("   {:?}\n   {refusal}", refusal.reason()),
        other => return Err(format!("expected a refusal, and not {other:?}").into()),
    }
    Ok(())
}

/// Waits until the store has the key, and says how long that took.
async fn in_use(store: &CredentialStore, key: &str, since: Instant, what: &str) -> Result<(), Box<dyn Error>> {
    store.subscribe().wait_for(|status| status.key_id.as_ref().is_some_and(|id| id.as_str() == key)).await?;
    println!("   {key} is in use {} ms after {what} (the file is looked at every 100 ms)", since.elapsed().as_millis());
    Ok(())
}

/// Streams of requests that go on until they are stopped.
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

    async fn stop(mut self) -> Result<(u64, u64), Box<dyn Error>> {
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
    // To its end, so that the connection is used again.
    Ok(ok && response.into_body().collect().await.is_ok())
}

/// What fal saw since the last phase: how many requests with which key, and how many it refused.
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

/// A new directory, a link to it under a temporary name, and one rename: every reader sees the old content or the
/// new one, never something in between.
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

/// Links need privileges here: a rename over the file, which is as whole.
#[cfg(not(unix))]
fn write_like_kubelet(volume: &Path, key: &str) -> io::Result<()> {
    fs::write(volume.join("fal_key.new"), key)?;
    fs::rename(volume.join("fal_key.new"), volume.join("fal_key"))
}
