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

const HELP: &str = "\
hyper-util's client, rustls and the environment's credential against the real fal.

  cargo run --example hyper_client
      asks whether fal takes the key; free
  cargo run --example hyper_client -- fal-ai/flux/schnell '{\"prompt\":\"a cat\"}'
      runs a model; fal bills it

It needs FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE.
";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let run = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => None,
        ["--help" | "-h"] => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        // What begins so is a mistaken option, and to fal it would be the name of an app.
        [app, input] if !app.starts_with('-') => Some((app, input)),
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match call_fal(run).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs this app with this input, or asks whether it could.
async fn call_fal(run: Option<(&str, &str)>) -> Result<(), Box<dyn Error>> {
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

    let request = match run {
        None => Request::get(PROBE).body(Full::default())?,
        Some((app, input)) => Request::post(format!("https://fal.run/{app}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::copy_from_slice(input.as_bytes())))?,
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
