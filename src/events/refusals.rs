use std::sync::Arc;
#[cfg(feature = "tracing")]
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::StatusCode;
#[cfg(feature = "tracing")]
use tokio::time::Instant;

use crate::{credential::KeyId, error::Reason, generation::Generation};

/// fal, or the application behind it, refused a credential, and this was done about it.
pub(crate) struct Refused<'a> {
    pub(crate) status: StatusCode,
    pub(crate) reason: Reason,
    pub(crate) action: &'static str,
    /// The name of the store; `None` when the request brought its own credential, as with `generation`.
    pub(crate) store: Option<&'a Arc<str>>,
    pub(crate) generation: Option<Generation>,
    pub(crate) source: &'a str,
    pub(crate) key_id: Option<&'a KeyId>,
}

/// Tells of the refusals of one layer.
///
/// An outage at a thousand requests a second must not fill the log: of those for one reason, the first is a warning,
/// then each one whose number is a power of two; those between are for debugging. They are counted anew with another
/// credential, and after a minute without any. A metric counts each one.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// By whether the credential was the store's, and the reason.
    #[cfg(feature = "tracing")]
    runs: Mutex<BTreeMap<(bool, &'static str), Run>>,
}

/// Refusals for one reason, each soon after the one before.
#[cfg(feature = "tracing")]
#[derive(Debug)]
struct Run {
    generation: Option<Generation>,
    refusals: u64,
    last: Instant,
}

/// After so long, the next refusal is another story.
#[cfg(feature = "tracing")]
const RUN_ENDS: Duration = Duration::from_secs(60);

impl Refusals {
    pub(crate) fn tell(&self, refused: &Refused<'_>) {
        let Refused { status, reason, action, store, generation, source, key_id } = *refused;
        #[cfg(feature = "tracing")]
        {
            let refusals = self.count(reason, generation);
            macro_rules! tell {
                ($level:ident) => {
                    tracing::$level!(
                        status = status.as_u16(),
                        reason = reason.as_str(),
                        action,
                        source,
                        key_id = key_id.map(tracing::field::display),
                        refusals,
                        "fal refused a request"
                    )
                };
            }
            if refusals.is_power_of_two() {
                tell!(warn);
            } else {
                tell!(debug);
            }
        }
        #[cfg(feature = "metrics")]
        metrics::counter!(
            "tower_fal_refusals_total",
            "store" => store.map_or_else(|| "".into(), Arc::clone),
            "status" => if status == StatusCode::FORBIDDEN { "403" } else { "401" },
            "reason" => reason.as_str(),
            "action" => action,
        )
        .increment(1);
        let _ = (status, reason, action, store, generation, source, key_id);
    }

    #[cfg(feature = "tracing")]
    fn count(&self, reason: Reason, generation: Option<Generation>) -> u64 {
        let now = Instant::now();
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let run =
            runs.entry((generation.is_some(), reason.as_str())).or_insert(Run { generation, refusals: 0, last: now });
        // One that comes late, for an earlier credential, begins nothing.
        if generation > run.generation || now.duration_since(run.last) >= RUN_ENDS {
            run.refusals = 0;
        }
        run.generation = run.generation.max(generation);
        run.refusals += 1;
        run.last = now;
        run.refusals
    }
}
