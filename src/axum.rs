//! A [`FalAuthError`] as the response of an axum handler that could not get an answer from fal.
//!
//! | error | [`Reason`] | status | `reason` |
//! |---|---|---|---|
//! | `Unauthorized` | `MissingCredential` | 502 | `missing_credential` |
//! | | `MalformedCredential` | 502 | `malformed_credential` |
//! | | `WrongScheme` | 502 | `wrong_scheme` |
//! | | `UnknownCredential` | 502 | `unknown_credential` |
//! | `Forbidden` | `AccountLocked`, whatever locked it | 503 | `account_locked` |
//! | | `InsufficientPermissions` | 502 | `insufficient_permissions` |
//! | | `AccessDenied` | 502 | `access_denied` |
//! | either | `Application` | 502 | `application` |
//! | | `Unknown` | 502 | `unknown` |
//! | `Transport` | a time-out is among its causes: tower's, Tokio's, the system's, or with `reqwest` reqwest's | 504 | `timeout` |
//! | | the request's body was longer than a limit around it allows, such as tower-http's | 413 | `body_too_long` |
//! | | anything else | 502 | `transport` |
//!
//! The status is that of a server whose own call failed: but for a body that they sent, your callers did nothing wrong,
//! and a 401 would have them look for a mistake in *their* credentials. A locked account is a 503, as the server cannot
//! do its work until somebody has paid. There is no `Retry-After`, since fal states no time after which it would be
//! worth it.
//!
//! The body is `application/problem+json` (RFC 9457) and says no more than the table:
//!
//! ```json
//! {"type":"about:blank","title":"Bad Gateway","status":502,"reason":"unknown_credential"}
//! ```
//!
//! No key id, no source, no word of fal's: those go to the operator, as an event with the whole error (feature
//! `tracing`): for one reason the 1st, 2nd, 4th, 8th… is a warning, and the others are for debugging. The [`Refusal`]
//! is also in the response's extensions, for a layer that counts or logs them; extensions do not leave the server.
//!
//! ```
//! use axum::{body::Bytes, extract::State, http::Request, response::IntoResponse};
//! use http_body_util::Full;
//! use tower::ServiceExt as _;
//! use tower_fal::{FalAuthError, FalClient};
//!
//! async fn draw(State(fal): State<FalClient>, input: Bytes) -> Result<impl IntoResponse, FalAuthError> {
//!     let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::new(input)).unwrap_or_default();
//!     Ok(fal.oneshot(request).await?.map(axum::body::Body::new))
//! }
//! # fn app(fal: FalClient) -> axum::Router {
//! axum::Router::new().route("/draw", axum::routing::post(draw)).with_state(fal)
//! # }
//! ```

use std::error::Error;

use axum_core::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::json;

use crate::{
    error::{
        FalAuthError, Reason, Refusal,
        foreign::{causes, is_timeout, is_too_long},
    },
    events,
};

/// See the [module docs](self) for the table.
impl IntoResponse for FalAuthError {
    fn into_response(self) -> Response {
        let (status, reason) = match &self {
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => {
                (status_of(refusal.reason()), refusal.reason().as_str())
            }
            Self::Transport(error) => status_without_answer(&**error),
        };
        events::answered(status, reason, &self);
        let mut response = Response::new(problem(status, reason));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(refusal) = self.refusal() {
            response.extensions_mut().insert::<Refusal>(refusal.clone());
        }
        response
    }
}

fn status_of(reason: Reason) -> StatusCode {
    match reason {
        Reason::AccountLocked(_) => StatusCode::SERVICE_UNAVAILABLE,
        Reason::MissingCredential
        | Reason::MalformedCredential
        | Reason::WrongScheme
        | Reason::UnknownCredential
        | Reason::InsufficientPermissions
        | Reason::AccessDenied
        | Reason::Application
        | Reason::Unknown => StatusCode::BAD_GATEWAY,
    }
}

fn status_without_answer(error: &(dyn Error + 'static)) -> (StatusCode, &'static str) {
    if causes(error).any(is_too_long) {
        (StatusCode::PAYLOAD_TOO_LARGE, "body_too_long")
    } else if causes(error).any(is_timeout) {
        (StatusCode::GATEWAY_TIMEOUT, "timeout")
    } else {
        (StatusCode::BAD_GATEWAY, "transport")
    }
}

fn problem(status: StatusCode, reason: &'static str) -> Body {
    // Without a type of its own a problem has the title of its status: RFC 9457, 4.2.1.
    let title = status.canonical_reason().unwrap_or_default();
    Body::from(
        json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "reason": reason }).to_string(),
    )
}

#[cfg(test)]
mod tests {
    use std::io;

    use bytes::Bytes;
    use http::HeaderMap;
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;
    use crate::{
        credential::Credential,
        error::{BoxError, LockReason, RefusalParts, ReloadError},
    };

    /// An error that has a secret to tell in each of its fields.
    fn refused(status: StatusCode, reason: Reason) -> FalAuthError {
        let hush = || "hush".to_owned();
        let mut headers = HeaderMap::new();
        headers.insert("hush", HeaderValue::from_static("hush"));
        Refusal::new(RefusalParts {
            detail: Some(hush()),
            error_type: Some(hush()),
            request_id: Some(hush()),
            key_id: Credential::key("hush:hush").unwrap().key_id().cloned(),
            headers,
            body: Bytes::from_static(b"hush"),
            reload: Some(ReloadError::Failed(crate::error::SourceError::new("hush", "hush"))),
            ..RefusalParts::of_request(status, reason, "file:/hush".into())
        })
        .into()
    }

    async fn answer(error: FalAuthError) -> (u16, Value, Response<()>) {
        let (head, body) = error.into_response().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), serde_json::from_slice(&body).unwrap(), Response::from_parts(head, ()))
    }

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
                | LockReason::PaymentMethod
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
        Reason::AccountLocked(LockReason::PaymentMethod),
        Reason::AccountLocked(LockReason::BudgetExceeded),
        Reason::AccountLocked(LockReason::Other),
        Reason::InsufficientPermissions,
        Reason::AccessDenied,
        Reason::Application,
        Reason::Unknown,
    ];

    #[tokio::test]
    async fn each_reason_is_answered_as_the_table_has_it_and_with_nothing_else() {
        for reason in REASONS {
            for refused_with in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
                let (status, body, response) = answer(refused(refused_with, reason)).await;
                let (expected, title, name) = row(reason);
                assert_eq!(status, expected, "{reason:?}");
                let problem = json!({"type": "about:blank", "title": title, "status": expected, "reason": name});
                assert_eq!(body, problem, "{reason:?}");
                let headers: Vec<_> = response.headers().iter().collect();
                let json = HeaderValue::from_static("application/problem+json");
                assert_eq!(headers, [(&CONTENT_TYPE, &json)], "{reason:?}");
                assert_eq!(response.extensions().get::<Refusal>().unwrap().reason(), reason);
            }
        }
    }

    #[tokio::test]
    async fn a_request_that_failed_without_an_answer_is_a_504_when_time_was_up_a_413_when_too_long_and_else_a_502() {
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
            let (status, body, response) = answer(FalAuthError::Transport(error)).await;
            let problem =
                json!({"type": "about:blank", "title": "Gateway Timeout", "status": 504, "reason": "timeout"});
            assert_eq!((status, body), (504, problem));
            assert!(response.extensions().get::<Refusal>().is_none());
        }
        let too_long = http_body_util::Limited::new(http_body_util::Full::<Bytes>::from("hush"), 3).collect().await;
        let (status, body, _) = answer(FalAuthError::Transport(io::Error::other(too_long.unwrap_err()).into())).await;
        let problem =
            json!({"type": "about:blank", "title": "Payload Too Large", "status": 413, "reason": "body_too_long"});
        assert_eq!((status, body), (413, problem));

        for error in ["hush".into(), BoxError::from(io::Error::from(io::ErrorKind::ConnectionRefused))] {
            let (status, body, _) = answer(FalAuthError::Transport(error)).await;
            let problem = json!({"type": "about:blank", "title": "Bad Gateway", "status": 502, "reason": "transport"});
            assert_eq!((status, body), (502, problem));
        }
    }
}
