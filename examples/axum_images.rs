//! An image service: `POST /images` with a prompt. The answer comes when the images are ready.
//!
//! ```text
//! cargo run --example axum_images -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H content-type:application/json http://127.0.0.1:3000/images
//! ```
//!
//! The work goes through fal's queue: submit a job, poll its status, fetch the result. The client is in `State`, as one
//! type. If fal refuses the key, the caller gets a 502 or 503 that says nothing secret, and the log says the rest.
//!
//! fal's answer contains the URLs of the job. This server makes them from the job's id instead, so that an answer cannot
//! choose where the next request goes.
//!
//! At most `--max-requests` orders are under way at a time. The others are answered with 503 and `Retry-After`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{Method, Request, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use clap::Parser;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tower::Layer as _;
use tower_fal::{
    FalAuthError, FalClient,
    error::{BoxError, report},
    retry::Transient,
};
use tracing::warn;

use self::serve::{App, FalUrls, Options, Upstream, problem};

mod serve;
mod terminal;

/// An image service over fal's queue: POST /images {"prompt":…}.
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

/// The model that draws.
const MODEL: &str = "fal-ai/flux/schnell";

/// The name under which the queue has the jobs of this model: its owner and app, without the rest.
const APP: &str = "fal-ai/flux";

/// How long to wait between two polls. `@fal-ai/client` 1.10.1 waits as long.
const POLL: Duration = Duration::from_millis(500);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { key_file, urls, options } = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    serve::run(options, urls, async |upstream| {
        let store = upstream.store(key_file.as_deref()).await?;
        let layer = tower_fal::layer(&store)
            .auth(|auth| auth.origins(upstream.queue.origins.clone()))
            // It costs nothing to ask for a status again. A POST is never repeated, because fal bills it.
            .retry(|retry| retry.transient(Transient::default()));
        let client = Client::builder(TokioExecutor::new()).build(Upstream::connector()?);
        let images =
            Images { fal: FalClient::over(layer.layer(client)), queue_url: upstream.queue.url.as_str().into() };
        let router = Router::new().route("/images", post(draw)).with_state(images);
        let try_it = r#"-d '{"prompt":"a lighthouse"}' -H content-type:application/json {}/images"#;
        Ok(App::new(router, store, try_it))
    })
    .await
}

#[derive(Clone)]
struct Images {
    fal: FalClient,
    queue_url: Arc<str>,
}

#[derive(Deserialize)]
struct Order {
    prompt: String,
}

#[derive(Deserialize)]
struct Submitted {
    request_id: String,
}

#[derive(Deserialize)]
struct Progress {
    status: String,
}

/// If the caller goes away or the request times out, this is dropped while it waits. The job goes on, and fal bills it.
async fn draw(State(images): State<Images>, Json(order): Json<Order>) -> Result<Json<Value>, Failed> {
    let job: Submitted = images.call(Method::POST, MODEL, json!({ "prompt": order.prompt }).to_string()).await?;
    if !is_id(&job.request_id) {
        return Err(Failed::Answer("its request id is not one".into()));
    }
    let result = format!("{APP}/requests/{}", job.request_id);
    let status = format!("{result}/status");
    loop {
        let progress: Progress = images.call(Method::GET, &status, String::new()).await?;
        if progress.status == "COMPLETED" {
            // A job that failed is completed too, and its result is an error.
            return Ok(Json(images.call(Method::GET, &result, String::new()).await?));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether it is safe as a part of a path.
fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

impl Images {
    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: String) -> Result<T, Failed> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}/{path}", self.queue_url))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::<Bytes>::from(body))
            .map_err(|error| Failed::Answer(error.into()))?;
        let (head, body) = self.fal.request(request).await?.into_parts();
        if !head.status.is_success() {
            return Err(Failed::Status(head.status));
        }
        let body =
            axum::body::to_bytes(Body::new(body), MAX_ANSWER).await.map_err(|error| Failed::Answer(error.into()))?;
        // serde's own text quotes the answer.
        let fault = |error: serde_json::Error| format!("{:?} error in column {}", error.classify(), error.column());
        serde_json::from_slice(&body).map_err(|error| Failed::Answer(fault(error).into()))
    }
}

/// Why there are no images.
enum Failed {
    /// There is no answer, or fal refused the key.
    Fal(FalAuthError),
    /// The answer has a status that is not a success.
    Status(StatusCode),
    /// The answer cannot be read. The text says what is wrong and contains nothing of the answer.
    Answer(BoxError),
}

impl From<FalAuthError> for Failed {
    fn from(error: FalAuthError) -> Self {
        Self::Fal(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        match self {
            // This writes to the log itself.
            Self::Fal(error) => error.into_response(),
            // The model rejects this prompt.
            Self::Status(StatusCode::UNPROCESSABLE_ENTITY) => problem(StatusCode::UNPROCESSABLE_ENTITY, "input"),
            Self::Status(status) => {
                warn!(%status, "fal did not run the job");
                match status {
                    StatusCode::TOO_MANY_REQUESTS => problem(StatusCode::SERVICE_UNAVAILABLE, "busy"),
                    StatusCode::GATEWAY_TIMEOUT => problem(status, "timeout"),
                    _ => problem(StatusCode::BAD_GATEWAY, "failed"),
                }
            }
            Self::Answer(error) => {
                warn!(error = report(&*error), "fal's answer cannot be read");
                problem(StatusCode::BAD_GATEWAY, "answer")
            }
        }
    }
}
