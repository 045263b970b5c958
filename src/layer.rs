use tower_layer::Layer;

use crate::{
    auth::{FalAuth, FalAuthLayer},
    origin::FalOrigins,
    retry::{FalRetry, FalRetryLayer, Passthrough, Typed},
    store::CredentialStore,
};

/// [`FalRetryLayer`] around [`FalAuthLayer`]: the two layers in the only order that works.
///
/// ```
/// use std::time::Duration;
/// use tower_fal::origin::FalOrigins;
///
/// # let store = tower_fal::CredentialStore::fixed(tower_fal::Credential::key("id:secret")?);
/// let plain = tower_fal::layer(&store);
/// let tuned = tower_fal::layer(&store)
///     .auth(|auth| auth.origins(FalOrigins::new().backups()))
///     .retry(|retry| retry.reload_wait(Duration::from_secs(5)));
/// # let _ = (plain, tuned);
/// # Ok::<(), tower_fal::CredentialError>(())
/// ```
pub fn layer(store: &CredentialStore) -> FalLayer {
    FalLayer { retry: FalRetryLayer::new(store.clone()), auth: FalAuthLayer::new(store.clone()) }
}

/// [`FalRetryLayer`] around [`FalAuthLayer`], with the options of both within reach. Made by [`layer`].
///
/// The layers can be put together by hand as well: retry first, as the first layer of a `ServiceBuilder` is the
/// outermost. The other order compiles too, and returns `Ok(401)`: the outer layer stamps what the inner one should
/// have seen.
#[derive(Clone, Debug)]
#[must_use]
pub struct FalLayer<M = Typed, P = FalOrigins> {
    retry: FalRetryLayer<M>,
    auth: FalAuthLayer<P>,
}

impl FalLayer {
    /// For requests that bring their own credentials and must never be sent with another one: see
    /// [`FalAuthLayer::per_request`] and [`FalRetryLayer::per_request`].
    pub fn per_request() -> Self {
        Self { retry: FalRetryLayer::per_request(), auth: FalAuthLayer::per_request() }
    }
}

impl<M, P> FalLayer<M, P> {
    /// Sets options of the [`FalAuthLayer`].
    pub fn auth<Q>(self, set: impl FnOnce(FalAuthLayer<P>) -> FalAuthLayer<Q>) -> FalLayer<M, Q> {
        FalLayer { retry: self.retry, auth: set(self.auth) }
    }

    /// Sets options of the [`FalRetryLayer`].
    pub fn retry<N>(self, set: impl FnOnce(FalRetryLayer<M>) -> FalRetryLayer<N>) -> FalLayer<N, P> {
        FalLayer { retry: set(self.retry), auth: self.auth }
    }
}

#[cfg(any(feature = "proxy", feature = "reqwest-middleware"))]
impl<M, P> FalLayer<M, P> {
    pub(crate) fn into_layers(self) -> (FalRetryLayer<M>, FalAuthLayer<P>) {
        (self.retry, self.auth)
    }
}

impl<P> FalLayer<Typed, P> {
    /// Hands refusals on as responses: see [`FalRetryLayer::passthrough`].
    pub fn passthrough(self) -> FalLayer<Passthrough, P> {
        self.retry(FalRetryLayer::passthrough)
    }
}

impl<S, M, P: Clone> Layer<S> for FalLayer<M, P> {
    type Service = FalRetry<FalAuth<S, P>, M>;

    fn layer(&self, inner: S) -> Self::Service {
        self.retry.layer(self.auth.layer(inner))
    }
}
