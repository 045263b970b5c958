//! What stands in front of the proxy on each connection: the path, the probes, the count and the log.
//!
//! It is no router, so that a request costs no box and no map on its way.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Request, Response, StatusCode, Uri, header::CONNECTION},
};
use http_body_util::Either;
use hyper::body::Incoming;
use metrics::{Counter, counter};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::proxy::{FalProxy, ProxyBody};
use tower_http::cors::{Cors, CorsLayer};
use tracing::info;

use super::{Arguments, Upstream};
use crate::serve::{Answers, Health, Peer};

#[derive(Clone)]
pub(crate) struct Front(Arc<Inner>);

struct Inner {
    /// Without a slash at the end.
    path: String,
    proxy: Proxy,
    health: Arc<Health>,
    /// Of `--demo`.
    pages: Router,
    counts: Counts,
    /// The number of the next request in the log.
    log: Option<AtomicU64>,
}

#[allow(clippy::large_enum_variant)] // there is one of it
enum Proxy {
    Bare(FalProxy<Upstream>),
    WithCors(Cors<FalProxy<Upstream>>),
}

type Answer = Response<Either<ProxyBody<Incoming>, Body>>;

impl Front {
    pub(crate) fn new(
        arguments: &Arguments,
        proxy: FalProxy<Upstream>,
        cors: Option<CorsLayer>,
        health: Arc<Health>,
        pages: Router,
    ) -> Self {
        Self(Arc::new(Inner {
            path: arguments.path.trim_end_matches('/').to_owned(),
            proxy: match cors {
                None => Proxy::Bare(proxy),
                Some(cors) => Proxy::WithCors(cors.layer(proxy)),
            },
            health,
            pages,
            counts: Counts::default(),
            log: arguments.log_requests.then(|| AtomicU64::new(1)),
        }))
    }
}

impl Answers for Front {
    type Body = Either<ProxyBody<Incoming>, Body>;

    /// The future is small, as there is one for each connection: it is given the request before it is made, and what is
    /// rare is in a box.
    fn answer(self, request: Request<Incoming>, _: Option<Peer>) -> impl Future<Output = Answer> + Send + 'static {
        let path = request.uri().path();
        let answer = if path.strip_suffix('/').unwrap_or(path) == self.0.path {
            Either::Left(self.forward(request))
        } else {
            Either::Right(Box::pin(self.answer_itself(request)))
        };
        async move {
            match answer {
                Either::Left(answer) => answer.await,
                Either::Right(answer) => answer.await,
            }
        }
    }
}

impl Front {
    fn forward(self, request: Request<Incoming>) -> impl Future<Output = Answer> + Send + 'static {
        let Inner { log, proxy, .. } = &*self.0;
        let line = log.as_ref().map(|number| Box::new(Line::new(number.fetch_add(1, Ordering::Relaxed), &request)));
        let answer = match proxy {
            Proxy::Bare(proxy) => Either::Left(proxy.request(request)),
            Proxy::WithCors(proxy) => Either::Right(Box::pin(proxy.clone().oneshot(request))),
        };
        async move {
            let answer = match answer {
                Either::Left(answer) => answer.await,
                Either::Right(answer) => answer.await,
            };
            let mut answer = match answer {
                Ok(answer) => answer.map(Either::Left),
                Err(never) => match never {},
            };
            self.0.counts.count(answer.status());
            if let Some(line) = line {
                line.write(&answer);
            }
            // No browser can be led here to take an answer for a page: without `x-fal-target-url` there is none of fal's.
            // A client that keeps its connection would send its next request just as the connection is closed.
            if self.0.health.is_draining() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            answer
        }
    }

    async fn answer_itself(self, request: Request<Incoming>) -> Answer {
        let Inner { health, pages, .. } = &*self.0;
        let answer = match request.uri().path() {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" if health.is_ready() => text(StatusCode::OK, "ready\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            _ => match pages.clone().oneshot(request.map(Body::new)).await {
                Ok(answer) => answer,
                Err(never) => match never {},
            },
        };
        answer.map(Either::Right)
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
}

/// `server_requests_total`, by status. Each counter is looked up once.
struct Counts(Box<[OnceLock<Counter>]>);

impl Default for Counts {
    fn default() -> Self {
        Self((0..1000).map(|_| OnceLock::new()).collect())
    }
}

impl Counts {
    fn count(&self, status: StatusCode) {
        let Some(counter) = self.0.get(usize::from(status.as_u16())) else { return };
        counter.get_or_init(|| counter!("server_requests_total", "status" => status.as_str().to_owned())).increment(1);
    }
}

/// What the log says about a request. The query is not part of it, because people put tokens there.
struct Line {
    number: u64,
    method: String,
    target: String,
    began: Instant,
}

impl Line {
    fn new(number: u64, request: &Request<Incoming>) -> Self {
        let target = request.headers().get("x-fal-target-url").and_then(|target| target.to_str().ok());
        let target = target.and_then(|target| target.parse::<Uri>().ok());
        // Without a user name, which may be a secret.
        let target = target.map(|target| format!("{}{}", target.host().unwrap_or_default(), target.path()));
        Self { number, method: request.method().to_string(), target: target.unwrap_or_default(), began: Instant::now() }
    }

    fn write(&self, answer: &Answer) {
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        info!(
            id = self.number,
            method = self.method,
            target = self.target,
            status = answer.status().as_u16(),
            rule = header("x-tower-fal-rule"),
            fal_request_id = header("x-fal-request-id"),
            milliseconds = self.began.elapsed().as_millis() as u64,
            "request"
        );
    }
}
