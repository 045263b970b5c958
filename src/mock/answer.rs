//! An answer, of fal's or of an application's.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};

use super::{
    failure::{ErrorType, Failure},
    job::Follow,
};

/// The header that names the runner which served a request.
const SERVED_FROM: HeaderName = HeaderName::from_static("x-fal-served-from");

/// The header that says how much a request costs.
const BILLABLE_UNITS: HeaderName = HeaderName::from_static("x-fal-billable-units");

/// The header with a token for fal's storage, which whoever holds it may use: a secret in an answer.
const CDN_TOKEN: HeaderName = HeaderName::from_static("x-fal-cdn-token");

/// What an application answers: a status, headers and a body. [`MockFal::answer`](super::MockFal::answer) takes it.
///
/// A new one is the answer of a runner of fal's: 200, with the headers `x-fal-served-from`, `x-fal-billable-units` and
/// `x-fal-cdn-token`. Every answer also gets `x-fal-request-id` when it is sent.
///
/// ```
/// use http::StatusCode;
/// use serde_json::json;
/// use tower_fal::mock::Answer;
///
/// // An application that refuses in fal's own words ...
/// let forged = Answer::json(json!({ "detail": "invalid key credentials" })).status(StatusCode::UNAUTHORIZED);
/// // ... and without the headers that show that a runner answered.
/// let disguised = forged.without_runner_headers();
/// // A proxy in front of an application may answer like this.
/// let page = Answer::bytes("text/html", "<title>502 Bad Gateway</title>").status(StatusCode::BAD_GATEWAY);
/// ```
#[derive(Clone, Debug)]
pub struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) content: Content,
}

/// The body of an answer.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Nothing,
    Json(Value),
    /// Each event of a stream is this value.
    Events(Value),
    /// Each event of a stream is a status of this job.
    Statuses(Follow),
    Bytes(Bytes),
}

impl Answer {
    /// A JSON body.
    pub fn json(body: Value) -> Self {
        Self::application(StatusCode::OK, body)
    }

    /// A body of any content type. It is sent as it is, also on a path that ends in `/stream`.
    ///
    /// # Panics
    /// When the content type cannot be the value of a header.
    pub fn bytes(content_type: &str, body: impl Into<Bytes>) -> Self {
        let answer = Self::new(StatusCode::OK, Content::Bytes(body.into())).by_a_runner();
        answer.header("content-type", content_type)
    }

    /// The status. It must be a final one, so none below 200.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// A header. It replaces any of the same name.
    ///
    /// # Panics
    /// When the name or the value cannot be those of a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name: HeaderName =
            name.parse().unwrap_or_else(|error| panic!("`{name}` is not the name of a header: {error}"));
        let value = HeaderValue::from_str(value)
            .unwrap_or_else(|error| panic!("the value of `{name}` is not one of a header: {error}"));
        self.headers.insert(name, value);
        self
    }

    /// Removes `x-fal-served-from`, `x-fal-billable-units` and `x-fal-cdn-token`, so that nothing says that a runner gave
    /// the answer. A gateway in front of the application answers like this.
    #[must_use]
    pub fn without_runner_headers(mut self) -> Self {
        self.headers.remove(SERVED_FROM);
        self.headers.remove(BILLABLE_UNITS);
        self.headers.remove(CDN_TOKEN);
        self
    }

    fn new(status: StatusCode, content: Content) -> Self {
        Self { status, headers: HeaderMap::new(), content }
    }

    fn with(mut self, name: HeaderName, value: impl Into<HeaderValue>) -> Self {
        self.headers.insert(name, value.into());
        self
    }

    fn with_json(status: StatusCode, body: Value) -> Self {
        Self::new(status, Content::Json(body)).with(CONTENT_TYPE, HeaderValue::from_static("application/json"))
    }

    fn by_a_runner(self) -> Self {
        self.with(SERVED_FROM, HeaderValue::from_static("00000000-0000-4000-9000-000000000001"))
            .with(BILLABLE_UNITS, 1)
            .with(CDN_TOKEN, HeaderValue::from_static("cdn-token-of-the-mock"))
    }

    pub(super) fn ok(body: Value) -> Self {
        Self::with_json(StatusCode::OK, body)
    }

    /// What an application answers.
    fn application(status: StatusCode, body: Value) -> Self {
        Self::with_json(status, body).by_a_runner()
    }

    pub(super) fn detail(status: StatusCode, detail: impl Into<String>) -> Self {
        Self::with_json(status, json!({ "detail": detail.into() }))
    }

    /// What the client sent does not fit, for one reason.
    pub(super) fn unprocessable(reason: &Value) -> Self {
        Self::with_json(StatusCode::UNPROCESSABLE_ENTITY, json!({ "detail": [reason] }))
    }

    /// The statuses of a job as a stream.
    pub(super) fn statuses(job: Follow) -> Self {
        Self::new(StatusCode::OK, Content::Statuses(job))
            .with(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"))
    }

    /// Yes to a browser's question. The headers of an answer of the storage say to what.
    pub(super) fn preflight() -> Self {
        Self::new(StatusCode::NO_CONTENT, Content::Nothing)
    }

    /// An answer of the queue that consists of a status of its own.
    pub(super) fn queue(status: StatusCode, name: &str) -> Self {
        Self::with_json(status, json!({ "status": name }))
    }

    /// A refusal in the form of the Platform API.
    pub(super) fn platform_api(status: StatusCode, message: &str) -> Self {
        Self::with_json(status, json!({ "error": { "type": "authorization_error", "message": message } }))
    }

    pub(super) fn error(error: ErrorType) -> Self {
        let name = error.as_str();
        let answer = Self::with_json(error.status(), json!({ "detail": words(name), "error_type": name }))
            .with(HeaderName::from_static("x-fal-error-type"), HeaderValue::from_static(name));
        match error {
            ErrorType::ConcurrentRequestsLimit => answer.with(HeaderName::from_static("x-fal-needs-retry"), 1),
            _ => answer,
        }
    }

    /// A handshake is accepted: the connection becomes a WebSocket.
    pub(super) fn switching(headers: HeaderMap) -> Self {
        Self { status: StatusCode::SWITCHING_PROTOCOLS, headers, content: Content::Nothing }
    }

    pub(super) fn body_cut_off() -> Self {
        Self::detail(StatusCode::BAD_REQUEST, "The request body was cut off")
    }

    /// The answer of a failure. `None` is no answer at all.
    pub(super) fn failure(failure: Failure) -> Option<Self> {
        let status_alone = |status: StatusCode| Self::detail(status, status.canonical_reason().unwrap_or_default());
        Some(match failure {
            Failure::Status(status) => status_alone(status),
            Failure::Detail(status, detail) => Self::detail(status, detail),
            Failure::RetryAfter(status, after) => {
                let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0));
                status_alone(status).with(HeaderName::from_static("retry-after"), seconds)
            }
            Failure::Platform(error) | Failure::Job(error) => Self::error(error),
            Failure::CallersTimeout => Self::error(ErrorType::RequestTimeout)
                .with(HeaderName::from_static("x-fal-request-timeout-type"), HeaderValue::from_static("user")),
            Failure::Model { status, error, retryable } => {
                let problem = json!({ "loc": ["body"], "msg": words(error), "type": error });
                let retryable = if retryable { "true" } else { "false" };
                Self::application(status, json!({ "detail": [problem] }))
                    .with(HeaderName::from_static("x-fal-retryable"), HeaderValue::from_static(retryable))
            }
            Failure::Application(status) => {
                Self::application(status, json!({ "detail": "The application has rules of its own" }))
            }
            Failure::Disconnect => return None,
        })
    }

    /// The same value as the events of a stream, unless it is an error or no JSON.
    pub(super) fn streamed(self) -> Self {
        match self.content {
            Content::Json(value) if self.status.is_success() => Self { content: Content::Events(value), ..self }
                .with(CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
            content => Self { content, ..self },
        }
    }

    pub(super) fn is_refusal(&self) -> bool {
        matches!(self.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
    }
}

/// 200 with this body, from a runner.
impl From<Value> for Answer {
    fn from(body: Value) -> Self {
        Self::json(body)
    }
}

/// `startup timeout` for `startup_timeout`.
pub(super) fn words(name: &str) -> String {
    name.replace('_', " ")
}
