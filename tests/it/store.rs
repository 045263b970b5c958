//! The store and its driver: when the source is asked, what is published, and who learns of it.

use std::{
    error::Error as _,
    future::Future,
    io,
    panic::Location,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinSet,
    time::Instant,
};
use tokio_test::{assert_pending, assert_ready, task};
use tower_fal::{
    Credential, CredentialStore,
    error::{BoxError, SourceErrorKind, report},
    source::{CredentialSource, EnvSource, from_fn},
    store::{DriverState, ReloadError, Reloaded, Status},
};
use tracing::subscriber::DefaultGuard;

use crate::support::{Says, Script, bearer_until, current, keep_events_enabled, key, key_text, status_where};

const SECOND: Duration = Duration::from_secs(1);
const FIVE: Duration = Duration::from_secs(5);

/// A store on a source that brings the key number 1.
async fn store(every: impl Into<Option<Duration>>) -> (CredentialStore, Script) {
    let source = Script::new(every, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    (store, source)
}

async fn build_error(source: impl CredentialSource) -> tower_fal::SourceError {
    CredentialStore::builder(source).load_timeout(3 * SECOND).build().await.unwrap_err()
}

/// What a future says when it is asked once: it has no business waiting.
#[track_caller]
fn at_once<F: Future>(future: F) -> F::Output {
    assert_ready!(task::spawn(future).poll())
}

#[track_caller]
fn assert_changed(reloaded: &Result<Reloaded, ReloadError>, generation: u64) {
    assert!(
        matches!(reloaded, Ok(Reloaded::Changed(now)) if now.get() == generation),
        "not changed to {generation}: {reloaded:?}"
    );
}

#[track_caller]
fn assert_unchanged(reloaded: &Result<Reloaded, ReloadError>, generation: u64) {
    assert!(
        matches!(reloaded, Ok(Reloaded::Unchanged(now)) if now.get() == generation),
        "not unchanged at {generation}: {reloaded:?}"
    );
}

#[track_caller]
fn assert_failed(reloaded: &Result<Reloaded, ReloadError>, kind: SourceErrorKind) {
    assert!(
        matches!(reloaded, Err(ReloadError::Failed(error)) if error.kind() == kind),
        "not failed with {kind:?}: {reloaded:?}"
    );
}

/// Timers tick in milliseconds and never fire early.
#[track_caller]
fn assert_about(gaps: &[f64], seconds: impl IntoIterator<Item = f64>) {
    for (number, (gap, about)) in gaps.iter().zip(seconds).enumerate() {
        let allowed = about * 0.8 - 0.001..=about * 1.2 + 0.002;
        assert!(allowed.contains(gap), "gap {number}: {gap} s, not about {about} s, of {gaps:?}");
    }
}

/// Replicas that were started at once do not ask at once.
#[track_caller]
fn assert_spread(gaps: &[f64], about: f64) {
    assert!(gaps.len() >= 100, "only {} gaps", gaps.len());
    let low = gaps.iter().filter(|gap| **gap < 0.9 * about).count();
    let high = gaps.iter().filter(|gap| **gap > 1.1 * about).count();
    assert!(low > 0 && high > 0, "{low} of {} are low, {high} high", gaps.len());
}

/// Lets the other tasks of this thread run until only so many are left.
fn tasks_left(count: usize) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        for _ in 0..100 {
            if Handle::current().metrics().num_alive_tasks() == count {
                return;
            }
            tokio::task::yield_now().await;
        }
        let alive = Handle::current().metrics().num_alive_tasks();
        panic!("{alive} tasks alive and not {count}, {caller}");
    }
}

// When the source is asked

#[tokio::test(start_paused = true)]
async fn the_source_is_polled_at_its_own_interval_with_jitter() {
    let (_store, source) = store(FIVE).await;
    source.loads_reach(300).await;
    let gaps = source.gaps(0);
    assert_about(&gaps, std::iter::repeat(5.0));
    assert_spread(&gaps, 5.0);
}

#[tokio::test(start_paused = true)]
async fn a_source_without_an_interval_is_asked_only_when_told() {
    let (store, source) = store(None).await;
    tokio::time::sleep(Duration::from_secs(7 * 24 * 60 * 60)).await;
    assert_eq!(source.loads(), 1);
    source.brings(2);
    assert_changed(&store.reload().await, 2);
    assert_eq!(source.loads(), 2);
    source.says(Says::Error);
    assert_failed(&store.reload().await, SourceErrorKind::Other);
    tokio::time::sleep(Duration::from_secs(7 * 24 * 60 * 60)).await;
    assert_eq!(source.loads(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_environment_is_not_polled() {
    let lookups = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&lookups);
    let source = EnvSource::key().environment(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Some(key_text(1).into())
    });
    let store = CredentialStore::builder(source).build().await.unwrap();
    let at_start = lookups.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(24 * 60 * 60)).await;
    assert_eq!(lookups.load(Ordering::SeqCst), at_start);
    assert_eq!(store.status().source.as_ref(), "env:FAL_KEY");
}

#[tokio::test(start_paused = true)]
async fn an_interval_of_zero_does_not_spin() {
    let (_store, source) = store(Duration::ZERO).await;
    tokio::time::sleep(SECOND).await;
    assert!(source.loads() <= 1001, "{} loads in a second", source.loads());
}

// What is published

#[tokio::test(start_paused = true)]
async fn unchanged_content_publishes_nothing_and_notifies_nobody() {
    let (store, source) = store(FIVE).await;
    let mut subscription = store.subscribe();
    source.loads_reach(500).await;
    assert_unchanged(&store.reload().await, 1);
    assert!(subscription.changed().now_or_never().is_none());
    assert_eq!(store.generation().get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_finds_another_key_publishes_it_once() {
    let (store, source) = store(FIVE).await;
    let mut subscription = store.subscribe();
    for n in 2..=5 {
        source.brings(n);
        let seen = subscription.changed().await.unwrap();
        assert_eq!((seen.generation.get(), seen.key_id.unwrap().as_str()), (n, &*format!("id-{n}")));
        assert_eq!((current(&store), store.generation()), (format!("id-{n}"), seen.generation));
        tokio::time::sleep(60 * SECOND).await;
        assert!(subscription.changed().now_or_never().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_token_never_replaces_one_that_is_not() {
    let (store, source) = store(FIVE).await;
    source.says(Says::Here(bearer_until(1)));
    let error = status_where(&store, |status| status.last_error.is_some()).await.last_error.unwrap();
    assert_eq!(error.kind(), SourceErrorKind::Invalid);
    assert_eq!(error.to_string(), "script: brought a token that has expired already");
    assert_failed(&store.reload().await, SourceErrorKind::Invalid);
    assert_eq!((current(&store), store.generation().get()), ("id-1".into(), 1));
}

#[tokio::test]
async fn the_status_names_the_place_and_not_only_the_source() {
    let source = from_fn("chain", None, || async { Ok::<_, BoxError>(key(1).with_source("file:/key")) });
    let store = CredentialStore::builder(source).build().await.unwrap();
    assert_eq!(store.status().source.as_ref(), "file:/key");
    assert_eq!(store.load().source(), "file:/key");
}

// Failures

#[tokio::test(start_paused = true)]
async fn failures_back_off_up_to_the_interval_of_the_source() {
    let (store, source) = store(FIVE).await;
    source.says(Says::Error);
    source.loads_reach(200).await;
    let gaps = source.gaps(1);
    assert_about(&gaps, [1.0, 2.0, 4.0].into_iter().chain(std::iter::repeat(5.0)));
    assert_spread(&gaps[3..], 5.0);
    assert_eq!(current(&store), "id-1");
}

#[tokio::test(start_paused = true)]
async fn failures_back_off_up_to_a_minute() {
    let (store, source) = store(300 * SECOND).await;
    source.says(Says::Error);
    source.loads_reach(110).await;
    let doubling = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
    assert_about(&source.gaps(1), doubling.into_iter().chain(std::iter::repeat(60.0)));
    assert_spread(&source.gaps(7), 60.0);

    source.brings(1);
    status_where(&store, |status| status.last_error.is_none()).await;
    let recovered = source.loads() - 1;
    source.loads_reach(recovered + 5).await;
    assert_about(&source.gaps(recovered), std::iter::repeat(300.0));
}

/// The store recovers from each of them.
#[tokio::test(start_paused = true)]
async fn every_kind_of_failure_keeps_the_last_good_credential() {
    let (store, source) = store(FIVE).await;
    for (n, says, kind) in [
        (2, Says::Nothing, SourceErrorKind::NotFound),
        (3, Says::Malformed, SourceErrorKind::Invalid),
        (4, Says::Error, SourceErrorKind::Other),
        (5, Says::Panic, SourceErrorKind::Panicked),
        (6, Says::Hang, SourceErrorKind::TimedOut),
    ] {
        source.says(says);
        let failed = status_where(&store, |status| status.consecutive_failures == 3).await;
        assert_eq!(failed.last_error.unwrap().kind(), kind);
        assert_eq!((failed.driver, failed.generation.get()), (DriverState::Running, n - 1));
        assert_eq!(current(&store), format!("id-{}", n - 1));

        source.brings(n - 1);
        let recovered = status_where(&store, |status| status.consecutive_failures == 0).await;
        assert!(recovered.last_error.is_none());
        assert_eq!(recovered.generation.get(), n - 1);

        source.brings(n);
        let rotated = status_where(&store, |status| status.generation.get() == n).await;
        assert_eq!(rotated.key_id.unwrap().as_str(), format!("id-{n}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_a_thousand_times_is_still_asked() {
    let (store, source) = store(FIVE).await;
    source.says(Says::Error);
    let failed = status_where(&store, |status| status.consecutive_failures == 1000).await;
    assert!(failed.last_error.is_some());
    assert_eq!(current(&store), "id-1");
    source.brings(2);
    let recovered = status_where(&store, |status| status.consecutive_failures == 0).await;
    assert!(recovered.last_error.is_none());
    assert_eq!(current(&store), "id-2");
}

#[tokio::test(start_paused = true)]
async fn a_load_that_hangs_ends_at_the_timeout() {
    let source = Script::new(60 * SECOND, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).load_timeout(7 * SECOND).build().await.unwrap();
    source.says(Says::Hang);
    let begin = Instant::now();
    let failed = store.reload().await;
    assert_failed(&failed, SourceErrorKind::TimedOut);
    assert_eq!(begin.elapsed(), 7 * SECOND);
    assert_eq!(
        report(&failed.unwrap_err()),
        "the fal credential could not be reloaded: script: did not answer within 7s"
    );
    tasks_left(1).await; // the driver, and not the load
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_poll_interval_does_not_end_the_driver() {
    struct Panicky(Script);

    impl CredentialSource for Panicky {
        fn name(&self) -> &str {
            self.0.name()
        }

        async fn load(&self) -> Result<Option<Credential>, tower_fal::SourceError> {
            self.0.load().await
        }

        fn poll_interval(&self) -> Option<Duration> {
            assert!(self.0.loads() < 2, "as told");
            self.0.poll_interval()
        }
    }

    let source = Script::new(FIVE, Says::Here(key(1)));
    let store = CredentialStore::builder(Panicky(source.clone())).build().await.unwrap();
    source.loads_reach(2).await;
    source.brings(2);
    assert_changed(&store.reload().await, 2);
    source.brings(3);
    status_where(&store, |status| status.generation.get() == 3).await;
    assert_eq!(store.status().driver, DriverState::Running);
}

// The start

/// The error says what to do.
#[tokio::test(start_paused = true)]
async fn a_store_without_a_credential_fails_at_the_start() {
    for (says, kind, text) in [
        (Says::Nothing, SourceErrorKind::NotFound, "script: has no credential"),
        (
            Says::Malformed,
            SourceErrorKind::Invalid,
            "script: could not load a credential: the key has no `:`; a fal key has the form `id:secret`",
        ),
        (Says::Error, SourceErrorKind::Other, "script: could not load a credential: connection refused"),
        (Says::Panic, SourceErrorKind::Panicked, "script: panicked while it loaded a credential"),
        (Says::Hang, SourceErrorKind::TimedOut, "script: did not answer within 3s"),
    ] {
        let error = build_error(Script::new(FIVE, says)).await;
        assert_eq!((error.kind(), &*report(&error)), (kind, text));
        tasks_left(0).await;
    }
}

/// At the start, with the variables to set.
#[tokio::test]
async fn an_empty_environment_fails_and_names_the_variables() {
    let error = build_error(EnvSource::all().environment(|_| None)).await;
    assert_eq!(error.kind(), SourceErrorKind::NotFound);
    assert_eq!(error.source_name(), "env:FAL_KEY,FAL_KEY_ID+FAL_KEY_SECRET,FAL_KEY_FILE");
    assert!(error.to_string().contains("nothing is set: set FAL_KEY;"), "{error}");
}

#[test]
fn a_store_that_reloads_is_refused_outside_a_runtime() {
    let source = Script::new(FIVE, Says::Here(key(1)));
    let error = at_once(CredentialStore::builder(source.clone()).build()).unwrap_err();
    assert!(report(&error).contains("needs a Tokio runtime: build it inside one, or use `from_env` or `fixed`"));
    assert_eq!(source.loads(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_build_that_is_given_up_leaves_no_task() {
    let source = Script::new(FIVE, Says::Hang);
    let mut build = task::spawn(CredentialStore::builder(source.clone()).build());
    assert_pending!(build.poll());
    source.loads_reach(1).await;
    drop(build);
    tasks_left(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_late_is_waited_for() {
    for says in [Says::Nothing, Says::Fails(io::ErrorKind::NotFound), Says::Fails(io::ErrorKind::PermissionDenied)] {
        let source = Script::new(FIVE, says);
        let build = tokio::spawn(CredentialStore::builder(source.clone()).wait_for_source(30 * SECOND).build());
        source.loads_reach(10).await;
        let began = Instant::now();
        source.brings(1);
        let store = build.await.unwrap().unwrap();
        assert!(began.elapsed() <= Duration::from_millis(2402), "{:?}", began.elapsed());
        assert_eq!((current(&store), store.status().consecutive_failures), ("id-1".to_owned(), 0));
        assert_about(&source.gaps(0), [0.1, 0.2, 0.4, 0.8, 1.6].into_iter().chain(std::iter::repeat(2.0)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_never_comes_is_waited_for_until_the_limit() {
    let lines = Lines::default();
    let _of_this_thread = lines.collect();
    let source = Script::new(FIVE, Says::Nothing);
    let began = Instant::now();
    let error = CredentialStore::builder(source.clone()).wait_for_source(30 * SECOND).build().await.unwrap_err();
    assert_eq!(began.elapsed(), 30 * SECOND);
    assert_eq!(error.kind(), SourceErrorKind::NotFound);
    assert_eq!(report(&error), "script: brought no credential within 30s: script: has no credential");
    assert!((16..=24).contains(&source.loads()), "{}", source.loads());
    assert_eq!(
        lines.take(),
        ["WARN tower_fal::events: waiting for the source of the fal credential source=\"script\" \
          error=\"script: has no credential\" limit=30s"]
    );
    tasks_left(0).await;
}

#[tokio::test(start_paused = true)]
async fn what_another_try_does_not_cure_is_not_waited_for() {
    for says in [Says::Malformed, Says::Error, Says::Panic] {
        let source = Script::new(FIVE, says);
        assert_fails_at_once(CredentialStore::builder(source.clone()).wait_for_source(30 * SECOND).build()).await;
        assert_eq!(source.loads(), 1);
    }
    // And without the option, nothing is.
    let source = Script::new(FIVE, Says::Nothing);
    assert_fails_at_once(CredentialStore::builder(source.clone()).build()).await;
    assert_eq!(source.loads(), 1);
}

async fn assert_fails_at_once<T: std::fmt::Debug>(build: impl Future<Output = Result<T, tower_fal::SourceError>>) {
    let began = Instant::now();
    let error = build.await.unwrap_err();
    assert!(!report(&error).contains("within"), "{error}");
    assert_eq!(began.elapsed(), Duration::ZERO);
}

// One reload for everyone

#[tokio::test(start_paused = true)]
async fn a_thousand_refused_at_once_cost_one_load() {
    let (store, source) = store(None).await;
    source.brings(2);
    source.close();
    let refused = store.generation();
    let mut waiting: Vec<_> = (0..1000).map(|_| task::spawn(store.reload_past(refused))).collect();
    for (number, waits) in waiting.iter_mut().enumerate() {
        assert_pending!(waits.poll());
        if number == 500 {
            source.loads_reach(2).await; // half of them come while the load runs
        }
    }
    source.open();
    for waits in waiting {
        assert_changed(&waits.await, 2);
    }
    assert_eq!(source.loads(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_refused_on_many_threads_cost_one_load() {
    let (store, source) = store(None).await;
    source.brings(2);
    let refused = store.generation();
    let mut tasks = JoinSet::new();
    for _ in 0..1000 {
        let store = store.clone();
        tasks.spawn(async move { store.reload_past(refused).await });
    }
    for reloaded in tasks.join_all().await {
        assert_changed(&reloaded, 2);
    }
    assert_eq!(source.loads(), 2);
}

/// The load brings the same credential again.
#[tokio::test(start_paused = true)]
async fn a_thousand_refusals_in_a_row_cost_one_load() {
    let (store, source) = store(None).await;
    for _ in 0..1000 {
        assert_unchanged(&store.reload_past(store.generation()).await, 1);
    }
    assert_eq!(source.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_cool_down_doubles_up_to_a_minute() {
    let (store, source) = store(None).await;
    let refused = store.generation();
    for (step, seconds) in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0].into_iter().enumerate() {
        assert_unchanged(&store.reload_past(refused).await, 1);
        assert_eq!(source.loads(), step + 2);
        tokio::time::sleep(Duration::from_secs_f64(0.79 * seconds)).await;
        assert_unchanged(&at_once(store.reload_past(refused)), 1);
        assert_eq!(source.loads(), step + 2, "{seconds} s");
        tokio::time::sleep(Duration::from_secs_f64(0.42 * seconds)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn cool_downs_are_spread() {
    let mut over = 0;
    for _ in 0..60 {
        let (store, source) = store(None).await;
        assert_unchanged(&store.reload_past(store.generation()).await, 1);
        tokio::time::sleep(SECOND).await;
        assert_unchanged(&store.reload_past(store.generation()).await, 1);
        over += source.loads() - 2;
    }
    assert!((1..60).contains(&over), "{over} of 60 are over after a second");
}

#[tokio::test(start_paused = true)]
async fn a_rotation_ends_the_cool_down() {
    let (store, source) = store(FIVE).await;
    for _ in 0..6 {
        assert_unchanged(&store.reload_past(store.generation()).await, 1);
        tokio::time::sleep(60 * SECOND).await;
    }
    source.brings(2);
    status_where(&store, |status| status.generation.get() == 2).await;
    let loads = source.loads();
    assert_unchanged(&store.reload_past(store.generation()).await, 2);
    assert_eq!(source.loads(), loads + 1);
    tokio::time::sleep(Duration::from_millis(1201)).await; // short again
    assert_unchanged(&store.reload_past(store.generation()).await, 2);
    assert_eq!(source.loads(), loads + 2);
}

/// The source has a new credential each time it is asked.
#[tokio::test(start_paused = true)]
async fn a_new_credential_each_time_is_not_loaded_per_refusal() {
    let (store, source) = store(None).await;
    for n in 2..2002 {
        source.brings(n);
        let _ = store.reload_past(store.generation()).await; // fal takes none of them
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // In 20 s: at 0, 1, 3, 7 and 15 s, each cool-down up to a fifth shorter or longer; and the first load of all.
    assert!((5..=8).contains(&source.loads()), "{}", source.loads());
}

#[tokio::test(start_paused = true)]
async fn a_poll_may_find_the_new_key_during_the_cool_down() {
    let (store, source) = store(FIVE).await;
    let refused = store.generation();
    for _ in 0..5 {
        assert_unchanged(&store.reload_past(refused).await, 1);
        tokio::time::sleep(20 * SECOND).await;
    }
    assert_unchanged(&store.reload_past(refused).await, 1); // a cool-down of half a minute
    source.brings(2);
    status_where(&store, |status| status.generation.get() == 2).await;
    assert_changed(&at_once(store.reload_past(refused)), 2);
}

#[tokio::test(start_paused = true)]
async fn an_error_is_handed_out_again_during_the_cool_down() {
    let (store, source) = store(None).await;
    source.says(Says::Error);
    for _ in 0..10 {
        assert_failed(&store.reload_past(store.generation()).await, SourceErrorKind::Other);
    }
    assert_eq!(source.loads(), 2);
    assert_eq!(store.status().consecutive_failures, 1);
    assert_eq!(current(&store), "id-1");

    source.brings(1);
    assert_unchanged(&store.reload().await, 1); // it knows no cool-down, and it is newer than the error
    assert_unchanged(&at_once(store.reload_past(store.generation())), 1);
}

#[tokio::test(start_paused = true)]
async fn a_late_refusal_of_an_old_generation_is_answered_at_once() {
    let (store, source) = store(None).await;
    let old = store.generation();
    source.brings(2);
    assert_changed(&store.reload().await, 2);
    assert_changed(&at_once(store.reload_past(old)), 2);
    tasks_left(1).await;
    assert_eq!((source.loads(), current(&store)), (2, "id-2".into()));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_joins_a_poll_that_is_under_way() {
    let (store, source) = store(FIVE).await;
    source.close();
    source.brings(2);
    source.loads_reach(2).await;
    let mut waits = task::spawn(store.reload_past(store.generation()));
    assert_pending!(waits.poll());
    source.open();
    assert_changed(&waits.await, 2);
    assert_eq!(source.loads(), 2);
}

// Reload

#[tokio::test(start_paused = true)]
async fn a_reload_begins_a_load_after_the_call_even_while_one_runs() {
    let (store, source) = store(FIVE).await;
    source.close();
    source.loads_reach(2).await; // it has read the old key and does not say so yet
    source.brings(2);
    let mut first = task::spawn(store.reload());
    let mut second = task::spawn(store.reload());
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    source.open();
    assert_changed(&first.await, 2);
    assert_changed(&second.await, 2);
    assert_eq!(source.loads(), 3); // they shared it
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_dropped_cancels_nothing() {
    let (store, source) = store(None).await;
    source.close();
    for n in 2..=5 {
        source.brings(n);
        let mut dropped = task::spawn(async {
            if n % 2 == 0 { store.reload().await } else { store.reload_past(store.generation()).await }
        });
        assert_pending!(dropped.poll());
        source.loads_reach(usize::try_from(n).unwrap()).await;
        drop(dropped);
        source.open();
        let published = status_where(&store, |status| status.generation.get() == n).await;
        assert_eq!(published.key_id.unwrap().as_str(), format!("id-{n}"));
        source.close();
        tokio::time::sleep(3 * SECOND).await; // longer than the cool-down after a refusal
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_dropped_before_the_load_begins_cancels_nothing() {
    let (store, source) = store(None).await;
    source.brings(2);
    let mut dropped = task::spawn(store.reload());
    assert_pending!(dropped.poll());
    drop(dropped);
    status_where(&store, |status| status.generation.get() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn the_current_credential_is_there_while_a_load_hangs() {
    let (store, source) = store(FIVE).await;
    source.says(Says::Hang);
    source.loads_reach(2).await;
    assert_eq!((current(&store), store.status().driver), ("id-1".into(), DriverState::Running));
}

#[tokio::test(start_paused = true)]
async fn reload_errors_say_what_to_do() {
    let (store, source) = store(None).await;
    source.says(Says::Error);
    let failed = store.reload().await.unwrap_err();
    assert_eq!(
        report(&failed),
        "the fal credential could not be reloaded: script: could not load a credential: connection refused"
    );
    assert!(failed.source().unwrap().is::<tower_fal::SourceError>());
    for (error, hint) in [(ReloadError::DriverGone, "build the store on one"), (ReloadError::NeverReloads, "replace")] {
        assert!(error.to_string().contains(hint), "{error}");
        assert!(error.source().is_none());
    }
}

// Events

/// The lines that events write.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    /// Collects the events of this thread until the guard is dropped.
    fn collect(&self) -> DefaultGuard {
        keep_events_enabled();
        let lines = self.clone();
        let writer = tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(move || lines.clone());
        tracing::subscriber::set_default(writer.finish())
    }

    fn take(&self) -> Vec<String> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        String::from_utf8(bytes).unwrap().lines().map(|line| line.trim().to_owned()).collect()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_load_and_each_rotation_are_logged_with_both_keys() {
    let lines = Lines::default();
    let _of_this_thread = lines.collect();
    let (store, source) = store(None).await;
    assert_eq!(
        lines.take(),
        ["INFO tower_fal::events: the fal credential was loaded source=\"script\" key_id=id-1 generation=1"]
    );
    source.brings(2);
    assert_changed(&store.reload().await, 2);
    assert_unchanged(&store.reload().await, 2);
    store.replace(bearer_until(4_000_000_000));
    store.replace(key(3));
    assert_eq!(
        lines.take(),
        [
            "INFO tower_fal::events: the fal credential was rotated source=\"script\" key_id=id-2 generation=2 \
             previous_key_id=id-1 previous_generation=1",
            "INFO tower_fal::events: the fal credential was rotated source=\"replaced\" generation=3 \
             previous_key_id=id-2 previous_generation=2",
            "INFO tower_fal::events: the fal credential was rotated source=\"replaced\" key_id=id-3 generation=4 \
             previous_generation=3",
        ]
    );
}

// The life of the driver

#[tokio::test(start_paused = true)]
async fn the_driver_ends_with_the_last_handle() {
    let (store, _source) = store(FIVE).await;
    let clone = store.clone();
    drop(store);
    tokio::time::sleep(60 * SECOND).await;
    tasks_left(1).await;
    assert_eq!(clone.status().driver, DriverState::Running);
    drop(clone);
    tasks_left(0).await;
}

#[tokio::test(start_paused = true)]
async fn without_an_interval_too_the_driver_ends_with_its_handles() {
    let (store, _source) = store(None).await;
    tasks_left(1).await;
    tokio::task::yield_now().await;
    drop(store);
    tasks_left(0).await;
}

#[tokio::test(start_paused = true)]
async fn while_a_load_hangs_the_driver_ends_with_the_last_handle() {
    let (store, source) = store(FIVE).await;
    source.says(Says::Hang);
    source.loads_reach(2).await;
    tasks_left(2).await; // the driver and the load
    drop(store);
    tasks_left(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_subscription_alone_does_not_keep_the_driver() {
    let (store, _source) = store(FIVE).await;
    let mut subscription = store.subscribe();
    drop(store);
    tasks_left(0).await;
    assert!(subscription.changed().await.is_none());
    assert!(subscription.wait_for(|status| status.generation.get() == 2).await.is_none());
    assert_eq!(subscription.status().key_id.unwrap().as_str(), "id-1");
}

#[tokio::test(start_paused = true)]
async fn a_status_that_is_kept_does_not_stop_a_rotation() {
    let (store, source) = store(FIVE).await;
    let mut subscription = store.subscribe();
    let mut kept = vec![subscription.wait_for(|_| true).await.unwrap()];
    for n in 2..=5 {
        source.brings(n);
        assert_changed(&store.reload().await, n);
        kept.push(subscription.status());
        kept.push(subscription.changed().await.unwrap());
    }
    let generations: Vec<_> = kept.iter().map(|status| status.generation.get()).collect();
    assert_eq!(generations, [1, 2, 2, 3, 3, 4, 4, 5, 5]);
}

#[tokio::test]
async fn the_condition_of_a_subscription_may_use_the_store() {
    let store = CredentialStore::fixed(key(1));
    let mut n = 1;
    let wanted = |status: &Status| {
        n += 1;
        store.replace(key(n));
        assert_eq!(store.status().generation.get(), n);
        status.generation.get() == 3
    };
    assert_eq!(store.subscribe().wait_for(wanted).await.unwrap().generation.get(), 3);
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

#[test]
fn a_store_outlives_the_runtime_of_its_driver() {
    let (first, second) = (runtime(), runtime());
    let (store, source) = first.block_on(store(FIVE));
    let mut subscription = store.subscribe();
    let mut waits = task::spawn(store.reload());
    assert_pending!(waits.poll());
    drop(first);
    assert!(waits.is_woken());
    second.block_on(async {
        assert!(matches!(waits.await, Err(ReloadError::DriverGone)));
        assert_eq!(subscription.changed().await.unwrap().driver, DriverState::Ended);
        assert!(matches!(at_once(store.reload()), Err(ReloadError::DriverGone)));
        assert!(matches!(at_once(store.reload_past(store.generation())), Err(ReloadError::DriverGone)));
        assert_eq!((current(&store), source.loads()), ("id-1".into(), 1));

        let old = store.generation();
        assert_eq!(store.replace(key(2)).get(), 2);
        assert_eq!((current(&store), store.status().driver), ("id-2".into(), DriverState::Ended));
        assert_changed(&at_once(store.reload_past(old)), 2);
    });
}

#[test]
fn a_cool_down_does_not_hide_that_the_driver_is_gone() {
    let first = runtime();
    let (store, _source) = first.block_on(async {
        let (store, source) = store(FIVE).await;
        assert_unchanged(&store.reload_past(store.generation()).await, 1);
        (store, source)
    });
    drop(first);
    assert!(matches!(at_once(store.reload_past(store.generation())), Err(ReloadError::DriverGone)));
}

#[test]
fn a_store_on_one_runtime_is_reloaded_from_another() {
    let first = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (store, source) = first.block_on(store(None));
    source.brings(2);
    assert_changed(&runtime().block_on(store.reload()), 2);
    source.brings(3);
    assert_changed(&runtime().block_on(store.reload_past(store.generation())), 3);
    drop(store);
}

// Replace and fixed

#[tokio::test(start_paused = true)]
async fn a_poll_does_not_undo_a_replace() {
    let (store, source) = store(FIVE).await;
    source.brings(2);
    status_where(&store, |status| status.generation.get() == 2).await;
    assert_eq!(store.replace(key(9)).get(), 3);
    assert_eq!(store.status().source.as_ref(), "replaced");
    source.loads_reach(100).await;
    source.says(Says::Error);
    status_where(&store, |status| status.consecutive_failures > 2).await;
    source.brings(2);
    status_where(&store, |status| status.consecutive_failures == 0).await;
    source.loads_reach(source.loads() + 3).await;
    assert_eq!((current(&store), store.generation().get()), ("id-9".into(), 3));
}

#[tokio::test(start_paused = true)]
async fn something_new_at_the_source_follows_a_replace() {
    let (store, source) = store(FIVE).await;
    store.replace(key(9));
    source.brings(2);
    status_where(&store, |status| status.generation.get() == 3).await;
    assert_eq!((current(&store), store.load().source()), ("id-2".into(), "script"));
}

#[tokio::test(start_paused = true)]
async fn a_reload_undoes_a_replace() {
    let (store, source) = store(FIVE).await;
    store.replace(key(9));
    source.loads_reach(3).await;
    assert_changed(&store.reload().await, 3);
    assert_eq!(current(&store), "id-1");
}

#[tokio::test(start_paused = true)]
async fn a_reload_that_failed_leaves_no_wish_behind() {
    let (store, source) = store(FIVE).await;
    store.replace(key(9));
    source.says(Says::Error);
    assert_failed(&store.reload().await, SourceErrorKind::Other);
    source.brings(1);
    status_where(&store, |status| status.consecutive_failures == 0).await;
    assert_eq!(current(&store), "id-9");
}

#[tokio::test(start_paused = true)]
async fn a_refused_replacement_gives_way_to_the_source() {
    let (store, _source) = store(None).await;
    let refused = store.replace(key(9));
    assert_changed(&store.reload_past(refused).await, 3);
    assert_eq!(current(&store), "id-1");
}

#[tokio::test(start_paused = true)]
async fn the_same_credential_is_no_replacement() {
    let (store, _source) = store(FIVE).await;
    let mut subscription = store.subscribe();
    assert_eq!(store.replace(key(1)).get(), 1);
    assert_eq!(store.replace(key(1).with_source("elsewhere")).get(), 1);
    assert!(subscription.changed().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn the_source_bringing_what_was_replaced_is_no_change() {
    let (store, source) = store(FIVE).await;
    store.replace(key(2));
    source.brings(2);
    assert_unchanged(&store.reload().await, 2);
    source.loads_reach(10).await;
    assert_eq!(store.generation().get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_load_under_way_does_not_undo_a_replace() {
    for past in [true, false] {
        let (store, source) = store(None).await;
        source.close();
        let mut waits = task::spawn(async {
            if past { store.reload_past(store.generation()).await } else { store.reload().await }
        });
        assert_pending!(waits.poll());
        source.loads_reach(2).await;
        store.replace(key(9)); // the load has the refused one in its hands
        source.open();
        assert_changed(&waits.await, 2);
        assert_eq!(current(&store), "id-9");
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_that_was_asked_for_before_a_replace_does_not_undo_it() {
    for past in [true, false] {
        let (store, source) = store(None).await;
        let mut waits = task::spawn(async {
            if past { store.reload_past(store.generation()).await } else { store.reload().await }
        });
        assert_pending!(waits.poll()); // the driver had no time to begin
        store.replace(key(9));
        assert_changed(&waits.await, 2);
        assert_eq!(source.loads(), 2);
        assert_eq!(current(&store), "id-9");
    }
}

#[tokio::test(start_paused = true)]
async fn a_replacement_does_not_inherit_the_cool_down() {
    let (store, source) = store(None).await;
    source.close();
    let mut waits = task::spawn(store.reload_past(store.generation()));
    assert_pending!(waits.poll());
    source.loads_reach(2).await;
    let refused = store.replace(key(9));
    source.open();
    assert_changed(&waits.await, 2);
    assert_changed(&store.reload_past(refused).await, 3); // nobody has asked on behalf of this one yet
    assert_eq!((source.loads(), current(&store)), (3, "id-1".into()));
}

#[test]
fn a_fixed_store_never_reloads_and_needs_no_runtime() {
    let store = CredentialStore::fixed(key(1));
    assert_eq!((store.status().driver, store.status().source.as_ref()), (DriverState::Absent, "fixed"));
    assert!(matches!(at_once(store.reload()), Err(ReloadError::NeverReloads)));
    let old = store.generation();
    assert!(matches!(at_once(store.reload_past(old)), Err(ReloadError::NeverReloads)));
    assert_eq!(store.replace(key(2)).get(), 2);
    assert_changed(&at_once(store.reload_past(old)), 2);
    assert_eq!((current(&store), store.status().driver), ("id-2".into(), DriverState::Absent));
}

#[test]
fn debug_shows_ids_and_never_secrets() {
    let store = CredentialStore::fixed(key(1));
    let builder = CredentialStore::builder(Script::new(None, Says::Here(key(1))));
    for shown in [format!("{store:?}"), format!("{:?} {:?}", store.status(), store.load()), format!("{builder:?}")] {
        assert!(!shown.contains("secret-of"));
        assert!(shown.contains("id-1") || shown.contains("script"), "{shown}");
    }
}
