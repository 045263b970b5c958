//! A short name for a client that calls fal: for `State` and struct fields.
//!
//! ```
//! use bytes::Bytes;
//! use http_body_util::Full;
//! use tower_fal::{CredentialStore, FalClient};
//!
//! #[derive(Clone)]
//! struct AppState {
//!     fal: FalClient, // and not `FalRetry<FalAuth<Client<HttpsConnector<…>, ReplayBody<Full<Bytes>>>>>`
//! }
//!
//! # fn state(store: &CredentialStore, config: rustls::ClientConfig) -> AppState {
//! AppState { fal: FalClient::rustls(&tower_fal::layer(store), config) }
//! # }
//! ```

use std::{
    fmt,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tower::util::{BoxCloneSyncService, ServiceExt as _};
use tower_layer::Layer as _;
use tower_service::Service;

use crate::{
    error::{BoxError, FalAuthError},
    layer::FalLayer,
    origin::OriginPolicy,
    retry::{PeekedBody, ReplayBody, Typed},
};

/// The body of a [`FalClient`]'s response, whichever service is inside.
pub type FalBody = UnsyncBoxBody<Bytes, BoxError>;

/// A client that calls fal, behind one type: cheap to clone, `Send` and `Sync`. See the [module docs](self).
///
/// It costs a box for each request and for each response's body. Where that matters, name the concrete type: see
/// [`FalRetry`](crate::FalRetry).
#[derive(Clone)]
pub struct FalClient<B = Full<Bytes>> {
    inner: BoxCloneSyncService<Request<B>, Response<FalBody>, FalAuthError>,
}

impl<B> FalClient<B>
where
    B: Body + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    /// hyper-util's client without TLS, with this layer around it: for tests, or in front of something that encrypts.
    /// The default policy admits no origin that it can reach, so the layer names one:
    ///
    /// ```
    /// use tower_fal::{FalClient, origin::FalOrigins};
    ///
    /// # fn client(store: &tower_fal::CredentialStore) -> FalClient {
    /// FalClient::plain(&tower_fal::layer(store).auth(|auth| auth.origins(FalOrigins::new().loopback_http())))
    /// # }
    /// ```
    #[must_use]
    pub fn plain<P>(layer: &FalLayer<Typed, P>) -> Self
    where
        P: OriginPolicy + Clone + Send + Sync + 'static,
    {
        let client = Client::builder(TokioExecutor::new()).build::<_, ReplayBody<B>>(HttpConnector::new());
        Self::over(layer.layer(client))
    }

    /// hyper-util's client over rustls, HTTP/1.1 and HTTP/2, `https` only, with this layer around it. The configuration
    /// is yours, and with it the choice of the cryptography and of the roots.
    ///
    /// ```
    /// # fn client(store: &tower_fal::CredentialStore) -> Result<tower_fal::FalClient, rustls::Error> {
    /// use std::sync::Arc;
    ///
    /// let roots = rustls::RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    /// let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
    ///     .with_safe_default_protocol_versions()?
    ///     .with_root_certificates(roots)
    ///     .with_no_client_auth();
    /// Ok(tower_fal::FalClient::rustls(&tower_fal::layer(store), config))
    /// # }
    /// ```
    #[cfg(feature = "client-rustls")]
    #[must_use]
    pub fn rustls<P>(layer: &FalLayer<Typed, P>, config: rustls::ClientConfig) -> Self
    where
        P: OriginPolicy + Clone + Send + Sync + 'static,
    {
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_only()
            .enable_http1()
            .enable_http2()
            .build();
        let client = Client::builder(TokioExecutor::new()).build::<_, ReplayBody<B>>(connector);
        Self::over(layer.layer(client))
    }
}

impl<B: Send + 'static> FalClient<B> {
    /// Any service that has [`layer`](crate::layer) in it already, with whatever is around that: a timeout, a buffer. A
    /// [`FalAuthError`] in its errors is found and passed on; any other is [`Transport`](FalAuthError::Transport).
    pub fn over<S, R>(service: S) -> Self
    where
        S: Service<Request<B>, Response = Response<R>> + Clone + Send + Sync + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        R: Body + Send + 'static,
        R::Error: Into<BoxError> + Send,
    {
        let boxed = service.map_response(|response: Response<R>| {
            response.map(|body| PeekedBody::whole(body).map_err(Into::into).boxed_unsync())
        });
        Self { inner: BoxCloneSyncService::new(boxed.map_err(FalAuthError::from_inner)) }
    }
}

impl<B> Service<Request<B>> for FalClient<B> {
    type Response = Response<FalBody>;
    type Error = FalAuthError;
    type Future = <BoxCloneSyncService<Request<B>, Response<FalBody>, FalAuthError> as Service<Request<B>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.inner.call(request)
    }
}

impl<B> fmt::Debug for FalClient<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalClient").finish_non_exhaustive()
    }
}
