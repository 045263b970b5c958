//! What the header costs a request: `cargo bench --bench inject`.
//!
//! One call over a service that does nothing, polled to its end, with a request that has four headers already, so
//! that the map has room. Making the request and dropping the response are not measured. *Kept* calls one service
//! again and again; *cloned* clones it for each request and drops the clone, as axum and hyper-util do.
//!
//! Absolute times drift with the machine, so every case is measured in every round, and each ratio is the median of
//! the ratios within the rounds. A target of its own, because it counts allocations with an allocator of its own.

#![allow(clippy::print_stdout)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    convert::Infallible,
    hint::black_box,
    time::Instant,
};

use http::{Request, Response};
use tower::Service;

use self::peers::{Peer, Visit, exchange, forget_sent, request};

mod peers;

/// Requests in one measurement: enough to make the clock's own cost small, few enough to stay in the cache.
const BATCH: usize = 32;
/// Measurements of one case in one round, of which the median counts.
const BATCHES: usize = 9;

fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { 400 };
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let mut cases = Cases { cases: Vec::new(), only };
    peers::visit_all(&mut cases);
    let mut cases = cases.cases;
    for round in 0..rounds {
        let count = cases.len();
        for index in 0..count {
            let case = &mut cases[(index + round) % count];
            for mode in [Mode::Kept, Mode::Cloned] {
                let sample = (case.measure)(mode);
                case.samples[mode as usize].push(sample);
            }
        }
    }
    print_table(&cases);
}

#[derive(Clone, Copy)]
enum Mode {
    Kept,
    Cloned,
}

#[derive(Clone, Copy)]
struct Sample {
    nanoseconds: f64,
    allocations: f64,
}

struct Case {
    name: &'static str,
    measure: Box<dyn FnMut(Mode) -> Sample>,
    samples: [Vec<Sample>; 2],
}

struct Cases {
    cases: Vec<Case>,
    only: Option<String>,
}

impl Visit for Cases {
    fn visit<S>(&mut self, peer: Peer<S>)
    where
        S: Service<Request<()>, Response = Response<()>, Error = Infallible> + Clone + Send + 'static,
    {
        let Peer { name, mut service, .. } = peer;
        if self.only.as_ref().is_some_and(|only| !name.contains(only) && !is_floor(name)) {
            return;
        }
        let measure = move |mode| {
            measure(|requests, responses| match mode {
                Mode::Kept => responses.extend(requests.drain(..).map(|request| exchange(&mut service, request))),
                Mode::Cloned => {
                    responses.extend(requests.drain(..).map(|request| exchange(&mut service.clone(), request)))
                }
            })
        };
        self.cases.push(Case { name, measure: Box::new(measure), samples: [Vec::new(), Vec::new()] });
    }
}

fn is_floor(name: &str) -> bool {
    name.starts_with("floor")
}

fn measure<R>(mut run: impl FnMut(&mut Vec<Request<()>>, &mut Vec<R>)) -> Sample {
    let mut requests = Vec::with_capacity(BATCH);
    let mut responses = Vec::with_capacity(BATCH);
    let mut allocations = 0;
    let mut batch = || {
        requests.extend((0..BATCH).map(|_| request()));
        forget_sent(BATCH);
        let before = ALLOCATIONS.get();
        let start = Instant::now();
        run(&mut requests, &mut responses);
        let elapsed = start.elapsed();
        allocations = ALLOCATIONS.get() - before;
        black_box(&responses);
        responses.clear();
        elapsed.as_secs_f64() * 1e9 / BATCH as f64
    };
    batch(); // warms up
    let nanoseconds = median((0..BATCHES).map(|_| batch()));
    Sample { nanoseconds, allocations: allocations as f64 / BATCH as f64 }
}

fn print_table(cases: &[Case]) {
    println!("| case | kept, ns | to the floor | cloned, ns | to the floor | allocations, kept / cloned |");
    println!("|---|--:|--:|--:|--:|--:|");
    let Some(floor) = cases.iter().find(|case| is_floor(case.name)) else { return };
    for case in cases {
        let [kept, cloned] = [Mode::Kept, Mode::Cloned].map(|mode| {
            let (ours, floors) = (&case.samples[mode as usize], &floor.samples[mode as usize]);
            let time = median(ours.iter().map(|sample| sample.nanoseconds));
            let ratio = median(ours.iter().zip(floors).map(|(ours, floor)| ours.nanoseconds / floor.nanoseconds));
            (time, ratio, median(ours.iter().map(|sample| sample.allocations)))
        });
        println!(
            "| {} | {:.1} | {:.2} | {:.1} | {:.2} | {} / {} |",
            case.name, kept.0, kept.1, cloned.0, cloned.1, kept.2, cloned.2
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: every call goes to `System` as it came; counting touches a thread-local cell that needs no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}
