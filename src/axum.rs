//! A [`FalAuthError`] as the response of an axum handler that could not get an answer from fal.
//!
//! | error | [`Reason`](crate::error::Reason) | status | `reason` |
//! |---|---|---|---|
//! | `Unauthorized` | `MissingCredential` | 502 | `missing_credential` |
//! | | `MalformedCredential` | 502 | `malformed_credential` |
//! | | `WrongScheme` | 502 | `wrong_scheme` |
//! | | `UnknownCredential` | 502 | `unknown_credential` |
//! | `Forbidden` | `AccountLocked`, for any [`LockReason`](crate::error::LockReason) | 503 | `account_locked` |
//! | | `InsufficientPermissions` | 502 | `insufficient_permissions` |
//! | | `AccessDenied` | 502 | `access_denied` |
//! | either | `Application` | 502 | `application` |
//! | | `Unknown` | 502 | `unknown` |
//! | `NoCredential` | | 500 | `no_credential` |
//! | `Transport` | a timeout is among its causes: tower's, Tokio's, the system's, or with `reqwest` reqwest's | 504 | `timeout` |
//! | | the request's body was longer than a limit around it allows, such as tower-http's | 413 | `body_too_long` |
//! | | anything else | 502 | `transport` |
//!
//! The statuses are those of a gateway. Your callers did nothing wrong, except for a body that is too long, and a 401
//! would make them look for a mistake in *their* credentials. A locked account is a 503, as the server cannot work until
//! the account is unlocked. There is no `Retry-After`: fal does not say when a retry would succeed.
//!
//! The body is `application/problem+json` (RFC 9457) and says no more than the table:
//!
//! ```json
//! {"type":"about:blank","title":"Bad Gateway","status":502,"reason":"unknown_credential"}
//! ```
//!
//! It holds no key id, no source and no text of fal's. The operator gets those, as an event with the whole error (feature
//! `tracing`). The 1st, 2nd, 4th, 8th… event of one reason is a warning, the others are for debugging. The [`Refusal`] is
//! also in the response's extensions, for a layer that counts or logs them; extensions do not leave the server.
//!
//! ```
//! use axum::{body::Bytes, extract::State, http::Request, response::IntoResponse};
//! use http_body_util::Full;
//! use tower::ServiceExt as _;
//! use tower_fal::{FalAuthError, FalClient};
//!
//! async fn draw(State(fal): State<FalClient>, input: Bytes) -> Result<impl IntoResponse, FalAuthError> {
//!     let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::new(input)).unwrap_or_default();
//!     let answer = fal.oneshot(request).await?;
//!     // Not fal's headers: `x-fal-cdn-token` is a secret of your account.
//!     Ok((answer.status(), axum::body::Body::new(answer.into_body())))
//! }
//! # fn app(fal: FalClient) -> axum::Router {
//! axum::Router::new().route("/draw", axum::routing::post(draw)).with_state(fal)
//! # }
//! ```

use axum_core::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::header::CONTENT_TYPE;

use crate::{
    error::{FalAuthError, Refusal, problem::Problem},
    events,
};

/// See the [module docs](self) for the table.
impl IntoResponse for FalAuthError {
    fn into_response(self) -> Response {
        let problem = Problem::from(&self);
        events::answered(problem.status, problem.reason, &self);
        let mut response = Response::new(Body::from(problem.body()));
        *response.status_mut() = problem.status;
        response.headers_mut().insert(CONTENT_TYPE, Problem::CONTENT_TYPE);
        if let Some(refusal) = self.refusal() {
            response.extensions_mut().insert::<Refusal>(refusal.clone());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, StatusCode};
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::{
        credential::Credential,
        error::{Kept, LockReason, Reason, RefusalParts, ReloadError},
    };

    /// An error that would show `hush` if any of its fields were shown.
    fn refused(status: StatusCode, reason: Reason) -> FalAuthError {
        let hush = || "hush".to_owned();
        let mut headers = HeaderMap::new();
        headers.insert("hush", HeaderValue::from_static("hush"));
        Refusal::new(RefusalParts {
            detail: Some(hush()),
            error_type: Some(hush()),
            request_id: Some(hush()),
            key_id: Credential::key("hush:hush").unwrap().key_id().cloned(),
            kept: Kept::copy(&headers, b"hush"),
            reload: Some(ReloadError::Failed(crate::error::SourceError::new("hush", "hush"))),
            ..RefusalParts::of_request(status, reason, "file:/hush".into())
        })
        .into()
    }

    #[tokio::test]
    async fn a_response_is_the_problem_and_nothing_else() {
        let locked = Reason::AccountLocked(LockReason::ExhaustedBalance);
        for (error, status, reason) in [
            (refused(StatusCode::UNAUTHORIZED, Reason::UnknownCredential), 502, "unknown_credential"),
            (refused(StatusCode::FORBIDDEN, locked), 503, "account_locked"),
            (FalAuthError::Transport("hush".into()), 502, "transport"),
            (FalAuthError::NoCredential, 500, "no_credential"),
        ] {
            let (problem, refusal) = (Problem::from(&error), error.refusal().map(Refusal::reason));
            assert_eq!((problem.status.as_u16(), problem.reason), (status, reason));
            let (head, body) = error.into_response().into_parts();
            assert_eq!(head.status.as_u16(), status);
            let headers: Vec<_> = head.headers.iter().collect();
            assert_eq!(headers, [(&CONTENT_TYPE, &HeaderValue::from_static("application/problem+json"))]);
            assert_eq!(body.collect().await.unwrap().to_bytes(), problem.body());
            assert!(!problem.body().contains("hush"));
            assert_eq!(head.extensions.get::<Refusal>().map(Refusal::reason), refusal);
        }
    }
}
