//! A new key that fal does not take yet: how many requests fail, above all of those whose body cannot be sent again.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::time::{interval, sleep};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{FalAuthLayer, error::BoxError, store::Degraded};

use super::{
    ADMITTED, Answer, Client, Fal, PROMPT, World, accepted, answer,
    applications::{lie_every, to_liar},
    post, request, unauthorized, unknown_key,
};

const SECOND: Duration = Duration::from_secs(1);

fn large_to(uri: &str) -> Request<Full<Bytes>> {
    request(Method::POST, uri, vec![b'x'; 1024 * 1024])
}

fn large() -> Request<Full<Bytes>> {
    large_to(ADMITTED)
}

async fn proven() -> (World, Client) {
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    (world, client)
}

// Bodies that go once.

/// How many of `rounds` large requests to each of so many applications fail after a new key that came early.
async fn large_to_many(applications: usize, rounds: usize) -> usize {
    let (world, client) = proven().await;
    world.rotate(2);
    let mut failed = 0;
    for _ in 0..rounds {
        for n in 0..applications {
            let sent = large_to(&format!("https://fal.run/owner-{n}/app"));
            failed += usize::from(client.clone().oneshot(sent).await.is_err());
            sleep(SECOND / 10).await;
        }
    }
    failed
}

#[tokio::test(start_paused = true)]
async fn an_early_key_costs_few_bodies_that_go_once() {
    let failed = large_to_many(20, 5).await;
    assert!(failed <= 4, "{failed} of 100");
}

#[tokio::test(start_paused = true)]
async fn an_early_key_costs_few_bodies_to_many_applications() {
    let failed = large_to_many(65, 5).await;
    assert!(failed <= 4, "{failed} of 325");
}

/// A mistyped key: the old one works, and nobody revokes it.
#[tokio::test(start_paused = true)]
async fn a_mistyped_key_does_not_stop_large_bodies_a_day_later() {
    let (world, client) = proven().await;
    world.rotate(2);
    unauthorized(client.clone().oneshot(large()).await);
    for hour in 1..30 {
        sleep(3600 * SECOND).await;
        let result = client.clone().oneshot(large()).await;
        assert!(result.is_ok(), "after {hour} h");
    }
}

#[tokio::test(start_paused = true)]
async fn the_status_names_a_mistyped_key_that_large_bodies_met() {
    let (world, client) = proven().await;
    world.rotate(2);
    unauthorized(client.clone().oneshot(large()).await);
    for _ in 0..100 {
        sleep(SECOND).await;
        accepted(client.clone().oneshot(large()).await);
    }
    let status = world.store.status();
    assert_eq!(world.fal.keys()[2..], [1; 100]);
    assert_eq!(status.degraded().collect::<Vec<_>>(), [Degraded::Refused], "all requests go out with the old key");
    assert_eq!(status.key_id.unwrap().as_str(), "id-1");
    assert_eq!(status.pending.unwrap().key_id.unwrap().as_str(), "id-2");
}

/// A server that was started with a dead key, and gets one that fal takes a little later.
async fn after_a_dead_start(early: u32, body: fn() -> Request<Full<Bytes>>) -> (usize, Vec<u64>) {
    let world = World::new().await;
    let client = world.client();
    world.fal.knows_only(7);
    unauthorized(client.clone().oneshot(body()).await);
    world.rotate(2);
    for _ in 0..early {
        unauthorized(client.clone().oneshot(body()).await);
        sleep(SECOND).await;
    }
    world.fal.knows_only(2);
    let before = world.fal.keys().len();
    let mut failed = 0;
    for _ in 0..100 {
        failed += usize::from(client.clone().oneshot(body()).await.is_err());
        sleep(SECOND).await;
    }
    (failed, world.fal.keys()[before..].to_vec())
}

#[tokio::test(start_paused = true)]
async fn a_key_never_accepted_is_no_way_back_for_large_bodies() {
    for early in [1, 3, 200] {
        let (failed, keys) = after_a_dead_start(early, large).await;
        assert!(failed <= 2, "{failed} of 100 after {early} s, with {keys:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_start_has_small_bodies_sent_once() {
    let (failed, keys) = after_a_dead_start(10, post).await;
    assert_eq!(failed, 0);
    assert!(keys.len() <= 101, "{keys:?}");
}

/// Whoever has found out spares the others: what is sent with the previous key after a refusal, and accepted, is proof.
#[tokio::test(start_paused = true)]
async fn an_application_that_found_out_spares_the_others() {
    let (world, client) = proven().await;
    world.rotate(2);
    unauthorized(client.clone().oneshot(large()).await);
    for _ in 0..10 {
        accepted(client.clone().oneshot(large()).await);
    }
    let mut failed = 0;
    for n in 0..20 {
        failed += u32::from(client.clone().oneshot(large_to(&format!("https://fal.run/owner-{n}/app"))).await.is_err());
    }
    assert_eq!(failed, 0, "of 20, while ten requests in a row have shown which key works");
}

/// Requests through the same client to hosts that get no credential, such as downloads of results. How many honest
/// requests to another application, one every five seconds, does it take until the new key is shown as accepted?
async fn accepted_beside_downloads(downloads: bool) -> Option<u32> {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await); // sets it aside
    assert!(world.store.status().pending.is_some());
    let traffic = client.clone();
    let traffic = downloads.then(|| {
        tokio::spawn(async move {
            let mut ticks = interval(SECOND / 40);
            for n in 0.. {
                ticks.tick().await;
                let get = request(Method::GET, &format!("https://example.com/files/{n}/image.png"), "");
                drop(tokio::spawn(traffic.clone().oneshot(get)));
            }
        })
    });
    sleep(10 * SECOND + SECOND / 80).await;
    world.fal.accept(2);
    let mut after = None;
    for count in 1..=100 {
        let to_another = request(Method::POST, "https://fal.run/other/app", PROMPT);
        accepted(client.clone().oneshot(to_another).await);
        if world.store.status().accepted && world.store.status().pending.is_none() {
            after = Some(count);
            break;
        }
        sleep(5 * SECOND).await;
    }
    traffic.inspect(tokio::task::JoinHandle::abort);
    after
}

#[tokio::test(start_paused = true)]
async fn requests_to_other_hosts_take_no_tries() {
    for downloads in [false, true] {
        let after = accepted_beside_downloads(downloads).await;
        assert!(after.is_some_and(|count| count <= 3), "after {after:?} requests, with downloads: {downloads}");
    }
}

/// The replay of the first request takes a while, as the making of an image does.
#[tokio::test(start_paused = true)]
async fn while_the_proof_is_on_its_way_few_bodies_are_lost() {
    let (world, client) = proven().await;
    world.rotate(2);
    world.fal.hold_key(1);
    let first = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(3).await;
    let others: Vec<_> = (0..20)
        .map(|n| tokio::spawn(client.clone().oneshot(large_to(&format!("https://fal.run/fal-ai/app-{n}")))))
        .collect();
    sleep(30 * SECOND).await;
    world.fal.release();
    accepted(first.await.unwrap());
    let mut failed = 0;
    for other in others {
        failed += usize::from(other.await.unwrap().is_err());
    }
    assert!(failed <= 4, "{failed} of 20");
}

// Beside a liar.

/// The new key is good. One application refuses it, and takes the old one. How long until an honest request, one each
/// second, has shown that the new one is accepted?
async fn accepted_after(names: usize) -> Option<u32> {
    let (world, client) = proven().await;
    world.fal.accept(2);
    world.rotate(2);
    world.fal.will_answer(unknown_key());
    world.fal.will_answer(answer(200, "{}"));
    accepted(client.clone().oneshot(to_liar(0)).await);
    assert!(world.store.status().pending.is_some());
    let lies = (names > 0).then(|| lie_every(SECOND / 40, names, &client));
    sleep(SECOND / 80).await;
    let mut after = None;
    for second in 1..=300 {
        sleep(SECOND).await;
        accepted(client.clone().oneshot(post()).await);
        if world.store.status().accepted && world.store.status().pending.is_none() {
            after = Some(second);
            break;
        }
    }
    lies.inspect(tokio::task::AbortHandle::abort);
    after
}

#[tokio::test(start_paused = true)]
async fn a_liar_with_many_names_puts_off_no_first_try() {
    for names in [0, 1, 1000] {
        let after = accepted_after(names).await;
        assert!(after.is_some_and(|seconds| seconds <= 5), "after {after:?} s beside {names} names");
    }
}

// The status.

/// Honest requests take 5 s each, one begins each half second, and all are accepted. There are two lies, 3 s apart.
#[tokio::test(start_paused = true)]
async fn two_lies_apart_do_not_degrade_a_key_that_works() {
    let (world, client) = proven().await;
    let (store, fal) = (world.store.clone(), world.fal.clone());
    let slow = tower::service_fn(move |request: Request<tower_fal::retry::ReplayBody<Full<Bytes>>>| {
        let fal: Fal = fal.clone();
        let answer = async move {
            sleep(5 * SECOND).await;
            fal.oneshot(request).await
        };
        Box::pin(answer) as Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>
    });
    let honest = tower_fal::FalRetryLayer::new(store.clone()).layer(FalAuthLayer::new(store).layer(slow));
    let traffic = tokio::spawn(async move {
        let mut ticks = interval(SECOND / 2);
        loop {
            ticks.tick().await;
            drop(tokio::spawn(honest.clone().oneshot(post())));
        }
    });
    sleep(20 * SECOND).await;
    let mut degraded = 0;
    for n in 0..20 {
        if n == 0 || n == 6 {
            drop(tokio::spawn(client.clone().oneshot(to_liar(1))));
        }
        sleep(SECOND / 2).await;
        degraded += u32::from(world.store.status().degraded().next().is_some());
    }
    traffic.abort();
    assert_eq!(degraded, 0, "of 20 looks, while two requests a second are accepted");
}

/// `refused_at` is when fal refused it first.
#[tokio::test(start_paused = true)]
async fn a_pending_key_says_when_it_was_refused_first() {
    let (world, client) = proven().await;
    world.rotate(2);
    let refused = std::time::SystemTime::now();
    unauthorized(client.clone().oneshot(large()).await);
    std::thread::sleep(Duration::from_millis(300)); // the wall clock is not paused
    tokio::time::advance(2 * SECOND).await;
    accepted(client.clone().oneshot(request(Method::POST, ADMITTED, PROMPT)).await);
    let pending = world.store.status().pending.unwrap();
    let late = pending.refused_at.duration_since(refused).unwrap();
    assert!(late < Duration::from_millis(200), "{late:?} after it was refused");
}

/// No liar: many names of one owner, of which nothing is noted, do not each try the new key.
#[tokio::test(start_paused = true)]
async fn many_names_of_one_owner_do_not_each_try_the_new_key() {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    sleep(2 * SECOND).await;
    let before = world.fal.keys().len();
    for n in 0..100 {
        let sent = request(Method::POST, &format!("https://fal.run/acme/app-{n}"), PROMPT);
        accepted(client.clone().oneshot(sent).await);
    }
    let tries = world.fal.keys()[before..].iter().filter(|key| **key == 2).count();
    assert!(tries <= 2, "{tries} of 100 requests were sent twice");
}
