use std::time::Duration;

use tokio::time::Instant;

use super::error::LoginError;
use crate::backoff::exponential;

/// How long nothing is tried after a failure: this long at first, then twice as long with each further one.
const FIRST: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(5 * 60);

/// Keeps something from being tried too often. The store asks after 1 s, 2 s, 4 s and at the poll interval, which is no
/// pace for an endpoint that is down.
pub(super) struct BackOff<K>(Option<Failure<K>>);

struct Failure<K> {
    /// What was tried. Something else may be tried at once.
    of: K,
    step: u32,
    until: Instant,
    error: LoginError,
}

impl<K: PartialEq> BackOff<K> {
    /// # Errors
    /// The last failure, as long as it is too early to try the same again.
    pub(super) fn check(&self, of: &K) -> Result<(), LoginError> {
        match &self.0 {
            Some(failure) if failure.of == *of && Instant::now() < failure.until => Err(failure.error.clone()),
            _ => Ok(()),
        }
    }

    /// Notes a failure, and returns which one in a row it is.
    pub(super) fn failed(&mut self, of: K, error: LoginError) -> u32 {
        let step = self.0.as_ref().filter(|last| last.of == of).map_or(0, |last| last.step.saturating_add(1));
        // Only ever longer, so that what fails again and again is never tried sooner than the time before.
        let wait = exponential(FIRST, step, LONGEST).mul_f64(fastrand::f64().mul_add(0.2, 1.0));
        self.0 = Some(Failure { of, step, until: Instant::now() + wait, error });
        step.saturating_add(1)
    }

    pub(super) fn succeeded(&mut self) {
        self.0 = None;
    }
}

// Derived, it would ask for a `K` that has a default.
impl<K> Default for BackOff<K> {
    fn default() -> Self {
        Self(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::login::LoginErrorKind;

    #[tokio::test(start_paused = true)]
    async fn the_waits_grow_and_do_not_shrink() {
        let mut back_off = BackOff::default();
        let mut shortest = FIRST;
        for _ in 0..12 {
            back_off.check(&1).unwrap();
            back_off.failed(1, LoginError::new(LoginErrorKind::Unreachable, "down"));
            tokio::time::advance(shortest - Duration::from_millis(1)).await;
            assert_eq!(back_off.check(&1).unwrap_err().to_string(), "down");
            back_off.check(&2).unwrap();
            tokio::time::advance(shortest / 5 + Duration::from_millis(1)).await;
            shortest = (shortest * 2).min(LONGEST);
        }
        back_off.succeeded();
        back_off.failed(1, LoginError::new(LoginErrorKind::Unreachable, "down"));
        tokio::time::advance(FIRST * 6 / 5).await;
        back_off.check(&1).unwrap();
    }
}
