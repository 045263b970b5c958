use std::{fs, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use tower_fal::{
    CredentialStore,
    error::report,
    login::LoginSource,
    mock::{Endpoint, EndpointFailure},
    source::CredentialSource as _,
};

use crate::support::{EXPIRED, MINUTE, World, load, refused};

fn with_teams() -> World {
    let world = World::with_access(60 * MINUTE);
    world.server.add_team("Acme", "team-acme");
    world.server.add_team("Ünion", "team-union");
    world
}

async fn account(source: &LoginSource) -> Option<String> {
    load(source).await.account().map(ToString::to_string)
}

#[tokio::test(start_paused = true)]
async fn without_a_choice_no_account_is_named_or_looked_up() {
    let world = with_teams();
    for config in ["", "[__internal__]\nprofile = \"x\"\n", "[__internal__]\nteam = \"\"\n", "team = \"Acme\"\n"] {
        fs::write(world.home.path().join("config.toml"), config).unwrap();
        assert_eq!(account(&world.source()).await, None, "{config}");
    }
    assert_eq!(world.server.received(Endpoint::Teams), 0);
}

#[tokio::test(start_paused = true)]
async fn a_team_is_found_in_any_case_of_letters_and_once() {
    for (team, user_id) in [
        ("Acme", "team-acme"),
        ("acme", "team-acme"),
        ("ACME", "team-acme"),
        ("ünION", "team-union"),
        ("mock", "user-of-github|1"),
    ] {
        let world = with_teams();
        world.choose(team);
        let source = world.source();
        for _ in 0..5 {
            assert_eq!(account(&source).await.as_deref(), Some(user_id), "{team}");
        }
        assert_eq!(world.server.received(Endpoint::Teams), 1, "{team}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_account_outlives_a_renewal_and_not_another_login() {
    let world = with_teams();
    world.choose("acme");
    let source = world.source();
    let first = load(&source).await;
    world.server.refuse(&first);
    let next = refused(&source, &first).await.unwrap();
    assert_eq!(next.account().unwrap().as_str(), "team-acme");
    assert_eq!((world.server.refreshes(), world.server.received(Endpoint::Teams)), (1, 1));
    world.server.set_user("github|2");
    world.write(world.server.log_in());
    load(&source).await;
    assert_eq!(world.server.received(Endpoint::Teams), 2);
}

#[tokio::test(start_paused = true)]
async fn an_unusable_team_never_becomes_the_personal_account() {
    let world = with_teams();
    world.server.archive_team("Acme");
    for (team, rule) in [
        ("Acme", r#"the account "Acme" has been archived: choose another with `fal account set`"#),
        ("gone", r#"the account "gone" is none of this login's: choose another with `fal account set`"#),
        ("\\u001b[31m", r#"the account "\u{1b}[31m" is none of this login's"#),
    ] {
        world.choose(team);
        let error = world.source().load().await.unwrap_err();
        assert!(report(&error).contains(rule), "{}", report(&error));
    }
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_fails_is_not_repeated_at_each_look() {
    let body = |body: &'static str| EndpointFailure::Body(StatusCode::OK, "application/json", body.into());
    for (failure, expected) in [
        (EndpointFailure::Hang, "there was no answer within 30s"),
        (EndpointFailure::Disconnect, "cannot be reached"),
        (EndpointFailure::Endless, "answered with more than 1048576 bytes"),
        (EndpointFailure::Redirect("https://example.com/".into()), "a redirect, which is not followed (status 302)"),
        (EndpointFailure::Error(StatusCode::FORBIDDEN, "said-by-the-mock"), "status 403"),
        (EndpointFailure::Body(StatusCode::OK, "text/html", Bytes::from_static(b"<html>")), "with what it should not"),
        (body("{}"), "with what it should not"),
        (body("[]"), "is none of this login's"),
        (body(r#"[{"nickname":"acme","user_id":"two words"}]"#), "cannot be used"),
    ] {
        let world = with_teams();
        world.choose("acme");
        world.server.fail(Endpoint::Teams, failure.clone());
        let source = world.source();
        let error = source.load().await.unwrap_err();
        assert!(report(&error).contains(expected), "{failure:?}: {}", report(&error));
        world.assert_no_leak(&error);
        source.load().await.unwrap_err();
        assert_eq!(world.server.received(Endpoint::Teams), 1, "{failure:?}");
        world.server.recover();
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_refused_at_the_lookup_is_renewed_once() {
    let world = with_teams();
    world.choose("acme");
    let source = world.source();
    world.server.fail_next(Endpoint::Teams, EndpointFailure::Error(StatusCode::UNAUTHORIZED, "x"));
    assert_eq!(account(&source).await.as_deref(), Some("team-acme"));
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_refused_at_each_lookup_is_renewed_once() {
    let world = with_teams();
    world.choose("acme");
    world.server.fail(Endpoint::Teams, EndpointFailure::Error(StatusCode::UNAUTHORIZED, "x"));
    let source = world.source();
    for _ in 0..5 {
        let error = source.load().await.unwrap_err();
        assert!(report(&error).contains("takes the token of this login no more"), "{}", report(&error));
    }
    assert_eq!(world.server.refreshes(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_team_shows_within_twelve_seconds() {
    let world = with_teams();
    let store = CredentialStore::builder(world.source()).build().await.unwrap();
    assert!(store.load().credential().account().is_none());
    for (team, user_id) in [("Acme", "team-acme"), ("ünion", "team-union"), ("mock", "user-of-github|1")] {
        world.choose(team);
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(store.load().credential().account().unwrap().as_str(), user_id);
    }
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_is_broken_is_an_error_that_names_it() {
    let world = World::with_access(EXPIRED);
    fs::write(world.home.path().join("config.toml"), "[__internal__\nteam = \"hush\"").unwrap();
    let error = world.source().load().await.unwrap_err();
    let said = report(&error);
    assert!(said.contains("config.toml") && !said.contains("hush"), "{said}");
}
