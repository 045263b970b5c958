//! fal's queue with reqwest-middleware: upload a file, submit a job, poll it, fetch the result. Ctrl-c cancels the job.
//!
//! ```text
//! cargo run --example queue                                                       a fal in this process
//! cargo run --example queue -- --live fal-ai/flux/schnell '{"prompt":"a cat"}'    the real one, which bills it
//! cargo run --example queue -- --file cat.png --live fal-ai/flux/dev/image-to-image '{"prompt":"a dog"}'
//! ```
//!
//! The first command needs no key, no network and no arguments. The others need `FAL_KEY`, or `FAL_KEY_ID` and
//! `FAL_KEY_SECRET`, or `FAL_KEY_FILE`.
//!
//! The result goes to standard output, and everything else to standard error.
//!
//! fal's answers contain the URLs of the job. This example makes them from the job's id instead, so that an answer cannot
//! choose where the key goes. The upload goes to the URL that fal answers, and carries no key: see `Fal::upload`.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use http::Uri;
use reqwest::{Method, Response, StatusCode, header::CONTENT_TYPE};
use reqwest_middleware::{ClientWithMiddleware, RequestBuilder};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tower_fal::{
    Credential, CredentialStore, error::BoxError, mock::MockFal, origin::OriginPolicy as _, retry::Transient,
};

use self::{
    demo::{Live, Target},
    terminal::{BaseUrl, Printable},
};

mod demo;
mod terminal;

/// How long to wait between two polls. `@fal-ai/client` 1.10.1 waits as long.
const POLL: Duration = Duration::from_millis(500);

/// How long one request may take, but for an upload.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How long an upload may take.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// The longest file that is uploaded, in bytes. fal's clients upload a longer one in parts.
const MAX_FILE: u64 = 90 * 1000 * 1000;

/// Runs a job in fal's queue: uploads a file, submits the job, polls it, and prints the result. Ctrl-c cancels the job.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    target: Target,
    /// A file to upload first. Its URL becomes a field of INPUT
    // `requires` alone allows it beside --demo, which excludes --live.
    #[arg(long, value_name = "PATH", requires = "live", conflicts_with = "demo")]
    file: Option<PathBuf>,
    /// The name of that field
    #[arg(long, value_name = "NAME", default_value = "image_url")]
    field: String,
    /// A URL in place of https://queue.fal.run. The key is sent there, so it must be https, or http on this machine
    #[arg(long, value_name = "URL", requires = "live", conflicts_with = "demo")]
    queue_url: Option<BaseUrl>,
    /// A URL in place of https://rest.fal.ai, which is asked where to upload a file
    #[arg(long, value_name = "URL", requires = "live", conflicts_with = "demo")]
    rest_url: Option<BaseUrl>,
}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |Arguments { target, file, field, queue_url, rest_url }: Arguments| {
        let Some(Live { store, app, input }) = target.live().await? else { return demonstrate().await };
        let mut input: Value = serde_json::from_str(&input)?;
        let fal = Fal::new(&store, queue_url, rest_url)?;
        if let Some(path) = file {
            let url = fal.upload(&file_name(&path), read_file(&path)?).await?;
            let input = input.as_object_mut().ok_or("INPUT must be a JSON object to get the URL of a file")?;
            input.insert(field, url.into());
        }
        println!("{}", Printable(&fal.run(&app, &input).await?.to_string()));
        Ok(())
    })
    .await
}

async fn demonstrate() -> Result<(), BoxError> {
    let credential = Credential::key("my-key:queue-secret")?;
    let mock = MockFal::start().await?;
    mock.accept(&credential);
    let url = |origin: String| origin.parse::<BaseUrl>().map(Some);
    let fal = Fal::new(&CredentialStore::fixed(credential), url(mock.queue_origin())?, url(mock.rest_origin())?)?;
    let image = fal.upload("cat.png", b"the bytes of an image".to_vec()).await?;
    let result = fal.run("fal-ai/flux/dev/image-to-image", &json!({ "prompt": "a dog", "image_url": image })).await?;
    println!("{result}");
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn read_file(path: &Path) -> Result<Vec<u8>, BoxError> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(format!("{}: it is longer than {MAX_FILE} bytes", path.display()).into());
    }
    Ok(fs::read(path).map_err(failed)?)
}

/// A client of fal's queue and of its storage.
struct Fal {
    client: ClientWithMiddleware,
    queue_url: String,
    rest_url: String,
}

#[derive(Deserialize)]
struct Upload {
    upload_url: String,
    file_url: String,
}

#[derive(Deserialize)]
struct Submitted {
    request_id: String,
}

#[derive(Deserialize)]
struct Progress {
    status: String,
    queue_position: Option<u64>,
}

impl Fal {
    fn new(store: &CredentialStore, queue_url: Option<BaseUrl>, rest_url: Option<BaseUrl>) -> Result<Self, BoxError> {
        let is_named = queue_url.is_some() || rest_url.is_some();
        let url = |named: Option<BaseUrl>, of_fal: &str| named.map_or_else(|| of_fal.parse(), Ok);
        let (queue, rest) = (url(queue_url, "https://queue.fal.run")?, url(rest_url, "https://rest.fal.ai")?);
        let mut client = reqwest::Client::builder().tls_backend_preconfigured(demo::tls()?).timeout(TIMEOUT);
        if is_named {
            // It may be plain http to this machine, and a proxy of the environment would read the key.
            client = client.no_proxy();
        }
        let (queue_url, rest_url) = (queue.url, rest.url);
        // These two hosts and no other: not that of the upload, for example.
        let origins = move |uri: &Uri| queue.origins.admits(uri) || rest.origins.admits(uri);
        let client = tower_fal::layer(store)
            .auth(|auth| auth.origins(origins))
            // It costs nothing to ask for a status again. A POST is never repeated, because fal bills it.
            .retry(|retry| retry.transient(Transient::default()))
            .reqwest(client)?;
        Ok(Self { client, queue_url, rest_url })
    }

    /// Uploads a file, and returns the URL under which apps find it.
    ///
    /// fal answers with a URL that is good for one upload. The upload goes through the same client, but its host is not
    /// one that may see the key, so the layer adds none.
    async fn upload(&self, name: &str, content: Vec<u8>) -> Result<String, BoxError> {
        let initiate = format!("{}/storage/upload/initiate?storage_type=fal-cdn-v3", self.rest_url);
        let content_type = content_type(name);
        let about = json!({ "file_name": name, "content_type": content_type });
        let Upload { upload_url, file_url } = answer(self.client.post(initiate).json(&about)).await?;
        let bytes = content.len();
        let upload = self.client.put(upload_url).header(CONTENT_TYPE, content_type).timeout(UPLOAD_TIMEOUT);
        succeeded(upload.body(content).send().await?).await?;
        eprintln!("uploaded {bytes} bytes: {}", Printable(&file_url));
        Ok(file_url)
    }

    /// Submits a job, and returns its result. Ctrl-c cancels the job.
    async fn run(&self, app: &str, input: &Value) -> Result<Value, BoxError> {
        let name = queue_name(app).ok_or("APP must be like fal-ai/flux/schnell")?;
        // From here on ctrl-c does not end the process, because the job would go on, and fal would bill it.
        let mut interrupted = tokio::spawn(tokio::signal::ctrl_c());
        let submit = self.client.post(format!("{}/{app}", self.queue_url)).json(input);
        let Submitted { request_id } = answer(submit).await?;
        if !is_id(&request_id) {
            return Err("the request id in fal's answer is not one".into());
        }
        let job = format!("{}/{name}/requests/{request_id}", self.queue_url);
        eprintln!("submitted as {request_id}");
        tokio::select! {
            result = self.follow(&job) => result,
            _ = &mut interrupted => self.cancel(&job).await,
        }
    }

    /// Polls a job until it is completed, and fetches its result.
    async fn follow(&self, job: &str) -> Result<Value, BoxError> {
        let mut line = ProgressLine::new();
        loop {
            let progress: Progress = answer(self.client.get(format!("{job}/status"))).await?;
            line.show(&progress);
            if progress.status == "COMPLETED" {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        drop(line);
        // A job that failed is completed too, and its result is an error.
        answer(self.client.get(job)).await
    }

    /// Always an error: there is no result.
    async fn cancel(&self, job: &str) -> Result<Value, BoxError> {
        let response = self.client.request(Method::PUT, format!("{job}/cancel")).send().await?;
        Err(match response.status() {
            StatusCode::BAD_REQUEST => "interrupted, but the job was already completed: fal bills it",
            status if status.is_success() => "interrupted, and the job is cancelled",
            _ => "interrupted, but fal did not cancel the job",
        }
        .into())
    }
}

/// The media type of a file, by the end of its name.
fn content_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, end)| end.to_ascii_lowercase()).as_deref() {
        Some("png") => "image/png",
        Some("jpg" | "jpeg") => "image/jpeg",
        Some("webp") => "image/webp",
        Some("mp4") => "video/mp4",
        Some("mp3") => "audio/mpeg",
        Some("wav") => "audio/wav",
        _ => "application/octet-stream",
    }
}

/// The name under which the queue has the jobs of an app: its owner and its own name, without what follows. `workflows/`
/// and `comfy/` stay in front.
fn queue_name(app: &str) -> Option<String> {
    let is_name = |name: &&str| {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !name.is_empty() && name.bytes().all(is_plain) && *name != "." && *name != ".."
    };
    let names: Vec<_> = app.split('/').collect();
    let length = if matches!(names[0], "workflows" | "comfy") { 3 } else { 2 };
    (names.len() >= length && names.iter().all(is_name)).then(|| names[..length].join("/"))
}

/// Whether it is safe as a part of a path.
fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Sends a request, and reads the JSON of a successful answer.
async fn answer<T: DeserializeOwned>(request: RequestBuilder) -> Result<T, BoxError> {
    let body = succeeded(request.send().await?).await?;
    Ok(serde_json::from_slice(&body).map_err(|error| format!("fal's answer cannot be read: {error}"))?)
}

/// The body of a successful answer. Any other is an error that says what fal says.
async fn succeeded(mut response: Response) -> Result<Vec<u8>, BoxError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER {
            return Err(format!("an answer is longer than {MAX_ANSWER} bytes").into());
        }
    }
    if !response.status().is_success() {
        let told: String = String::from_utf8_lossy(&body).chars().take(1000).collect();
        return Err(format!("fal answers {}: {told}", response.status()).into());
    }
    Ok(body)
}

/// Shows how a job is doing, on standard error: in one line that changes on a terminal, else in a line for each change.
struct ProgressLine {
    began: Instant,
    is_terminal: bool,
    shown: String,
}

impl ProgressLine {
    fn new() -> Self {
        Self { began: Instant::now(), is_terminal: io::stderr().is_terminal(), shown: String::new() }
    }

    fn show(&mut self, progress: &Progress) {
        let mut status = Printable(&progress.status).to_string();
        if let Some(position) = progress.queue_position {
            status += &format!(", position {position}");
        }
        if self.is_terminal {
            // Back to the start of the line, and away with the rest of it.
            eprint!("\r\x1b[K{status}, {} s", self.began.elapsed().as_secs());
            let _ = io::stderr().flush();
        } else if status != self.shown {
            eprintln!("{status}");
        }
        self.shown = status;
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.is_terminal {
            eprintln!();
        }
    }
}
