//! Every answer there is.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::failure::{ErrorType, Failure};

/// The status, headers and body of an answer.
#[derive(Clone)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Value,
    /// Whether the body is sent as the events of a stream.
    pub(super) streamed: bool,
}

impl Answer {
    fn new(status: StatusCode, body: Value) -> Self {
        Self { status, headers: HeaderMap::new(), body, streamed: false }
    }

    fn with(mut self, name: &'static str, value: impl Into<HeaderValue>) -> Self {
        self.headers.insert(HeaderName::from_static(name), value.into());
        self
    }

    pub(super) fn ok(body: Value) -> Self {
        Self::new(StatusCode::OK, body)
    }

    /// What an application answers.
    pub(super) fn application(status: StatusCode, body: Value) -> Self {
        Self::new(status, body)
            .with("x-fal-served-from", HeaderValue::from_static("00000000-0000-4000-9000-000000000001"))
            .with("x-fal-billable-units", 1)
    }

    pub(super) fn detail(status: StatusCode, detail: impl Into<String>) -> Self {
        Self::new(status, json!({ "detail": detail.into() }))
    }

    /// What the queue has to say.
    pub(super) fn queue(status: StatusCode, says: &str) -> Self {
        Self::new(status, json!({ "status": says }))
    }

    /// A refusal in the Platform API's form.
    pub(super) fn platform_api(status: StatusCode, message: &str) -> Self {
        Self::new(status, json!({ "error": { "type": "authorization_error", "message": message } }))
    }

    pub(super) fn error(error: ErrorType) -> Self {
        let name = error.as_str();
        let answer = Self::new(error.status(), json!({ "detail": words(name), "error_type": name }))
            .with("x-fal-error-type", HeaderValue::from_static(name));
        match error {
            ErrorType::ConcurrentRequestsLimit => answer.with("x-fal-needs-retry", 1),
            _ => answer,
        }
    }

    /// A handshake is accepted: from here on it is a WebSocket.
    pub(super) fn switching(headers: HeaderMap) -> Self {
        Self { status: StatusCode::SWITCHING_PROTOCOLS, headers, body: Value::Null, streamed: false }
    }

    pub(super) fn body_cut_off() -> Self {
        Self::detail(StatusCode::BAD_REQUEST, "The request body was cut off")
    }

    /// `None` is no answer at all.
    pub(super) fn failure(failure: Failure) -> Option<Self> {
        let status_alone = |status: StatusCode| Self::detail(status, status.canonical_reason().unwrap_or_default());
        Some(match failure {
            Failure::Status(status) => status_alone(status),
            Failure::RetryAfter(status, after) => {
                let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0));
                status_alone(status).with("retry-after", seconds)
            }
            Failure::Platform(error) => Self::error(error),
            Failure::CallersTimeout => Self::error(ErrorType::RequestTimeout)
                .with("x-fal-request-timeout-type", HeaderValue::from_static("user")),
            Failure::Model { status, error, retryable } => {
                let problem = json!({ "loc": ["body"], "msg": words(error), "type": error });
                let retryable = if retryable { "true" } else { "false" };
                Self::application(status, json!({ "detail": [problem] }))
                    .with("x-fal-retryable", HeaderValue::from_static(retryable))
            }
            Failure::Application(status) => {
                Self::application(status, json!({ "detail": "The application has rules of its own" }))
            }
            Failure::Disconnect => return None,
        })
    }

    /// The same as the events of a stream, unless it is an error.
    pub(super) fn streamed(mut self) -> Self {
        self.streamed = self.status.is_success();
        self
    }

    pub(super) fn is_refusal(&self) -> bool {
        matches!(self.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
    }
}

/// `startup_timeout` in words.
fn words(name: &str) -> String {
    name.replace('_', " ")
}
