use std::{fmt, marker::PhantomData, ops::ControlFlow, sync::Arc};

use async_trait::async_trait;
use http::{Extensions, Uri};
use reqwest::{Request, Response, Url, redirect};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};

use super::service::{crossed_origin, with_url};
use crate::{
    application::Application,
    auth::{Authorizer, FalAuthLayer, Stamp, is_refusal},
    error::{FalAuthError, Refusal, foreign::Findable},
    layer::FalLayer,
    origin::{FalOrigins, OriginPolicy},
    retry::{Attempts, Ended, FalRetryLayer, Mode, Next as After, PeekedBody, Sent, Typed, policy::Policy},
    store::CredentialStore,
};

impl<M: Mode, P: OriginPolicy + Send + Sync + 'static> FalLayer<M, P> {
    /// The usual client: these two layers around the `reqwest::Client` that is built here, and follows no redirect.
    /// See the [module docs](super).
    ///
    /// # Errors
    /// Those of [`reqwest::ClientBuilder::build`].
    pub fn reqwest(self, client: reqwest::ClientBuilder) -> reqwest::Result<ClientWithMiddleware> {
        let client = client.redirect(redirect::Policy::none()).build()?;
        let (retry, auth) = self.into_layers();
        Ok(ClientBuilder::new(client).with(FalRetryMiddleware::from(retry)).with(FalAuthMiddleware::from(auth)).build())
    }
}

/// [`FalAuth`](crate::FalAuth) as a middleware of `reqwest-middleware`: the current credential on every request that
/// may carry it. See the [module docs](super) for the order, inside [`FalRetryMiddleware`], and for the redirect policy
/// that the client must have.
///
/// Its options are those of [`FalAuthLayer`], which it is made from.
pub struct FalAuthMiddleware<P = FalOrigins> {
    authorizer: Authorizer<P>,
}

impl FalAuthMiddleware {
    /// The store's current credential, to [fal's own origins](FalOrigins).
    #[must_use]
    pub fn new(store: CredentialStore) -> Self {
        FalAuthLayer::new(store).into()
    }
}

impl<P> From<FalAuthLayer<P>> for FalAuthMiddleware<P> {
    fn from(layer: FalAuthLayer<P>) -> Self {
        Self { authorizer: layer.into_authorizer() }
    }
}

#[async_trait]
impl<P: OriginPolicy + Send + Sync + 'static> Middleware for FalAuthMiddleware<P> {
    async fn handle(
        &self,
        mut request: Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<Response, Error> {
        // As reqwest itself makes it, and refuses to send what cannot be made one.
        let Ok(asked) = Uri::try_from(request.url().as_str()) else {
            return next.run(request, extensions).await;
        };
        let sent_with = self.authorizer.choose(request.method(), &asked, request.headers(), extensions);
        let Some(sent_with) = sent_with else {
            return next.run(request, extensions).await;
        };
        sent_with.put_into(request.headers_mut());
        let mut response = next.run(request, extensions).await?;
        if !crossed_origin(&asked, response.url()) {
            sent_with.observe(response.status(), response.headers(), response.extensions());
            if is_refusal(response.status()) {
                sent_with.stamp(response.extensions_mut());
            }
        }
        Ok(response)
    }
}

impl<P> fmt::Debug for FalAuthMiddleware<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalAuthMiddleware").field("authorizer", &self.authorizer).finish()
    }
}

/// [`FalRetry`](crate::FalRetry) as a middleware of `reqwest-middleware`: reload and replay on a 401, and a
/// [`FalAuthError`] for what remains, which [`FalAuthError::find`] finds. See the [module docs](super) for the order:
/// around [`FalAuthMiddleware`].
///
/// Its options are those of [`FalRetryLayer`], which it is made from; of a
/// [passthrough](FalRetryLayer::passthrough) layer the refusal comes as a response.
pub struct FalRetryMiddleware<M = Typed> {
    policy: Arc<Policy>,
    mode: PhantomData<fn() -> M>,
}

impl FalRetryMiddleware {
    /// Reloads this store when fal refuses its credential: the store of the [`FalAuthMiddleware`] inside.
    #[must_use]
    pub fn new(store: CredentialStore) -> Self {
        FalRetryLayer::new(store).into()
    }
}

impl<M> From<FalRetryLayer<M>> for FalRetryMiddleware<M> {
    fn from(layer: FalRetryLayer<M>) -> Self {
        Self { policy: layer.arm(), mode: PhantomData }
    }
}

#[async_trait]
impl<M: Mode> Middleware for FalRetryMiddleware<M> {
    async fn handle(
        &self,
        mut request: Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<Response, Error> {
        if self.policy.misses_credential(extensions) {
            return Err(Error::middleware(Findable(FalAuthError::NoCredential)));
        }
        let policy = Arc::clone(&self.policy);
        let application = || application_at(request.url());
        let mut attempts = Attempts::new(policy, extensions, application, || request.try_clone().is_some());
        loop {
            let copy = request.try_clone();
            attempts.prepare(extensions);
            let result = next.clone().run(request, extensions).await;
            let sent = || copy.as_ref().map(|copy| sent(copy, extensions));
            let follows = attempts.ended(ended(&result), sent, || origin_of(&result));
            request = match (follows, result, copy) {
                (After::BackOff(wait), result, Some(copy)) => {
                    Arc::clone(&self.policy).back_off(result.ok().map(reqwest::Body::from), wait).await;
                    copy
                }
                (After::Examine(stamp), Ok(response), copy) => {
                    // Boxed, as it is large and rare.
                    match Box::pin(examine::<M>(&mut attempts, response, stamp, copy)).await {
                        ControlFlow::Continue(copy) => copy,
                        ControlFlow::Break(end) => return end,
                    }
                }
                (After::Refused(refusal), Ok(response), _) => {
                    return refused::<M>(refusal, with_url(response).map(PeekedBody::whole));
                }
                (_, result, _) => return result,
            };
        }
    }
}

/// Looks at a refusal. Continues with the request for the next attempt, or breaks with the end.
async fn examine<M: Mode>(
    attempts: &mut Attempts,
    response: Response,
    stamp: Stamp,
    copy: Option<Request>,
) -> ControlFlow<Result<Response, Error>, Request> {
    let replayable = copy.is_some();
    let application = application_at(response.url());
    let examined = attempts.examine::<_, M>(application, with_url(response), stamp, replayable).await;
    match examined.replay.zip(copy) {
        Some((with, copy)) => {
            attempts.replay(with, examined.tried);
            ControlFlow::Continue(copy)
        }
        None => {
            let refusal = attempts.refused(examined.parts, replayable);
            ControlFlow::Break(refused::<M>(refusal, examined.response))
        }
    }
}

fn ended(result: &Result<Response, Error>) -> Ended<'_> {
    match result {
        Ok(response) => Ended::Answered {
            status: response.status(),
            headers: response.headers(),
            extensions: response.extensions(),
        },
        Err(error) => Ended::Failed(error),
    }
}

fn origin_of(result: &Result<Response, Error>) -> String {
    result.as_ref().map_or_else(|_| String::new(), |response| response.url().origin().ascii_serialization())
}

fn application_at(url: &Url) -> Application {
    Application::at(url.host_str(), url.path())
}

fn sent<'a>(request: &'a Request, extensions: &'a Extensions) -> Sent<'a> {
    Sent { method: request.method(), path: request.url().path(), extensions }
}

fn refused<M: Mode>(refusal: Refusal, response: http::Response<PeekedBody<reqwest::Body>>) -> Result<Response, Error> {
    if !M::RETURNS_RESPONSE {
        return Err(Error::middleware(Findable(FalAuthError::from(refusal))));
    }
    let mut response = response.map(reqwest::Body::wrap);
    response.extensions_mut().insert(refusal);
    Ok(response.into())
}

impl<M> fmt::Debug for FalRetryMiddleware<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalRetryMiddleware").field("policy", &self.policy).finish()
    }
}
