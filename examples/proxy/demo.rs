//! `--demo`: a fal in this process, a key that a button rotates, and a page that shows both.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::{
        StatusCode, Uri,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tower_fal::{
    Credential, CredentialStore,
    error::BoxError,
    mock::{MockFal, Presented, Received},
    source,
};

use super::Arguments;
use crate::serve::{Connector, Health};

const PAGE: &str = include_str!("demo.html");

/// How many requests the page shows.
const SHOWN: usize = 40;

#[derive(Clone)]
pub(crate) struct Demo(Arc<Inner>);

struct Inner {
    fal: MockFal,
    store: CredentialStore,
    /// The number of the key that fal accepts.
    number: Arc<AtomicU64>,
    /// Under which generation the store had each key, by the key's id.
    generations: Mutex<HashMap<String, u64>>,
    path: String,
    client_dir: Option<PathBuf>,
}

impl Demo {
    pub(crate) async fn start(arguments: &Arguments) -> Result<Self, BoxError> {
        let (fal, number) = (MockFal::start().await?, Arc::new(AtomicU64::new(1)));
        fal.accept(&key(1)?);
        let current = Arc::clone(&number);
        // As from a vault that knows of the rotation before the server does.
        let source = source::from_fn("demo", None, move || {
            let number = current.load(Ordering::Relaxed);
            async move { key(number) }
        });
        let store = CredentialStore::builder(source).build().await?;
        let client_dir = arguments.client_dir.clone();
        if let Some(directory) = &client_dir
            && !directory.join("@fal-ai/client/package.json").is_file()
        {
            return Err("--client-dir: @fal-ai/client is not installed there".into());
        }
        let path = arguments.path.clone();
        let demo = Self(Arc::new(Inner { fal, store, number, generations: Mutex::default(), path, client_dir }));
        demo.note_generation();
        Ok(demo)
    }

    /// Remembers under which generation the store has its key. Each key has its request, and the page asks often.
    fn note_generation(&self) -> HashMap<String, u64> {
        let status = json!(self.0.store.status());
        let mut generations = self.0.generations.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(key_id), Some(generation)) = (status["key_id"].as_str(), status["generation"].as_u64()) {
            generations.insert(key_id.to_owned(), generation);
        }
        generations.clone()
    }

    pub(crate) fn store(&self) -> &CredentialStore {
        &self.0.store
    }

    /// Connections that end at the fal in this process, whatever host was meant.
    pub(crate) fn connector(&self) -> Result<Connector, BoxError> {
        let fal = &self.0.fal;
        let origins = [("queue.", fal.queue_origin()), ("rest.", fal.rest_origin()), ("", fal.run_origin())];
        let origins = origins.into_iter().map(|(host, origin)| Ok((host, origin.parse::<Uri>()?)));
        Ok(Connector::plain_by_host(origins.collect::<Result<_, BoxError>>()?))
    }

    pub(crate) fn pages(self, health: Arc<Health>) -> Router {
        Router::new()
            .route("/", get(async || Html(PAGE)))
            .route("/demo/status", get(status))
            .route("/demo/rotate", post(rotate))
            .route("/demo/client/{*file}", get(client))
            .with_state((self, health))
    }
}

fn key(number: u64) -> Result<Credential, BoxError> {
    Ok(Credential::key_pair(&*format!("demo-key-{number}"), "not-a-secret")?)
}

async fn status(State((demo, health)): State<(Demo, Arc<Health>)>) -> impl IntoResponse {
    let Inner { fal, path, client_dir, .. } = &*demo.0;
    let (generations, status) = (demo.note_generation(), health.details());
    let received = fal.received();
    let shown = received.iter().skip(received.len().saturating_sub(SHOWN));
    let requests: Vec<_> = shown.map(|request| described(request, &generations)).collect();
    let body = json!({
        "key_id": status["key_id"],
        "generation": status["generation"],
        "ready": health.is_ready(),
        "status": status,
        "path": path,
        "client": client_dir.is_some(),
        "runs": fal.runs(),
        "requests": requests,
    });
    ([(CACHE_CONTROL, "no-store")], Json(body))
}

fn described(request: &Received, generations: &HashMap<String, u64>) -> Value {
    let key_id = request.presented.key_id().map(ToString::to_string);
    json!({
        "method": request.method.as_str(),
        "host": request.host,
        "path": request.path,
        "presented": match request.presented {
            Presented::Nothing => "nothing",
            Presented::Accepted(_) => "accepted",
            _ => "refused",
        },
        "generation": key_id.as_ref().and_then(|key_id| generations.get(key_id)),
        "key_id": key_id,
        "status": request.status.map(|status| status.as_u16()),
    })
}

/// From now on fal accepts the next key, and no other. A page of another site cannot send this: its `content-type` needs
/// leave, which nobody gives.
async fn rotate(State((demo, _)): State<(Demo, Arc<Health>)>, Json(_): Json<Value>) -> Result<Json<Value>, StatusCode> {
    let Inner { fal, number, .. } = &*demo.0;
    let old = number.fetch_add(1, Ordering::Relaxed);
    let keys = (key(old).ok(), key(old + 1).ok());
    let (Some(old), Some(new)) = keys else { return Err(StatusCode::INTERNAL_SERVER_ERROR) };
    fal.accept(&new);
    fal.revoke(&old);
    Ok(Json(json!({ "key_id": new.key_id().map(ToString::to_string) })))
}

/// A file of fal's own client, or of what it needs.
async fn client(State((demo, _)): State<(Demo, Arc<Health>)>, UrlPath(file): UrlPath<String>) -> Response {
    let missing = || StatusCode::NOT_FOUND.into_response();
    let (Some(directory), file) = (&demo.0.client_dir, Path::new(&file)) else { return missing() };
    let content_type = match file.extension().and_then(|extension| extension.to_str()) {
        Some("js" | "cjs" | "mjs") => "text/javascript",
        Some("json") => "application/json",
        _ => return missing(),
    };
    if !file.components().all(|component| matches!(component, Component::Normal(_))) {
        return missing();
    }
    let file = directory.join(file);
    match tokio::task::spawn_blocking(move || std::fs::read(file)).await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, content_type)], text).into_response(),
        _ => missing(),
    }
}
