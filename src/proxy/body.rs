//! The bodies that go through the proxy, frame by frame as they come.

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use pin_project::pin_project;

use super::{finished::Finish, headers};
use crate::{error::BoxError, retry::PeekedBody};

/// The body of a request to fal: what the client sends, up to a limit, or what the proxy sends in its place.
pub struct UploadBody<B> {
    kind: Upload<B>,
}

enum Upload<B> {
    /// With how many bytes may still come.
    Theirs(B, u64),
    Ours(Full<Bytes>),
}

/// The client's body is longer than the proxy allows.
#[derive(Debug, thiserror::Error)]
#[error("the body of the request is longer than the proxy allows")]
pub(super) struct UploadTooLong;

impl<B> UploadBody<B> {
    pub(super) fn theirs(body: B, most: u64) -> Self {
        Self { kind: Upload::Theirs(body, most) }
    }

    pub(super) fn ours(body: Bytes) -> Self {
        Self { kind: Upload::Ours(Full::new(body)) }
    }
}

impl<B> Body for UploadBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.kind {
            Upload::Ours(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Upload::Theirs(body, left) => loop {
                let frame = match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                    Some(Ok(frame)) => frame,
                    Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                    None => return Poll::Ready(None),
                };
                // Trailers are left out: a server may take them for headers, and these were not looked at.
                let Some(data) = frame.data_ref() else { continue };
                return Poll::Ready(Some(match left.checked_sub(data.len() as u64) {
                    Some(rest) => {
                        *left = rest;
                        Ok(frame)
                    }
                    None => Err(UploadTooLong.into()),
                }));
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Upload::Theirs(body, _) => body.is_end_stream(),
            Upload::Ours(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Upload::Theirs(body, _) => body.size_hint(),
            Upload::Ours(body) => body.size_hint(),
        }
    }
}

impl<B> fmt::Debug for UploadBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UploadBody").finish_non_exhaustive()
    }
}

/// The body of a proxy's answer: fal's, or one of our own.
#[pin_project]
pub struct ProxyBody<R: Body> {
    #[pin]
    kind: Kind<R>,
    finish: Option<Box<Finish>>,
}

#[pin_project(project = KindProjection)]
enum Kind<R: Body> {
    Fals(#[pin] PeekedBody<R>),
    /// Of which the start was read, and what is behind that.
    Read(VecDeque<Result<Frame<Bytes>, R::Error>>, Pin<Box<PeekedBody<R>>>),
    Ours(#[pin] Full<Bytes>),
    Refused(#[pin] axum_core::body::Body),
}

impl<R: Body> ProxyBody<R> {
    pub(super) fn fals(body: PeekedBody<R>, mut finish: Option<Box<Finish>>) -> Self {
        if let Some(finish) = &mut finish
            && body.is_end_stream()
        {
            finish.completed();
        }
        Self { kind: Kind::Fals(body), finish }
    }

    pub(super) fn ours(body: impl Into<Bytes>) -> Self {
        Self { kind: Kind::Ours(Full::new(body.into())), finish: None }
    }

    pub(super) fn refused(body: axum_core::body::Body) -> Self {
        Self { kind: Kind::Refused(body), finish: None }
    }
}

impl<R: Body> ProxyBody<R> {
    /// fal's answer, of which as many bytes are read as there are, up to a limit.
    pub(super) async fn read_fals(body: PeekedBody<R>, most: usize, finish: Option<Box<Finish>>) -> (Self, Bytes) {
        let mut body = Box::pin(body);
        let (mut frames, mut start) = (VecDeque::new(), BytesMut::new());
        while start.len() < most
            && let Some(frame) = body.frame().await
        {
            if let Some(data) = frame.as_ref().ok().and_then(Frame::data_ref) {
                start.extend_from_slice(data);
            }
            let failed = frame.is_err();
            frames.push_back(frame);
            if failed {
                break;
            }
        }
        (Self { kind: Kind::Read(frames, body), finish }, start.freeze())
    }
}

/// An empty one, for layers around the proxy that answer by themselves.
impl<R: Body> Default for ProxyBody<R> {
    fn default() -> Self {
        Self::ours(Bytes::new())
    }
}

impl<R: Body> Kind<R> {
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Fals(body) => body.is_end_stream(),
            Self::Read(frames, body) => frames.is_empty() && body.is_end_stream(),
            Self::Ours(body) => body.is_end_stream(),
            Self::Refused(body) => body.is_end_stream(),
        }
    }
}

impl<R> Body for ProxyBody<R>
where
    R: Body,
    R::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let mut polled = match this.kind.as_mut().project() {
            KindProjection::Fals(body) => ready!(body.poll_frame(cx)),
            KindProjection::Read(frames, body) => match frames.pop_front() {
                Some(frame) => Some(frame),
                None => ready!(body.as_mut().poll_frame(cx)),
            },
            KindProjection::Ours(body) => return body.poll_frame(cx).map_err(Into::into),
            KindProjection::Refused(body) => return body.poll_frame(cx).map_err(Into::into),
        };
        if let Some(Ok(frame)) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            headers::clean(trailers);
        }
        // A server does not ask for more once the length is reached.
        if let Some(finish) = this.finish
            && (polled.is_none() || (!matches!(polled, Some(Err(_))) && this.kind.is_end_stream()))
        {
            finish.completed();
        }
        Poll::Ready(polled.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.kind.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Fals(body) => body.size_hint(),
            Kind::Read(frames, body) => {
                let data = frames.iter().flatten().filter_map(Frame::data_ref);
                let (read, rest) = (data.map(|data| data.len() as u64).sum::<u64>(), body.size_hint());
                let mut hint = SizeHint::new();
                hint.set_lower(read + rest.lower());
                if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(read)) {
                    hint.set_upper(upper);
                }
                hint
            }
            Kind::Ours(body) => body.size_hint(),
            Kind::Refused(body) => body.size_hint(),
        }
    }
}

impl<R: Body> fmt::Debug for ProxyBody<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProxyBody").finish_non_exhaustive()
    }
}
