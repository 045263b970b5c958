use std::{fs, pin::pin, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::ServiceExt as _;
use tower_fal::{
    login::{Connection, DeviceLogin, LoginError, LoginErrorKind, PendingLogin, settled},
    mock::{Endpoint, EndpointFailure},
};

use crate::support::{EXPIRED, MINUTE, World, load};

fn login(world: &World) -> DeviceLogin {
    DeviceLogin::with_client(world.server.clone()).home(world.home.path()).authority(world.server.url()).unwrap()
}

async fn pending(world: &World) -> PendingLogin {
    login(world).start().await.unwrap()
}

/// Waits for the login. Returns the seconds after which the server was polled.
///
/// The time until the end is no measure of that: a lock is taken then, which a process that another test has just started
/// may have as well until it runs its program. Meanwhile paused time runs on.
async fn polls(world: &World, pending: PendingLogin) -> Vec<u64> {
    let began = Instant::now();
    let mut polls = Vec::new();
    let mut waiting = pin!(pending.wait());
    loop {
        let ended = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
        polls.resize(world.server.received(Endpoint::Token), began.elapsed().as_secs());
        if let Ok(ended) = ended {
            ended.unwrap();
            return polls;
        }
    }
}

fn assert_no_leak(error: &LoginError) {
    let texts = format!("{error} {error:?} {}", tower_fal::error::report(error));
    for secret in ["mock-", "said-by-the-mock", "\u{1b}"] {
        assert!(!texts.contains(secret), "{texts}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_confirmed_login_is_written_as_fals_tools_write_it() {
    let world = World::new();
    let pending = pending(&world).await;
    let code = pending.user_code().to_owned();
    assert_eq!(code.len(), 9);
    assert!(pending.time_left() > 14 * MINUTE);
    world.server.confirm();
    assert_eq!(polls(&world, pending).await, [5], "the first poll comes after one interval");
    // One line, and no line break: the refresh token alone.
    let text = fs::read_to_string(world.path()).unwrap();
    assert!(text.starts_with("mock-refresh-") && !text.contains('\n'), "{text:?}");
    assert!(world.server.accepts(&load(&world.source()).await));
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn a_home_is_made_and_a_file_is_replaced_for_the_user_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let world = World::new();
    world.server.confirm_after(0);
    let home = world.home.path().join("deep/home");
    login(&world).home(&home).start().await.unwrap().wait().await.unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&home), mode(&home.join("auth0_token"))), (0o700, 0o600));

    world.write("an older login\n");
    fs::set_permissions(world.path(), fs::Permissions::from_mode(0o644)).unwrap();
    pending(&world).await.wait().await.unwrap();
    assert_eq!(mode(&world.path()), 0o600);
    assert!(world.tokens()[0].starts_with("mock-refresh-"));
}

#[tokio::test(start_paused = true)]
async fn nobody_confirms_a_login_that_could_not_be_written() {
    let world = World::new();
    fs::write(world.home.path().join("file"), "").unwrap();
    let error = login(&world).home(world.home.path().join("file")).start().await.unwrap_err();
    assert_eq!(error.kind(), LoginErrorKind::File);
    fs::create_dir(world.home.path().join(".auth0_token.tower-fal")).unwrap();
    let error = login(&world).start().await.unwrap_err();
    assert!(error.to_string().contains("cannot be written"), "{error}");
    assert_eq!(world.server.received(Endpoint::DeviceCode), 0);
}

#[tokio::test(start_paused = true)]
async fn a_login_that_is_started_disturbs_no_renewal() {
    let world = World::with_access(EXPIRED);
    world.server.set_latency(Duration::from_secs(10));
    let source = world.source();
    let loading = tokio::spawn(async move { load(&source).await });
    while world.server.received(Endpoint::Token) == 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(pending(&world).await);
    assert!(world.server.accepts(&loading.await.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn the_url_is_that_of_fals_own_tools() {
    let world = World::new();
    let pending = login(&world).start().await.unwrap();
    let code = pending.user_code();
    let confirm = format!("https%3A%2F%2Fauth.fal.ai%2Factivate%3Fuser_code%3D{code}");
    let client = "TwXR51Vz8JbY8GUUMy6EyuVR0fTO7N4N";
    assert_eq!(pending.url(), format!("https://auth.fal.ai/v2/logout?client_id={client}&returnTo={confirm}"));
    for connection in [Connection::GitHub, Connection::Google, "example.com".parse().unwrap()] {
        let name = connection.as_str().to_owned();
        let pending = login(&world).connection(connection).start().await.unwrap();
        let code = pending.user_code();
        let confirm = format!("https%3A%2F%2Fauth.fal.ai%2Factivate%3Fuser_code%3D{code}");
        let query = format!("user_code={code}&verification_uri_complete={confirm}&connection={name}");
        assert_eq!(pending.url(), format!("https://fal.ai/api/auth/cli/session-seed?{query}"));
    }
    for wrong in ["", "two words", "a/b", "x\u{1b}[31m"] {
        assert_eq!(wrong.parse::<Connection>().unwrap_err().kind(), LoginErrorKind::Setting);
    }
}

#[tokio::test(start_paused = true)]
async fn it_polls_at_the_interval_and_slower_when_asked_to() {
    let world = World::new();
    // Time that is paused runs ahead of the clock by which the identity is checked.
    world.server.set_clock_offset(-200.0);
    world.server.set_device_code(Duration::from_secs(7), 15 * MINUTE);
    world.server.confirm_after(4);
    world.server.fail_next(Endpoint::Token, EndpointFailure::Error(StatusCode::FORBIDDEN, "slow_down"));
    world.server.fail_next(Endpoint::Token, EndpointFailure::Error(StatusCode::BAD_REQUEST, "slow_down"));
    let pending = pending(&world).await;
    // After 7 s, after 5 s more, and from then on after 10 s more each: four polls in vain, and one that is not.
    assert_eq!(polls(&world, pending).await, [7, 19, 36, 53, 70, 87, 104]);
}

#[tokio::test(start_paused = true)]
async fn an_interval_that_is_missing_is_five_seconds() {
    for interval in ["", r#","interval":0"#, r#","interval":"soon""#] {
        let world = World::new();
        let body = format!(
            r#"{{"device_code":"d","user_code":"AB-CD","verification_uri_complete":"https://auth.fal.ai/activate"{interval}}}"#
        );
        world
            .server
            .fail_next(Endpoint::DeviceCode, EndpointFailure::Body(StatusCode::OK, "application/json", body.into()));
        let pending = pending(&world).await;
        let began = Instant::now();
        world.server.fail(Endpoint::Token, EndpointFailure::Error(StatusCode::FORBIDDEN, "access_denied"));
        assert_eq!(pending.wait().await.unwrap_err().kind(), LoginErrorKind::Denied);
        assert_eq!(began.elapsed().as_secs(), 5, "{interval}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_ends_a_login_is_told_apart() {
    let world = World::new();
    let denied = pending(&world).await;
    world.server.deny();
    let error = denied.wait().await.unwrap_err();
    assert_eq!((error.kind(), world.path().exists()), (LoginErrorKind::Denied, false));
    assert_no_leak(&error);

    world.server.set_device_code(Duration::from_secs(5), MINUTE);
    let late = pending(&world).await;
    let began = Instant::now();
    let error = late.wait().await.unwrap_err();
    assert_eq!((error.kind(), began.elapsed()), (LoginErrorKind::TooLate, MINUTE));

    for (code, kind) in [
        ("expired_token", LoginErrorKind::TooLate),
        ("invalid_grant", LoginErrorKind::TooLate),
        ("said-by-the-mock", LoginErrorKind::Answer),
    ] {
        world.server.fail_next(Endpoint::Token, EndpointFailure::Error(StatusCode::FORBIDDEN, code));
        let error = pending(&world).await.wait().await.unwrap_err();
        assert_eq!(error.kind(), kind, "{code}");
        assert_no_leak(&error);
    }
    assert!(!world.path().exists());
}

#[tokio::test(start_paused = true)]
async fn it_goes_on_and_asks_less_often_while_the_server_is_down() {
    let world = World::new();
    world.server.set_clock_offset(-200.0);
    let pending = pending(&world).await;
    for failure in [
        EndpointFailure::Disconnect,
        EndpointFailure::Hang,
        EndpointFailure::Body(StatusCode::BAD_GATEWAY, "text/html", "<html>".into()),
        EndpointFailure::Error(StatusCode::TOO_MANY_REQUESTS, "x"),
    ] {
        world.server.fail_next(Endpoint::Token, failure);
    }
    world.server.confirm();
    // After 5, 10, 20, 40 and 60 s, and the 30 s that the second one hangs.
    assert_eq!(polls(&world, pending).await, [5, 15, 65, 105, 165]);
}

#[tokio::test(start_paused = true)]
async fn a_login_that_is_dropped_is_cancelled() {
    let world = World::new();
    let waiting = tokio::spawn(pending(&world).await.wait());
    tokio::time::sleep(Duration::from_secs(12)).await;
    waiting.abort();
    let _ = waiting.await;
    world.server.confirm();
    let polls = world.server.received(Endpoint::Token);
    tokio::time::sleep(10 * MINUTE).await;
    settled().await;
    assert_eq!((world.server.received(Endpoint::Token), world.path().exists()), (polls, false));
}

#[tokio::test(start_paused = true)]
async fn a_confirmed_login_is_written_even_if_nobody_waits_any_more() {
    let world = World::new();
    world.server.confirm_after(0);
    let pending = pending(&world).await;
    world.server.set_latency(Duration::from_secs(10));
    let waiting = tokio::spawn(pending.wait());
    while world.server.received(Endpoint::Keys) == 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled() && !world.path().exists());
    settled().await;
    assert!(world.path().exists());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_shown_is_refused() {
    let answer = |change: fn(&mut Value)| {
        let mut body = json!({
            "device_code": "d", "user_code": "AB-CD", "verification_uri_complete": "https://auth.fal.ai/activate"
        });
        change(&mut body);
        EndpointFailure::Body(StatusCode::OK, "application/json", body.to_string().into())
    };
    let cases: [(fn(&mut Value), &str); 11] = [
        (|body| body["user_code"] = "\u{1b}[31mAB".into(), "with a code that is not shown"),
        (|body| body["user_code"] = "".into(), "with a code that is not shown"),
        (|body| body["user_code"] = "A".repeat(65).into(), "with a code that is not shown"),
        (
            |body| body["verification_uri_complete"] = "http://auth.fal.ai/activate".into(),
            "with a URL that is not shown",
        ),
        (|body| body["verification_uri_complete"] = "http://127.0.0.1/activate".into(), "with a URL that is not shown"),
        (|body| body["verification_uri_complete"] = "javascript:alert(1)".into(), "with a URL that is not shown"),
        (|body| body["verification_uri_complete"] = "/activate".into(), "with a URL that is not shown"),
        (|body| body["verification_uri_complete"] = "https://a/\u{1b}[31m".into(), "with a URL that is not shown"),
        (|body| body["user_code"] = 7.into(), "with what it should not"),
        (|body| body["device_code"].take().as_null().unwrap_or_default(), "with what it should not"),
        (|body| *body = Value::Null, "with what it should not"),
    ];
    for (change, expected) in cases {
        let world = World::new();
        world.server.fail_next(Endpoint::DeviceCode, answer(change));
        let error = login(&world).start().await.unwrap_err();
        assert_eq!(error.kind(), LoginErrorKind::Answer);
        assert!(error.to_string().contains(expected), "{error}");
        assert_no_leak(&error);
    }
    for failure in [
        EndpointFailure::Error(StatusCode::FORBIDDEN, "said-by-the-mock"),
        EndpointFailure::Body(StatusCode::OK, "text/html", "<html>said-by-the-mock".into()),
        EndpointFailure::Redirect("https://example.com/said-by-the-mock".into()),
        EndpointFailure::Endless,
        EndpointFailure::Hang,
    ] {
        let world = World::new();
        world.server.fail_next(Endpoint::DeviceCode, failure);
        assert_no_leak(&login(&world).start().await.unwrap_err());
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_incomplete_are_refused() {
    for body in
        [json!({}), json!({"access_token": "a", "id_token": "i"}), json!({"refresh_token": "r", "access_token": "a"})]
    {
        let world = World::new();
        let answer = EndpointFailure::Body(StatusCode::OK, "application/json", body.to_string().into());
        world.server.fail_next(Endpoint::Token, answer);
        let error = pending(&world).await.wait().await.unwrap_err();
        assert!(error.to_string().contains("answered without"), "{error}");
        assert!(!world.path().exists());
    }
}

type Forge = fn(&mut Value, &mut Value);

#[tokio::test(start_paused = true)]
async fn each_wrong_identity_is_refused_and_nothing_is_written() {
    let cases: [(&str, Forge, &str); 19] = [
        ("alg none", |header, _| header["alg"] = "none".into(), "it is not signed with RS256"),
        ("alg HS256", |header, _| header["alg"] = "HS256".into(), "it is not signed with RS256"),
        ("alg RS512", |header, _| header["alg"] = "RS512".into(), "it is not signed with RS256"),
        ("no alg", |header, _| drop(header.as_object_mut().unwrap().remove("alg")), "it is no JSON Web Token"),
        ("unknown key", |header, _| header["kid"] = "said-by-the-mock".into(), "its key is not one of the provider's"),
        ("critical extension", |header, _| header["crit"] = json!(["b64"]), "an extension that is not known here"),
        ("issuer", |_, claims| claims["iss"] = "https://auth.fal.ai".into(), "it is of another issuer"),
        ("no issuer", |_, claims| drop(claims.as_object_mut().unwrap().remove("iss")), "it lacks a claim"),
        ("audience", |_, claims| claims["aud"] = "fal-cloud".into(), "it is for another client"),
        ("no audience", |_, claims| claims["aud"] = json!([]), "it is for another client"),
        (
            "several audiences and no party",
            |_, claims| claims["aud"] = json!([claims["aud"], "other"]),
            "it is for another client",
        ),
        ("party", |_, claims| claims["azp"] = "other".into(), "it is for another client"),
        ("no exp", |_, claims| drop(claims.as_object_mut().unwrap().remove("exp")), "it lacks a claim"),
        ("exp as text", |_, claims| claims["exp"] = claims["exp"].to_string().into(), "it lacks a claim"),
        ("expired", |_, claims| claims["exp"] = (claims["iat"].as_f64().unwrap() - 120.0).into(), "it has expired"),
        ("no iat", |_, claims| drop(claims.as_object_mut().unwrap().remove("iat")), "it lacks a claim"),
        ("iat", |_, claims| claims["iat"] = (claims["iat"].as_f64().unwrap() + 120.0).into(), "it is from the future"),
        ("nbf", |_, claims| claims["nbf"] = (claims["iat"].as_f64().unwrap() + 120.0).into(), "it is from the future"),
        ("negative exp", |_, claims| claims["exp"] = (-1).into(), "it lacks a claim"),
    ];
    for (name, forge, rule) in cases {
        let world = World::new();
        world.server.confirm_after(0);
        world.server.forge_id_tokens(forge);
        let error = pending(&world).await.wait().await.unwrap_err();
        assert_eq!(error.kind(), LoginErrorKind::Identity, "{name}");
        assert!(error.to_string().contains(rule), "{name}: {error}");
        assert_no_leak(&error);
        assert!(!world.path().exists(), "{name}");
        let fetched = if name == "unknown key" { 2 } else { 1 };
        assert_eq!(world.server.received(Endpoint::Keys), fetched, "{name}");
    }
}

/// Tokens that the server gives out to somebody who asks without `DeviceLogin`.
async fn tokens_by_hand(world: &World) -> Value {
    let client = "client_id=TwXR51Vz8JbY8GUUMy6EyuVR0fTO7N4N";
    let ask = async |path: &str, form: String| -> Value {
        let request = Request::post(format!("https://auth.fal.ai{path}")).body(Full::<Bytes>::from(form)).unwrap();
        let answer = world.server.clone().oneshot(request).await.unwrap().into_body().collect().await.unwrap();
        serde_json::from_slice(&answer.to_bytes()).unwrap()
    };
    let code = ask("/oauth/device/code", client.to_owned()).await["device_code"].as_str().unwrap().to_owned();
    let grant = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Adevice_code";
    ask("/oauth/token", format!("{client}&grant_type={grant}&device_code={code}")).await
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_was_changed_is_refused() {
    let world = World::new();
    world.server.confirm_after(0);
    let tokens = tokens_by_hand(&world).await;
    let parts: Vec<_> = tokens["id_token"].as_str().unwrap().split('.').collect();
    let other_claims = URL_SAFE_NO_PAD.encode(r#"{"sub":"somebody else"}"#);
    let other_signature = URL_SAFE_NO_PAD.encode([7; 256]);
    for (id_token, is_fine) in [
        (parts.join("."), true),
        (format!("{}.{other_claims}.{}", parts[0], parts[2]), false),
        (format!("{}.{}.{other_signature}", parts[0], parts[1]), false),
        (format!("{}.{}.", parts[0], parts[1]), false),
        (format!("{}.{}", parts[0], parts[1]), false),
        (format!("{}.", parts.join(".")), false),
        ("x".repeat(70_000), false),
    ] {
        let mut body = tokens.clone();
        body["id_token"] = id_token.into();
        world.server.fail_next(
            Endpoint::Token,
            EndpointFailure::Body(StatusCode::OK, "application/json", body.to_string().into()),
        );
        let done = pending(&world).await.wait().await;
        assert_eq!(done.is_ok(), is_fine, "{done:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_may_differ_by_a_minute_and_no_more() {
    let cases: [(Forge, bool); 4] = [
        (|_, claims| claims["exp"] = (claims["iat"].as_f64().unwrap() - 50.0).into(), true),
        (|_, claims| claims["exp"] = (claims["iat"].as_f64().unwrap() - 70.0).into(), false),
        (|_, claims| claims["iat"] = (claims["iat"].as_f64().unwrap() + 50.0).into(), true),
        (|_, claims| claims["iat"] = (claims["iat"].as_f64().unwrap() + 80.0).into(), false),
    ];
    for (index, (forge, is_fine)) in cases.into_iter().enumerate() {
        let world = World::new();
        world.server.confirm_after(0);
        world.server.forge_id_tokens(forge);
        assert_eq!(pending(&world).await.wait().await.is_ok(), is_fine, "{index}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_keys_are_fetched_again_once_for_a_new_key() {
    let world = World::new();
    world.server.confirm_after(0);
    world.server.rotate_keys();
    pending(&world).await.wait().await.unwrap();
    assert_eq!(world.server.received(Endpoint::Keys), 2);

    for failure in [EndpointFailure::Disconnect, EndpointFailure::Body(StatusCode::OK, "text/html", "<html>".into())] {
        let world = World::new();
        world.server.confirm_after(0);
        world.server.fail_next(Endpoint::Keys, failure.clone());
        pending(&world).await.wait().await.unwrap();
        world.server.fail(Endpoint::Keys, failure);
        pending(&world).await.wait().await.unwrap_err();
        assert_eq!(world.server.received(Endpoint::Keys), 4, "twice for each login");
    }
}

#[tokio::test(start_paused = true)]
async fn an_identity_may_be_for_several_if_it_was_made_for_us() {
    let world = World::new();
    world.server.confirm_after(0);
    world.server.forge_id_tokens(|header, claims| {
        claims["azp"] = claims["aud"].clone();
        claims["aud"] = json!(["other", claims["aud"]]);
        header.as_object_mut().unwrap().remove("kid");
    });
    pending(&world).await.wait().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_logout_revokes_and_removes() {
    let world = World::with_access(60 * MINUTE);
    let credential = load(&world.source()).await;
    assert!(login(&world).logout().await.unwrap());
    assert!(!world.path().exists());
    assert!(!world.server.accepts(&credential));
    assert!(!login(&world).logout().await.unwrap(), "there is no login any more");
    assert!(!login(&world).home(world.home.path().join("missing")).logout().await.unwrap());
    assert_eq!(world.server.received(Endpoint::Revoke), 1);
}

#[tokio::test(start_paused = true)]
async fn a_login_that_was_not_revoked_stays() {
    for failure in [
        EndpointFailure::Disconnect,
        EndpointFailure::Hang,
        EndpointFailure::Error(StatusCode::INTERNAL_SERVER_ERROR, "said-by-the-mock"),
        EndpointFailure::Redirect("https://example.com/".into()),
    ] {
        let world = World::with_access(60 * MINUTE);
        let before = world.tokens();
        world.server.fail(Endpoint::Revoke, failure);
        let error = login(&world).logout().await.unwrap_err();
        assert!(error.to_string().contains("fal did not revoke the login, so"), "{error}");
        assert_no_leak(&error);
        assert_eq!(world.tokens(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_logout_is_carried_out_even_if_nobody_waits_any_more() {
    let world = World::with_access(60 * MINUTE);
    world.server.set_latency(Duration::from_secs(20));
    let login = login(&world);
    assert!(tokio::time::timeout(Duration::from_secs(5), login.logout()).await.is_err());
    settled().await;
    assert!(!world.path().exists());
}
