//! Clients over HTTP/1.1, and the time that their requests take.

use std::{sync::mpsc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Extensions, Request, Response, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client as Hyper, connect::HttpConnector},
    rt::TokioExecutor,
};
use reqwest::ResponseBuilderExt as _;
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware, Next};
use tokio::time::sleep;
use tower::{Layer as _, service_fn};
use tower_fal::{
    CredentialStore, FalAuthLayer, FalClient, FalRetryLayer,
    error::{BoxError, report},
    origin::FalOrigins,
    reqwest::{FalAuthMiddleware, FalRetryMiddleware},
    retry::ReplayBody,
};

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    HyperUtil,
    Reqwest,
}

/// How time passes while a request is at fal.
#[derive(Clone, Copy, Debug)]
pub(super) enum Network {
    /// Time is paused, and stands still then: what a test measures does not depend on the machine.
    Paused,
    Real,
}

#[derive(Clone)]
pub(super) enum Client {
    HyperUtil(FalClient),
    Reqwest(ClientWithMiddleware),
}

impl Client {
    pub(super) fn new(kind: Kind, network: Network, store: &CredentialStore) -> Self {
        let origins = FalOrigins::new().loopback_http();
        match kind {
            Kind::HyperUtil => {
                let hyper = Hyper::builder(TokioExecutor::new()).build(HttpConnector::new());
                let service = service_fn(move |request: Request<ReplayBody<Full<Bytes>>>| {
                    let hyper = hyper.clone();
                    network.exchange(async move {
                        let (head, body) = hyper.request(request).await?.into_parts();
                        Ok::<_, BoxError>(Response::from_parts(head, Full::new(body.collect().await?.to_bytes())))
                    })
                });
                Self::HyperUtil(FalClient::over(
                    tower_fal::layer(store).auth(|auth| auth.origins(origins)).layer(service),
                ))
            }
            Kind::Reqwest => {
                let auth = FalAuthLayer::new(store.clone()).origins(origins);
                let client = ClientBuilder::new(crate::reqwest_client::client())
                    .with(FalRetryMiddleware::from(FalRetryLayer::new(store.clone())))
                    .with(FalAuthMiddleware::from(auth))
                    .with(network)
                    .build();
                Self::Reqwest(client)
            }
        }
    }

    /// Returns what went wrong, unless it was a run.
    pub(super) async fn post(&self, url: Uri) -> Result<(), String> {
        let status = match self {
            Self::HyperUtil(client) => {
                let request = Request::post(url).body(Full::new(Bytes::from_static(b"{}"))).unwrap();
                client.request(request).await.map_err(|error| report(&error).to_string())?.status()
            }
            Self::Reqwest(client) => {
                let request = client.post(url.to_string()).body("{}");
                request.send().await.map_err(|error| report(&error).to_string())?.status()
            }
        };
        if status.is_success() { Ok(()) } else { Err(status.to_string()) }
    }
}

impl Network {
    /// A request is under way to fal and back for a moment. The time at fal itself is that of the machine, or none.
    async fn exchange<T>(self, exchange: impl Future<Output = T>) -> T {
        let way = || Duration::from_millis(fastrand::u64(1..=10));
        sleep(way()).await;
        let hold = match self {
            Self::Paused => Some(Hold::new()),
            Self::Real => None,
        };
        let answer = exchange.await;
        drop(hold);
        sleep(way()).await;
        answer
    }
}

#[async_trait]
impl Middleware for Network {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.exchange(async {
            let response = next.run(request, extensions).await?;
            let mut read = Response::builder().status(response.status()).url(response.url().clone());
            *read.headers_mut().unwrap() = response.headers().clone();
            Ok(read.body(response.bytes().await?).unwrap().into())
        })
        .await
    }
}

/// Paused time stands still while there is one, as it does not pass during a blocking task.
struct Hold(#[allow(dead_code)] mpsc::Sender<()>); // it is only dropped

impl Hold {
    fn new() -> Self {
        let (end, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || ended.recv());
        Self(end)
    }
}
