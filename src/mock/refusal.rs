//! Which credentials a request carries, and in which words fal refuses it.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderValue, StatusCode, header::AUTHORIZATION, request::Parts};
use serde_json::Value;

use super::{
    answer::Answer,
    state::State,
    target::{Call, Host, Target},
};
use crate::credential::Credential;

/// The credentials of a request.
pub(super) struct Credentials {
    /// Its `authorization` headers, or its realtime token as the bearer that it is.
    pub(super) values: Vec<HeaderValue>,
    /// Whether they are a realtime token.
    pub(super) are_a_token: bool,
}

impl Credentials {
    pub(super) fn of(head: &Parts, target: Option<&Target<'_>>) -> Self {
        let values: Vec<_> = head.headers.get_all(AUTHORIZATION).iter().cloned().collect();
        let takes_a_token = target
            .is_some_and(|target| target.host == Host::Run && matches!(target.call, Call::Connect | Call::Stream));
        if !values.is_empty() || !takes_a_token {
            return Self { values, are_a_token: false };
        }
        let query = head.uri.query().unwrap_or_default();
        let token = query.split('&').find_map(|pair| pair.strip_prefix("fal_jwt_token="));
        // The copy that this makes is wiped on drop.
        let bearer = token.and_then(|token| Credential::bearer(token).ok());
        Self {
            are_a_token: bearer.is_some(),
            values: bearer.map(|bearer| bearer.header().clone()).into_iter().collect(),
        }
    }
}

/// The refusal of a request, unless it has a valid credential or needs none.
pub(super) fn refusal(state: &mut State, target: &Target<'_>, credentials: &Credentials) -> Option<Answer> {
    if target.host == Host::Storage || matches!(target.call, Call::WebhookKeys) {
        // Its URLs are signed, and the keys are public: neither needs a credential.
        return None;
    }
    let looks_at = match target.call {
        Call::Status(id) | Call::StatusStream(id) | Call::Result(id) | Call::Cancel(id) => Some(id),
        _ => None,
    };
    if let Some(granted) = state.granted(credentials, Some(target)) {
        if !granted.permitted {
            return Some(match target.host {
                Host::Platform => Answer::platform_api(StatusCode::FORBIDDEN, "Access denied"),
                _ => Answer::detail(StatusCode::FORBIDDEN, "Insufficient permissions"),
            });
        }
        // A locked account can still look at what it has queued.
        let reason = state.lock.filter(|_| looks_at.is_none())?.as_str();
        return Some(Answer::detail(StatusCode::FORBIDDEN, format!("User is locked. Reason: {reason}.")));
    }
    let authorization = credentials.values.first();
    if let (None, Some(id)) = (authorization, looks_at) {
        // fal looks for the job before it asks for a key, so without a key an unknown id is just unknown.
        state.job(&target.app, id)?;
    }
    Some(match target.host {
        Host::Platform => Answer::platform_api(StatusCode::UNAUTHORIZED, "Authentication required"),
        _ => Answer::detail(StatusCode::UNAUTHORIZED, unauthorized(target, authorization)),
    })
}

/// Why a credential that is not valid is refused.
fn unauthorized(target: &Target<'_>, authorization: Option<&HeaderValue>) -> String {
    let Some(authorization) = authorization else {
        if target.host == Host::Rest {
            return "Authorization header is required".to_owned();
        }
        return format!(
            "Cannot access application \"{}\". Authentication is required to access this application.",
            target.app
        );
    };
    let mut words = authorization.as_bytes().splitn(2, |&byte| byte == b' ');
    let scheme = words.next().unwrap_or_default();
    let value = words.next().unwrap_or_default();
    if scheme.eq_ignore_ascii_case(b"Bearer") {
        if is_jwt(value) { "bearer: invalid token" } else { "bearer: unable to decode issuer" }
    } else if !value.contains(&b':') {
        "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
    } else {
        match target.host {
            Host::Rest => "No user found for Key ID and Secret",
            _ => "invalid key credentials",
        }
    }
    .to_owned()
}

/// Whether a token has three parts, of which the second holds claims. The signature is not checked.
fn is_jwt(token: &[u8]) -> bool {
    let parts: Vec<_> = token.split(|&byte| byte == b'.').collect();
    let [_header, claims, _signature] = parts.as_slice() else { return false };
    URL_SAFE_NO_PAD
        .decode(claims)
        .is_ok_and(|claims| serde_json::from_slice::<Value>(&claims).is_ok_and(|claims| claims.is_object()))
}
