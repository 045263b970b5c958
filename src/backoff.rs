//! How long to wait before something is tried again.

use std::time::Duration;

/// "Always" must not spin, and "never" must not overflow.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// `first`, doubled `step` times, and never more than `longest`.
pub(crate) fn exponential(first: Duration, step: u32, longest: Duration) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(step)).min(longest)
}

/// A duration varied by a fifth in either direction, so that replicas do not act in step.
pub(crate) fn jittered(duration: Duration) -> Duration {
    duration.clamp(SHORTEST, LONGEST).mul_f64(fastrand::f64().mul_add(0.4, 0.8))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_wait_doubles_up_to_the_longest() {
        let longest = 60 * SECOND;
        for (step, seconds) in [(0, 1), (1, 2), (5, 32), (6, 60), (31, 60), (32, 60), (u32::MAX, 60)] {
            assert_eq!(exponential(SECOND, step, longest), seconds * SECOND);
        }
    }

    #[test]
    fn the_jitter_is_a_fifth_in_either_direction() {
        let waits: Vec<_> = (0..1000).map(|_| jittered(SECOND).as_secs_f64()).collect();
        assert!(waits.iter().all(|wait| (0.8..=1.2).contains(wait)), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait < 0.85) && waits.iter().any(|wait| *wait > 1.15), "{waits:?}");
    }

    #[test]
    fn a_wait_neither_spins_nor_overflows() {
        assert!(jittered(Duration::ZERO) >= Duration::from_micros(800));
        assert!(Instant::now().checked_add(jittered(Duration::MAX)).is_some());
    }
}
