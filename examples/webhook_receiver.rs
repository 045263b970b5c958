//! A server that takes fal's webhooks, and believes only those that fal has signed for it.
//!
//! ```text
//! cargo run --example webhook_receiver -- --demo                        the whole loop, with a fal in this process
//! cargo run --example webhook_receiver -- --account 'github|12345'      for real: POST /webhook
//! ```
//!
//! The first command needs no key, no account and no network. For the second one, submit with
//! `https://queue.fal.run/{owner}/{app}?fal_webhook=https://your.host/webhook`, and let a reverse proxy with TLS lead
//! there. It must hand the body on as it is.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    collections::{HashSet, VecDeque},
    io,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use axum::{
    Extension, Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use bytes::Bytes;
use clap::{ArgGroup, Parser};
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore,
    error::BoxError,
    mock::MockFal,
    origin::FalOrigins,
    webhook::{KeysStatus, VerifiedWebhook, VerifyWebhookLayer, WebhookKeys},
};

use self::terminal::BaseUrl;

mod terminal;

/// Takes fal's webhooks at `POST /webhook`, and prints a line of JSON for each one that fal has signed for the accounts.
#[derive(Parser)]
#[command(group(ArgGroup::new("whose").args(["account", "any_account", "demo"]).required(true)), after_help = "\
When it is ready it prints one line, `listening on http://127.0.0.1:3000`, and then for each
delivery a line such as {\"request_id\":\"…\",\"user_id\":\"github|12345\",\"repeat\":false}. What
is refused is logged to standard error. `GET /readyz` says whether fal's keys are there. SIGTERM
or ctrl-c ends it.")]
struct Options {
    /// Where to listen. With port 0 the system chooses a free port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    /// The user id of an account of yours. There may be several
    #[arg(long, value_name = "USER_ID", num_args = 1.., conflicts_with = "any_account")]
    account: Vec<String>,
    /// Take deliveries of every customer of fal's, each of whom can name your URL
    #[arg(long)]
    any_account: bool,
    /// Where fal's public keys are, in place of https://rest.fal.ai/.well-known/jwks.json. It must be https, or http on
    /// this machine
    #[arg(long, value_name = "URL", value_parser = keys_url, conflicts_with = "demo")]
    jwks_url: Option<BaseUrl>,
    /// Certificates to trust for that, in place of Mozilla's roots
    #[arg(long, value_name = "PEM", conflicts_with = "demo")]
    ca_file: Option<PathBuf>,
    /// How far the timestamp of a delivery and the clock may be apart
    #[arg(long, value_name = "SECS", default_value = "300")]
    tolerance: u64,
    /// The longest body that is taken
    #[arg(long, value_name = "BYTES", default_value = "16777216")]
    max_body: usize,
    /// Answer repeats of what was handled without handling them
    #[arg(long)]
    skip_repeats: bool,
    /// Answer the first delivery of each id with 500, to see that fal sends it again
    #[arg(long)]
    fail_first: bool,
    /// Use a fal inside this process, and show the whole loop
    #[arg(long, conflicts_with_all = ["account", "any_account"])]
    demo: bool,
}

/// The rule for it is that for a URL which may see a key.
fn keys_url(text: &str) -> Result<BaseUrl, &'static str> {
    text.parse().map_err(|_| "it must be an https URL, or an http one of this machine")
}

#[tokio::main]
async fn main() -> ExitCode {
    terminal::run(async |options: Options| {
        tracing_subscriber::fmt().with_writer(io::stderr).init();
        if options.demo { demonstrate(&options).await } else { receive(&options).await }
    })
    .await
}

async fn receive(options: &Options) -> Result<(), BoxError> {
    let client = client(options)?;
    let keys = match &options.jwks_url {
        Some(url) => WebhookKeys::from_url(client, url.url.parse()?)?,
        None => WebhookKeys::new(client),
    };
    let router = router(options, keys, &options.account)?;
    // Before the line is printed, so that no signal comes too early.
    let end = end()?;
    let listener = listen(options).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, router).with_graceful_shutdown(end).await?;
    Ok(())
}

async fn listen(options: &Options) -> Result<TcpListener, String> {
    let address = options.listen;
    let failed = |error| format!("cannot listen on {address}: {error}. Choose another address with --listen.");
    TcpListener::bind(address).await.map_err(failed)
}

/// `POST /webhook` behind the layer, and `GET /readyz` beside it.
fn router(options: &Options, keys: WebhookKeys, accounts: &[String]) -> Result<Router, BoxError> {
    let mut verify = match options.any_account {
        true => VerifyWebhookLayer::any_account(keys.clone()),
        false => VerifyWebhookLayer::for_accounts(keys.clone(), accounts)?,
    };
    verify = verify.tolerance(Duration::from_secs(options.tolerance)).max_body(options.max_body);
    if options.skip_repeats {
        verify = verify.skip_repeats();
    }
    let failing = options.fail_first.then(Failing::default);
    Ok(Router::new()
        .route("/webhook", post(delivered))
        // The layer is the outermost of what is here: nothing reads the body before it does.
        .layer(verify)
        .with_state(failing)
        .route("/readyz", get(readyz).with_state(keys)))
}

/// This is where the work begins. fal waits 15 s for the answer, so what takes longer goes into a queue of your own.
async fn delivered(
    State(failing): State<Option<Failing>>,
    Extension(webhook): Extension<VerifiedWebhook>,
    _body: Bytes, // the bytes that were verified; `Json<WebhookPayload>` reads them
) -> StatusCode {
    let line = json!({
        "request_id": webhook.request_id(),
        "user_id": webhook.user_id(),
        "repeat": webhook.is_repeat(),
    });
    println!("{line}");
    match failing {
        Some(failing) if failing.is_first(webhook.request_id()) => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::OK,
    }
}

/// Without keys nothing can be verified, and every delivery is answered with 503.
async fn readyz(State(keys): State<WebhookKeys>) -> (StatusCode, Json<KeysStatus>) {
    let status = keys.status();
    (if status.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(status))
}

/// The last 10,000 ids of which one delivery was answered with 500.
#[derive(Clone, Default)]
struct Failing(Arc<Mutex<(HashSet<String>, VecDeque<String>)>>);

impl Failing {
    fn is_first(&self, id: &str) -> bool {
        let Ok(mut ids) = self.0.lock() else { return false };
        let (known, order) = &mut *ids;
        if !known.insert(id.to_owned()) {
            return false;
        }
        order.push_back(id.to_owned());
        if order.len() > 10_000
            && let Some(oldest) = order.pop_front()
        {
            known.remove(&oldest);
        }
        true
    }
}

/// A client without any credential: the keys are public. It follows no redirects.
fn client(options: &Options) -> Result<Client<HttpsConnector<HttpConnector>, Full<Bytes>>, BoxError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = &options.ca_file {
        roots = RootCertStore::empty();
        let failed = |error| format!("cannot read certificates from {}: {error}", path.display());
        for certificate in CertificateDer::pem_file_iter(path).map_err(failed)? {
            roots.add(certificate.map_err(failed)?)?;
        }
        if roots.is_empty() {
            return Err(format!("there is no certificate in {}", path.display()).into());
        }
    }
    let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_all_versions().build();
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

/// Submits a request with `fal_webhook`, and shows what becomes of its delivery, of a repeat, and of forged ones.
async fn demonstrate(options: &Options) -> Result<(), BoxError> {
    let (mine, somebodys) = (Credential::key("my-key:not-a-secret")?, Credential::key("other-key:not-a-secret")?);
    let fal = MockFal::start().await?;
    fal.accept(&mine);
    fal.accept_for("somebody|2", &somebodys);

    let listener = listen(options).await?;
    let url = format!("http://{}/webhook", listener.local_addr()?);
    println!("listening on http://{}", listener.local_addr()?);
    let keys = WebhookKeys::from_url(client(options)?, fal.webhook_keys_url())?;
    let app = router(options, keys, &[MockFal::USER_ID.to_owned()])?;
    let server = tokio::spawn(async move { axum::serve(listener, app).await });

    let id = submit(&fal, mine, &url).await?;
    println!("submitted {id} with ?fal_webhook={url}");
    let answers = fal.webhook_delivered(&id).await;
    println!("fal delivered it, and was answered with {}", statuses(&answers));
    fal.deliver_webhook_again(&id);
    let again = fal.webhook_delivered(&id).await;
    println!("fal delivered it once more, and was answered with {}", statuses(&again[answers.len()..]));

    let id = submit(&fal, somebodys, &url).await?;
    println!("somebody else submitted {id} with the same URL");
    println!("fal signed and delivered it, and was answered with {}", statuses(&fal.webhook_delivered(&id).await));

    let mut forged = Request::post(&url).body(Full::from(r#"{"status":"OK","payload":{"paid":true}}"#))?;
    forged.headers_mut().extend(fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), b"{}"));
    let answer = client(options)?.request(forged).await?;
    println!(
        "somebody put another body below a signature of fal's, and was answered with {}",
        answer.status().as_u16()
    );
    server.abort();
    Ok(())
}

async fn submit(fal: &MockFal, credential: Credential, webhook: &str) -> Result<String, BoxError> {
    let webhook: String = url::form_urlencoded::byte_serialize(webhook.as_bytes()).collect();
    let url: Uri = fal.queue_url(&format!("/fal-ai/flux/schnell?fal_webhook={webhook}"));
    let store = CredentialStore::fixed(credential);
    let fal = ServiceBuilder::new()
        .layer(tower_fal::layer(&store).auth(|auth| auth.origins(FalOrigins::new().loopback_http())))
        .service(Client::builder(TokioExecutor::new()).build_http());
    let response = fal.oneshot(Request::post(url).body(Full::<Bytes>::from(r#"{"prompt":"a cat"}"#))?).await?;
    let body: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
    Ok(body["request_id"].as_str().ok_or("the queue gave no request_id")?.to_owned())
}

fn statuses(attempts: &[Option<StatusCode>]) -> String {
    let words = attempts.iter().map(|status| status.map_or("nothing".to_owned(), |status| status.as_u16().to_string()));
    words.collect::<Vec<_>>().join(", then ")
}

/// Resolves at SIGTERM or ctrl-c.
#[cfg(unix)]
fn end() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn end() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        // If nobody can wait for ctrl-c, only a kill ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}
