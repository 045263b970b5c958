//! A request in the queue.

use serde_json::{Value, json};

use super::{
    answer::{Answer, words},
    failure::ErrorType,
};

/// How many lines of its log a status has.
const MAX_LINES: usize = 100;

/// A submitted request.
pub(super) struct Job {
    pub(super) app: String,
    /// What the application answered, or the error that the job ended with.
    outcome: Result<Answer, ErrorType>,
    polls: usize,
    /// Which poll finds it completed.
    polls_until_completed: usize,
    /// Whether a client has seen that it is completed.
    seen_completed: bool,
}

/// How far a job has come.
#[derive(Clone, Copy)]
pub(super) enum Stage {
    Queued,
    InProgress,
    Completed(Option<ErrorType>),
}

/// A job that a client follows, and how.
#[derive(Clone, Debug)]
pub(super) struct Follow {
    pub(super) app: String,
    pub(super) id: String,
    /// The URL of the job.
    pub(super) url: String,
    pub(super) with_logs: bool,
}

/// Which lines of its log a status has.
#[derive(Clone, Copy)]
pub(super) enum Lines {
    None,
    /// All until now: a poll.
    All,
    /// What the poll before did not have: a stream.
    New,
}

impl Follow {
    /// The status that a stage is.
    pub(super) fn status(&self, stage: Stage, logs: Vec<Value>) -> Value {
        let url = &self.url;
        let mut status = json!({
            "request_id": self.id,
            "response_url": url,
            "status_url": format!("{url}/status"),
            "cancel_url": format!("{url}/cancel"),
        });
        status["status"] = match stage {
            Stage::Queued => "IN_QUEUE",
            Stage::InProgress => "IN_PROGRESS",
            Stage::Completed(_) => "COMPLETED",
        }
        .into();
        if let Stage::Queued = stage {
            status["queue_position"] = 0.into();
        } else {
            status["logs"] = if self.with_logs { logs.into() } else { Value::Null };
        }
        if let Stage::Completed(Some(error)) = stage {
            status["error"] = words(error.as_str()).into();
            status["error_type"] = error.as_str().into();
        }
        status
    }
}

impl Job {
    pub(super) fn new(app: String, outcome: Result<Answer, ErrorType>, polls_until_completed: usize) -> Self {
        Self { app, outcome, polls: 0, polls_until_completed, seen_completed: false }
    }

    /// What one more poll of the status finds.
    pub(super) fn poll(&mut self) -> Stage {
        self.polls = self.polls.saturating_add(1);
        self.seen_completed |= self.polls >= self.polls_until_completed;
        match self.polls {
            _ if self.seen_completed => Stage::Completed(self.outcome.as_ref().err().copied()),
            1 => Stage::Queued,
            _ => Stage::InProgress,
        }
    }

    /// The log until the last poll: one line for each poll but the first.
    pub(super) fn logs(&self, lines: Lines) -> Vec<Value> {
        let last = self.polls.saturating_sub(1);
        let first = match lines {
            Lines::None => return Vec::new(),
            Lines::All => last.saturating_sub(MAX_LINES) + 1,
            Lines::New => last.max(1),
        };
        let line = |n: usize| {
            let timestamp = format!("2026-01-01T00:{:02}:{:02}.000000+00:00", n / 60 % 60, n % 60);
            json!({ "message": format!("step {n}"), "level": "INFO", "source": "USER", "timestamp": timestamp })
        };
        (first..=last).map(line).collect()
    }

    pub(super) fn result(&mut self) -> Answer {
        self.seen_completed = true;
        self.outcome.clone().unwrap_or_else(Answer::error)
    }

    /// Cancels the job. Returns whether it was in time.
    pub(super) fn cancel(&mut self) -> bool {
        let in_time = !self.seen_completed;
        if in_time {
            self.outcome = Err(ErrorType::ClientCancelled);
            self.seen_completed = true;
        }
        in_time
    }
}
