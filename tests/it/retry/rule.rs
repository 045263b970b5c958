//! The 401 rule: who is asked, who is sent again, who is told, and when.

use std::{error::Error as _, time::Duration};

use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalAuthError, FalAuthLayer, FalRetryLayer, SourceError,
    error::{Reason, ReloadError, SourceErrorKind, report},
};

use super::{
    ADMITTED, ELSEWHERE, PROMPT, RELOAD_WAIT, World, accepted, answer, assert_took, customers_post, locked, post,
    request, timed, unauthorized, unknown_key,
};
use crate::support::{Says, key, status_where};

const AT_ONCE: Duration = Duration::ZERO;

// What passes.

/// Whatever its status: the request carried no credential of ours.
#[tokio::test(start_paused = true)]
async fn a_response_without_our_credential_passes_untouched() {
    for status in (100..600).filter_map(|code| StatusCode::from_u16(code).ok()) {
        let world = World::new().await;
        world.source.brings(2);
        let mut given = answer(status.as_u16(), "as it came");
        given.headers_mut().insert("x-fal-error-type", "its_own".parse().unwrap());
        world.fal.will_answer(given);
        let request = request(Method::POST, ELSEWHERE, PROMPT);
        let (response, took) = timed(world.client().oneshot(request)).await;
        let response = response.unwrap();
        assert_eq!((response.status(), took), (status, AT_ONCE));
        assert_eq!(response.headers()["x-fal-error-type"], "its_own");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "as it came");
        assert_eq!((world.fal.keys(), world.reloads()), (vec![0], 0), "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn any_status_but_401_and_403_passes_also_with_our_credential() {
    for code in (100..600).filter(|code| ![401, 403].contains(code)) {
        let world = World::new().await;
        world.fal.will_answer(answer(code, r#"{"detail":"No user found for Key ID and Secret"}"#));
        let response = world.client().oneshot(post()).await.unwrap();
        assert_eq!(response.status().as_u16(), code);
        assert_eq!((world.fal.keys(), world.reloads()), (vec![1], 0), "{code}");
    }
}

// A newer key.

/// Nothing is loaded.
#[tokio::test(start_paused = true)]
async fn with_a_newer_key_in_the_store_the_replay_is_immediate() {
    let world = World::new().await;
    world.fal.hold();
    let request = tokio::spawn(world.client().oneshot(post()));
    world.fal.arrivals_reach(1).await;
    world.store.replace(key(2));
    world.fal.knows_only(2);
    world.fal.release();
    let (response, took) = timed(request).await;
    accepted(response.unwrap());
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1, 2], 0, AT_ONCE));
    assert!(world.fal.arrived().iter().all(|arrived| arrived.body == PROMPT));
}

#[tokio::test(start_paused = true)]
async fn a_late_401_for_an_old_key_evicts_nothing() {
    let world = World::new().await;
    world.fal.hold();
    let late: Vec<_> = (0..3).map(|_| tokio::spawn(world.client().oneshot(post()))).collect();
    world.fal.arrivals_reach(3).await;
    world.source.brings(2);
    world.store.reload().await.unwrap();
    world.source.brings(3); // if anybody asked now, this would come
    world.fal.knows_only(2);
    world.fal.release();
    for request in late {
        accepted(request.await.unwrap());
    }
    assert_eq!((world.store.generation().get(), world.reloads()), (2, 1));
    assert_eq!(world.fal.keys(), [1, 1, 1, 2, 2, 2]);
}

/// The newer key of the source is sent.
#[tokio::test(start_paused = true)]
async fn with_the_refused_key_in_the_store_the_source_is_asked() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let (response, took) = timed(world.client().oneshot(post())).await;
    accepted(response);
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1, 2], 1, AT_ONCE));
    assert_eq!(world.store.generation().get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_reaches_the_source_during_the_wait_is_sent() {
    let world = World::new().await;
    world.fal.knows_only(2);
    let request = tokio::spawn(timed(world.client().oneshot(post())));
    world.source.loads_reach(2).await; // it still brought the old one
    world.source.brings(2);
    let (response, took) = request.await.unwrap();
    accepted(response);
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 2], 2));
    assert!((0.8..1.21).contains(&took.as_secs_f64()), "{took:?}: one cool-down");
}

#[tokio::test(start_paused = true)]
async fn a_key_put_into_the_store_during_the_wait_is_sent_at_once() {
    let world = World::new().await;
    world.fal.knows_only(2);
    let request = tokio::spawn(timed(world.client().oneshot(post())));
    world.source.loads_reach(2).await;
    world.store.replace(key(2));
    let (response, took) = request.await.unwrap();
    accepted(response);
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1, 2], 1, AT_ONCE));
}

/// It is sent at once.
#[tokio::test(start_paused = true)]
async fn a_key_put_into_the_store_while_a_load_hangs_is_sent() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.close();
    let request = tokio::spawn(timed(world.client().oneshot(post())));
    world.source.loads_reach(2).await;
    world.store.replace(key(2));
    let (response, took) = request.await.unwrap();
    accepted(response);
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1, 2], 1, AT_ONCE));
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_and_an_unknown_401_are_worth_a_reload() {
    for body in [
        r#"{"detail":"invalid key credentials"}"#,
        r#"{"detail":"No user found for Key ID and Secret"}"#,
        r#"{"detail":"something new"}"#,
        "",
    ] {
        let world = World::new().await;
        world.fal.accept(2);
        world.source.brings(2);
        world.fal.will_answer(answer(401, body));
        accepted(world.client().oneshot(post()).await);
        assert_eq!(world.fal.keys(), [1, 2], "{body}");
    }
}

#[tokio::test(start_paused = true)]
async fn any_401_of_fal_is_worth_a_newer_key_that_is_there() {
    for body in [
        r#"{"detail":"Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."}"#,
        r#"{"detail":"Authorization header is required"}"#,
        r#"{"detail":"bearer: unable to decode issuer"}"#,
        r#"{"error":{"type":"authorization_error","message":"Authentication required"}}"#,
    ] {
        let world = World::new().await;
        world.fal.hold();
        let request = tokio::spawn(world.client().oneshot(post()));
        world.fal.arrivals_reach(1).await;
        world.rotate(2);
        world.fal.accept(2);
        world.fal.will_answer(answer(401, body));
        world.fal.release();
        accepted(request.await.unwrap());
        assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 2], 0), "{body}");
    }
}

// Nothing newer.

/// It comes after the whole wait.
#[tokio::test(start_paused = true)]
async fn without_a_newer_key_the_error_says_who_was_refused_and_why() {
    let world = World::new().await;
    let mut refused = unknown_key();
    refused.headers_mut().insert("x-fal-request-id", "request-7".parse().unwrap());
    refused.headers_mut().insert("x-fal-error-type", "auth_error".parse().unwrap());
    world.fal.will_answer(refused);
    let (result, took) = timed(world.client().oneshot(post())).await;
    assert_took(took, RELOAD_WAIT);
    assert!(result.as_ref().is_err_and(FalAuthError::is_retryable), "a rotation may be under way");
    let refusal = unauthorized(result);
    assert_eq!(refusal.status(), 401);
    assert_eq!(refusal.reason(), Reason::UnknownCredential);
    assert_eq!(refusal.detail(), Some("No user found for Key ID and Secret"));
    assert_eq!(refusal.body(), r#"{"detail":"No user found for Key ID and Secret"}"#);
    assert_eq!(refusal.key_id().unwrap().as_str(), "id-1");
    assert_eq!(refusal.generation(), Some(world.store.generation()));
    assert_eq!(refusal.source_name(), "script");
    assert_eq!(refusal.request_id(), Some("request-7"));
    assert_eq!(refusal.error_type(), Some("auth_error"));
    assert_eq!(refusal.headers()["x-fal-error-type"], "auth_error");
    assert!(refusal.is_replayable() && !refusal.was_replayed());
    assert!(refusal.reload_error().is_none(), "the source did answer");
    assert_eq!(world.fal.keys(), [1]);
    assert_eq!(
        refusal.to_string(),
        "fal does not know key `id-1` from script: it was revoked, has expired or was mistyped; put a valid one in its \
         place, from fal.ai/dashboard/keys [x-fal-request-id request-7]"
    );
}

#[tokio::test(start_paused = true)]
async fn a_reload_that_fails_is_inside_the_error() {
    for (says, kind) in [
        (Says::Error, SourceErrorKind::Other),
        (Says::Nothing, SourceErrorKind::NotFound),
        (Says::Malformed, SourceErrorKind::Invalid),
        (Says::Panic, SourceErrorKind::Panicked),
    ] {
        let world = World::new().await;
        world.fal.revoke(1);
        world.source.says(says);
        let (result, took) = timed(world.client().oneshot(post())).await;
        assert_took(took, RELOAD_WAIT); // the source may be well again before that
        let error = result.unwrap_err();
        let reload = error.source().unwrap().downcast_ref::<ReloadError>().unwrap();
        let source = reload.source().unwrap().downcast_ref::<SourceError>().unwrap();
        assert_eq!(source.kind(), kind);
        assert!(matches!(error.refusal().unwrap().reload_error(), Some(ReloadError::Failed(_))));
        assert!(error.is_retryable());
        assert!(report(&error).contains("could not be reloaded: script: "), "{}", report(&error));
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_recovers_during_the_wait_leaves_no_error() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.says(Says::Error);
    let request = tokio::spawn(world.client().oneshot(post()));
    world.source.loads_reach(2).await;
    world.source.brings(1); // the old one still
    world.source.loads_reach(3).await;
    assert!(unauthorized(request.await.unwrap()).reload_error().is_none());
}

/// The load itself goes on.
#[tokio::test(start_paused = true)]
async fn a_hanging_load_is_waited_for_as_long_as_allowed() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    world.source.close();
    let (result, took) = timed(world.client().oneshot(post())).await;
    assert_took(took, RELOAD_WAIT);
    let error = result.unwrap_err();
    assert!(matches!(error.refusal().unwrap().reload_error(), Some(ReloadError::Pending)), "{error:?}");
    assert_eq!(report(&error).rsplit(": ").next(), Some("the source of the fal credential has not answered yet"));
    assert!(error.is_retryable());

    world.source.open();
    status_where(&world.store, |status| status.generation.get() == 2).await;
    assert_eq!(world.reloads(), 1, "it was the same load");
    accepted(world.client().oneshot(post()).await);
}

#[tokio::test(start_paused = true)]
async fn how_long_it_waits_can_be_set() {
    for wait in [0, 1, 250, 7_000].map(Duration::from_millis) {
        let world = World::new().await;
        world.fal.revoke(1);
        let client = world.client_by(&world.retry().reload_wait(wait));
        let (result, took) = timed(client.oneshot(post())).await;
        unauthorized(result);
        assert_took(took, wait);
    }
}

#[tokio::test(start_paused = true)]
async fn limits_without_an_end_are_none() {
    let world = World::new().await;
    world.fal.knows_only(2);
    let retry = world.retry().reload_wait(Duration::MAX).read_timeout(Duration::MAX).max_waiting(usize::MAX);
    let client = world.client_by(&retry.max_body(u64::MAX).replay_memory(usize::MAX));
    let request = tokio::spawn(client.oneshot(post()));
    tokio::time::sleep(Duration::from_secs(24 * 60 * 60)).await;
    world.rotate(2);
    accepted(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_reloads_is_not_waited_for() {
    let world = World::new().await;
    let store = CredentialStore::fixed(key(1));
    world.fal.revoke(1);
    let client = tower_fal::layer(&store).layer(world.fal.clone());
    let (result, took) = timed(client.oneshot(post())).await;
    assert_eq!(took, AT_ONCE);
    assert!(result.as_ref().is_err_and(|error| !error.is_retryable()), "nothing will change");
    let refusal = unauthorized(result);
    assert!(matches!(refusal.reload_error(), Some(ReloadError::NeverReloads)));
    assert_eq!(world.fal.keys(), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_fixed_store_whose_key_was_replaced_meanwhile_is_sent_again() {
    let world = World::new().await;
    let store = CredentialStore::fixed(key(1));
    let client = tower_fal::layer(&store).layer(world.fal.clone());
    world.fal.hold();
    let request = tokio::spawn(client.oneshot(post()));
    world.fal.arrivals_reach(1).await;
    store.replace(key(2));
    world.fal.knows_only(2);
    world.fal.release();
    accepted(request.await.unwrap());
}

#[test]
fn a_driver_that_is_gone_is_not_waited_for() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    for it_cools_down in [false, true] {
        let first = runtime();
        let world = first.block_on(World::new());
        world.fal.revoke(1);
        if it_cools_down {
            let impatient = world.client_by(&world.retry().reload_wait(AT_ONCE));
            unauthorized(first.block_on(impatient.oneshot(post())));
            first.block_on(world.source.loads_reach(2));
        }
        drop(first);
        runtime().block_on(told_at_once_that_the_driver_is_gone(&world));
    }
}

async fn told_at_once_that_the_driver_is_gone(world: &World) {
    for _ in 0..3 {
        let (result, took) = timed(world.client().oneshot(post())).await;
        assert_eq!(took, AT_ONCE);
        assert!(result.as_ref().is_err_and(|error| !error.is_retryable()));
        assert!(matches!(unauthorized(result).reload_error(), Some(ReloadError::DriverGone)));
    }
}

#[test]
fn a_driver_that_ends_while_a_request_waits_ends_the_wait() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let (first, second) = (runtime(), runtime());
    let world = first.block_on(World::new());
    world.fal.revoke(1);
    world.source.close();
    let client = world.client_by(&world.retry().reload_wait(crate::support::PATIENCE));
    let request = second.spawn(client.oneshot(post()));
    second.block_on(world.source.loads_reach(2));
    drop(first);
    let refusal = unauthorized(second.block_on(request).unwrap());
    assert!(matches!(refusal.reload_error(), Some(ReloadError::DriverGone)));
}

// Once.

#[tokio::test(start_paused = true)]
async fn a_request_is_sent_again_at_most_once() {
    let world = World::new().await;
    world.fal.knows_only(7);
    world.source.brings(2);
    let (result, took) = timed(world.client().oneshot(post())).await;
    assert_eq!((world.fal.keys(), took), (vec![1, 2], AT_ONCE));
    let refusal = unauthorized(result);
    assert!(refusal.was_replayed());
    assert_eq!((refusal.key_id().unwrap().as_str(), refusal.generation().unwrap().get()), ("id-2", 2));
}

/// Requests that come later have a use for the answer.
#[tokio::test(start_paused = true)]
async fn a_401_to_the_replay_asks_the_source_again() {
    let world = World::new().await;
    world.fal.knows_only(3);
    world.source.brings(2);
    world.fal.hold_key(2);
    let request = tokio::spawn(world.client().oneshot(post()));
    world.fal.arrivals_reach(2).await;
    world.source.brings(3);
    tokio::time::sleep(RELOAD_WAIT).await; // longer than the cool-down after the first load
    world.fal.release();
    unauthorized(request.await.unwrap());
    status_where(&world.store, |status| status.generation.get() == 3).await;
    accepted(world.client().oneshot(post()).await);
    assert_eq!(world.fal.keys(), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_403_to_the_second_attempt_is_what_the_caller_gets() {
    let world = World::new().await;
    world.fal.will_answer(unknown_key());
    world.fal.will_answer(locked());
    world.source.brings(2);
    let error = world.client().oneshot(post()).await.unwrap_err();
    assert!(matches!(&error, FalAuthError::Forbidden(refusal) if refusal.was_replayed()), "{error:?}");
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 2], 1));
}

#[tokio::test(start_paused = true)]
async fn one_replay_however_often_the_stores_key_changes() {
    let world = World::new().await;
    world.fal.revoke(1);
    let request = tokio::spawn(world.client().oneshot(post()));
    world.fal.hold_key(1);
    for n in 1..=2 {
        world.fal.arrivals_reach(usize::try_from(n).unwrap()).await;
        world.rotate(n + 1);
        world.fal.hold_key(n + 1);
    }
    assert!(unauthorized(request.await.unwrap()).was_replayed());
    assert_eq!(world.fal.keys(), [1, 2]);
}

// What is not ours to cure.

#[tokio::test(start_paused = true)]
async fn an_applications_own_401_is_told_at_once_and_never_sent_again() {
    for header in ["x-fal-served-from", "x-fal-billable-units"] {
        let world = World::new().await;
        world.source.brings(2);
        let mut refused = answer(401, r#"{"detail":"log in to my app"}"#);
        refused.headers_mut().insert(header, "1".parse().unwrap());
        world.fal.will_answer(refused);
        // Not even if there is a newer key.
        world.fal.hold();
        let request = tokio::spawn(timed(world.client().oneshot(post())));
        world.fal.arrivals_reach(1).await;
        world.store.replace(key(5));
        world.fal.release();
        let (result, took) = request.await.unwrap();
        assert!(result.as_ref().is_err_and(|error| !error.is_retryable()));
        let refusal = unauthorized(result);
        assert_eq!((refusal.reason(), refusal.detail()), (Reason::Application, Some("log in to my app")));
        assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1], 0, AT_ONCE));
    }
}

#[tokio::test(start_paused = true)]
async fn fals_own_text_is_the_applications_if_a_runner_is_named() {
    let world = World::new().await;
    world.source.brings(2);
    let mut refused = unknown_key();
    refused.headers_mut().insert("x-fal-served-from", "runner".parse().unwrap());
    world.fal.will_answer(refused);
    world.fal.accept(2);
    assert_eq!(unauthorized(world.client().oneshot(post()).await).reason(), Reason::Application);
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1], 0));
}

#[tokio::test(start_paused = true)]
async fn a_401_for_a_credential_of_the_requests_own_is_told_at_once() {
    let world = World::new().await;
    world.source.brings(2);
    world.fal.hold();
    let request = tokio::spawn(timed(world.client().oneshot(customers_post())));
    world.fal.arrivals_reach(1).await;
    world.store.replace(key(5)); // the house's own rotation is nothing to the customer
    world.fal.release();
    let (result, took) = request.await.unwrap();
    assert!(result.as_ref().is_err_and(|error| !error.is_retryable()), "it is not ours to rotate");
    let refusal = unauthorized(result);
    assert_eq!((refusal.generation(), refusal.source_name()), (None, "request"));
    assert_eq!(refusal.key_id().unwrap().as_str(), "id-9");
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![9], 0, AT_ONCE));
}

#[tokio::test(start_paused = true)]
async fn per_request_tells_at_once_and_never_spends_the_houses_key() {
    let world = World::new().await;
    let client = tower_fal::FalLayer::per_request().layer(world.fal.clone());
    let (result, took) = timed(client.clone().oneshot(customers_post())).await;
    assert_eq!((unauthorized(result).key_id().unwrap().as_str(), took), ("id-9", AT_ONCE));
    // Without a credential it went out bare, so what came back is not ours.
    let bare = client.clone().oneshot(post()).await.unwrap();
    assert_eq!(bare.status(), 401);
    world.fal.accept(9);
    accepted(client.oneshot(customers_post()).await);
    assert_eq!(world.fal.keys(), [9, 0, 9]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_the_stamp_has_nothing_to_do_with_is_left_alone() {
    // A retry layer without a store, around an auth layer with one.
    let world = World::new().await;
    world.fal.revoke(1);
    let auth = FalAuthLayer::new(world.store.clone()).layer(world.fal.clone());
    let (result, took) = timed(FalRetryLayer::per_request().layer(auth).oneshot(post())).await;
    assert_eq!(unauthorized(result).generation(), Some(world.store.generation()));
    assert_eq!((world.reloads(), took), (0, AT_ONCE));
}

#[tokio::test(start_paused = true)]
async fn the_caller_of_one_attempt_never_waits_and_others_profit() {
    // A body longer than may be kept is one attempt.
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    world.source.close();
    let client = world.client_by(&world.retry().max_body(4));
    let (result, took) = timed(client.clone().oneshot(post())).await;
    let refusal = unauthorized(result);
    assert!(!refusal.is_replayable() && !refusal.was_replayed());
    assert_eq!(took, AT_ONCE);
    world.source.open();
    status_where(&world.store, |status| status.generation.get() == 2).await;
    accepted(client.oneshot(post()).await);
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 2], 1));
}

#[tokio::test(start_paused = true)]
async fn the_head_is_sent_again_as_it_was() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let request = request(Method::PATCH, ADMITTED, PROMPT);
    let began = Instant::now();
    accepted(world.client().oneshot(request).await);
    let arrived = world.fal.arrived();
    assert!(arrived.iter().all(|arrived| arrived.method == "PATCH" && arrived.body == PROMPT && arrived.at == began));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_its_credential_fails_before_it_is_sent() {
    let world = World::new().await;
    world.fal.accept(9);
    for retry in [FalRetryLayer::per_request(), world.retry()] {
        let client = world.client_by(&retry.require_credential());
        let error = client.clone().oneshot(post()).await.unwrap_err();
        assert!(matches!(error, FalAuthError::NoCredential), "{error:?}");
        assert!(!error.is_retryable() && error.refusal().is_none());
        accepted(client.oneshot(customers_post()).await);
    }
    assert_eq!(world.fal.keys(), [9, 9]);
}
