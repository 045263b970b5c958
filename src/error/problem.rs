//! What our own callers learn when a request to fal failed: a status, a reason and a body. It knows no web framework.

use std::error::Error;

use http::{HeaderValue, StatusCode};
use serde_json::json;

use super::{
    FalAuthError, Reason,
    foreign::{causes, is_timeout, is_too_long},
};

/// A [`FalAuthError`] as problem details (RFC 9457). The table is in the docs of [`axum`](crate::axum).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    /// A short name that does not change.
    pub(crate) reason: &'static str,
}

impl Problem {
    pub(crate) const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/problem+json");

    /// The body. It holds nothing but the status and the reason: the rest is for the operator.
    pub(crate) fn body(self) -> String {
        // Without a type of its own a problem has the title of its status: RFC 9457, 4.2.1.
        let title = self.status.canonical_reason().unwrap_or_default();
        json!({ "type": "about:blank", "title": title, "status": self.status.as_u16(), "reason": self.reason })
            .to_string()
    }

    fn without_answer(error: &(dyn Error + 'static)) -> Self {
        let (status, reason) = if causes(error).any(is_too_long) {
            (StatusCode::PAYLOAD_TOO_LARGE, "body_too_long")
        } else if causes(error).any(is_timeout) {
            (StatusCode::GATEWAY_TIMEOUT, "timeout")
        } else {
            (StatusCode::BAD_GATEWAY, "transport")
        };
        Self { status, reason }
    }
}

impl From<&FalAuthError> for Problem {
    fn from(error: &FalAuthError) -> Self {
        match error {
            FalAuthError::Unauthorized(refusal) | FalAuthError::Forbidden(refusal) => refusal.reason().into(),
            FalAuthError::NoCredential => Self { status: StatusCode::INTERNAL_SERVER_ERROR, reason: "no_credential" },
            FalAuthError::Transport(error) => Self::without_answer(&**error),
        }
    }
}

impl From<Reason> for Problem {
    fn from(reason: Reason) -> Self {
        let status = match reason {
            Reason::AccountLocked(_) => StatusCode::SERVICE_UNAVAILABLE,
            Reason::MissingCredential
            | Reason::MalformedCredential
            | Reason::WrongScheme
            | Reason::UnknownCredential
            | Reason::InsufficientPermissions
            | Reason::AccessDenied
            | Reason::Application
            | Reason::Unknown => StatusCode::BAD_GATEWAY,
        };
        Self { status, reason: reason.as_str() }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use bytes::Bytes;
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;
    use crate::error::{BoxError, LockReason};

    /// The row of the table. A new reason does not compile without one.
    fn row(reason: Reason) -> (u16, &'static str, &'static str) {
        match reason {
            Reason::MissingCredential => (502, "Bad Gateway", "missing_credential"),
            Reason::MalformedCredential => (502, "Bad Gateway", "malformed_credential"),
            Reason::WrongScheme => (502, "Bad Gateway", "wrong_scheme"),
            Reason::UnknownCredential => (502, "Bad Gateway", "unknown_credential"),
            Reason::AccountLocked(
                LockReason::ExhaustedBalance
                | LockReason::Admin
                | LockReason::TopUp
                | LockReason::Archived
                | LockReason::NoPaymentMethod
                | LockReason::BudgetExceeded
                | LockReason::Other,
            ) => (503, "Service Unavailable", "account_locked"),
            Reason::InsufficientPermissions => (502, "Bad Gateway", "insufficient_permissions"),
            Reason::AccessDenied => (502, "Bad Gateway", "access_denied"),
            Reason::Application => (502, "Bad Gateway", "application"),
            Reason::Unknown => (502, "Bad Gateway", "unknown"),
        }
    }

    const REASONS: [Reason; 15] = [
        Reason::MissingCredential,
        Reason::MalformedCredential,
        Reason::WrongScheme,
        Reason::UnknownCredential,
        Reason::AccountLocked(LockReason::ExhaustedBalance),
        Reason::AccountLocked(LockReason::Admin),
        Reason::AccountLocked(LockReason::TopUp),
        Reason::AccountLocked(LockReason::Archived),
        Reason::AccountLocked(LockReason::NoPaymentMethod),
        Reason::AccountLocked(LockReason::BudgetExceeded),
        Reason::AccountLocked(LockReason::Other),
        Reason::InsufficientPermissions,
        Reason::AccessDenied,
        Reason::Application,
        Reason::Unknown,
    ];

    #[test]
    fn each_reason_is_as_the_table_has_it() {
        for reason in REASONS {
            let problem = Problem::from(reason);
            let (status, title, name) = row(reason);
            assert_eq!((problem.status.as_u16(), problem.reason), (status, name), "{reason:?}");
            let body = json!({"type": "about:blank", "title": title, "status": status, "reason": name});
            assert_eq!(serde_json::from_str::<Value>(&problem.body()).unwrap(), body, "{reason:?}");
        }
    }

    fn transport(error: impl Into<BoxError>) -> (u16, &'static str) {
        let Problem { status, reason } = Problem::from(&FalAuthError::Transport(error.into()));
        (status.as_u16(), reason)
    }

    #[tokio::test]
    async fn a_timeout_is_a_504() {
        let zero = std::time::Duration::ZERO;
        let elapsed = tokio::time::timeout(zero, std::future::pending::<()>()).await.unwrap_err();
        let timeouts: [BoxError; 4] = [
            elapsed.into(),
            tower::timeout::error::Elapsed::new().into(),
            io::Error::from(io::ErrorKind::TimedOut).into(),
            // Some way down, as a client's own error has it.
            io::Error::other(FalAuthError::Transport(tower::timeout::error::Elapsed::new().into())).into(),
        ];
        for error in timeouts {
            assert_eq!(transport(error), (504, "timeout"));
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_is_a_413() {
        let too_long = http_body_util::Limited::new(http_body_util::Full::<Bytes>::from("long"), 3).collect().await;
        assert_eq!(transport(io::Error::other(too_long.unwrap_err())), (413, "body_too_long"));
    }

    #[test]
    fn any_other_failure_is_a_502() {
        for error in ["hush".into(), BoxError::from(io::Error::from(io::ErrorKind::ConnectionRefused))] {
            assert_eq!(transport(error), (502, "transport"));
        }
    }
}
