use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header::ACCEPT};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{State, freshness::freshness};
use crate::{
    error::report,
    events,
    fetch::{Fetch, FetchError},
    webhook::{InvalidJwks, PublicKeys},
};

/// Between two fetches for the sake of signatures that nobody knows, and after one that failed.
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// The task that fetches the keys. It is the only one that does, so there is never more than one fetch under way, and a
/// request that is dropped interrupts none.
pub(super) struct Driver {
    fetch: Fetch,
    url: Uri,
    state: watch::Sender<State>,
    wanted: watch::Receiver<u64>,
    ended: u64,
}

impl Driver {
    pub(super) fn new(fetch: Fetch, url: Uri, state: watch::Sender<State>, wanted: watch::Receiver<u64>) -> Self {
        Self { fetch, url, state, wanted, ended: 0 }
    }

    pub(super) async fn run(mut self) {
        loop {
            let fetched = tokio::select! {
                fetched = self.fetch() => fetched,
                () = self.state.closed() => return,
            };
            let next = self.publish(fetched);
            let ended = self.ended;
            let asked = tokio::select! {
                () = sleep_until(next) => false,
                asked = self.wanted.wait_for(|wanted| *wanted > ended) => asked.is_ok(),
                () = self.state.closed() => return,
            };
            self.state.send_modify(|state| {
                state.fetching = true;
                if asked {
                    state.refetch_from = Instant::now() + MINUTE;
                }
            });
        }
    }

    /// In a task of its own, so that a client that panics is one that failed.
    async fn fetch(&self) -> Result<Fetched, Failed> {
        let (fetch, url) = (self.fetch.clone(), self.url.clone());
        let mut task = JoinSet::new();
        task.spawn(async move { fetched(&fetch, url).await });
        match task.join_next().await {
            Some(Ok(fetched)) => fetched,
            _ => Err(Failed::Panicked),
        }
    }

    /// Returns when the next fetch begins.
    fn publish(&mut self, fetched: Result<Fetched, Failed>) -> Instant {
        self.ended += 1;
        let now = Instant::now();
        let mut next = now;
        self.state.send_modify(|state| {
            state.ended = self.ended;
            state.fetching = false;
            let wait = match fetched {
                Ok(Fetched { keys, fresh }) => {
                    if state.keys.as_ref() != Some(&keys) {
                        events::webhook::keys_changed(keys.len());
                    }
                    state.keys = Some(keys);
                    state.fetched_at = Some(SystemTime::now());
                    state.failures = 0;
                    state.last_error = None;
                    fresh
                }
                Err(failed) => {
                    // Somebody waits for the first keys. Later ones are only newer.
                    let wait = match state.keys {
                        None => Duration::from_secs(1 << state.failures.min(6)).min(MINUTE),
                        Some(_) => MINUTE,
                    };
                    state.failures = state.failures.saturating_add(1);
                    state.last_error = Some(failed.to_string());
                    events::webhook::keys_not_fetched(&report(&failed), state.failures);
                    wait
                }
            };
            state.next = now + wait;
            next = state.next;
        });
        next
    }
}

struct Fetched {
    keys: PublicKeys,
    fresh: Duration,
}

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("the keys of fal's webhooks could not be fetched")]
    NoAnswer(#[source] FetchError),
    #[error("the keys of fal's webhooks could not be fetched: the answer has the status {}", .0.as_u16())]
    Status(StatusCode),
    #[error("the answer that should have fal's keys cannot be used: {0}")]
    Answer(InvalidJwks),
    #[error("the client that fetches the keys of fal's webhooks has panicked")]
    Panicked,
}

async fn fetched(fetch: &Fetch, url: Uri) -> Result<Fetched, Failed> {
    let mut request = Request::new(http_body_util::Full::default());
    *request.uri_mut() = url;
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
    let answer = fetch.fetch(request).await.map_err(Failed::NoAnswer)?;
    if answer.status() != StatusCode::OK {
        return Err(Failed::Status(answer.status()));
    }
    let headers: &HeaderMap = answer.headers();
    let fresh = freshness(headers);
    let keys = PublicKeys::from_jwks(answer.body()).map_err(Failed::Answer)?;
    Ok(Fetched { keys, fresh })
}
