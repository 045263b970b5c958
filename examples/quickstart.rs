//! A key that is rotated under load, without a network: `cargo run --example quickstart`.
//!
//! An in-process fal, a key file in a temporary directory, and a steady stream of requests through hyper-util's
//! client and `FalAuthLayer`. The key in the file is swapped the way kubelet swaps a mounted Secret, the old one is
//! revoked at fal, and the stream goes on. It ends by itself in a few seconds.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // an example is there to be read

use std::{
    collections::BTreeMap,
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
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuth, FalAuthLayer, mock::MockFal, origin::FalOrigins, source::FileSource,
};

/// The concrete type of the client: what a struct field would say.
type FalHttp = FalAuth<Client<HttpConnector, Full<Bytes>>>;

const STREAMS: u64 = 4;
const PHASE: Duration = Duration::from_millis(800);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let first = Credential::key("first-key:quickstart-secret-1")?;
    let second = Credential::key("second-key:quickstart-secret-2")?;

    println!("A fal in this process, a key file, and {STREAMS} streams of requests.\n");
    let fal = MockFal::start().await?;
    fal.accept(&first);
    let volume = tempfile::tempdir()?;
    write_like_kubelet(volume.path(), "first-key:quickstart-secret-1\n")?;

    // What a server does when it starts. It polls every 5 s unless told otherwise.
    let source = FileSource::new(volume.path().join("fal_key")).poll_every(Duration::from_millis(100));
    let store = CredentialStore::builder(source).build().await?;
    let client: FalHttp = ServiceBuilder::new()
        .layer(FalAuthLayer::new(store.clone()).origins(FalOrigins::new().and(&fal.run_origin())?))
        .service(Client::builder(TokioExecutor::new()).build_http());

    let load = Load::start(&client, &fal);

    println!("1  The file holds first-key, and fal knows it.");
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("2  kubelet swaps second-key in; fal knows both.");
    fal.accept(&second);
    let swapped = Instant::now();
    write_like_kubelet(volume.path(), "second-key:quickstart-secret-2\n")?;
    store.subscribe().wait_for(|status| status.key_id.as_ref().is_some_and(|id| id.as_str() == "second-key")).await?;
    println!(
        "   second-key is in use {} ms after the swap (the file is looked at every 100 ms)",
        swapped.elapsed().as_millis()
    );
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    println!("3  first-key is revoked at fal.");
    fal.revoke(&first);
    tokio::time::sleep(PHASE).await;
    print_phase(&fal);

    let (sent, failed) = load.stop().await?;
    println!("{sent} requests, {failed} failed");
    if failed > 0 {
        return Err("a rotation must not cost a request".into());
    }
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

async fn send(client: FalHttp, url: &http::Uri) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let body = Full::new(Bytes::from_static(br#"{"prompt":"a lighthouse"}"#));
    let request = Request::post(url).header("content-type", "application/json").body(body)?;
    let response = client.oneshot(request).await?;
    let ok = response.status().is_success();
    response.into_body().collect().await?; // the connection is used again
    Ok(ok)
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
