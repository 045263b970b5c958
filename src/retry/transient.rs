use std::{
    error::Error,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, Method, StatusCode};
use tokio::time::Instant;
use tower::retry::budget::{Budget as _, TpsBudget};

use super::{
    attempt::{Ended, Sent},
    retry_after::retry_after,
};
use crate::{
    backoff,
    error::foreign::{causes, connection_failed_for_good, was_not_connected, was_not_processed},
    events,
    wire::{header, is_of_a_runner},
};

const DEFAULT_ATTEMPTS: u32 = 4;
const DEFAULT_FIRST_DELAY: Duration = Duration::from_millis(250);
const DEFAULT_LONGEST_DELAY: Duration = Duration::from_secs(10);
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);

/// Retries of transient failures, for requests that may be repeated.
///
/// | what happened | `GET`, `HEAD`, the queue's `PUT …/cancel` | anything else, `POST` above all |
/// |---|---|---|
/// | 429 of fal itself, `concurrent_requests_limit`: the request was not run | sent again | sent again |
/// | any other 429, 502, 503, 504 | sent again | not, unless the request is [`Repeatable`] |
/// | the request was [certainly not sent](Self::not_sent) | sent again | sent again |
/// | HTTP/2: the server refused the stream, or shut down before it looked at it | sent again | sent again |
/// | the service failed otherwise | sent again | not, unless the request is [`Repeatable`] |
///
/// A TLS connection that fails for good is tried once: the port does not speak TLS, or the certificate is not valid for
/// the host. (This is known of rustls behind hyper-util's client with the feature `client`, and behind reqwest with the
/// feature `reqwest`.)
///
/// Never after a 504 with `X-Fal-Request-Timeout-Type: user`, as that was the caller's own timeout, nor with
/// `X-Fal-Retryable: false`.
///
/// **Why `POST` is left alone:** fal documents no idempotency key, so a `POST` that is sent twice may run, and bill,
/// twice. The queue itself tries up to ten times what a runner failed to do: submit there.
///
/// Waits are those of `Retry-After`, up to [`longest_delay`](Self::longest_delay), or else random up to a limit that
/// doubles with each attempt. A budget of one retry in five requests, and ten a second at least, keeps an outage
/// from being made worse; it is shared by everything that is made from this value. The one replay of a refused
/// credential is counted apart.
///
/// Source: fal's documentation, "Queue", "Errors" and "Request errors"; `fal_client` 1.0.3 and `@fal-ai/client` 1.10.1
/// for what is worth retrying.
///
/// ```
/// use std::time::Duration;
/// use tower_fal::retry::Transient;
///
/// # let store = tower_fal::CredentialStore::fixed(tower_fal::Credential::key("id:secret")?);
/// let layer = tower_fal::layer(&store)
///     .retry(|retry| retry.transient(Transient::default().attempts(3).deadline(Duration::from_secs(20))));
/// # let _ = layer;
/// # Ok::<(), tower_fal::CredentialError>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct Transient {
    attempts: u32,
    first_delay: Duration,
    longest_delay: Duration,
    deadline: Duration,
    budget: Arc<TpsBudget>,
    /// `None` for the default, which looks at the chain of causes as a whole.
    not_sent: Option<fn(&(dyn Error + 'static)) -> bool>,
}

/// In a request's extensions: it may be sent more than once, whatever its method. You say so, and you pay for it.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs)]
pub struct Repeatable;

impl Transient {
    /// How often a request is sent at most, the first time included. Default: 4.
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// The limit of the first wait; that of each further one is twice as long. Default: 250 ms.
    pub fn first_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// The longest wait, also when `Retry-After` asks for more. Default: 10 s.
    pub fn longest_delay(mut self, delay: Duration) -> Self {
        self.longest_delay = delay;
        self
    }

    /// How long after the first attempt there may be another one. Default: 60 s. A wait that would end later is not
    /// begun.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Another budget of retries. Default: one in five requests, and ten a second at least.
    pub fn budget(mut self, budget: TpsBudget) -> Self {
        self.budget = Arc::new(budget);
        self
    }

    /// Which errors of the service inside say that the request was certainly not sent. It is called with the error and
    /// with each of its causes, until it says yes. What it does not know counts as sent.
    ///
    /// Default: [`connection_failed`](super::connection_failed), which is not asked about the causes behind an HTTP
    /// client's own error. A function of yours is: there, "unreachable" can be about a connection that existed.
    ///
    /// It sees errors of every layer inside. A layer that reports "connection refused" about something else is believed.
    pub fn not_sent(mut self, not_sent: fn(&(dyn Error + 'static)) -> bool) -> Self {
        self.not_sent = Some(not_sent);
        self
    }
}

impl Default for Transient {
    fn default() -> Self {
        Self {
            attempts: DEFAULT_ATTEMPTS,
            first_delay: DEFAULT_FIRST_DELAY,
            longest_delay: DEFAULT_LONGEST_DELAY,
            deadline: DEFAULT_DEADLINE,
            budget: Arc::new(TpsBudget::default()),
            not_sent: None,
        }
    }
}

impl fmt::Debug for Transient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transient")
            .field("attempts", &self.attempts)
            .field("first_delay", &self.first_delay)
            .field("longest_delay", &self.longest_delay)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// How far the retries of one request have come.
pub(crate) struct Progress {
    made: u32,
    began: Instant,
}

impl Progress {
    pub(crate) fn first() -> Self {
        Self { made: 1, began: Instant::now() }
    }
}

impl Transient {
    /// How long to wait before the request is sent again; `None` if it is not. Takes from the budget.
    pub(crate) fn plan_retry(&self, sent: Sent<'_>, progress: &mut Progress, ended: Ended<'_>) -> Option<Duration> {
        if !is_transient(ended) {
            self.budget.deposit();
            return None;
        }
        if !self.may_repeat(sent, ended) || progress.made >= self.attempts {
            return None;
        }
        let wait = self.delay(progress.made, ended);
        if progress.began.elapsed().saturating_add(wait) > self.deadline {
            return None;
        }
        if !self.budget.withdraw() {
            events::retry_budget_exhausted();
            return None;
        }
        progress.made += 1;
        events::retried(progress.made, wait);
        Some(wait)
    }

    fn may_repeat(&self, sent: Sent<'_>, ended: Ended<'_>) -> bool {
        let certainly_not_run = match ended {
            Ended::Answered { status, headers, .. } => is_over_the_concurrency_limit(status, headers),
            Ended::Failed(error) => causes(error).any(was_not_processed) || self.was_not_sent(error),
        };
        certainly_not_run
            || matches!(*sent.method, Method::GET | Method::HEAD)
            || is_cancel(sent.method, sent.path)
            || sent.extensions.get::<Repeatable>().is_some()
    }

    fn was_not_sent(&self, error: &(dyn Error + 'static)) -> bool {
        match self.not_sent {
            Some(not_sent) => causes(error).any(not_sent),
            None => was_not_connected(error),
        }
    }

    fn delay(&self, made: u32, ended: Ended<'_>) -> Duration {
        if let Ended::Answered { headers, .. } = ended
            && let Some(asked) = retry_after(headers, SystemTime::now())
        {
            return asked.min(self.longest_delay);
        }
        let limit = backoff::exponential(self.first_delay, made - 1, self.longest_delay);
        limit.mul_f64(fastrand::f64()) // "full jitter": anywhere up to the limit
    }
}

/// Whether the same request may well succeed a little later. After most errors of the service it may; it is `may_repeat`
/// that asks whether the request was sent.
fn is_transient(ended: Ended<'_>) -> bool {
    let (status, headers) = match ended {
        Ended::Answered { status, headers, .. } => (status, headers),
        Ended::Failed(error) => return !connection_failed_for_good(error),
    };
    let transient = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    );
    let callers_own = status == StatusCode::GATEWAY_TIMEOUT && says(headers, header::REQUEST_TIMEOUT_TYPE, "user");
    transient && !callers_own && !says(headers, header::RETRYABLE, "false")
}

/// Whether fal refused the request before it ran, because too many of the account's were running. An application cannot
/// say so: its answers have a runner's headers.
///
/// Source: fal's documentation, "Concurrency limits".
fn is_over_the_concurrency_limit(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        && says(headers, header::ERROR_TYPE, "concurrent_requests_limit")
        && says(headers, header::NEEDS_RETRY, "1")
        && !is_of_a_runner(headers)
}

fn says(headers: &HeaderMap, name: HeaderName, word: &str) -> bool {
    headers.get(name).is_some_and(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

/// `PUT /{owner}/{app}/requests/{id}/cancel`: cancelling twice is cancelling.
fn is_cancel(method: &Method, path: &str) -> bool {
    let mut ends_with = path.rsplit('/');
    *method == Method::PUT
        && ends_with.next() == Some("cancel")
        && ends_with.next().is_some_and(|id| !id.is_empty())
        && ends_with.next() == Some("requests")
}
