//! What a lie about the key does to the requests to other applications: nothing. Most of these are also run without the
//! liar, which shows what an honest request gets then.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::{
    task::AbortHandle,
    time::{interval, sleep},
};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer,
    error::{BoxError, SourceError},
    origin::FalOrigins,
    source::CredentialSource,
    store::Degraded,
};

use super::{
    ADMITTED, Answer, Client, Fal, PROMPT, World, accepted, answer,
    applications::{lie_every, to_liar},
    post, request, timed, unauthorized,
};
use crate::support::{Says, Script, key};

const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

fn to(uri: &str) -> Request<Full<Bytes>> {
    request(Method::POST, uri, PROMPT)
}

fn large() -> Request<Full<Bytes>> {
    request(Method::POST, ADMITTED, vec![b'x'; 1024 * 1024])
}

async fn proven() -> (World, Client) {
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    (world, client)
}

// One lie about a new key that is good.

async fn revoked_first(liar: bool) {
    let (world, client) = proven().await;
    world.fal.knows_only(2);
    sleep(10 * SECOND).await;
    world.rotate(2); // The new key is good, and the old one is dead.
    if liar {
        unauthorized(client.clone().oneshot(to_liar(1)).await);
    }
    accepted(client.clone().oneshot(large()).await);
}

#[tokio::test(start_paused = true)]
async fn one_lie_brings_no_revoked_key_back() {
    for liar in [false, true] {
        revoked_first(liar).await;
    }
}

/// The old key is known to be refused, for long, by the honest application itself.
async fn known_to_be_revoked(liar: bool) {
    let (world, client) = proven().await;
    world.fal.knows_only(2);
    for _ in 0..5 {
        unauthorized(client.clone().oneshot(post()).await);
        sleep(SECOND).await;
    }
    world.rotate(2);
    if liar {
        unauthorized(client.clone().oneshot(to_liar(1)).await);
    }
    accepted(client.clone().oneshot(large()).await);
}

#[tokio::test(start_paused = true)]
async fn one_lie_brings_no_key_back_that_all_have_refused() {
    for liar in [false, true] {
        known_to_be_revoked(liar).await;
    }
}

/// The order to choose, by a server whose honest requests are all large.
async fn only_large(liar: bool) {
    let (world, client) = proven().await;
    world.fal.accept(2);
    world.rotate(2);
    if liar {
        unauthorized(client.clone().oneshot(to_liar(1)).await);
    }
    for _ in 0..600 {
        sleep(SECOND).await;
        accepted(client.clone().oneshot(large()).await);
    }
    let status = world.store.status();
    assert_eq!((status.key_id.unwrap().as_str(), status.accepted), ("id-2", true), "the operator waits for this");
}

#[tokio::test(start_paused = true)]
async fn one_lie_keeps_no_good_key_out_of_use() {
    for liar in [false, true] {
        only_large(liar).await;
    }
}

/// The server has called nothing but the liar when its key is rotated early.
async fn early_before_the_first_success(liar: bool) {
    let world = World::new().await;
    let client = world.client();
    if liar {
        unauthorized(client.clone().oneshot(to_liar(1)).await);
    }
    world.rotate(2); // fal does not take it yet
    let (result, took) = timed(client.clone().oneshot(post())).await;
    accepted(result);
    assert!(took < SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lie_before_the_first_success_leaves_the_way_back() {
    for liar in [false, true] {
        early_before_the_first_success(liar).await;
    }
}

// A gateway, where one liar is many owners.

const GATEWAY: &str = "https://gateway.example.com";

fn by_gateway(world: &World, places: usize) -> Client {
    let origins = FalOrigins::new().and(GATEWAY).unwrap();
    let auth = FalAuthLayer::new(world.store.clone()).origins(origins);
    world.retry().max_waiting(places).layer(auth.layer(world.fal.clone()))
}

/// One application, with an id in its paths.
fn to_gateways_liar(n: usize) -> Request<Full<Bytes>> {
    to(&format!("{GATEWAY}/liar/app/items/{n}/run"))
}

fn lie_at_gateway(period: Duration, client: &Client) -> AbortHandle {
    let client = client.clone();
    let calls = async move {
        let mut ticks = interval(period);
        for n in 0.. {
            ticks.tick().await;
            tokio::spawn(client.clone().oneshot(to_gateways_liar(n)));
        }
    };
    tokio::spawn(calls).abort_handle()
}

async fn gateway_places(liar: bool) {
    let world = World::new().await;
    let client = by_gateway(&world, 16);
    let honest = || to(&format!("{GATEWAY}/fal-ai/flux/dev"));
    accepted(client.clone().oneshot(honest()).await);
    let lies = liar.then(|| lie_at_gateway(SECOND / 100, &client));
    sleep(5 * SECOND).await;
    world.fal.knows_only(2);
    let waiting = tokio::spawn(client.clone().oneshot(honest()));
    sleep(SECOND).await;
    world.source.brings(2);
    let result = waiting.await.unwrap();
    lies.inspect(AbortHandle::abort);
    accepted(result);
}

#[tokio::test(start_paused = true)]
async fn one_liar_behind_a_gateway_leaves_places() {
    for liar in [false, true] {
        gateway_places(liar).await;
    }
}

async fn gateway_notes(liar: bool) {
    let world = World::new().await;
    let client = by_gateway(&world, 1024);
    world.fal.revoke(1);
    let honest = || to(&format!("{GATEWAY}/fal-ai/flux/dev"));
    let lies = liar.then(|| lie_at_gateway(SECOND / 10, &client));
    unauthorized(client.clone().oneshot(honest()).await);
    sleep(20 * SECOND).await;
    let (result, took) = timed(client.clone().oneshot(honest())).await;
    unauthorized(result);
    lies.inspect(AbortHandle::abort);
    assert!(took < SECOND, "{took:?}: it has waited in vain 20 s ago");
}

#[tokio::test(start_paused = true)]
async fn one_liar_behind_a_gateway_has_nobody_forgotten() {
    for liar in [false, true] {
        gateway_notes(liar).await;
    }
}

/// No liar at all: honest paths with ids in them, while fal does not take the new key.
#[tokio::test(start_paused = true)]
async fn ids_in_paths_do_not_each_try_the_new_key() {
    let world = World::new().await;
    let client = by_gateway(&world, 1024);
    let honest = |n| to(&format!("{GATEWAY}/fal-ai/files/{n}"));
    accepted(client.clone().oneshot(honest(0)).await);
    world.rotate(2);
    accepted(client.clone().oneshot(honest(0)).await);
    sleep(2 * SECOND).await;
    let before = world.fal.keys().len();
    for n in 1..=100 {
        accepted(client.clone().oneshot(honest(n)).await);
    }
    let tries = world.fal.keys()[before..].iter().filter(|key| **key == 2).count();
    assert!(tries <= 2, "{tries} of 100 requests were sent twice");
}

/// The paths of the gateway begin with this.
async fn gateway_below(path: &str) {
    let world = World::new().await;
    let client = by_gateway(&world, 1024);
    let honest = || to(&format!("{GATEWAY}{path}/fal-ai/flux/dev"));
    accepted(client.clone().oneshot(honest()).await);
    let lie = tokio::spawn(client.clone().oneshot(to(&format!("{GATEWAY}{path}/crook/app"))));
    world.fal.will_answer(super::unknown_key());
    unauthorized(lie.await.unwrap());
    world.fal.knows_only(2);
    let waiting = tokio::spawn(client.clone().oneshot(honest()));
    sleep(SECOND).await;
    world.source.brings(2);
    accepted(waiting.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn below_a_gateway_applications_are_told_apart() {
    for prefix in ["/calls", "/requests"] {
        gateway_below(prefix).await;
    }
}

// Loads.

/// A source that makes up its mind at once, and takes a while to say so.
struct Slow(Script, Duration);

impl CredentialSource for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        let answer = self.0.load().await;
        sleep(self.1).await;
        answer
    }

    fn poll_interval(&self) -> Option<Duration> {
        None
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_of_two_kinds_cause_no_more_loads_than_of_one() {
    let fal = Fal::default();
    fal.accept(1);
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(Slow(source.clone(), 20 * MILLI)).build().await.unwrap();
    let world = World { fal, source, store };
    let client = world.client_by(&world.retry().reload_on_forbidden().max_waiting(0));
    let mut n = 0;
    for _ in 0..6000 {
        n += 1;
        world.fal.will_answer(answer(403, r#"{"detail":"Access denied"}"#));
        tokio::spawn(client.clone().oneshot(to_liar(n)));
        sleep(5 * MILLI).await;
        tokio::spawn(client.clone().oneshot(to_liar(n)));
        sleep(5 * MILLI).await;
    }
    assert!(world.reloads() <= 410, "{} loads in a minute", world.reloads());
}

// The status.

/// Honest requests take 5 s each, as the making of an image does, and one begins each half second.
async fn slow_honest_traffic(liar: bool) {
    let (world, client) = proven().await;
    let lies = liar.then(|| lie_every(SECOND / 10, 1, &client));
    let traffic = {
        let (store, fal) = (world.store.clone(), world.fal.clone());
        let slow = tower::service_fn(move |request: Request<tower_fal::retry::ReplayBody<Full<Bytes>>>| {
            let fal = fal.clone();
            let answer = async move {
                sleep(5 * SECOND).await;
                fal.oneshot(request).await
            };
            Box::pin(answer) as Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>
        });
        let client = tower_fal::FalRetryLayer::new(store.clone()).layer(FalAuthLayer::new(store).layer(slow));
        tokio::spawn(async move {
            loop {
                drop(tokio::spawn(client.clone().oneshot(post())));
                sleep(SECOND / 2).await;
            }
        })
    };
    sleep(6 * SECOND).await; // the first of them has its answer
    let mut degraded = 0;
    for _ in 0..120 {
        sleep(SECOND / 2).await;
        degraded += u32::from(world.store.status().degraded().any(|problem| problem == Degraded::Refused));
    }
    traffic.abort();
    lies.inspect(AbortHandle::abort);
    assert_eq!(degraded, 0, "of 120 looks, while two requests a second are accepted");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_slow_requests_prove_is_not_degraded() {
    for liar in [false, true] {
        slow_honest_traffic(liar).await;
    }
}
