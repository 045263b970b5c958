use std::{convert::Infallible, fmt};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{MethodRouter, Route, get},
};
use serde_json::json;
use tower_layer::Layer;
use tower_service::Service;

use super::{app::App, error::MintError, minter::TokenMinter, token::Token};
use crate::{
    answer::Answer,
    caller::{Authenticate, Caller, Callers, InvalidPattern},
    events,
};

/// A route that hands out tokens: `GET ?app=owner/app/realtime` is answered with `{"token":"…","expires_in":120}`.
///
/// It is closed until [`authenticate`](TokenRoute::authenticate) or [`allow_anonymous`](TokenRoute::allow_anonymous) says
/// who may ask, because everybody who gets a token spends from your account. See the [module docs](super) for an example
/// and for the table of its answers.
pub fn token_route(minter: TokenMinter) -> TokenRoute {
    TokenRoute { tokens: get(hand_out).with_state(minter), callers: Callers::default() }
}

/// A route that hands out tokens, made by [`token_route`].
#[derive(Clone)]
#[must_use]
pub struct TokenRoute {
    tokens: MethodRouter,
    callers: Callers,
}

impl TokenRoute {
    /// Admits those whom this one admits.
    pub fn authenticate(mut self, authenticate: impl Authenticate) -> Self {
        self.callers.authenticate(authenticate);
        self
    }

    /// Admits everybody who can reach the server. Then its `host` has to be one of this machine's own names, such as
    /// `localhost`, or one that is [allowed](Self::allow_host): a page of any site can send requests to a server on its
    /// visitor's machine once its own domain leads there.
    pub fn allow_anonymous(mut self) -> Self {
        self.callers.allow_anonymous();
        self
    }

    /// A name under which the server may be called, such as `app.example.com`; `*` is any name. Default: any name for
    /// callers who are [authenticated](Self::authenticate), and else those of this machine only.
    ///
    /// # Errors
    /// When the text is no host.
    pub fn allow_host(mut self, name: &str) -> Result<Self, InvalidPattern> {
        self.callers.allow_host(name)?;
        Ok(self)
    }

    /// Puts a layer between the look at the caller and the token: a limit for each caller, above all. The [`Caller`] is
    /// in the request's extensions.
    pub fn layer<L>(mut self, layer: L) -> Self
    where
        L: Layer<Route> + Clone + Send + Sync + 'static,
        L::Service: Service<Request, Response: axum::response::IntoResponse, Error: Into<Infallible>, Future: Send>,
        L::Service: Clone + Send + Sync + 'static,
    {
        self.tokens = self.tokens.layer(layer);
        self
    }

    /// The route, for [`Router::route`](axum::Router::route).
    pub fn into_route<S: Clone>(self) -> MethodRouter<S> {
        self.tokens.layer(middleware::from_fn_with_state(self.callers, guard)).with_state(())
    }
}

impl<S: Clone> From<TokenRoute> for MethodRouter<S> {
    fn from(route: TokenRoute) -> Self {
        route.into_route()
    }
}

impl fmt::Debug for TokenRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRoute").field("callers", &self.callers).finish_non_exhaustive()
    }
}

/// Who asks comes first: a stranger does not learn which applications there are.
async fn guard(State(callers): State<Callers>, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    let mut response = match callers.check_host(&head) {
        Err(answer) => answer.into(),
        Ok(()) => match callers.admit(&head).await {
            Err(refused) => refused,
            Ok(caller) => {
                head.extensions.insert(caller);
                next.run(Request::from_parts(head, body)).await
            }
        },
    };
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn hand_out(State(minter): State<TokenMinter>, request: Request) -> Response {
    let app = match app(request.uri().query()) {
        Ok(app) => app,
        Err(answer) => return answer.into(),
    };
    let caller = request.extensions().get::<Caller>();
    let token = if caller.and_then(Caller::own_endpoints).is_some_and(|endpoints| !app.is_in(endpoints)) {
        Err(MintError::NotAllowed)
    } else {
        match caller.and_then(Caller::own_credential) {
            // Never the house's: it is this caller who pays.
            Some(own) => minter.token_with(own, app.as_str()).await,
            None => minter.token(app.as_str()).await,
        }
    };
    match token {
        Ok(token) => answer(&token, request.headers()),
        Err(error) => failure(error),
    }
}

/// The one application that the query names.
fn app(query: Option<&str>) -> Result<App, Answer> {
    let mut apps = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).filter(|(name, _)| name == "app");
    match (apps.next(), apps.next()) {
        (Some((_, app)), None) => App::parse(&app).map_err(|_| INVALID_APP),
        _ => Err(ONE_APP),
    }
}

/// `expires_in` is in seconds, as in OAuth: RFC 6749, 5.1. It is what every token that is handed out has left, and some
/// have more.
fn answer(token: &Token, headers: &HeaderMap) -> Response {
    if wants_text(headers) {
        token.expose_secret().to_owned().into_response()
    } else {
        let (token, expires_in) = (token.expose_secret(), token.lifetime().as_secs());
        let body = json!({ "token": token, "expires_in": expires_in }).to_string();
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}

/// Whether the caller asks for plain text and not for JSON.
fn wants_text(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let names: Vec<_> = ranges.flat_map(|ranges| ranges.split(',')).map(|range| range.split(';').next()).collect();
    let has = |name: &str| names.iter().flatten().any(|range| range.trim().eq_ignore_ascii_case(name));
    has("text/plain") && !has("application/json")
}

/// A failure of ours or of fal's is a 503 in the end: the caller did nothing wrong and may ask again. The error is in the
/// extensions, for a layer that counts it.
fn failure(error: MintError) -> Response {
    let answer = if let MintError::NotAllowed = error { NOT_ALLOWED } else { NO_TOKEN };
    if answer == NO_TOKEN {
        events::not_minted(&error);
    }
    let mut response: Response = answer.into();
    response.extensions_mut().insert(error);
    response
}

const ONE_APP: Answer = Answer::new(
    StatusCode::BAD_REQUEST,
    "app",
    "The query has to name one application, as in ?app=owner/app/realtime.",
);

const INVALID_APP: Answer = Answer::new(
    StatusCode::BAD_REQUEST,
    "app",
    "The application in the query has no name that one can have, such as owner/app/realtime.",
);

const NOT_ALLOWED: Answer =
    Answer::new(StatusCode::FORBIDDEN, "realtime", "This server gives no tokens for this application.")
        .option("allow_app");

const NO_TOKEN: Answer = Answer::new(
    StatusCode::SERVICE_UNAVAILABLE,
    "no_token",
    "There is no token at the moment, because fal gave this server none. Try again soon.",
)
.header("retry-after", "1");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_names_one_application() {
        assert_eq!(app(Some("app=fal-ai%2Fflux%2Frealtime&t=1")).unwrap().as_str(), "fal-ai/flux/realtime");
        assert_eq!(app(Some("app=fal-ai/flux")).unwrap().as_str(), "fal-ai/flux");
        for query in [None, Some(""), Some("a=b"), Some("app=a/b&app=a/b"), Some("app=a/b&%61pp=c/d"), Some("App=a/b")]
        {
            assert_eq!(app(query), Err(ONE_APP), "{query:?}");
        }
        for query in ["app=", "app=flux", "app=a/../b", "app=a/b?c", "app=a%252fb/c"] {
            assert_eq!(app(Some(query)), Err(INVALID_APP), "{query}");
        }
    }

    #[test]
    fn text_is_for_those_who_ask_for_it() {
        let wants = |accept: &'static [&'static str]| {
            let headers = accept.iter().map(|value| (header::ACCEPT, HeaderValue::from_static(value)));
            wants_text(&headers.collect())
        };
        assert!(wants(&["text/plain"]) && wants(&["text/html, TEXT/plain;q=0.5"]) && wants(&["*/*", "text/plain"]));
        assert!(!wants(&[]) && !wants(&["*/*"]) && !wants(&["text/*"]) && !wants(&["text/plain, application/json"]));
    }
}
