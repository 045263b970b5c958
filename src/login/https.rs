//! The client that is used if the user brings none: rustls with ring, the roots of this system, and its proxies.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::{
        legacy::{
            Client,
            connect::{HttpConnector, proxy::Tunnel},
        },
        proxy::matcher::Matcher,
    },
    rt::{TokioExecutor, TokioIo},
};
use tokio::{net::TcpStream, sync::OnceCell};
use tower_service::Service;

use crate::error::BoxError;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;
type BoxFuture<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// The client. Nothing is read before the first request, so that a program which has a key needs no roots.
#[derive(Clone, Default)]
pub(super) struct Https {
    client: Arc<OnceCell<Client<HttpsConnector<ByProxy>, Full<Bytes>>>>,
}

impl Service<Request<Full<Bytes>>> for Https {
    type Response = Answer;
    type Error = BoxError;
    type Future = BoxFuture<Answer>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        let client = Arc::clone(&self.client);
        Box::pin(async move {
            let client = client
                .get_or_try_init(async || {
                    tokio::task::spawn_blocking(client_of_this_system).await.map_err(BoxError::from)?
                })
                .await?;
            let answer = client.request(request).await?;
            Ok(answer.map(|body| body.map_err(BoxError::from).boxed_unsync()))
        })
    }
}

/// This blocks.
fn client_of_this_system() -> Result<Client<HttpsConnector<ByProxy>, Full<Bytes>>, BoxError> {
    let mut direct = HttpConnector::new();
    direct.enforce_http(false);
    direct.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .map_err(|error| {
            format!("this system has no root certificates: install ca-certificates, or set SSL_CERT_FILE ({error})")
        })?
        .https_or_http()
        .enable_http1()
        .wrap_connector(ByProxy { direct, proxies: Arc::new(Matcher::from_env()) });
    Ok(Client::builder(TokioExecutor::new())
        // A connection that was kept may close while a refresh token is on it, and nobody could tell whether it is spent.
        .pool_max_idle_per_host(0)
        .retry_canceled_requests(false)
        .build(connector))
}

/// Connects through the proxy that `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` ask for, if there is one.
#[derive(Clone)]
struct ByProxy {
    direct: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Service<Uri> for ByProxy {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = BoxFuture<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.direct.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let mut direct = self.direct.clone();
        // `http` is for this machine only, and a proxy would read it.
        let proxy = self.proxies.intercept(&to).filter(|_| to.scheme_str() == Some("https"));
        Box::pin(async move {
            let Some(proxy) = proxy else { return Ok(direct.call(to).await?) };
            if proxy.uri().scheme_str() != Some("http") {
                return Err("the proxy must be named by an http:// URL: see HTTPS_PROXY and ALL_PROXY".into());
            }
            let mut tunnel = Tunnel::new(proxy.uri().clone(), direct);
            if let Some(auth) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(auth.clone());
            }
            tunnel.call(to).await.map_err(|error| ProxyFailed(error.into()).into())
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the proxy that HTTPS_PROXY or ALL_PROXY names did not connect")]
struct ProxyFailed(#[source] BoxError);
