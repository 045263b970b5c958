//! How often refusals may have the source loaded.
//!
//! Each application has a pace of its own, so that none takes a load from the requests to another one. A load is an
//! answer to all, whoever had asked for it, so after several in a row there is a short pause after each that is
//! everybody's: however many applications there are, loads stay few.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    application::{Application, ByApplication},
    backoff::{exponential, jittered},
    error::Reason,
    generation::Generation,
};

/// How long refusals by one application ask no more after a load that they had asked for: this long at first, then twice
/// as long with each load, each varied by a fifth.
const COOL_DOWN: Duration = Duration::from_secs(1);
const LONGEST_COOL_DOWN: Duration = Duration::from_secs(60);

/// For each load that any refusal had asked for, there are to be so long without another one. It need not be at once: so
/// many may come in a row. It is shorter than the time for which the last load of a wait is an answer.
const PAUSE: Duration = Duration::from_millis(150);
const IN_A_ROW: u32 = 8;

/// A refusal is a claim: by this application, or by fal itself about a request to it, and for this reason.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) application: Application,
    pub(crate) reason: Reason,
}

/// When refusals may ask for a load.
#[derive(Default)]
pub(super) struct Paces {
    by_application: ByApplication<PacesOfOne>,
    /// Whether the next load to end was asked for by a refusal.
    asked: bool,
    /// When all pauses will have been made.
    pauses_end: Option<Instant>,
}

/// The paces of both kinds of refusals: those in fal's own words, that it does not know the key, and all others. An
/// application that answers in words of its own must not use up the loads of the former.
#[derive(Default)]
struct PacesOfOne {
    unknown_key: Pace,
    other: Pace,
}

/// How urgently a newer credential is asked for. Everybody respects the pauses after loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A cool-down is respected.
    Normal,
    /// A cool-down is ignored, but at most once a minute.
    LastChance,
    /// A cool-down is ignored, and only a load that began at this time or later is an answer.
    Since(Instant),
}

/// The pace of one kind of refusals by one application.
#[derive(Default)]
struct Pace {
    /// Whether the next load to end was asked for by a refusal of this kind.
    asked: bool,
    cool_down: Option<CoolDown>,
    /// The generation for which a load was last made during a cool-down, and when.
    last_chance: Option<(Generation, Instant)>,
}

struct CoolDown {
    until: Instant,
    /// Which one in a row the next one is.
    next_step: u32,
}

impl Paces {
    /// Until when this refusal of this generation may ask for no load.
    pub(super) fn cooling_until(&mut self, claim: Claim, current: Generation, urgency: Urgency) -> Option<Instant> {
        let pause_ends = self.pauses_end.and_then(|end| end.checked_sub(PAUSE * IN_A_ROW));
        pause_ends.filter(|end| Instant::now() < *end).or_else(|| self.of(claim).cooling_until(current, urgency))
    }

    /// This refusal has asked for a load that is still to end.
    pub(super) fn asked(&mut self, claim: Claim) {
        self.asked = true;
        self.of(claim).asked = true;
    }

    /// A load has ended: starts the cool-downs of those who had asked for it, if the source was told of what they had to
    /// say. Returns whether it was their load.
    pub(super) fn load_ended(&mut self, is_told: bool) -> bool {
        if !self.asked {
            return false;
        }
        let now = Instant::now();
        self.pauses_end = Some(self.pauses_end.map_or(now, |end| end.max(now)) + PAUSE);
        if is_told {
            self.asked = false;
            self.all().for_each(Pace::load_ended);
        }
        is_told
    }

    /// Another credential is the newest one now: no refusal has asked for its successor.
    pub(super) fn nothing_asked(&mut self) {
        self.asked = false;
        self.all().for_each(|pace| pace.asked = false);
    }

    /// There is another credential, and no refusal had asked for it.
    pub(super) fn reset(&mut self) {
        self.all().for_each(|pace| pace.cool_down = None);
    }

    /// fal has accepted the credential. The refusals before that were no reason to ask the source less often.
    pub(super) fn accepted(&mut self) {
        for Pace { cool_down, last_chance, .. } in self.by_application.all().map(|paces| &mut paces.unknown_key) {
            *last_chance = None;
            if let Some(cool_down) = cool_down {
                cool_down.next_step = 0;
            }
        }
    }

    fn of(&mut self, claim: Claim) -> &mut Pace {
        let PacesOfOne { unknown_key, other } = self.by_application.of(claim.application);
        if claim.reason == Reason::UnknownCredential { unknown_key } else { other }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Pace> {
        self.by_application.all().flat_map(|PacesOfOne { unknown_key, other }| [unknown_key, other])
    }
}

impl Pace {
    fn cooling_until(&mut self, current: Generation, urgency: Urgency) -> Option<Instant> {
        let now = Instant::now();
        let last_chance_used = self.last_chance.is_some_and(|(of, at)| of == current && at + LONGEST_COOL_DOWN > now);
        match urgency {
            Urgency::Since(_) => return None,
            Urgency::LastChance if !last_chance_used => {
                self.last_chance = Some((current, now));
                return None;
            }
            Urgency::LastChance | Urgency::Normal => {}
        }
        self.cool_down.as_ref().map(|cool_down| cool_down.until).filter(|until| now < *until)
    }

    /// Starts a cool-down after a load that a refusal had asked for, even if it brought a new credential: a source that
    /// keeps producing credentials which fal rejects must not be loaded once per request.
    fn load_ended(&mut self) {
        if !std::mem::take(&mut self.asked) {
            return;
        }
        let now = Instant::now();
        // A cool-down that ended long ago does not count.
        let recent = self.cool_down.as_ref().filter(|last| now < last.until + LONGEST_COOL_DOWN);
        let step = recent.map_or(0, |last| last.next_step);
        let until = now + jittered(exponential(COOL_DOWN, step, LONGEST_COOL_DOWN));
        self.cool_down = Some(CoolDown { until, next_step: step.saturating_add(1) });
    }
}
