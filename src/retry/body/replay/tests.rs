use std::{
    cell::Cell,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
};

use http_body_util::{BodyExt as _, Empty, Full};
use proptest::{collection::vec, prelude::*};
use tokio_test::{assert_pending, assert_ready, task};

use super::{
    super::script::{Script, Size, Step, trailers},
    *,
};

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

    /// What keeping it takes.
    fn length(&self) -> usize {
        let trailers = self.trailers.iter().flatten().map(|(_, value)| "x-checksum".len() + value.len() + 32);
        self.bytes.len() + trailers.sum::<usize>()
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

            longest = longest.max(seen.length());
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
    fn an_early_answer_disturbs_no_attempt(
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
        let kept = before.length();
        while seen.ended.is_none() && !seen.is_nothing {
            let is_given = seen.length() >= kept;
            prop_assert_eq!(memory.used(), if is_given { 0 } else { kept });
            seen.read(&mut attempt, 1);
        }
        prop_assert_eq!(seen, plain);
        prop_assert_eq!(memory.used(), 0);
    }
}

#[test]
fn an_attempt_that_is_over_ends_with_an_error() {
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
fn the_second_attempt_is_woken_like_the_first() {
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
fn giving_up_drops_the_body_of_an_attempt_that_is_held() {
    let script = Script::of(["a", "b", "c"]);
    let alive = Arc::downgrade(&script.alive);
    let memory = memory();
    let (mut first, replay) = ReplayBody::new(script, u64::MAX, &memory);
    Seen::before(&first).read(&mut first, 2);
    replay.give_up();
    assert!(alive.upgrade().is_none());
    assert_eq!(memory.used(), 0);
    assert_superseded(&mut first);
}

#[test]
fn what_is_kept_no_longer_is_not_sent_again() {
    for held in [true, false] {
        let (body, mut replay) = keep_all(Script::of(["a"]));
        let _body = held.then_some(body);
        replay.keep_no_longer();
        assert!(!replay.is_possible() && replay.start_over().is_none());
    }
}

#[test]
fn an_attempt_that_is_over_holds_nothing() {
    let script = Script::of(["a", "b", "c"]);
    let alive = Arc::downgrade(&script.alive);
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
fn a_body_that_is_too_long_can_be_sent_again_while_it_is_whole() {
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
    for _ in 0..3 {
        let error = assert_ready!(poll(&mut body)).unwrap().unwrap_err();
        assert_eq!(error.downcast::<BodyFailed>().unwrap().source().unwrap().to_string(), "as scripted");
        assert!(!body.is_end_stream());
        assert!(!replay.is_possible() && replay.start_over().is_none());
        assert_eq!(memory.used(), 0);
    }
}

#[test]
fn a_body_that_panicked_cannot_be_sent_again_and_never_ends() {
    let steps = [Step::Data(b"a".into()), Step::Panic, Step::Data(b"c".into())];
    let script = Script::new(steps);
    let alive = Arc::downgrade(&script.alive);
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
fn trailers_count_as_part_of_the_body() {
    // A byte, and `x-checksum: 1` with 32 bytes for itself.
    for (most, possible) in [(43, false), (44, true)] {
        let memory = memory();
        let script = Script::new([Step::Data(b"a".into()), Step::Trailers(1)]);
        let (mut body, mut replay) = ReplayBody::new(script, most, &memory);
        let mut seen = Seen::before(&body);
        seen.read(&mut body, usize::MAX);
        assert_eq!(seen.trailers, Some(trailers(1)));
        assert_eq!(memory.used(), if possible { 44 } else { 0 });
        assert_eq!(replay.start_over().is_some(), possible, "{most}");
    }
}

#[test]
fn trailers_for_which_no_memory_is_left_are_sent_and_not_kept() {
    let memory = Arc::new(ReplayMemory::new(43));
    let script = Script::new([Step::Data(b"a".into()), Step::Trailers(1)]);
    let (mut body, replay) = ReplayBody::new(script, u64::MAX, &memory);
    let mut seen = Seen::before(&body);
    seen.read(&mut body, usize::MAX);
    assert_eq!((seen.ended, seen.trailers), (Some(Ended::Complete), Some(trailers(1))));
    assert!(!replay.is_possible());
    assert_eq!((memory.used(), memory.refused()), (0, 1));
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
fn an_attempt_over_on_another_thread_sends_nothing_more() {
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
