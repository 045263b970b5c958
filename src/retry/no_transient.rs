//! What stands in the place of `transient` without that feature: nothing is retried after a transient failure.

use std::time::Duration;

use super::attempt::{Ended, Sent};

#[derive(Clone, Debug)]
pub(crate) enum Transient {}

impl Transient {
    pub(crate) fn plan_retry(&self, _: Sent<'_>, _: &mut Progress, _: Ended<'_>) -> Option<Duration> {
        match *self {}
    }
}

pub(crate) struct Progress;

impl Progress {
    pub(crate) fn first() -> Self {
        Self
    }
}
