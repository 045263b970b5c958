//! The failures that a test can set.

use std::time::Duration;

use http::StatusCode;

/// Why an account is locked: the `<reason>` in fal's `403 User is locked. Reason: <reason>.`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lock {
    /// `Exhausted balance. Top up your balance at fal.ai/dashboard/billing`
    ExhaustedBalance,
    /// `Admin lock. Please contact support@fal.ai`
    Admin,
    /// `TOP_UP`
    TopUp,
    /// `Please add a payment method at fal.ai/dashboard/billing`
    NoPaymentMethod,
    /// `This account has been archived. Please contact hello@fal.ai`
    Archived,
    /// `User budget is exceeded. Adjust it at fal.ai/dashboard/billing`
    BudgetExceeded,
    /// `Unknown. Please contact hello@fal.ai`
    Other,
}

impl Lock {
    /// The reason as it stands in the answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ExhaustedBalance => "Exhausted balance. Top up your balance at fal.ai/dashboard/billing",
            Self::Admin => "Admin lock. Please contact support@fal.ai",
            Self::TopUp => "TOP_UP",
            Self::NoPaymentMethod => "Please add a payment method at fal.ai/dashboard/billing",
            Self::Archived => "This account has been archived. Please contact hello@fal.ai",
            Self::BudgetExceeded => "User budget is exceeded. Adjust it at fal.ai/dashboard/billing",
            Self::Other => "Unknown. Please contact hello@fal.ai",
        }
    }
}

/// How a request fails, for [`fail_next`](super::MockFal::fail_next) and
/// [`fail_next_on`](super::MockFal::fail_next_on).
///
/// Most failures meet any request at once: its credential does not matter, its body is not waited for, and nothing is
/// run. Three of them meet only a request that has a valid credential and whose whole body has arrived:
///
/// * [`Model`](Self::Model) and [`Application`](Self::Application) are answers of the application. The request counts
///   as a [run](super::MockFal::runs).
/// * [`Job`](Self::Job) meets only a request that is submitted to the queue. It does not count as a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// An answer with this status, and with the name of the status as `detail`, such as `Bad Gateway`. It must be a final
    /// status, so none below 200.
    Status(StatusCode),
    /// An answer of fal's with this status and this `detail`, such as the 401 of a private application, `Cannot access
    /// application …`. It has no headers of a runner.
    Detail(StatusCode, &'static str),
    /// The same as [`Status`](Self::Status), with `retry-after` in whole seconds (rounded up). fal documents it neither
    /// for runs nor for the queue, but a proxy in front of a server may send it.
    RetryAfter(StatusCode, Duration),
    /// fal could not bring the request to its application, or could not get an answer from it:
    /// `{"detail":…,"error_type":"startup_timeout"}` and `x-fal-error-type`.
    Platform(ErrorType),
    /// The timeout that the caller set with `X-Fal-Request-Timeout` is over: 504 `request_timeout` and
    /// `x-fal-request-timeout-type: user`.
    CallersTimeout,
    /// The model cannot do it: `{"detail":[{"loc":["body"],"msg":…,"type":"content_policy_violation"}]}` and
    /// `x-fal-retryable`. The usual status is 422.
    Model {
        /// The status.
        status: StatusCode,
        /// The `type`, such as `content_policy_violation`.
        error: &'static str,
        /// What `x-fal-retryable` says.
        retryable: bool,
    },
    /// The application was run and answers with this status, with `x-fal-served-from` and `x-fal-billable-units`. A 401
    /// or 403 is the application's own, and must not be taken for one of fal's.
    Application(StatusCode),
    /// The queue accepts the request, and its job ends with this error: the status is `COMPLETED` with `error` and
    /// `error_type`, and the result is the error.
    Job(ErrorType),
    /// The connection is closed without an answer. This also ends all other requests on it.
    Disconnect,
}

/// How far a request gets before a failure meets it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// Its head has arrived.
    Arrival,
    /// The queue has accepted it.
    Queue,
    /// It has reached its application.
    Application,
}

impl Failure {
    pub(super) fn point(self) -> Point {
        match self {
            Self::Model { .. } | Self::Application(_) => Point::Application,
            Self::Job(_) => Point::Queue,
            _ => Point::Arrival,
        }
    }
}

/// The type of an error of fal's platform, which no application can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorType {
    /// 504 `request_timeout`
    RequestTimeout,
    /// 504 `startup_timeout`
    StartupTimeout,
    /// 503 `runner_scheduling_failure`
    RunnerSchedulingFailure,
    /// 503 `runner_connection_timeout`
    RunnerConnectionTimeout,
    /// 503 `runner_disconnected`
    RunnerDisconnected,
    /// 503 `runner_connection_refused`
    RunnerConnectionRefused,
    /// 503 `runner_connection_error`
    RunnerConnectionError,
    /// 502 `runner_incomplete_response`
    RunnerIncompleteResponse,
    /// 500 `runner_server_error`
    RunnerServerError,
    /// 500 `internal_error`
    InternalError,
    /// 499 `client_disconnected`
    ClientDisconnected,
    /// 499 `client_cancelled`
    ClientCancelled,
    /// 400 `bad_request`
    BadRequest,
    /// 429 `concurrent_requests_limit`, with `x-fal-needs-retry: 1`: too many runs at once. The queue has no such
    /// limit.
    ConcurrentRequestsLimit,
}

impl ErrorType {
    /// The type as it stands in the answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RequestTimeout => "request_timeout",
            Self::StartupTimeout => "startup_timeout",
            Self::RunnerSchedulingFailure => "runner_scheduling_failure",
            Self::RunnerConnectionTimeout => "runner_connection_timeout",
            Self::RunnerDisconnected => "runner_disconnected",
            Self::RunnerConnectionRefused => "runner_connection_refused",
            Self::RunnerConnectionError => "runner_connection_error",
            Self::RunnerIncompleteResponse => "runner_incomplete_response",
            Self::RunnerServerError => "runner_server_error",
            Self::InternalError => "internal_error",
            Self::ClientDisconnected => "client_disconnected",
            Self::ClientCancelled => "client_cancelled",
            Self::BadRequest => "bad_request",
            Self::ConcurrentRequestsLimit => "concurrent_requests_limit",
        }
    }

    /// The status of the answer.
    pub fn status(self) -> StatusCode {
        match self {
            Self::RequestTimeout | Self::StartupTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::RunnerSchedulingFailure
            | Self::RunnerConnectionTimeout
            | Self::RunnerDisconnected
            | Self::RunnerConnectionRefused
            | Self::RunnerConnectionError => StatusCode::SERVICE_UNAVAILABLE,
            Self::RunnerIncompleteResponse => StatusCode::BAD_GATEWAY,
            Self::RunnerServerError | Self::InternalError => StatusCode::INTERNAL_SERVER_ERROR,
            // nginx's own, so `http` has no name for it.
            Self::ClientDisconnected | Self::ClientCancelled => {
                StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
            }
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::ConcurrentRequestsLimit => StatusCode::TOO_MANY_REQUESTS,
        }
    }
}
