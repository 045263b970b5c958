use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body_util::Full;
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use tokio::time::Instant;
use tower_service::Service;

use super::{
    app::App,
    body::{self, Body, DEFAULT_LIFE, Endpoint, LONGEST_LIFE, MAX_ANSWER_LEN},
    cache::{Apps, Cache, Minted},
    error::{InvalidMinter, MintError},
    token::Token,
};
use crate::{
    credential::Credential,
    endpoint::Endpoints,
    error::{BoxError, FalAuthError, Refusal},
    fetch::{Fetch, FetchError},
    wire::token::REST,
};

/// Shorter than 15 s, after which callers and load balancers of many kinds give up.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest reuse window that nobody asked for.
const LONGEST_DEFAULT_WINDOW: Duration = Duration::from_secs(60);
const DEFAULT_MAX_CACHED: usize = 1024;

/// Mints tokens for the applications on its list, and hands each out for as long as it lives long enough. Cheap to clone.
/// See the [module docs](super) for an example.
#[derive(Clone)]
pub struct TokenMinter {
    call: Arc<Call>,
    allowed: Endpoints,
    cache: Cache,
}

impl TokenMinter {
    /// A minter that calls fal through this service, which has [`layer`](crate::layer) in it: a
    /// [`FalClient`](crate::FalClient), or any client with the layer around it. Its origins have to admit
    /// `https://rest.fal.ai`, as they do by default.
    ///
    /// ```
    /// # #[cfg(feature = "client-rustls")]
    /// # fn minter(store: &tower_fal::CredentialStore) -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_fal::{FalClient, realtime::TokenMinter};
    ///
    /// let fal: FalClient = FalClient::https(&tower_fal::layer(store))?;
    /// let minter = TokenMinter::builder(fal).allow_app("fal-ai/fast-lcm-diffusion").build()?;
    /// # let _ = minter;
    /// # Ok(()) }
    /// ```
    pub fn builder<S, B>(fal: S) -> TokenMinterBuilder
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        TokenMinterBuilder {
            fetch: Fetch::new(fal, DEFAULT_TIMEOUT, MAX_ANSWER_LEN),
            timeout: DEFAULT_TIMEOUT,
            rest_url: REST.to_owned(),
            allowed: Vec::new(),
            lifetime: DEFAULT_LIFE,
            reuse_window: None,
            endpoint: Endpoint::default(),
            body: None,
            max_cached: DEFAULT_MAX_CACHED,
        }
    }

    /// A token for one application, such as `fal-ai/fast-lcm-diffusion/realtime`. It lives for at least the
    /// [`lifetime`](Self::lifetime) from now on.
    ///
    /// Many callers at a time cause one call, which goes on when the caller goes away.
    ///
    /// # Errors
    /// When the application is not on the list, and when fal gives no token. A failure answers everybody who asks for the
    /// same token in the second after it.
    pub async fn token(&self, app: &str) -> Result<Token, MintError> {
        self.token_for([app]).await
    }

    /// One token for several applications.
    ///
    /// # Errors
    /// As [`token`](Self::token), and when [`Body::App`] is sent, which names one application only.
    pub async fn token_for<'a>(&self, apps: impl IntoIterator<Item = &'a str>) -> Result<Token, MintError> {
        let apps = self.allowed(apps)?;
        let call = Arc::clone(&self.call);
        self.cache.get(apps, move |apps| Arc::clone(&call).mint(apps, None)).await
    }

    /// A token for one application, minted with this credential in the place of the store's: one of a customer who
    /// pays for it. It is not kept, so each call of this is a call of fal.
    ///
    /// # Errors
    /// As [`token`](Self::token).
    pub async fn token_with(&self, credential: &Credential, app: &str) -> Result<Token, MintError> {
        let apps = self.allowed([app])?;
        let minted = Arc::clone(&self.call).mint(apps, Some(credential.clone())).await?;
        Ok(minted.token)
    }

    /// For how long a token is sure to live when it is handed out.
    pub fn lifetime(&self) -> Duration {
        self.call.lifetime
    }

    /// What a token is minted for, if all of it is on the list.
    fn allowed<'a>(&self, apps: impl IntoIterator<Item = &'a str>) -> Result<Apps, MintError> {
        let mut names = Vec::new();
        for app in apps {
            let app = App::parse(app).map_err(MintError::InvalidApp)?;
            if !app.is_in(&self.allowed) {
                return Err(MintError::NotAllowed);
            }
            names.push(app);
        }
        names.sort_unstable();
        names.dedup();
        match names.len() {
            0 => Err(MintError::NotAllowed),
            2.. if self.call.body == Body::App => Err(MintError::OneApp),
            _ => Ok(names.into()),
        }
    }
}

impl fmt::Debug for TokenMinter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenMinter")
            .field("url", &self.call.url)
            .field("allowed", &self.allowed)
            .field("lifetime", &self.call.lifetime)
            .field("reuse_window", &self.call.reuse_window)
            .finish_non_exhaustive()
    }
}

/// Options of a [`TokenMinter`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct TokenMinterBuilder {
    fetch: Fetch,
    timeout: Duration,
    rest_url: String,
    allowed: Vec<String>,
    lifetime: Duration,
    reuse_window: Option<Duration>,
    endpoint: Endpoint,
    body: Option<Body>,
    max_cached: usize,
}

impl TokenMinterBuilder {
    /// An endpoint for which tokens may be minted, such as `fal-ai/fast-lcm-diffusion`, with its `/realtime` and its
    /// `/stream`. In a pattern `*` stands for a part of one segment and `**` for any number of segments. At first the list
    /// is empty.
    pub fn allow_app(mut self, pattern: impl Into<String>) -> Self {
        self.allowed.push(pattern.into());
        self
    }

    /// For how long a token lives at least when it is handed out: what browsers are told. Default: 120 s.
    ///
    /// fal's JavaScript client wants to know it, as `tokenExpirationSeconds`, and asks for the next token after nine
    /// tenths of it.
    ///
    /// Source of the default: `@fal-ai/client` 1.10.1 (`auth.ts`).
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// For how long one token is handed out to all who ask for it. Default: half of the [`lifetime`](Self::lifetime), at
    /// most 60 s. A token is minted for the lifetime and this window together, which is at most an hour.
    ///
    /// It is at least as long as the [`timeout`](Self::timeout), since the life of a token begins before it arrives.
    pub fn reuse_window(mut self, window: Duration) -> Self {
        self.reuse_window = Some(window);
        self
    }

    /// Which of fal's endpoints mints. Default: [`Endpoint::Realtime`].
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        self.endpoint = endpoint;
        self
    }

    /// What is sent to the endpoint. Default: the body that it is documented with, which is [`Body::AllowedApps`] or
    /// [`Body::Aliases`].
    pub fn body(mut self, body: Body) -> Self {
        self.body = Some(body);
        self
    }

    /// A URL in place of `https://rest.fal.ai`: a gateway, or a mock. The origins of the service have to admit it.
    pub fn rest_url(mut self, url: impl Into<String>) -> Self {
        self.rest_url = url.into();
        self
    }

    /// How long the call may take, with all reloads and replays. Default: 10 s.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// How many tokens are kept, and minted, at a time: one for each application, or set of them. Default: 1024. When
    /// there are more, the one that can be handed out for the shortest time is forgotten.
    pub fn max_cached(mut self, tokens: usize) -> Self {
        self.max_cached = tokens;
        self
    }

    /// The minter.
    ///
    /// # Errors
    /// When the list is empty or an entry is no pattern, when the URL is none, when no token may be kept, and when the
    /// times do not fit: see [`InvalidMinter`].
    pub fn build(self) -> Result<TokenMinter, InvalidMinter> {
        if self.allowed.is_empty() {
            return Err(InvalidMinter::NoApps);
        }
        let allowed = Endpoints::parse(&self.allowed).map_err(InvalidMinter::Pattern)?;
        let reuse_window = self.reuse_window.unwrap_or_else(|| {
            let half = Duration::from_secs(self.lifetime.as_secs() / 2);
            half.min(LONGEST_DEFAULT_WINDOW).max(self.timeout)
        });
        let asked_life = self.lifetime.saturating_add(reuse_window);
        let is_whole = self.lifetime.subsec_nanos() == 0 && reuse_window.subsec_nanos() == 0;
        if self.lifetime.is_zero() || asked_life > LONGEST_LIFE || !is_whole {
            return Err(InvalidMinter::Lifetime);
        }
        if reuse_window < self.timeout || reuse_window.is_zero() {
            return Err(InvalidMinter::ReuseWindow);
        }
        if self.max_cached == 0 {
            return Err(InvalidMinter::MaxCached);
        }
        let base: Uri = self.rest_url.parse().map_err(|_| InvalidMinter::Url)?;
        if base.scheme().is_none() || base.authority().is_none() || base.query().is_some() {
            return Err(InvalidMinter::Url);
        }
        let url = format!("{}{}", self.rest_url.trim_end_matches('/'), self.endpoint.path());
        let call = Call {
            fetch: self.fetch.with_timeout(self.timeout),
            timeout: self.timeout,
            url: url.parse().map_err(|_| InvalidMinter::Url)?,
            body: self.body.unwrap_or(self.endpoint.body()),
            lifetime: self.lifetime,
            reuse_window,
        };
        Ok(TokenMinter { call: Arc::new(call), allowed, cache: Cache::new(self.max_cached) })
    }
}

/// The call that mints.
struct Call {
    fetch: Fetch,
    timeout: Duration,
    url: Uri,
    body: Body,
    lifetime: Duration,
    reuse_window: Duration,
}

impl Call {
    async fn mint(self: Arc<Self>, apps: Apps, credential: Option<Credential>) -> Result<Minted, MintError> {
        let asked_life = self.lifetime + self.reuse_window;
        let mut request = Request::new(Full::new(self.body.write(&apps, asked_life)));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.url.clone();
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().extend([(CONTENT_TYPE, json.clone()), (ACCEPT, json)]);
        if let Some(credential) = credential {
            request.extensions_mut().insert(credential);
        }

        // The life begins somewhere on the way: not before this.
        let (began, began_at) = (Instant::now(), SystemTime::now());
        let (head, answer) = match self.fetch.fetch(request).await {
            Ok(answer) => answer.into_parts(),
            Err(FetchError::TimedOut(_)) => return Err(MintError::TimedOut(self.timeout)),
            Err(FetchError::TooLong(_)) => return Err(MintError::NoToken),
            Err(FetchError::Failed(error)) => return Err(MintError::failed(error)),
        };
        if let Some(refusal) = head.extensions.get::<Refusal>() {
            return Err(MintError::failed(FalAuthError::from(refusal.clone())));
        }
        if !head.status.is_success() {
            return Err(MintError::Status(head.status));
        }
        let secret = body::read_token(answer).map_err(|_| MintError::NoToken)?;
        let life = life(secret.expose_secret(), asked_life, began_at);
        let until = began + life.checked_sub(self.lifetime).ok_or(MintError::ShortLived)?;
        if until <= Instant::now() {
            return Err(MintError::ShortLived);
        }
        Ok(Minted { token: Token::new(secret, self.lifetime, began_at + life), until })
    }
}

/// The life of a token: what was asked for, or less if the token's own claims say so. fal documents no claims, so a token
/// without any is believed.
fn life(token: &str, asked: Duration, now: SystemTime) -> Duration {
    #[derive(Deserialize)]
    struct Claims {
        exp: f64,
        iat: Option<f64>,
    }

    let claims = || {
        let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?.trim_end_matches('=')).ok()?;
        serde_json::from_slice::<Claims>(&payload).ok()
    };
    let Some(Claims { exp, iat }) = claims() else { return asked };
    // Between two claims, the clocks of fal and of this machine may differ.
    let begin = iat.unwrap_or_else(|| now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    Duration::from_secs_f64((exp - begin).clamp(0.0, asked.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::service_fn;

    use super::*;

    fn builder() -> TokenMinterBuilder {
        let fal =
            service_fn(async |_: Request<Full<Bytes>>| Ok::<_, Infallible>(Response::new(Full::<Bytes>::default())));
        TokenMinter::builder(fal)
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let ok = || builder().allow_app("a/b");
        let secs = Duration::from_secs;
        assert!(ok().build().is_ok());
        assert!(ok().lifetime(secs(3540)).build().is_ok());
        for (lifetime, window) in [(1, 10), (21, 10), (60, 30), (120, 60), (3540, 60)] {
            let minter = ok().lifetime(secs(lifetime)).build().unwrap();
            assert_eq!(minter.call.reuse_window, secs(window), "{lifetime}");
        }
        for (builder, why) in [
            (builder(), InvalidMinter::NoApps),
            (ok().lifetime(Duration::ZERO), InvalidMinter::Lifetime),
            (ok().lifetime(Duration::from_millis(1500)), InvalidMinter::Lifetime),
            (ok().lifetime(secs(3541)), InvalidMinter::Lifetime),
            (ok().lifetime(Duration::MAX), InvalidMinter::Lifetime),
            (ok().reuse_window(secs(9)), InvalidMinter::ReuseWindow),
            (ok().reuse_window(Duration::ZERO).timeout(Duration::ZERO), InvalidMinter::ReuseWindow),
            (ok().max_cached(0), InvalidMinter::MaxCached),
            (ok().rest_url("rest.fal.ai"), InvalidMinter::Url),
            (ok().rest_url("/tokens"), InvalidMinter::Url),
            (ok().rest_url("https://rest.fal.ai/?a=b"), InvalidMinter::Url),
            (ok().rest_url(""), InvalidMinter::Url),
        ] {
            assert_eq!(builder.build().unwrap_err(), why);
        }
        assert!(matches!(ok().allow_app("a//b").build(), Err(InvalidMinter::Pattern(_))));
    }

    #[test]
    fn a_list_covers_its_endpoints_and_nothing_else() {
        let minter = builder().allow_app("fal-ai/flux/dev").allow_app("acme/*").build().unwrap();
        for app in ["fal-ai/flux/dev", "fal-ai/flux/dev/realtime", "fal-ai/flux/dev/stream", "acme/x/realtime"] {
            assert!(minter.allowed([app]).is_ok(), "{app}");
        }
        for app in ["fal-ai/flux", "fal-ai/flux/realtime", "fal-ai/flux/dev/other", "acme/x/y", "other/flux/dev"] {
            assert!(matches!(minter.allowed([app]), Err(MintError::NotAllowed)), "{app}");
            assert!(minter.allowed(["fal-ai/flux/dev", app]).is_err(), "{app}");
        }
        assert!(matches!(minter.allowed([]), Err(MintError::NotAllowed)));
        assert!(matches!(minter.allowed(["acme/../x"]), Err(MintError::InvalidApp(_))));
    }

    #[test]
    fn one_set_of_applications_is_one_set_in_any_order() {
        let minter = builder().allow_app("a/*").build().unwrap();
        assert_eq!(minter.allowed(["a/x", "a/y"]).unwrap(), minter.allowed(["a/y", "a/x", "a/y"]).unwrap());
    }

    #[test]
    fn a_life_is_that_of_the_claims_if_it_is_shorter() {
        let (asked, now) = (Duration::from_secs(180), UNIX_EPOCH + Duration::from_secs(1000));
        let life = |claims: &str| life(&format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)), asked, now).as_secs();
        for (claims, seconds) in [
            ("{}", 180),
            ("no claims", 180),
            (r#"{"exp":"soon"}"#, 180),
            (r#"{"exp":1180}"#, 180),
            (r#"{"exp":9e300}"#, 180),
            (r#"{"exp":1150}"#, 150),
            (r#"{"exp":900}"#, 0),
            (r#"{"exp":-9e300,"iat":9e300}"#, 0),
            // The clock of this machine is wrong, and that does not matter.
            (r#"{"exp":5120,"iat":5000}"#, 120),
            (r#"{"exp":500,"iat":300}"#, 180),
        ] {
            assert_eq!(life(claims), seconds, "{claims}");
        }
    }
}
