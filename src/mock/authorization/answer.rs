//! From a request to its answer.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, LOCATION},
    request::Parts,
};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Endpoint, EndpointFailure, Shared, signing,
    state::{CLIENT_ID, Decision, Pair, State, Team},
};
use crate::error::BoxError;

/// The longest form that is read, in bytes.
const MAX_FORM: usize = 64 * 1024;

/// How long an endless answer is, and its pieces.
const ENDLESS: u64 = 1024 * 1024 * 1024;
const PIECE: usize = 64 * 1024;

pub(super) type AnswerBody = UnsyncBoxBody<Bytes, Infallible>;

type Form = HashMap<String, String>;

/// Answers a request. The error closes its connection.
pub(super) async fn answer<B>(request: Request<B>, shared: Arc<Shared>) -> io::Result<Response<AnswerBody>>
where
    B: Body<Error: Into<BoxError>>,
{
    let (head, body) = request.into_parts();
    let body = Limited::new(body, MAX_FORM).collect().await.map_err(io::Error::other)?.to_bytes();
    let endpoint = endpoint(&head);
    let (failure, latency) = {
        let mut state = shared.state();
        let Some(endpoint) = endpoint else {
            return Ok(page(&mut state, &head));
        };
        *state.received.entry(endpoint).or_default() += 1;
        (state.failure(endpoint), state.latency)
    };
    let Some(endpoint) = endpoint else { return Err(io::ErrorKind::NotFound.into()) };
    let carried_out = || carry_out(&mut shared.state(), endpoint, &head, &body);
    let answer = match failure {
        None => carried_out(),
        Some(EndpointFailure::Hang) => std::future::pending().await,
        Some(EndpointFailure::HangAfter) => {
            drop(carried_out());
            std::future::pending().await
        }
        Some(EndpointFailure::Disconnect) => return Err(io::ErrorKind::ConnectionReset.into()),
        Some(EndpointFailure::DisconnectAfter) => {
            drop(carried_out());
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Some(EndpointFailure::Error(status, error)) => error_answer(status, error),
        Some(EndpointFailure::Body(status, content_type, body)) => whole(status, content_type, body),
        Some(EndpointFailure::Redirect(to)) => {
            let mut answer = whole(StatusCode::FOUND, "text/html", Bytes::new());
            if let Ok(to) = HeaderValue::from_str(&to) {
                answer.headers_mut().insert(LOCATION, to);
            }
            answer
        }
        Some(EndpointFailure::Endless) => endless(&shared.endless),
    };
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    Ok(answer)
}

/// `None` for a page that a browser opens.
fn endpoint(head: &Parts) -> Option<Endpoint> {
    Some(match (&head.method, head.uri.path()) {
        (&Method::POST, "/oauth/device/code") => Endpoint::DeviceCode,
        (&Method::POST, "/oauth/token") => Endpoint::Token,
        (&Method::POST, "/oauth/revoke") => Endpoint::Revoke,
        (&Method::GET, "/.well-known/jwks.json") => Endpoint::Keys,
        (&Method::GET, "/users/teams") => Endpoint::Teams,
        (&Method::GET, "/users/current") => Endpoint::CurrentUser,
        _ => return None,
    })
}

fn carry_out(state: &mut State, endpoint: Endpoint, head: &Parts, body: &Bytes) -> Response<AnswerBody> {
    let form: Form = form_urlencoded::parse(body).into_owned().collect();
    match endpoint {
        Endpoint::Keys => json_answer(StatusCode::OK, &signing::keys(&state.key_ids())),
        Endpoint::Teams | Endpoint::CurrentUser => {
            let bearer = head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
            let Some(subject) = bearer.and_then(|access| state.user_of(access)).map(str::to_owned) else {
                return json_answer(StatusCode::UNAUTHORIZED, &json!({"detail": "bearer: invalid token"}));
            };
            if endpoint == Endpoint::Teams {
                teams(state, &subject)
            } else {
                current_user(state, &subject, &head.headers)
            }
        }
        // The client of fal's own tools, and no other.
        _ if form.get("client_id").is_none_or(|id| id != CLIENT_ID) => {
            error_answer(StatusCode::UNAUTHORIZED, "invalid_client")
        }
        Endpoint::DeviceCode => device_code(state, head),
        Endpoint::Revoke => {
            let login = form.get("token").and_then(|token| state.refresh_tokens.get(token)).map(|token| token.login);
            if let Some(login) = login {
                state.end(login);
            }
            // As RFC 7009 asks for: also if it was no token.
            json_answer(StatusCode::OK, &json!({}))
        }
        Endpoint::Token => token(state, head, &form),
    }
}

fn device_code(state: &mut State, head: &Parts) -> Response<AnswerBody> {
    let origin = origin(head);
    let (interval, life) = (state.interval.as_secs_f64(), state.device_life.as_secs_f64());
    let device = state.device_code();
    json_answer(
        StatusCode::OK,
        &json!({
            "device_code": device.device_code,
            "user_code": device.user_code,
            "verification_uri": format!("{origin}/activate"),
            "verification_uri_complete": format!("{origin}/activate?user_code={}", device.user_code),
            "interval": interval,
            "expires_in": life,
        }),
    )
}

fn token(state: &mut State, head: &Parts, form: &Form) -> Response<AnswerBody> {
    let given = |name| form.get(name).map(String::as_str).unwrap_or_default();
    let granted = match given("grant_type") {
        "refresh_token" => match state.refresh(given("refresh_token")) {
            Some(granted) => granted,
            // As Auth0 has it, with 403.
            None => return error_answer(StatusCode::FORBIDDEN, "invalid_grant"),
        },
        "urn:ietf:params:oauth:grant-type:device_code" => match poll(state, given("device_code")) {
            Ok(()) => state.grant(),
            Err(error) => return error_answer(StatusCode::FORBIDDEN, error),
        },
        _ => return error_answer(StatusCode::BAD_REQUEST, "unsupported_grant_type"),
    };
    let (login, Pair { access, refresh }) = granted;
    let id_token = state.id_token(login, &format!("{}/", origin(head)));
    let mut body = json!({"access_token": access, "id_token": id_token, "token_type": "Bearer"});
    if let Some(refresh) = refresh {
        body["refresh_token"] = refresh.into();
    }
    if state.states_expires_in {
        body["expires_in"] = state.token_life.as_secs_f64().into();
    }
    json_answer(StatusCode::OK, &body)
}

/// Whether the user has confirmed the login by now; the code of the error if not.
fn poll(state: &mut State, device_code: &str) -> Result<(), &'static str> {
    let confirm_after = state.confirm_after;
    let Some(device) = state.devices.iter_mut().find(|device| device.device_code == device_code) else {
        return Err("invalid_grant");
    };
    let now = Instant::now();
    let is_too_soon = device.last_poll.is_some_and(|last| now - last < device.interval);
    device.last_poll = Some(now);
    device.polls += 1;
    if now >= device.ends_at {
        return Err("expired_token");
    }
    if is_too_soon {
        device.interval += std::time::Duration::from_secs(5);
        return Err("slow_down");
    }
    if device.decision == Decision::Pending && confirm_after.is_some_and(|polls| device.polls > polls) {
        device.decision = Decision::Confirmed;
    }
    match device.decision {
        Decision::Pending => Err("authorization_pending"),
        Decision::Denied => Err("access_denied"),
        Decision::Used => Err("invalid_grant"),
        Decision::Confirmed => {
            device.decision = Decision::Used;
            Ok(())
        }
    }
}

fn teams(state: &State, subject: &str) -> Response<AnswerBody> {
    let team = |team: &Team| {
        json!({
            "nickname": team.nickname,
            "full_name": format!("The team {}", team.nickname),
            "user_id": team.user_id,
            "is_personal": false,
            "is_org": false,
            "lock_reason": team.is_archived.then_some("This account has been archived. Please contact support@fal.ai."),
        })
    };
    let teams: Vec<_> = std::iter::once(personal(subject)).chain(state.teams.iter().map(team)).collect();
    json_answer(StatusCode::OK, &Value::Array(teams))
}

fn personal(subject: &str) -> Value {
    json!({
        "nickname": "mock",
        "full_name": "The user of the mock",
        "user_id": user_id(subject),
        "is_personal": true,
        "is_org": false,
        "lock_reason": null,
    })
}

/// The id of the personal account of a user.
fn user_id(subject: &str) -> String {
    format!("user-of-{subject}")
}

fn current_user(state: &State, subject: &str, headers: &HeaderMap) -> Response<AnswerBody> {
    let asked = headers.get("x-fal-user-id").and_then(|id| id.to_str().ok());
    let personal = personal(subject);
    match asked.filter(|id| *id != user_id(subject)) {
        None => json_answer(StatusCode::OK, &personal),
        Some(id) => match state.teams.iter().find(|team| team.user_id == id && !team.is_archived) {
            Some(team) => json_answer(
                StatusCode::OK,
                &json!({"nickname": team.nickname, "full_name": team.nickname, "user_id": team.user_id}),
            ),
            None => json_answer(StatusCode::FORBIDDEN, &json!({"detail": "Insufficient permissions"})),
        },
    }
}

/// What a browser opens: fal's page for a connection, the logout before a login, and the page that confirms a code.
fn page(state: &mut State, head: &Parts) -> Response<AnswerBody> {
    let query: Form = form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let text = |status, text: &'static str| whole(status, "text/plain", Bytes::from_static(text.as_bytes()));
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/api/auth/cli/session-seed" | "/activate") => {
            let code = query.get("user_code").map(String::as_str).unwrap_or_default();
            match state.devices.iter_mut().find(|device| device.user_code == code) {
                Some(device) if device.decision == Decision::Pending => {
                    device.decision = Decision::Confirmed;
                    text(StatusCode::OK, "The mock has confirmed the login. You can close this page.\n")
                }
                _ => text(StatusCode::NOT_FOUND, "The mock knows no login with this code.\n"),
            }
        }
        (&Method::GET, "/v2/logout") => {
            let mut answer = text(StatusCode::FOUND, "");
            let to = query.get("returnTo").and_then(|to| HeaderValue::from_str(to).ok());
            answer.headers_mut().insert(LOCATION, to.unwrap_or_else(|| HeaderValue::from_static("/")));
            answer
        }
        _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not_found"})),
    }
}

/// The origin that the client has asked.
fn origin(head: &Parts) -> String {
    if let (Some(scheme), Some(authority)) = (head.uri.scheme(), head.uri.authority()) {
        return format!("{scheme}://{authority}");
    }
    let scheme = head.extensions.get::<super::Scheme>().map_or("http", |scheme| scheme.0);
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    format!("{scheme}://{host}")
}

fn error_answer(status: StatusCode, error: &str) -> Response<AnswerBody> {
    // A description that no client may show.
    json_answer(status, &json!({"error": error, "error_description": "said-by-the-mock \u{1b}[31m"}))
}

fn json_answer(status: StatusCode, body: &Value) -> Response<AnswerBody> {
    whole(status, "application/json", body.to_string().into())
}

fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<AnswerBody> {
    let mut answer = Response::new(Full::new(body).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn endless(taken: &Arc<AtomicU64>) -> Response<AnswerBody> {
    let taken = Arc::clone(taken);
    let mut left = ENDLESS;
    let pieces = std::iter::from_fn(move || {
        left = left.checked_sub(PIECE as u64)?;
        taken.fetch_add(PIECE as u64, Ordering::Relaxed);
        Some(Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[b' '; PIECE]))))
    });
    Response::new(StreamBody::new(futures_util::stream::iter(pieces)).boxed_unsync())
}

impl Shared {
    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
