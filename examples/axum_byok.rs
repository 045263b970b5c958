//! A server whose tenants bring their own fal keys: `POST /run/{owner}/{app}` runs a model with the key of the tenant
//! that asks, so that fal bills that tenant.
//!
//! ```text
//! cargo run --example axum_byok -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H 'authorization: Bearer token-of-acme' http://127.0.0.1:3000/run/fal-ai/flux
//! ```
//!
//! The key travels in the request's extensions. The layer is [`FalLayer::per_request`], which has no other key. If a
//! layer around it drops the extensions, the request is not sent: `require_credential` makes that an error here, instead
//! of a refusal by fal that would look like the tenant's.
//!
//! Each tenant is a directory with a `token`, by which the server knows the tenant, and its `fal_key` if it has one. In
//! your server they are in a database or a vault: `tower_fal::source::from_fn` reads those. What is wrong with one
//! tenant never keeps the others from being served.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{
        HeaderMap, HeaderValue, Request, StatusCode, Uri,
        header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
    routing::post,
};
use clap::Parser;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;
use tower::Layer as _;
use tower_fal::{
    CredentialStore, FalAuthError, FalClient, FalLayer,
    error::{BoxError, Reason, SourceError, SourceErrorKind, report},
    source::FileSource,
};
use tracing::warn;

use self::serve::{App, FalUrls, Options, Upstream, climbs_out, problem};

mod serve;
mod terminal;

/// A server that runs models with its tenants' own keys: POST /run/OWNER/APP with `authorization: Bearer TOKEN`.
///
/// It needs --tenants, or --demo.
#[derive(Parser)]
struct Arguments {
    /// A directory that has a directory for each tenant. In it, the file `token` holds the tenant's TOKEN, and the file
    /// `fal_key` its ID:SECRET, if it has a key. The server reads the key again whenever it changes
    #[arg(long, value_name = "DIR", conflicts_with = "demo", required_unless_present = "demo")]
    tenants: Option<PathBuf>,
    #[command(flatten)]
    urls: FalUrls,
    #[command(flatten)]
    options: Options,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { tenants, urls, options } = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    serve::run(options, urls, async |upstream| {
        let tenants = if let Some(key) = upstream.demo_key("key-of-acme")? {
            let acme = Tenant { store: OnceCell::new_with(Some(CredentialStore::fixed(key))), ..Tenant::new("acme") };
            Tenants::of([("token-of-acme".to_owned(), acme), ("token-of-zeta".to_owned(), Tenant::new("zeta"))])
        } else {
            read_tenants(&tenants.unwrap_or_default()).await?
        };
        // It follows no redirects: an app chooses where they lead, and the tenant would pay for what runs there.
        let http = Client::builder(TokioExecutor::new()).build(Upstream::connector()?);
        let layer = FalLayer::per_request()
            .auth(|auth| auth.origins(upstream.run.origins.clone()))
            .retry(|retry| retry.require_credential());
        let tenants = Arc::new(tenants);
        let byok = Byok {
            fal: FalClient::over(layer.layer(http)),
            run_url: upstream.run.url.as_str().into(),
            tenants: Arc::clone(&tenants),
        };
        let for_details = Arc::clone(&tenants);
        Ok(App {
            router: Router::new().route("/run/{*app}", post(run)).with_state(byok),
            // One tenant with a bad key does not concern the others. Without any tenant the directory is not there yet.
            ready: Box::new(move || !tenants.by_token.is_empty()),
            details: Box::new(move || for_details.details()),
            pages: Router::new(),
            checks_host: false,
            try_it: r#"-d '{"prompt":"a lighthouse"}' -H 'authorization: Bearer token-of-acme' {}/run/fal-ai/flux"#,
        })
    })
    .await
}

#[derive(Clone)]
struct Byok {
    fal: FalClient,
    run_url: Arc<str>,
    tenants: Arc<Tenants>,
}

#[derive(Default)]
struct Tenants {
    /// By the SHA-256 of their tokens, so that the time of a look-up says nothing about a token.
    by_token: HashMap<[u8; 32], Tenant>,
    /// The names of those that are not served. The log says why.
    left_out: Vec<String>,
}

struct Tenant {
    name: String,
    /// The file with the key.
    key: PathBuf,
    /// It is empty until the key could be read for the first time.
    store: OnceCell<CredentialStore>,
}

/// Reads the directories of all tenants. A tenant that cannot be served is left out, and the log says why.
async fn read_tenants(directory: &Path) -> Result<Tenants, BoxError> {
    let failed = |error| format!("cannot read the directory of the tenants, {}: {error}", directory.display());
    let mut found = Vec::new();
    let mut left_out = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let directory = entry.map_err(failed)?.path();
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match read_tenant(&directory, &name).await {
            Ok(tenant) => found.push(tenant),
            Err(error) => {
                warn!(tenant = name, error, "this tenant is not served");
                left_out.push(name);
            }
        }
    }
    let mut tenants = Tenants::of(found);
    tenants.left_out.append(&mut left_out);
    Ok(tenants)
}

async fn read_tenant(directory: &Path, name: &str) -> Result<(String, Tenant), String> {
    let file = directory.join("token");
    let token = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let token = token.trim();
    if token.is_empty() {
        return Err(format!("{}: it is empty", file.display()));
    }
    let tenant = Tenant { key: directory.join("fal_key"), ..Tenant::new(name) };
    match tenant.store().await {
        Ok(_) => {}
        Err(error) if error.kind() == SourceErrorKind::NotFound => {}
        Err(error) => warn!(tenant = name, error = report(&error), "the key of this tenant cannot be used yet"),
    }
    Ok((token.to_owned(), tenant))
}

impl Tenants {
    /// Tenants with the same token are left out, all of them: each could run models with the key of the others.
    fn of(found: impl IntoIterator<Item = (String, Tenant)>) -> Self {
        let mut by_token = HashMap::<_, Vec<_>>::new();
        for (token, tenant) in found {
            by_token.entry(Sha256::digest(token).into()).or_default().push(tenant);
        }
        let mut tenants = Self::default();
        for (token, mut same) in by_token {
            match same.pop() {
                Some(tenant) if same.is_empty() => drop(tenants.by_token.insert(token, tenant)),
                last => {
                    let names: Vec<_> = same.into_iter().chain(last).map(|tenant| tenant.name).collect();
                    warn!(tenants = ?names, "these tenants are not served, because they have the same token");
                    tenants.left_out.extend(names);
                }
            }
        }
        tenants
    }

    fn find(&self, headers: &HeaderMap) -> Option<&Tenant> {
        let token = headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(b"Bearer ")?;
        let digest: [u8; 32] = Sha256::digest(token).into();
        self.by_token.get(&digest)
    }

    fn details(&self) -> Value {
        let status = |tenant: &Tenant| json!(tenant.store.get().map(CredentialStore::status));
        let served: serde_json::Map<_, _> =
            self.by_token.values().map(|tenant| (tenant.name.clone(), status(tenant))).collect();
        json!({ "ready": !self.by_token.is_empty(), "tenants": served, "left_out": self.left_out })
    }
}

impl Tenant {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), key: PathBuf::new(), store: OnceCell::new() }
    }

    /// The tenant's store. As long as there is no key that can be used, each call looks for one.
    async fn store(&self) -> Result<&CredentialStore, SourceError> {
        let build = || CredentialStore::builder(FileSource::new(&self.key)).name(&*self.name).watch_files().build();
        self.store.get_or_try_init(build).await
    }
}

async fn run(State(byok): State<Byok>, uri: Uri, headers: HeaderMap, input: Bytes) -> Result<Response, Refused> {
    let tenant = byok.tenants.find(&headers).ok_or(Refused::Unknown)?;
    let key = tenant.store().await?.load().credential().clone();
    let app = uri.path().strip_prefix("/run").unwrap_or_default();
    if climbs_out(app) {
        return Err(Refused::NoSuchApp);
    }
    // A new request: it has nothing of the caller's headers and nothing of its query.
    let request = Request::post(format!("{}{app}", byok.run_url))
        .header(CONTENT_TYPE, "application/json")
        .extension(key)
        .body(Full::new(input))
        .map_err(|_| Refused::NoSuchApp)?;
    let response = byok.fal.request(request).await?;
    let status = response.status();
    if status.is_informational() || status.is_redirection() || status == StatusCode::UNAUTHORIZED {
        // A redirect of the app, a protocol that nobody asked for, or a 401 that says nothing about the tenant's key.
        return Err(Refused::Answer);
    }
    let content_type = response.headers().get(CONTENT_TYPE).cloned();
    let mut answer = (status, Body::new(response.into_body())).into_response();
    answer.headers_mut().extend(content_type.map(|value| (CONTENT_TYPE, value)));
    Ok(answer)
}

/// Why a request has no answer from fal.
enum Refused {
    /// There is no tenant with this token.
    Unknown,
    /// The tenant has no key that can be used.
    Key(SourceError),
    NoSuchApp,
    /// fal's answer cannot be handed on.
    Answer,
    Fal(FalAuthError),
}

impl From<SourceError> for Refused {
    fn from(error: SourceError) -> Self {
        Self::Key(error)
    }
}

impl From<FalAuthError> for Refused {
    fn from(error: FalAuthError) -> Self {
        Self::Fal(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self::Unknown => {
                let mut response = problem(StatusCode::UNAUTHORIZED, "unknown_tenant");
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                response
            }
            Self::Key(error) if error.kind() == SourceErrorKind::NotFound => problem(StatusCode::CONFLICT, "no_key"),
            Self::Key(_) => problem(StatusCode::CONFLICT, "unusable_key"),
            Self::NoSuchApp => problem(StatusCode::NOT_FOUND, "no_such_app"),
            Self::Answer => problem(StatusCode::BAD_GATEWAY, "answer"),
            // fal refused the tenant's key. Only the tenant can change that, so the tenant is told why. A 502 would say
            // that this server is broken.
            Self::Fal(FalAuthError::Unauthorized(refusal) | FalAuthError::Forbidden(refusal))
                if !matches!(refusal.reason(), Reason::Application | Reason::Unknown) =>
            {
                problem(StatusCode::CONFLICT, refusal.reason().as_str())
            }
            Self::Fal(error) => error.into_response(),
        }
    }
}
