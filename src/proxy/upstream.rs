//! The proxy's own client.

use std::time::Duration;

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tower_service::Service;

use super::{FalProxy, UploadBody};
use crate::{error::BoxError, retry::ReplayBody, store::CredentialStore};

/// How long it may take to connect to fal. Nothing was sent then, so that the client may try again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

// For no client in particular, as it makes its own.
impl FalProxy<()> {
    /// The proxy with a client of its own, over rustls as [`FalClient::https`](crate::FalClient::https) has it, for the
    /// bodies of axum. Its requests carry the store's current credential.
    ///
    /// ```
    /// # fn router(store: &tower_fal::CredentialStore) -> Result<axum::Router, rustls::Error> {
    /// use tower_fal::proxy::FalProxy;
    ///
    /// let router = FalProxy::new(store)?.allow_anonymous().into_router();
    /// # Ok(router) }
    /// ```
    ///
    /// # Errors
    /// When rustls cannot be configured so, which does not happen with the versions that this crate names.
    #[allow(clippy::new_ret_no_self)] // it is `FalProxy` over a client
    pub fn new(
        store: &CredentialStore,
    ) -> Result<
        FalProxy<
            impl Service<
                Request<ReplayBody<UploadBody<AxumBody>>>,
                Response = Response<impl Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + use<>>,
                Error: Into<BoxError>,
                Future: Send,
            > + Clone
            + Send
            + Sync
            + use<>,
        >,
        rustls::Error,
    > {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
            .https_only()
            .enable_http1()
            .enable_http2()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https);
        Ok(FalProxy::over(store, client))
    }
}
