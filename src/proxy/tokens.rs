//! Realtime tokens through the proxy: what a client asks for is read, and what is sent to fal is written anew.

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE},
};
use http_body::Body;
use http_body_util::{BodyExt as _, Limited};
use secrecy::ExposeSecret as _;

use super::{answers, body::ProxyBody, headers, target::Target};
use crate::{
    answer::Answer,
    caller::Caller,
    error::BoxError,
    realtime::{
        Endpoint, InvalidApp,
        app::App,
        body::{Asked, InvalidAsk, MAX_ANSWER_LEN, MAX_ASKED_LEN, read_token},
    },
    retry::PeekedBody,
};

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The applications for which tokens are handed out.
#[derive(Clone, Debug, Default)]
pub(super) struct Applications(Vec<App>);

impl Applications {
    pub(super) fn and(mut self, app: &str) -> Result<Self, InvalidApp> {
        self.0.push(App::parse(app)?);
        Ok(self)
    }

    /// What is sent to fal in the place of what a client asks for, if it may have that.
    pub(super) fn rewrite(&self, endpoint: Endpoint, asked: &[u8], caller: &Caller) -> Result<Bytes, Answer> {
        let Asked { apps, life, body } = Asked::parse(endpoint, asked).map_err(|invalid| match invalid {
            InvalidAsk::TooLong => answers::TOO_LONG,
            InvalidAsk::Duplicate => DUPLICATE,
            _ => UNREADABLE,
        })?;
        let is_theirs = |listed: &App| caller.own_endpoints().is_none_or(|own| listed.is_in(own));
        let is_allowed = |app: &App| self.0.iter().any(|listed| app.is_listed_as(listed) && is_theirs(listed));
        if apps.iter().all(is_allowed) { Ok(body.write(&apps, life)) } else { Err(OTHER_APP) }
    }
}

/// Which of fal's two calls a target is.
pub(super) fn endpoint(target: &Target) -> Option<Endpoint> {
    Endpoint::of_path(target.uri.path())
}

/// The headers of our own request.
pub(super) fn headers() -> HeaderMap {
    let mut ours = HeaderMap::from_iter([(CONTENT_TYPE, JSON)]);
    headers::mark(&mut ours);
    ours
}

/// The whole of what a client asks for.
pub(super) async fn read_asked<B>(body: Option<B>) -> Result<Bytes, Answer>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut asked = BytesMut::new();
    if let Some(mut body) = body {
        while let Some(frame) = body.frame().await {
            // A client that breaks off reads no answer.
            let Ok(data) = frame.map_err(|_| UNREADABLE)?.into_data() else { continue };
            if asked.len() + data.len() > MAX_ASKED_LEN {
                return Err(answers::TOO_LONG);
            }
            asked.extend_from_slice(&data);
        }
    }
    Ok(asked.freeze())
}

/// fal's token in the form of the call that asked for it.
pub(super) async fn answer<R>(endpoint: Endpoint, body: PeekedBody<R>) -> Response<ProxyBody<R>>
where
    R: Body,
    R::Error: Into<BoxError>,
{
    let answer = Box::pin(Limited::new(body, MAX_ANSWER_LEN)).collect().await;
    let Some(token) = answer.ok().and_then(|answer| read_token(answer.to_bytes()).ok()) else {
        return NO_TOKEN.response(ProxyBody::ours);
    };
    let mut response = Response::new(ProxyBody::ours(endpoint.answer(token.expose_secret())));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

const DUPLICATE: Answer = Answer::new(
    StatusCode::BAD_REQUEST,
    "realtime_body",
    "The body that asks for a realtime token has a name in it twice.",
);

const UNREADABLE: Answer = Answer::new(
    StatusCode::BAD_REQUEST,
    "realtime_body",
    "The body does not ask for a realtime token: it is no JSON object with `allowed_apps` or `app`.",
);

const OTHER_APP: Answer = Answer::new(
    StatusCode::FORBIDDEN,
    "realtime",
    "The realtime token is for an application for which this server hands out none to this caller.",
)
.option("allow_realtime");

/// Not a 502, as something was sent.
const NO_TOKEN: Answer =
    Answer::new(StatusCode::INTERNAL_SERVER_ERROR, "realtime_answer", "fal's answer has no realtime token in it.");

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(endpoint: Endpoint, asked: &str, caller: &Caller) -> Result<String, (u16, &'static str)> {
        let applications = Applications::default().and("fal-ai/flux/dev").unwrap().and("me/app").unwrap();
        let sent = applications.rewrite(endpoint, asked.as_bytes(), caller);
        sent.map(|sent| String::from_utf8(sent.to_vec()).unwrap())
            .map_err(|answer| (answer.status.as_u16(), answer.rule))
    }

    #[test]
    fn tokens_are_for_listed_applications_and_for_an_hour_at_most() {
        let everyone = Caller::anonymous();
        for (endpoint, asked, sent) in [
            (
                Endpoint::Tokens,
                r#"{"allowed_apps":["flux"],"token_expiration":120,"x":1}"#,
                r#"{"allowed_apps":["flux"],"token_expiration":120}"#,
            ),
            (
                Endpoint::Tokens,
                r#"{"allowed_apps":["flux","app"]}"#,
                r#"{"allowed_apps":["flux","app"],"token_expiration":120}"#,
            ),
            (
                Endpoint::Realtime,
                r#"{"allowed_apps":["fal-ai/flux/dev/realtime"],"duration":99999}"#,
                r#"{"allowed_apps":["fal-ai/flux/dev/realtime"],"duration":3600}"#,
            ),
            (Endpoint::Realtime, r#"{"app":"me/app","duration":-1}"#, r#"{"app":"me/app","duration":120}"#),
        ] {
            assert_eq!(rewritten(endpoint, asked, &everyone).as_deref(), Ok(sent), "{asked}");
        }
        for asked in [r#"{"allowed_apps":["other"]}"#, r#"{"allowed_apps":["flux","other"]}"#, r#"{"app":"you/app"}"#] {
            assert_eq!(rewritten(Endpoint::Tokens, asked, &everyone), Err((403, "realtime")), "{asked}");
        }
        for asked in ["", "[]", r#"{"allowed_apps":["flux"],"allowed_apps":["other"]}"#, r#"{"allowed_apps":[]}"#] {
            assert_eq!(rewritten(Endpoint::Tokens, asked, &everyone), Err((400, "realtime_body")), "{asked}");
        }
    }

    #[test]
    fn a_caller_gets_tokens_for_endpoints_of_its_own() {
        let caller = Caller::tenant("acme").endpoints(["me/**"]).unwrap();
        assert!(rewritten(Endpoint::Tokens, r#"{"allowed_apps":["app"]}"#, &caller).is_ok());
        assert_eq!(rewritten(Endpoint::Tokens, r#"{"allowed_apps":["flux"]}"#, &caller), Err((403, "realtime")));
    }
}
