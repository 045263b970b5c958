//! The server proxy, ready to be deployed: browsers send it what they want of fal, and the key stays here.
//!
//! ```text
//! cargo run --example proxy -- --demo        and open http://127.0.0.1:3000 in a browser
//! FAL_KEY=… cargo run --example proxy -- --auth-token-file tokens --allow-endpoint 'fal-ai/flux/**'
//! ```
//!
//! In the browser that is `fal.config({ proxyUrl: "/api/fal/proxy" })`, with a token of the caller's in `credentials`.
//!
//! Whoever may call spends from your account, so the server is closed until you choose: callers with tokens of their own
//! (`--auth-token-file`), or everybody (`--allow-anonymous`). `--demo` is a fal in this process with a page that shows it
//! all; without it the server never turns to anything but fal.
//!
//! Each option can be given by an environment variable as well: `FAL_PROXY_LISTEN` for `--listen`, and so on, with commas
//! between several values.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{env, num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use axum::http::{HeaderValue, Method, Uri};
use clap::{ArgAction, Parser, builder::BoolishValueParser};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use mimalloc::MiMalloc;
use serde_json::json;
use tower_fal::{
    CredentialStore,
    error::{BoxError, SourceErrorKind, report},
    proxy::{EXPOSED_HEADERS, FalProxy, UploadBody},
    retry::ReplayBody,
    source::{ChainSource, EnvSource, FileSource},
};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use self::{
    demo::Demo,
    front::Front,
    serve::{Connect, Connector, Health, Listener, Running, seconds, tokens},
};

#[path = "proxy/demo.rs"]
mod demo;
#[path = "proxy/front.rs"]
mod front;
#[allow(dead_code)] // what is put around a router, which this has not
mod serve;
mod terminal;

/// With hundreds of connections, memory of a few kilobytes is taken and given back all the time, for which the usual
/// allocator of Linux is slow.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The server proxy: browsers send it what they want of fal, and the key stays here.
///
/// It needs a key: FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE in the environment, or the options
/// --key-file or --default-chain. Either --auth-token-file or --allow-anonymous says who may call. With --demo it
/// needs none of these.
#[derive(Parser)]
#[command(mut_arg("max_connections", |argument| argument.default_value("10000")))]
#[command(mut_arg("admin", |argument| argument.default_value("127.0.0.1:3001")))]
#[command(mut_args(with_variable))]
struct Arguments {
    /// The path of the proxy
    #[arg(long, value_name = "PATH", default_value = "/api/fal/proxy")]
    path: String,
    /// A file with ID:SECRET. The server reads it again whenever it changes, and at SIGHUP
    #[arg(long, value_name = "FILE", conflicts_with = "demo")]
    key_file: Option<PathBuf>,
    /// Look where fal's own tools look: the environment, the profile of ~/.fal/config.toml, the login of `fal auth login`
    #[arg(long, conflicts_with_all = ["demo", "key_file"])]
    default_chain: bool,
    /// A file with the tokens of callers, who send them as `authorization: Bearer TOKEN` or `Key TOKEN`. Each line is TOKEN
    /// or NAME TOKEN. The server reads it again when it changes
    #[arg(long, value_name = "FILE")]
    auth_token_file: Option<PathBuf>,
    /// Let everybody call who can reach the server
    #[arg(long, conflicts_with = "auth_token_file")]
    allow_anonymous: bool,
    /// A name under which the server is called, such as app.example.com; `*` is any. Without one, a server that everybody
    /// may call on a loopback address takes requests for this machine only. It may be repeated
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allow_host: Vec<String>,
    /// An origin whose pages may call the server, such as https://app.example.com; `*` is any. It may be repeated
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', value_parser = origin)]
    allow_origin: Vec<HeaderValue>,
    /// One more target besides the default ones, such as 'ws.fal.run/**'. It may be repeated
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    allow_target: Vec<String>,
    /// An endpoint that may be used, such as 'fal-ai/flux/**'. Without this option all may. It may be repeated
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    allow_endpoint: Vec<String>,
    /// An application for which realtime tokens are handed out, such as fal-ai/fast-lcm-diffusion. It may be repeated
    #[arg(long, value_name = "APP", value_delimiter = ',')]
    allow_realtime: Vec<String>,
    /// A host to which fal may send results (fal_webhook), such as app.example.com; `*` is any. It may be repeated
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    allow_webhook: Vec<String>,
    /// How many bytes the body of a request may have
    #[arg(long, value_name = "BYTES", default_value = "33554432")]
    max_body: u64,
    /// How many requests of one caller may be under way. The others are answered with 429. Without this option there is no
    /// limit
    #[arg(long, value_name = "N")]
    max_in_flight: Option<NonZeroUsize>,
    /// How long fal's answer may take to begin. Without this option there is no limit, as models take minutes
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    first_byte_timeout: Option<Duration>,
    /// Speak HTTP/2 with fal, where fal does
    #[arg(long, conflicts_with_all = ["demo", "connect_to_http"])]
    http2: bool,
    /// Write a line for each request to the log: an id, the method, the host and the path of the target, the status. Without
    /// this option the log tells of failures only
    #[arg(long)]
    log_requests: bool,
    /// With --demo: the folder `node_modules` in which @fal-ai/client is installed, for the page
    // `requires` alone allows it beside options that exclude --demo.
    #[arg(long, value_name = "DIR", requires = "demo", conflicts_with_all = ["key_file", "default_chain"])]
    client_dir: Option<PathBuf>,
    #[command(flatten)]
    connect: Connect,
    #[command(flatten)]
    listener: Listener,
}

/// The environment variable of an option, which `--help` shows. What is empty there is not set, and neither is what is
/// said to be off: a manifest may name all of them.
fn with_variable(argument: clap::Arg) -> clap::Arg {
    let name = format!("FAL_PROXY_{}", argument.get_id().as_str().to_ascii_uppercase());
    let is_switch = matches!(argument.get_action(), ArgAction::SetTrue);
    let argument = if is_switch { argument.value_parser(BoolishValueParser::new()) } else { argument };
    match env::var(&name).map(|value| value.to_ascii_lowercase()).as_deref() {
        Ok("") => argument,
        Ok("false" | "off" | "no" | "n" | "f" | "0") if is_switch => argument,
        // Some thirty names, once in the life of the process: clap keeps them for as long.
        _ => argument.env(&*name.leak()),
    }
}

/// The origin of a page as browsers write it, or `*`.
fn origin(text: &str) -> Result<HeaderValue, &'static str> {
    let is_one = |url: Uri| match (url.scheme_str(), url.authority()) {
        (Some(scheme @ ("http" | "https")), Some(authority)) => {
            text == format!("{scheme}://{authority}").to_ascii_lowercase() && !text.contains('@')
        }
        _ => false,
    };
    match text.parse() {
        Ok(origin) if text == "*" || text.parse().is_ok_and(is_one) => Ok(origin),
        _ => Err("it must be like https://app.example.com, without a path, or `*`"),
    }
}

type Upstream = Client<Connector, ReplayBody<UploadBody<Incoming>>>;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Arguments = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    if !arguments.allow_anonymous && arguments.auth_token_file.is_none() && !arguments.listener.demo {
        eprintln!("--auth-token-file or --allow-anonymous is missing: who may call? See --help.");
        return ExitCode::from(2);
    }
    serve::run_bare(&arguments.listener, async |address| {
        let demo = if arguments.listener.demo { Some(Demo::start(&arguments).await?) } else { None };
        let store = match &demo {
            Some(demo) => demo.store().clone(),
            None => store(&arguments).await?,
        };
        let connector = match &demo {
            Some(demo) => demo.connector()?,
            None => arguments.connect.connector(arguments.http2)?,
        };
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        let proxy = proxy(&arguments, address.ip().to_canonical().is_loopback(), &store, client).await?;

        let (ready, details) = (store.clone(), store.clone());
        let health =
            Health::new(Box::new(move || ready.status().is_ready()), Box::new(move || json!(details.status())));
        let pages = demo.map(|demo| demo.pages(Arc::clone(&health)));
        Ok(Running {
            answers: Front::new(&arguments, proxy, cors(&arguments), Arc::clone(&health), pages.unwrap_or_default()),
            health,
            hosts: arguments.allow_host.clone(),
            try_it: try_it(&arguments),
        })
    })
    .await
}

/// The rest of a curl command line for `--demo`.
fn try_it(arguments: &Arguments) -> String {
    let endpoint = match arguments.allow_endpoint.first() {
        // The fal of the demo has an answer for each endpoint.
        Some(pattern) if !pattern.contains("**") => pattern.replace('*', "x"),
        _ => "fal-ai/flux/dev".to_owned(),
    };
    let token = if arguments.auth_token_file.is_some() { "-H 'authorization: Bearer TOKEN' " } else { "" };
    let path = &arguments.path;
    format!(
        r#"-d '{{"prompt":"a lighthouse"}}' -H content-type:application/json {token}-H x-fal-target-url:https://fal.run/{endpoint} '{{}}{path}', or open {{}} in a browser"#
    )
}

async fn proxy(
    arguments: &Arguments,
    is_on_loopback: bool,
    store: &CredentialStore,
    client: Upstream,
) -> Result<FalProxy<Upstream>, BoxError> {
    let mut proxy = FalProxy::over(store, client).path(&arguments.path)?.max_body(arguments.max_body);
    proxy = match &arguments.auth_token_file {
        Some(path) => proxy.authenticate(tokens::follow(path).await?),
        None => proxy.allow_anonymous(),
    };
    for name in &arguments.allow_host {
        proxy = proxy.allow_host(name)?;
    }
    // Whoever can reach another address need not go through somebody's browser.
    if arguments.allow_host.is_empty() && !is_on_loopback {
        proxy = proxy.allow_host("*")?;
    }
    for pattern in &arguments.allow_target {
        proxy = proxy.allow_target(pattern)?;
    }
    for pattern in &arguments.allow_endpoint {
        proxy = proxy.allow_endpoint(pattern)?;
    }
    for app in &arguments.allow_realtime {
        proxy = proxy.allow_realtime(app)?;
    }
    for host in &arguments.allow_webhook {
        proxy = proxy.allow_webhook(host)?;
    }
    if let Some(requests) = arguments.max_in_flight {
        proxy = proxy.max_in_flight(requests.get());
    }
    if let Some(limit) = arguments.first_byte_timeout {
        proxy = proxy.first_byte_timeout(limit);
    }
    Ok(proxy)
}

/// The store with the server's credential. It is an error if there is none.
async fn store(arguments: &Arguments) -> Result<CredentialStore, BoxError> {
    let store = match &arguments.key_file {
        Some(path) => CredentialStore::builder(FileSource::new(path)),
        None if arguments.default_chain => CredentialStore::builder(ChainSource::fal_default()),
        None => CredentialStore::builder(EnvSource::all()),
    };
    #[cfg(unix)]
    let store = store.reload_on_sighup();
    store.watch_files().build().await.map_err(|error| match error.kind() {
        SourceErrorKind::NotFound => {
            let first = if arguments.default_chain { "Set FAL_KEY, or run `fal auth login`, or" } else { "Or" };
            format!("{}. {first} use --key-file FILE, or --demo. See --help.", report(&error)).into()
        }
        _ => error.into(),
    })
}

/// For pages of other origins, if there are any that may call.
fn cors(arguments: &Arguments) -> Option<CorsLayer> {
    let origins = &arguments.allow_origin;
    let origins = match origins.as_slice() {
        [] => return None,
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().cloned()),
    };
    let cors = CorsLayer::new().allow_origin(origins).allow_methods([Method::GET, Method::POST, Method::PUT]);
    Some(cors.allow_headers(AllowHeaders::mirror_request()).expose_headers(EXPOSED_HEADERS))
}
