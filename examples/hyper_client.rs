//! hyper-util's client, rustls and the environment's credential against the real fal.
//!
//! ```text
//! cargo run --example hyper_client                                              asks whether fal accepts the key; free
//! cargo run --example hyper_client -- fal-ai/flux/schnell '{"prompt":"a cat"}'  runs a model; fal bills it
//! ```
//!
//! It needs `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, or `FAL_KEY_FILE`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::process::ExitCode;

use bytes::Bytes;
use clap::Parser;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuthLayer, auth::Stamp, error::BoxError, origin::FalOrigins, source::EnvSource};

use self::terminal::Printable;

mod terminal;

/// The status of a request that does not exist. fal answers 404 if it accepts the key, and 401 if not. It runs nothing.
const PROBE: &str = "https://queue.fal.run/fal-ai/flux/requests/00000000-0000-4000-8000-000000000000/status";

/// Asks the real fal whether it accepts the key of this environment, which is free. With APP and INPUT it runs that app
/// instead, and fal bills it.
///
/// It needs FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE.
#[derive(Parser)]
struct Arguments {
    /// The app to run, such as fal-ai/flux/schnell
    #[arg(requires = "input")]
    app: Option<String>,
    /// Its input as JSON, such as {"prompt":"a cat"}
    #[arg(value_parser = json)]
    input: Option<String>,
}

fn json(text: &str) -> Result<String, String> {
    let value: Result<serde::de::IgnoredAny, _> = serde_json::from_str(text);
    value.map(|_| text.to_owned()).map_err(|error| format!("it is not JSON: {error}"))
}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |arguments: Arguments| call_fal(arguments.app.zip(arguments.input)).await).await
}

/// Runs this app with this input. Without one it asks whether fal accepts the key.
async fn call_fal(run: Option<(String, String)>) -> Result<(), BoxError> {
    let store = CredentialStore::builder(EnvSource::all()).build().await?;
    let credential = format!("{:?} from {}", store.load().credential(), store.status().source);
    println!("credential: {}", Printable(&credential));

    // rustls needs to be told its provider, because several may be compiled in.
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
        .https_only()
        .enable_http1()
        .enable_http2()
        .build();
    let fal = ServiceBuilder::new()
        .layer(FalAuthLayer::new(store).origins(FalOrigins::only(["fal.run", "queue.fal.run"])?))
        .service(Client::builder(TokioExecutor::new()).build(connector));

    let request = match run {
        None => Request::get(PROBE).body(Full::default())?,
        Some((app, input)) => Request::post(format!("https://fal.run/{app}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(input)))?,
    };
    let probing = request.method() == http::Method::GET;

    let response = fal.oneshot(request).await?;
    let (status, stamp) = (response.status(), response.extensions().get::<Stamp>().cloned());
    let body = response.into_body().collect().await?.to_bytes();
    match stamp {
        Some(stamp) => println!("fal refused {:?} from {} with {status}", stamp.key_id(), stamp.source()),
        None if probing && status == StatusCode::NOT_FOUND => println!("fal accepts this credential"),
        None => println!("{status}"),
    }
    println!("{}", Printable(&String::from_utf8_lossy(&body)));
    Ok(())
}
