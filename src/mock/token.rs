//! Realtime tokens: what a client asks for, what is minted, and for what and how long a token holds.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;

use super::{answer::Answer, target::Target};
use crate::credential::Credential;

/// How many tokens are valid at once. The oldest goes first.
const MAX_TOKENS: usize = 10_000;

/// The longest life of a token.
const MAX_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Which of the two endpoints mints.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `POST /tokens/`: the aliases of apps, and the answer is a JSON string.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`auth.ts`), `fal_client` 1.0.3 (`client.py`).
    Aliases,
    /// `POST /tokens/realtime`: whole paths, and the answer is an object, or a JSON string for a single `app`.
    ///
    /// Source: fal's documentation, "Real-time inference".
    Paths,
}

/// The tokens that were minted.
#[derive(Default)]
pub(super) struct Tokens {
    minted: VecDeque<Token>,
    /// How many there have been.
    count: u64,
}

struct Token {
    bearer: Credential,
    form: Form,
    apps: Vec<String>,
    ends: Instant,
}

/// What a client asks for.
struct Wish {
    apps: Vec<String>,
    life: Duration,
    /// Whether the answer is an object.
    in_object: bool,
}

impl Tokens {
    /// Answers a request for a token.
    pub(super) fn mint(&mut self, form: Form, body: &[u8]) -> Answer {
        let wish = match Wish::read(form, body) {
            Ok(wish) => wish,
            Err(answer) => return *answer,
        };
        self.count += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = json!({ "jti": self.count, "allowed_apps": wish.apps, "exp": (now + wish.life).as_secs() });
        let token = format!("e30.{}.signature-of-the-mock", URL_SAFE_NO_PAD.encode(claims.to_string()));
        let Ok(bearer) = Credential::bearer(token.as_str()) else {
            return Answer::detail(StatusCode::INTERNAL_SERVER_ERROR, "The token cannot be a bearer");
        };
        self.minted.push_back(Token { bearer, form, apps: wish.apps, ends: Instant::now() + wish.life });
        if self.minted.len() > MAX_TOKENS {
            self.minted.pop_front();
        }
        Answer::ok(if wish.in_object { json!({ "token": token }) } else { token.into() })
    }

    /// Whether a bearer is a token that holds now, and for what the request asks for.
    pub(super) fn admit(&self, bearer: &HeaderValue, target: &Target<'_>) -> bool {
        let token = self.minted.iter().find(|token| token.bearer.header().as_bytes().ct_eq(bearer.as_bytes()).into());
        token.is_some_and(|token| Instant::now() < token.ends && token.is_for(target))
    }
}

impl Token {
    fn is_for(&self, target: &Target<'_>) -> bool {
        let wanted = match self.form {
            Form::Aliases => target.app.rsplit('/').next().unwrap_or_default(),
            Form::Paths => target.path.trim_matches('/'),
        };
        self.apps.iter().any(|app| app.trim_matches('/') == wanted)
    }
}

impl Wish {
    /// The error is the answer that refuses it.
    fn read(form: Form, body: &[u8]) -> Result<Self, Box<Answer>> {
        let Ok(Value::Object(mut wish)) = serde_json::from_slice(body) else {
            return Err(invalid("", "Input should be a valid dictionary"));
        };
        let (single, life) = match form {
            Form::Aliases => (None, "token_expiration"),
            Form::Paths => (wish.remove("app"), "duration"),
        };
        let in_object = form == Form::Paths && single.is_none();
        let apps = match (single, wish.remove("allowed_apps")) {
            (Some(Value::String(app)), None) => vec![app],
            (None, Some(apps)) => serde_json::from_value(apps).unwrap_or_default(),
            _ => Vec::<String>::new(),
        };
        if apps.is_empty() {
            return Err(invalid("allowed_apps", "Field required"));
        }
        // Each endpoint takes the names of the other for those of nothing.
        if apps.iter().any(|app| app.is_empty() || app.contains('/') != (form == Form::Paths)) {
            return Err(Box::new(Answer::detail(StatusCode::FORBIDDEN, "Forbidden")));
        }
        let seconds = wish.get(life).and_then(Value::as_u64).map(Duration::from_secs);
        match seconds.filter(|life| !life.is_zero() && *life <= MAX_LIFE) {
            Some(life) => Ok(Self { apps, life, in_object }),
            None => Err(invalid(life, "Input should be a number of seconds")),
        }
    }
}

/// A refusal of what a body holds under a name.
fn invalid(name: &str, rule: &str) -> Box<Answer> {
    let place: Vec<_> = ["body", name].into_iter().filter(|name| !name.is_empty()).collect();
    Box::new(Answer::unprocessable(&json!({ "loc": place, "msg": rule, "type": "value_error" })))
}
