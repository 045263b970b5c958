//! A short name for a client that calls fal: for `State` and struct fields.
//!
//! ```
//! use axum::{extract::State, http::{Request, StatusCode}};
//! use bytes::Bytes;
//! use http_body_util::Full;
//! use tower_fal::{CredentialStore, FalAuthError, FalClient};
//!
//! #[derive(Clone)]
//! struct AppState {
//!     fal: FalClient, // and not `FalRetry<FalAuth<Client<HttpsConnector<…>, ReplayBody<Full<Bytes>>>>>`
//! }
//!
//! async fn draw(State(state): State<AppState>, input: Bytes) -> Result<StatusCode, FalAuthError> {
//!     let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::new(input)).unwrap_or_default();
//!     Ok(state.fal.request(request).await?.status())
//! }
//!
//! # fn app(store: &CredentialStore) -> Result<axum::Router, rustls::Error> {
//! let state = AppState { fal: FalClient::https(&tower_fal::layer(store))? };
//! let app = axum::Router::new().route("/draw", axum::routing::post(draw)).with_state(state);
//! # Ok(app)
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
pub type FalBody = UnsyncBoxBody<Bytes, FalBodyError>;

/// Why the body of a response ended early. The error of the service inside is in [`source()`](std::error::Error::source).
///
/// A type of its own, as a boxed error does not do everywhere: `http_body_util::Limited` around such a body could not be
/// awaited in an axum handler or in `tokio::spawn`.
#[derive(Debug, thiserror::Error)]
#[error("the body of the response from fal ended early")]
pub struct FalBodyError(#[source] BoxError);

/// A client that calls fal, behind one type: cheap to clone, `Send` and `Sync`, for any body `B`. See the
/// [module docs](self).
///
/// It costs a box for each request and for each response's body. Where that matters, name the concrete type: see
/// [`FalRetry`](crate::FalRetry).
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

    /// hyper-util's client over rustls, HTTP/1.1 and HTTP/2, `https` only, with this layer around it.
    ///
    /// The cryptography is that of ring, and no default provider has to be installed for the process. The roots are
    /// Mozilla's, compiled in from `webpki-roots`: they need no files, as in an image that holds nothing but a program,
    /// and less code than a look at the system's. The system's roots are not read, and no proxy of the environment is
    /// used; for these, and for another cryptography, take [`rustls`](Self::rustls) or [`over`](Self::over).
    ///
    /// ```
    /// # fn client(store: &tower_fal::CredentialStore) -> Result<(), rustls::Error> {
    /// let fal: tower_fal::FalClient = tower_fal::FalClient::https(&tower_fal::layer(store))?;
    /// # let _ = fal;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When rustls cannot be configured so, which does not happen with the versions that this crate names.
    #[cfg(feature = "client-rustls")]
    pub fn https<P>(layer: &FalLayer<Typed, P>) -> Result<Self, rustls::Error>
    where
        P: OriginPolicy + Clone + Send + Sync + 'static,
    {
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?;
        Ok(Self::over_tls(layer, connector))
    }

    /// As [`https`](Self::https), by a configuration of yours, and with it the choice of the cryptography and the roots.
    ///
    /// ```
    /// # fn client(
    /// #     store: &tower_fal::CredentialStore, roots: rustls::RootCertStore,
    /// # ) -> Result<tower_fal::FalClient, rustls::Error> {
    /// use std::sync::Arc;
    ///
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
        Self::over_tls(layer, hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config))
    }

    #[cfg(feature = "client-rustls")]
    fn over_tls<P>(
        layer: &FalLayer<Typed, P>,
        connector: hyper_rustls::HttpsConnectorBuilder<hyper_rustls::builderstates::WantsSchemes>,
    ) -> Self
    where
        P: OriginPolicy + Clone + Send + Sync + 'static,
    {
        let connector = connector.https_only().enable_http1().enable_http2().build();
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
        // Not `BodyExt::map_frame`, which loses the size hint.
        let boxed = service.map_response(|response: Response<R>| {
            response.map(|body| PeekedBody::whole(body).map_err(|error| FalBodyError(error.into())).boxed_unsync())
        });
        Self { inner: BoxCloneSyncService::new(boxed.map_err(FalAuthError::from_inner)) }
    }

    /// Sends a request. The client is ready for each at any time, and several can be under way.
    ///
    /// The same as `client.clone().oneshot(request)`, without an import.
    ///
    /// # Errors
    /// See [`FalAuthError`].
    pub fn request(
        &self,
        request: Request<B>,
    ) -> impl Future<Output = Result<Response<FalBody>, FalAuthError>> + Send + use<B> {
        self.clone().oneshot(request)
    }
}

// Derived, it would ask for bodies that are `Clone`.
impl<B> Clone for FalClient<B> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
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

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, error::Error as _, io, sync::Arc};

    use axum::{Router, body::Body as AxumBody, extract::State, routing};
    use http::{StatusCode, Uri};
    use http_body_util::{Limited, StreamBody};
    use tower::service_fn;

    use super::*;
    use crate::{
        credential::Credential,
        error::{foreign::causes, report},
        layer::layer,
        origin::FalOrigins,
        store::CredentialStore,
    };

    /// Answers with the body that it is sent.
    fn echo() -> FalClient<AxumBody> {
        FalClient::over(service_fn(async |request: Request<AxumBody>| {
            Ok::<_, Infallible>(Response::new(request.into_body()))
        }))
    }

    async fn limited(State(fal): State<FalClient<AxumBody>>) -> Result<AxumBody, StatusCode> {
        let response = fal.request(Request::new("four".into())).await.map_err(|_| StatusCode::BAD_GATEWAY)?;
        let body = Limited::new(response.into_body(), 3).collect().await;
        body.map(|body| body.to_bytes().into()).map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)
    }

    #[tokio::test]
    async fn any_body_fits_into_a_state_and_a_limit_around_the_answers() {
        // That it compiles is half of the test: a body that is not `Clone`, and `Limited` in a handler and in a task.
        let app = Router::new().route("/", routing::get(limited)).with_state(echo());
        let response = app.oneshot(Request::new(AxumBody::empty())).await.unwrap();
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert!(tokio::spawn(limited(State(echo()))).await.unwrap().is_err());
    }

    #[tokio::test]
    async fn requests_share_a_client_and_outlive_it() {
        let fal = echo();
        let sent = ["a", "b"].map(|body| tokio::spawn(fal.request(Request::new(body.into()))));
        drop(fal);
        for (sent, body) in sent.into_iter().zip(["a", "b"]) {
            let answer = sent.await.unwrap().unwrap().into_body().collect().await.unwrap();
            assert_eq!(answer.to_bytes(), body);
        }
    }

    #[tokio::test]
    async fn an_answer_keeps_its_length() {
        let answer = echo().request(Request::new("four".into())).await.unwrap();
        assert_eq!(answer.body().size_hint().exact(), Some(4));
    }

    #[tokio::test]
    async fn an_answer_that_ends_early_says_why() {
        let frames = [Err::<http_body::Frame<Bytes>, _>(io::Error::other("reset"))];
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let broken = FalClient::over(service_fn(async |request: Request<_>| {
            Ok::<_, Infallible>(Response::new(request.into_body()))
        }));
        let answer = broken.request(Request::new(body)).await.unwrap();
        let error: FalBodyError = answer.into_body().collect().await.unwrap_err();
        assert_eq!(report(&error), "the body of the response from fal ended early: reset");
        assert!(error.source().unwrap().is::<io::Error>());
    }

    #[cfg(feature = "client-rustls")]
    #[tokio::test]
    async fn https_needs_no_setup_and_trusts_no_unknown_issuer() {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], signing_key.serialize_der().try_into().unwrap())
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let accepting = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(socket).await.map(drop)
        });

        let store = CredentialStore::fixed(Credential::key("id:secret").unwrap());
        let origins = FalOrigins::only([]).unwrap().and(&origin).unwrap().loopback_http();
        let fal: FalClient = FalClient::https(&layer(&store).auth(|auth| auth.origins(origins))).unwrap();
        let get = |uri: Uri| fal.request(Request::get(uri).body(Full::default()).unwrap());
        let error = get(origin.parse().unwrap()).await.unwrap_err();
        let unknown = |error: &rustls::Error| {
            *error == rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)
        };
        assert!(causes(&error).any(|error| error.downcast_ref().is_some_and(unknown)), "{}", report(&error));
        assert!(accepting.await.unwrap().unwrap_err().to_string().contains("alert"), "it spoke TLS");

        let plain = get(Uri::from_static("http://127.0.0.1:1/")).await.unwrap_err();
        assert!(report(&plain).contains("scheme"), "{}", report(&plain));
    }
}
