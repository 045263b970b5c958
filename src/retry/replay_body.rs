use std::{
    error::Error,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    attempt: Option<Attempt<B>>,
}

/// One attempt to send an upload.
struct Attempt<B> {
    upload: Arc<Mutex<Upload<B>>>,
    number: u32,
}

/// The hold on an upload of whoever may send it again.
pub(crate) struct Replay<B> {
    upload: Option<Arc<Mutex<Upload<B>>>>,
}

struct Upload<B> {
    /// The attempt that may go on. All others are over.
    current: u32,
    /// What has not been read yet. `None` when it was given up or broke off.
    rest: Option<B>,
    ended: bool,
    /// The size of the whole, as the body itself told it.
    hint: SizeHint,
    kept: Kept,
    /// How many bytes the current attempt has got.
    sent: u64,
    /// Whoever waits for more of the body; to be told that it will not come.
    waiting: Option<Waker>,
}

/// What has been read, for the next attempt.
struct Kept {
    keeping: bool,
    /// As it came: a body of one piece is not copied.
    first: Option<Bytes>,
    /// Pieces that an earlier attempt has sealed.
    sealed: Vec<Bytes>,
    /// All further ones, copied: a small piece of a large buffer would keep the whole of it.
    open: BytesMut,
    trailers: Option<HeaderMap>,
    /// How many of the pieces the current attempt has got, and whether it has got the trailers.
    given: usize,
    trailers_given: bool,
    reserved: Reservation,
    most: u64,
}

impl<B: Body> ReplayBody<B> {
    /// The first attempt, and the hold by which there may be a second one.
    pub(crate) fn new(body: B, most: u64, memory: &Arc<ReplayMemory>) -> (Self, Replay<B>) {
        if body.is_end_stream() {
            return (Self { attempt: None }, Replay { upload: None });
        }
        let hint = body.size_hint();
        let upload = Arc::new(Mutex::new(Upload {
            current: 0,
            kept: Kept::new(hint.lower() <= most, most, Arc::clone(memory)),
            rest: Some(body),
            ended: false,
            hint,
            sent: 0,
            waiting: None,
        }));
        (Self { attempt: Some(Attempt { upload: Arc::clone(&upload), number: 0 }) }, Replay { upload: Some(upload) })
    }
}

impl<B> ReplayBody<B> {
    /// The body; an empty one stays behind.
    pub(crate) fn take(&mut self) -> Self {
        Self { attempt: self.attempt.take() }
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
        match &self.attempt {
            None => Poll::Ready(None),
            Some(attempt) => lock(&attempt.upload).poll_frame(attempt.number, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.attempt.as_ref().is_none_or(|attempt| lock(&attempt.upload).is_end_stream(attempt.number))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.attempt {
            None => SizeHint::with_exact(0),
            Some(attempt) => lock(&attempt.upload).size_hint(attempt.number),
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
        self.upload.as_ref().is_none_or(|upload| lock(upload).is_replayable())
    }

    /// Takes the upload away from the attempt that has it, however far that has come, for another one. `None` when
    /// it cannot be sent again.
    pub(crate) fn start_over(&self) -> Option<ReplayBody<B>> {
        let Some(upload) = &self.upload else { return Some(ReplayBody { attempt: None }) };
        let mut taken = lock(upload);
        if !taken.is_replayable() {
            return None;
        }
        let waiting = taken.supersede();
        taken.kept.rewind();
        taken.sent = 0;
        let number = taken.current;
        drop(taken);
        wake(waiting);
        Some(ReplayBody { attempt: Some(Attempt { upload: Arc::clone(upload), number }) })
    }

    /// The answer is there and needs no further attempt: nothing is kept any more, while the upload may go on.
    pub(crate) fn keep_no_longer(&self) {
        if let Some(upload) = &self.upload {
            lock(upload).kept.give_up();
        }
    }

    /// The request has failed: the upload ends with an error, and the body is dropped, now.
    pub(crate) fn give_up(&self) {
        let Some(upload) = &self.upload else { return };
        let mut taken = lock(upload);
        let waiting = taken.supersede();
        let rest = taken.rest.take();
        taken.kept.release();
        drop(taken);
        drop(rest); // somebody else's code: not under our lock
        wake(waiting);
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

    fn supersede(&mut self) -> Option<Waker> {
        self.current += 1;
        self.waiting.take()
    }
}

impl<B> Upload<B>
where
    B: Body + Unpin,
    B::Error: Into<BoxError>,
{
    fn poll_frame(&mut self, attempt: u32, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if attempt != self.current {
            return Poll::Ready(Some(Err(Superseded.into())));
        }
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
                self.kept.keep_trailers(&trailers);
                Frame::trailers(trailers)
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self, attempt: u32) -> bool {
        attempt == self.current
            && self.kept.is_given()
            && (self.ended || self.rest.as_ref().is_some_and(Body::is_end_stream))
    }

    fn size_hint(&self, attempt: u32) -> SizeHint {
        if attempt != self.current {
            return SizeHint::default();
        }
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
    fn new(keeping: bool, most: u64, memory: Arc<ReplayMemory>) -> Self {
        Self {
            keeping,
            first: None,
            sealed: Vec::new(),
            open: BytesMut::new(),
            trailers: None,
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
            self.open.extend_from_slice(data);
        }
    }

    fn keep_trailers(&mut self, trailers: &HeaderMap) {
        if self.keeping {
            self.trailers = Some(trailers.clone());
            self.trailers_given = true;
        }
    }

    /// What the current attempt gets before the rest of the body.
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let piece = match self.given.checked_sub(usize::from(self.first.is_some())) {
            None => self.first.clone(),
            Some(index) => self.sealed.get(index).cloned(),
        };
        let frame = if let Some(piece) = piece {
            self.given += 1;
            Frame::data(piece)
        } else if !self.trailers_given {
            self.trailers_given = true;
            Frame::trailers(self.trailers.clone()?)
        } else {
            return None;
        };
        self.release_if_given();
        Some(frame)
    }

    /// Whether the current attempt has got all of it.
    fn is_given(&self) -> bool {
        self.given == usize::from(self.first.is_some()) + self.sealed.len()
            && (self.trailers.is_none() || self.trailers_given)
    }

    /// For a new attempt, from the start.
    fn rewind(&mut self) {
        if !self.open.is_empty() {
            self.sealed.push(self.open.split().freeze());
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
        (self.first, self.sealed, self.open, self.trailers) = (None, Vec::new(), BytesMut::new(), None);
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
        self.memory.used.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
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

fn lock<B>(upload: &Mutex<Upload<B>>) -> MutexGuard<'_, Upload<B>> {
    // A body that panics while it is polled is its owner's to see; what is kept of it is whole.
    upload.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(waiting: Option<Waker>) {
    if let Some(waiting) = waiting {
        waiting.wake();
    }
}
