//! What the mock knows: the valid credentials, what the test has set, the log and the queue.

use std::{collections::BTreeMap, time::Duration};

use http::HeaderValue;
use subtle::ConstantTimeEq as _;

use super::{
    answer::Answer,
    by_path::ByPath,
    failure::{ErrorType, Failure, Lock, Point},
    job::Job,
    log::Log,
    received::Presented,
    refusal::Credentials,
    request_id::request_number,
    storage::Parts,
    target::Target,
    token::Tokens,
};
use crate::credential::{Credential, KeyId};

/// How many jobs the queue holds. The oldest goes first.
const MAX_JOBS: usize = 10_000;

pub(super) struct State {
    grants: Vec<Grant>,
    pub(super) lock: Option<Lock>,
    pub(super) latency: Duration,
    pub(super) close_on_refusal: bool,
    failures: ByPath<Failing>,
    answers: ByPath<Answer>,
    pub(super) polls_until_completed: usize,
    pub(super) runs: u64,
    pub(super) keep_content: bool,
    pub(super) log: Log,
    pub(super) tokens: Tokens,
    pub(super) parts: Parts,
    jobs: BTreeMap<u64, Job>,
}

/// A valid credential. A clone shares the buffer that is wiped on drop, so there is no other copy of the secret.
struct Grant {
    credential: Credential,
    permitted: bool,
}

/// What the valid credential of a request is.
pub(super) struct Granted {
    key_id: Option<KeyId>,
    pub(super) permitted: bool,
}

/// A failure, and how many more requests it meets.
struct Failing {
    left: usize,
    failure: Failure,
}

impl Default for State {
    fn default() -> Self {
        Self {
            grants: Vec::new(),
            lock: None,
            latency: Duration::ZERO,
            close_on_refusal: false,
            failures: ByPath::default(),
            answers: ByPath::default(),
            polls_until_completed: 3,
            runs: 0,
            keep_content: false,
            log: Log::default(),
            tokens: Tokens::default(),
            parts: Parts::default(),
            jobs: BTreeMap::new(),
        }
    }
}

impl State {
    pub(super) fn grant(&mut self, credential: &Credential, permitted: bool) {
        self.revoke(credential);
        self.grants.push(Grant { credential: credential.clone(), permitted });
    }

    pub(super) fn revoke(&mut self, credential: &Credential) {
        self.grants.retain(|grant| !grant.credential.same_value(credential));
    }

    /// The valid credential of a request, given all that it has.
    pub(super) fn granted(&self, credentials: &Credentials, target: Option<&Target<'_>>) -> Option<Granted> {
        // Servers differ in which of several headers they take, so a client that sends several has a bug.
        let [value] = credentials.values.as_slice() else { return None };
        if credentials.are_a_token && target.is_some_and(|target| self.tokens.admit(value, target)) {
            return Some(Granted { key_id: None, permitted: true });
        }
        let is_it = |grant: &&Grant| grant.credential.header().as_bytes().ct_eq(value.as_bytes()).into();
        let Grant { credential, permitted } = self.grants.iter().find(is_it)?;
        Some(Granted { key_id: credential.key_id().cloned(), permitted: *permitted })
    }

    pub(super) fn presented(&self, credentials: &Credentials, target: Option<&Target<'_>>) -> Presented {
        match (self.granted(credentials, target), credentials.values.first()) {
            (Some(granted), _) => Presented::Accepted(granted.key_id),
            (None, Some(value)) => Presented::Refused(key_id(value)),
            (None, None) => Presented::Nothing,
        }
    }

    /// Lets the next `n` requests to a path and below it fail. An empty path includes all.
    pub(super) fn fail_next(&mut self, path: &str, n: usize, failure: Failure) {
        self.failures.set(path, (n > 0).then_some(Failing { left: n, failure }));
    }

    /// The failure that meets a request to this path at this point, if there is one.
    pub(super) fn next_failure(&mut self, path: &str, point: Point) -> Option<Failure> {
        let is_due = |failing: &Failing| failing.left > 0 && failing.failure.point() == point;
        let failing = self.failures.find(path, is_due)?;
        failing.left -= 1;
        Some(failing.failure)
    }

    /// Sets what the application at a path answers. `None` takes it back.
    pub(super) fn set_answer(&mut self, path: &str, answer: Option<Answer>) {
        self.answers.set(path, answer);
    }

    pub(super) fn answer(&mut self, path: &str) -> Option<Answer> {
        self.answers.find(path, |_| true).cloned()
    }

    /// Puts a job into the queue, under the number of the request that submitted it.
    pub(super) fn submit(&mut self, number: u64, app: String, outcome: Result<Answer, ErrorType>) {
        self.jobs.insert(number, Job::new(app, outcome, self.polls_until_completed));
        if self.jobs.len() > MAX_JOBS {
            self.jobs.pop_first();
        }
    }

    pub(super) fn job(&mut self, app: &str, id: &str) -> Option<&mut Job> {
        self.jobs.get_mut(&request_number(id)?).filter(|job| job.app == app)
    }
}

fn key_id(value: &HeaderValue) -> Option<KeyId> {
    // The copy that this makes is wiped on drop.
    Credential::key(value.as_bytes().strip_prefix(b"Key ")?).ok()?.key_id().cloned()
}
