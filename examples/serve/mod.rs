//! What a server has around its routes, whatever they do: the three `axum_*` examples share it.
//!
//! * Probes: `/healthz` says that the process lives, `/readyz` whether it should get requests, and what is the matter
//!   if something is. It names key ids and files: both are for your platform, not for the world.
//! * For each request an id, a span with host and path (never the query), a time-out, and a limit to its body.
//! * A shutdown that loses no request. At SIGTERM or ctrl-c `/readyz` turns 503 and requests are still served, until
//!   whoever sends them has noticed (`--drain-delay`). Then no more connections are accepted, and what is open may
//!   finish (`--drain-timeout`). A second signal ends it at once.

use std::{
    io,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Json, Router,
    extract::Request,
    http::{
        HeaderValue, StatusCode,
        header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, COOKIE, HOST, PROXY_AUTHORIZATION, SET_COOKIE},
        uri::Authority,
    },
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt as _,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use tower::{
    ServiceBuilder,
    util::{MapRequestLayer, MapResponseLayer},
};
use tower_fal::{CredentialStore, error::BoxError, error::report};
use tower_http::{
    limit::RequestBodyLimitLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    sensitive_headers::{SetSensitiveRequestHeadersLayer, SetSensitiveResponseHeadersLayer},
    timeout::TimeoutLayer,
    trace::{DefaultOnResponse, TraceLayer},
};
use tracing::{Level, Span, info, info_span, warn};

mod options;
mod upstream;

pub(crate) use self::{options::Options, upstream::Upstream};

/// The longest body that a request may have, in bytes.
const MAX_BODY: usize = 1024 * 1024;

/// A server, ready to be run.
pub(crate) struct App {
    pub(crate) router: Router,
    /// Whether it can do its work, and what to say about that.
    pub(crate) ready: Arc<dyn Fn() -> (bool, Value) + Send + Sync>,
    /// The rest of a curl command line, with `{}` in place of the server's URL.
    pub(crate) try_it: &'static str,
}

impl App {
    /// A server that can do its work if this store has a usable credential.
    #[allow(dead_code)] // axum_byok has as many stores as tenants
    pub(crate) fn new(router: Router, store: CredentialStore, try_it: &'static str) -> Self {
        let ready = move || {
            let status = store.status();
            (status.is_ready(), json!(status))
        };
        Self { router, ready: Arc::new(ready), try_it }
    }
}

/// The whole of `main` after the arguments: starts the log, builds the app, and serves it until a signal ends it.
pub(crate) async fn run(options: Options, build: impl AsyncFnOnce(&Upstream) -> Result<App, BoxError>) -> ExitCode {
    // Standard output is for the address: programs that start this one read it there.
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let served = async {
        // It keeps the mock of --demo alive.
        let upstream = Upstream::new(&options).await?;
        let app = build(&upstream).await?;
        serve(&options, app).await
    };
    match served.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: &Options, app: App) -> Result<(), BoxError> {
    // Before anybody is told to come, so that a signal finds someone who waits for it.
    let mut end = End::new()?;
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", options.listen))?;
    let address = listener.local_addr()?;
    let draining = Arc::new(AtomicBool::new(false));
    let try_it = options.demo.then_some(app.try_it);
    let router = around(app, options, Arc::clone(&draining));
    let (stop, stopped) = oneshot::channel::<()>();
    // Best effort: without it an answer is late, not wrong.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let server = axum::serve(listener, router).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    let server = tokio::spawn(server.into_future());
    announce(address, try_it);

    end.signal().await;
    draining.store(true, Ordering::Relaxed);
    info!(delay = ?options.drain_delay, "shutting down: not ready any more, and serving while that gets about");
    tokio::select! {
        () = tokio::time::sleep(options.drain_delay) => {}
        () = end.signal() => return Ok(()),
    }
    drop(stop);
    info!(timeout = ?options.drain_timeout, "no new connections; waiting for those that are open");
    tokio::select! {
        served = server => served??,
        () = tokio::time::sleep(options.drain_timeout) => warn!("closing what is still open"),
        () = end.signal() => warn!("closing what is still open, as told by a second signal"),
    }
    Ok(())
}

fn announce(address: SocketAddr, try_it: Option<&str>) {
    println!("listening on http://{address}");
    if let Some(try_it) = try_it {
        println!("try: curl {}", try_it.replace("{}", &format!("http://{address}")));
    }
}

/// The layers around an app's routes, and the probes beside them.
fn around(app: App, options: &Options, draining: Arc<AtomicBool>) -> Router {
    let App { router, ready, .. } = app;
    let router = router.layer(
        ServiceBuilder::new()
            .layer(MapRequestLayer::new(without_odd_request_id))
            .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
            // Whoever prints headers further in prints `Sensitive`.
            .layer(SetSensitiveRequestHeadersLayer::new([AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION]))
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(span)
                    .on_request(())
                    .on_response(DefaultOnResponse::new().level(Level::INFO)),
            )
            .layer(SetSensitiveResponseHeadersLayer::new([SET_COOKIE]))
            .layer(PropagateRequestIdLayer::x_request_id())
            .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, options.request_timeout))
            .layer(RequestBodyLimitLayer::new(MAX_BODY)),
    );
    // Not within the layers: probes come every few seconds, and nobody reads about them.
    let is_draining = Arc::clone(&draining);
    let readyz = move || {
        let (ready, mut report) = ready();
        let draining = is_draining.load(Ordering::Relaxed);
        report["draining"] = draining.into();
        let status = if ready && !draining { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        std::future::ready((status, Json(report)))
    };
    // A client that keeps its connection would send its next request on it just as it is closed.
    let close_when_draining = move |mut response: Response| {
        if draining.load(Ordering::Relaxed) {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    };
    router
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .layer(MapResponseLayer::new(close_when_draining))
}

/// What the log says about a request. Not its query, which is where people put tokens.
fn span<B>(request: &Request<B>) -> Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    // Parsed, as a name and a password may stand before it.
    let in_header = || request.headers().get(HOST)?.to_str().ok()?.parse::<Authority>().ok();
    let host = request.uri().authority().cloned().or_else(in_header);
    info_span!(
        "request",
        id,
        method = %request.method(),
        host = host.as_ref().map(Authority::host),
        path = request.uri().path(),
    )
}

/// A caller may bring the id under which its own log has the request, if it looks like one.
fn without_odd_request_id<B>(mut request: Request<B>) -> Request<B> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let id = request.headers().get("x-request-id").map(HeaderValue::as_bytes);
    if id.is_some_and(|id| id.is_empty() || id.len() > 64 || !id.iter().all(is_plain)) {
        request.headers_mut().remove("x-request-id");
    }
    request
}

/// Whether a caller's path would lead out of the URL that it is put below, if not here then where dots are taken for
/// directories, before or after decoding.
#[allow(dead_code)] // no path of axum_images is a caller's
pub(crate) fn climbs_out(path: &str) -> bool {
    let decoded = path.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\");
    decoded.split(['/', '\\', ';']).any(|segment| segment == "..")
}

/// An error of the example's own, in the form in which a `FalAuthError` is answered.
pub(crate) fn problem(status: StatusCode, reason: &str) -> Response {
    let title = status.canonical_reason().unwrap_or_default();
    let body = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "reason": reason });
    (status, [(CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
}

/// SIGTERM and ctrl-c, again and again.
#[cfg(unix)]
struct End {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl End {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn signal(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct End;

#[cfg(not(unix))]
impl End {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn signal(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
