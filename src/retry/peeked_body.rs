use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use pin_project::pin_project;

/// How much of a refusal's body is looked at, in bytes.
pub(crate) const MAX_PEEK: usize = 16 * 1024;

/// The response body of a [passthrough](super::FalRetryLayer::passthrough) service.
///
/// The inner service's own body; of a refusal, what was read of it to see why, and then the rest. Size hint, framing
/// and trailers are those of the inner body.
#[pin_project]
pub struct PeekedBody<R: Body> {
    #[pin]
    kind: Kind<R>,
}

#[pin_project(project = KindProjection)]
enum Kind<R: Body> {
    Whole(#[pin] R),
    Peeked(Peeked<R>),
}

/// A body of which the start was read.
pub(crate) struct Peeked<R: Body> {
    read: VecDeque<Frame<Bytes>>,
    rest: Option<Pin<Box<R>>>,
    failed: Option<R::Error>,
    hint: SizeHint,
}

impl<R: Body> PeekedBody<R> {
    pub(crate) fn whole(body: R) -> Self {
        Self { kind: Kind::Whole(body) }
    }

    pub(crate) fn peeked(body: Peeked<R>) -> Self {
        Self { kind: Kind::Peeked(body) }
    }
}

impl<R: Body> Peeked<R> {
    /// Reads the start of a body: 16 KiB, or what comes within `limit`.
    pub(crate) async fn read(body: R, limit: Duration) -> Self {
        let hint = body.size_hint();
        let mut peeked = Self { read: VecDeque::new(), rest: Some(Box::pin(body)), failed: None, hint };
        // Each frame is kept as soon as it is there, so nothing is lost when the time is over.
        let _ = tokio::time::timeout(limit, peeked.fill()).await;
        peeked
    }

    async fn fill(&mut self) {
        let mut length = 0;
        while length < MAX_PEEK {
            let Some(rest) = &mut self.rest else { return };
            match rest.frame().await {
                Some(Ok(frame)) => {
                    let frame = frame.map_data(into_bytes);
                    length += frame.data_ref().map_or(0, Bytes::len);
                    self.read.push_back(frame);
                }
                Some(Err(error)) => (self.failed, self.rest) = (Some(error), None),
                None => self.rest = None,
            }
        }
    }

    /// What was read, in one piece of at most 16 KiB.
    pub(crate) fn start(&self) -> Bytes {
        let mut pieces = self.read.iter().filter_map(Frame::data_ref);
        let first = pieces.next().cloned().unwrap_or_default();
        let Some(second) = pieces.next() else { return first.slice(..first.len().min(MAX_PEEK)) };
        let mut start = [first, second.clone()].concat();
        pieces.for_each(|piece| start.extend_from_slice(piece));
        start.truncate(MAX_PEEK);
        start.into()
    }

    /// Lets go of the connection: a body that was read to its end frees it for others, any other closes it.
    pub(crate) fn drop_rest(&mut self) {
        self.rest = None;
    }
}

fn into_bytes(mut data: impl Buf) -> Bytes {
    data.copy_to_bytes(data.remaining()) // no copy if it is `Bytes` already
}

impl<R: Body> Body for PeekedBody<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, R::Error>>> {
        match self.project().kind.project() {
            KindProjection::Whole(body) => {
                body.poll_frame(cx).map(|frame| frame.map(|frame| frame.map(|frame| frame.map_data(into_bytes))))
            }
            KindProjection::Peeked(peeked) => peeked.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Whole(body) => body.is_end_stream(),
            Kind::Peeked(peeked) => {
                peeked.read.is_empty()
                    && peeked.failed.is_none()
                    && peeked.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Whole(body) => body.size_hint(),
            Kind::Peeked(peeked) => peeked.hint,
        }
    }
}

impl<R: Body> Peeked<R> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, R::Error>>> {
        let frame = if let Some(frame) = self.read.pop_front() {
            Some(Ok(frame))
        } else if let Some(error) = self.failed.take() {
            Some(Err(error))
        } else if let Some(rest) = &mut self.rest {
            std::task::ready!(rest.as_mut().poll_frame(cx)).map(|frame| frame.map(|frame| frame.map_data(into_bytes)))
        } else {
            None
        };
        if let Some(Ok(frame)) = &frame {
            let given = frame.data_ref().map_or(0, |data| data.len() as u64);
            let (lower, upper) = (self.hint.lower().saturating_sub(given), self.hint.upper());
            self.hint = SizeHint::new();
            self.hint.set_lower(lower);
            if let Some(upper) = upper {
                self.hint.set_upper(upper.saturating_sub(given));
            }
        }
        Poll::Ready(frame)
    }
}

impl<R: Body> fmt::Debug for PeekedBody<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeekedBody").finish_non_exhaustive()
    }
}
