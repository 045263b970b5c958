//! hyper-util's client, rustls and the environment's credential against the real fal.
//!
//! ```text
//! cargo run --example hyper_client                                              asks whether fal takes the key; free
//! cargo run --example hyper_client -- fal-ai/flux/schnell '{"prompt":"a cat"}'  runs a model; fal bills it
//! ```
//!
//! It needs `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, or `FAL_KEY_FILE`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{env, error::Error, process::ExitCode};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuthLayer, auth::Stamp, error::report, source::EnvSource};

/// The status of a request that nobody has made: 404 to whoever may ask, 401 to whoever may not. It runs nothing.
const PROBE: &str = "https://queue.fal.run/fal-ai/flux/requests/00000000-0000-4000-8000-000000000000/status";

#[tokio::main]
async fn main() -> ExitCode {
    match call_fal().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn call_fal() -> Result<(), Box<dyn Error>> {
    let store = CredentialStore::builder(EnvSource::all()).build().await?;
    println!("credential: {:?} from {}", store.load().credential(), store.status().source);

    // Named, so that it does not matter which other providers are compiled in.
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
        .https_only()
        .enable_http1()
        .enable_http2()
        .build();
    let fal = ServiceBuilder::new()
        .layer(FalAuthLayer::new(store))
        .service(Client::builder(TokioExecutor::new()).build(connector));

    let mut arguments = env::args().skip(1);
    let request = match (arguments.next(), arguments.next()) {
        (None, _) => Request::get(PROBE).body(Full::default())?,
        (Some(app), Some(input)) => Request::post(format!("https://fal.run/{app}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(input)))?,
        (Some(_), None) => {
            return Err("give the app and its input: fal-ai/flux/schnell '{\"prompt\":\"a cat\"}'".into());
        }
    };
    let probing = request.method() == http::Method::GET;

    let response = fal.oneshot(request).await?;
    let (status, stamp) = (response.status(), response.extensions().get::<Stamp>().cloned());
    let body = response.into_body().collect().await?.to_bytes();
    match stamp {
        Some(stamp) => println!("fal refused {:?} from {} with {status}", stamp.key_id(), stamp.source()),
        None if probing && status == StatusCode::NOT_FOUND => println!("fal takes this credential"),
        None => println!("{status}"),
    }
    println!("{}", String::from_utf8_lossy(&body));
    Ok(())
}
