//! The crate's main job, over real sockets: a key is rotated under load, and not one request fails.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuth, FalAuthLayer, mock::MockFal, origin::FalOrigins, source::FileSource};

use crate::support::{KubeletVolume, key, key_text};

type FalHttp = FalAuth<Client<HttpConnector, Full<Bytes>>>;

const STREAMS: usize = 8;
const ROTATIONS: u64 = 20;

/// Under load: the key is rotated and the old one revoked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_a_key_is_rotated_on_http1() {
    rotate_under_load(Version::HTTP_11).await;
}

/// Under load: the key is rotated and the old one revoked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_a_key_is_rotated_on_http2() {
    rotate_under_load(Version::HTTP_2).await;
}

async fn rotate_under_load(version: Version) {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(0));
    let mut volume = KubeletVolume::new(key_text(0));
    let source = FileSource::new(volume.path()).poll_every(Duration::from_millis(20));
    let store = CredentialStore::builder(source).build().await.unwrap();
    let client: FalHttp = ServiceBuilder::new()
        .layer(FalAuthLayer::new(store.clone()).origins(FalOrigins::new().and(&fal.run_origin()).unwrap()))
        .service(Client::builder(TokioExecutor::new()).http2_only(version == Version::HTTP_2).build_http());

    let stop = Arc::new(AtomicBool::new(false));
    let answered: [Arc<AtomicU64>; STREAMS] = Default::default();
    let mut streams = JoinSet::new();
    for answered in answered.clone() {
        let (client, url, stop) = (client.clone(), fal.run_url("/fal-ai/flux"), Arc::clone(&stop));
        streams.spawn(async move {
            let mut statuses = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let request = Request::post(&url).body(Full::new(Bytes::from_static(b"{}"))).unwrap();
                let response = client.clone().oneshot(request).await.unwrap();
                statuses.push(response.status());
                response.into_body().collect().await.unwrap();
                answered.fetch_add(1, Ordering::Relaxed);
            }
            statuses
        });
    }

    for n in 1..=ROTATIONS {
        fal.accept(&key(n));
        volume.update(key_text(n));
        store.subscribe().wait_for(|status| status.generation.get() == n + 1).await.unwrap();
        // The old key goes once nobody is under way with it: each stream has had an answer since.
        let before = answered.each_ref().map(|count| count.load(Ordering::Relaxed));
        while answered.iter().zip(before).any(|(count, before)| count.load(Ordering::Relaxed) == before) {
            tokio::task::yield_now().await;
        }
        fal.revoke(&key(n - 1));
    }
    stop.store(true, Ordering::Relaxed);

    let statuses: Vec<StatusCode> = streams.join_all().await.concat();
    assert!(statuses.len() >= STREAMS);
    assert_eq!(statuses.iter().filter(|status| **status != StatusCode::OK).count(), 0, "of {}", statuses.len());
    assert!(fal.received().iter().all(|request| request.version == version));
    let ids: BTreeSet<_> = fal.received().iter().filter_map(|request| request.presented.key_id().cloned()).collect();
    assert!(ids.contains(key(ROTATIONS).key_id().unwrap()), "{ids:?}");
}
