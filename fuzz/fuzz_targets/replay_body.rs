//! Whatever a body says and in whatever order things happen to it: the attempt that has the upload sends the plain
//! body, every other one fails, and the memory is paid back.

#![no_main]

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use arbitrary::Arbitrary;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use libfuzzer_sys::fuzz_target;
use tower_fal::__fuzz::{Replay, ReplayBody, ReplayMemory, take};

#[derive(Arbitrary, Debug)]
struct Input {
    script: Script,
    most: u8,
    memory: u8,
    events: Vec<Event>,
}

#[derive(Arbitrary, Clone, Debug)]
struct Script {
    steps: VecDeque<Step>,
    size: Size,
    knows_its_end: bool,
}

#[derive(Arbitrary, Clone, Debug)]
enum Step {
    Data(Vec<u8>),
    Trailers(u8),
    Pending,
    Error,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    Exact,
    /// Whatever it says, right or wrong.
    Says(u8, Option<u8>),
    Unknown,
    KnownAtItsEnd,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Event {
    Poll,
    PollOneThatIsOver(u8),
    StartOver,
    Take,
    DropAttempt,
    KeepNoLonger,
    GiveUp,
    DropReplay,
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        Poll::Ready(match self.steps.pop_front() {
            Some(Step::Data(data)) => Some(Ok(Frame::data(data.into()))),
            Some(Step::Trailers(number)) => Some(Ok(Frame::trailers(trailers(number)))),
            Some(Step::Error) => Some(Err("as told")),
            Some(Step::Pending) => return Poll::Pending,
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        match self.size {
            Size::Exact => hint.set_exact(self.length()),
            Size::Says(lower, more) => {
                hint.set_lower(lower.into());
                if let Some(more) = more {
                    hint.set_upper(u64::from(lower) + u64::from(more));
                }
            }
            Size::KnownAtItsEnd if self.steps.is_empty() => hint.set_exact(0),
            Size::KnownAtItsEnd | Size::Unknown => {}
        }
        hint
    }
}

impl Script {
    fn length(&self) -> u64 {
        self.steps.iter().map(|step| if let Step::Data(data) = step { data.len() as u64 } else { 0 }).sum()
    }
}

fn trailers(number: u8) -> HeaderMap {
    HeaderMap::from_iter([("x-checksum".parse().expect("a name"), u16::from(number).into())])
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
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
    fn before<B: Body>(body: &B) -> Self {
        let (size, is_nothing) = (body.size_hint(), body.is_end_stream());
        let size = if is_nothing { (0, Some(0)) } else { (size.lower(), size.upper()) };
        Self { size, is_nothing, ended: is_nothing.then_some(Ended::Complete), ..Self::default() }
    }

    fn poll<B: Body<Data = Bytes> + Unpin>(&mut self, body: &mut B) {
        match Pin::new(&mut *body).poll_frame(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => {}
            Poll::Ready(None) => {
                assert!(self.ended != Some(Ended::Failed), "an end after an error");
                self.ended = Some(Ended::Complete);
            }
            Poll::Ready(Some(Err(_))) => {
                assert!(self.ended != Some(Ended::Complete), "an error after the end");
                self.ended = Some(Ended::Failed);
            }
            Poll::Ready(Some(Ok(frame))) => {
                assert!(self.ended.is_none(), "a frame after the end");
                match frame.into_data() {
                    Ok(data) => {
                        assert!(self.trailers.is_none(), "data after trailers");
                        self.bytes.extend_from_slice(&data);
                    }
                    Err(frame) => {
                        assert!(self.trailers.is_none(), "trailers twice");
                        self.trailers = frame.into_trailers().ok();
                    }
                }
            }
        }
        if self.ended.is_none() && (self.trailers.is_some() || body.is_end_stream()) {
            self.ended = Some(Ended::Complete); // as hyper believes it
        }
    }

    fn finish<B: Body<Data = Bytes> + Unpin>(&mut self, body: &mut B) {
        while self.ended.is_none() {
            self.poll(body);
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

fn assert_over(body: &mut ReplayBody<Script>) {
    assert!(!body.is_end_stream());
    let polled = Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Some(Err(_)))), "{polled:?}");
}

fuzz_target!(|input: Input| {
    let Input { script, most, memory, events } = input;
    let mut plain = Seen::before(&script);
    plain.finish(&mut script.clone());

    let memory = ReplayMemory::new(memory.into());
    let (attempt, replay) = Replay::new(script, most.into(), &memory);
    let mut replay = Some(replay);
    let mut current = Some((Seen::before(&attempt), attempt));
    let mut over = Vec::new();
    let mut longest = 0;
    for event in events {
        match event {
            Event::Poll => {
                if let Some((seen, body)) = &mut current {
                    seen.poll(body);
                    assert!(seen.is_start_of(&plain), "{seen:?} of {plain:?}");
                    longest = longest.max(seen.length());
                }
            }
            Event::PollOneThatIsOver(which) => {
                if let Some(which) = usize::from(which).checked_rem(over.len()) {
                    assert_over(&mut over[which]);
                }
            }
            Event::StartOver => {
                let Some(replay) = &mut replay else { continue };
                let possible = replay.is_possible();
                let next = replay.start_over();
                assert_eq!(next.is_some(), possible);
                if let Some(next) = next {
                    if let Some((seen, body)) = current.replace((Seen::before(&next), next))
                        && !seen.is_nothing
                    {
                        assert!(seen.ended != Some(Ended::Failed));
                        over.push(body);
                    }
                }
            }
            Event::Take => {
                if let Some((_, body)) = &mut current {
                    let taken = take(body);
                    assert!(body.is_end_stream());
                    *body = taken;
                }
            }
            Event::DropAttempt => current = None,
            Event::KeepNoLonger => {
                if let Some(replay) = &mut replay {
                    replay.keep_no_longer();
                    assert!(plain.is_nothing || !replay.is_possible());
                }
            }
            Event::GiveUp => {
                let Some(replay) = &mut replay else { continue };
                replay.give_up();
                if plain.is_nothing {
                    continue;
                }
                assert!(!replay.is_possible());
                assert_eq!(memory.used(), 0);
                current.iter_mut().for_each(|(_, body)| assert_over(body));
                over.iter_mut().for_each(assert_over);
                return;
            }
            Event::DropReplay => replay = None,
        }
        if replay.as_ref().is_some_and(Replay::is_possible) {
            assert_eq!(memory.used(), longest); // what is kept is what was read, and all of it
        }
        assert!(memory.used() <= most.into());
    }
    if let Some((seen, body)) = &mut current {
        seen.finish(body);
        assert_eq!(*seen, plain);
    }
    drop(replay);
    assert_eq!(memory.used(), 0);
    over.iter_mut().for_each(assert_over);
});
