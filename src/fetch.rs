//! One bounded request through any service: what the login, a set of keys and a realtime token are fetched with.
//!
//! The service is bare: no layer of this crate is around it unless its user has put one there. Nothing is followed,
//! nothing is repeated, and of an answer no more is read than the limit.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt as _, Full};
use tower_service::Service;

use crate::error::BoxError;

/// A service of any type, and the bounds on each request through it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Fetch {
    send: Arc<dyn SendBoxed>,
    timeout: Duration,
    limit: usize,
}

impl Fetch {
    /// Requests through clones of a service. Each is given up after `timeout`, and when its answer has more than `limit`
    /// bytes.
    pub(crate) fn new<S, B>(service: S, timeout: Duration, limit: usize) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        // A lock in place of a bound `Sync`, which boxed services do not meet; it is held for the time of a clone.
        Self { send: Arc::new(Shared(Mutex::new(service))), timeout, limit }
    }

    /// The same with another timeout.
    pub(crate) fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sends the request and reads the whole answer.
    ///
    /// # Errors
    /// When there is no answer, when it does not end within the timeout, or when it is longer than the limit.
    pub(crate) async fn fetch(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, FetchError> {
        match tokio::time::timeout(self.timeout, self.send.send(request, self.limit)).await {
            Ok(answer) => answer,
            Err(_) => Err(FetchError::TimedOut(self.timeout)),
        }
    }
}

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetch").field("timeout", &self.timeout).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Why there is no answer to go by. No text of it comes from the answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("there was no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the answer has more than {0} bytes")]
    TooLong(usize),
    #[error("the request could not be sent, or its answer could not be read")]
    Failed(#[source] BoxError),
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, FetchError>> + Send + 'a>>;

/// The service without its type.
trait SendBoxed: Send + Sync {
    fn send(&self, request: Request<Full<Bytes>>, limit: usize) -> Answer<'_>;
}

struct Shared<S>(Mutex<S>);

impl<S, B> SendBoxed for Shared<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
    S: Clone + Send + 'static,
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    fn send(&self, request: Request<Full<Bytes>>, limit: usize) -> Answer<'_> {
        let mut service = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Box::pin(async move {
            std::future::poll_fn(|cx| service.poll_ready(cx))
                .await
                .map_err(|error| FetchError::Failed(error.into()))?;
            let answer = service.call(request).await.map_err(|error| FetchError::Failed(error.into()))?;
            let (head, body) = answer.into_parts();
            Ok(Response::from_parts(head, read(body, limit).await?))
        })
    }
}

/// The whole body, unless it is longer than the limit.
async fn read<B>(body: B, limit: usize) -> Result<Bytes, FetchError>
where
    B: Body<Error: Into<BoxError>>,
{
    let mut body = std::pin::pin!(body);
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| FetchError::Failed(error.into()))?;
        let Ok(mut piece) = frame.into_data() else { continue };
        if piece.remaining() > limit - whole.len() {
            return Err(FetchError::TooLong(limit));
        }
        while piece.has_remaining() {
            let part = piece.chunk();
            whole.extend_from_slice(part);
            let read = part.len();
            piece.advance(read);
        }
    }
    Ok(whole.freeze())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::service_fn;

    use super::*;

    fn get() -> Request<Full<Bytes>> {
        Request::get("https://auth.fal.ai/").body(Full::default()).unwrap()
    }

    #[tokio::test]
    async fn an_answer_is_read_to_its_end() {
        let service = service_fn(async |_| Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("four"))));
        let answer = Fetch::new(service, Duration::from_secs(1), 4).fetch(get()).await.unwrap();
        assert_eq!(answer.into_body(), "four");
    }

    #[tokio::test]
    async fn an_answer_longer_than_the_limit_is_an_error() {
        let service = service_fn(async |_| Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("fives"))));
        let error = Fetch::new(service, Duration::from_secs(1), 4).fetch(get()).await.unwrap_err();
        assert_eq!(error.to_string(), "the answer has more than 4 bytes");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_come_is_given_up() {
        let service = service_fn(|_| std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>());
        let error = Fetch::new(service, Duration::from_secs(30), 4).fetch(get()).await.unwrap_err();
        assert!(matches!(error, FetchError::TimedOut(_)), "{error}");
    }

    #[tokio::test]
    async fn a_service_that_fails_is_the_source_of_the_error() {
        let service = service_fn(async |_| Err::<Response<Full<Bytes>>, _>(std::io::Error::other("no route")));
        let error = Fetch::new(service, Duration::from_secs(1), 4).fetch(get()).await.unwrap_err();
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "no route");
    }
}
