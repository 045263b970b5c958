//! A bound on the requests that are under way.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    middleware::Next,
    response::Response,
};
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use super::{problem, seldom::Seldom};

/// Answers 503 while as many requests are under way as there are permits. Tower's concurrency limit would do the same
/// until an answer begins; here a request keeps its permit until the answer has ended, which matters for streams.
pub(crate) async fn limit(State(permits): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    static BUSY: Seldom = Seldom::new();

    let Ok(permit) = permits.try_acquire_owned() else {
        if let Some(times) = BUSY.count() {
            warn!(times, "as many requests are under way as --max-requests allows: answering 503");
        }
        let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, "overloaded");
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        return response;
    };
    next.run(request).await.map(|body| Body::new(Held { body, _permit: permit }))
}

/// The body of an answer, with the permit of its request.
struct Held {
    body: Body,
    _permit: OwnedSemaphorePermit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
