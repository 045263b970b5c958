//! A body for the tests of both bodies.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

/// A body that follows its script.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) steps: VecDeque<Step>,
    pub(super) size: Size,
    pub(super) knows_its_end: bool,
    /// It begins again when it has ended.
    pub(super) endless: bool,
    /// A test sees by this when the body is dropped.
    pub(super) alive: Arc<()>,
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    Data(Vec<u8>),
    Trailers(u16),
    Pending,
    /// Nothing more, now or later.
    Stall,
    Error,
    Panic,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Size {
    Exact,
    AtLeastHalf,
    BetweenHalfAndDouble,
    Unknown,
    /// Unknown as long as anything is left, as with a body that is generated.
    KnownAtItsEnd,
}

impl Script {
    pub(super) fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            size: Size::Unknown,
            knows_its_end: false,
            endless: false,
            alive: Arc::default(),
        }
    }

    pub(super) fn of(pieces: impl IntoIterator<Item = &'static str>) -> Self {
        Self::new(pieces.into_iter().map(|piece| Step::Data(piece.into())))
    }

    /// Pieces, and then nothing more for good.
    pub(super) fn stuck_after(pieces: impl IntoIterator<Item = &'static str>) -> Self {
        let mut script = Self::of(pieces);
        script.steps.extend(std::iter::repeat_n(Step::Pending, 100));
        script
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        if matches!(self.steps.front(), Some(Step::Stall)) {
            return Poll::Pending;
        }
        let step = self.steps.pop_front();
        if self.endless {
            self.steps.extend(step.clone());
        }
        Poll::Ready(match step {
            Some(Step::Data(data)) => Some(Ok(Frame::data(data.into()))),
            Some(Step::Trailers(number)) => Some(Ok(Frame::trailers(trailers(number)))),
            Some(Step::Error) => Some(Err("as scripted")),
            Some(Step::Panic) => panic!("as scripted"),
            Some(Step::Pending | Step::Stall) => return Poll::Pending,
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let length = |step: &Step| if let Step::Data(data) = step { data.len() as u64 } else { 0 };
        let left = self.steps.iter().map(length).sum();
        let mut hint = SizeHint::new();
        match self.size {
            Size::Exact => hint.set_exact(left),
            Size::AtLeastHalf => hint.set_lower(left / 2),
            Size::BetweenHalfAndDouble => {
                hint.set_lower(left / 2);
                hint.set_upper(left * 2);
            }
            Size::KnownAtItsEnd if self.steps.is_empty() => hint.set_exact(0),
            Size::KnownAtItsEnd | Size::Unknown => {}
        }
        hint
    }
}

pub(super) fn trailers(number: u16) -> HeaderMap {
    HeaderMap::from_iter([("x-checksum".parse().unwrap(), number.into())])
}
