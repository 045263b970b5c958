//! A fal that answers what it should not.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse as _, Redirect, Response},
    routing::any,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::stream;
use http::StatusCode;
use serde_json::json;
use tower_fal::{
    CredentialStore,
    error::report,
    realtime::{MintError, Token},
};

use crate::{
    support::key,
    world::{APP, minter_at},
};

/// A server that answers each call so.
struct Answers {
    url: String,
    calls: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Answers {
    async fn with(answer: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Self {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let answer = any(async move || {
            counted.fetch_add(1, Ordering::SeqCst);
            answer()
        });
        let router = Router::new().fallback(answer);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self { url, calls, task: tokio::spawn(axum::serve(listener, router).into_future()) }
    }

    async fn token(&self, timeout: Duration) -> Result<Token, MintError> {
        let minter = minter_at(&self.url, &CredentialStore::fixed(key(1))).timeout(timeout).build().unwrap();
        minter.token(APP).await
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn token(body: impl Into<Bytes>) -> Result<String, MintError> {
    let body = body.into();
    let fal = Answers::with(move || body.clone().into_response()).await;
    let token = fal.token(Duration::from_secs(10)).await?;
    Ok(token.expose_secret().to_owned())
}

#[tokio::test]
async fn each_shape_of_an_answer_is_taken() {
    for body in [r#""e30.e30.sig""#, r#"{"token":"e30.e30.sig"}"#, r#"{"detail":"e30.e30.sig"}"#, "e30.e30.sig\n"] {
        assert_eq!(token(body).await.unwrap(), "e30.e30.sig", "{body}");
    }
}

#[tokio::test]
async fn an_error_shows_nothing_of_an_answer_without_a_token() {
    for body in ["<html>hush</html>", "", "{}", r#"{"token":"hush&hush"}"#, r#""hush hush""#, r#"{"detail":["hush"]}"#]
    {
        let error = token(body).await.unwrap_err();
        assert!(matches!(error, MintError::NoToken), "{body}: {error:?}");
        assert!(!format!("{error:?} {}", report(&error)).contains("hush"));
    }
}

#[tokio::test]
async fn an_answer_without_end_is_given_up() {
    let endless =
        || Body::from_stream(stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(&[b'a'; 1024]))));
    let fal = Answers::with(move || endless().into_response()).await;
    assert!(matches!(fal.token(Duration::from_secs(10)).await, Err(MintError::NoToken)));
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_given_up_in_time() {
    let silent = || Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    let fal = Answers::with(move || silent().into_response()).await;
    let began = Instant::now();
    let error = fal.token(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, MintError::TimedOut(_)), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let fal = Answers::with(|| Redirect::temporary("/elsewhere").into_response()).await;
    let error = fal.token(Duration::from_secs(10)).await.unwrap_err();
    assert!(matches!(error, MintError::Status(StatusCode::TEMPORARY_REDIRECT)), "{error:?}");
    assert_eq!(fal.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nobody_at_the_address_is_an_error() {
    // A port that nobody listens at, and that no other test is given.
    let nobody = tokio::net::TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    let minter = minter_at(&url, &CredentialStore::fixed(key(1))).build().unwrap();
    let error = minter.token(APP).await.unwrap_err();
    assert!(matches!(error, MintError::Failed(_)), "{error:?}");
    assert!(!report(&error).contains("secret"));
}

#[tokio::test]
async fn a_token_that_says_it_expires_too_soon_is_not_handed_out() {
    let claims = |iat: u64, exp: u64| {
        let claims = URL_SAFE_NO_PAD.encode(json!({ "iat": iat, "exp": exp }).to_string());
        format!("\"e30.{claims}.c2ln\"")
    };
    // By the difference, whatever the clocks say.
    assert!(token(claims(1000, 1130)).await.is_ok());
    let error = token(claims(1000, 1060)).await.unwrap_err();
    assert!(matches!(error, MintError::ShortLived), "{error:?}");
    assert!(matches!(token(claims(1000, 900)).await, Err(MintError::ShortLived)));
}
