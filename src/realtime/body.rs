//! The minting call: what is sent to fal's token endpoints, what comes back, and what a caller of ours may ask of them.
//!
//! Source of the forms: fal's documentation, "Real-time inference" and "Real-time secrets"; `@fal-ai/client` 1.10.1
//! (`auth.ts`); `fal_client` 1.0.3 (`client.py`); and third parties' code for [`Body::App`].

use std::{fmt, time::Duration};

use bytes::Bytes;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Value, json};
use zeroize::Zeroize as _;

use super::app::{App, InvalidApp};
use crate::{
    credential::Credential,
    wire::token::{REALTIME_PATH, TOKENS_PATH},
};

/// How long a token lives when a caller asks for nothing else.
///
/// Source: `@fal-ai/client` 1.10.1 (`auth.ts`, `TOKEN_EXPIRATION_SECONDS`).
pub(crate) const DEFAULT_LIFE: Duration = Duration::from_secs(120);

/// The longest life that is asked of fal. This is our own limit: fal documents none.
pub(crate) const LONGEST_LIFE: Duration = Duration::from_secs(3600);

/// The longest body that a caller may send, and the most applications in it.
pub(crate) const MAX_ASKED_LEN: usize = 16 * 1024;
const MAX_APPS: usize = 32;
/// The most members that such a body may have.
const MAX_MEMBERS: usize = 16;

/// The longest answer of fal's that is read, in bytes, and the longest token.
pub(crate) const MAX_ANSWER_LEN: usize = 16 * 1024;
const MAX_TOKEN_LEN: usize = 8 * 1024;

/// The endpoint of fal's REST API that mints tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// `POST /tokens/realtime`, the newer one. The default. Its tokens are for whole paths: `owner/app/realtime`.
    ///
    /// Source: fal's documentation, "Real-time inference".
    #[default]
    Realtime,
    /// `POST /tokens/`, the older one. Its tokens are for an application by its alias alone: `app`.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`auth.ts`), `fal_client` 1.0.3 (`client.py`).
    Tokens,
}

impl Endpoint {
    /// The path below `https://rest.fal.ai`.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Realtime => REALTIME_PATH,
            Self::Tokens => TOKENS_PATH,
        }
    }

    /// The endpoint with this path.
    pub(crate) fn of_path(path: &str) -> Option<Self> {
        [Self::Realtime, Self::Tokens].into_iter().find(|endpoint| endpoint.path() == path)
    }

    /// The body that this endpoint is documented with.
    pub(crate) fn body(self) -> Body {
        match self {
            Self::Realtime => Body::AllowedApps,
            Self::Tokens => Body::Aliases,
        }
    }

    /// A token as this endpoint answers with it: a JSON string, or an object with a `token`. fal's JavaScript client
    /// puts whatever a proxy answers from `/tokens/` into a URL, so there it must be the string.
    pub(crate) fn answer(self, token: &str) -> Bytes {
        let answer = match self {
            Self::Realtime => json!({ "token": token }),
            Self::Tokens => token.into(),
        };
        answer.to_string().into()
    }
}

/// The body of the request that mints a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Body {
    /// `{"allowed_apps":["owner/app/realtime"],"duration":120}`: that of [`Endpoint::Realtime`].
    ///
    /// Source: fal's documentation, "Real-time inference".
    AllowedApps,
    /// `{"app":"owner/app/realtime","duration":120}`: another one of [`Endpoint::Realtime`], for one application only.
    ///
    /// Source: third parties' code, which differs about it.
    App,
    /// `{"allowed_apps":["app"],"token_expiration":120}`: that of [`Endpoint::Tokens`].
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`auth.ts`), `fal_client` 1.0.3 (`client.py`).
    Aliases,
}

impl Body {
    /// The bytes. Of several applications, [`App`](Self::App) names the first one only: who builds it has one.
    pub(crate) fn write(self, apps: &[App], life: Duration) -> Bytes {
        let seconds = life.as_secs();
        let names = |name: fn(&App) -> &str| {
            let mut names: Vec<_> = apps.iter().map(name).collect();
            names.dedup();
            names
        };
        let body = match self {
            Self::AllowedApps => json!({ "allowed_apps": names(App::as_str), "duration": seconds }),
            Self::App => json!({ "app": apps.first().map(App::as_str), "duration": seconds }),
            Self::Aliases => json!({ "allowed_apps": names(App::alias), "token_expiration": seconds }),
        };
        body.to_string().into()
    }
}

/// The token in a successful answer of fal's: a JSON string, `{"token":…}`, `{"detail":…}` as older proxies wrap it, or
/// the bare text. The bytes of the answer are wiped if nobody else holds them.
///
/// # Errors
/// When there is none, or it cannot be put into a URL as it is.
pub(crate) fn read_token(answer: Bytes) -> Result<SecretString, NoToken> {
    let token = find_token(&answer);
    if let Ok(mut answer) = answer.try_into_mut() {
        answer.as_mut().zeroize();
    }
    token.filter(|token| is_token(token.expose_secret())).ok_or(NoToken)
}

fn find_token(answer: &[u8]) -> Option<SecretString> {
    #[derive(Deserialize)]
    struct Wrapped {
        token: Option<SecretText>,
        detail: Option<SecretText>,
    }

    let answer = answer.trim_ascii();
    match answer.first()? {
        _ if answer.len() > MAX_ANSWER_LEN => None,
        b'"' => Some(serde_json::from_slice::<SecretText>(answer).ok()?.0),
        b'{' => {
            let Wrapped { token, detail } = serde_json::from_slice(answer).ok()?;
            Some(token.or(detail)?.0)
        }
        _ => {
            // Not `null`, `true` or a number.
            let is_json = serde_json::from_slice::<IgnoredAny>(answer).is_ok();
            if is_json { None } else { Some(std::str::from_utf8(answer).ok()?.into()) }
        }
    }
}

/// A text that is wiped.
struct SecretText(SecretString);

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(String::deserialize(deserializer)?.into()))
    }
}

/// Whether a text may be a token, and has no character that means something else in a query.
fn is_token(text: &str) -> bool {
    let is_of_query =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b'=');
    text.len() <= MAX_TOKEN_LEN && text.bytes().all(is_of_query) && Credential::bearer(text).is_ok()
}

/// The answer to a minting call has no token in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fal's answer has no token in it: it is no JSON string, no object with a `token` and no bare token")]
pub(crate) struct NoToken;

/// What a caller asks of a token endpoint: a body that fal's clients would send, read and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) apps: Vec<App>,
    /// Between a second and [`LONGEST_LIFE`], in whole seconds.
    pub(crate) life: Duration,
    /// The form to send to fal in the place of this one.
    pub(crate) body: Body,
}

impl Asked {
    /// Reads `{"allowed_apps":[…]}` or `{"app":…}`, each with a `token_expiration` or a `duration` or neither.
    ///
    /// A life that is missing or nonsense becomes [`DEFAULT_LIFE`], and one that is too long becomes [`LONGEST_LIFE`].
    /// [`Endpoint::Tokens`] is asked for aliases, such as `flux`, so there a name may have one segment.
    ///
    /// # Errors
    /// When the text is not such an object, or when a name is in it twice: another reader might take the other one.
    pub(crate) fn parse(endpoint: Endpoint, text: &[u8]) -> Result<Self, InvalidAsk> {
        if text.len() > MAX_ASKED_LEN {
            return Err(InvalidAsk::TooLong);
        }
        let Members { allowed_apps, app, life, fault } =
            serde_json::from_slice(text).map_err(|_| InvalidAsk::NotAnObject)?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        let (names, body) = match (allowed_apps, app) {
            (Some(Value::Array(names)), None) => (names, endpoint.body()),
            // `/tokens/` is not known to take this one, so it gets its own.
            (None, Some(name)) => (vec![name], if endpoint == Endpoint::Tokens { Body::Aliases } else { Body::App }),
            _ => return Err(InvalidAsk::Apps),
        };
        if names.is_empty() || names.len() > MAX_APPS {
            return Err(InvalidAsk::Apps);
        }
        let parse = |name: &Value| {
            let name = name.as_str().ok_or(InvalidAsk::Apps)?;
            let app = if endpoint == Endpoint::Tokens { App::parse_any(name) } else { App::parse(name) };
            app.map_err(InvalidAsk::App)
        };
        let apps = names.iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self { apps, life: life.as_ref().map_or(DEFAULT_LIFE, clamped), body })
    }
}

/// A life that somebody asked for, within our bounds.
fn clamped(asked: &Value) -> Duration {
    let seconds = match asked.as_f64() {
        Some(seconds) if seconds >= 1.0 => seconds,
        _ => return DEFAULT_LIFE,
    };
    let longest = LONGEST_LIFE.as_secs_f64();
    Duration::from_secs_f64(seconds.min(longest).floor())
}

/// Why a caller's body is not one that asks for a token. It does not show the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidAsk {
    #[error("the body has more than {MAX_ASKED_LEN} bytes")]
    TooLong,
    #[error("the body is not a JSON object")]
    NotAnObject,
    #[error("the body has more than {MAX_MEMBERS} members")]
    TooManyMembers,
    #[error(
        "the body says one thing twice: each name may be there once, and only one of `token_expiration` and `duration`"
    )]
    Duplicate,
    #[error("the body has either `allowed_apps`, a list of 1 to {MAX_APPS} names, or `app`, one name")]
    Apps,
    #[error(transparent)]
    App(InvalidApp),
}

/// The members of a caller's body. serde_json's own map would take the last of two with one name.
#[derive(Default)]
struct Members {
    allowed_apps: Option<Value>,
    app: Option<Value>,
    life: Option<Value>,
    fault: Option<InvalidAsk>,
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let (mut members, mut names) = (Members::default(), Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    let place = match &*name {
                        "allowed_apps" => Some(&mut members.allowed_apps),
                        "app" => Some(&mut members.app),
                        "token_expiration" | "duration" => Some(&mut members.life),
                        _ => None,
                    };
                    let is_taken = match place {
                        Some(place) => place.replace(map.next_value()?).is_some(),
                        None => map.next_value::<IgnoredAny>().map(|_| false)?,
                    };
                    if is_taken || names.contains(&name) {
                        members.fault.get_or_insert(InvalidAsk::Duplicate);
                    } else if names.len() == MAX_MEMBERS {
                        members.fault.get_or_insert(InvalidAsk::TooManyMembers);
                    } else {
                        names.push(name);
                    }
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(text: &str) -> App {
        App::parse(text).unwrap()
    }

    #[test]
    fn each_body_is_as_its_source_has_it() {
        let (apps, life) = ([app("fal-ai/flux/dev/realtime")], Duration::from_secs(180));
        for (body, expected) in [
            (Body::AllowedApps, r#"{"allowed_apps":["fal-ai/flux/dev/realtime"],"duration":180}"#),
            (Body::App, r#"{"app":"fal-ai/flux/dev/realtime","duration":180}"#),
            (Body::Aliases, r#"{"allowed_apps":["flux"],"token_expiration":180}"#),
        ] {
            assert_eq!(body.write(&apps, life), expected);
        }
    }

    #[test]
    fn an_alias_that_two_paths_share_is_written_once() {
        let apps = [app("fal-ai/flux/dev/realtime"), app("fal-ai/flux/dev/stream")];
        assert_eq!(Body::Aliases.write(&apps, DEFAULT_LIFE), r#"{"allowed_apps":["flux"],"token_expiration":120}"#);
    }

    #[test]
    fn each_form_of_an_answer_is_read() {
        for answer in [
            r#""e30.e30.c2ln""#,
            "  \"e30.e30.c2ln\"\n",
            r#"{"token":"e30.e30.c2ln"}"#,
            r#"{"token":"e30.e30.c2ln","expires_in":120,"detail":null}"#,
            r#"{"detail":"e30.e30.c2ln"}"#,
            "e30.e30.c2ln\n",
        ] {
            let token = read_token(Bytes::copy_from_slice(answer.as_bytes()));
            assert_eq!(token.unwrap().expose_secret(), "e30.e30.c2ln", "{answer}");
        }
    }

    #[test]
    fn an_answer_without_a_token_is_an_error() {
        let long = format!("\"{}\"", "a".repeat(MAX_TOKEN_LEN + 1));
        for answer in [
            "",
            " ",
            "null",
            "true",
            "1792",
            "undefined",
            r#""undefined""#,
            "{}",
            "[]",
            r#""""#,
            r#"["e30"]"#,
            r#"{"token":7}"#,
            r#"{"token":"a","token":"b"}"#,
            r#"{"detail":"Not found today"}"#,
            r#""a&fal_jwt_token=b""#,
            r#""a b""#,
            "<html>",
            "{\"token\":\"a",
            "\u{feff}e30",
            &long,
        ] {
            let token = read_token(Bytes::copy_from_slice(answer.as_bytes()));
            assert_eq!(token.map(|token| token.expose_secret().to_owned()), Err(NoToken), "{answer}");
        }
    }

    #[test]
    fn an_answer_has_the_form_of_its_endpoint() {
        assert_eq!(Endpoint::Tokens.answer("e30"), r#""e30""#);
        assert_eq!(Endpoint::Realtime.answer("e30"), r#"{"token":"e30"}"#);
        assert_eq!(Endpoint::of_path("/tokens/"), Some(Endpoint::Tokens));
        assert_eq!(Endpoint::of_path("/tokens/realtime"), Some(Endpoint::Realtime));
        assert_eq!(Endpoint::of_path("/tokens"), None);
    }

    fn asked(endpoint: Endpoint, text: &str) -> Result<(Vec<String>, u64, Body), InvalidAsk> {
        let Asked { apps, life, body } = Asked::parse(endpoint, text.as_bytes())?;
        Ok((apps.iter().map(ToString::to_string).collect(), life.as_secs(), body))
    }

    #[test]
    fn what_fals_clients_ask_for_is_read() {
        for (endpoint, text, expected) in [
            (
                Endpoint::Tokens,
                r#"{"allowed_apps":["flux"],"token_expiration":120}"#,
                (vec!["flux"], 120, Body::Aliases),
            ),
            (Endpoint::Tokens, r#"{"app":"a/b"}"#, (vec!["a/b"], 120, Body::Aliases)),
            (
                Endpoint::Realtime,
                r#"{"allowed_apps":["a/b/realtime","a/b/stream"],"duration":60}"#,
                (vec!["a/b/realtime", "a/b/stream"], 60, Body::AllowedApps),
            ),
            (
                Endpoint::Realtime,
                r#"{"app":"a/b/realtime","token_expiration":60,"x":{"app":1}}"#,
                (vec!["a/b/realtime"], 60, Body::App),
            ),
        ] {
            let (apps, life, body) = asked(endpoint, text).unwrap();
            assert_eq!((apps.iter().map(String::as_str).collect(), life, body), expected, "{text}");
        }
    }

    #[test]
    fn the_life_that_is_asked_for_is_kept_within_bounds() {
        for (life, seconds) in [
            ("1", 1),
            ("1.9", 1),
            ("3600", 3600),
            ("3601", 3600),
            ("1e300", 3600),
            ("18446744073709551615", 3600),
            ("0", 120),
            ("0.5", 120),
            ("-1", 120),
            ("-1e300", 120),
            ("null", 120),
            ("\"600\"", 120),
            ("[600]", 120),
        ] {
            let text = format!(r#"{{"app":"a/b","duration":{life}}}"#);
            assert_eq!(asked(Endpoint::Realtime, &text).unwrap().1, seconds, "{life}");
        }
    }

    #[test]
    fn a_body_that_says_one_thing_twice_is_refused() {
        for text in [
            r#"{"app":"a/b","app":"c/d"}"#,
            r#"{"allowed_apps":["a/b"],"allowed_apps":["c/d"]}"#,
            r#"{"app":"a/b","\u0061pp":"c/d"}"#,
            r#"{"app":"a/b","duration":1,"duration":2}"#,
            r#"{"app":"a/b","duration":1,"token_expiration":2}"#,
            r#"{"app":"a/b","x":1,"x":2}"#,
        ] {
            assert_eq!(asked(Endpoint::Realtime, text), Err(InvalidAsk::Duplicate), "{text}");
        }
    }

    #[test]
    fn a_body_that_asks_for_no_application_is_refused() {
        for text in [
            "{}",
            r#"{"duration":120}"#,
            r#"{"app":"a/b","allowed_apps":["a/b"]}"#,
            r#"{"allowed_apps":"a/b"}"#,
            r#"{"allowed_apps":[]}"#,
            r#"{"allowed_apps":[7]}"#,
            r#"{"allowed_apps":[["a/b"]]}"#,
            r#"{"app":["a/b"]}"#,
            r#"{"app":null}"#,
            &format!(r#"{{"allowed_apps":[{}"a/b"]}}"#, r#""a/b","#.repeat(MAX_APPS)),
        ] {
            assert_eq!(asked(Endpoint::Realtime, text), Err(InvalidAsk::Apps), "{text}");
        }
        let alias = r#"{"allowed_apps":["flux"]}"#;
        assert_eq!(asked(Endpoint::Realtime, alias), Err(InvalidAsk::App(InvalidApp::NoOwner)));
        assert_eq!(asked(Endpoint::Realtime, r#"{"app":"a/../b"}"#), Err(InvalidAsk::App(InvalidApp::Segment)));
    }

    #[test]
    fn a_body_that_is_no_object_or_too_large_is_refused() {
        let too_long = format!("{{\"app\":\"a/b\",\"x\":\"{}\"}}", "x".repeat(MAX_ASKED_LEN));
        let many: Vec<_> = (0..=MAX_MEMBERS).map(|number| format!("\"x{number}\":0")).collect();
        for (text, why) in [
            ("", InvalidAsk::NotAnObject),
            ("[]", InvalidAsk::NotAnObject),
            ("\"a/b\"", InvalidAsk::NotAnObject),
            (r#"{"app":"a/b"} {}"#, InvalidAsk::NotAnObject),
            (r#"{"app":"a/b","duration":1e999}"#, InvalidAsk::NotAnObject),
            (&too_long, InvalidAsk::TooLong),
            (&format!("{{{}}}", many.join(",")), InvalidAsk::TooManyMembers),
        ] {
            assert_eq!(asked(Endpoint::Realtime, text), Err(why), "{:.40}", text);
        }
    }
}
