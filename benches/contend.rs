//! What a second core costs: `cargo bench --bench contend`.
//!
//! Two threads send at the same time through services that were cloned from one. In the last column somebody gives it
//! a new key every 10 µs, on a core of his own: on a machine with two there is one reader then, and else there are two.
//! What is measured is a call, polled to its end, and dropping the request and its response, since both
//! the first and the last clone of a header's value count; making the request is not. The threads begin each batch
//! together, so that they do run at the same time.
//!
//! The ratios are to one reader of the same case. On a busy machine they need a scheduler that lets two threads run
//! at the same time: `chrt --fifo 1 cargo bench --bench contend`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

use std::{
    convert::Infallible,
    hint::{black_box, spin_loop},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use http::{Request, Response};
use tower::Service;

use self::peers::{Peer, Visit, exchange, forget_sent, request};

mod peers;

const BATCH: usize = 32;
const ROTATE_EVERY: Duration = Duration::from_micros(10);

fn main() {
    let (rounds, batches) = if std::env::args().any(|argument| argument == "--test") { (1, 2) } else { (11, 1000) };
    let mut cases = Cases(Vec::new());
    peers::visit_all(&mut cases);
    for _ in 0..rounds {
        for case in &mut cases.0 {
            for (samples, setting) in case.samples.iter_mut().zip(settings()) {
                samples.push((case.measure)(setting, batches));
            }
        }
    }
    println!(
        "| case | 1 reader, ns | 2 readers | ratio | cloned, 1 reader | 2 readers | ratio | with a writer | ratio |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|");
    for case in &cases.0 {
        let [one, two, one_cloned, two_cloned, rotated] =
            [0, 1, 2, 3, 4].map(|setting| median(case.samples[setting].iter().copied()));
        let ratio =
            |of: usize, to: usize| median(case.samples[of].iter().zip(&case.samples[to]).map(|(two, one)| two / one));
        println!(
            "| {} | {one:.1} | {two:.1} | {:.2} | {one_cloned:.1} | {two_cloned:.1} | {:.2} | {rotated:.1} | {:.2} |",
            case.name,
            ratio(1, 0),
            ratio(3, 2),
            ratio(4, 0),
        );
    }
}

#[derive(Clone, Copy)]
struct Setting {
    readers: usize,
    cloned: bool,
    rotated: bool,
}

const SETTINGS: usize = 5;

fn settings() -> [Setting; SETTINGS] {
    let quiet = |readers, cloned| Setting { readers, cloned, rotated: false };
    let rotated = Setting { readers: beside_a_writer(), cloned: false, rotated: true };
    [quiet(1, false), quiet(2, false), quiet(1, true), quiet(2, true), rotated]
}

/// How many readers there are room for when a writer has a core.
fn beside_a_writer() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get() - 1).clamp(1, 2)
}

struct Case {
    name: &'static str,
    measure: Box<dyn FnMut(Setting, usize) -> f64>,
    samples: [Vec<f64>; SETTINGS],
}

struct Cases(Vec<Case>);

impl Visit for Cases {
    fn visit<S>(&mut self, peer: Peer<S>)
    where
        S: Service<Request<()>, Response = Response<()>, Error = Infallible> + Clone + Send + 'static,
    {
        let Peer { name, service, rotate } = peer;
        let measure = move |setting, batches| measure(&service, &*rotate, setting, batches);
        self.0.push(Case { name, measure: Box::new(measure), samples: Default::default() });
    }
}

/// Nanoseconds per request, of the reader who was slower.
fn measure<S>(service: &S, rotate: &(dyn Fn(usize) + Send + Sync), setting: Setting, batches: usize) -> f64
where
    S: Service<Request<()>, Response = Response<()>, Error = Infallible> + Clone + Send,
{
    let (epoch, at_start, done) = (Instant::now(), AtomicUsize::new(0), AtomicBool::new(false));
    let times: Vec<Vec<Batch>> = thread::scope(|scope| {
        let (at_start, done) = (&at_start, &done);
        if setting.rotated {
            scope.spawn(move || publish(rotate, done));
        }
        let readers: Vec<_> = (0..setting.readers)
            .map(|_| {
                let service = service.clone();
                scope.spawn(move || read(service, setting, batches, epoch, at_start))
            })
            .collect();
        let times = readers.into_iter().filter_map(|reader| reader.join().ok()).collect();
        done.store(true, Ordering::Relaxed);
        times
    });
    median((0..batches).filter_map(|batch| {
        let (mut start, mut end, mut longest) = (Duration::ZERO, Duration::MAX, Duration::ZERO);
        for Batch { started, ended } in times.iter().filter_map(|batches| batches.get(batch)) {
            (start, end, longest) = (start.max(*started), end.min(*ended), longest.max(*ended - *started));
        }
        // On a busy machine many a pair of readers takes turns on one core: that says nothing.
        let together = end.saturating_sub(start).as_secs_f64() >= 0.8 * longest.as_secs_f64();
        together.then_some(longest.as_secs_f64() * 1e9 / BATCH as f64)
    }))
}

struct Batch {
    started: Duration,
    ended: Duration,
}

fn read<S>(mut service: S, setting: Setting, batches: usize, epoch: Instant, at_start: &AtomicUsize) -> Vec<Batch>
where
    S: Service<Request<()>, Response = Response<()>, Error = Infallible> + Clone,
{
    let mut requests = Vec::with_capacity(BATCH);
    let mut responses = Vec::with_capacity(BATCH);
    let mut measured = Vec::with_capacity(batches);
    for batch in 1..=batches {
        requests.extend((0..BATCH).map(|_| request()));
        forget_sent(BATCH);
        wait_for_all(at_start, batch * setting.readers);
        let started = epoch.elapsed();
        for request in requests.drain(..) {
            responses.push(if setting.cloned {
                exchange(&mut service.clone(), request)
            } else {
                exchange(&mut service, request)
            });
            forget_sent(0);
        }
        measured.push(Batch { started, ended: epoch.elapsed() });
        black_box(&responses);
        responses.clear();
    }
    measured
}

fn wait_for_all(at_start: &AtomicUsize, all: usize) {
    at_start.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0_u32;
    while at_start.load(Ordering::Acquire) < all {
        spins += 1;
        if spins.is_multiple_of(100_000) {
            thread::yield_now(); // the other one may be waiting for this core
        } else {
            spin_loop();
        }
    }
}

/// Never sleeps, as a sleep takes longer than the time between two publications.
fn publish(rotate: &(dyn Fn(usize) + Send + Sync), done: &AtomicBool) {
    let start = Instant::now();
    let mut published = 0;
    while !done.load(Ordering::Relaxed) {
        if start.elapsed() > ROTATE_EVERY * published {
            published += 1;
            rotate(published as usize);
        }
        spin_loop();
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN) // the two never ran at the same time
}
