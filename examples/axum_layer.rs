//! A forwarding server: it sends what comes to `/layer/…` or `/client/…` to fal with its own key, and the answer back.
//!
//! ```text
//! cargo run --example axum_layer -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H content-type:application/json http://127.0.0.1:3000/client/fal-ai/flux/dev
//! ```
//!
//! [`check`] refuses what is not a call to fal. Then both ways begin with [`to_fal`], which makes a new request: with an
//! absolute URI, whose origin the server chooses, and with the few headers that fal needs. So fal sees neither what the
//! caller wrote into `Host` or into an absolute URI, nor its cookies, its `authorization` or its hop-by-hop headers.
//! [`back`] does the same for the answer. An app can answer with anything, so `serve` adds headers with which no browser
//! runs an answer as a page of this server, and refuses requests that pages of other sites cause.
//!
//! * `/layer/…` has [`FalAuthLayer`] on the router, between `to_fal` and the forwarder. It works, but the layer alone
//!   does not replay, the caller sees refusals of the server's own key, and everything behind the layer sees the key.
//! * `/client/…` is the better way: the router serves a client that calls fal, with `tower_fal::layer` around it.
//!
//! Everyone who can reach this server spends from your account. Put a login of yours in front of it.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{path::PathBuf, process::ExitCode};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
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
use tower_fal::{FalAuthError, FalAuthLayer, error::BoxError};

use self::{
    serve::{App, FalUrls, Options, Upstream, climbs_out, problem},
    terminal::BaseUrl,
};

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
    urls: FalUrls,
    #[command(flatten)]
    options: Options,
}

/// The methods that are forwarded. `TRACE` is not: its answer may repeat the request, and so the key.
const FORWARDED: [Method; 6] = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS];

/// The headers of the caller that fal gets. With `x-fal-*` a caller could choose for whom and how urgently fal works.
const SENT: [HeaderName; 2] = [ACCEPT, CONTENT_TYPE];

/// The headers of fal that the caller gets.
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
    let Arguments { key_file, urls, options } = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    serve::run(options, urls, async |upstream| {
        let store = upstream.store(key_file.as_deref()).await?;
        let BaseUrl { url, origins } = upstream.run.clone();
        let to_fal = MapRequestLayer::new(move |request| to_fal(&url, request));

        let client = Client::builder(TokioExecutor::new()).build::<_, Body>(Upstream::connector()?);
        let forward = service_fn(move |request| {
            let answer = client.request(request);
            async { Ok(answer.await.map_or_else(no_answer, |response| response.map(Body::new))) }
        });
        let layer = Router::new()
            .fallback_service(forward)
            .layer(FalAuthLayer::new(store.clone()).origins(origins.clone()))
            // The last layer of a router is the outermost one.
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

/// Refuses what cannot be forwarded.
async fn check(request: Request, next: Next) -> Response {
    if !FORWARDED.contains(request.method()) {
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
    // If the path is not valid, the URI has no origin. Then the request gets no key and is not sent.
    *ours.uri_mut() = format!("{base}{path}").parse().unwrap_or_default();
    *ours.method_mut() = head.method;
    *ours.headers_mut() = only(&SENT, &head.headers);
    ours
}

/// A response of this server's own, with what fal answered.
fn back<B>(response: Response<B>) -> Response
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let (head, body) = response.into_parts();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        // Nobody asked for it, so nobody knows what comes after it.
        return problem(StatusCode::BAD_GATEWAY, "switched_protocols");
    }
    let mut ours = Response::new(Body::new(body));
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
