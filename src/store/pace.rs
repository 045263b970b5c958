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
    /// A refusal asks for a load. Returns until when there is none. A last chance is a load even during a cool-down, but
    /// at most one a minute.
    pub(super) fn ask(&mut self, current: Generation, is_last_chance: bool) -> Option<Instant> {
        let now = Instant::now();
        let used = self.last_chance.is_some_and(|(of, at)| of == current && at + LONGEST_COOL_DOWN > now);
        if is_last_chance && !used {
            self.last_chance = Some((current, now));
        } else if let Some(cool_down) = self.cool_down.as_ref().filter(|cool_down| now < cool_down.until) {
            return Some(cool_down.until);
        }
        self.asked = true;
        None
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
