use std::{fmt, marker::PhantomData, sync::Arc};

use async_trait::async_trait;
use http::{Extensions, Uri};
use reqwest::{Request, Response};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};

use super::service::{crossed_origin, same_origin, with_url};
#[cfg(feature = "transient")]
use crate::retry::{
    course::drain_and_wait,
    transient::{Ended, Repeat},
};
use crate::{
    auth::{Authorizer, FalAuthLayer, is_refusal},
    error::FalAuthError,
    layer::FalLayer,
    origin::{FalOrigins, OriginPolicy},
    retry::{
        FalRetryLayer, Mode, Rules, Typed,
        course::{Course, Judged, judge, stamp_of},
        judge::Verdict,
    },
    store::CredentialStore,
};

impl<M: Mode, P: OriginPolicy + Send + Sync + 'static> FalLayer<M, P> {
    /// The usual client: these two layers around the `reqwest::Client` that is built here, by the redirect policy
    /// [`same_origin`]. See the [module docs](super).
    ///
    /// # Errors
    /// Those of [`reqwest::ClientBuilder::build`].
    pub fn reqwest(self, client: reqwest::ClientBuilder) -> reqwest::Result<ClientWithMiddleware> {
        let client = client.redirect(same_origin()).build()?;
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
        if is_refusal(response.status()) && !crossed_origin(&asked, response.url()) {
            sent_with.stamp(response.extensions_mut());
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
    rules: Arc<Rules>,
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
        Self { rules: layer.rules(), mode: PhantomData }
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
        let rules = &self.rules;
        let mut course = Course::begin(rules);
        loop {
            let again = request.try_clone();
            course.write_to(extensions);
            let answered = next.clone().run(request, extensions).await;
            let response = match answered {
                Ok(response) => response,
                Err(error) => {
                    // A refusal that comes as an error, from such a middleware further in, is final.
                    #[cfg(feature = "transient")]
                    if FalAuthError::find(&error).is_none() {
                        let wait = course.wait(rules, repeat(again.as_ref(), extensions), &Ended::Failed(&error));
                        if let Some((wait, again)) = wait.zip(again) {
                            tokio::time::sleep(wait).await;
                            request = again;
                            continue;
                        }
                    }
                    return Err(error);
                }
            };
            let Some(stamp) = stamp_of(response.status(), response.extensions()) else {
                #[cfg(feature = "transient")]
                {
                    let (subject, status) = (repeat(again.as_ref(), extensions), response.status());
                    let wait = course.wait(rules, subject, &Ended::Answered(status, response.headers()));
                    if let Some((wait, again)) = wait.zip(again) {
                        drain_and_wait(reqwest::Body::from(response), rules.read_timeout, wait).await;
                        request = again;
                        continue;
                    }
                }
                course.ended(true);
                return Ok(response);
            };
            let refused = course.refused(stamp, again.is_some());
            // Boxed, as it is large and rare.
            let judging = Box::pin(judge::<_, M>(with_url(response), refused, Arc::clone(rules)));
            let Judged { response, verdict: Verdict { replay, refusal } } = judging.await;
            match replay.zip(again) {
                Some((with, again)) => {
                    course.replay(with);
                    request = again;
                }
                None => {
                    course.ended(false);
                    if !M::HANDS_ON {
                        return Err(Error::middleware(FalAuthError::from(refusal)));
                    }
                    let mut response = response.map(reqwest::Body::wrap);
                    response.extensions_mut().insert(refusal);
                    return Ok(response.into());
                }
            }
        }
    }
}

#[cfg(feature = "transient")]
fn repeat<'a>(again: Option<&'a Request>, extensions: &'a Extensions) -> Option<Repeat<'a>> {
    again.map(|request| Repeat { method: request.method(), path: request.url().path(), extensions })
}

impl<M> fmt::Debug for FalRetryMiddleware<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FalRetryMiddleware").field("rules", &self.rules).finish()
    }
}
