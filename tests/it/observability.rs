//! What an operator sees of a store from outside: its gauges and counters, and the body of a readiness probe.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use http::Method;
use tokio::runtime::{Builder, Runtime};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer, FalRetryLayer,
    error::Reason,
    store::{Degraded, Status},
};

use crate::{
    retry::{ADMITTED, Answer, Fal, answer, request, unknown_key},
    support::{Metrics, Says, Script, bearer_until, key, status_where},
};

const FIVE: Duration = Duration::from_secs(5);

/// The interval of 5 s and a fifth, and what timers round up.
const ONE_POLL: Duration = Duration::from_millis(6002);

/// Its only thread is the one that enters it, so that a local recorder hears of everything.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// Of the gauges, those of one store: its info by key id, and since when.
fn of(recorded: &Metrics, store: &str) -> (Vec<(String, f64)>, Option<f64>) {
    let label = format!(" store={store}");
    let gauges = recorded.gauges();
    let info = gauges.iter().filter_map(|(name, value)| {
        let key_id = name.strip_prefix("tower_fal_credential_info key_id=")?.strip_suffix(&label)?;
        Some((key_id.to_owned(), *value))
    });
    let since = gauges.get(&format!("tower_fal_credential_loaded_timestamp_seconds store={store}"));
    (info.collect(), since.copied())
}

fn loaded_at(store: &CredentialStore) -> Option<f64> {
    Some(store.status().loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64())
}

fn held(key_ids: &[(&str, f64)]) -> Vec<(String, f64)> {
    key_ids.iter().map(|(key_id, value)| ((*key_id).to_owned(), *value)).collect()
}

async fn named(name: &'static str, source: &Script) -> CredentialStore {
    CredentialStore::builder(source.clone()).name(name).build().await.unwrap()
}

// Metrics

#[test]
fn the_key_of_a_store_is_1_and_the_old_keys_are_0() {
    let recorded = Metrics::new();
    metrics::with_local_recorder(recorded.recorder(), || {
        let runtime = runtime();
        let store = runtime.block_on(async {
            let source = Script::new(FIVE, Says::Here(key(1)));
            let store = named("rotating", &source).await;
            assert_eq!(of(&recorded, "rotating"), (held(&[("id-1", 1.0)]), loaded_at(&store)));

            source.brings(2); // a poll sees it
            status_where(&store, |status| status.generation.get() == 2).await;
            tokio::task::yield_now().await;
            assert_eq!(of(&recorded, "rotating"), (held(&[("id-1", 0.0), ("id-2", 1.0)]), loaded_at(&store)));

            store.replace(key(3));
            assert_eq!(of(&recorded, "rotating").0, held(&[("id-1", 0.0), ("id-2", 0.0), ("id-3", 1.0)]));
            store.replace(key(1)); // and back
            assert_eq!(of(&recorded, "rotating").0, held(&[("id-1", 1.0), ("id-2", 0.0), ("id-3", 0.0)]));

            // A login's token has no id.
            store.replace(bearer_until(4_000_000_000));
            assert_eq!(of(&recorded, "rotating").0, held(&[("", 1.0), ("id-1", 0.0), ("id-2", 0.0), ("id-3", 0.0)]));
            // A failing source takes nothing away.
            source.says(Says::Error);
            store.reload().await.unwrap_err();
            assert_eq!(of(&recorded, "rotating").0[0], (String::new(), 1.0));
            assert_eq!(of(&recorded, "rotating").1, loaded_at(&store));
            store
        });
        drop(runtime);
        // The driver is gone, and the credential is still in use.
        assert_eq!(of(&recorded, "rotating").0[0], (String::new(), 1.0));
        let clone = store.clone();
        drop(store);
        assert_eq!(of(&recorded, "rotating").0[0], (String::new(), 1.0));
        drop(clone);
        assert!(of(&recorded, "rotating").0.iter().all(|(_, value)| *value == 0.0));
    });
}

#[test]
fn loads_are_counted_by_what_came_of_them() {
    let recorded = Metrics::new();
    metrics::with_local_recorder(recorded.recorder(), || {
        runtime().block_on(async {
            let source = Script::new(None, Says::Here(key(1)));
            let store = named("counted", &source).await;
            assert_eq!(recorded.counters().len(), 0, "the first load is no reload");
            for _ in 0..3 {
                store.reload().await.unwrap();
            }
            source.brings(2);
            store.reload().await.unwrap();
            store.reload_past(store.generation()).await.unwrap();
            store.reload_past(store.generation()).await.unwrap(); // cooling down: no load
            for says in [Says::Nothing, Says::Malformed, Says::Error, Says::Panic, Says::Hang] {
                source.says(says);
                store.reload().await.unwrap_err();
            }
        });
    });
    let counters: Vec<_> = recorded.counters().into_iter().collect();
    let count = |result: &str, count| (format!("tower_fal_reloads_total result={result} store=counted"), count);
    assert_eq!(counters, [count("changed", 1), count("failed", 5), count("unchanged", 4)]);
}

#[test]
fn a_recorder_that_is_installed_late_has_it_all_within_one_poll() {
    let runtime = runtime();
    for says in [Says::Here(key(2)), Says::Error] {
        let late = Metrics::new();
        let source = Script::new(FIVE, Says::Here(key(1)));
        let store = runtime.block_on(async {
            let store = named("late", &source).await;
            source.brings(2);
            store.reload().await.unwrap();
            store
        });
        source.says(says);
        metrics::with_local_recorder(late.recorder(), || {
            runtime.block_on(async {
                let begin = tokio::time::Instant::now();
                source.loads_reach(3).await;
                tokio::task::yield_now().await;
                assert!(begin.elapsed() <= ONE_POLL);
                assert_eq!(of(&late, "late"), (held(&[("id-2", 1.0)]), loaded_at(&store)));
                source.brings(3);
                store.reload().await.unwrap();
                assert_eq!(of(&late, "late").0, held(&[("id-2", 0.0), ("id-3", 1.0)]));
            });
        });
    }
}

#[test]
fn a_store_that_never_reloads_is_shown_when_it_is_made() {
    let recorded = Metrics::new();
    metrics::with_local_recorder(recorded.recorder(), || {
        let store = CredentialStore::fixed(Credential::key("fixed-and-shown:secret").unwrap());
        assert_eq!(of(&recorded, "default"), (held(&[("fixed-and-shown", 1.0)]), loaded_at(&store)));
        drop(store);
        assert_eq!(of(&recorded, "default").0, held(&[("fixed-and-shown", 0.0)]));
    });
    assert_eq!(recorded.counters().len(), 0);
}

#[test]
fn stores_of_one_name_show_a_key_that_any_of_them_holds() {
    let recorded = Metrics::new();
    metrics::with_local_recorder(recorded.recorder(), || {
        runtime().block_on(async {
            let source = Script::new(None, Says::Here(key(1)));
            let (first, second) = (named("shared", &source).await, named("shared", &source).await);
            let other = named("of its own", &source).await;
            first.replace(key(2));
            assert_eq!(of(&recorded, "shared").0, held(&[("id-1", 1.0), ("id-2", 1.0)]));
            second.replace(key(2));
            assert_eq!(of(&recorded, "shared").0, held(&[("id-1", 0.0), ("id-2", 1.0)]));
            drop(first);
            assert_eq!(of(&recorded, "shared").0, held(&[("id-1", 0.0), ("id-2", 1.0)]));
            drop(second);
            assert_eq!(of(&recorded, "shared").0, held(&[("id-1", 0.0), ("id-2", 0.0)]));
            assert_eq!(of(&recorded, "of its own").0, held(&[("id-1", 1.0)]));
            drop(other);
        });
    });
}

#[test]
fn whoever_rotates_at_once_leaves_one_series_at_1() {
    let store = CredentialStore::fixed(Credential::key("rotated-at-once-0:secret").unwrap());
    let keys: Vec<_> = (0..64).map(|n| Credential::key(format!("rotated-at-once-{n}:secret")).unwrap()).collect();
    let recorded = Metrics::new();
    for _ in 0..20 {
        std::thread::scope(|scope| {
            for keys in keys.chunks(16) {
                let (store, recorded) = (&store, &recorded);
                scope.spawn(move || {
                    metrics::with_local_recorder(recorded.recorder(), || {
                        for key in keys {
                            store.replace(key.clone());
                        }
                    });
                });
            }
        });
        let shown: Vec<_> = of(&recorded, "default").0.into_iter().filter(|(_, value)| *value != 0.0).collect();
        assert_eq!(shown, held(&[(store.status().key_id.unwrap().as_str(), 1.0)]));
    }
}

#[test]
fn the_manual_has_the_metrics_that_exist() {
    let recorded = Metrics::new();
    metrics::with_local_recorder(recorded.recorder(), || {
        runtime().block_on(async {
            let source = Script::new(None, Says::Here(key(1)));
            let store = named("page", &source).await;
            store.reload().await.unwrap();
            let client = FalRetryLayer::new(store.clone()).layer(FalAuthLayer::new(store).layer(Fal::default()));
            client.oneshot(request(Method::POST, ADMITTED, "{}")).await.unwrap_err();
        });
    });
    let queries = include_str!("../../docs/rotation.md").split_once("```promql\n").unwrap().1;
    assert!(queries.starts_with(r#"tower_fal_credential_info{job="my-server", key_id="OLD"} == 1"#));
    let page = include_str!("../../docs/observability.md");
    for (kind, series) in [
        ("gauge", recorded.gauges().into_keys().collect()),
        ("counter", recorded.counters().into_keys().collect::<Vec<_>>()),
    ] {
        for series in series {
            let (name, labels) = series.split_once(' ').unwrap();
            let (names, values): (BTreeSet<_>, Vec<_>) =
                labels.split(' ').map(|label| label.split_once('=').unwrap()).unzip();
            let (_, said) = page.split_once(&format!("| `{name}` | {kind} | ")).unwrap_or_else(|| panic!("no {name}"));
            let said: BTreeSet<_> =
                said.split(" |").next().unwrap().split(", ").map(|label| label.trim_matches('`')).collect();
            assert_eq!(said, names, "{name}");
            for value in values.into_iter().filter(|value| !["page", "id-1"].contains(value)) {
                assert!(page.contains(&format!("| `{value}`")), "{name}: {value}");
            }
        }
    }
}

// Readiness

/// The status of a store as JSON, with its times as they are in the status.
fn json(status: &Status) -> String {
    serde_json::to_string(status).unwrap()
}

/// What it should be, but for what does not change in these tests.
fn body(status: &Status, ready: bool, degraded: &str, generation: u64, last_error: &str, failures: u32) -> String {
    let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let (loaded_at, checked_at) = (seconds(status.loaded_at), seconds(status.checked_at));
    format!(
        r#"{{"ready":{ready},"degraded":[{degraded}],"store":"default","generation":{generation},"source":"script","scheme":"Key","key_id":"id-{generation}","account":null,"loaded_at":{loaded_at},"checked_at":{checked_at},"expires_at":null,"last_error":{last_error},"consecutive_failures":{failures},"driver":"running","accepted":false,"pending":null}}"#
    )
}

#[tokio::test(start_paused = true)]
async fn what_fal_refuses_is_degraded_and_still_ready() {
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    let fal = Fal::default();
    fal.accept(1);
    let client = FalRetryLayer::new(store.clone()).layer(FalAuthLayer::new(store.clone()).layer(fal.clone()));
    let refused = async |refusal: Answer| {
        fal.will_answer(refusal);
        let _ = client.clone().oneshot(request(Method::POST, ADMITTED, "{}")).await;
    };
    let status = store.status();
    assert_eq!(json(&status), body(&status, true, "", 1, "null", 0));

    // What is about one app, or the application's own, is none of the store's.
    refused(answer(403, r#"{"detail":"Insufficient permissions for this operation"}"#)).await;
    refused(answer(403, r#"{"detail":"Access denied"}"#)).await;
    refused(answer(401, "nobody knows what this is")).await;
    assert_eq!(store.status().degraded().count(), 0);

    let locked = || answer(403, r#"{"detail":"User is locked. Reason: Exhausted balance."}"#);
    refused(locked()).await;
    let status = store.status();
    assert_eq!(json(&status), body(&status, true, r#""account_locked""#, 1, "null", 0));

    for detail in [
        "No user found for Key ID and Secret",
        "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.",
        "Authorization header is required",
        "bearer: unable to decode issuer",
    ] {
        refused(answer(401, format!(r#"{{"detail":"{detail}"}}"#))).await;
        assert_eq!(store.status().degraded().next(), Some(Degraded::Refused), "{detail}");
    }
    assert_eq!(store.status().last_refusal().unwrap().reason, Reason::WrongScheme);

    // A bad Secret is pushed, and the old key revoked.
    source.says(Says::Malformed);
    store.reload().await.unwrap_err();
    refused(unknown_key()).await;
    let status = store.status();
    assert!(status.is_ready());
    let degraded = r#""reload_failing","refused","account_locked""#;
    let failures = status.consecutive_failures;
    let error = r#""script: could not load a credential: the key has no `:`; a fal key has the form `id:secret`""#;
    assert_eq!(json(&status), body(&status, true, degraded, 1, error, failures));
    assert!(failures >= 1);

    // A rotation mends what is the key's fault.
    source.brings(2);
    store.reload().await.unwrap();
    let status = store.status();
    assert_eq!(json(&status), body(&status, true, r#""account_locked""#, 2, "null", 0));
}

/// The credential is the one that the request brought along.
#[tokio::test(start_paused = true)]
async fn a_refused_own_credential_is_no_refusal_of_the_store() {
    let store = CredentialStore::fixed(key(1));
    let fal = Fal::default();
    let client = FalRetryLayer::new(store.clone()).layer(FalAuthLayer::new(store.clone()).layer(fal));
    let mut customers = request(Method::POST, ADMITTED, "{}");
    customers.extensions_mut().insert(key(9));
    client.oneshot(customers).await.unwrap_err();
    assert_eq!(store.status().degraded().count(), 0);
}

#[test]
fn only_an_expired_token_keeps_a_store_from_being_ready() {
    let store = CredentialStore::fixed(bearer_until(1_000_000_000));
    let status = store.status();
    assert!(!status.is_ready());
    let at = status.loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(
        json(&status),
        format!(
            r#"{{"ready":false,"degraded":["expired"],"store":"default","generation":1,"source":"fixed","scheme":"Bearer","key_id":null,"account":null,"loaded_at":{at},"checked_at":{at},"expires_at":1000000000,"last_error":null,"consecutive_failures":0,"driver":"absent","accepted":false,"pending":null}}"#
        )
    );
    store.replace(bearer_until(4_000_000_000));
    assert!(store.status().is_ready());
    assert!(!status.is_ready(), "a status that was taken earlier is about the credential of then");
}
