//! 403 is not 401: another key does not cure it.

use std::time::Duration;

use http::Method;
use http_body_util::BodyExt as _;
use tower::ServiceExt as _;
use tower_fal::{
    FalAuthError,
    error::{LockReason, Reason, Refusal, ReloadError},
};

use super::{
    Answer, ELSEWHERE, Lazy, PROMPT, RELOAD_WAIT, World, accepted, answer, answer_with, assert_took, customers_post,
    locked, post, refusal, request, timed,
};
use crate::support::{Says, key};

const MINUTE: Duration = Duration::from_secs(60);

fn short_of_a_permission() -> Answer {
    answer(403, r#"{"detail":"Insufficient permissions for this call"}"#)
}

#[track_caller]
fn forbidden(result: Result<Answer, FalAuthError>) -> Refusal {
    match result {
        Err(FalAuthError::Forbidden(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_403_is_told_at_once_even_if_the_key_has_changed_meanwhile() {
    let locked_for = |reason| Reason::AccountLocked(reason);
    let mut by_the_app = answer(403, "not in my app");
    by_the_app.headers_mut().insert("x-fal-billable-units", "3".parse().unwrap());
    for (refused, reason) in [
        (locked(), locked_for(LockReason::ExhaustedBalance)),
        (answer(403, r#"{"detail":"User is locked. Reason: Admin lock."}"#), locked_for(LockReason::Admin)),
        (answer(403, r#"{"detail":"User is locked. Reason: TOP_UP."}"#), locked_for(LockReason::TopUp)),
        (short_of_a_permission(), Reason::InsufficientPermissions),
        (answer(403, r#"{"error":{"type":"authorization_error","message":"Access denied"}}"#), Reason::AccessDenied),
        (answer(403, "Forbidden"), Reason::AccessDenied),
        (answer(403, r#"{"detail":"No user found for Key ID and Secret"}"#), Reason::Unknown),
        (by_the_app, Reason::Application),
    ] {
        let world = World::new().await;
        world.fal.accept(2);
        world.fal.will_answer(refused);
        world.fal.hold();
        let request = tokio::spawn(timed(world.client().oneshot(post())));
        world.fal.arrivals_reach(1).await;
        world.store.replace(key(2));
        world.source.brings(3);
        world.fal.release();
        let (result, took) = request.await.unwrap();
        assert!(result.as_ref().is_err_and(|error| !error.is_retryable()));
        let refusal = forbidden(result);
        assert_eq!((refusal.status().as_u16(), refusal.reason(), refusal.was_replayed()), (403, reason, false));
        assert_eq!((refusal.key_id().unwrap().as_str(), refusal.generation().unwrap().get()), ("id-1", 1));
        assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1], 0, Duration::ZERO), "{reason:?}");
    }
}

/// A 403 frees it as soon as its head is there. A 401 keeps it while the answer is examined.
#[tokio::test(start_paused = true)]
async fn a_403_frees_the_kept_body_and_a_401_keeps_it() {
    for (status, kept) in [(403, 0), (401, PROMPT.len())] {
        let world = World::new().await;
        let retry = world.retry();
        let said = Lazy::new(1, "no").hangs(); // for the second that it may take
        let read = said.read();
        world.fal.will_answer(answer_with(status, said));
        let call = tokio::spawn(world.client_by(&retry).oneshot(post()));
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!((read.pieces(), retry.replay_memory_used()), (1, kept), "{status}");
        assert!(refusal(call.await.unwrap()).is_replayable());
        assert_eq!(retry.replay_memory_used(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_403_does_not_make_the_key_before_it_be_tried() {
    let world = World::new().await;
    let client = world.client(); // which has the store keep the key before
    world.rotate(2);
    world.fal.will_answer(short_of_a_permission());
    forbidden(client.oneshot(post()).await);
    assert_eq!(world.fal.keys(), [2]);
    // Nor when it may ask the source.
    let client = world.client_by(&world.retry().reload_on_forbidden());
    world.rotate(3);
    world.fal.will_answer(short_of_a_permission());
    forbidden(client.oneshot(post()).await);
    assert_eq!((world.fal.keys(), world.reloads()), (vec![2, 3], 1));
}

#[tokio::test(start_paused = true)]
async fn a_403_for_a_credential_of_the_requests_own_is_told() {
    let world = World::new().await;
    world.fal.will_answer(locked());
    let client = world.client_by(&world.retry().reload_on_forbidden());
    let refusal = forbidden(client.oneshot(customers_post()).await);
    assert_eq!((refusal.generation(), refusal.key_id().unwrap().as_str()), (None, "id-9"));
    assert_eq!(world.reloads(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_403_reloads_and_is_sent_again_if_that_was_asked_for() {
    let world = World::new().await;
    world.fal.accept(2);
    world.fal.will_answer(short_of_a_permission());
    world.source.brings(2);
    let client = world.client_by(&world.retry().reload_on_forbidden());
    let (result, took) = timed(client.oneshot(post())).await;
    accepted(result);
    assert_eq!((world.fal.keys(), world.reloads(), took), (vec![1, 2], 1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_403_waits_for_the_load_and_not_for_a_key_that_may_come() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().reload_on_forbidden());
    world.fal.will_answer(short_of_a_permission());
    let (result, took) = timed(client.clone().oneshot(post())).await;
    assert!(forbidden(result).reload_error().is_none());
    assert_eq!((world.reloads(), took), (1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_401_is_not_told_at_once_because_a_403_has_waited_in_vain() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().reload_on_forbidden());
    world.fal.will_answer(short_of_a_permission());
    world.source.close();
    let (result, took) = timed(client.clone().oneshot(post())).await;
    assert!(matches!(forbidden(result).reload_error(), Some(ReloadError::Pending)));
    assert_took(took, RELOAD_WAIT);
    world.source.open();
    world.fal.revoke(1);
    let (result, took) = timed(client.oneshot(post())).await;
    assert!(matches!(result, Err(FalAuthError::Unauthorized(_))));
    assert_took(took, RELOAD_WAIT);
}

#[tokio::test(start_paused = true)]
async fn a_403_tells_of_a_reload_that_failed() {
    let world = World::new().await;
    world.source.says(Says::Error);
    world.fal.will_answer(short_of_a_permission());
    let client = world.client_by(&world.retry().reload_on_forbidden());
    assert!(forbidden(client.oneshot(post()).await).reload_error().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_403_asks_the_source_once_a_minute_at_most() {
    let world = World::new().await;
    let client = world.client_by(&world.retry().reload_on_forbidden());
    for second in 0..180 {
        world.fal.will_answer(short_of_a_permission());
        let (result, took) = timed(client.clone().oneshot(post())).await;
        forbidden(result);
        assert_eq!(took, Duration::ZERO, "in second {second}");
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(world.reloads(), 3);
    assert!(world.source.gaps(1).iter().all(|&gap| gap >= MINUTE.as_secs_f64()));
}

#[tokio::test(start_paused = true)]
async fn a_locked_account_and_an_application_never_reload() {
    let world = World::new().await;
    world.source.brings(2);
    let client = world.client_by(&world.retry().reload_on_forbidden());
    let mut by_the_app = answer(403, "not in my app");
    by_the_app.headers_mut().insert("x-fal-served-from", "runner".parse().unwrap());
    for refused in [locked(), by_the_app] {
        world.fal.will_answer(refused);
        forbidden(client.clone().oneshot(post()).await);
    }
    assert_eq!((world.fal.keys(), world.reloads()), (vec![1, 1], 0));
}

#[tokio::test(start_paused = true)]
async fn a_403_from_a_host_that_gets_no_credential_passes() {
    let world = World::new().await;
    world.fal.will_answer(locked());
    let client = world.client_by(&world.retry().reload_on_forbidden());
    let request = request(Method::POST, ELSEWHERE, "{}");
    let response = client.oneshot(request).await.unwrap();
    assert_eq!(response.status(), 403);
    assert!(response.into_body().collect().await.unwrap().to_bytes().starts_with(b"{\"detail\":\"User is locked"));
    assert_eq!(world.reloads(), 0);
}
