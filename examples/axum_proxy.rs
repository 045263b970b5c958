//! The proxy in an axum app of your own: browsers run models through it, and the key stays on the server.
//!
//! ```text
//! cargo run --example axum_proxy -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H content-type:application/json \
//!     -H x-fal-target-url:https://fal.run/fal-ai/flux/dev http://127.0.0.1:3000/api/fal/proxy
//! ```
//!
//! In the browser that is `fal.config({ proxyUrl: "/api/fal/proxy" })`. The example `proxy` is a server that can be
//! deployed as it is.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{net::SocketAddr, process::ExitCode};

use axum::{Router, http::Uri, routing::get, serve::ListenerExt as _};
use clap::Parser;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::net::TcpListener;
use tower::ServiceBuilder;
use tower_fal::{Credential, CredentialStore, error::BoxError, mock::MockFal, proxy::FalProxy, source::EnvSource};

mod terminal;

const HEADERS: &str = "-H content-type:application/json -H x-fal-target-url:https://fal.run/fal-ai/flux/dev";

/// An axum app with a route of its own, and with fal's proxy at /api/fal/proxy for pages of this machine.
///
/// It needs FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE, or --demo.
#[derive(Parser)]
struct Arguments {
    /// Use a fal inside this process: it needs no key and no network
    #[arg(long)]
    demo: bool,
    /// Where to listen
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |Arguments { demo, listen }| {
        let proxy = if demo {
            demo_proxy().await?
        } else {
            let store = CredentialStore::builder(EnvSource::all()).build().await?;
            with_options(FalProxy::new(&store)?)?.into_router()
        };
        let app = Router::new().route("/", get(async || "a page of your own\n")).merge(proxy);

        let listener = TcpListener::bind(listen).await?;
        let url = format!("http://{}", listener.local_addr()?);
        println!("listening on {url}");
        if demo {
            println!(r#"try: curl -d '{{"prompt":"a lighthouse"}}' {HEADERS} {url}/api/fal/proxy"#);
        }
        // Without this, the small events of a stream wait for 40 ms.
        let listener = listener.tap_io(|tcp| drop(tcp.set_nodelay(true)));
        axum::serve(listener, app).await?;
        Ok(())
    })
    .await
}

/// What may be called, and by whom: here by everyone who names this machine, such as by `localhost`. Your own app has a
/// login, and asks it with [`authenticate`](FalProxy::authenticate).
fn with_options<S>(proxy: FalProxy<S>) -> Result<FalProxy<S>, BoxError> {
    Ok(proxy.allow_endpoint("fal-ai/flux/**")?.max_in_flight(8).allow_anonymous())
}

/// The same, with a client that connects to a fal in this process, whichever of fal's hosts it calls.
async fn demo_proxy() -> Result<Router, BoxError> {
    let (fal, key) = (MockFal::start().await?, Credential::key("demo-key:not-a-secret")?);
    fal.accept(&key);
    let to_mock = move |url: Uri| match url.host() {
        Some("queue.fal.run") => fal.queue_url("/"),
        Some("fal.run") => fal.run_url("/"),
        _ => fal.rest_url("/"),
    };
    let connector = ServiceBuilder::new().map_request(to_mock).service(HttpConnector::new());
    let client = Client::builder(TokioExecutor::new()).build(connector);
    Ok(with_options(FalProxy::over(&CredentialStore::fixed(key), client))?.into_router())
}
