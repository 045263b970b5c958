//! How long an access token is used.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::claims::Claims;

/// How long before its end a token is renewed, unless half of its life is shorter.
///
/// Source: `fal_client` 1.0.3 (`auth.py`) has 5 min as well; `fal` 1.83.0 (`auth/auth0.py`) has 30 min.
const LEEWAY: Duration = Duration::from_secs(5 * 60);

/// The life of a token that was given out without a word about it. fal's refusal tells if it was shorter.
const UNKNOWN: Duration = Duration::from_secs(10 * 60);

/// What is known of the life of a token at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    left: Duration,
    /// From its beginning to its end.
    whole: Option<Duration>,
}

impl Life {
    /// By the wall clock, for a token that somebody has written to a file. `None` for one that cannot be read.
    pub(super) fn stated(claims: &Claims, written_at: Option<SystemTime>, now: SystemTime) -> Option<Self> {
        let end = claims.expires_at()?;
        let began = claims.issued_at().or(written_at);
        let whole = began.and_then(|began| end.duration_since(began).ok());
        Some(Self { left: end.duration_since(now).unwrap_or_default(), whole })
    }

    /// Whether it is used without a thought.
    pub(super) fn is_good(self) -> bool {
        self.left > self.whole.map_or(LEEWAY, |whole| LEEWAY.min(whole / 2))
    }

    /// Whether it may be renewed ahead of its end.
    pub(super) fn is_half_over(self) -> bool {
        self.left <= self.whole.map_or(LEEWAY * 2, |whole| whole / 2)
    }

    pub(super) fn is_over(self) -> bool {
        self.left.is_zero()
    }
}

/// The life of a token that this process was given. A wrong wall clock changes nothing about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    began: Instant,
    whole: Duration,
}

impl Counted {
    /// `life` is what the endpoint said, and what its clock says in the token counts otherwise.
    pub(super) fn new(began: Instant, life: Option<Duration>, claims: Option<&Claims>) -> Self {
        let stated = || claims.and_then(|claims| claims.expires_at()?.duration_since(claims.issued_at()?).ok());
        let whole = life.or_else(stated).filter(|life| !life.is_zero());
        Self { began, whole: whole.unwrap_or(UNKNOWN) }
    }

    pub(super) fn life(self) -> Life {
        Life { left: self.whole.saturating_sub(self.began.elapsed()), whole: Some(self.whole) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn at(minutes_left: u32, whole: Option<u32>) -> Life {
        Life { left: minutes_left * MINUTE, whole: whole.map(|whole| whole * MINUTE) }
    }

    #[test]
    fn a_token_is_good_until_five_minutes_before_its_end() {
        assert!(at(6, Some(60)).is_good() && !at(5, Some(60)).is_good());
        assert!(at(6, None).is_good() && !at(5, None).is_good());
    }

    #[test]
    fn a_short_token_is_good_for_half_of_its_life() {
        assert!(at(3, Some(4)).is_good() && !at(2, Some(4)).is_good());
        assert!(at(6, Some(10)).is_good() && !at(5, Some(10)).is_good());
    }

    #[test]
    fn a_token_is_renewed_early_in_its_second_half_only() {
        assert!(!at(31, Some(60)).is_half_over() && at(30, Some(60)).is_half_over());
        assert!(!at(11, None).is_half_over() && at(10, None).is_half_over());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_was_given_to_us_lives_by_no_wall_clock() {
        let counted = Counted::new(Instant::now(), Some(4 * MINUTE), None);
        assert!(counted.life().is_good());
        tokio::time::advance(2 * MINUTE).await;
        assert!(!counted.life().is_good() && !counted.life().is_over());
        tokio::time::advance(2 * MINUTE).await;
        assert!(counted.life().is_over());
    }
}
