//! What surrounds the routes of a server, whatever they do. The examples that are servers share it.
//!
//! * One accept loop: bounds on connections, on heads and on the time in which nothing happens.
//! * `/healthz` says that the process lives, and `/readyz` whether it should get requests. They say no more than that,
//!   because everyone can ask. Key ids, file names and metrics are on a listener of their own: `--admin`.
//! * For each request an id, a span with host and path (never the query), a timeout, and a limit to its body. Only so
//!   many requests are under way at a time; the others are answered with 503.
//! * Requests that pages of other sites cause are refused, and answers cannot run as pages of this server.
//! * A shutdown that loses no request. At SIGTERM or ctrl-c `/readyz` turns 503, and the server goes on until those who
//!   send requests have noticed (`--drain-delay`). Then it accepts no more connections, and open requests may finish
//!   (`--drain-timeout`). A second signal ends it at once.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    extract::Request,
    http::{
        HeaderValue, StatusCode,
        header::{
            AUTHORIZATION, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, HOST, PROXY_AUTHORIZATION,
            SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
        },
        uri::Authority,
    },
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
    routing::get,
};
use metrics::counter;
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{Semaphore, oneshot},
};
use tower::{
    ServiceBuilder,
    util::{MapRequestLayer, MapResponseLayer},
};
use tower_fal::{CredentialStore, error::BoxError, error::report};
use tower_http::{
    limit::RequestBodyLimitLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    sensitive_headers::{SetSensitiveRequestHeadersLayer, SetSensitiveResponseHeadersLayer},
    set_header::SetResponseHeaderLayer,
    timeout::TimeoutLayer,
    trace::{DefaultOnResponse, TraceLayer},
};
use tracing::{Level, Span, info, info_span, warn};

mod accept;
mod admin;
mod browser;
mod busy;
mod connect;
mod connection;
mod files;
mod options;
mod seldom;
pub(crate) mod tokens;
mod upstream;

use self::{browser::Hosts, connection::Limits};
#[allow(unused_imports)] // each server uses a part of it
pub(crate) use self::{
    connect::{Connect, Connector},
    connection::{Answers, Peer},
    options::{FalUrls, Listener, Options, seconds},
    seldom::Seldom,
    upstream::Upstream,
};

/// The longest body that a request may have, in bytes.
const MAX_BODY: usize = 1024 * 1024;

/// How many connections the admin listener may have.
const ADMIN_CONNECTIONS: usize = 32;

/// How many connections may wait in the system's queue until they are accepted. `TcpListener::bind` allows 128, and
/// clients that find no room there try again after seconds. Linux has a limit of its own: `net.core.somaxconn`.
const BACKLOG: u32 = 4096;

/// A server, ready to be run.
pub(crate) struct App {
    pub(crate) router: Router,
    /// Whether it can do its work.
    pub(crate) ready: Box<dyn Fn() -> bool + Send + Sync>,
    /// What those who run it may know about that.
    pub(crate) details: Box<dyn Fn() -> Value + Send + Sync>,
    /// Pages of the server's own, which run scripts. Other answers have a header that forbids it.
    pub(crate) pages: Router,
    /// Whether the router itself looks at the `host` of requests. Otherwise `--host` decides for all of them.
    pub(crate) checks_host: bool,
    /// The rest of a curl command line, with `{}` in place of the server's URL.
    pub(crate) try_it: &'static str,
}

impl App {
    /// A server that can do its work if this store has a usable credential.
    #[allow(dead_code)] // axum_byok has one store for each tenant
    pub(crate) fn new(router: Router, store: CredentialStore, try_it: &'static str) -> Self {
        let ready = store.clone();
        Self {
            router,
            ready: Box::new(move || ready.status().is_ready()),
            details: Box::new(move || json!(store.status())),
            pages: Router::new(),
            checks_host: false,
            try_it,
        }
    }
}

/// What the probes answer.
pub(crate) struct Health {
    ready: Box<dyn Fn() -> bool + Send + Sync>,
    details: Box<dyn Fn() -> Value + Send + Sync>,
    draining: AtomicBool,
}

impl Health {
    pub(crate) fn new(
        ready: Box<dyn Fn() -> bool + Send + Sync>,
        details: Box<dyn Fn() -> Value + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self { ready, details, draining: AtomicBool::new(false) })
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(crate) fn is_ready(&self) -> bool {
        (self.ready)() && !self.is_draining()
    }

    pub(crate) fn details(&self) -> Value {
        let mut details = (self.details)();
        details["draining"] = self.is_draining().into();
        details
    }
}

/// What a listener needs besides its options.
pub(crate) struct Running<S> {
    pub(crate) answers: S,
    pub(crate) health: Arc<Health>,
    /// The names of the server, for its admin listener.
    pub(crate) hosts: Vec<String>,
    /// See [`App::try_it`].
    pub(crate) try_it: String,
}

/// The whole of `main` after the arguments: starts the log, builds the app, and serves it until a signal ends it.
pub(crate) async fn run(
    options: Options,
    urls: FalUrls,
    build: impl AsyncFnOnce(&Upstream) -> Result<App, BoxError>,
) -> ExitCode {
    // Standard output is for the address: programs that start this one read it there.
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let Options { listener, .. } = &options;
    // It keeps the mock of --demo alive.
    let mut upstream = None;
    let build = async |address: SocketAddr| {
        let upstream = upstream.insert(Upstream::new(listener.demo, &urls).await?);
        let App { router, ready, details, pages, checks_host, try_it } = build(upstream).await?;
        let health = Health::new(ready, details);
        let hosts = if checks_host { None } else { browser::hosts(address.ip(), &options.host) };
        // In this order: of two routers that are merged, the second one answers 404, and that has the layers.
        let router = pages.merge(around(router, &options, Arc::clone(&health), hosts));
        Ok(Running { answers: router, health, hosts: options.host.clone(), try_it: try_it.to_owned() })
    };
    exit_code(run_until_ended(listener, build).await)
}

/// The same for a server that has another thing than a router, and none of the layers that are put around that. It is told
/// where it listens.
#[allow(dead_code)] // one server only
pub(crate) async fn run_bare<S: Answers>(
    listener: &Listener,
    build: impl AsyncFnOnce(SocketAddr) -> Result<Running<S>, BoxError>,
) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    exit_code(run_until_ended(listener, build).await)
}

fn exit_code(ended: Result<(), BoxError>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", report(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run_until_ended<S: Answers>(
    options: &Listener,
    build: impl AsyncFnOnce(SocketAddr) -> Result<Running<S>, BoxError>,
) -> Result<(), BoxError> {
    // Before there is a store, so that nothing is missing in it.
    let metrics = PrometheusBuilder::new().install_recorder()?;
    // Before the address is printed, so that a signal that follows is not missed.
    let mut end = End::new()?;
    let limits = Limits { header_timeout: options.header_timeout, idle_timeout: options.idle_timeout };
    let (listener, address) = listen("--listen", options.listen)?;
    let Running { answers, health, hosts, try_it } = build(address).await?;
    // Before the first line is printed: who reads that may rely on the whole server.
    let admin = options.admin.0.map(|admin| listen("--admin", admin)).transpose()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async {
        let _ = stopped.await;
    };
    let server = tokio::spawn(accept::serve("public", listener, answers, limits, max_connections(options), stopped));
    println!("listening on http://{address}");
    if let Some((listener, address)) = admin {
        let router = admin::router(Arc::clone(&health), metrics, browser::hosts(address.ip(), &hosts));
        // It goes on until the process ends, so that probes are answered during the shutdown too.
        let never = std::future::pending();
        tokio::spawn(accept::serve("admin", listener, router, limits, ADMIN_CONNECTIONS, never));
        println!("admin on http://{address}");
    }
    if options.demo {
        println!("try: curl {}", try_it.replace("{}", &format!("http://{}", reachable(address))));
    }

    end.signal().await;
    health.draining.store(true, Ordering::Relaxed);
    info!(delay = ?options.drain_delay, "shutting down: not ready any more, but still serving");
    tokio::select! {
        () = tokio::time::sleep(options.drain_delay) => {}
        () = end.signal() => return Ok(()),
    }
    drop(stop);
    info!(timeout = ?options.drain_timeout, "accepting no more connections, and waiting for open requests");
    tokio::select! {
        served = server => served?,
        () = tokio::time::sleep(options.drain_timeout) => warn!("closing the connections that are still open"),
        () = end.signal() => warn!("closing the connections that are still open, after a second signal"),
    }
    Ok(())
}

/// Where a client on this machine reaches a server that listens at this address.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// `option` is where the address comes from.
fn listen(option: &str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), BoxError> {
    let failed = |error| format!("cannot listen on {address}: {error}. Choose another address with {option}.");
    let listener = bind(address).map_err(failed)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // On Windows it would let another process take the same port.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// As many as you asked for, or fewer if the system allows too few open files.
fn max_connections(options: &Listener) -> usize {
    let wanted = options.max_connections.get();
    match files::max_connections() {
        Some(possible) if possible < wanted => {
            warn!(wanted, possible, "the limit of open files (ulimit -n) is too low for so many connections");
            possible
        }
        _ => wanted,
    }
}

/// The layers around an app's routes, and the probes beside them.
fn around(router: Router, options: &Options, health: Arc<Health>, hosts: Hosts) -> Router {
    let max_requests = options.max_requests.get().min(Semaphore::MAX_PERMITS);
    let router = router.layer(
        ServiceBuilder::new()
            // Outside of the log: a flood of requests must not become a flood of lines.
            .layer(from_fn_with_state(Arc::new(Semaphore::new(max_requests)), busy::limit))
            .layer(MapRequestLayer::new(without_odd_request_id))
            .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
            // Layers further in that print headers print `Sensitive`.
            .layer(SetSensitiveRequestHeadersLayer::new([AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION]))
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(span)
                    .on_request(())
                    .on_response(DefaultOnResponse::new().level(Level::INFO))
                    // It would write an error for each 502 of an outage. The events of `tower_fal` grow rarer instead.
                    .on_failure(()),
            )
            .layer(SetSensitiveResponseHeadersLayer::new([SET_COOKIE]))
            .layer(PropagateRequestIdLayer::x_request_id())
            .layer(from_fn_with_state(hosts, browser::guard))
            .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, options.request_timeout))
            .layer(RequestBodyLimitLayer::new(MAX_BODY)),
    );
    // Outside of the layers: probes come every few seconds, and nobody wants to read about them.
    let is_ready = Arc::clone(&health);
    let readyz = move || {
        let ready = is_ready.is_ready();
        std::future::ready(if ready {
            (StatusCode::OK, "ready\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
        })
    };
    let count = |response: Response| {
        counter!("server_requests_total", "status" => response.status().as_str().to_owned()).increment(1);
        response
    };
    // A client that keeps its connection would send its next request just as the connection is closed.
    let close_when_draining = move |mut response: Response| {
        if health.is_draining() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    };
    router
        .layer(MapResponseLayer::new(count))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .layer(
            ServiceBuilder::new()
                .layer(MapResponseLayer::new(close_when_draining))
                // Answers are data. A browser must not guess that they are something else, nor run them as a page.
                .layer(SetResponseHeaderLayer::overriding(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")))
                .layer(SetResponseHeaderLayer::overriding(
                    CONTENT_SECURITY_POLICY,
                    HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'; sandbox"),
                )),
        )
}

/// What the log says about a request. The query is not part of it, because people put tokens there.
fn span<B>(request: &Request<B>) -> Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    // It is parsed, because a name and a password may stand before the host.
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

/// A caller may bring the id that the request has in its own log, if it looks like an id.
fn without_odd_request_id<B>(mut request: Request<B>) -> Request<B> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let id = request.headers().get("x-request-id").map(HeaderValue::as_bytes);
    if id.is_some_and(|id| id.is_empty() || id.len() > 64 || !id.iter().all(is_plain)) {
        request.headers_mut().remove("x-request-id");
    }
    request
}

/// Whether a caller's path would lead out of the URL that it is put below, at any server that resolves `..`, before or
/// after decoding.
#[allow(dead_code)] // not every server uses a path of a caller
pub(crate) fn climbs_out(path: &str) -> bool {
    let decoded = path.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\");
    decoded.split(['/', '\\', ';']).any(|segment| segment == "..")
}

/// An error of the example itself, in the form of the response that a `FalAuthError` becomes.
pub(crate) fn problem(status: StatusCode, reason: &str) -> Response {
    let title = status.canonical_reason().unwrap_or_default();
    let body = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "reason": reason });
    (status, [(CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
}

/// SIGTERM and ctrl-c, as often as they come.
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
