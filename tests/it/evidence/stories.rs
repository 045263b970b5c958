//! What a lie must not do, in one story each.

use super::{
    Answer, Arc, Duration, Hostile, Instant, Outcome, SECOND, StatusCode, World,
    client::{Kind, Network},
    json, sleep, told,
};
use crate::support::key;

const PERIOD: Duration = Duration::from_millis(500);

/// Everybody whom the hostile application may be called by, and how.
const RUNS: [(Kind, Hostile); 6] = [
    (Kind::HyperUtil, Hostile::Absent),
    (Kind::HyperUtil, Hostile::ByARunner),
    (Kind::HyperUtil, Hostile::Disguised),
    (Kind::Reqwest, Hostile::Absent),
    (Kind::Reqwest, Hostile::ByARunner),
    (Kind::Reqwest, Hostile::Disguised),
];

/// Tells a story with each client, without the hostile application, with it, and with it in disguise.
async fn in_all_runs(
    poll: Option<Duration>,
    period: Duration,
    story: impl AsyncFn(&Arc<World>),
) -> Vec<(Kind, Hostile, Outcome)> {
    let mut outcomes = Vec::new();
    for (kind, hostile) in RUNS {
        let world = World::new(kind, Network::Paused, hostile, poll).await;
        outcomes.push((kind, hostile, told(world, period, &story).await));
    }
    outcomes
}

#[track_caller]
fn nobody_else_failed(outcomes: &[(Kind, Hostile, Outcome)]) {
    for (kind, hostile, outcome) in outcomes {
        assert!(outcome.answered >= 50, "{kind:?}, {hostile:?}: {outcome:?}");
        assert!(outcome.failed.is_empty(), "{kind:?}, {hostile:?}: {} of {outcome:?}", outcome.failed.len());
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_lies_after_a_rotation_runs_once() {
    let outcomes = in_all_runs(None, PERIOD, async |world| {
        sleep(2 * SECOND).await;
        world.fal.accept(&key(2));
        world.bring(2).await;
        // Nothing has proved the new key yet. Without a runner's headers the refusal may be fal's, of a key too early.
        if world.hostile == Hostile::ByARunner {
            world.lie().await;
            assert_eq!(world.calls(), [1; 3]);
        }
        sleep(2 * SECOND).await;
        world.fal.clear_received();
        world.lie().await;
        assert!(world.calls().iter().all(|calls| *calls == 1), "{:?}: {:?}", world.hostile, world.calls());
    })
    .await;
    nobody_else_failed(&outcomes);
}

#[tokio::test(start_paused = true)]
async fn a_lie_before_fal_knows_the_new_key_fails_nobody_else() {
    let outcomes = in_all_runs(None, PERIOD, async |world| {
        sleep(2 * SECOND).await;
        world.bring(2).await;
        world.lie().await;
        sleep(4 * SECOND).await;
        world.switch_to(2);
        sleep(3 * SECOND).await;
    })
    .await;
    nobody_else_failed(&outcomes);
}

#[tokio::test(start_paused = true)]
async fn a_lie_before_a_revoke_has_everybody_wait_all_the_same() {
    for successor_after in [SECOND * 3 / 5, SECOND * 3 / 2] {
        let outcomes = in_all_runs(None, PERIOD, async |world| {
            sleep(2 * SECOND).await;
            world.lie().await;
            sleep(SECOND / 5).await;
            world.switch_to(2);
            sleep(successor_after).await;
            world.source.brings(2);
            sleep(3 * SECOND).await;
        })
        .await;
        nobody_else_failed(&outcomes);
    }
}

/// The source is asked every 300 s, and else only because of refusals.
#[tokio::test(start_paused = true)]
async fn an_application_that_lies_makes_no_outage_longer() {
    const REVOKED: Duration = Duration::from_secs(30);
    let outcomes = in_all_runs(Some(300 * SECOND), 4 * PERIOD, async |world| {
        let lies = world.lie_every(SECOND);
        sleep(REVOKED).await;
        world.switch_to(2);
        sleep(SECOND * 5 / 2).await;
        world.source.brings(2);
        sleep(20 * SECOND).await;
        lies.abort();
    })
    .await;
    let outage = |outcome: &Outcome| {
        assert!(outcome.failed[0].0 > REVOKED && outcome.answered > 200, "{outcome:?}");
        outcome.failed.last().unwrap().0 - REVOKED
    };
    let without = outcomes.iter().filter(|run| run.1 == Hostile::Absent).map(|run| outage(&run.2)).max().unwrap();
    for (kind, hostile, outcome) in &outcomes {
        let outage = outage(outcome);
        // The pauses between reloads vary by a fifth, one way or the other.
        assert!(outage <= without * 3 / 2, "{kind:?}, {hostile:?}: {outage:?}, and {without:?} without it");
    }
}

#[tokio::test(start_paused = true)]
async fn a_good_key_is_not_shown_as_refused() {
    let outcomes = in_all_runs(None, PERIOD, async |world| {
        sleep(SECOND).await;
        let lies = world.lie_every(SECOND / 10);
        sleep(10 * SECOND).await;
        lies.abort();
        if world.hostile == Hostile::ByARunner {
            world.fal.accept(&key(2));
            world.bring(2).await;
            world.lie().await;
        }
        assert!(world.store.status().accepted);
    })
    .await;
    for (kind, hostile, outcome) in &outcomes {
        // Only who is fal, or looks like it, can say that the account is locked.
        let shown: &[_] = if *hostile == Hostile::Disguised { &["account_locked"] } else { &[] };
        assert!(outcome.degraded.iter().eq(shown), "{kind:?}, {hostile:?}: {:?}", outcome.degraded);
    }
    nobody_else_failed(&outcomes);
}

#[tokio::test(start_paused = true)]
async fn what_another_key_does_not_cure_costs_its_own_caller_no_wait() {
    let outcomes = in_all_runs(None, PERIOD, async |world| {
        sleep(2 * SECOND).await;
        for (app, took) in world.lie().await {
            // Of an unknown key it takes a success of somebody else to know better.
            let limit = if app.ends_with("unknown") { SECOND } else { SECOND / 20 };
            assert!(took < limit, "{app}, {:?}: {took:?}", world.hostile);
        }
        sleep(SECOND).await;
    })
    .await;
    nobody_else_failed(&outcomes);
}

/// Half a key, or a mistyped one, and then one that fal does not know yet, each this long after the other.
async fn bad_keys_in_a_row(world: &Arc<World>, pause: Duration) {
    sleep(SECOND).await;
    let lies = world.lie_every(SECOND / 10);
    for n in 2..10 {
        world.bring(n).await;
        sleep(pause).await;
    }
    sleep(3 * SECOND).await;
    world.fal.accept(&key(9));
    world.fal.revoke(&key(1));
    sleep(3 * SECOND).await;
    lies.abort();
    assert_eq!(world.store.status().key_id.as_ref().unwrap().as_str(), "id-9");
}

/// So close to each other that there are requests under way with the one when the other arrives.
const CLOSE: Duration = Duration::from_millis(13);

#[tokio::test(start_paused = true)]
async fn bad_keys_in_a_row_fail_nobody() {
    let outcomes = in_all_runs(None, PERIOD, async |world| {
        let pause = if world.hostile == Hostile::Disguised { SECOND / 2 } else { CLOSE };
        bad_keys_in_a_row(world, pause).await;
    })
    .await;
    nobody_else_failed(&outcomes);
}

/// A lie about the good key, just before, must not have the newer ones tried first.
#[tokio::test(start_paused = true)]
async fn bad_keys_in_a_row_and_lies_about_the_good_one_fail_nobody() {
    for kind in [Kind::HyperUtil, Kind::Reqwest] {
        let world = World::new(kind, Network::Paused, Hostile::Disguised, None).await;
        let outcome = told(world, PERIOD, async |world| bad_keys_in_a_row(world, CLOSE).await).await;
        nobody_else_failed(&[(kind, Hostile::Disguised, outcome)]);
    }
}

/// fal refuses the new key, switches at that moment, and refuses the old one.
#[tokio::test(start_paused = true)]
async fn a_switch_between_two_attempts_fails_nobody_and_costs_no_wait() {
    for (kind, hostile) in RUNS {
        let world = World::new(kind, Network::Paused, hostile, None).await;
        let lies = world.lie_every(SECOND / 10);
        for n in 2..20 {
            world.post("fal-ai/flux").await.unwrap();
            world.bring(n).await;
            let (sender, begin) = (Arc::clone(&world), Instant::now());
            let request = tokio::spawn(async move { sender.post("fal-ai/flux").await });
            // The first attempt takes 2 to 20 ms in all.
            sleep(Duration::from_millis(fastrand::u64(2..=20))).await;
            world.switch_to(n);
            assert_eq!(request.await.unwrap(), Ok(()), "{kind:?}, {hostile:?}");
            assert!(begin.elapsed() < SECOND, "{kind:?}, {hostile:?}: {:?}", begin.elapsed());
        }
        lies.abort();
    }
}

/// Others send a request in 10 s, so nothing proves the key in between. fal revokes it before its successor is there.
async fn revokes_under_sparse_traffic(world: &Arc<World>, kind: Kind) {
    for n in 2..5 {
        for _ in 0..2 {
            assert_eq!(world.post("fal-ai/flux").await, Ok(()), "{kind:?}, {:?}, {n}", world.hostile);
            sleep(10 * SECOND).await;
        }
        world.switch_to(n);
        let sender = Arc::clone(world);
        let request = tokio::spawn(async move { sender.post("fal-ai/flux").await });
        sleep(SECOND).await;
        world.source.brings(n);
        assert_eq!(request.await.unwrap(), Ok(()), "{kind:?}, {:?}, {n}", world.hostile);
    }
}

#[tokio::test(start_paused = true)]
async fn a_revoke_under_sparse_traffic_and_lies_fails_nobody() {
    for (kind, hostile) in RUNS {
        let world = World::new(kind, Network::Paused, hostile, None).await;
        let lies = world.lie_every(SECOND / 30); // each of them 10 times a second
        revokes_under_sparse_traffic(&world, kind).await;
        lies.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_revoke_under_lies_of_many_names_fails_nobody() {
    for kind in [Kind::HyperUtil, Kind::Reqwest] {
        let world = World::new(kind, Network::Paused, Hostile::Disguised, None).await;
        let names: Vec<_> = (0..200).map(|n| format!("disguised/app-{n}")).collect();
        for name in &names {
            let lie = Answer::json(json!({ "detail": "invalid key credentials" })).status(StatusCode::UNAUTHORIZED);
            world.fal.answer(name, lie.without_runner_headers());
        }
        let lies = world.call_every(SECOND / 20, names);
        revokes_under_sparse_traffic(&world, kind).await;
        lies.abort();
        // Beside the first one of all, a few in a row and then one each 150 ms.
        let (loads, time) = (world.source.loads(), world.begin.elapsed());
        assert!(loads as f64 <= 10.0 + time.as_secs_f64() / 0.15, "{loads} in {time:?}");
    }
}
