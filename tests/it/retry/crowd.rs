//! Many requests at once: one load for all of them, and no crowd that waits without an end.

use std::time::Duration;

use http::Method;
use tokio::{task::JoinSet, time::Instant};
use tower::ServiceExt as _;
use tower_fal::FalAuthError;

use super::{ADMITTED, Answer, RELOAD_WAIT, World, accepted, assert_took, post, request, timed, unauthorized};
use crate::support::{Says, status_where};

const AT_ONCE: Duration = Duration::ZERO;

type Outcome = (Result<Answer, FalAuthError>, Duration);

#[tokio::test(start_paused = true)]
async fn those_for_whom_there_is_no_place_to_wait_are_told_at_once() {
    let world = World::new().await;
    world.fal.revoke(1);
    let retry = world.retry().max_waiting(3);
    let mut requests = JoinSet::new();
    for _ in 0..10 {
        requests.spawn(timed(world.client_by(&retry).oneshot(post())));
    }
    let mut outcomes = requests.join_all().await;
    outcomes.sort_by_key(|(_, took)| *took);
    for (place, (result, took)) in outcomes.into_iter().enumerate() {
        unauthorized(result);
        assert_took(took, if place < 7 { AT_ONCE } else { RELOAD_WAIT });
    }
    assert_eq!(world.fal.keys(), [1; 10]);
}

#[tokio::test(start_paused = true)]
async fn those_who_come_while_a_load_is_under_way_share_it() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    world.source.close();
    let mut requests = JoinSet::new();
    requests.spawn(world.client().oneshot(post()));
    world.source.loads_reach(2).await;
    for _ in 0..100 {
        requests.spawn(world.client().oneshot(post()));
    }
    world.fal.arrivals_reach(101).await;
    tokio::time::sleep(Duration::from_millis(1)).await; // all of them wait
    world.source.open();
    requests.join_all().await.into_iter().for_each(accepted);
    tokio::time::sleep(RELOAD_WAIT).await; // for a load that somebody had asked for
    assert_eq!(world.reloads(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_place_is_freed_by_an_answer_and_by_a_drop() {
    let world = World::new().await;
    world.fal.revoke(1);
    let client = world.client_by(&world.retry().max_waiting(1).overlap(AT_ONCE));
    let dropped = tokio::spawn(client.clone().oneshot(post()));
    world.source.loads_reach(2).await;
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    let answered = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    tokio::task::yield_now().await;
    world.rotate(2);
    world.fal.accept(2);
    accepted(answered.await.unwrap());
    world.fal.revoke(2);
    let request = tokio::spawn(client.oneshot(post()));
    world.fal.arrivals_reach(4).await; // the third of them was a replay
    tokio::task::yield_now().await;
    world.rotate(3);
    world.fal.accept(3);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn with_no_place_to_wait_the_source_is_asked_all_the_same() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let client = world.client_by(&world.retry().max_waiting(0));
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_eq!(took, AT_ONCE);
    status_where(&world.store, |status| status.generation.get() == 2).await;
    accepted(client.oneshot(post()).await);
    assert_eq!(world.reloads(), 1);
}

#[tokio::test(start_paused = true)]
async fn services_of_one_layer_share_the_places_to_wait() {
    let world = World::new().await;
    world.fal.revoke(1);
    let retry = world.retry().max_waiting(1);
    let first = tokio::spawn(timed(world.client_by(&retry).oneshot(post())));
    world.source.loads_reach(2).await;
    let (result, took) = timed(world.client_by(&retry.clone()).oneshot(post())).await;
    unauthorized(result);
    assert_eq!(took, AT_ONCE);
    assert_took(first.await.unwrap().1, RELOAD_WAIT);
}

/// The wait brought no newer key. The source is not asked meanwhile.
#[tokio::test(start_paused = true)]
async fn after_one_full_wait_later_requests_fail_at_once() {
    let world = World::new().await;
    world.fal.revoke(1);
    let client = world.client();
    unauthorized(client.clone().oneshot(post()).await);
    // Loads after 0 s, after about 1 s, and 200 ms before the end of the wait; the next may come after another 3.2 s.
    assert_eq!(world.reloads(), 3);
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_eq!((world.reloads(), took), (3, AT_ONCE));

    // When the source may be asked again, the load is waited for, and nothing else.
    tokio::time::advance(Duration::from_secs(5)).await;
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_eq!((world.reloads(), took), (4, AT_ONCE));

    tokio::time::advance(Duration::from_secs(10)).await;
    world.source.brings(2);
    world.fal.accept(2);
    accepted(client.clone().oneshot(post()).await);
    assert_eq!(world.reloads(), 5);

    // What was in vain for one key is not held against the next.
    world.fal.revoke(2);
    let (result, took) = timed(client.oneshot(post())).await;
    unauthorized(result);
    assert_took(took, RELOAD_WAIT);
}

#[tokio::test(start_paused = true)]
async fn what_was_in_vain_a_while_ago_is_waited_for_again() {
    let world = World::new().await;
    world.fal.revoke(1);
    let client = world.client();
    unauthorized(client.clone().oneshot(post()).await);
    tokio::time::advance(Duration::from_secs(61)).await;
    let request = tokio::spawn(client.oneshot(post()));
    let loads = world.source.loads();
    world.source.loads_reach(loads + 1).await; // which still brings the old one
    world.fal.accept(2);
    world.source.brings(2);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_comes_late_in_the_wait_is_still_seen() {
    for late in [300, 900, 1300, 1700].map(Duration::from_millis) {
        let world = World::new().await;
        world.fal.revoke(1);
        let request = tokio::spawn(world.client().oneshot(post()));
        tokio::time::sleep(late).await;
        world.fal.accept(2);
        world.source.brings(2);
        accepted(request.await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_full_wait_the_error_says_why_the_reload_failed() {
    let world = World::new().await;
    world.fal.revoke(1);
    world.source.says(Says::Error);
    let client = world.client();
    for _ in 0..3 {
        assert!(unauthorized(client.clone().oneshot(post()).await).reload_error().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_wait_in_vain_a_load_that_hangs_is_still_waited_for() {
    let world = World::new().await;
    world.fal.revoke(1);
    let client = world.client();
    unauthorized(client.clone().oneshot(post()).await);
    tokio::time::advance(Duration::from_secs(5)).await;
    world.source.brings(2);
    world.fal.accept(2);
    world.source.close();
    let request = tokio::spawn(client.oneshot(post()));
    let loads = world.source.loads();
    world.source.loads_reach(loads + 1).await;
    world.source.open();
    accepted(request.await.unwrap());
}

const CROWD: usize = 10_000;

/// They are in flight with a revoked key. The second load brings the new one.
#[tokio::test(start_paused = true)]
async fn ten_thousand_refused_requests_cost_two_loads() {
    let world = World::new().await;
    let retry = world.retry().max_waiting(CROWD);
    world.fal.hold();
    let mut requests = JoinSet::new();
    let body = vec![b'x'; 1024];
    for _ in 0..CROWD {
        let request = request(Method::POST, ADMITTED, body.clone());
        requests.spawn(timed(world.client_by(&retry).oneshot(request)));
    }
    world.fal.arrivals_reach(CROWD).await;
    assert_eq!(retry.replay_memory_used(), CROWD * 1024);
    world.fal.knows_only(2);
    world.fal.release();
    world.source.loads_reach(2).await;
    while world.fal.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.reloads(), 1, "while the source has the old one");
    assert_eq!((requests.len(), retry.replay_memory_used()), (CROWD, CROWD * 1024));

    world.source.brings(2);
    let outcomes: Vec<Outcome> = requests.join_all().await;
    assert_eq!(outcomes.len(), CROWD);
    for (result, took) in outcomes {
        accepted(result);
        assert!(took < RELOAD_WAIT, "{took:?}");
    }
    assert_eq!(world.reloads(), 2);
    let keys = world.fal.keys();
    assert_eq!(keys.iter().filter(|&&n| n == 1).count(), CROWD);
    assert_eq!(keys.iter().filter(|&&n| n == 2).count(), CROWD);
    assert!(world.fal.arrived().iter().all(|arrived| arrived.body == body));
    assert_eq!((retry.replay_memory_used(), retry.replay_memory_refused()), (0, 0));
}

/// A request that got none of it is sent once.
#[tokio::test(start_paused = true)]
async fn the_memory_for_replays_is_bounded() {
    const FIT: usize = 100;
    let world = World::new().await;
    let retry = world.retry().replay_memory(FIT * 1024);
    world.fal.hold();
    let mut requests = JoinSet::new();
    for _ in 0..FIT * 3 {
        let request = request(Method::POST, ADMITTED, vec![b'x'; 1024]);
        requests.spawn(world.client_by(&retry).oneshot(request));
    }
    world.fal.arrivals_reach(FIT * 3).await;
    assert_eq!(retry.replay_memory_used(), FIT * 1024);
    assert_eq!(retry.replay_memory_refused(), 2 * FIT as u64);
    world.fal.knows_only(2);
    world.source.brings(2);
    world.fal.release();
    let (sent_again, once): (Vec<_>, Vec<_>) = requests.join_all().await.into_iter().partition(Result::is_ok);
    assert_eq!((sent_again.len(), once.len()), (FIT, 2 * FIT));
    sent_again.into_iter().for_each(accepted);
    assert!(once.into_iter().all(|result| !unauthorized(result).is_replayable()));
    assert_eq!((world.reloads(), retry.replay_memory_used()), (1, 0));
}

/// The bound: after a load the source is left alone for 1 s, 2 s, 4 s, 8 s, 16 s, each a fifth less at the least. So
/// within 30 s there are loads after 0, 0.8, 2.4, 5.6, 12 and 24.8 s at the earliest: six. A fifth more each time
/// makes it five.
#[tokio::test(start_paused = true)]
async fn a_key_that_stays_revoked_costs_few_loads_and_no_waiting() {
    const SECONDS: u64 = 30;
    let world = World::new().await;
    world.fal.revoke(1);
    let retry = world.retry();
    let client = world.client_by(&retry);
    let mut requests = JoinSet::new();
    let began = Instant::now();
    for n in 0..SECONDS * 1000 {
        tokio::time::sleep_until(began + Duration::from_millis(n)).await;
        let client = client.clone();
        requests.spawn(async move { (n, timed(client.oneshot(post())).await) });
    }
    let outcomes = requests.join_all().await;
    assert_eq!(outcomes.len(), 30_000);
    let mut waited = 0;
    for (n, (result, took)) in outcomes {
        unauthorized(result);
        if took > AT_ONCE {
            waited += 1;
            assert!(n <= 2_001, "request {n} waited {took:?}");
            assert_took(took, RELOAD_WAIT);
        }
    }
    assert_eq!(waited, 1024, "as many as may wait");
    let loads = world.reloads();
    assert!((5..=7).contains(&loads), "{loads} loads");
    assert_eq!((world.fal.keys().len(), retry.replay_memory_used()), (30_000, 0));
}
