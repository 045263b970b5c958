//! What `MockFal` shows of the layers: the sentences of docs/testing.md.

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalAuth, FalAuthError, FalRetry,
    error::Reason,
    mock::{Failure, MockFal, Presented},
    origin::FalOrigins,
    retry::ReplayBody,
};

use crate::support::{Says, Script, key};

type FalHttp = FalRetry<FalAuth<Client<HttpConnector, ReplayBody<Full<Bytes>>>, FalOrigins>>;

fn client(store: &CredentialStore, origins: FalOrigins) -> FalHttp {
    ServiceBuilder::new()
        .layer(tower_fal::layer(store).auth(|auth| auth.origins(origins)))
        .service(Client::builder(TokioExecutor::new()).build_http())
}

fn request(method: Method, uri: Uri) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri(uri).body(Full::from("{}")).unwrap()
}

/// A newer key is there, and the request is not replayed with it.
#[tokio::test]
async fn an_applications_own_401_or_403_is_billed_once() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.accept(&key(2));
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        let script = Script::new(None, Says::Here(key(1)));
        let store = CredentialStore::builder(script.clone()).build().await.unwrap();
        let client = client(&store, FalOrigins::new().loopback_http());
        script.brings(2);
        let runs = fal.runs();
        fal.fail_next(1, Failure::Application(status));
        let error = client.oneshot(request(Method::POST, fal.run_url("a/b"))).await.unwrap_err();
        let (FalAuthError::Unauthorized(refusal) | FalAuthError::Forbidden(refusal)) = error else {
            panic!("{error:?}");
        };
        assert_eq!(refusal.reason(), Reason::Application);
        assert_eq!(fal.runs() - runs, 1, "{status}");
    }
}

#[tokio::test]
async fn a_refusal_by_fal_is_replayed_and_billed_once() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(2));
    let script = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(script.clone()).build().await.unwrap();
    script.brings(2);
    let client = client(&store, FalOrigins::new().loopback_http());
    let response = client.oneshot(request(Method::POST, fal.run_url("a/b"))).await.unwrap();
    assert_eq!((response.status(), fal.requests(), fal.runs()), (StatusCode::OK, 2, 1));
}

#[tokio::test]
async fn an_upload_elsewhere_than_the_rest_origin_has_no_key() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let client = client(&CredentialStore::fixed(key(1)), FalOrigins::new().and(&fal.rest_origin()).unwrap());
    let initiate = fal.rest_url("/storage/upload/initiate?storage_type=fal-cdn-v3");
    let response = client.clone().oneshot(request(Method::POST, initiate)).await.unwrap();
    let urls: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let upload = urls["upload_url"].as_str().unwrap().parse().unwrap();
    assert_eq!(client.oneshot(request(Method::PUT, upload)).await.unwrap().status(), StatusCode::OK);

    let presented: Vec<_> = fal.received().into_iter().map(|received| received.presented).collect();
    assert_eq!(presented, [Presented::Accepted(key(1).key_id().cloned()), Presented::Nothing]);
}
