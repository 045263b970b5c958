//! A forwarding server: what is sent to `/layer/…` or `/client/…` goes to fal with the server's key, and back.
//!
//! ```text
//! cargo run --example axum_layer -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H content-type:application/json http://127.0.0.1:3000/client/fal-ai/flux/dev
//! ```
//!
//! [`check`] turns away what is no call to fal. Then both begin with [`to_fal`], which makes a request of the server's
//! own out of the caller's: an absolute URI, whose origin is the server's choice, and the few headers that are fal's
//! business. So neither what the caller wrote into `Host` or into an absolute URI, nor its cookies, its `authorization`
//! or its hop-by-hop headers go any further.
//!
//! * `/layer/…` has [`FalAuthLayer`] on the router, between `to_fal` and the forwarder. It works; but the layer alone
//!   replays nothing, refusals of the server's own key are handed to the caller, and all that is behind the layer has
//!   the key in its hands.
//! * `/client/…` is the better shape: the router serves what calls fal, a client with `tower_fal::layer` around it.
//!
//! Whoever can reach this server spends from your account: it wants a login of yours in front of it.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{path::PathBuf, process::ExitCode};

use axum::{
    Router,
    body::Body,
    error_handling::HandleErrorLayer,
    extract::Request,
    http::{
        HeaderMap, HeaderName, Method, StatusCode,
        header::{ACCEPT, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
    },
    middleware::{Next, from_fn},
    response::{IntoResponse as _, Response},
};
use clap::Parser;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{
    ServiceBuilder, service_fn,
    util::{MapRequestLayer, MapResponseLayer},
};
use tower_fal::{FalAuthError, FalAuthLayer};

use self::serve::{App, Options, Upstream, climbs_out, problem};

mod serve;
mod terminal;

/// A server that forwards /layer/… and /client/… to fal with its own key, for everyone who can reach it.
///
/// It needs FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE, or --key-file, or --demo.
#[derive(Parser)]
struct Arguments {
    /// A file with ID:SECRET. The server reads it again whenever it changes
    #[arg(long, value_name = "PATH", conflicts_with = "demo")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// How fal is asked. Not by a `TRACE`, whose answer may hold the request as it came: with the key.
const ASKED_BY: [Method; 6] = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS];

/// Of the caller's headers. Not `x-fal-*`, by which a caller could choose for whom and how urgently fal works.
const SENT: [HeaderName; 2] = [ACCEPT, CONTENT_TYPE];

/// Of fal's headers.
const RETURNED: [HeaderName; 6] = [
    CACHE_CONTROL,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    RETRY_AFTER,
    HeaderName::from_static("x-fal-error-type"),
    HeaderName::from_static("x-fal-request-id"),
];

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { key_file, options } = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    serve::run(options, async |upstream| {
        let store = upstream.store(key_file.as_deref()).await?;
        let (run_url, origins) = (upstream.run_url.clone(), upstream.origins.clone());
        let to_fal = MapRequestLayer::new(move |request| to_fal(&run_url, request));

        let client = Client::builder(TokioExecutor::new()).build::<_, Body>(Upstream::connector()?);
        let forward = service_fn(move |request| {
            let answer = client.request(request);
            async { Ok(answer.await.map_or_else(no_answer, |response| response.map(Body::new))) }
        });
        let layer = Router::new()
            .fallback_service(forward)
            .layer(FalAuthLayer::new(store.clone()).origins(origins.clone()))
            // Of a router's layers the last one is the outermost.
            .layer(to_fal.clone())
            .layer(MapResponseLayer::new(back));

        let forward = ServiceBuilder::new()
            .layer(HandleErrorLayer::new(async |error: FalAuthError| error))
            .layer(to_fal)
            .layer(MapResponseLayer::new(back))
            .layer(tower_fal::layer(&store).auth(|auth| auth.origins(origins)))
            .service(Client::builder(TokioExecutor::new()).build(Upstream::connector()?));
        let client = Router::new().fallback_service(forward);

        let router = Router::new().nest("/layer", layer).nest("/client", client).layer(from_fn(check));
        let try_it = r#"-d '{"prompt":"a lighthouse"}' -H content-type:application/json {}/client/fal-ai/flux/dev"#;
        Ok(App::new(router, store, try_it))
    })
    .await
}

/// Lets through what can be forwarded.
async fn check(request: Request, next: Next) -> Response {
    if !ASKED_BY.contains(request.method()) {
        problem(StatusCode::METHOD_NOT_ALLOWED, "method")
    } else if climbs_out(request.uri().path()) {
        problem(StatusCode::NOT_FOUND, "path")
    } else {
        next.run(request).await
    }
}

/// A request of this server's own for the same path, below `base`.
fn to_fal(base: &str, request: Request) -> Request {
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut ours = Request::new(body);
    // A path that is none leaves the URI without an origin: then it gets no key, and goes nowhere.
    *ours.uri_mut() = format!("{base}{path}").parse().unwrap_or_default();
    *ours.method_mut() = head.method;
    *ours.headers_mut() = only(&SENT, &head.headers);
    ours
}

/// fal's response as one of this server's own.
fn back<B>(response: Response<B>) -> Response<B> {
    let (head, body) = response.into_parts();
    let mut ours = Response::new(body);
    *ours.status_mut() = head.status;
    *ours.headers_mut() = only(&RETURNED, &head.headers);
    ours
}

fn only(names: &[HeaderName], headers: &HeaderMap) -> HeaderMap {
    let wanted = headers.iter().filter(|(name, _)| names.contains(name));
    wanted.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn no_answer(error: hyper_util::client::legacy::Error) -> Response {
    FalAuthError::Transport(error.into()).into_response()
}
