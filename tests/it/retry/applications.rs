//! What an application behind fal claims takes no load and no wait from the requests to others.
//!
//! The applications of the owner `liar` say in fal's own words that it does not know the key. The honest traffic is
//! sparse, so that nothing proves the key meanwhile.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::{
    task::AbortHandle,
    time::{Instant, interval, sleep},
};
use tower::ServiceExt as _;

use super::{
    ADMITTED, Client, PROMPT, RELOAD_WAIT, World, accepted, answer, post, refusal, request, timed, unauthorized,
};

const AT_ONCE: Duration = Duration::ZERO;
const SECOND: Duration = Duration::from_secs(1);

/// To application number `n` of the liar.
pub(super) fn to_liar(n: usize) -> Request<Full<Bytes>> {
    request(Method::POST, &format!("https://fal.run/liar/app-{n}"), PROMPT)
}

/// Calls so many applications of the liar in turns, this often in all, until the handle is aborted.
pub(super) fn lie_every(period: Duration, names: usize, client: &Client) -> AbortHandle {
    let client = client.clone();
    let calls = async move {
        let mut ticks = interval(period);
        for n in (0..names).cycle() {
            ticks.tick().await;
            tokio::spawn(client.clone().oneshot(to_liar(n)));
        }
    };
    tokio::spawn(calls).abort_handle()
}

/// fal revokes the key, an honest request meets that, and the new key is in place a second later.
async fn meet_a_revoke(world: &World, client: &Client, n: u64) {
    world.fal.knows_only(n);
    let waiting = tokio::spawn(client.clone().oneshot(post()));
    sleep(SECOND).await;
    world.source.brings(n);
    accepted(waiting.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_liar_takes_no_wait_from_sparse_traffic() {
    for names in [1, 3, 200] {
        let world = World::new().await;
        let client = world.client();
        accepted(client.clone().oneshot(post()).await);
        let lies = lie_every(SECOND / 10, names, &client);
        for n in 2..10 {
            for _ in 0..3 {
                sleep(10 * SECOND).await;
                accepted(client.clone().oneshot(post()).await);
            }
            sleep(10 * SECOND).await;
            meet_a_revoke(&world, &client, n).await;
        }
        lies.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_liar_uses_up_no_load_of_another_application() {
    // It has waited in vain a moment ago, with the last chance that it has for a minute, and cools down for long.
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    let lies = lie_every(SECOND / 10, 1, &client);
    sleep(50 * SECOND).await;
    lies.abort();
    sleep(RELOAD_WAIT).await;
    let before = world.reloads();
    world.fal.knows_only(2);
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_eq!((took.as_secs(), world.reloads() - before), (2, 3), "at 0 and 1 s, and the last chance");
}

#[tokio::test(start_paused = true)]
async fn a_403_takes_no_load_from_another_application() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().reload_on_forbidden());
    let denied = || answer(403, r#"{"detail":"Access denied"}"#);
    for _ in 0..2 {
        world.fal.will_answer(denied());
        refusal(client.clone().oneshot(to_liar(1)).await);
    }
    assert_eq!(world.reloads(), 1, "of an application one in a minute");
    sleep(SECOND).await;
    world.fal.will_answer(denied());
    world.fal.knows_only(2);
    world.source.brings(2);
    accepted(client.oneshot(post()).await);
}

#[tokio::test(start_paused = true)]
async fn a_crowd_of_one_owner_leaves_places_to_others() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().max_waiting(16));
    accepted(client.clone().oneshot(post()).await);
    let lies = lie_every(SECOND / 100, 1000, &client);
    sleep(5 * SECOND).await;
    meet_a_revoke(&world, &client, 2).await;
    lies.abort();
}

#[tokio::test(start_paused = true)]
async fn a_liar_with_many_names_causes_few_loads() {
    let world = World::new().await;
    let client = world.client();
    let lies = lie_every(SECOND / 40, 1000, &client);
    for _ in 0..6 {
        sleep(10 * SECOND).await;
        accepted(client.clone().oneshot(post()).await);
    }
    lies.abort();
    assert!((60..=410).contains(&world.reloads()), "{}", world.reloads());
}

#[tokio::test(start_paused = true)]
async fn many_liars_put_off_no_last_load_of_a_wait() {
    for late in (1300..1800).step_by(50).map(Duration::from_millis) {
        let world = World::new().await;
        let client = world.client();
        accepted(client.clone().oneshot(post()).await);
        let lies = lie_every(SECOND / 40, 1000, &client);
        sleep(5 * SECOND).await;
        world.fal.knows_only(2);
        let waiting = tokio::spawn(client.clone().oneshot(post()));
        sleep(late).await;
        world.source.brings(2);
        accepted(waiting.await.unwrap());
        lies.abort();
    }
}

// A new key that fal does not take yet.

#[tokio::test(start_paused = true)]
async fn a_liar_puts_off_no_try_of_the_new_key() {
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    // The liar refuses both keys, again and again.
    for _ in 0..600 {
        unauthorized(client.clone().oneshot(to_liar(1)).await);
        sleep(SECOND / 10).await;
    }
    world.fal.accept(2);
    accepted(client.clone().oneshot(post()).await);
    assert_eq!(world.store.status().key_id.unwrap().as_str(), "id-2");
}

#[tokio::test(start_paused = true)]
async fn lies_about_the_other_key_risk_no_body_that_goes_once() {
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    let large = |uri| request(Method::POST, uri, vec![b'x'; 1024 * 1024]);
    for _ in 0..20 {
        // Nothing but lies about the key in use, for far over two seconds.
        for _ in 0..40 {
            unauthorized(client.clone().oneshot(large("https://fal.run/liar/app-1")).await);
            sleep(SECOND / 10).await;
        }
        accepted(client.clone().oneshot(large(ADMITTED)).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_liar_with_many_names_has_no_other_wait_again() {
    let world = World::new().await;
    let client = world.client();
    world.fal.revoke(1);
    let lies = lie_every(SECOND / 40, 1000, &client);
    sleep(5 * SECOND).await;
    let begin = Instant::now();
    while begin.elapsed() < 60 * SECOND {
        let (result, took) = timed(client.clone().oneshot(post())).await;
        unauthorized(result);
        let expected = if begin.elapsed() == took { RELOAD_WAIT } else { AT_ONCE };
        assert_eq!(took.as_secs(), expected.as_secs(), "after {:?}", begin.elapsed());
        sleep(SECOND).await;
    }
    lies.abort();
}
