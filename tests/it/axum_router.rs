//! An axum router that forwards with a `FalClient`, and a layer of tower-http's around it.

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use futures_util::stream;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::Layer as _;
use tower_fal::{CredentialStore, FalAuthError, FalClient, mock::MockFal, origin::FalOrigins};
use tower_http::limit::RequestBodyLimitLayer;

use crate::{
    app::{Answer, Served},
    support::key,
};

async fn forward(
    State((fal, to)): State<(FalClient<Body>, MockFal)>,
    request: Request,
) -> Result<Response, FalAuthError> {
    let request = Request::post(to.run_url(request.uri().path())).body(request.into_body()).unwrap();
    Ok(fal.request(request).await?.map(Body::new))
}

/// Nobody has stated its length, so the limit is found out when a part of it is on its way.
#[tokio::test]
async fn a_body_over_a_limit_around_the_router_is_a_413() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let layer =
        tower_fal::layer(&CredentialStore::fixed(key(1))).auth(|auth| auth.origins(FalOrigins::new().loopback_http()));
    let client = FalClient::over(layer.layer(Client::builder(TokioExecutor::new()).build_http()));
    let router = Router::new().fallback(forward).with_state((client, fal.clone()));
    let server = Served::new(router.layer(RequestBodyLimitLayer::new(1000))).await;

    let client = Client::builder(TokioExecutor::new()).build_http();
    let post = async |length| {
        let body = Body::from_stream(stream::iter([Ok::<_, std::io::Error>(vec![b' '; length])]));
        let request = Request::post(format!("{}/fal-ai/flux", server.url)).body(body).unwrap();
        Answer::of(client.request(request).await.unwrap()).await
    };
    assert_eq!(post(1001).await.problem(), (413, "body_too_long".to_owned()));
    assert_eq!(fal.runs(), 0);
    assert_eq!(post(1000).await.status, 200);
}
