//! A request in the queue.

use super::{answer::Answer, failure::ErrorType};

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
