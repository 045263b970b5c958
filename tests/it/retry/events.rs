//! What an operator sees: events with closed fields, and counters with closed labels.

use std::{collections::BTreeMap, time::Duration};

use axum::response::IntoResponse as _;
use http::Method;
use tower::{ServiceExt as _, retry::budget::TpsBudget};
use tower_fal::{FalAuthError, retry::Transient};
use tracing::Level;

use super::{ADMITTED, Answer, Client, ELSEWHERE, PROMPT, World, answer, customers_post, locked, post, request};
use crate::support::{Entry, Events, Metrics};

/// One story in which everything happens that is worth an event, each in a world of its own.
async fn story() {
    let worlds = async || {
        let world = World::new().await;
        world.fal.knows_only(7);
        world
    };
    let send = async |client: Client| drop(client.oneshot(post()).await);

    // A newer key comes, and is accepted; one comes, and is refused; none comes.
    let world = worlds().await;
    world.source.brings(7);
    send(world.client()).await;
    let world = worlds().await;
    world.source.brings(2);
    send(world.client()).await;
    send(worlds().await.client()).await;
    // A key is early.
    let world = World::new().await;
    let client = world.client();
    world.rotate(2);
    send(client).await;
    // A body was too long, and one for which there was no memory.
    let world = worlds().await;
    send(world.client_by(&world.retry().max_body(1))).await;
    let world = worlds().await;
    send(world.client_by(&world.retry().replay_memory(1))).await;
    // An application's refusal, a customer's key, a locked account.
    let world = worlds().await;
    world.fal.will_answer(by_an_application());
    send(world.client()).await;
    drop(worlds().await.client().oneshot(customers_post()).await);
    let world = worlds().await;
    world.fal.will_answer(locked());
    send(world.client()).await;
    // A host that was not admitted.
    let world = worlds().await;
    drop(world.client().oneshot(request(Method::POST, ELSEWHERE, PROMPT)).await);
    // Failures in passing, until the budget is used up.
    let none_left = TpsBudget::new(Duration::from_secs(10), 0, 0.0);
    for transient in [Transient::default(), Transient::default().budget(none_left)] {
        let world = World::new().await;
        world.fal.will_answer(answer(503, FROM_OUTSIDE));
        let client = world.client_by(&world.retry().transient(transient));
        drop(client.oneshot(request(Method::GET, ADMITTED, PROMPT)).await);
    }
}

fn by_an_application() -> Answer {
    let mut refused = answer(401, format!(r#"{{"detail":"{FROM_OUTSIDE}"}}"#));
    refused.headers_mut().insert("x-fal-served-from", FROM_OUTSIDE.parse().unwrap());
    refused.headers_mut().insert("x-fal-request-id", FROM_OUTSIDE.parse().unwrap());
    refused
}

/// Remote text has no place in an event or a label.
const FROM_OUTSIDE: &str = "remote-text";

fn tell(story: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(story);
}

#[test]
fn every_refusal_and_replay_is_an_event_with_closed_fields() {
    let told = Events::default();
    let dispatch = told.dispatch();
    tracing::dispatcher::with_default(&dispatch, || tell(story()));
    let events = told.take_ours();
    let about = |message: &str| events.iter().filter(|event| event.message == message).cloned().collect::<Vec<_>>();

    let refusals = about("fal refused a request");
    let fields = ["action", "key_id", "reason", "refusals", "source", "status"];
    for event in &refusals {
        assert_eq!(event.level(), Level::WARN);
        assert_eq!(event.fields.keys().map(String::as_str).collect::<Vec<_>>(), fields, "{event:?}");
    }
    let of = |event: &Entry, name: &str| event.fields[name].clone();
    let short = refusals.iter().map(|event| {
        let [status, reason, action, key_id] = ["status", "reason", "action", "key_id"].map(|name| of(event, name));
        format!("{status} {reason} {action} {key_id}")
    });
    assert_eq!(
        short.collect::<Vec<_>>(),
        [
            "401 unknown_credential replayed id-1",
            "401 unknown_credential replayed id-1",
            "401 unknown_credential refused_and_reloaded id-2",
            "401 unknown_credential refused id-1",
            "401 unknown_credential replayed_with_previous id-2",
            "401 unknown_credential refused_and_reloaded id-1",
            "401 unknown_credential refused_and_reloaded id-1",
            "401 application refused id-1",
            "401 unknown_credential refused id-9",
            "403 account_locked refused id-1",
        ]
    );
    assert_eq!(of(&refusals[0], "source"), "script");
    assert_eq!(of(&refusals[8], "source"), "request");

    let replays = about("a request was replayed with another fal credential");
    assert!(replays.iter().all(|event| event.level() == Level::DEBUG && event.fields.len() == 1));
    let results: Vec<_> = replays.iter().map(|event| of(event, "result")).collect();
    assert_eq!(results, ["accepted", "refused", "accepted"]);
    let not_ours =
        about("a request was refused that carried no fal credential: is its origin admitted? (`FalOrigins::and`)");
    assert!(not_ours.iter().all(|event| event.level() == Level::WARN && event.fields.len() == 3));
    assert_eq!(not_ours.iter().map(|event| of(event, "origin")).collect::<Vec<_>>(), ["https://example.com"]);
    assert_eq!(not_ours.iter().map(|event| of(event, "status")).collect::<Vec<_>>(), ["401"]);
    let memory = about("the memory for replays is used up; a request cannot be replayed");
    assert_eq!(memory.iter().map(|event| of(event, "limit")).collect::<Vec<_>>(), ["1"]);
    let retries = about("a request to fal failed for a transient reason; it will be retried");
    assert_eq!(retries.iter().map(|event| of(event, "attempt")).collect::<Vec<_>>(), ["2"]);
    assert!(retries[0].fields.contains_key("wait") && retries[0].fields.len() == 2);
    assert_eq!(about("the retry budget is used up; a request is not retried").len(), 1);
    assert!(!format!("{events:?}").contains(FROM_OUTSIDE), "{events:?}");
}

#[test]
fn every_refusal_and_replay_is_counted_under_closed_labels() {
    let counted = Metrics::new();
    metrics::with_local_recorder(counted.recorder(), || tell(story()));
    let counters = counted.counters();
    let wanted = [
        ("tower_fal_refusals_total action=replayed reason=unknown_credential status=401 store=default", 2),
        ("tower_fal_refusals_total action=refused_and_reloaded reason=unknown_credential status=401 store=default", 3),
        ("tower_fal_refusals_total action=refused reason=unknown_credential status=401 store=default", 1),
        ("tower_fal_refusals_total action=refused reason=unknown_credential status=401 store=", 1),
        (
            "tower_fal_refusals_total action=replayed_with_previous reason=unknown_credential status=401 store=default",
            1,
        ),
        ("tower_fal_refusals_total action=refused reason=application status=401 store=default", 1),
        ("tower_fal_refusals_total action=refused reason=account_locked status=403 store=default", 1),
        ("tower_fal_reloads_total result=changed store=default", 2),
        ("tower_fal_reloads_total result=unchanged store=default", 5),
        ("tower_fal_replays_total result=accepted", 2),
        ("tower_fal_replays_total result=refused", 1),
        ("tower_fal_replay_memory_exhausted_total", 1),
        ("tower_fal_transient_retries_total", 1),
        ("tower_fal_retry_budget_exhausted_total", 1),
    ];
    assert_eq!(counters, wanted.into_iter().map(|(name, count)| (name.to_owned(), count)).collect());
}

/// The answers are those that our own callers get.
#[test]
fn an_outage_does_not_fill_the_log_with_our_own_answers() {
    let told = Events::default();
    let dispatch = told.dispatch();
    tracing::dispatcher::with_default(&dispatch, || {
        tell(async {
            for _ in 0..1000 {
                // One for a reason that no other test of this process has: it is counted for all of it.
                assert_eq!(FalAuthError::NoCredential.into_response().status(), 500);
            }
        });
    });
    let events = told.take_ours();
    let (warnings, others): (Vec<_>, Vec<_>) = events.iter().partition(|event| event.level() == Level::WARN);
    let numbers: Vec<_> = warnings.iter().map(|event| event.fields["answers"].as_str()).collect();
    assert_eq!(numbers, ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]);
    assert!(others.len() == 990 && others.iter().all(|event| event.level() == Level::DEBUG));
    assert!(events.iter().all(|event| event.fields["reason"] == "no_credential" && event.fields.contains_key("error")));
}

#[test]
fn an_outage_does_not_fill_the_log_and_every_refusal_is_counted() {
    let (told, counted) = (Events::default(), Metrics::new());
    let dispatch = told.dispatch();
    // The numbers of the refusals that are warnings and of those that are not, since the last time.
    let heard = || {
        let events = told.take_ours();
        let refusals = events.into_iter().filter(|event| event.message == "fal refused a request");
        let (warnings, others): (Vec<_>, Vec<_>) = refusals.partition(|event| event.level() == Level::WARN);
        assert!(others.iter().all(|event| event.level() == Level::DEBUG));
        let numbers = warnings.iter().map(|event| event.fields["refusals"].parse::<u64>().unwrap());
        (numbers.collect::<Vec<_>>(), others.len())
    };
    tracing::dispatcher::with_default(&dispatch, || {
        metrics::with_local_recorder(counted.recorder(), || {
            tell(async {
                let world = World::new().await;
                let client = world.client_by(&world.retry().overlap(Duration::ZERO));
                let refuse = async |answer: fn() -> Answer, requests: usize| {
                    for _ in 0..requests {
                        world.fal.will_answer(answer());
                        client.clone().oneshot(post()).await.unwrap_err();
                    }
                };
                refuse(locked, 1000).await;
                assert_eq!(heard(), (vec![1, 2, 4, 8, 16, 32, 64, 128, 256, 512], 990));
                // Another reason, which comes in between.
                for _ in 0..4 {
                    refuse(by_an_application, 1).await;
                    refuse(locked, 1).await;
                }
                assert_eq!(heard(), (vec![1, 2, 4], 5));
                // A customer's key is no news about the store's.
                world.fal.will_answer(locked());
                client.clone().oneshot(customers_post()).await.unwrap_err();
                refuse(locked, 1).await;
                assert_eq!(heard(), (vec![1], 1));
                // Another credential.
                world.rotate(2);
                refuse(locked, 3).await;
                assert_eq!(heard(), (vec![1, 2], 1));
                // A minute without any.
                tokio::time::sleep(Duration::from_secs(59)).await;
                refuse(locked, 2).await;
                assert_eq!(heard(), (vec![4], 1));
                tokio::time::sleep(Duration::from_secs(60)).await;
                refuse(locked, 2).await;
                assert_eq!(heard(), (vec![1, 2], 0));
                // All services of one layer count together, and those of another do not.
                world.fal.will_answer(locked());
                world.client().oneshot(post()).await.unwrap_err();
                assert_eq!(heard(), (vec![1], 0));

                // Those that come late, for the credential before, are no new beginning.
                world.fal.hold_key(2);
                let late = tokio::spawn(client.clone().oneshot(post()));
                world.fal.arrivals_reach(world.fal.arrived().len() + 1).await;
                world.rotate(3);
                refuse(locked, 1).await;
                world.fal.will_answer(locked());
                world.fal.release();
                late.await.unwrap().unwrap_err();
                refuse(locked, 1).await;
                assert_eq!(heard(), (vec![1, 2], 1));
            });
        });
    });
    let of = |reason: &str, store: &str| {
        let status = if reason == "account_locked" { 403 } else { 401 };
        let name = format!("tower_fal_refusals_total action=refused reason={reason} status={status} store={store}");
        counted.counters()[&name]
    };
    assert_eq!(of("account_locked", "default"), 1000 + 4 + 1 + 3 + 2 + 2 + 1 + 3);
    assert_eq!((of("account_locked", ""), of("application", "default")), (1, 4));
}

#[test]
fn a_request_that_succeeds_is_no_event_and_no_count() {
    let (told, counted) = (Events::default(), Metrics::new());
    let dispatch = told.dispatch();
    tracing::dispatcher::with_default(&dispatch, || {
        metrics::with_local_recorder(counted.recorder(), || {
            tell(async {
                let world = World::new().await;
                for _ in 0..100 {
                    super::accepted(world.client().oneshot(post()).await);
                }
                // The first one proved that fal accepts the key.
                assert_eq!(told.take_ours().len(), 2, "the key was loaded, and accepted");
            });
        });
    });
    assert_eq!((told.take_ours().len(), counted.counters()), (0, BTreeMap::new()));
}
