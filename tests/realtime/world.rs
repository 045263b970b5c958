//! A fal, a store with its key, and a minter between them.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::Full;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio_tungstenite::{connect_async, tungstenite::Message};
use tower::Layer as _;
use tower_fal::{
    CredentialStore,
    mock::{MockFal, Received},
    origin::FalOrigins,
    realtime::{TokenMinter, TokenMinterBuilder},
    retry::ReplayBody,
};

use crate::support::{self, key};

/// How long a test waits for what must happen, by the clock on the wall.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const APP: &str = "acme/cats/realtime";

pub(crate) type World = support::World<MockFal>;

/// A fal that takes key 1, which the store has.
pub(crate) async fn world() -> World {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.keep_content(true);
    World::around(fal).await
}

pub(crate) fn client() -> Client<HttpConnector, ReplayBody<Full<Bytes>>> {
    Client::builder(TokioExecutor::new()).build_http()
}

/// A minter for `acme/*`, through the layers, to this URL.
pub(crate) fn minter_at(url: &str, store: &CredentialStore) -> TokenMinterBuilder {
    let origins = FalOrigins::only([]).unwrap().and(url).unwrap();
    let layer = tower_fal::layer(store).auth(|auth| auth.origins(origins));
    TokenMinter::builder(layer.layer(client())).rest_url(url).allow_app("acme/*")
}

pub(crate) trait Mints {
    fn minter(&self) -> TokenMinterBuilder;
    fn calls(&self) -> Vec<Received>;
}

impl Mints for World {
    fn minter(&self) -> TokenMinterBuilder {
        minter_at(&self.fal.rest_origin(), &self.store)
    }

    /// The calls that mint, of those that have arrived so far.
    fn calls(&self) -> Vec<Received> {
        self.fal.received().into_iter().filter(|call| call.path.starts_with("/tokens/")).collect()
    }
}

/// What a mint's call has asked for.
pub(crate) fn asked(call: &Received) -> Value {
    serde_json::from_slice(call.body.as_ref().unwrap()).unwrap()
}

/// Whether the application answers on a socket that is opened with the token.
pub(crate) async fn opens(fal: &MockFal, app: &str, token: &str) -> bool {
    let url = fal.realtime_url(&format!("{app}?fal_jwt_token={token}"));
    let (mut socket, _) = connect_async(url).await.unwrap();
    // After a refusal there may be nobody left who reads it.
    let _ = socket.send(Message::text(r#"{"prompt":"a cat"}"#)).await;
    let answer = tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    let answer: Value = serde_json::from_str(answer.to_text().unwrap()).unwrap();
    assert!(answer["prompt"] == "a cat" || answer["error"] == "Unauthorized", "{answer}");
    answer["prompt"] == "a cat"
}

/// Lets so much time pass at once, for everything that counts it by Tokio's clock.
pub(crate) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}
