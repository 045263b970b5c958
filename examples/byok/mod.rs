//! A client that sends no request without a key of the request's own.

use std::{error::Error, fmt};

use axum::{
    body::{Bytes, HttpBody},
    http::{Request, Response},
};
use http_body_util::Full;
use tower::{Service, ServiceBuilder, filter::FilterLayer};
use tower_fal::{Credential, FalClient, FalLayer, error::BoxError, origin::OriginPolicy, retry::ReplayBody};

/// `http` with [`FalLayer::per_request`] around it, which adds no other key than that of the request. A request that has
/// lost its key ends here, before it is sent: fal would refuse it, and the refusal would look like a tenant's.
pub(crate) fn client<S, P, R>(http: S, origins: P) -> FalClient
where
    S: Service<Request<ReplayBody<Full<Bytes>>>, Response = Response<R>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    P: OriginPolicy + Clone + Send + Sync + 'static,
    R: HttpBody + Send + Unpin + 'static,
    R::Data: Send,
    R::Error: Into<BoxError> + Send,
{
    let with_key = |request: Request<Full<Bytes>>| {
        if request.extensions().get::<Credential>().is_some() { Ok(request) } else { Err(KeyLost) }
    };
    FalClient::over(
        ServiceBuilder::new()
            .layer(FilterLayer::new(with_key))
            .layer(FalLayer::per_request().auth(|auth| auth.origins(origins)))
            .service(http),
    )
}

/// A request came without a key: something on its way dropped its extensions.
#[derive(Debug)]
pub(crate) struct KeyLost;

impl fmt::Display for KeyLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request has lost its key on the way, so it was not sent")
    }
}

impl Error for KeyLost {}
