//! The private parts that `fuzz/` tests. The module exists under `cfg(fuzzing)` only, which cargo-fuzz sets.

#![allow(missing_debug_implementations)]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use http_body::Body;

pub use crate::retry::ReplayBody;
use crate::retry::{self, body};

/// The memory that the copies of several bodies share.
pub struct ReplayMemory(Arc<body::ReplayMemory>);

impl ReplayMemory {
    /// A memory of so many bytes.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self(Arc::new(body::ReplayMemory::new(most)))
    }

    /// How many bytes are kept.
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used()
    }
}

/// What makes the body of the next attempt.
pub struct Replay<B>(body::Replay<B>);

impl<B: Body> Replay<B> {
    /// The body of the first attempt, and what makes the others.
    pub fn new(body: B, most: u64, memory: &ReplayMemory) -> (ReplayBody<B>, Self) {
        let (first, replay) = ReplayBody::new(body, most, &memory.0);
        (first, Self(replay))
    }

    /// Whether there can be another attempt.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        self.0.is_possible()
    }

    /// The body of the next attempt.
    pub fn start_over(&mut self) -> Option<ReplayBody<B>> {
        self.0.start_over()
    }

    /// There will be no other attempt; the one under way goes on.
    pub fn keep_no_longer(&mut self) {
        self.0.keep_no_longer();
    }

    /// There will be no other attempt, and the one under way fails.
    pub fn give_up(&self) {
        self.0.give_up();
    }
}

/// Leaves an empty body in the place of this one.
pub fn take<B: Body>(body: &mut ReplayBody<B>) -> ReplayBody<B> {
    body.take()
}

/// How long an answer asks to wait.
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    retry::retry_after::retry_after(headers, now)
}

/// The judge of the proxy's targets.
pub struct Targets(crate::proxy::target::Targets);

impl Targets {
    /// What is allowed by default.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(crate::proxy::target::Targets::new())
    }

    /// All that can be opened but the account, with webhooks to `app.example`.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn wide() -> Self {
        let mut targets = crate::proxy::target::Targets::new()
            .with_origins(crate::origin::FalOrigins::new().subdomains())
            .and_then(|targets| targets.and("*.fal.run/**"))
            .and_then(|targets| targets.and("rest.fal.ai/**"))
            .and_then(|targets| targets.and("rest.alpha.fal.ai/**"))
            .and_then(|targets| targets.allow_webhook("app.example"))
            .expect("what can be opened");
        targets.tokens = true;
        Self(targets)
    }

    /// The URL to which a request with this target is sent. `None` if it is refused.
    #[must_use]
    pub fn judge(&self, target: &[u8]) -> Option<String> {
        self.0.judge_bytes(target).ok().map(|target| target.uri.to_string())
    }
}
