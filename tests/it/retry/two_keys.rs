//! Rotation with two keys, in whichever order they arrive: new key first here, or new key first at fal.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{sync::watch, task::JoinSet};
use tower::{Layer as _, ServiceExt};
use tower_fal::{
    CredentialStore, FalAuthLayer, FalRetryLayer, Generation, auth::Stamp, error::ReloadError, mock::MockFal,
    origin::FalOrigins, retry::ReplayBody,
};

use super::{
    RELOAD_WAIT, World, accepted, answer, assert_took, locked, post, refusal, timed, unauthorized, unknown_key,
};
use crate::support::key;

const OVERLAP: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn a_key_unknown_to_fal_gives_way_to_the_previous_one() {
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    let (response, took) = timed(client.clone().oneshot(post())).await;
    accepted(response);
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![2, 1], 0, Duration::ZERO));

    world.fal.accept(2);
    tokio::time::advance(Duration::from_secs(2)).await;
    accepted(client.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [2, 1, 2], "the new one is tried again after a pause");
}

#[tokio::test(start_paused = true)]
async fn the_key_before_is_the_stores_and_not_the_requests_own() {
    // If it were taken for the request's own, its stamp would have no generation.
    let world = World::new().await;
    let stamps = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&stamps);
    let auth = FalAuthLayer::new(world.store.clone()).layer(world.fal.clone());
    let noting = ServiceExt::<Request<ReplayBody<Full<Bytes>>>>::map_response(auth, move |response| {
        noted.lock().unwrap().extend(response.extensions().get::<Stamp>().cloned());
        response
    });
    let client = world.retry().layer(noting);
    world.rotate(2);
    world.fal.knows_only(7);
    unauthorized(client.oneshot(post()).await);
    let stamps = stamps.lock().unwrap();
    let stamps: Vec<_> = stamps.iter().map(|stamp| (stamp.generation().map(Generation::get), stamp.source())).collect();
    assert_eq!(stamps, [(Some(2), "replaced"), (Some(1), "script")]);
}

#[tokio::test(start_paused = true)]
async fn a_request_with_its_own_key_never_gets_the_houses_one_before() {
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    unauthorized(client.oneshot(super::customers_post()).await);
    assert_eq!(world.fal.keys(), [9]);
}

/// The previous key stays available to everybody.
#[tokio::test(start_paused = true)]
async fn a_401_that_does_not_doubt_the_key_keeps_the_way_back() {
    for during in [false, true] {
        let world = World::new().await;
        let client = world.client();
        if during {
            world.rotate(2);
        }
        // An app that may not be used, whatever the key.
        let text = r#"{"detail":"Cannot access application \"a/b\". Authentication is required."}"#;
        world.fal.will_answer(answer(401, text));
        unauthorized(client.clone().oneshot(post()).await);
        if !during {
            world.rotate(2);
        }
        accepted(client.oneshot(post()).await);
        assert_eq!(world.fal.keys().last(), Some(&1), "by way of the key before");
    }
}

#[tokio::test(start_paused = true)]
async fn the_key_before_is_forgotten_after_the_overlap() {
    for (after, tried) in [(OVERLAP - Duration::from_millis(1), true), (OVERLAP, false)] {
        let world = World::new().await;
        let client = world.client_by(&world.retry().overlap(OVERLAP));
        world.rotate(2);
        tokio::time::advance(after).await;
        let result = client.oneshot(post()).await;
        assert_eq!(world.fal.keys() == [2, 1], tried, "after {after:?}");
        assert_eq!(result.is_ok(), tried);
    }
}

/// Other layers of the same store cannot make it do so.
#[tokio::test(start_paused = true)]
async fn no_layer_looks_further_back_than_it_may() {
    let world = World::new().await;
    let short = world.client_by(&world.retry().overlap(Duration::from_secs(5)));
    let _long = world.client_by(&world.retry().overlap(Duration::from_secs(300)));
    world.rotate(2);
    tokio::time::advance(Duration::from_secs(60)).await;
    accepted(short.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [2, 1]);
}

#[tokio::test(start_paused = true)]
async fn an_overlap_without_an_end_is_a_day() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    for (after, tried) in [(DAY - Duration::from_secs(1), true), (DAY + Duration::from_secs(1), false)] {
        let world = World::new().await;
        let client = world.client_by(&world.retry().overlap(Duration::MAX));
        world.rotate(2);
        tokio::time::sleep(after).await;
        assert_eq!(client.oneshot(post()).await.is_ok(), tried);
        assert_eq!(world.fal.keys() == [2, 1], tried, "after {after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_driver_drops_the_key_before_when_its_time_is_over() {
    // Its source is let go with its last clone.
    let world = World::new().await;
    let _client = world.client_by(&world.retry().overlap(OVERLAP));
    let source: Arc<str> = "noted".into();
    world.store.replace(key(2).with_source(Arc::clone(&source)));
    world.rotate(3);
    let held = Arc::strong_count(&source);
    tokio::time::sleep(OVERLAP - Duration::from_millis(10)).await;
    assert_eq!(Arc::strong_count(&source), held);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(Arc::strong_count(&source), 1);
}

#[tokio::test(start_paused = true)]
async fn a_way_back_that_was_refused_itself_ends_no_wait() {
    let world = World::new().await;
    let client = world.client();
    world.fal.knows_only(7);
    world.source.brings(2);
    // Key 1 is refused, and so is key 2 that takes its place.
    unauthorized(client.clone().oneshot(post()).await);
    let (result, took) = timed(client.oneshot(post())).await;
    unauthorized(result);
    assert_took(took, RELOAD_WAIT);
    assert_eq!(world.fal.keys(), [1, 2, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_previous_key_that_is_refused_is_not_tried_again() {
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    world.fal.knows_only(7);
    let (result, took) = timed(client.clone().oneshot(post())).await;
    let refusal = unauthorized(result);
    assert_took(took, RELOAD_WAIT); // as if there had been no way back
    assert!(refusal.was_replayed());
    // That the old one does not work either is no news.
    assert_eq!((refusal.generation().unwrap().get(), refusal.key_id().unwrap().as_str()), (2, "id-2"));
    assert_eq!(world.fal.keys(), [2, 1]);
    // The next request tries the newest one again, as that one's pause is over, and is no better off with the other.
    unauthorized(client.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [2, 1, 2, 1]);
}

/// It is sent when it comes.
#[tokio::test(start_paused = true)]
async fn when_both_keys_are_refused_a_newer_one_is_waited_for() {
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    world.fal.knows_only(3);
    let request = tokio::spawn(client.clone().oneshot(post()));
    world.source.loads_reach(2).await;
    world.rotate(3);
    accepted(request.await.unwrap());
    assert_eq!(world.fal.keys(), [2, 1, 3]);
    assert!(world.fal.arrived().iter().all(|arrived| arrived.body == super::PROMPT));
}

#[tokio::test(start_paused = true)]
async fn there_is_no_fourth_attempt() {
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    world.fal.knows_only(7);
    world.fal.hold_key(3);
    let request = tokio::spawn(client.clone().oneshot(post()));
    world.source.loads_reach(2).await;
    world.rotate(3);
    world.fal.arrivals_reach(3).await;
    world.rotate(4);
    world.fal.release();
    let refusal = unauthorized(request.await.unwrap());
    assert_eq!(refusal.key_id().unwrap().as_str(), "id-3");
    assert_eq!(world.fal.keys(), [2, 1, 3]);
}

/// Any other than fal's own 401.
#[tokio::test(start_paused = true)]
async fn any_other_answer_is_about_the_key_it_was_given_to() {
    let by_the_app = || {
        let mut answer = answer(401, "not in my app");
        answer.headers_mut().insert("x-fal-served-from", "runner".parse().unwrap());
        answer
    };
    for last in [locked(), answer(403, r#"{"detail":"Insufficient permissions"}"#), by_the_app()] {
        let world = World::new().await;
        let client = world.client();
        world.rotate(2);
        world.fal.will_answer(unknown_key());
        world.fal.will_answer(last);
        let (result, took) = timed(client.oneshot(post())).await;
        let refusal = refusal(result);
        assert_eq!((refusal.generation().unwrap().get(), refusal.key_id().unwrap().as_str()), (1, "id-1"));
        assert_eq!((world.fal.keys(), world.reloads(), took), (vec![2, 1], 0, Duration::ZERO));
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_401_for_the_key_before_rules_it_out() {
    let world = World::new().await;
    let client = world.client();
    world.fal.hold();
    let late = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(1).await;
    world.rotate(2);
    world.fal.knows_only(2);
    world.fal.release();
    accepted(late.await.unwrap());
    world.fal.knows_only(7);
    unauthorized(client.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [1, 2, 2]);
}

/// The next one is early as well.
#[tokio::test(start_paused = true)]
async fn a_key_that_was_early_is_the_way_back_for_the_next_one() {
    let world = World::new().await;
    let client = world.client();
    for n in 2..=5 {
        world.rotate(n);
        accepted(client.clone().oneshot(post()).await); // with the one before
        world.fal.knows_only(n);
        accepted(client.clone().oneshot(post()).await);
        tokio::time::advance(Duration::from_secs(3600)).await;
    }
    assert_eq!(world.fal.keys(), [2, 1, 1, 2, 3, 2, 2, 3, 4, 3, 3, 4, 5, 4, 4, 5]);
}

#[tokio::test(start_paused = true)]
async fn an_overlap_of_zero_turns_it_off() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().overlap(Duration::ZERO));
    world.rotate(2);
    let (result, took) = timed(client.oneshot(post())).await;
    unauthorized(result);
    assert_took(took, RELOAD_WAIT);
    assert_eq!(world.fal.keys(), [2]);
}

#[tokio::test(start_paused = true)]
async fn a_store_without_a_driver_keeps_no_key_before() {
    let world = World::new().await;
    let store = CredentialStore::fixed(key(1));
    let client = tower_fal::layer(&store).layer(world.fal.clone());
    store.replace(key(2));
    let refusal = unauthorized(client.oneshot(post()).await);
    assert!(matches!(refusal.reload_error(), Some(ReloadError::NeverReloads)));
    assert_eq!(world.fal.keys(), [2]);
}

/// In which order the two sides learn of a new key.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Here,
    AtFal,
}

/// Under load: the new key is here before fal knows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_when_the_new_key_is_early_on_http1() {
    rotate_under_load(First::Here, false).await;
}

/// Under load: the new key is here before fal knows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_when_the_new_key_is_early_on_http2() {
    rotate_under_load(First::Here, true).await;
}

/// Under load: the old key is revoked before the new one is here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_when_the_new_key_is_late_on_http1() {
    rotate_under_load(First::AtFal, false).await;
}

/// Under load: the old key is revoked before the new one is here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_when_the_new_key_is_late_on_http2() {
    rotate_under_load(First::AtFal, true).await;
}

const STREAMS: usize = 8;
const ROTATIONS: u64 = 5;

async fn rotate_under_load(first: First, http2: bool) {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(0));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("fal_key");
    std::fs::write(&file, crate::support::key_text(0)).unwrap();
    let source = tower_fal::source::FileSource::new(&file).poll_every(Duration::from_millis(20));
    let store = CredentialStore::builder(source).build().await.unwrap();

    // How often each generation was refused, as seen between the two layers.
    let refused = Arc::new(watch::Sender::new(Vec::<u64>::new()));
    let note = Arc::clone(&refused);
    let client = Client::builder(TokioExecutor::new())
        .http2_only(http2)
        .build::<_, ReplayBody<Full<Bytes>>>(HttpConnector::new());
    let auth =
        FalAuthLayer::new(store.clone()).origins(FalOrigins::new().and(&fal.run_origin()).unwrap()).layer(client);
    let noting = auth.map_response(move |response| {
        if let Some(stamp) = response.extensions().get::<Stamp>() {
            note.send_modify(|all| all.push(stamp.generation().unwrap().get()));
        }
        response
    });
    let client = FalRetryLayer::new(store.clone()).layer(noting);

    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(watch::Sender::new([0_u64; STREAMS]));
    let mut streams = JoinSet::new();
    for stream in 0..STREAMS {
        let (client, url, stop) = (client.clone(), fal.run_url("/fal-ai/flux"), Arc::clone(&stop));
        let answered = Arc::clone(&answered);
        streams.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let request = Request::post(&url).body(Full::from(r#"{"prompt":"a cat"}"#)).unwrap();
                let response = client.clone().oneshot(request).await.unwrap();
                assert_eq!(response.status(), StatusCode::OK);
                let body = response.into_body().collect().await.unwrap().to_bytes();
                assert!(body.windows(5).any(|part| part == b"a cat"), "{body:?}");
                answered.send_modify(|all| all[stream] += 1);
            }
        });
    }

    let everybody_went_on = || async {
        let before = *answered.borrow();
        let mut answered = answered.subscribe();
        // Twice: the first answer may be to a request that was under way before.
        answered.wait_for(|now| now.iter().zip(&before).all(|(now, before)| *now >= before + 2)).await.unwrap();
    };
    let was_refused = |n: u64| {
        let mut refused = refused.subscribe();
        async move {
            refused.wait_for(|all| all.contains(&(n + 1))).await.unwrap();
        }
    };
    for n in 1..=ROTATIONS {
        let rotation = async {
            match first {
                First::Here => {
                    std::fs::write(&file, crate::support::key_text(n)).unwrap();
                    was_refused(n).await; // fal does not know it, and requests go on
                    everybody_went_on().await;
                    fal.accept(&key(n));
                    everybody_went_on().await;
                    fal.revoke(&key(n - 1));
                }
                First::AtFal => {
                    fal.accept(&key(n));
                    fal.revoke(&key(n - 1));
                    was_refused(n - 1).await; // and waits
                    std::fs::write(&file, crate::support::key_text(n)).unwrap();
                }
            }
            everybody_went_on().await;
        };
        tokio::select! {
            () = rotation => {}
            ended = streams.join_next() => panic!("in rotation {n}: {ended:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    streams.join_all().await;
    assert_eq!(store.generation().get(), ROTATIONS + 1);
}
