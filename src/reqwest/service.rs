use std::{
    fmt,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use reqwest::{Client, ClientBuilder, ResponseBuilderExt as _, Url, redirect};
use tower_service::Service;

use crate::{auth::stamp::CrossedOrigin, error::BoxError};

type ClientFuture = <Client as Service<reqwest::Request>>::Future;

/// A [`reqwest::Client`] as a `Service<http::Request<B>>`. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct ReqwestService {
    client: Client,
}

impl ReqwestService {
    /// The service that sends with the client that is built here, and follows no redirect.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::build`].
    pub fn new(client: ClientBuilder) -> reqwest::Result<Self> {
        Ok(client.redirect(redirect::Policy::none()).build()?.into())
    }
}

/// The service that sends with this client. See the [module docs](super) for the redirect policy that it must have.
impl From<Client> for ReqwestService {
    fn from(client: Client) -> Self {
        Self { client }
    }
}

impl<B> Service<Request<B>> for ReqwestService
where
    B: Body + Send + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    type Response = Response<reqwest::Body>;
    type Error = reqwest::Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.client.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let asked = request.uri().clone();
        let inner = match reqwest::Request::try_from(request.map(into_reqwest)) {
            Ok(request) => Inner::Sent { response: self.client.call(request) },
            Err(error) => Inner::NotSent { error: Some(error) },
        };
        ResponseFuture { inner, asked }
    }
}

/// Response future of [`ReqwestService`].
#[pin_project]
pub struct ResponseFuture {
    #[pin]
    inner: Inner,
    asked: Uri,
}

#[pin_project(project = InnerProjection)]
enum Inner {
    Sent {
        #[pin]
        response: ClientFuture,
    },
    /// The URI is not one that reqwest takes.
    NotSent { error: Option<reqwest::Error> },
}

impl Future for ResponseFuture {
    type Output = Result<Response<reqwest::Body>, reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = match this.inner.project() {
            InnerProjection::Sent { response } => ready!(response.poll(cx))?,
            InnerProjection::NotSent { error } => match error.take() {
                Some(error) => return Poll::Ready(Err(error)),
                None => return Poll::Pending, // it has said so already
            },
        };
        let crossed = crossed_origin(this.asked, response.url());
        let mut response = with_url(response);
        if crossed {
            response.extensions_mut().insert(CrossedOrigin);
        }
        Poll::Ready(Ok(response))
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

/// Whether an answer comes from another origin than the one that was asked, as a client with a redirect policy of its own
/// has followed a redirect there.
pub(crate) fn crossed_origin(asked: &Uri, answered: &Url) -> bool {
    !is_written_alike(asked, answered.as_str())
        && Url::parse(&asked.to_string()).map_or(true, |asked| asked.origin() != answered.origin())
}

/// Whether both begin with the same scheme and authority, letter by letter, as nearly all do where nothing was followed.
fn is_written_alike(asked: &Uri, answered: &str) -> bool {
    let (Some(scheme), Some(authority)) = (asked.scheme_str(), asked.authority()) else { return false };
    let path = answered.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://"));
    // Up to its end: `https://fal.run` is also the beginning of `https://fal.run.example.com/`.
    path.and_then(|rest| rest.strip_prefix(authority.as_str())).is_some_and(|rest| rest.starts_with('/'))
}

/// The response with its final URL kept, which reqwest's own conversion loses.
pub(crate) fn with_url(response: reqwest::Response) -> Response<reqwest::Body> {
    let url = response.url().clone();
    let mut response = Response::from(response);
    if let Ok(bearer) = Response::builder().url(url).body(()) {
        response.extensions_mut().extend(bearer.into_parts().0.extensions);
    }
    response
}

fn into_reqwest<B>(body: B) -> reqwest::Body
where
    B: Body + Send + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    if body.is_end_stream() {
        return reqwest::Body::default(); // which a redirect can take along
    }
    reqwest::Body::wrap(SyncBody { body: Mutex::new(Box::pin(body)) })
}

/// A body that is `Sync`, as reqwest wants it. Nobody ever waits for the lock.
struct SyncBody<B> {
    body: Mutex<Pin<Box<B>>>,
}

impl<B: Body> Body for SyncBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.body.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.lock().unwrap_or_else(PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.lock().unwrap_or_else(PoisonError::into_inner).size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(asked: &'static str, answered: &str, expected: bool) {
        let (asked, answered) = (Uri::from_static(asked), Url::parse(answered).unwrap());
        assert_eq!(crossed_origin(&asked, &answered), expected, "{asked} to {answered}");
    }

    #[test]
    fn an_answer_of_the_origin_that_was_asked_crosses_nothing() {
        check("https://fal.run/a", "https://fal.run/a", false);
        check("https://fal.run", "https://fal.run/", false);
        check("https://FAL.run/a", "https://fal.run/b?c", false);
        check("https://fal.run:443/a", "https://fal.run/a", false);
        check("http://127.0.0.1:8080/a", "http://127.0.0.1:8080/b", false);
    }

    #[test]
    fn an_answer_of_another_origin_crosses() {
        check("https://fal.run/a", "https://fal.run.example.com/a", true);
        check("https://fal.run/a", "https://fal.run@example.com/a", true);
        check("https://fal.run/a", "https://fal.run:8443/a", true);
        check("https://fal.run/a", "http://fal.run/a", true);
        check("https://fal.run/a", "https://rest.fal.ai/a", true);
    }
}
