use std::{
    error::Error,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use crate::{error::BoxError, events};

/// A request body that can be sent again.
///
/// While the first attempt streams the body `B`, what has passed is kept. A second attempt gets that, and then the
/// rest of `B`; whichever attempt is not the latest one ends with an error, never with an end that would look like a
/// complete body. Trailers and the size hint are the same each time, so the framing is too.
///
/// Nothing is copied for a body of one piece, such as `Full<Bytes>`; an empty body is not even shared. What is longer
/// than the layer's [`max_body`](super::FalRetryLayer::max_body) is streamed and not kept.
///
/// `B` must be `Unpin`, as hyper-util's client wants it anyway; `Box::pin` makes any body so.
pub struct ReplayBody<B> {
    /// `None` for an empty body.
    upload: Option<Slot<B>>,
}

/// Where an attempt finds its upload; nothing is there when another attempt has it, or nobody.
///
/// Each attempt has a slot of its own: hyper may hold one that is over for as long as the connection lives, and must
/// not hold the caller's body, or what is kept of it, with it.
type Slot<B> = Arc<Mutex<Option<Upload<B>>>>;

/// The hold on an upload of whoever may send it again.
pub(crate) struct Replay<B> {
    /// `None` for an empty body, and when nothing is kept any more.
    upload: Option<Slot<B>>,
    is_empty: bool,
}

struct Upload<B> {
    /// What has not been read yet. `None` when it has ended or broke off.
    rest: Option<B>,
    ended: bool,
    /// The size of the whole, as the body itself told it.
    hint: SizeHint,
    kept: Kept,
    /// Whether this attempt has begun, and how many bytes it has got.
    begun: bool,
    sent: u64,
    /// Whoever waits for more of the body; to be told that it will not come.
    waiting: Option<Waker>,
}

/// What has been read, for the next attempt.
struct Kept {
    keeping: bool,
    /// As it came: a body of one piece is not copied.
    first: Option<Bytes>,
    /// What most bodies do not have.
    more: Option<Box<More>>,
    /// How many of the pieces the current attempt has got, and whether it has got the trailers.
    given: usize,
    trailers_given: bool,
    reserved: Reservation,
    most: u64,
}

/// What comes behind the first piece.
#[derive(Default)]
struct More {
    /// Pieces that an earlier attempt has sealed.
    sealed: Vec<Bytes>,
    /// All further ones, copied: a small piece of a large buffer would keep the whole of it.
    open: BytesMut,
    trailers: Option<HeaderMap>,
}

impl<B: Body> ReplayBody<B> {
    /// The first attempt, and the hold by which there may be a second one.
    pub(crate) fn new(body: B, most: u64, memory: &Arc<ReplayMemory>) -> (Self, Replay<B>) {
        if body.is_end_stream() {
            return (Self { upload: None }, Replay { upload: None, is_empty: true });
        }
        let hint = body.size_hint();
        // Nothing is kept of what is known to be too long. Until its first byte is read it can be sent again all the
        // same: when there was no connection, it was not.
        let most = if hint.lower() <= most { most } else { 0 };
        let slot = slot(Upload {
            kept: Kept::new(most, Arc::clone(memory)),
            rest: Some(body),
            ended: false,
            hint,
            begun: false,
            sent: 0,
            waiting: None,
        });
        (Self { upload: Some(Arc::clone(&slot)) }, Replay { upload: Some(slot), is_empty: false })
    }
}

impl<B> ReplayBody<B> {
    /// The body; an empty one stays behind.
    pub(crate) fn take(&mut self) -> Self {
        Self { upload: self.upload.take() }
    }
}

impl<B> Body for ReplayBody<B>
where
    B: Body + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(slot) = &self.upload else { return Poll::Ready(None) };
        match &mut *lock(slot) {
            Some(upload) => upload.poll_frame(cx),
            None => Poll::Ready(Some(Err(Superseded.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.upload.as_ref().is_none_or(|slot| lock(slot).as_ref().is_some_and(Upload::is_end_stream))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.upload {
            None => SizeHint::with_exact(0),
            Some(slot) => lock(slot).as_ref().map_or_else(SizeHint::default, Upload::size_hint),
        }
    }
}

impl<B: Body + Default> Default for ReplayBody<B> {
    fn default() -> Self {
        let nothing_is_kept = Arc::new(ReplayMemory::new(0));
        Self::new(B::default(), 0, &nothing_is_kept).0
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody").finish_non_exhaustive()
    }
}

impl<B> Replay<B> {
    /// Whether a further attempt would be the whole body.
    pub(crate) fn is_possible(&self) -> bool {
        self.is_empty || self.upload.as_ref().is_some_and(|slot| lock(slot).as_ref().is_some_and(Upload::is_replayable))
    }

    /// Takes the upload away from the attempt that has it, however far that has come, for another one. `None` when
    /// it cannot be sent again.
    pub(crate) fn start_over(&mut self) -> Option<ReplayBody<B>> {
        if self.is_empty {
            return Some(ReplayBody { upload: None });
        }
        let current = self.upload.as_mut()?;
        let mut upload = lock(current).take_if(|upload| upload.is_replayable())?;
        wake(&mut upload);
        upload.start_over();
        *current = slot(upload);
        Some(ReplayBody { upload: Some(Arc::clone(current)) })
    }

    /// The answer is there and needs no further attempt: nothing is kept any more, while the upload may go on.
    pub(crate) fn keep_no_longer(&mut self) {
        if self.attempt_is_gone() {
            self.upload = None;
        } else if let Some(slot) = &self.upload
            && let Some(upload) = &mut *lock(slot)
        {
            upload.kept.give_up();
        }
    }

    /// Whether nobody else has the upload: what is kept of it goes with this hold.
    fn attempt_is_gone(&self) -> bool {
        self.upload.as_ref().is_none_or(|slot| Arc::strong_count(slot) == 1)
    }

    /// The request has failed: the upload ends with an error, and the body is dropped, now.
    pub(crate) fn give_up(&self) {
        let upload = self.upload.as_ref().and_then(|slot| lock(slot).take());
        if let Some(mut upload) = upload {
            wake(&mut upload);
        }
    }
}

impl<B> Drop for Replay<B> {
    fn drop(&mut self) {
        self.keep_no_longer();
    }
}

impl<B> Upload<B> {
    fn is_replayable(&self) -> bool {
        self.kept.keeping && (self.ended || self.rest.is_some())
    }

    fn start_over(&mut self) {
        self.kept.rewind();
        (self.begun, self.sent) = (false, 0);
    }
}

impl<B> Upload<B>
where
    B: Body + Unpin,
    B::Error: Into<BoxError>,
{
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.begun = true;
        if let Some(frame) = self.kept.next() {
            self.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
            return Poll::Ready(Some(Ok(frame)));
        }
        self.poll_rest(cx)
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(rest) = &mut self.rest else {
            return Poll::Ready(if self.ended { None } else { Some(Err(BrokenOff.into())) });
        };
        let Poll::Ready(frame) = Pin::new(rest).poll_frame(cx) else {
            if !self.waiting.as_ref().is_some_and(|waiting| waiting.will_wake(cx.waker())) {
                self.waiting = Some(cx.waker().clone());
            }
            return Poll::Pending;
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.rest = None;
                self.kept.give_up();
                return Poll::Ready(Some(Err(error.into())));
            }
            None => {
                self.rest = None;
                self.ended = true;
                return Poll::Ready(None);
            }
        };
        let frame = match frame.into_data() {
            Ok(mut data) => {
                let data = data.copy_to_bytes(data.remaining()); // no copy if it is `Bytes` already
                self.sent += data.len() as u64;
                self.kept.keep(&data);
                Frame::data(data)
            }
            Err(frame) => {
                let Ok(trailers) = frame.into_trailers() else { return Poll::Ready(Some(Err(BrokenOff.into()))) };
                // They are the last there is; whatever follows would come before them the next time.
                (self.rest, self.ended) = (None, true);
                self.kept.keep_trailers(&trailers);
                Frame::trailers(trailers)
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        // Not before it has begun: if the second attempt had ended by then, it would be framed as no body at all, where
        // the first was an empty one.
        self.begun && self.kept.is_given() && (self.ended || self.rest.as_ref().is_some_and(Body::is_end_stream))
    }

    fn size_hint(&self) -> SizeHint {
        // From what the body said of itself at first. At its end it may know more; if the second attempt said so, it
        // would be framed by its length where the first was chunked, and lose its trailers.
        let mut hint = SizeHint::new();
        hint.set_lower(self.hint.lower().saturating_sub(self.sent));
        if let Some(upper) = self.hint.upper() {
            hint.set_upper(upper.saturating_sub(self.sent));
        }
        hint
    }
}

impl Kept {
    fn new(most: u64, memory: Arc<ReplayMemory>) -> Self {
        Self {
            keeping: true,
            first: None,
            more: None,
            given: 0,
            trailers_given: false,
            reserved: Reservation { bytes: 0, memory },
            most,
        }
    }

    /// Keeps what the current attempt has just read and got.
    fn keep(&mut self, data: &Bytes) {
        if !self.keeping || data.is_empty() {
            return;
        }
        let fits = (self.reserved.bytes as u64).saturating_add(data.len() as u64) <= self.most;
        if !fits || !self.reserved.grow(data.len()) {
            self.give_up();
        } else if self.first.is_none() {
            self.first = Some(data.clone());
            self.given += 1;
        } else {
            self.more.get_or_insert_default().open.extend_from_slice(data);
        }
    }

    fn keep_trailers(&mut self, trailers: &HeaderMap) {
        if self.keeping {
            self.more.get_or_insert_default().trailers = Some(trailers.clone());
            self.trailers_given = true;
        }
    }

    fn sealed(&self) -> &[Bytes] {
        self.more.as_ref().map_or(&[], |more| &more.sealed)
    }

    fn trailers(&self) -> Option<&HeaderMap> {
        self.more.as_ref()?.trailers.as_ref()
    }

    /// What the current attempt gets before the rest of the body.
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let piece = match self.given.checked_sub(usize::from(self.first.is_some())) {
            None => self.first.clone(),
            Some(index) => self.sealed().get(index).cloned(),
        };
        let frame = if let Some(piece) = piece {
            self.given += 1;
            Frame::data(piece)
        } else if !self.trailers_given {
            self.trailers_given = true;
            Frame::trailers(self.trailers()?.clone())
        } else {
            return None;
        };
        self.release_if_given();
        Some(frame)
    }

    /// Whether the current attempt has got all of it.
    fn is_given(&self) -> bool {
        self.given == usize::from(self.first.is_some()) + self.sealed().len()
            && (self.trailers().is_none() || self.trailers_given)
    }

    /// For a new attempt, from the start.
    fn rewind(&mut self) {
        if let Some(more) = self.more.as_mut().filter(|more| !more.open.is_empty()) {
            more.sealed.push(more.open.split().freeze());
        }
        (self.given, self.trailers_given) = (0, false);
    }

    /// There will be no new attempt. The current one still gets what it has not got yet.
    fn give_up(&mut self) {
        self.keeping = false;
        self.release_if_given();
    }

    fn release_if_given(&mut self) {
        if !self.keeping && self.is_given() {
            self.release();
        }
    }

    fn release(&mut self) {
        self.keeping = false;
        (self.first, self.more) = (None, None);
        (self.given, self.trailers_given) = (0, true);
        self.reserved.shrink_to_nothing();
    }
}

/// The memory that the bodies of one layer may take up together.
#[derive(Debug)]
pub(crate) struct ReplayMemory {
    most: usize,
    used: AtomicUsize,
    refused: AtomicU64,
}

impl ReplayMemory {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, used: AtomicUsize::new(0), refused: AtomicU64::new(0) }
    }

    /// In bytes.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// How many bodies could not be kept for want of it.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

struct Reservation {
    bytes: usize,
    memory: Arc<ReplayMemory>,
}

impl Reservation {
    fn grow(&mut self, by: usize) -> bool {
        let ReplayMemory { most, used, refused } = &*self.memory;
        let grown = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(by).filter(|grown| grown <= most)
        });
        if grown.is_ok() {
            self.bytes += by;
        } else {
            refused.fetch_add(1, Ordering::Relaxed);
            events::replay_memory_exhausted(*most);
        }
        grown.is_ok()
    }

    fn shrink_to_nothing(&mut self) {
        if self.bytes > 0 {
            self.memory.used.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink_to_nothing();
    }
}

/// Another attempt has taken the upload over, or the request was given up.
#[derive(Debug)]
struct Superseded;

impl fmt::Display for Superseded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the upload was given up: the request was answered before its end")
    }
}

impl Error for Superseded {}

/// The body has failed before, and is polled again.
#[derive(Debug)]
struct BrokenOff;

impl fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request body broke off")
    }
}

impl Error for BrokenOff {}

fn slot<B>(upload: Upload<B>) -> Slot<B> {
    Arc::new(Mutex::new(Some(upload)))
}

fn lock<B>(slot: &Slot<B>) -> MutexGuard<'_, Option<Upload<B>>> {
    slot.lock().unwrap_or_else(|poisoned| {
        let mut slot = poisoned.into_inner();
        if let Some(upload) = &mut *slot {
            // It panicked while it was polled. What is kept is whole; what it would say now need not be the rest.
            upload.rest = None;
        }
        slot
    })
}

fn wake<B>(upload: &mut Upload<B>) {
    if let Some(waiting) = upload.waiting.take() {
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        collections::VecDeque,
        panic::{AssertUnwindSafe, catch_unwind},
    };

    use http_body_util::{BodyExt as _, Empty, Full};
    use proptest::{collection::vec, prelude::*};
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    /// A body that does as it is told.
    #[derive(Clone, Debug)]
    struct Script {
        steps: VecDeque<Step>,
        size: Size,
        knows_its_end: bool,
        /// Whoever has the other end sees when the body is dropped.
        _alive: Arc<()>,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Data(Vec<u8>),
        Trailers(u16),
        Pending,
        Error,
        Panic,
    }

    #[derive(Clone, Copy, Debug)]
    enum Size {
        Exact,
        AtLeastHalf,
        BetweenHalfAndDouble,
        Unknown,
        /// Unknown as long as anything is left, as with a body that is generated.
        KnownAtItsEnd,
    }

    impl Script {
        fn new(steps: impl IntoIterator<Item = Step>) -> Self {
            Self {
                steps: steps.into_iter().collect(),
                size: Size::Unknown,
                knows_its_end: false,
                _alive: Arc::default(),
            }
        }

        fn of(pieces: impl IntoIterator<Item = &'static str>) -> Self {
            Self::new(pieces.into_iter().map(|piece| Step::Data(piece.into())))
        }

        /// Pieces, and then nothing more for good.
        fn stuck_after(pieces: impl IntoIterator<Item = &'static str>) -> Self {
            let mut script = Self::of(pieces);
            script.steps.extend(std::iter::repeat_n(Step::Pending, 100));
            script
        }
    }

    impl Body for Script {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(match self.steps.pop_front() {
                Some(Step::Data(data)) => Some(Ok(Frame::data(data.into()))),
                Some(Step::Trailers(number)) => Some(Ok(Frame::trailers(trailers(number)))),
                Some(Step::Error) => Some(Err("as told")),
                Some(Step::Panic) => panic!("as told"),
                Some(Step::Pending) => return Poll::Pending,
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

    fn trailers(number: u16) -> HeaderMap {
        HeaderMap::from_iter([("x-checksum".parse().unwrap(), number.into())])
    }

    fn memory() -> Arc<ReplayMemory> {
        Arc::new(ReplayMemory::new(usize::MAX))
    }

    fn keep_all<B: Body>(body: B) -> (ReplayBody<B>, Replay<B>) {
        ReplayBody::new(body, u64::MAX, &memory())
    }

    fn poll<B: Body + Unpin>(body: &mut B) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
    }

    /// What a peer has seen of an attempt.
    #[derive(Clone, Debug, PartialEq)]
    struct Seen {
        /// What decides how it is framed.
        size: (u64, Option<u64>),
        is_nothing: bool,
        bytes: Vec<u8>,
        trailers: Option<HeaderMap>,
        ended: Option<Ended>,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Ended {
        Complete,
        Failed,
    }

    impl Seen {
        fn before(body: &impl Body) -> Self {
            let (size, is_nothing) = (body.size_hint(), body.is_end_stream());
            Self {
                size: if is_nothing { (0, Some(0)) } else { (size.lower(), size.upper()) },
                is_nothing,
                bytes: Vec::new(),
                trailers: None,
                ended: None,
            }
        }

        fn all_of(mut body: impl Body<Data = Bytes> + Unpin) -> Self {
            let mut seen = Self::before(&body);
            seen.read(&mut body, usize::MAX);
            seen
        }

        /// Polls so many times, or up to the end.
        fn read(&mut self, body: &mut (impl Body<Data = Bytes> + Unpin), polls: usize) {
            for _ in 0..polls {
                if self.ended.is_some() || self.is_nothing {
                    return;
                }
                match poll(body) {
                    Poll::Pending => {}
                    Poll::Ready(None) => self.ended = Some(Ended::Complete),
                    Poll::Ready(Some(Err(_))) => self.ended = Some(Ended::Failed),
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(data) => {
                            assert!(self.trailers.is_none(), "data after the trailers");
                            self.bytes.extend_from_slice(&data);
                        }
                        Err(frame) => {
                            assert!(self.trailers.is_none(), "trailers twice");
                            self.trailers = Some(frame.into_trailers().unwrap());
                        }
                    },
                }
                if let (least, Some(most)) = self.size
                    && least == most
                {
                    assert_eq!(body.size_hint().exact(), Some(most - self.bytes.len() as u64), "what is left");
                }
                if body.is_end_stream() {
                    self.ended = self.ended.or(Some(Ended::Complete)); // as hyper believes it
                }
            }
        }

        fn is_start_of(&self, whole: &Self) -> bool {
            whole.bytes.starts_with(&self.bytes)
                && (self.size, self.is_nothing) == (whole.size, whole.is_nothing)
                && (self.trailers.is_none() || (&self.bytes, &self.trailers) == (&whole.bytes, &whole.trailers))
                && (self.ended.is_none() || self == whole)
        }
    }

    #[track_caller]
    fn assert_superseded<B>(body: &mut ReplayBody<B>)
    where
        B: Body + Unpin,
        B::Error: Into<BoxError>,
    {
        assert!(!body.is_end_stream());
        for _ in 0..2 {
            let Poll::Ready(Some(Err(error))) = poll(body) else { panic!("no error") };
            assert!(error.is::<Superseded>(), "{error}");
        }
        assert!(!body.is_end_stream());
    }

    fn script() -> impl Strategy<Value = Script> {
        let data = || vec(any::<u8>(), 0..20).prop_map(Step::Data);
        let step = prop_oneof![4 => data(), 1 => Just(Step::Data(Vec::new())), 1 => Just(Step::Pending)];
        let last = prop_oneof![
            4 => Just(None),
            2 => any::<u16>().prop_map(Step::Trailers).prop_map(Some),
            1 => Just(Some(Step::Error)),
        ];
        let size = prop_oneof![
            Just(Size::Exact),
            Just(Size::AtLeastHalf),
            Just(Size::BetweenHalfAndDouble),
            Just(Size::Unknown),
            Just(Size::KnownAtItsEnd),
        ];
        (vec(step, 0..8), last, size, any::<bool>()).prop_map(|(steps, last, size, knows_its_end)| Script {
            size,
            knows_its_end,
            ..Script::new(steps.into_iter().chain(last))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_was_read_before_the_next_attempt_is_the_plain_body(
            script in script(),
            attempts in vec(0_usize..12, 0..4),
            most in prop_oneof![2 => Just(u64::MAX), 1 => 0_u64..60],
        ) {
            let plain = Seen::all_of(script.clone());
            let too_long = script.size_hint().lower() > most;
            let memory = memory();
            let (mut attempt, mut replay) = ReplayBody::new(script, most, &memory);
            let mut seen = Seen::before(&attempt);
            let mut longest = 0;
            for polls in attempts {
                seen.read(&mut attempt, polls);
                prop_assert!(seen.is_start_of(&plain), "{seen:?} of {plain:?}");

                longest = longest.max(seen.bytes.len());
                let is_kept = longest == 0 || !too_long && longest as u64 <= most;
                let possible = is_kept && seen.ended != Some(Ended::Failed);
                prop_assert_eq!(replay.is_possible(), possible);
                prop_assert_eq!(memory.used(), if possible { longest } else { 0 });
                let Some(next) = replay.start_over() else {
                    prop_assert!(!possible);
                    break;
                };
                prop_assert!(possible);
                if !seen.is_nothing {
                    assert_superseded(&mut attempt);
                }
                attempt = next;
                seen = Seen::before(&attempt);
            }
            seen.read(&mut attempt, usize::MAX);
            prop_assert_eq!(&seen, &plain);
            drop(replay);
            prop_assert_eq!(memory.used(), 0);
        }

        #[test]
        fn an_early_answer_disturbs_no_attempt_and_frees_what_it_has_got(
            script in script(),
            first in 0_usize..12,
            second in 0_usize..12,
        ) {
            let plain = Seen::all_of(script.clone());
            let memory = memory();
            let (mut attempt, mut replay) = ReplayBody::new(script, u64::MAX, &memory);
            let mut before = Seen::before(&attempt);
            before.read(&mut attempt, first);
            prop_assume!(before.ended != Some(Ended::Failed));

            attempt = replay.start_over().unwrap();
            let mut seen = Seen::before(&attempt);
            seen.read(&mut attempt, second);
            replay.keep_no_longer();
            if !plain.is_nothing {
                prop_assert!(!replay.is_possible());
                prop_assert!(replay.start_over().is_none());
            }
            let kept = before.bytes.len();
            while seen.ended.is_none() && !seen.is_nothing {
                let is_given = seen.bytes.len() >= kept && (before.trailers.is_none() || seen.trailers.is_some());
                prop_assert_eq!(memory.used(), if is_given { 0 } else { kept });
                seen.read(&mut attempt, 1);
            }
            prop_assert_eq!(seen, plain);
            prop_assert_eq!(memory.used(), 0);
        }
    }

    #[test]
    fn an_attempt_that_is_over_ends_with_an_error_however_far_it_has_come() {
        for polls in 0..4 {
            let (mut first, mut replay) = keep_all(Script::of(["a", "b"]));
            Seen::before(&first).read(&mut first, polls);
            let mut second = replay.start_over().unwrap();
            assert_superseded(&mut first);
            Seen::before(&second).read(&mut second, polls);
            let third = replay.start_over().unwrap();
            assert_superseded(&mut first);
            assert_superseded(&mut second);
            assert_eq!(Seen::all_of(third).bytes, b"ab");
        }
    }

    #[test]
    fn an_attempt_that_waits_is_woken_when_it_is_over() {
        for give_up in [false, true] {
            let (mut first, mut replay) = keep_all(Script::stuck_after([]));
            let mut other_task = task::spawn(());
            let mut this_task = task::spawn(());
            other_task.enter(|cx, _| assert_pending!(Pin::new(&mut first).poll_frame(cx)));
            this_task.enter(|cx, _| assert_pending!(Pin::new(&mut first).poll_frame(cx))); // hyper has moved it
            let _second = if give_up {
                replay.give_up();
                None
            } else {
                replay.start_over()
            };
            assert!(this_task.is_woken() && !other_task.is_woken());
            assert_superseded(&mut first);
        }
    }

    #[test]
    fn the_second_attempt_is_woken_by_the_body_and_when_it_is_over_too() {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
        let (mut first, mut replay) = keep_all(Received(receiver));
        assert_pending!(poll(&mut first));
        let mut second = task::spawn(replay.start_over().unwrap());
        assert_pending!(second.enter(|cx, body| body.poll_frame(cx)));

        sender.try_send(Ok(Frame::data("a".into()))).unwrap();
        assert!(second.is_woken());
        assert_ready!(second.enter(|cx, body| body.poll_frame(cx))).unwrap().unwrap();
        assert_pending!(second.enter(|cx, body| body.poll_frame(cx)));

        replay.give_up();
        assert!(second.is_woken());
        assert!(sender.is_closed(), "the body is still there");
        assert_superseded(&mut second);
    }

    struct Received(tokio::sync::mpsc::Receiver<Result<Frame<Bytes>, BoxError>>);

    impl Body for Received {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            self.0.poll_recv(cx)
        }
    }

    #[test]
    fn giving_up_drops_the_body_and_what_is_kept_while_the_attempt_is_still_held() {
        let script = Script::of(["a", "b", "c"]);
        let alive = Arc::downgrade(&script._alive);
        let memory = memory();
        let (mut first, replay) = ReplayBody::new(script, u64::MAX, &memory);
        Seen::before(&first).read(&mut first, 2);
        replay.give_up();
        assert!(alive.upgrade().is_none());
        assert_eq!(memory.used(), 0);
        assert_superseded(&mut first);
    }

    #[test]
    fn what_is_kept_no_longer_is_not_sent_again_whether_or_not_the_attempt_is_still_held() {
        for held in [true, false] {
            let (body, mut replay) = keep_all(Script::of(["a"]));
            let _body = held.then_some(body);
            replay.keep_no_longer();
            assert!(!replay.is_possible() && replay.start_over().is_none());
        }
    }

    #[test]
    fn an_attempt_that_is_over_holds_neither_the_body_nor_what_is_kept() {
        let script = Script::of(["a", "b", "c"]);
        let alive = Arc::downgrade(&script._alive);
        let memory = memory();
        let (mut first, mut replay) = ReplayBody::new(script, u64::MAX, &memory);
        Seen::before(&first).read(&mut first, 2);
        let second = replay.start_over().unwrap();
        assert_eq!((memory.used(), alive.strong_count()), (2, 1));

        drop((second, replay)); // the caller went away
        assert_eq!((memory.used(), alive.strong_count()), (0, 0));
        assert_superseded(&mut first);
    }

    #[test]
    fn the_limit_is_the_last_length_that_is_kept() {
        for pieces in [vec!["abcd"], vec!["ab", "cd"], vec!["abc", "", "d"], vec!["", "a", "b", "c", "d"]] {
            for (most, possible) in [(3, false), (4, true), (5, true)] {
                let memory = memory();
                let (mut body, mut replay) = ReplayBody::new(Script::of(pieces.clone()), most, &memory);
                let mut seen = Seen::before(&body);
                seen.read(&mut body, usize::MAX);
                assert_eq!((seen.ended, &*seen.bytes), (Some(Ended::Complete), &b"abcd"[..]));
                assert_eq!(replay.start_over().is_some(), possible, "{pieces:?}, {most}");
                assert_eq!(memory.used(), if possible { 4 } else { 0 });
                assert_eq!(memory.refused(), 0);
            }
        }
    }

    #[test]
    fn a_body_that_is_known_to_be_too_long_is_not_kept_but_can_be_sent_again_while_it_is_whole() {
        let memory = memory();
        let (unread, mut replay) = ReplayBody::new(Full::<Bytes>::from("abcd"), 3, &memory);
        drop(unread); // the connection was refused
        let mut body = replay.start_over().unwrap();
        assert!(poll(&mut body).is_ready());
        assert!(!replay.is_possible() && replay.start_over().is_none());
        assert_eq!(memory.used(), 0);
        assert!(body.is_end_stream());
    }

    #[test]
    fn all_bodies_of_a_layer_share_its_memory() {
        let memory = Arc::new(ReplayMemory::new(10));
        let sent = |text: &'static str| {
            let (body, replay) = ReplayBody::new(Script::of([&text[..1], &text[1..]]), u64::MAX, &memory);
            assert_eq!(Seen::all_of(body).bytes, text.as_bytes());
            replay
        };
        let six = sent("abcdef");
        let mut four = sent("abcd");
        assert_eq!((memory.used(), memory.refused()), (10, 0));
        let one_more = sent("a");
        assert!(six.is_possible() && four.is_possible() && !one_more.is_possible());
        assert_eq!((memory.used(), memory.refused()), (10, 1));
        drop(six);
        assert_eq!(memory.used(), 4);
        let too_long = sent("abcdefg");
        assert!(!too_long.is_possible());
        assert_eq!((memory.used(), memory.refused()), (4, 2));
        four.keep_no_longer();
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn a_body_that_failed_cannot_be_sent_again_and_never_ends() {
        let memory = memory();
        let steps = [Step::Data(b"a".into()), Step::Error, Step::Data(b"b".into())];
        let (mut body, mut replay) = ReplayBody::new(Script::new(steps), u64::MAX, &memory);
        assert_ready!(poll(&mut body)).unwrap().unwrap();
        assert_eq!(assert_ready!(poll(&mut body)).unwrap().unwrap_err().to_string(), "as told");
        assert!(!replay.is_possible() && replay.start_over().is_none());
        assert_eq!(memory.used(), 0);
        for _ in 0..2 {
            assert!(assert_ready!(poll(&mut body)).unwrap().unwrap_err().is::<BrokenOff>());
            assert!(!body.is_end_stream());
        }
    }

    #[test]
    fn a_body_that_panicked_cannot_be_sent_again_and_never_ends() {
        let steps = [Step::Data(b"a".into()), Step::Panic, Step::Data(b"c".into())];
        let script = Script::new(steps);
        let alive = Arc::downgrade(&script._alive);
        let memory = memory();
        let (mut body, mut replay) = ReplayBody::new(script, u64::MAX, &memory);
        assert_ready!(poll(&mut body)).unwrap().unwrap();
        catch_unwind(AssertUnwindSafe(|| poll(&mut body).is_ready())).unwrap_err();

        assert!(!replay.is_possible() && replay.start_over().is_none());
        assert!(assert_ready!(poll(&mut body)).unwrap().unwrap_err().is::<BrokenOff>());
        assert!(!body.is_end_stream());
        assert!(alive.upgrade().is_none());
        drop(replay);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn trailers_are_the_last_of_every_attempt() {
        let steps = [Step::Data(b"a".into()), Step::Trailers(1), Step::Data(b"b".into()), Step::Trailers(2)];
        let (mut first, mut replay) = keep_all(Script::new(steps));
        let mut seen = Seen::before(&first);
        seen.read(&mut first, usize::MAX);
        assert_eq!((&*seen.bytes, &seen.trailers), (&b"a"[..], &Some(trailers(1))));
        assert_eq!(Seen::all_of(replay.start_over().unwrap()), seen);
    }

    #[test]
    fn an_empty_body_that_does_not_say_so_is_framed_alike_each_time() {
        let (mut first, mut replay) = keep_all(Script::new([]));
        assert!(!first.is_end_stream());
        assert!(assert_ready!(poll(&mut first)).is_none());
        assert!(first.is_end_stream());
        let mut second = replay.start_over().unwrap();
        assert!(!second.is_end_stream());
        assert!(assert_ready!(poll(&mut second)).is_none());
        assert!(second.is_end_stream());
    }

    #[test]
    fn a_body_of_one_piece_is_not_copied() {
        let piece = Bytes::from(vec![1; 1000]);
        let (mut body, mut replay) = keep_all(Full::new(piece.clone()));
        for _ in 0..3 {
            let data = assert_ready!(poll(&mut body)).unwrap().unwrap().into_data().unwrap();
            assert_eq!(data.as_ptr(), piece.as_ptr());
            assert!(body.is_end_stream());
            body = replay.start_over().unwrap();
            assert_eq!(body.size_hint().exact(), Some(1000));
        }
    }

    #[test]
    fn an_empty_body_is_nothing_at_all() {
        let memory = memory();
        let (body, mut replay) = ReplayBody::new(Empty::<Bytes>::new(), 0, &memory);
        assert!(body.upload.is_none() && replay.upload.is_none());
        assert!(body.is_end_stream() && replay.is_possible());
        let (mut first, mut second) = (body, replay.start_over().unwrap());
        replay.give_up();
        for body in [&mut first, &mut second] {
            assert_eq!(body.size_hint().exact(), Some(0));
            assert!(assert_ready!(poll(body)).is_none());
        }
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn data_of_any_kind_becomes_bytes() {
        let mut ring = VecDeque::from(vec![0; 8]);
        ring.rotate_left(5);
        ring.clear();
        ring.extend([1, 2, 3]);
        ring.push_front(0); // in two slices
        let (first, mut replay) = keep_all(Full::new(ring));
        assert_eq!(Seen::all_of(first).bytes, [0, 1, 2, 3]);
        assert_eq!(Seen::all_of(replay.start_over().unwrap()).bytes, [0, 1, 2, 3]);
    }

    #[test]
    fn a_body_that_is_taken_leaves_an_empty_one_behind() {
        let (mut body, _replay) = keep_all(Script::of(["a"]));
        let taken = body.take();
        assert!(body.is_end_stream());
        assert_eq!(Seen::all_of(taken).bytes, b"a");
    }

    #[tokio::test]
    async fn the_default_body_is_the_default_of_the_body_inside() {
        assert!(ReplayBody::<Full<Bytes>>::default().is_end_stream());

        struct Ten(Full<Bytes>);
        impl Default for Ten {
            fn default() -> Self {
                Self(Full::new(Bytes::from_static(&[0; 10])))
            }
        }
        impl Body for Ten {
            type Data = Bytes;
            type Error = std::convert::Infallible;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
                Pin::new(&mut self.0).poll_frame(cx)
            }
        }
        assert_eq!(ReplayBody::<Ten>::default().collect().await.unwrap().to_bytes().len(), 10);
    }

    #[test]
    fn it_is_send_and_sync_for_a_body_that_is_send() {
        fn send_and_sync<T: Send + Sync>() {}
        struct SendOnly(#[allow(dead_code)] Cell<u8>);
        send_and_sync::<ReplayBody<SendOnly>>();
        send_and_sync::<Replay<SendOnly>>();
    }

    #[test]
    fn an_attempt_that_is_over_on_another_thread_sends_nothing_of_the_rest() {
        // Whichever comes first, a byte goes to one attempt or to none; it is never lost to the second one.
        for _ in 0..200 {
            let (mut first, mut replay) = keep_all(Script::of(["a", "b", "c", "d"]));
            let reading = std::thread::spawn(move || {
                let mut seen = Seen::before(&first);
                seen.read(&mut first, usize::MAX);
                seen
            });
            let second = replay.start_over().unwrap();
            let first = reading.join().unwrap();
            assert!(b"abcd".starts_with(&first.bytes));
            assert!(first.ended == Some(Ended::Failed) || first.bytes == b"abcd");
            assert_eq!(Seen::all_of(second).bytes, b"abcd");
        }
    }
}
