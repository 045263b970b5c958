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

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName,
    header::{AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION},
};
use http_body::{Body, Frame, SizeHint};

use super::into_bytes;
use crate::{
    error::{BoxError, FalAuthError, foreign::causes},
    events,
    wire::header::USER_ID,
};

/// What no trailer may bring to fal: a credential, or the account that it acts for. A server may take trailers for
/// headers (RFC 9110, 6.5.1), and these would stand beside the header of [`FalAuth`](crate::FalAuth).
const NOT_IN_TRAILERS: [HeaderName; 4] = [AUTHORIZATION, PROXY_AUTHORIZATION, COOKIE, USER_ID];

/// A request body that can be sent again.
///
/// While the first attempt streams the body `B`, what has passed is kept. A second attempt gets that, and then the
/// rest of `B`; whichever attempt is not the latest one ends with an error, never with an end that would look like a
/// complete body. Trailers and the size hint are the same each time, so the framing is too. The trailers
/// `authorization`, `proxy-authorization`, `cookie` and `x-fal-user-id` are left out.
///
/// Nothing is copied for a body of one piece, such as `Full<Bytes>`; an empty body is not even shared. What is longer
/// than the layer's [`max_body`](crate::FalRetryLayer::max_body) is streamed and not kept; trailers count as part of it.
/// A first piece that is a slice of a larger buffer keeps the whole buffer alive, and only the slice is counted: `Bytes`
/// does not tell. Where that matters, let the body begin with a copy of it.
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
    /// Why `rest` broke off, if the body said so.
    failure: Option<BodyFailed>,
    /// The size of the whole, as the body itself stated it.
    hint: SizeHint,
    kept: Kept,
    /// Whether this attempt has begun, and how many bytes it has got.
    begun: bool,
    sent: u64,
    /// The task that waits for more of the body. It is woken when there will be no more.
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
            failure: None,
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

    /// Whether it is sure before the first attempt that a further one can be the whole body.
    pub(crate) fn is_certain(&self) -> bool {
        let is_short = |upload: &Upload<B>| upload.hint.upper().is_some_and(|upper| upper <= upload.kept.most);
        self.is_empty || self.upload.as_ref().is_some_and(|slot| lock(slot).as_ref().is_some_and(is_short))
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

    /// Whether no attempt has the upload any more, so that dropping this frees what is kept of it.
    fn attempt_is_gone(&self) -> bool {
        self.upload.as_ref().is_none_or(|slot| Arc::strong_count(slot) == 1)
    }

    /// The error of an attempt, with the body's error among its causes if that is why it failed. Over HTTP/2, hyper keeps
    /// the body's error to itself.
    pub(crate) fn with_cause(&self, error: FalAuthError) -> FalAuthError {
        let failure = || self.upload.as_ref().and_then(|slot| lock(slot).as_ref()?.failure.clone());
        match error {
            FalAuthError::Transport(client) if !causes(&*client).any(<dyn Error>::is::<BodyFailed>) => {
                FalAuthError::Transport(match failure() {
                    Some(body) => NotSentWhole { client, body }.into(),
                    None => client,
                })
            }
            error => error,
        }
    }

    /// The request has failed: the upload ends with an error, and the body is dropped immediately.
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

    /// Why there is no more of the body.
    fn broken_off(&self) -> BoxError {
        self.failure.clone().map_or_else(|| BrokenOff.into(), Into::into)
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
            return Poll::Ready(if self.ended { None } else { Some(Err(self.broken_off())) });
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
                self.failure = Some(BodyFailed(error.into().into()));
                return Poll::Ready(Some(Err(self.broken_off())));
            }
            None => {
                self.rest = None;
                self.ended = true;
                return Poll::Ready(None);
            }
        };
        let frame = match frame.into_data() {
            Ok(data) => {
                let data = into_bytes(data);
                self.sent += data.len() as u64;
                self.kept.keep(&data);
                Frame::data(data)
            }
            Err(frame) => {
                let Ok(mut trailers) = frame.into_trailers() else { return Poll::Ready(Some(Err(BrokenOff.into()))) };
                // Trailers are the last frame. A frame after them would come before them on the replay.
                (self.rest, self.ended) = (None, true);
                for name in &NOT_IN_TRAILERS {
                    trailers.remove(name);
                }
                self.kept.keep_trailers(&trailers);
                Frame::trailers(trailers)
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        // Only once polling has begun. Otherwise a body that turned out empty would be framed as "no body" on the replay
        // and as a chunked empty body on the first attempt.
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
        if !self.reserve(data.len()) {
            self.give_up();
        } else if self.first.is_none() {
            self.first = Some(data.clone());
            self.given += 1;
        } else {
            self.more.get_or_insert_default().open.extend_from_slice(data);
        }
    }

    fn keep_trailers(&mut self, trailers: &HeaderMap) {
        if !self.keeping {
            return;
        }
        if self.reserve(weight(trailers)) {
            self.more.get_or_insert_default().trailers = Some(trailers.clone());
            self.trailers_given = true;
        } else {
            self.give_up();
        }
    }

    /// Whether there is room for so many bytes more: within one body, and among all of them.
    fn reserve(&mut self, bytes: usize) -> bool {
        let fits = (self.reserved.bytes as u64).saturating_add(bytes as u64) <= self.most;
        fits && self.reserved.grow(bytes)
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
#[derive(Debug, thiserror::Error)]
#[error("the upload was given up: the request was answered before the upload had ended")]
struct Superseded;

/// The caller's body ended with this error. It is shared: the attempt gets it, and so does the request's own error.
#[derive(Clone, Debug)]
struct BodyFailed(Arc<dyn Error + Send + Sync>);

impl fmt::Display for BodyFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request body ended with an error before it was complete")
    }
}

impl Error for BodyFailed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0) // the error, and not the `Arc`, which is an error as well and cannot be downcast to it
    }
}

/// The client's error in its own words, and what is behind it.
#[derive(Debug, thiserror::Error)]
#[error("{client}")]
struct NotSentWhole {
    client: BoxError,
    #[source]
    body: BodyFailed,
}

/// The body has broken off without an error of its own.
#[derive(Debug, thiserror::Error)]
#[error("the request body ended with an error before it was complete")]
struct BrokenOff;

/// What trailers take up in memory, as HTTP/2 counts it: 32 bytes for each, plus its name and its value.
fn weight(trailers: &HeaderMap) -> usize {
    trailers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

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
mod tests;
