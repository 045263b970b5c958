//! Whose refusal is it? A stamp belongs to one store, a success is proof, and a refusal is a claim.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use tower::{Layer as _, ServiceBuilder, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuthError, FalAuthLayer, origin::FalOrigins, store::Degraded};

use super::{
    ADMITTED, Answer, Client, Fal, PROMPT, RELOAD_WAIT, World, accepted, answer, assert_took, post, refusal, request,
    timed, unauthorized, unknown_key,
};
use crate::support::{Says, key};

const AT_ONCE: Duration = Duration::ZERO;
const SECOND: Duration = Duration::from_secs(1);

/// What only an application behind fal can add to its response.
fn by_a_runner(mut answer: Answer) -> Answer {
    answer.headers_mut().insert("x-fal-served-from", "runner-1".parse().unwrap());
    answer
}

fn private_app() -> Answer {
    answer(401, r#"{"detail":"Cannot access application \"a/b\". Authentication is required."}"#)
}

fn degraded(store: &CredentialStore) -> Vec<Degraded> {
    store.status().degraded().collect()
}

/// The world of a server whose key works, and fal has shown it.
async fn proven() -> (World, Client) {
    let world = World::new().await;
    let client = world.client();
    accepted(client.clone().oneshot(post()).await);
    (world, client)
}

// Identity.

#[tokio::test(start_paused = true)]
async fn a_layer_sends_only_what_its_own_store_holds() {
    let house = World::new().await;
    let gateway = CredentialStore::fixed(key(5));
    let gateways_fal = Fal::default();
    // The house's layers around a layer with another store: what the gateway refuses is no business of the house's.
    let client = ServiceBuilder::new()
        .layer(tower_fal::layer(&house.store).auth(|auth| auth.origins(FalOrigins::new())))
        .layer(FalAuthLayer::new(gateway).origins(FalOrigins::new()))
        .service(gateways_fal.clone());
    house.rotate(2); // so that there is a previous key
    let (result, took) = timed(client.oneshot(post())).await;
    unauthorized(result);
    assert_eq!((gateways_fal.keys(), took, house.reloads()), (vec![5], AT_ONCE, 0));
    assert_eq!(degraded(&house.store), []);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_at_another_generation_is_not_late() {
    let house = World::new().await;
    let (stranger, strangers_fal) = (CredentialStore::fixed(key(5)), Fal::default());
    for n in 2..6 {
        house.rotate(n); // the house is ahead of the stranger by several generations
    }
    let client = house.retry().layer(FalAuthLayer::new(stranger).layer(strangers_fal.clone()));
    let refused = unauthorized(client.oneshot(post()).await);
    assert_eq!(refused.key_id().unwrap().as_str(), "id-5");
    assert_eq!((strangers_fal.keys(), house.reloads()), (vec![5], 0));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_an_inner_layer_has_seen_is_final() {
    for passthrough in [false, true] {
        let world = World::new().await;
        let inner = world.client_by(&world.retry().passthrough());
        let outer = world.retry();
        world.fal.knows_only(7);
        if passthrough {
            let response = outer.passthrough().layer(inner).oneshot(post()).await.unwrap();
            assert_eq!(response.status(), 401);
            let text = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(text, r#"{"detail":"No user found for Key ID and Secret"}"#);
        } else {
            unauthorized(outer.layer(inner).oneshot(post()).await.map(|response| response.map(|_| unreachable!())));
        }
        assert_eq!(world.fal.keys(), [1], "the inner layer has waited and given up; the outer one does no more");
    }
}

// A new key that fal does not take yet.

#[tokio::test(start_paused = true)]
async fn after_its_refusal_requests_go_out_with_the_key_that_works() {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    assert_eq!(world.fal.keys(), [1, 2, 1], "the first one finds out");

    for _ in 0..10 {
        accepted(client.clone().oneshot(post()).await);
    }
    assert_eq!(world.fal.keys()[3..], [1; 10], "the next ones are sent once");

    // A body that cannot be sent again is safe in that time.
    let large = request(Method::POST, ADMITTED, vec![b'x'; 1024 * 1024]);
    accepted(client.clone().oneshot(large).await);
    assert_eq!(world.fal.keys().last(), Some(&1));

    let status = world.store.status();
    assert_eq!(status.key_id.unwrap().as_str(), "id-1");
    let pending = status.pending.unwrap();
    assert_eq!((pending.key_id.unwrap().as_str(), pending.generation.get()), ("id-2", 2));
    assert_eq!(degraded(&world.store), [Degraded::Refused]);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_not_taken_is_tried_with_growing_pauses() {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    let before = world.fal.keys().len();
    for _ in 0..600 {
        tokio::time::advance(SECOND / 5).await;
        accepted(client.clone().oneshot(post()).await);
        // One that cannot be sent again tries nothing.
        accepted(client.clone().oneshot(request(Method::POST, ADMITTED, vec![b'x'; 1024 * 1024])).await);
    }
    let tries = world.fal.keys()[before..].iter().filter(|key| **key == 2).count();
    assert!((5..=8).contains(&tries), "in two minutes after 1, 2, 4, 8, 16, 32, 60 s: {tries}");

    world.fal.accept(2);
    tokio::time::advance(2 * 60 * SECOND).await;
    accepted(client.clone().oneshot(post()).await);
    let status = world.store.status();
    assert_eq!((status.key_id.unwrap().as_str(), status.accepted, status.pending), ("id-2", true, None));
    assert_eq!(degraded(&world.store), []);

    // From now on there is no way back: the previous one is forgotten.
    world.fal.knows_only(1);
    unauthorized(client.oneshot(post()).await);
    assert_eq!(world.fal.keys().last(), Some(&2));
}

#[tokio::test(start_paused = true)]
async fn the_new_key_is_tried_whenever_the_other_one_is_refused() {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await);
    world.fal.knows_only(2); // fal switches from one to the other
    let before = world.fal.keys().len();
    accepted(client.clone().oneshot(post()).await);
    accepted(client.oneshot(post()).await);
    assert_eq!(world.fal.keys()[before..], [1, 2, 2]);
    assert_eq!(world.store.status().key_id.unwrap().as_str(), "id-2");
}

#[tokio::test(start_paused = true)]
async fn a_wait_in_vain_says_nothing_about_a_key_accepted_since() {
    let (world, client) = proven().await;
    world.fal.knows_only(7);
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_took(took, RELOAD_WAIT);
    world.fal.knows_only(1);
    accepted(client.clone().oneshot(post()).await);

    // Now the key is revoked, and its successor comes a little later.
    world.fal.knows_only(2);
    let request = tokio::spawn(client.oneshot(post()));
    tokio::time::sleep(RELOAD_WAIT / 2).await;
    world.rotate(2);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_pending_key_takes_no_wait_from_its_successor() {
    let (world, client) = proven().await;
    world.rotate(2);
    accepted(client.clone().oneshot(post()).await); // fal does not take it

    // The key in use is revoked before the successor of both is there.
    world.fal.knows_only(3);
    let request = tokio::spawn(client.oneshot(post()));
    tokio::time::sleep(RELOAD_WAIT / 2).await;
    world.rotate(3);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_switch_between_two_attempts_fails_nobody() {
    let (world, client) = proven().await;
    world.rotate(2);
    // The new key is refused, then fal switches, then the old key is refused.
    world.fal.will_answer(unknown_key());
    world.fal.will_answer(unknown_key());
    world.fal.knows_only(2);
    let (result, took) = timed(client.oneshot(post())).await;
    accepted(result);
    assert_eq!((world.fal.keys(), took), (vec![1, 2, 1, 2], AT_ONCE));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_an_acceptance_overtakes_fails_nobody() {
    let (world, client) = proven().await;
    world.rotate(2);
    // The new key is refused. Before that is read, fal knows it, and another request shows so.
    let text = async {
        tokio::time::sleep(SECOND / 2).await;
        Ok(Frame::data(Bytes::from_static(br#"{"detail":"No user found for Key ID and Secret"}"#)))
    };
    world.fal.will_answer(super::answer_with(401, StreamBody::new(futures_util::stream::once(text))));
    let refused = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    world.fal.knows_only(2);
    accepted(client.oneshot(post()).await);
    accepted(refused.await.unwrap());
    assert_eq!(world.fal.keys(), [1, 2, 2, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_lie_after_that_acceptance_fails_nobody_either() {
    let (world, client) = proven().await;
    world.rotate(2);
    let refusal = |after: Duration| {
        let text = async move {
            tokio::time::sleep(after).await;
            Ok(Frame::data(Bytes::from_static(br#"{"detail":"No user found for Key ID and Secret"}"#)))
        };
        super::answer_with(401, StreamBody::new(futures_util::stream::once(text)))
    };
    world.fal.will_answer(refusal(SECOND / 2));
    let refused = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    world.fal.knows_only(2);
    accepted(client.clone().oneshot(post()).await);
    world.fal.will_answer(refusal(Duration::ZERO));
    let lied_to = tokio::spawn(client.oneshot(post()));
    accepted(refused.await.unwrap());
    assert_eq!(world.fal.keys(), [1, 2, 2, 2, 2]);
    lied_to.abort();
}

#[tokio::test(start_paused = true)]
async fn a_bad_key_in_between_does_not_end_the_way_back() {
    // Half a key, then the whole one, which fal does not know yet: the one before is the last that was accepted.
    for seen in [false, true] {
        let (world, client) = proven().await;
        world.rotate(2);
        if seen {
            accepted(client.clone().oneshot(post()).await);
        }
        world.rotate(3);
        for _ in 0..3 {
            accepted(client.clone().oneshot(post()).await);
        }
        assert_eq!(world.store.status().key_id.unwrap().as_str(), "id-1");
        assert_eq!(world.store.status().pending.unwrap().key_id.unwrap().as_str(), "id-3");
    }
}

#[tokio::test(start_paused = true)]
async fn two_bad_keys_in_a_row_fail_no_request_under_way() {
    let (world, client) = proven().await;
    world.rotate(2);
    world.fal.hold_key(2);
    let under_way = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    world.rotate(3);
    world.fal.release();
    accepted(under_way.await.unwrap());
    assert_eq!(world.fal.keys().last(), Some(&1));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_goes_back_takes_the_new_key_back() {
    let (world, client) = proven().await;
    world.source.brings(2);
    world.store.reload().await.unwrap();
    accepted(client.clone().oneshot(post()).await);
    assert!(world.store.status().pending.is_some());
    world.source.brings(1);
    world.store.reload().await.unwrap();
    let status = world.store.status();
    assert_eq!((status.key_id.unwrap().as_str(), status.pending), ("id-1", None));
    assert_eq!(degraded(&world.store), []);
    tokio::time::advance(60 * SECOND).await;
    accepted(client.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [1, 2, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn after_a_source_went_back_a_revoked_key_is_reloaded() {
    let (world, client) = proven().await;
    world.source.brings(2);
    world.store.reload().await.unwrap();
    accepted(client.clone().oneshot(post()).await);
    world.source.brings(1);
    world.store.reload().await.unwrap();

    // Now the key is revoked, and its successor comes a little later.
    world.fal.knows_only(3);
    let request = tokio::spawn(client.oneshot(post()));
    tokio::time::sleep(RELOAD_WAIT / 2).await;
    world.source.brings(3);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_success_counts_for_a_key_that_the_source_went_back_to() {
    let world = World::new().await;
    let client = world.client();
    world.fal.hold();
    let under_way = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(1).await;
    for n in [2, 1] {
        world.source.brings(n);
        world.store.reload().await.unwrap();
    }
    world.fal.release();
    accepted(under_way.await.unwrap());
    accepted(client.oneshot(post()).await);
    assert!(world.store.status().accepted);
}

#[tokio::test(start_paused = true)]
async fn bodies_that_cannot_be_sent_again_find_the_new_key() {
    // Others may have tried it so often before that their next try is far away.
    for others in [0, 300] {
        let (world, client) = proven().await;
        let large = |_| client.clone().oneshot(request(Method::POST, ADMITTED, vec![b'x'; 1024 * 1024]));
        world.rotate(2);
        unauthorized(large(()).await);
        for _ in 0..others {
            accepted(client.clone().oneshot(post()).await);
            tokio::time::advance(SECOND).await;
        }
        let before = world.fal.keys().len();
        for _ in 0..20 {
            accepted(large(()).await);
            tokio::time::advance(SECOND).await;
        }
        assert_eq!(world.fal.keys()[before..], [1; 20], "none of them is risked");
        // fal switches from one key to the other. There is nothing but such bodies.
        world.fal.knows_only(2);
        let mut failed = 0;
        for _ in 0..100 {
            failed += u32::from(large(()).await.is_err());
            tokio::time::advance(SECOND / 5).await;
        }
        assert!(failed <= 15, "{failed}");
        assert_eq!(world.store.status().key_id.unwrap().as_str(), "id-2");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reload_brings_the_refused_key_no_second_generation() {
    let (world, client) = proven().await;
    world.source.brings(2);
    world.store.reload().await.unwrap();
    accepted(client.oneshot(post()).await);
    for _ in 0..3 {
        world.store.reload().await.unwrap();
    }
    let status = world.store.status();
    assert_eq!((status.generation.get(), status.pending.unwrap().generation.get()), (1, 2));
}

// An application that lies, or a gateway that says what fal says.

#[tokio::test(start_paused = true)]
async fn a_runners_answer_is_the_applications_whatever_it_says() {
    let (world, client) = proven().await;
    world.rotate(2);
    let forged = [
        by_a_runner(unknown_key()),
        by_a_runner(private_app()),
        by_a_runner(answer(401, r#"{"detail":"invalid key credentials"}"#)),
    ];
    for answer in forged {
        world.fal.will_answer(answer);
        let refused = unauthorized(client.clone().oneshot(post()).await);
        assert_eq!(refused.reason().as_str(), "application");
    }
    let mut locked = answer(403, r#"{"detail":"User is locked. Reason: Exhausted balance."}"#);
    locked.headers_mut().insert("x-fal-billable-units", "1".parse().unwrap());
    world.fal.will_answer(locked);
    assert_eq!(refusal(client.oneshot(post()).await).reason().as_str(), "application");
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 2, 2, 2, 2], 0), "none was sent again");
    assert_eq!(degraded(&world.store), []);
    assert!(world.store.status().accepted, "only an accepted key gets to a runner");
}

#[tokio::test(start_paused = true)]
async fn a_lie_about_a_key_that_works_takes_nothing_from_others() {
    let (world, client) = proven().await;
    for _ in 0..20 {
        world.fal.will_answer(unknown_key());
        let lied_to = tokio::spawn(client.clone().oneshot(post()));
        world.fal.arrivals_reach(world.fal.keys().len() + 1).await;
        // The others go on, and prove that the key works: the one that was lied to is told at once.
        accepted(client.clone().oneshot(post()).await);
        unauthorized(lied_to.await.unwrap());
        assert_eq!(degraded(&world.store), []);
    }
    // Then the key is revoked, and its successor comes a second later. Everybody waits for it.
    world.fal.knows_only(2);
    let waiting = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(world.fal.keys().len() + 1).await;
    tokio::time::sleep(SECOND).await;
    world.source.brings(2);
    accepted(waiting.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_lie_just_before_a_rotation_leaves_the_way_back() {
    let (world, client) = proven().await;
    world.fal.will_answer(unknown_key());
    unauthorized(client.clone().oneshot(post()).await);
    world.rotate(2);
    for _ in 0..5 {
        accepted(client.clone().oneshot(post()).await);
    }
    // And in the middle of it, about each of the two.
    for _ in 0..2 {
        world.fal.will_answer(unknown_key());
        let _ = client.clone().oneshot(post()).await;
        accepted(client.clone().oneshot(post()).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_worked_counts_as_refused_when_nothing_proves_it() {
    let (world, client) = proven().await;
    world.fal.revoke(1);
    unauthorized(client.clone().oneshot(post()).await);
    tokio::time::advance(SECOND).await;
    unauthorized(client.clone().oneshot(post()).await);
    assert_eq!(degraded(&world.store), [Degraded::Refused]);
    // It is known again, and the first success says so.
    world.fal.accept(1);
    accepted(client.oneshot(post()).await);
    assert_eq!(degraded(&world.store), []);
}

#[tokio::test(start_paused = true)]
async fn a_success_that_was_sent_before_the_refusal_proves_nothing() {
    let (world, client) = proven().await;
    world.fal.hold();
    let long_run = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    // The key is revoked while that one runs, and its successor is there half a second later.
    world.fal.will_answer(unknown_key());
    world.fal.will_answer(answer(200, "{}"));
    let refused = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(3).await;
    world.fal.release();
    world.fal.knows_only(2);
    tokio::time::sleep(SECOND / 2).await;
    world.source.brings(2);
    for request in [long_run, refused] {
        accepted(request.await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_success_sent_between_a_lie_and_the_revoke_proves_nothing() {
    let (world, client) = proven().await;
    world.fal.will_answer(unknown_key());
    let lied_to = tokio::spawn(client.clone().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    tokio::time::sleep(Duration::from_millis(1)).await; // it waits
    world.fal.hold();
    let both = [(); 2].map(|()| tokio::spawn(client.clone().oneshot(post())));
    world.fal.arrivals_reach(4).await;
    // One of them is let through, and the key is revoked before the other one. Their answers come in reverse.
    world.fal.will_answer(unknown_key());
    world.fal.will_answer(answer(200, "{}"));
    world.fal.release();
    world.fal.knows_only(2);
    tokio::time::sleep(SECOND / 2).await;
    world.source.brings(2);
    for request in both {
        accepted(request.await.unwrap());
    }
    unauthorized(lied_to.await.unwrap()); // that success was sent after its refusal, so the key was good then
}

// What another key does not cure.

#[tokio::test(start_paused = true)]
async fn what_another_key_does_not_cure_costs_no_wait_and_no_load() {
    let texts = [
        r#"{"detail":"Cannot access application \"a/b\". Authentication is required."}"#,
        r#"{"detail":"Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."}"#,
        r#"{"detail":"bearer: unable to decode issuer"}"#,
    ];
    for text in texts {
        let (world, client) = proven().await;
        for _ in 0..3 {
            world.fal.will_answer(answer(401, text));
            let (result, took) = timed(client.clone().oneshot(post())).await;
            unauthorized(result);
            assert_eq!((took, world.reloads()), (AT_ONCE, 0), "{text}");
        }
        assert_eq!(degraded(&world.store), []);
        // So it has used up nothing: a key that is revoked right after it is waited for.
        world.fal.knows_only(2);
        world.source.says(Says::Here(key(1)));
        let waiting = tokio::spawn(client.oneshot(post()));
        tokio::time::sleep(SECOND * 3 / 5).await;
        world.source.brings(2);
        accepted(waiting.await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_text_does_not_end_the_wait_of_other_reasons() {
    let (world, client) = proven().await;
    world.fal.will_answer(answer(401, "nope"));
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert_took(took, RELOAD_WAIT);
    world.fal.will_answer(answer(401, "nope"));
    let (result, took) = timed(client.clone().oneshot(post())).await;
    unauthorized(result);
    assert!(took < RELOAD_WAIT, "one such wait is enough: {took:?}");

    world.fal.knows_only(2);
    let waiting = tokio::spawn(client.oneshot(post()));
    tokio::time::sleep(SECOND).await;
    world.source.brings(2);
    accepted(waiting.await.unwrap());
}

// What proves that a key is accepted.

#[tokio::test(start_paused = true)]
async fn only_what_an_accepted_key_gets_is_proof() {
    for (status, by_runner, is_proof) in [
        (200, false, true),
        (204, false, true),
        (404, false, false),
        (422, false, false),
        (502, false, false),
        (302, false, false),
        (404, true, true),
        (500, true, true),
        (401, true, true),
    ] {
        let world = World::new().await;
        let answer = answer(status, "{}");
        world.fal.will_answer(if by_runner { by_a_runner(answer) } else { answer });
        let _ = world.client().oneshot(post()).await;
        assert_eq!(world.store.status().accepted, is_proof, "{status}, by a runner: {by_runner}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_customers_success_proves_nothing_about_the_houses_key() {
    let world = World::new().await;
    world.fal.accept(9);
    accepted(world.client().oneshot(super::customers_post()).await);
    let elsewhere: Request<Full<Bytes>> = request(Method::POST, "https://example.com/", PROMPT);
    world.fal.will_answer(answer(200, "{}"));
    accepted(world.client().oneshot(elsewhere).await);
    assert!(!world.store.status().accepted);
    let error: Result<Answer, FalAuthError> = world.client().oneshot(post()).await;
    accepted(error);
    assert!(world.store.status().accepted);
}
