use axum::{Router, body::Body as AxumBody};
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{FalProxy, UploadBody};
use crate::{error::BoxError, retry::ReplayBody};

impl<S> FalProxy<S> {
    /// The proxy as a router with one route, at the [`path`](Self::path), with and without a slash at its end. It can be
    /// merged into another router, or nested.
    ///
    /// The layers that are put around it see its requests and answers. [`docs::proxy`](crate::docs::proxy) tells which of
    /// them break a stream.
    pub fn into_router<R>(self) -> Router
    where
        S: Service<Request<ReplayBody<UploadBody<AxumBody>>>, Response = Response<R>>,
        S: Clone + Send + Sync + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send,
        R: Body<Data: Send> + Send + 'static,
        R::Error: Into<BoxError> + Send,
    {
        let path = self.path.trim_end_matches('/').to_owned();
        let router = Router::new().route_service(&format!("{path}/"), self.clone());
        if path.is_empty() { router } else { router.route_service(&path, self) }
    }
}
