//! What the minter asks of fal, and what it hands out.

use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;
use tower::Layer as _;
use tower_fal::{
    FalAuthError,
    error::{Reason, report},
    mock::{Failure, Presented},
    origin::FalOrigins,
    realtime::{Body, Endpoint, MintError, TokenMinter},
};

use crate::{
    support::key,
    world::{APP, Mints as _, asked, client, opens, pass, world},
};

#[tokio::test]
async fn a_token_opens_a_socket_of_its_application() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    let token = minter.token(APP).await.unwrap();
    assert!(opens(&world.fal, APP, token.expose_secret()).await);
    assert!(!opens(&world.fal, "acme/dogs/realtime", token.expose_secret()).await);
    assert!(token.expires_at() >= SystemTime::now() + token.lifetime());
    assert_eq!((token.lifetime(), minter.lifetime()), (Duration::from_secs(120), Duration::from_secs(120)));
    let url = token.socket_url(APP).unwrap();
    let expected = format!("wss://fal.run/{APP}?fal_jwt_token={}", token.expose_secret());
    assert_eq!(url.expose_secret(), expected);
}

#[tokio::test]
async fn each_endpoint_is_asked_in_its_own_words() {
    let paths = json!({ "allowed_apps": [APP], "duration": 180 });
    let app = json!({ "app": APP, "duration": 180 });
    let aliases = json!({ "allowed_apps": ["cats"], "token_expiration": 180 });
    for (endpoint, body, path, expected) in [
        (None, None, "/tokens/realtime", &paths),
        (Some(Endpoint::Realtime), Some(Body::App), "/tokens/realtime", &app),
        (Some(Endpoint::Realtime), Some(Body::AllowedApps), "/tokens/realtime", &paths),
        (Some(Endpoint::Tokens), None, "/tokens/", &aliases),
    ] {
        let world = world().await;
        let mut builder = world.minter();
        if let Some(endpoint) = endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(body) = body {
            builder = builder.body(body);
        }
        let token = builder.build().unwrap().token(APP).await.unwrap();
        assert!(opens(&world.fal, APP, token.expose_secret()).await, "{endpoint:?} {body:?}");
        let [call] = world.calls().try_into().unwrap();
        assert_eq!((call.method.as_str(), call.path.as_str()), ("POST", path));
        assert_eq!(call.headers["content-type"], "application/json");
        assert_eq!(call.presented, Presented::Accepted(key(1).key_id().cloned()));
        assert_eq!(&asked(&call), expected);
    }
}

#[tokio::test]
async fn one_token_may_be_for_several_applications() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    let both = ["acme/dogs/realtime", APP];
    let token = minter.token_for(both).await.unwrap();
    for app in both {
        assert!(opens(&world.fal, app, token.expose_secret()).await);
    }
    let again = minter.token_for([APP, "acme/dogs/realtime", APP]).await.unwrap();
    assert_eq!(again.expose_secret(), token.expose_secret());
    assert_ne!(minter.token(APP).await.unwrap().expose_secret(), token.expose_secret());

    let one = world.minter().body(Body::App).build().unwrap();
    assert!(matches!(one.token_for(both).await, Err(MintError::OneApp)));
}

#[tokio::test]
async fn an_application_that_is_not_listed_costs_no_call() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    for app in ["other/cats/realtime", "acme/cats/dev/realtime", "acme"] {
        assert!(minter.token(app).await.is_err(), "{app}");
    }
    assert!(matches!(minter.token_for([APP, "other/cats"]).await, Err(MintError::NotAllowed)));
    assert_eq!(world.fal.requests(), 0);
}

#[tokio::test]
async fn five_hundred_callers_cause_one_call() {
    let world = world().await;
    world.fal.set_latency(Duration::from_millis(50));
    let minter = world.minter().build().unwrap();
    let mut callers = JoinSet::new();
    for _ in 0..500 {
        let minter = minter.clone();
        callers.spawn(async move { minter.token(APP).await.unwrap().expose_secret().to_owned() });
    }
    let mut tokens = callers.join_all().await;
    tokens.dedup();
    assert_eq!((tokens.len(), world.calls().len()), (1, 1));
}

#[tokio::test]
async fn a_call_survives_the_caller_that_caused_it() {
    let world = world().await;
    world.fal.set_latency(Duration::from_millis(50));
    let minter = world.minter().build().unwrap();
    let mut first = tokio_test::task::spawn(minter.token(APP));
    assert!(first.poll().is_pending());
    drop(first);
    let token = minter.token(APP).await.unwrap();
    assert!(opens(&world.fal, APP, token.expose_secret()).await);
    assert_eq!(world.calls().len(), 1);
}

/// The promise that the page in `docs/realtime.md` makes.
#[tokio::test]
async fn a_token_lives_as_long_as_advertised_when_handed_out_late() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    let token = minter.token(APP).await.unwrap().expose_secret().to_owned();
    // It was minted for 180 s.
    pass(Duration::from_secs(50)).await;
    assert_eq!(minter.token(APP).await.unwrap().expose_secret(), token);
    pass(Duration::from_secs(120)).await;
    assert!(opens(&world.fal, APP, &token).await);
    pass(Duration::from_secs(11)).await;
    assert!(!opens(&world.fal, APP, &token).await);
    assert_eq!(world.calls().len(), 1);
}

#[tokio::test]
async fn a_token_with_less_than_the_advertised_life_is_not_handed_out() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    let token = minter.token(APP).await.unwrap();
    pass(Duration::from_secs(60)).await;
    let next = minter.token(APP).await.unwrap();
    assert_ne!(next.expose_secret(), token.expose_secret());
    assert_eq!(world.calls().len(), 2);
}

#[tokio::test]
async fn a_key_that_was_rotated_is_found_and_the_call_is_made_again() {
    let world = world().await;
    world.source.brings(2);
    world.fal.accept(&key(2));
    world.fal.revoke(&key(1));
    let token = world.minter().build().unwrap().token(APP).await.unwrap();
    assert!(opens(&world.fal, APP, token.expose_secret()).await);
    let presented: Vec<_> = world.calls().into_iter().map(|call| call.presented).collect();
    let [old, new] = [1, 2].map(|n| key(n).key_id().cloned());
    assert_eq!(presented, [Presented::Refused(old), Presented::Accepted(new)]);
    assert_eq!(world.reloads(), 1);
}

#[tokio::test]
async fn a_refusal_is_typed() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    world.fal.deny(&key(1));
    let error = minter.token(APP).await.unwrap_err();
    let Some(FalAuthError::Forbidden(refusal)) = error.auth_error() else { panic!("{error}") };
    assert_eq!(refusal.reason(), Reason::InsufficientPermissions);
    let text = report(&error);
    assert!(text.starts_with("the call that mints a token failed: ") && !text.contains("secret"), "{text}");

    world.fal.revoke(&key(1));
    let error = minter.token("acme/dogs/realtime").await.unwrap_err();
    assert!(matches!(error.auth_error(), Some(FalAuthError::Unauthorized(_))), "{error}");
}

#[tokio::test]
async fn a_refusal_that_is_passed_through_is_typed_too() {
    let world = world().await;
    world.fal.deny(&key(1));
    let origins = FalOrigins::only([]).unwrap().and(&world.fal.rest_origin()).unwrap();
    let layer = tower_fal::layer(&world.store).auth(|auth| auth.origins(origins)).passthrough();
    let builder = TokenMinter::builder(layer.layer(client())).rest_url(world.fal.rest_origin()).allow_app("acme/*");
    let error = builder.build().unwrap().token(APP).await.unwrap_err();
    assert!(matches!(error.auth_error(), Some(FalAuthError::Forbidden(_))), "{error}");
}

#[tokio::test]
async fn a_service_without_the_layer_is_told_what_is_missing() {
    let world = world().await;
    let layer = tower_fal::layer(&world.store); // its origins are fal's own
    let builder = TokenMinter::builder(layer.layer(client())).rest_url(world.fal.rest_origin()).allow_app("acme/*");
    let error = builder.build().unwrap().token(APP).await.unwrap_err();
    assert!(matches!(error, MintError::Status(StatusCode::UNAUTHORIZED)), "{error:?}");
    assert!(error.to_string().contains("`tower_fal::layer`"), "{error}");
    assert_eq!(world.calls()[0].presented, Presented::Nothing);
}

#[tokio::test]
async fn a_failure_is_not_asked_for_again_within_a_second() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    world.fal.fail_next(1, Failure::Status(StatusCode::INTERNAL_SERVER_ERROR));
    for _ in 0..100 {
        let error = minter.token(APP).await.unwrap_err();
        assert!(matches!(error, MintError::Status(StatusCode::INTERNAL_SERVER_ERROR)), "{error:?}");
    }
    assert_eq!(world.calls().len(), 1);
    pass(Duration::from_secs(1)).await;
    minter.token(APP).await.unwrap();
}

#[tokio::test]
async fn a_caller_may_pay_with_a_credential_of_his_own() {
    let world = world().await;
    world.fal.accept(&key(7));
    let minter = world.minter().build().unwrap();
    let houses = minter.token(APP).await.unwrap();
    let own = minter.token_with(&key(7), APP).await.unwrap();
    assert_ne!(own.expose_secret(), houses.expose_secret());
    assert_eq!(world.calls()[1].presented, Presented::Accepted(key(7).key_id().cloned()));
    // It is nobody else's.
    assert_eq!(minter.token(APP).await.unwrap().expose_secret(), houses.expose_secret());
    assert!(matches!(minter.token_with(&key(7), "other/cats").await, Err(MintError::NotAllowed)));
}

#[tokio::test]
async fn nothing_shows_a_token_or_a_key() {
    let world = world().await;
    let minter = world.minter().build().unwrap();
    let token = minter.token(APP).await.unwrap();
    let shown = format!("{minter:?} {token:?} {:?} {:#?}", token.socket_url(APP).unwrap(), world.minter());
    assert!(!shown.contains(token.expose_secret()) && !shown.contains("secret-of"), "{shown}");
}
