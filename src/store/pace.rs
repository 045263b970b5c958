//! How often refusals may have the source loaded.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    backoff::{exponential, jittered},
    error::Reason,
    generation::Generation,
};

/// How long refusals ask no more after a load that they had asked for: this long at first, then twice as long with each
/// load, each varied by a fifth.
const COOL_DOWN: Duration = Duration::from_secs(1);
const LONGEST_COOL_DOWN: Duration = Duration::from_secs(60);

/// The paces of both kinds of refusals: those in fal's own words, that it does not know the key, and all others. An
/// application that answers in words of its own must not use up the loads of the former.
#[derive(Default)]
pub(super) struct Paces {
    unknown_key: Pace,
    other: Pace,
}

/// How urgently a newer credential is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A cool-down is respected.
    Normal,
    /// A cool-down is ignored, but at most once a minute.
    LastChance,
    /// A cool-down is ignored, and only a load that began at this time or later is an answer.
    Since(Instant),
}

/// The pace of one kind of refusals.
#[derive(Default)]
pub(super) struct Pace {
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
    pub(super) fn of(&mut self, reason: Reason) -> &mut Pace {
        if reason == Reason::UnknownCredential { &mut self.unknown_key } else { &mut self.other }
    }

    /// A load has ended: starts the cool-downs of those who had asked for it. Returns whether any had.
    pub(super) fn load_ended(&mut self) -> bool {
        let mut is_for_refusal = false;
        for pace in [&mut self.unknown_key, &mut self.other] {
            if std::mem::take(&mut pace.asked) {
                pace.cool_down();
                is_for_refusal = true;
            }
        }
        is_for_refusal
    }

    /// Another credential is the newest one now: no refusal has asked for its successor.
    pub(super) fn nothing_asked(&mut self) {
        (self.unknown_key.asked, self.other.asked) = (false, false);
    }

    /// There is another credential, and no refusal had asked for it.
    pub(super) fn reset(&mut self) {
        (self.unknown_key.cool_down, self.other.cool_down) = (None, None);
    }

    /// fal has accepted the credential. The refusals before that were no reason to ask the source less often.
    pub(super) fn accepted(&mut self) {
        let Pace { cool_down, last_chance, .. } = &mut self.unknown_key;
        *last_chance = None;
        if let Some(cool_down) = cool_down {
            cool_down.next_step = 0;
        }
    }
}

impl Pace {
    /// Until when a refusal of this generation may ask for no load.
    pub(super) fn cooling_until(&mut self, current: Generation, urgency: Urgency) -> Option<Instant> {
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

    /// A refusal of this kind has asked for a load that is still to end.
    pub(super) fn asked(&mut self) {
        self.asked = true;
    }

    /// Starts a cool-down after a load that a refusal had asked for, even if it brought a new credential: a source that
    /// keeps producing credentials which fal rejects must not be loaded once per request.
    fn cool_down(&mut self) {
        let now = Instant::now();
        // A cool-down that ended long ago does not count.
        let recent = self.cool_down.as_ref().filter(|last| now < last.until + LONGEST_COOL_DOWN);
        let step = recent.map_or(0, |last| last.next_step);
        let until = now + jittered(exponential(COOL_DOWN, step, LONGEST_COOL_DOWN));
        self.cool_down = Some(CoolDown { until, next_step: step.saturating_add(1) });
    }
}
