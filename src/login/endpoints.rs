//! What is asked of fal's login and of its REST API, and what is taken from their answers.
//!
//! An answer is read to a limit, and nothing that it says reaches an error text.
//!
//! Source: `fal` 1.83.0 (`auth/auth0.py`, `sdk.py`).

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use http_body_util::Full;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{
    base_url::BaseUrl,
    error::{LoginError, LoginErrorKind},
    token_file::Token,
};
use crate::{
    fetch::{Fetch, FetchError},
    jwks::KeySet,
};

/// How long one request may take.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The longest answer that is read, in bytes.
pub(super) const MAX_ANSWER: usize = 1024 * 1024;

/// The client of fal's own tools. It has no secret.
pub(super) const CLIENT_ID: &str = "TwXR51Vz8JbY8GUUMy6EyuVR0fTO7N4N";
const AUDIENCE: &str = "fal-cloud";
const SCOPE: &str = "openid profile email offline_access";
const DEVICE_CODE_GRANT: &str = "urn:ietf:params:oauth:grant-type:device_code";

/// A life that is longer than this is none that we believe.
const LONGEST_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

#[derive(Clone, Debug)]
pub(super) struct Endpoints {
    pub(super) authority: BaseUrl,
    /// Source: `fal` 1.83.0 (`flags.py`), which has this older name of the REST API as its default.
    pub(super) rest: BaseUrl,
    pub(super) fetch: Fetch,
}

/// Tokens that an endpoint has given out.
pub(super) struct Granted {
    /// When they were asked for, so that their life is not believed to be longer than it is.
    pub(super) asked_at: Instant,
    pub(super) access: Option<Token>,
    pub(super) refresh: Option<Token>,
    pub(super) id_token: Option<Zeroizing<String>>,
    /// How long the access token lives, if the answer says so.
    pub(super) life: Option<Duration>,
}

/// Why an endpoint gives out no tokens: the codes of RFC 6749 (section 5.2) and RFC 8628 (section 3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    AuthorizationPending,
    SlowDown,
    AccessDenied,
    ExpiredToken,
    InvalidGrant,
}

/// Why there are no tokens.
pub(super) enum NoTokens {
    Refused(Refusal),
    Failed(LoginError),
}

/// What the user needs to confirm a login.
pub(super) struct DeviceCode {
    pub(super) device_code: Zeroizing<String>,
    pub(super) user_code: String,
    pub(super) verification_url: String,
    pub(super) interval: Option<Duration>,
    pub(super) life: Option<Duration>,
}

/// A team, or the personal account.
pub(super) struct Team {
    pub(super) nickname: String,
    pub(super) user_id: String,
    pub(super) is_archived: bool,
}

/// Why there is no list of teams.
pub(super) enum NoTeams {
    /// The access token is refused.
    Unauthorized,
    Failed(LoginError),
}

impl Endpoints {
    pub(super) fn of_fal(fetch: Fetch) -> Self {
        Self {
            authority: BaseUrl::of_fal("https://auth.fal.ai"),
            rest: BaseUrl::of_fal("https://rest.alpha.fal.ai"),
            fetch,
        }
    }

    /// New tokens for a refresh token, which is spent by this.
    pub(super) async fn refresh(&self, token: &Token) -> Result<Granted, NoTokens> {
        let form = [("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("refresh_token", token.as_str())];
        self.token(&form).await
    }

    /// Tokens for a login, if the user has confirmed it.
    pub(super) async fn poll(&self, device_code: &str) -> Result<Granted, NoTokens> {
        let form = [("grant_type", DEVICE_CODE_GRANT), ("device_code", device_code), ("client_id", CLIENT_ID)];
        self.token(&form).await
    }

    async fn token(&self, form: &[(&str, &str)]) -> Result<Granted, NoTokens> {
        let asked_at = Instant::now();
        let answer = self.post("/oauth/token", form).await.map_err(NoTokens::Failed)?;
        if answer.status() != StatusCode::OK {
            return Err(
                refusal(answer.body()).map_or_else(|| NoTokens::Failed(self.unexpected(&answer)), NoTokens::Refused)
            );
        }
        #[derive(Deserialize)]
        struct Body {
            access_token: Option<String>,
            refresh_token: Option<String>,
            id_token: Option<String>,
            expires_in: Option<serde_json::Value>,
        }
        let body: Body = json(&answer).ok_or_else(|| NoTokens::Failed(self.unexpected(&answer)))?;
        Ok(Granted {
            asked_at,
            access: body.access_token.and_then(Token::new),
            refresh: body.refresh_token.and_then(Token::new),
            id_token: body.id_token.map(Zeroizing::new),
            life: body.expires_in.as_ref().and_then(seconds),
        })
    }

    /// Begins a login.
    pub(super) async fn device_code(&self) -> Result<DeviceCode, LoginError> {
        let form = [("audience", AUDIENCE), ("client_id", CLIENT_ID), ("scope", SCOPE)];
        let answer = self.post("/oauth/device/code", &form).await?;
        #[derive(Deserialize)]
        struct Body {
            device_code: String,
            user_code: String,
            verification_uri_complete: String,
            interval: Option<serde_json::Value>,
            expires_in: Option<serde_json::Value>,
        }
        let body = Some(&answer).filter(|answer| answer.status() == StatusCode::OK).and_then(json::<Body>);
        let body = body.ok_or_else(|| self.unexpected(&answer))?;
        Ok(DeviceCode {
            device_code: Zeroizing::new(body.device_code),
            user_code: body.user_code,
            verification_url: body.verification_uri_complete,
            interval: body.interval.as_ref().and_then(seconds),
            life: body.expires_in.as_ref().and_then(seconds),
        })
    }

    /// Makes a refresh token, and all that came from it, useless.
    pub(super) async fn revoke(&self, token: &Token) -> Result<(), LoginError> {
        let answer = self.post("/oauth/revoke", &[("client_id", CLIENT_ID), ("token", token.as_str())]).await?;
        if answer.status() == StatusCode::OK { Ok(()) } else { Err(self.unexpected(&answer)) }
    }

    /// The keys by which id_tokens are signed.
    pub(super) async fn keys(&self) -> Result<KeySet, LoginError> {
        let answer = self.send(Method::GET, &self.authority, "/.well-known/jwks.json", None, Bytes::new()).await?;
        let keys = Some(&answer).filter(|answer| answer.status() == StatusCode::OK);
        keys.and_then(|answer| KeySet::parse(answer.body()).ok()).ok_or_else(|| self.unexpected(&answer))
    }

    /// The accounts that a login may act for.
    pub(super) async fn teams(&self, access: &Token) -> Result<Vec<Team>, NoTeams> {
        let answer = self.send(Method::GET, &self.rest, "/users/teams", Some(access), Bytes::new()).await;
        let answer = answer.map_err(NoTeams::Failed)?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            return Err(NoTeams::Unauthorized);
        }
        #[derive(Deserialize)]
        struct Entry {
            nickname: Option<String>,
            user_id: String,
            lock_reason: Option<String>,
        }
        let entries = Some(&answer).filter(|answer| answer.status() == StatusCode::OK).and_then(json::<Vec<Entry>>);
        let Some(entries) = entries else {
            return Err(NoTeams::Failed(unexpected(&self.rest, answer.status())));
        };
        let team = |entry: Entry| {
            let is_archived = entry.lock_reason.is_some_and(|reason| reason.to_lowercase().contains("archived"));
            Some(Team { nickname: entry.nickname?, user_id: entry.user_id, is_archived })
        };
        Ok(entries.into_iter().filter_map(team).collect())
    }

    async fn post(&self, path: &str, form: &[(&str, &str)]) -> Result<Response<Bytes>, LoginError> {
        let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        self.send(Method::POST, &self.authority, path, None, form.into()).await
    }

    async fn send(
        &self,
        method: Method,
        base: &BaseUrl,
        path: &str,
        access: Option<&Token>,
        body: Bytes,
    ) -> Result<Response<Bytes>, LoginError> {
        let mut request = Request::new(Full::new(body));
        *request.uri_mut() = base.at(path)?;
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
        if method == Method::POST {
            let form = HeaderValue::from_static("application/x-www-form-urlencoded");
            request.headers_mut().insert(CONTENT_TYPE, form);
        }
        *request.method_mut() = method;
        if let Some(access) = access {
            // A token has only characters that a header may have.
            let bearer = Zeroizing::new(format!("Bearer {}", access.as_str()));
            if let Ok(mut bearer) = HeaderValue::from_str(&bearer) {
                bearer.set_sensitive(true);
                request.headers_mut().insert(AUTHORIZATION, bearer);
            }
        }
        self.fetch.fetch(request).await.map_err(|error| {
            let message = format!("{} cannot be reached: see whether this machine has a network", base.as_str());
            match error {
                FetchError::TooLong(limit) => {
                    let message = format!("{} answered with more than {limit} bytes: try again later", base.as_str());
                    LoginError::new(LoginErrorKind::Answer, message)
                }
                error => LoginError::because(LoginErrorKind::Unreachable, message, &error),
            }
        })
    }

    fn unexpected(&self, answer: &Response<Bytes>) -> LoginError {
        unexpected(&self.authority, answer.status())
    }
}

fn unexpected(base: &BaseUrl, status: StatusCode) -> LoginError {
    let kind = match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => LoginErrorKind::Unreachable,
        status if status.is_server_error() => LoginErrorKind::Unreachable,
        _ => LoginErrorKind::Answer,
    };
    let what = match status {
        StatusCode::OK => "with what it should not",
        status if status.is_redirection() => "with a redirect, which is not followed",
        StatusCode::TOO_MANY_REQUESTS => "that it has too many requests",
        _ => "with an error",
    };
    let message = format!("{} answered {what} (status {}): try again later", base.as_str(), status.as_u16());
    LoginError::new(kind, message)
}

/// The code of a refusal, if it is one that we know.
fn refusal(body: &Bytes) -> Option<Refusal> {
    #[derive(Deserialize)]
    struct Body {
        error: String,
    }
    let Body { error } = serde_json::from_slice(body).ok()?;
    Some(match error.as_str() {
        "authorization_pending" => Refusal::AuthorizationPending,
        "slow_down" => Refusal::SlowDown,
        "access_denied" => Refusal::AccessDenied,
        "expired_token" => Refusal::ExpiredToken,
        "invalid_grant" => Refusal::InvalidGrant,
        _ => return None,
    })
}

fn json<T: DeserializeOwned>(answer: &Response<Bytes>) -> Option<T> {
    serde_json::from_slice(answer.body()).ok()
}

/// A number of seconds, if it is one that can be believed.
fn seconds(value: &serde_json::Value) -> Option<Duration> {
    let life = Duration::try_from_secs_f64(value.as_f64()?).ok()?;
    (life <= LONGEST_LIFE).then_some(life)
}

impl fmt::Debug for Granted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Granted").field("life", &self.life).finish_non_exhaustive()
    }
}
