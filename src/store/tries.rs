//! When the newest credential is tried again, which was refused before fal ever accepted it.
//!
//! A refusal is an application's claim. So it acts on requests to that application: they go out with the previous
//! credential, and single ones try the newest one again after pauses that grow. An application that refuses whatever it
//! gets puts off only its own tries, and those of its owner's other ones.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::evidence::{DOUBT_IS_CONFIRMED, Mark};
use crate::{
    application::{Application, ByApplication},
    backoff::{exponential, jittered},
};

/// The pause before the first try, the next one is twice as long, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// When so many applications have refused it, it is hardly a lie, and the next ones need not find out by themselves: a
/// request whose body cannot be sent again would be lost.
const SEVERAL: usize = 4;

#[derive(Default)]
pub(super) struct Tries {
    by_application: ByApplication<TriesOfOne>,
    /// When the first application may.
    first: Option<Instant>,
    /// When it was refused first.
    refused_at: Option<SystemTime>,
}

#[derive(Default)]
struct TriesOfOne {
    made: u32,
    /// When it was tried with a request to this application that nothing was noted of.
    first: Option<Instant>,
    next: Option<Instant>,
    /// The evidence for the other credential when this application refused it first in a doubt, and when that was.
    other_refused: Option<(Mark, Instant)>,
}

impl Tries {
    /// This application has refused the newest credential.
    pub(super) fn refused(&mut self, application: Application, at: SystemTime) {
        self.refused_at.get_or_insert(at);
        self.by_application.of(application).next.get_or_insert_with(|| Instant::now() + jittered(FIRST_PAUSE));
    }

    pub(super) fn has_refused(&self, application: Application) -> bool {
        self.by_application.knows(application)
    }

    pub(super) fn have_several_refused(&self) -> bool {
        self.by_application.count() >= SEVERAL
    }

    pub(super) fn has_refused_both(&mut self, application: Application) -> bool {
        self.by_application.known(application).is_some_and(|of_one| of_one.other_refused.is_some())
    }

    /// The newest credential goes out of use for all applications. Returns when it was refused first.
    pub(super) fn set_aside(&mut self) -> Option<SystemTime> {
        self.first = Some(Instant::now() + jittered(FIRST_PAUSE));
        self.refused_at
    }

    /// This application has refused the other credential, of which this is the evidence. If it is the first time in this
    /// doubt, the newest one may be tried at once.
    pub(super) fn other_refused(&mut self, application: Application, other: Mark) {
        let of_one = self.by_application.of(application);
        if !of_one.other_refused.is_some_and(|(mark, _)| mark.is_same_doubt(other)) {
            let now = Instant::now();
            *of_one = TriesOfOne { made: 0, first: of_one.first, next: Some(now), other_refused: Some((other, now)) };
        }
    }

    /// Whether it is time to try the newest credential with a request to this application. If so, the next time is later.
    ///
    /// A request that cannot be sent again would be lost. It tries only when this very application has refused the other
    /// credential for a while, too: there may be no other requests, and other applications may lie.
    pub(super) fn take(&mut self, application: Application, replayable: bool, other: Mark) -> bool {
        let now = Instant::now();
        let Some(of_one) = self.by_application.known(application) else {
            // Many names of one owner put off only each other.
            let last = self.by_application.of_owner(application).filter_map(|of_one| of_one.first).max();
            let next = last.map_or(self.first, |last| Some(last + FIRST_PAUSE));
            if !replayable || next.is_some_and(|next| now < next) {
                return false;
            }
            let of_one = self.by_application.of(application);
            of_one.first = Some(now);
            of_one.take(now);
            return true;
        };
        let other_seems_lost = || {
            of_one.other_refused.is_some_and(|(mark, since)| {
                mark.is_same_doubt(other) && now.duration_since(since) >= DOUBT_IS_CONFIRMED
            })
        };
        if of_one.next.is_some_and(|next| now < next) || !(replayable || other_seems_lost()) {
            return false;
        }
        of_one.take(now);
        true
    }
}

impl TriesOfOne {
    fn take(&mut self, now: Instant) {
        self.made = self.made.saturating_add(1);
        self.next = Some(now + jittered(exponential(FIRST_PAUSE, self.made, LONGEST_PAUSE)));
    }
}
