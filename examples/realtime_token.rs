//! A server that hands out realtime tokens, so that browsers open sockets to fal and the key stays here.
//!
//! ```text
//! cargo run --example realtime_token -- --demo          and open http://127.0.0.1:3000 in a browser
//! curl 'http://127.0.0.1:3000/api/fal/token?app=fal-ai/fast-lcm-diffusion/realtime'
//! ```
//!
//! fal's JavaScript client asks it with a `tokenProvider`, and refreshes the token before it expires:
//!
//! ```text
//! fal.realtime.connect("fal-ai/fast-lcm-diffusion", {
//!     tokenProvider: async (app) => {
//!         const answer = await fetch(`/api/fal/token?app=${encodeURIComponent(app)}`);
//!         return (await answer.json()).token;
//!     },
//!     tokenExpirationSeconds: 120, // the --lifetime of this server
//!     …
//! });
//! ```
//!
//! Whoever gets a token spends from your account, so the server is closed until you choose: callers with tokens of their
//! own (`--auth-token-file`), or everybody (`--allow-anonymous`). Each caller may ask 60 times at once, and once a second
//! from then on.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    http::{
        Request, StatusCode,
        header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use clap::Parser;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::json;
use tower::Layer as _;
use tower_fal::{
    caller::Caller,
    error::BoxError,
    mock::MockFal,
    origin::FalOrigins,
    realtime::{TokenMinter, TokenRoute, token_route},
};
use tower_governor::{GovernorError, GovernorLayer, governor::GovernorConfigBuilder, key_extractor::KeyExtractor};

use self::serve::{App, Connect, FalUrls, Options, Peer, tokens};

mod serve;
mod terminal;

/// A server that hands out realtime tokens: GET /api/fal/token?app=OWNER/APP/realtime.
///
/// It needs FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE, or --key-file, or --demo.
#[derive(Parser)]
// Those who wait for one token cost little, and come all at once when a page is opened by many.
#[command(mut_arg("max_requests", |argument| argument.default_value("1000")))]
struct Arguments {
    /// An endpoint for which it hands out tokens, such as fal-ai/fast-lcm-diffusion: `*` stands for a part of one segment,
    /// `**` for any number of segments. It may be repeated
    #[arg(long, value_name = "PATTERN", num_args = 1.., required_unless_present = "demo")]
    allow_app: Vec<String>,
    /// Hand out tokens to everybody who can reach the server. Without --host, they have to call it by a name of this
    /// machine, such as localhost
    #[arg(long, conflicts_with = "auth_token_file")]
    allow_anonymous: bool,
    /// A file with the tokens of callers, who send them as `authorization: Bearer TOKEN`. Each line is TOKEN or NAME TOKEN.
    /// The server reads it again when it changes
    #[arg(long, value_name = "FILE")]
    auth_token_file: Option<PathBuf>,
    /// For how many seconds a token lives at least when it is handed out
    #[arg(long, value_name = "SECS", default_value = "120", value_parser = clap::value_parser!(u64).range(1..=3540))]
    lifetime: u64,
    /// A file with ID:SECRET. The server reads it again whenever it changes
    #[arg(long, value_name = "FILE", conflicts_with = "demo")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    connect: Connect,
    #[command(flatten)]
    options: Options,
}

/// Where fal's documentation has the route.
const PATH: &str = "/api/fal/token";

/// What `--demo` hands out tokens for, if nothing else is said.
const DEMO_APP: &str = "fal-ai/fast-lcm-diffusion";

/// How many tokens a caller may ask for at once, and after how long for one more.
const BURST: u32 = 60;
const ONE_MORE: Duration = Duration::from_secs(1);

/// How often callers are forgotten who have not asked for long.
const FORGET_EVERY: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Arguments = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let Arguments { mut allow_app, allow_anonymous, auth_token_file, lifetime, key_file, connect, options } = arguments;
    if !allow_anonymous && auth_token_file.is_none() && !options.listener.demo {
        eprintln!("--auth-token-file or --allow-anonymous is missing: who may have tokens? See --help.");
        return ExitCode::from(2);
    }
    if allow_app.is_empty() {
        allow_app.push(DEMO_APP.to_owned());
    }
    let hosts = options.host.clone();
    serve::run(options, FalUrls::default(), async |upstream| {
        let store = upstream.store(key_file.as_deref()).await?;
        let origins = match upstream.mock() {
            None => FalOrigins::only(["rest.fal.ai"])?,
            Some(mock) => FalOrigins::only([])?.and(&mock.rest_origin())?,
        };
        let layer = tower_fal::layer(&store).auth(|auth| auth.origins(origins));
        let client = Client::builder(TokioExecutor::new()).build(connect.connector(true)?);

        let mut minter = TokenMinter::builder(layer.layer(client)).lifetime(Duration::from_secs(lifetime));
        for pattern in &allow_app {
            minter = minter.allow_app(pattern);
        }
        if let Some(mock) = upstream.mock() {
            minter = minter.rest_url(mock.rest_origin());
        }
        let mut tokens = limited(token_route(minter.build()?))?;
        tokens = match &auth_token_file {
            Some(path) => tokens.authenticate(tokens::follow(path).await?),
            None => tokens.allow_anonymous(),
        };
        for host in &hosts {
            tokens = tokens.allow_host(host)?;
        }
        let pages = upstream.mock().map(|mock| pages(mock, &allow_app[0], auth_token_file.as_deref()));
        let try_it = "'{}/api/fal/token?app=fal-ai/fast-lcm-diffusion/realtime', or open {} in a browser";
        Ok(App {
            pages: pages.unwrap_or_default(),
            checks_host: true,
            ..App::new(Router::new().route(PATH, tokens.into_route()), store, try_it)
        })
    })
    .await
}

/// The route, which answers 429 to a caller who asks for too many tokens.
fn limited(tokens: TokenRoute) -> Result<TokenRoute, BoxError> {
    let config = GovernorConfigBuilder::default().key_extractor(ByCaller).burst_size(BURST).period(ONE_MORE).finish();
    let config = config.ok_or("the limit must not be zero")?;
    let limiter = Arc::clone(config.limiter());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(FORGET_EVERY).await;
            limiter.retain_recent();
        }
    });
    Ok(tokens.layer(GovernorLayer::new(config).error_handler(|error| too_many(&error))))
}

fn too_many(error: &GovernorError) -> Response {
    // It is rounded down, and a caller who believes it would come too early.
    let seconds = match error {
        GovernorError::TooManyRequests { wait_time, .. } => wait_time + 1,
        _ => 1,
    };
    let message = "You have asked for too many tokens. Try again later.";
    let body = json!({ "message": message, "rule": "rate" }).to_string();
    let headers = [(CONTENT_TYPE, "application/json".to_owned()), (RETRY_AFTER, seconds.to_string())];
    (StatusCode::TOO_MANY_REQUESTS, headers, body).into_response()
}

/// Whom a request counts for: its caller, and without a name the address that it comes from. What `x-forwarded-for` says,
/// any caller can write.
#[derive(Clone, Copy, Debug)]
struct ByCaller;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    Named(Arc<str>),
    At(Option<IpAddr>),
}

impl KeyExtractor for ByCaller {
    type Key = Who;

    fn extract<T>(&self, request: &Request<T>) -> Result<Who, GovernorError> {
        let name = request.extensions().get::<Caller>().and_then(Caller::name);
        let peer = request.extensions().get::<Peer>();
        Ok(name.map_or_else(|| Who::At(peer.map(|peer| network(peer.0))), |name| Who::Named(name.into())))
    }
}

/// Of IPv6, a customer has at least the last half of the address for himself.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        IpAddr::V4(_) => address,
    }
}

/// Whether a pattern is the name of one endpoint.
fn is_name(pattern: &str) -> bool {
    pattern.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
}

/// The page of `--demo`, which opens a socket to the fal of this process.
fn pages(mock: &MockFal, app: &str, auth_token_file: Option<&Path>) -> Router {
    let sockets = mock.realtime_url("").to_string();
    let sockets = sockets.trim_end_matches('/');
    let page = include_str!("realtime_token/page.html")
        .replace("{app}", if is_name(app) { app } else { DEMO_APP })
        .replace("{sockets}", sockets)
        .replace("{asks}", if auth_token_file.is_some() { "true" } else { "false" });
    let policy = format!(
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' {sockets}; frame-ancestors 'none'"
    );
    let headers = [(CONTENT_TYPE, "text/html; charset=utf-8".to_owned()), (CONTENT_SECURITY_POLICY, policy)];
    let file = |kind: &'static str, text: &'static str| get(async move || ([(CONTENT_TYPE, kind)], text));
    Router::new()
        .route("/", get(async move || (headers, page)))
        .route("/page.js", file("text/javascript", include_str!("realtime_token/page.js")))
        .route("/page.css", file("text/css", include_str!("realtime_token/page.css")))
}
