use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use pin_project::pin_project;

use super::into_bytes;

/// How much of a refusal's body is looked at, in bytes.
pub(crate) const MAX_PEEK: usize = 16 * 1024;

/// The response body of a [passthrough](crate::FalRetryLayer::passthrough) service.
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
        // Frames are counted too, or empty ones could pile up without end.
        while length < MAX_PEEK && self.read.len() < MAX_PEEK {
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

    /// What was read, in one piece of at most 16 KiB, which holds no more memory than that.
    pub(crate) fn start(&self) -> Bytes {
        let mut pieces = self.read.iter().filter_map(Frame::data_ref);
        if let (Some(only), None) = (pieces.next(), pieces.next())
            && only.len() <= MAX_PEEK
        {
            return only.clone();
        }
        let mut start = Vec::new();
        for piece in self.read.iter().filter_map(Frame::data_ref) {
            start.extend_from_slice(&piece[..piece.len().min(MAX_PEEK - start.len())]);
        }
        start.into()
    }

    /// Lets go of the connection: a body that was read to its end frees it for others, any other closes it.
    pub(crate) fn drop_rest(&mut self) {
        self.rest = None;
    }
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

#[cfg(test)]
mod tests {
    use std::{sync::Arc, task::Waker};

    use http::HeaderMap;
    use http_body_util::{Empty, Full};
    use proptest::{collection::vec, prelude::*};

    use super::{
        super::script::{Script, Size, Step},
        *,
    };

    /// What a caller gets: the pieces put together, trailers, and how it ends.
    #[derive(Debug, PartialEq)]
    struct Got {
        size: Option<u64>,
        bytes: Vec<u8>,
        trailers: Vec<HeaderMap>,
        error: Option<&'static str>,
    }

    impl Got {
        fn all_of(mut body: impl Body<Data = Bytes, Error = &'static str> + Unpin) -> Self {
            let mut got = Self { size: body.size_hint().exact(), bytes: Vec::new(), trailers: Vec::new(), error: None };
            while !body.is_end_stream() {
                match Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                    Poll::Pending => panic!("it waits"),
                    Poll::Ready(None) => break,
                    Poll::Ready(Some(Err(error))) => {
                        got.error = Some(error);
                        break;
                    }
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(data) => got.bytes.extend_from_slice(&data),
                        Err(frame) => got.trailers.push(frame.into_trailers().unwrap()),
                    },
                }
                if let Some(size) = got.size {
                    assert_eq!(body.size_hint().exact(), Some(size - got.bytes.len() as u64));
                }
            }
            got
        }
    }

    async fn read(body: Script) -> Peeked<Script> {
        Peeked::read(body, Duration::from_secs(1)).await
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_looked_at_is_handed_on_whole(
            pieces in vec(prop_oneof![Just(0), 1..100_usize, Just(MAX_PEEK - 1), Just(MAX_PEEK), Just(MAX_PEEK + 1)], 0..5),
            last in prop_oneof![4 => Just(None), 1 => Just(Some(Step::Trailers(1))), 1 => Just(Some(Step::Error))],
            size in prop_oneof![Just(Size::Exact), Just(Size::Unknown)],
            knows_its_end in any::<bool>(),
        ) {
            let data = pieces.iter().enumerate().map(|(number, &length)| Step::Data(vec![number as u8; length]));
            let script = Script { size, knows_its_end, ..Script::new(data.chain(last)) };
            let plain = Got::all_of(script.clone());

            let peeked = block_on(read(script.clone()));
            prop_assert!(peeked.start() == plain.bytes[..plain.bytes.len().min(MAX_PEEK)]);
            prop_assert!(Got::all_of(PeekedBody::peeked(peeked)) == plain);
            prop_assert!(Got::all_of(PeekedBody::whole(script)) == plain);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_is_read_as_far_as_it_came() {
        let began = tokio::time::Instant::now();
        let peeked = read(Script::new([Step::Data(b"so far".into()), Step::Stall])).await;
        assert_eq!(began.elapsed(), Duration::from_secs(1));
        assert_eq!(peeked.start(), "so far");

        let mut body = PeekedBody::peeked(peeked);
        let mut poll = || Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(poll(), Poll::Ready(Some(Ok(frame))) if frame.data_ref().unwrap() == "so far"));
        assert!(poll().is_pending());
        assert!(!body.is_end_stream());
    }

    #[tokio::test(start_paused = true)]
    async fn frames_without_end_are_not_read_without_end() {
        for step in [Step::Data(Vec::new()), Step::Trailers(1), Step::Data(vec![b'x'])] {
            let peeked = read(Script { endless: true, ..Script::new([step]) }).await;
            assert_eq!(peeked.read.len(), MAX_PEEK);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_body_is_read_to_its_end() {
        for knows_its_end in [false, true] {
            let script = Script { knows_its_end, ..Script::new([Step::Data(b"short".into())]) };
            let alive = Arc::downgrade(&script.alive);
            let peeked = read(script).await;
            assert!(alive.upgrade().is_none(), "the end was not seen");
            assert_eq!(peeked.start(), "short");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_a_long_body_can_be_dropped_before_a_wait() {
        let script = Script::new([Step::Data(vec![0; MAX_PEEK]), Step::Data(vec![0; 1])]);
        let alive = Arc::downgrade(&script.alive);
        let mut peeked = read(script).await;
        assert!(alive.upgrade().is_some());
        peeked.drop_rest();
        assert!(alive.upgrade().is_none());
        assert_eq!(peeked.start().len(), MAX_PEEK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_of_one_piece_is_not_copied() {
        let piece = Bytes::from(vec![1; 1000]);
        let peeked = Peeked::read(Full::new(piece.clone()), Duration::from_secs(1)).await;
        assert_eq!(peeked.start().as_ptr(), piece.as_ptr());
        let frame = http_body_util::BodyExt::frame(&mut PeekedBody::peeked(peeked)).await.unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap().as_ptr(), piece.as_ptr());
    }

    #[tokio::test(start_paused = true)]
    async fn no_body_is_none() {
        let peeked = Peeked::read(Empty::<Bytes>::new(), Duration::from_secs(1)).await;
        assert!(peeked.start().is_empty());
        let body = PeekedBody::peeked(peeked);
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
    }
}
