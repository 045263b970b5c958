//! A server whose customers bring their own fal keys: `POST /run/{owner}/{app}` runs a model with the key of whoever
//! asks, and bills it to nobody else.
//!
//! ```text
//! cargo run --example axum_byok -- --demo
//! curl -d '{"prompt":"a lighthouse"}' -H 'authorization: Bearer token-of-acme' http://127.0.0.1:3000/run/fal-ai/flux
//! ```
//!
//! The key travels in the request's extensions. The layer is [`FalLayer::per_request`], which has no other: when the
//! extension is lost on the way, the request goes out without a key and is refused. Here it is lost where it should
//! be: `FollowRedirect` drops extensions when an app answers with a redirect to another origin.
//!
//! Each tenant is a directory with a `token`, by which we know it, and perhaps its `fal_key`. Yours are in a database
//! or a vault; `tower_fal::source::from_fn` reads those.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{
        HeaderMap, Request, StatusCode, Uri,
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
use tower::{ServiceBuilder, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalAuthError, FalClient, FalLayer,
    error::{BoxError, Reason},
    origin::{FalOrigins, OriginPolicy as _},
    source::FileSource,
};
use tower_http::follow_redirect::{
    FollowRedirectLayer,
    policy::{Action, Attempt, Policy, PolicyExt as _, Standard, clone_body_fn, redirect_fn},
};

use self::serve::{App, Options, Upstream, climbs_out, problem};

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
    options: Options,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { tenants, options } = match terminal::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    serve::run(options, async |upstream| {
        let tenants = if let Some(key) = upstream.demo_key("key-of-acme")? {
            let acme = tenant("acme", "token-of-acme", Some(CredentialStore::fixed(key)));
            Tenants::from_iter([acme, tenant("zeta", "token-of-zeta", None)])
        } else {
            read_tenants(&tenants.unwrap_or_default()).await?
        };
        let layer = FalLayer::per_request().auth(|auth| auth.origins(upstream.origins.clone()));
        let client = ServiceBuilder::new()
            // Around the layer, so that each hop is looked at again.
            .layer(FollowRedirectLayer::with_policy(within(upstream.origins.clone())))
            .layer(layer)
            .service(Client::builder(TokioExecutor::new()).build(Upstream::connector()?));
        let tenants = Arc::new(tenants);
        let byok = Byok {
            fal: FalClient::over(client),
            run_url: upstream.run_url.as_str().into(),
            tenants: Arc::clone(&tenants),
        };
        Ok(App {
            router: Router::new().route("/run/{*app}", post(run)).with_state(byok),
            // A tenant's trouble is no reason to take the server from the others.
            ready: Box::new(|| true),
            details: Box::new(move || json!({ "ready": true, "tenants": states(&tenants) })),
            try_it: r#"-d '{"prompt":"a lighthouse"}' -H 'authorization: Bearer token-of-acme' {}/run/fal-ai/flux"#,
        })
    })
    .await
}

/// Follows redirects within fal only: an app is anybody's, and where it leads is no place for a server to go.
fn within(fal: FalOrigins) -> impl Policy<Full<Bytes>, FalAuthError> + Clone {
    let origins = redirect_fn(move |attempt: &Attempt<'_>| {
        Ok(if fal.admits(attempt.location()) { Action::Follow } else { Action::Stop })
    });
    let body = clone_body_fn(|body: &Full<Bytes>| Some(body.clone()));
    origins.and::<_, Full<Bytes>, FalAuthError>(Standard::default()).and::<_, Full<Bytes>, FalAuthError>(body)
}

#[derive(Clone)]
struct Byok {
    fal: FalClient,
    run_url: Arc<str>,
    tenants: Arc<Tenants>,
}

/// By the SHA-256 of their tokens: how long a look-up takes tells nothing of a token.
type Tenants = HashMap<[u8; 32], Tenant>;

struct Tenant {
    name: String,
    key: Option<CredentialStore>,
}

fn tenant(name: &str, token: &str, key: Option<CredentialStore>) -> ([u8; 32], Tenant) {
    (Sha256::digest(token).into(), Tenant { name: name.to_owned(), key })
}

async fn read_tenants(directory: &Path) -> Result<Tenants, BoxError> {
    let failed = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    let mut tenants = Tenants::new();
    for entry in fs::read_dir(directory).map_err(|error| failed(directory, error))? {
        let directory = entry?.path();
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        let (token, key) = (directory.join("token"), directory.join("fal_key"));
        let secret = fs::read_to_string(&token).map_err(|error| failed(&token, error))?;
        let store = CredentialStore::builder(FileSource::new(&key)).name(&*name).watch_files();
        let store = if key.exists() { Some(store.build().await?) } else { None };
        let (digest, tenant) = tenant(&name, secret.trim(), store);
        if secret.trim().is_empty() || tenants.insert(digest, tenant).is_some() {
            return Err(format!("{}: it is empty, or another tenant's too", token.display()).into());
        }
    }
    Ok(tenants)
}

fn states(tenants: &Tenants) -> Value {
    tenants
        .values()
        .map(|tenant| (tenant.name.clone(), json!(tenant.key.as_ref().map(CredentialStore::status))))
        .collect()
}

async fn run(State(byok): State<Byok>, uri: Uri, headers: HeaderMap, input: Bytes) -> Result<Response, Refused> {
    let tenant = byok.tenant(&headers).ok_or(Refused::Unknown)?;
    let key = tenant.key.as_ref().ok_or(Refused::HasNoKey)?.load().credential().clone();
    let app = uri.path().strip_prefix("/run").unwrap_or_default();
    if climbs_out(app) {
        return Err(Refused::NoSuchApp);
    }
    // A request of our own: of the caller's headers, and of its query, there is nothing in it.
    let request = Request::post(format!("{}{app}", byok.run_url))
        .header(CONTENT_TYPE, "application/json")
        .extension(key)
        .body(Full::new(input))
        .map_err(|_| Refused::NoSuchApp)?;
    let response = byok.fal.oneshot(request).await?;
    let status = response.status();
    if status == StatusCode::UNAUTHORIZED || status.is_redirection() {
        // A key that is refused is an error by now. So there was none: a redirect has led, or would lead, elsewhere.
        return Err(Refused::LedElsewhere);
    }
    let content_type = response.headers().get(CONTENT_TYPE).cloned();
    let mut answer = (status, Body::new(response.into_body())).into_response();
    answer.headers_mut().extend(content_type.map(|value| (CONTENT_TYPE, value)));
    Ok(answer)
}

impl Byok {
    fn tenant(&self, headers: &HeaderMap) -> Option<&Tenant> {
        let token = headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(b"Bearer ")?;
        let digest: [u8; 32] = Sha256::digest(token).into();
        self.tenants.get(&digest)
    }
}

/// Why a tenant's request was not run.
enum Refused {
    /// We know nobody with this token.
    Unknown,
    HasNoKey,
    NoSuchApp,
    LedElsewhere,
    Fal(FalAuthError),
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
                response.headers_mut().insert(WWW_AUTHENTICATE, axum::http::HeaderValue::from_static("Bearer"));
                response
            }
            Self::HasNoKey => problem(StatusCode::CONFLICT, "no_key"),
            Self::NoSuchApp => problem(StatusCode::NOT_FOUND, "no_such_app"),
            Self::LedElsewhere => problem(StatusCode::BAD_GATEWAY, "led_elsewhere"),
            // The tenant's key, so the tenant is told.
            Self::Fal(FalAuthError::Unauthorized(refusal)) if refusal.reason() == Reason::UnknownCredential => {
                problem(StatusCode::CONFLICT, "key_refused")
            }
            Self::Fal(error) => error.into_response(),
        }
    }
}
