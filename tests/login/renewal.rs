use std::{
    fs,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;
use tokio::time::Instant;
use tower_fal::{
    CredentialStore,
    error::{SourceErrorKind, report},
    login::settled,
    mock::{Endpoint, EndpointFailure},
    source::{CredentialSource as _, LoadReason},
};

use crate::support::{EXPIRED, MINUTE, World, load, refused, token};

#[tokio::test(start_paused = true)]
async fn a_good_token_is_used_without_lock_or_network() {
    let world = World::with_access(60 * MINUTE);
    let source = world.source();
    for _ in 0..20 {
        assert_eq!(token(&load(&source).await), world.tokens()[1]);
    }
    assert_eq!(world.server.received(Endpoint::Token), 0);
    assert_eq!(fs::read_dir(world.home.path()).unwrap().count(), 1, "no lock file, and no other");
}

#[tokio::test(start_paused = true)]
async fn an_expired_token_is_renewed_and_written_at_once() {
    let world = World::with_access(EXPIRED);
    let before = world.tokens();
    let credential = load(&world.source()).await;
    assert!(world.server.accepts(&credential));
    let after = world.tokens();
    assert_eq!(after[1], token(&credential));
    assert!(before[0] != after[0] && after.len() == 2);
    assert_eq!((world.server.refreshes(), world.server.reuses()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_file_with_a_refresh_token_alone_is_renewed() {
    let world = World::new();
    world.write(world.server.log_in());
    assert!(world.server.accepts(&load(&world.source()).await));
}

#[tokio::test(start_paused = true)]
async fn an_access_token_that_is_no_jwt_counts_as_expired() {
    let world = World::new();
    world.write(format!("{}\nnot-a-jwt", world.server.log_in()));
    assert!(world.server.accepts(&load(&world.source()).await));
}

#[tokio::test(start_paused = true)]
async fn the_old_refresh_token_stays_if_no_other_comes() {
    let world = World::with_access(EXPIRED);
    world.server.keep_refresh_tokens();
    let before = world.tokens();
    load(&world.source()).await;
    let after = world.tokens();
    assert_eq!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
}

/// An hour of tokens of ten minutes. The wall clock of this machine stands still meanwhile, so only the clock that cannot
/// be set counts.
#[tokio::test(start_paused = true)]
async fn tokens_of_ten_minutes_are_renewed_once_each_and_in_time() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(10 * MINUTE);
    let store = CredentialStore::builder(world.source()).build().await.unwrap();
    for second in 0..3600 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(world.server.accepts(store.load().credential()), "a gap after {second} s");
    }
    let refreshes = world.server.refreshes();
    // One for each five minutes, and one poll later each.
    assert!((11..=13).contains(&refreshes), "{refreshes}");
    assert_eq!(world.server.reuses(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_four_minutes_is_not_renewed_at_each_look() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(4 * MINUTE);
    let source = world.source();
    for _ in 0..11 {
        load(&source).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    assert_eq!(world.server.refreshes(), 1);
    tokio::time::sleep(Duration::from_secs(20)).await;
    load(&source).await;
    assert_eq!(world.server.refreshes(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_life_of_a_token_is_read_from_it_if_nobody_says_it() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(4 * MINUTE);
    world.server.omit_expires_in();
    let source = world.source();
    load(&source).await;
    tokio::time::sleep(Duration::from_secs(115)).await;
    load(&source).await;
    assert_eq!(world.server.refreshes(), 1);
    tokio::time::sleep(Duration::from_secs(10)).await;
    load(&source).await;
    assert_eq!(world.server.refreshes(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_an_hour_off_costs_one_renewal() {
    for offset in [3600.0, -3600.0] {
        let world = World::new();
        world.server.set_clock_offset(offset);
        world.server.set_token_life(10 * MINUTE);
        world.write(world.server.log_in());
        let (ours, theirs) = (world.source(), world.source());
        let credential = load(&ours).await;
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(load(&ours).await.same_value(&credential), "{offset}");
        }
        assert_eq!(world.server.refreshes(), 1, "{offset}");
        // Another process renews it, since to its clock it may be over, and ours does not answer in kind.
        load(&theirs).await;
        let refreshes = world.server.refreshes();
        for source in [&ours, &theirs, &ours, &theirs] {
            assert!(world.server.accepts(&load(source).await));
        }
        assert_eq!(world.server.refreshes(), refreshes, "{offset}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_credential_costs_one_renewal() {
    let world = World::with_access(60 * MINUTE);
    let source = world.source();
    let first = load(&source).await;
    world.server.refuse(&first);
    for _ in 0..10 {
        let next = refused(&source, &first).await.unwrap();
        assert!(world.server.accepts(&next));
    }
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_somebody_else_has_renewed_is_used_for_a_refused_one() {
    let world = World::with_access(60 * MINUTE);
    let (ours, theirs) = (world.source(), world.source());
    let first = load(&ours).await;
    world.server.refuse(&first);
    let next = refused(&theirs, &first).await.unwrap();
    assert!(refused(&ours, &first).await.unwrap().same_value(&next));
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_store_is_not_told_in_vain_that_a_token_expires() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(60 * MINUTE);
    let source = world.source();
    let first = load(&source).await;
    let expiring = async || source.load_because(LoadReason::Expiring(&first)).await.unwrap().unwrap();
    assert!(expiring().await.same_value(&first), "not in the first half of its life");
    tokio::time::sleep(54 * MINUTE).await;
    assert!(load(&source).await.same_value(&first), "six minutes are left");
    let next = expiring().await;
    assert!(!next.same_value(&first));
    assert!(expiring().await.same_value(&next));
    assert_eq!(world.server.refreshes(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_token_is_kept_while_it_is_good_and_the_server_is_down() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(10 * MINUTE);
    let source = world.source();
    let first = load(&source).await;
    world
        .server
        .fail(Endpoint::Token, EndpointFailure::Error(StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable"));
    tokio::time::sleep(5 * MINUTE).await;
    let asked = world.server.received(Endpoint::Token);
    // The waits are 5, 10, 20, 40, 80 s and up to a fifth longer; it is asked every second. A look at a file that was
    // written just now takes 100 ms more, so it is the time that counts, and not the looks.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(150) {
        assert!(load(&source).await.same_value(&first));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(world.server.received(Endpoint::Token) - asked, 5);

    tokio::time::sleep(3 * MINUTE).await;
    let error = source.load().await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Unreadable);
    assert!(report(&error).contains("https://auth.fal.ai answered with an error (status 503)"), "{}", report(&error));
    world.assert_no_leak(&error);

    world.server.recover();
    tokio::time::sleep(6 * MINUTE).await;
    assert!(!load(&source).await.same_value(&first));
}

#[tokio::test(start_paused = true)]
async fn each_hostile_answer_is_an_error_and_leaves_the_file() {
    let html = Bytes::from_static(b"<html>said-by-the-mock</html>");
    let body = |body: &'static str| EndpointFailure::Body(StatusCode::OK, "application/json", body.into());
    let cases = [
        (EndpointFailure::Hang, "there was no answer within 30s"),
        (EndpointFailure::Disconnect, "cannot be reached"),
        (EndpointFailure::Endless, "answered with more than 1048576 bytes"),
        (EndpointFailure::Redirect("https://example.com/said-by-the-mock".into()), "a redirect, which is not followed"),
        (EndpointFailure::Error(StatusCode::FORBIDDEN, "authorization_pending"), "does not renew the login"),
        (EndpointFailure::Error(StatusCode::FORBIDDEN, "said-by-the-mock"), "with an error (status 403)"),
        (EndpointFailure::Error(StatusCode::TOO_MANY_REQUESTS, "too_many_requests"), "too many requests (status 429)"),
        (EndpointFailure::Body(StatusCode::OK, "text/html", html.clone()), "with what it should not (status 200)"),
        (EndpointFailure::Body(StatusCode::BAD_GATEWAY, "text/html", html), "with an error (status 502)"),
        (body("{}"), "answered without an access token"),
        (body(r#"{"access_token":"two words","refresh_token":"a\nb"}"#), "answered without an access token"),
        (body(r#"{"access_token":7}"#), "with what it should not"),
        (body(r#"["said-by-the-mock"]"#), "with what it should not"),
        (body("null"), "with what it should not"),
    ];
    for (failure, expected) in cases {
        let world = World::with_access(EXPIRED);
        let before = world.tokens();
        world.server.fail(Endpoint::Token, failure.clone());
        let source = world.source();
        let error = source.load().await.unwrap_err();
        assert!(report(&error).contains(expected), "{failure:?}: {}", report(&error));
        world.assert_no_leak(&error);
        assert_eq!(world.tokens(), before, "{failure:?}");
        // Another look costs no other request.
        assert_eq!(report(&source.load().await.unwrap_err()), report(&error));
        assert_eq!(world.server.received(Endpoint::Token), 1, "{failure:?}");
        assert!(world.server.endless_taken() <= 2 * 1024 * 1024, "{} bytes", world.server.endless_taken());

        world.server.recover();
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(world.server.accepts(&load(&source).await));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_token_without_an_access_token_is_kept() {
    let world = World::with_access(EXPIRED);
    let other = world.server.log_in();
    let body = format!(r#"{{"refresh_token":"{other}"}}"#);
    world.server.fail_next(Endpoint::Token, EndpointFailure::Body(StatusCode::OK, "application/json", body.into()));
    let source = world.source();
    assert!(report(&source.load().await.unwrap_err()).contains("without an access token"));
    assert_eq!(world.tokens(), [other]);
    // It is another refresh token, so there is nothing to wait for.
    assert!(world.server.accepts(&load(&source).await));
}

#[tokio::test(start_paused = true)]
async fn a_refused_refresh_token_is_final_and_not_sent_again() {
    let world = World::with_access(EXPIRED);
    world.server.end_logins();
    let before = world.tokens();
    let source = world.source();
    for _ in 0..5 {
        let error = source.load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(report(&error).contains("run `fal auth login`"), "{}", report(&error));
        world.assert_no_leak(&error);
        tokio::time::sleep(10 * MINUTE).await;
    }
    assert_eq!(world.server.received(Endpoint::Token), 1);
    assert_eq!(world.tokens(), before, "the file is never removed");

    world.write(world.server.log_in());
    assert!(world.server.accepts(&load(&source).await), "another login is used at once");
}

#[tokio::test(start_paused = true)]
async fn a_good_token_outlives_its_refused_refresh_token() {
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(10 * MINUTE);
    let source = world.source();
    let first = load(&source).await;
    world.write(format!("mock-refresh-unknown\n{}", token(&first)));
    tokio::time::sleep(6 * MINUTE).await;
    assert!(load(&source).await.same_value(&first));
    tokio::time::sleep(4 * MINUTE).await;
    assert!(report(&source.load().await.unwrap_err()).contains("is no login any more"));
}

/// The server refuses a refresh token, as another process has spent it and writes what it got meanwhile.
async fn refused_while_another_writes(access: Duration) -> World {
    let world = World::with_access(EXPIRED);
    world.server.set_latency(MINUTE / 6);
    world.server.fail_next(Endpoint::Token, EndpointFailure::Error(StatusCode::FORBIDDEN, "invalid_grant"));
    let source = world.source();
    let loading = tokio::spawn(async move { load(&source).await });
    while world.server.received(Endpoint::Token) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.write(world.server.log_in_with_access(access));
    let credential = loading.await.unwrap();
    assert!(world.server.accepts(&credential));
    assert_eq!(world.tokens()[1], token(&credential));
    world
}

#[tokio::test(start_paused = true)]
async fn what_another_process_wrote_is_adopted_after_a_refusal() {
    let world = refused_while_another_writes(60 * MINUTE).await;
    assert_eq!(world.server.received(Endpoint::Token), 1);
}

#[tokio::test(start_paused = true)]
async fn what_another_process_wrote_is_renewed_if_it_has_expired() {
    let world = refused_while_another_writes(EXPIRED).await;
    assert_eq!(world.server.received(Endpoint::Token), 2);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_the_load_loses_no_token() {
    let world = World::with_access(EXPIRED);
    world.server.set_latency(Duration::from_secs(20));
    let before = world.tokens();
    let built = CredentialStore::builder(world.source()).load_timeout(Duration::from_secs(10)).build().await;
    assert_eq!(built.unwrap_err().kind(), SourceErrorKind::TimedOut);
    assert_eq!(world.tokens(), before);
    settled().await;
    assert_eq!(world.server.refreshes(), 1);
    assert_ne!(world.tokens(), before);
    world.server.set_latency(Duration::ZERO);
    let store = CredentialStore::builder(world.source()).build().await.unwrap();
    assert!(world.server.accepts(store.load().credential()));
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_build_that_is_dropped_loses_no_token() {
    let world = World::with_access(EXPIRED);
    world.server.set_latency(Duration::from_secs(20));
    let before = world.tokens();
    let building = tokio::spawn(CredentialStore::builder(world.source()).build());
    while world.server.received(Endpoint::Token) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    building.abort();
    assert!(building.await.unwrap_err().is_cancelled());
    settled().await;
    assert_ne!(world.tokens(), before);
    assert_eq!((world.server.refreshes(), world.server.reuses()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_load_may_take_as_long_as_its_requests() {
    let world = World::with_access(EXPIRED);
    world.server.set_latency(Duration::from_secs(25));
    let store = CredentialStore::builder(world.source()).build().await.unwrap();
    assert!(world.server.accepts(store.load().credential()));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_cannot_be_written_are_written_later() {
    for access in [true, false] {
        let world = World::with_access(EXPIRED);
        if !access {
            world.write(world.server.log_in());
        }
        let before = world.tokens();
        world.server.set_latency(MINUTE / 6);
        let source = Arc::new(world.source());
        let loading = tokio::spawn({
            let source = Arc::clone(&source);
            async move { source.load().await }
        });
        while world.server.received(Endpoint::Token) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        fs::remove_file(world.home.path().join(".auth0_token.tower-fal")).unwrap();
        let error = loading.await.unwrap().unwrap_err();
        assert!(report(&error).contains("cannot be written"), "{}", report(&error));
        world.assert_no_leak(&error);
        assert_eq!(world.tokens(), before);

        tokio::time::sleep(Duration::from_secs(10)).await;
        let credential = load(&source).await;
        assert!(world.server.accepts(&credential));
        assert_eq!(world.tokens()[1], token(&credential));
        assert_ne!(world.tokens()[0], before[0]);
        assert_eq!((world.server.refreshes(), world.server.reuses()), (1, 0), "{access}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_spent_token_whose_answer_is_lost_ends_the_login() {
    // Nothing can be done about this: the token is spent, and what came for it is nowhere.
    let world = World::with_access(EXPIRED);
    world.server.fail_next(Endpoint::Token, EndpointFailure::DisconnectAfter);
    let source = world.source();
    assert!(report(&source.load().await.unwrap_err()).contains("cannot be reached"));
    tokio::time::sleep(Duration::from_secs(6)).await;
    let error = source.load().await.unwrap_err();
    assert!(report(&error).contains("run `fal auth login`"), "{}", report(&error));
    assert_eq!(world.server.reuses(), 1);
}

/// What is logged, as one text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start(&self) -> tracing::subscriber::DefaultGuard {
        // With one dispatcher alone, another test's thread, which has none, could switch an event off for all.
        static SECOND: LazyLock<tracing::Dispatch> =
            LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(std::io::sink).finish()));
        LazyLock::force(&SECOND);
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
        tracing::subscriber::set_default(subscriber.with_writer(move || log.clone()).finish())
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_logged_while_the_token_is_good() {
    let log = Log::default();
    let _guard = log.start();
    let world = World::with_access(EXPIRED);
    world.server.set_token_life(10 * MINUTE);
    let source = world.source();
    load(&source).await;
    world.server.fail(Endpoint::Token, EndpointFailure::Error(StatusCode::FORBIDDEN, "said-by-the-mock"));
    tokio::time::sleep(6 * MINUTE).await;
    for _ in 0..3 {
        load(&source).await;
    }
    let text = log.text();
    assert_eq!(text.matches("WARN").count(), 1, "{text}");
    assert!(text.contains("the fal login could not be renewed") && text.contains("failures=1"), "{text}");
    for secret in world.tokens().iter().map(String::as_str).chain(["said-by-the-mock", "\u{1b}"]) {
        assert!(!text.contains(secret), "{text}");
    }
}
