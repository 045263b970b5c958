//! A credential that names an account: `x-fal-user-id` goes where the credential goes, and nowhere else.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{Empty, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt as _, service_fn};
use tower_fal::{
    Credential, CredentialStore, FalAuthError, FalAuthLayer, FalRetryLayer,
    auth::Stamp,
    error::{Reason, Refusal},
    mock::{MockFal, Presented},
    origin::FalOrigins,
    reqwest::{FalAuthMiddleware, FalRetryMiddleware, ReqwestService},
    source,
};

const USER_ID: HeaderName = HeaderName::from_static("x-fal-user-id");
const RUN: &str = "https://fal.run/fal-ai/flux/dev";

fn token(text: &str) -> Credential {
    Credential::bearer(text).unwrap()
}

fn team() -> Credential {
    token("e30.e30.team-token").for_account("github|1").unwrap()
}

fn key() -> Credential {
    Credential::key("id:hush").unwrap()
}

/// The `authorization` and the `x-fal-user-id` of a request.
type Sent = (Option<String>, Vec<String>);

fn sent(headers: &HeaderMap) -> Sent {
    let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
    (headers.get(AUTHORIZATION).map(text), headers.get_all(USER_ID).iter().map(text).collect())
}

fn carries(authorization: &str, accounts: &[&str]) -> Sent {
    (Some(authorization.to_owned()), accounts.iter().map(ToString::to_string).collect())
}

/// What a request carries behind this layer.
async fn behind(layer: &FalAuthLayer, request: Request<()>) -> Sent {
    let client = service_fn(async |request: Request<()>| Ok::<_, Infallible>(Response::new(sent(request.headers()))));
    layer.layer(client).oneshot(request).await.unwrap().into_body()
}

fn request(uri: &str, accounts: &[&str]) -> Request<()> {
    let request = accounts.iter().fold(Request::get(uri), |request, account| request.header(USER_ID, *account));
    request.body(()).unwrap()
}

#[tokio::test]
async fn the_account_goes_with_its_credential() {
    let layer = FalAuthLayer::new(CredentialStore::fixed(team()));
    assert_eq!(behind(&layer, request(RUN, &[])).await, carries("Bearer e30.e30.team-token", &["github|1"]));
    assert_eq!(behind(&layer, request(RUN, &["a", "b"])).await, carries("Bearer e30.e30.team-token", &["github|1"]));

    // In the extensions of one request.
    let mut own = request(RUN, &[]);
    own.extensions_mut().insert(token("own").for_account("github|2").unwrap());
    assert_eq!(behind(&layer, own).await, carries("Bearer own", &["github|2"]));
    let mut own = request(RUN, &[]);
    own.extensions_mut().insert(key());
    assert_eq!(behind(&layer, own).await, carries("Key id:hush", &[]));
}

#[tokio::test]
async fn the_account_goes_nowhere_else() {
    let layer = FalAuthLayer::new(CredentialStore::fixed(team()));
    assert_eq!(behind(&layer, request("https://example.com/", &[])).await, (None, vec![]));
    assert_eq!(behind(&layer, request("https://example.com/", &["mine"])).await, (None, vec!["mine".to_owned()]));

    let keeps = layer.keep_existing();
    let mut existing = request(RUN, &[]);
    existing.headers_mut().insert(AUTHORIZATION, "Key other:x".parse().unwrap());
    assert_eq!(behind(&keeps, existing).await, carries("Key other:x", &[]));
}

#[tokio::test]
async fn a_credential_without_one_leaves_the_callers_header() {
    let layer = FalAuthLayer::new(CredentialStore::fixed(key()));
    assert_eq!(behind(&layer, request(RUN, &["a", "b"])).await, carries("Key id:hush", &["a", "b"]));
    let mut replaced = request(RUN, &["mine"]);
    replaced.headers_mut().insert(AUTHORIZATION, "Key other:x".parse().unwrap());
    assert_eq!(behind(&layer, replaced).await, carries("Key id:hush", &["mine"]));
}

/// Where two layers are stacked, the inner one's credential is sent, and so is no account of the outer one's.
#[tokio::test]
async fn an_account_goes_when_its_credential_is_replaced() {
    let outer = FalAuthLayer::new(CredentialStore::fixed(team()));
    let inner = FalAuthLayer::new(CredentialStore::fixed(key()));
    let client = service_fn(async |request: Request<()>| Ok::<_, Infallible>(Response::new(sent(request.headers()))));
    let stack = ServiceBuilder::new().layer(outer).layer(inner).service(client);
    let carried = stack.oneshot(request(RUN, &[])).await.unwrap().into_body();
    assert_eq!(carried, carries("Key id:hush", &[]));
}

#[test]
fn a_handshake_carries_it_and_loses_it_with_the_credential() {
    let store = CredentialStore::fixed(team());
    let mut handshake = request("wss://ws.fal.run/fal-ai/flux/dev", &[]);
    assert!(store.authorize(&mut handshake));
    assert_eq!(sent(handshake.headers()), carries("Bearer e30.e30.team-token", &["github|1"]));
    store.replace(token("other").for_account("github|2").unwrap());
    assert!(store.authorize(&mut handshake));
    assert_eq!(sent(handshake.headers()), carries("Bearer other", &["github|2"]));
    store.replace(key());
    assert!(store.authorize(&mut handshake));
    assert_eq!(sent(handshake.headers()), carries("Key id:hush", &[]));
}

#[test]
fn another_account_is_another_credential() {
    let store = CredentialStore::fixed(team());
    assert_eq!(store.replace(team()).get(), 1);
    assert_eq!(store.replace(token("e30.e30.team-token").for_account("github|2").unwrap()).get(), 2);
    assert_eq!(store.replace(token("e30.e30.team-token")).get(), 3);
}

#[test]
fn the_status_shows_the_account() {
    let store = CredentialStore::fixed(team());
    assert_eq!(store.status().account.as_ref().unwrap().as_str(), "github|1");
    let json = serde_json::to_value(store.status()).unwrap();
    assert_eq!((&json["account"], &json["key_id"]), (&"github|1".into(), &serde_json::Value::Null));
    let shown = format!("{:?} {:?}", store, store.status());
    assert!(shown.contains("github|1") && !shown.contains("e30.e30.team-token"), "{shown}");
    store.replace(key());
    assert_eq!(serde_json::to_value(store.status()).unwrap()["account"], serde_json::Value::Null);
}

/// A fal that has locked each account.
#[derive(Clone)]
struct Locked;

impl<B> Service<Request<B>> for Locked {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        let body = Full::from(r#"{"detail":"User is locked. Reason: TOP_UP."}"#);
        ready(Ok(Response::builder().status(StatusCode::FORBIDDEN).body(body).unwrap()))
    }
}

#[tokio::test]
async fn a_stamp_and_a_refusal_show_the_account() {
    let store = CredentialStore::fixed(team());
    let answer = FalAuthLayer::new(store.clone()).layer(Locked).oneshot(request(RUN, &[])).await.unwrap();
    let stamp = answer.extensions().get::<Stamp>().unwrap();
    assert_eq!(stamp.account().unwrap().as_str(), "github|1");
    assert!(format!("{stamp:?}").contains("github|1"));

    let fal = tower_fal::layer(&store).layer(Locked);
    let error = fal.oneshot(Request::get(RUN).body(Empty::<Bytes>::new()).unwrap()).await.unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!(refusal.account().unwrap().as_str(), "github|1");
    let text = error.to_string() + &tower_fal::error::report(&error);
    assert!(text.contains("the token for the account `github|1`") && !text.contains("e30.e30.team-token"), "{text}");
}

/// A store whose source brings `then` when it is asked again.
async fn rotating(first: Credential, then: Credential) -> CredentialStore {
    let brings = Arc::new(Mutex::new(vec![then, first]));
    let source = source::from_fn_with("script", None, brings, async |brings: Arc<Mutex<Vec<Credential>>>| {
        let mut brings = brings.lock().unwrap();
        Ok(if brings.len() > 1 { brings.pop() } else { brings.last().cloned() })
    });
    CredentialStore::builder(source).build().await.unwrap()
}

/// Which stack sends it.
#[derive(Clone, Copy, Debug)]
enum Stack {
    Hyper,
    ReqwestService,
    ReqwestMiddleware,
}

impl Stack {
    const ALL: [Self; 3] = [Self::Hyper, Self::ReqwestService, Self::ReqwestMiddleware];

    async fn post(self, store: &CredentialStore, uri: &str, accounts: &[&str]) -> Result<StatusCode, Refusal> {
        let auth = FalAuthLayer::new(store.clone()).origins(FalOrigins::new().loopback_http());
        let retry = FalRetryLayer::new(store.clone());
        let request = accounts.iter().fold(Request::post(uri), |request, account| request.header(USER_ID, *account));
        let request = request.body(Full::<Bytes>::from("{}")).unwrap();
        let refused = |error: FalAuthError| error.refusal().unwrap().clone();
        match self {
            Self::Hyper => {
                let client = Client::builder(TokioExecutor::new()).build_http();
                let fal = ServiceBuilder::new().layer(retry).layer(auth).service(client);
                fal.oneshot(request).await.map(|answer| answer.status()).map_err(refused)
            }
            Self::ReqwestService => {
                let client = ReqwestService::new(client()).unwrap();
                let fal = ServiceBuilder::new().layer(retry).layer(auth).service(client);
                fal.oneshot(request).await.map(|answer| answer.status()).map_err(refused)
            }
            Self::ReqwestMiddleware => {
                let client = reqwest_middleware::ClientBuilder::new(client().build().unwrap());
                let client = client.with(FalRetryMiddleware::from(retry)).with(FalAuthMiddleware::from(auth)).build();
                let (head, _) = request.into_parts();
                let sent = client.post(uri).headers(head.headers).body("{}").send().await;
                sent.map(|answer| answer.status())
                    .map_err(|error| FalAuthError::find(&error).unwrap().refusal().unwrap().clone())
            }
        }
    }
}

fn client() -> reqwest::ClientBuilder {
    // Without the roots of this system, which may have none.
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let builder = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls);
    builder.redirect(reqwest::redirect::Policy::none())
}

/// What the mock saw: whether it accepted the request, and for which accounts it was.
fn seen(fal: &MockFal) -> Vec<(bool, Vec<String>)> {
    let seen = |received: &tower_fal::mock::Received| {
        let accounts = received.headers.get_all(USER_ID).iter().map(|value| value.to_str().unwrap().to_owned());
        (matches!(received.presented, Presented::Accepted(_)), accounts.collect())
    };
    fal.received().iter().map(seen).collect()
}

#[tokio::test]
async fn a_replay_takes_no_account_of_the_attempt_before() {
    for stack in Stack::ALL {
        for (first, then, accounts, expected) in [
            (team(), key(), &[][..], [&["github|1"][..], &[]]),
            (team(), key(), &["mine"], [&["github|1"], &["mine"]]),
            (key(), team(), &["mine"], [&["mine"], &["github|1"]]),
            (team(), token("e30.e30.team-token").for_account("github|2").unwrap(), &[], [&["github|1"], &["github|2"]]),
        ] {
            let fal = MockFal::start().await.unwrap();
            fal.keep_content(true);
            let is_same_token = first.header() == then.header();
            if !is_same_token {
                fal.accept(&then);
            }
            let store = rotating(first, then).await;
            let answer = stack.post(&store, &fal.run_url("fal-ai/flux/dev").to_string(), accounts).await;
            if is_same_token {
                // The token is refused whatever the account is.
                let refusal = answer.unwrap_err();
                assert_eq!(refusal.reason(), Reason::UnknownCredential);
                assert_eq!(refusal.account().unwrap().as_str(), "github|2");
            } else {
                assert_eq!(answer.unwrap(), StatusCode::OK, "{stack:?}");
            }
            let accepted = [false, !is_same_token];
            let expected =
                [0, 1].map(|n| (accepted[n], expected[n].iter().map(ToString::to_string).collect::<Vec<_>>()));
            assert_eq!(seen(&fal), expected, "{stack:?}");
        }
    }
}

/// The newest credential is refused before it was ever accepted, so the previous one is sent again, as it was.
#[tokio::test]
async fn a_replay_with_the_previous_credential_has_its_account() {
    for stack in Stack::ALL {
        for (previous, newest) in [(team(), key()), (key(), team())] {
            let fal = MockFal::start().await.unwrap();
            fal.keep_content(true);
            fal.accept(&previous);
            let accounts =
                |credential: &Credential| credential.account().map(ToString::to_string).into_iter().collect();
            let (before, after): (Vec<String>, Vec<String>) = (accounts(&previous), accounts(&newest));
            let store = rotating(previous, newest).await;
            let url = fal.run_url("fal-ai/flux/dev").to_string();
            assert_eq!(stack.post(&store, &url, &[]).await.unwrap(), StatusCode::OK);
            store.reload().await.unwrap();
            assert_eq!(stack.post(&store, &url, &[]).await.unwrap(), StatusCode::OK);
            assert_eq!(seen(&fal), [(true, before.clone()), (false, after), (true, before)], "{stack:?}");
        }
    }
}
