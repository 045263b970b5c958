use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use pin_project::pin_project;

use super::Rejection;

/// The body of a delivery, as the inner service of [`VerifyWebhook`](super::VerifyWebhook) gets it: the bytes that were
/// verified, in one piece, and the trailers if there were any.
///
/// With [`observe`](super::VerifyWebhookLayer::observe) it may be a body that was not read to its end, because it was too
/// long or too slow. Then the rest follows from where it comes.
pub struct WebhookBody<B: Body> {
    read: Read,
    trailers: Option<HeaderMap>,
    /// What was not read yet. It is boxed so that it can be handed on after some of it was read.
    rest: Option<Pin<Box<B>>>,
    failed: Option<B::Error>,
}

/// What has been read. One frame stays as it is, and is copied only when there are more.
enum Read {
    One(Bytes),
    More(BytesMut),
}

impl<B: Body> WebhookBody<B> {
    pub(super) fn new(body: B) -> Self {
        Self { read: Read::One(Bytes::new()), trailers: None, rest: Some(Box::pin(body)), failed: None }
    }

    /// Reads the body to its end. What has been read is kept, also when this fails or is dropped.
    pub(super) async fn read_whole(&mut self, limit: usize) -> Result<(), Rejection> {
        let Some(body) = &mut self.rest else { return Ok(()) };
        // This is what the caller says. It is believed only when it makes the end come sooner.
        if body.size_hint().lower() > limit as u64 {
            return Err(Rejection::BodyTooLong(limit));
        }
        while let Some(frame) = body.frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => {
                    self.failed = Some(error);
                    self.rest = None;
                    return Err(Rejection::BodyCutOff);
                }
            };
            match frame.into_data() {
                Ok(mut data) => {
                    let data = data.copy_to_bytes(data.remaining());
                    self.read.push(data);
                    if self.read.bytes().len() > limit {
                        return Err(Rejection::BodyTooLong(limit));
                    }
                }
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            }
        }
        self.rest = None;
        Ok(())
    }

    /// What has been read.
    pub(super) fn bytes(&self) -> &[u8] {
        self.read.bytes()
    }
}

impl Read {
    fn push(&mut self, data: Bytes) {
        match self {
            Self::One(first) if first.is_empty() => *first = data,
            Self::One(first) => {
                let mut more = BytesMut::from(&first[..]);
                more.extend_from_slice(&data);
                *self = Self::More(more);
            }
            Self::More(more) => more.extend_from_slice(&data),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::One(first) => first,
            Self::More(more) => more,
        }
    }

    fn take(&mut self) -> Bytes {
        match std::mem::replace(self, Self::One(Bytes::new())) {
            Self::One(first) => first,
            Self::More(more) => more.freeze(),
        }
    }
}

// Nothing in it is pinned but what is boxed.
impl<B: Body> Unpin for WebhookBody<B> {}

impl<B: Body> Body for WebhookBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let read = this.read.take();
        if !read.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(read))));
        }
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if let Some(rest) = &mut this.rest {
            let frame = ready!(rest.as_mut().poll_frame(cx));
            if frame.is_some() {
                let whole = |frame: Frame<B::Data>| frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
                return Poll::Ready(frame.map(|frame| frame.map(whole)));
            }
            this.rest = None;
        }
        Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes().is_empty()
            && self.failed.is_none()
            && self.trailers.is_none()
            && self.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.bytes().len() as u64;
        let mut hint = self.rest.as_ref().map_or_else(|| SizeHint::with_exact(0), |rest| rest.size_hint());
        // The upper bound first: the lower one must never be above it.
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint.set_lower(hint.lower().saturating_add(read));
        hint
    }
}

impl<B: Body> fmt::Debug for WebhookBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookBody").field("read", &self.bytes().len()).finish_non_exhaustive()
    }
}

/// The body of a response of [`VerifyWebhook`](super::VerifyWebhook): that of the inner service, or a small one of the
/// layer's own.
///
/// A type of its own and no bound such as `R: From<Bytes>`, because boxed bodies and hyper's `Incoming` would not meet
/// that.
#[pin_project]
pub struct ResponseBody<R> {
    #[pin]
    body: Either<R>,
}

#[pin_project(project = EitherProjection)]
enum Either<R> {
    Inner(#[pin] R),
    Own(Bytes),
}

impl<R> ResponseBody<R> {
    pub(super) fn inner(body: R) -> Self {
        Self { body: Either::Inner(body) }
    }

    pub(super) fn own(body: Bytes) -> Self {
        Self { body: Either::Own(body) }
    }
}

impl<R: Body<Data = Bytes>> Body for ResponseBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, R::Error>>> {
        match self.project().body.project() {
            EitherProjection::Inner(body) => body.poll_frame(cx),
            EitherProjection::Own(body) if body.is_empty() => Poll::Ready(None),
            EitherProjection::Own(body) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(body))))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Either::Inner(body) => body.is_end_stream(),
            Either::Own(body) => body.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Either::Inner(body) => body.size_hint(),
            Either::Own(body) => SizeHint::with_exact(body.len() as u64),
        }
    }
}

impl<R> fmt::Debug for ResponseBody<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.body {
            Either::Inner(_) => "ResponseBody(of the inner service)",
            Either::Own(_) => "ResponseBody(of the layer)",
        })
    }
}
