//! The plugin for `reqwest-middleware`: the behaviour of [`layer`](crate::layer) for a `reqwest::Client`.
//!
//! ```no_run
//! use serde_json::json;
//! use tower_fal::{CredentialStore, FalAuthError, source::FileSource};
//!
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = CredentialStore::builder(FileSource::new("/run/secrets/fal/key")).build().await?;
//! let fal = tower_fal::layer(&store).reqwest(reqwest::Client::builder())?;
//!
//! let request = fal.post("https://fal.run/fal-ai/flux/dev").json(&json!({"prompt": "a lighthouse"}));
//! match request.send().await {
//!     Ok(response) => println!("{}", response.text().await?),
//!     Err(error) => match FalAuthError::find(&error) {
//!         Some(FalAuthError::Forbidden(refusal)) => println!("locked, or not permitted: {refusal}"),
//!         Some(refused) => println!("look at the key: {refused}"),
//!         None => println!("no answer: {error}"),
//!     },
//! }
//! # Ok(()) }
//! ```
//!
//! **Order:** [`FalRetryMiddleware`] goes before [`FalAuthMiddleware`], which is last: what comes later is further in,
//! and the second attempt has to get the new credential. [`FalLayer::reqwest`] puts them so. Where there are others:
//!
//! ```
//! # use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware};
//! use std::time::Duration;
//! use tower_fal::{FalRetryLayer, reqwest_plugin::{FalAuthMiddleware, FalRetryMiddleware}, reqwest_service::same_origin};
//!
//! # fn client(store: tower_fal::CredentialStore, tracing: impl Middleware) -> reqwest::Result<ClientWithMiddleware> {
//! let client = reqwest::Client::builder().redirect(same_origin()).build()?;
//! let retry = FalRetryLayer::new(store.clone()).reload_wait(Duration::from_secs(5)); // options are the layers' own
//! let fal = ClientBuilder::new(client)
//!     .with(tracing)
//!     .with(FalRetryMiddleware::from(retry))
//!     .with(FalAuthMiddleware::new(store))
//!     .build();
//! # Ok(fal) }
//! ```
//!
//! # A request with its own credential
//! It brings it in its extensions, as with the layers: `fal.post(…).with_extension(Credential::key("…")?)`. Those of an
//! `http::Request` that is made a `reqwest::Request` are not seen by any middleware; where every request must bring its
//! own, [`FalLayer::per_request`] has such a one go out without a header.
//!
//! # What is sent again
//! A request whose body is in memory; cloning it copies no body. One that streams is sent once, and
//! [`Refusal::is_replayable`](crate::error::Refusal::is_replayable) says so. As nothing is copied,
//! [`max_body`](FalRetryLayer::max_body) and [`replay_memory`](FalRetryLayer::replay_memory) have no say here.
//!
//! # Time-outs, and what is no refusal
//! reqwest's time-out is that of one attempt: the wait for a newer credential, up to
//! [`reload_wait`](FalRetryLayer::reload_wait), comes on top, and what is sent again has all of it anew. Any status but
//! a refusal's is a response, as ever: `error_for_status` is yours to call.
//!
//! The default headers of reqwest's client are not seen: ours goes before an `authorization` among them, with
//! [`keep_existing`](FalAuthLayer::keep_existing) as well.
//!
//! # Redirects
//! reqwest follows them inside of all middleware. [`FalLayer::reqwest`] has it follow those within an origin only; any
//! other is the response. A client of your own must have the same policy, [`same_origin`], or none:
//! [why](crate::reqwest_service#redirects). What another origin answers all the same is passed on untouched: it reloads
//! nothing.

use std::{fmt, marker::PhantomData, sync::Arc};

use async_trait::async_trait;
use http::{Extensions, Uri};
use reqwest::{Request, Response};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};

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
    reqwest_service::{is_elsewhere, same_origin, with_url},
    retry::{
        FalRetryLayer, Mode, Rules, Typed,
        course::{Course, Judged, judge, stamp_of},
        judge::Verdict,
    },
    store::CredentialStore,
};

impl<M: Mode, P: OriginPolicy + Send + Sync + 'static> FalLayer<M, P> {
    /// The usual client: these two layers around the `reqwest::Client` that is built here, by the redirect policy
    /// [`same_origin`]. See [`reqwest_plugin`](self).
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
/// may carry it. See the [module docs](self) for the order, inside [`FalRetryMiddleware`], and for the redirect policy
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
        if is_refusal(response.status()) && !is_elsewhere(&asked, response.url()) {
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
/// [`FalAuthError`] for what remains, which [`FalAuthError::find`] finds. See the [module docs](self) for the order:
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
