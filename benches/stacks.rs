//! What the layers add to a request by reqwest: `cargo bench --bench stacks`.
//!
//! *In memory*: a chain of `reqwest-middleware` whose last link answers at once, so that the chain is all there is.
//! *Over loopback*: the same client with a real server behind it, on HTTP/1.1 and one connection that is kept open; a
//! request with a body of 25 bytes, and its answer read to the end.
//!
//! | case | is |
//! |---|---|
//! | client | `reqwest::Client` (over loopback), or the chain of nothing but its last link (in memory) |
//! | hand-written | with a middleware of five lines that sets a fixed header and nothing else |
//! | `FalAuthMiddleware` | with the credential's half of the plugin |
//! | plugin | with both halves, as `FalLayer::reqwest` makes it |
//! | `ReqwestService` | the adapter alone, called through Tower |
//! | `layer` over it | `tower_fal::layer` around the adapter |
//!
//! Times drift with the machine, so every case is measured in every round, and each ratio is the median of the ratios
//! within the rounds.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    pin::Pin,
    sync::Arc,
    thread,
    time::Instant,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Extensions, HeaderValue, Response, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use reqwest::{Request, ResponseBuilderExt as _};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware, Next};
use tokio::runtime::Runtime;
use tower::{Layer as _, Service, ServiceExt as _};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer, FalRetryLayer,
    origin::FalOrigins,
    reqwest::{FalAuthMiddleware, FalRetryMiddleware, ReqwestService},
};

const PROMPT: &[u8] = br#"{"prompt":"a lighthouse"}"#;

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    // Its timer and its sockets; everything else runs on this thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rounds = |rounds| if test { 1 } else { rounds };
    print_table("In memory", "ns", 1.0, &compare(&runtime, in_memory(), 200, rounds(300)));
    let server = serve();
    print_table("Over loopback", "us", 1e-3, &compare(&runtime, over_loopback(server), 20, rounds(200)));
}

/// Sends one request, and reads its answer.
type Send = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()>>>>;

struct Case {
    name: &'static str,
    send: Send,
    samples: Vec<f64>,
}

fn in_memory() -> Vec<Case> {
    let url = "https://fal.run/fal-ai/flux/dev";
    let chain = |builder: ClientBuilder| through_middleware(builder.with(AnswersAtOnce).build(), url.to_owned());
    vec![
        case("client", chain(ClientBuilder::new(client()))),
        case("hand-written", chain(ClientBuilder::new(client()).with(SetsHeader::new()))),
        case("`FalAuthMiddleware`", chain(ClientBuilder::new(client()).with(FalAuthMiddleware::new(store())))),
        case(
            "plugin",
            chain(
                ClientBuilder::new(client())
                    .with(FalRetryMiddleware::from(FalRetryLayer::new(store())))
                    .with(FalAuthMiddleware::new(store())),
            ),
        ),
    ]
}

fn over_loopback(server: SocketAddr) -> Vec<Case> {
    let url = format!("http://{server}/fal-ai/flux/dev");
    let origins = || FalOrigins::new().loopback_http();
    let auth = || FalAuthLayer::new(store()).origins(origins());
    let layer = tower_fal::layer(&store()).auth(|auth| auth.origins(origins()));
    let builder = || ClientBuilder::new(client());
    vec![
        case("client", through_middleware(builder().build(), url.clone())),
        case("hand-written", through_middleware(builder().with(SetsHeader::new()).build(), url.clone())),
        case(
            "`FalAuthMiddleware`",
            through_middleware(builder().with(FalAuthMiddleware::from(auth())).build(), url.clone()),
        ),
        case("plugin", through_middleware(layer.clone().reqwest(client_builder()).unwrap(), url.clone())),
        case("`ReqwestService`", through_tower(ReqwestService::from(client()), url.clone())),
        case("`layer` over it", through_tower(layer.layer(ReqwestService::from(client())), url)),
    ]
}

fn case(name: &'static str, send: Send) -> Case {
    Case { name, send, samples: Vec::new() }
}

fn through_middleware(client: ClientWithMiddleware, url: String) -> Send {
    Box::new(move || {
        let request = client.post(&url).header("content-type", "application/json").body(PROMPT);
        Box::pin(async move {
            request.send().await.unwrap().bytes().await.unwrap();
        })
    })
}

fn through_tower<S>(service: S, url: String) -> Send
where
    S: Service<http::Request<Full<Bytes>>, Response = Response<reqwest::Body>, Error: std::fmt::Debug>
        + Clone
        + 'static,
{
    Box::new(move || {
        let request = http::Request::post(&url)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from_static(PROMPT)))
            .unwrap();
        let service = service.clone();
        Box::pin(async move {
            service.oneshot(request).await.unwrap().into_body().collect().await.unwrap();
        })
    })
}

fn compare(runtime: &Runtime, mut cases: Vec<Case>, batch: u32, rounds: usize) -> Vec<Case> {
    for round in 0..rounds {
        let count = cases.len();
        for index in 0..count {
            let case = &mut cases[(index + round) % count];
            let nanoseconds = runtime.block_on(async {
                (case.send)().await; // the connection is open then
                let began = Instant::now();
                for _ in 0..batch {
                    (case.send)().await;
                }
                began.elapsed().as_secs_f64() * 1e9 / f64::from(batch)
            });
            case.samples.push(nanoseconds);
        }
    }
    cases
}

fn print_table(title: &str, unit: &str, scale: f64, cases: &[Case]) {
    let (client, hand_written) = (&cases[0].samples, &cases[1].samples);
    let against = |case: &Case, of: fn(f64, f64) -> f64, base: &[f64]| {
        median(case.samples.iter().zip(base).map(|(ours, base)| of(*ours, *base)))
    };
    println!("| {title} | {unit} | added | to hand-written |\n|---|--:|--:|--:|");
    for case in cases {
        let total = median(case.samples.iter().copied()) * scale;
        let added = against(case, |ours, base| ours - base, client) * scale;
        let ratio = against(case, |ours, base| ours / base, hand_written);
        println!("| {} | {total:.1} | {added:.1} | {ratio:.2} |", case.name);
    }
    println!();
}

fn median(samples: impl Iterator<Item = f64>) -> f64 {
    let mut samples: Vec<f64> = samples.collect();
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn client() -> reqwest::Client {
    client_builder().build().unwrap()
}

fn client_builder() -> reqwest::ClientBuilder {
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls)
}

fn store() -> CredentialStore {
    let key = "2f1d7a9c-0000-4000-8000-000000000000:0123456789abcdef0123456789abcdef";
    CredentialStore::fixed(Credential::key(key).unwrap())
}

/// What people write by hand.
struct SetsHeader {
    value: HeaderValue,
}

impl SetsHeader {
    fn new() -> Self {
        let mut value = HeaderValue::from_static("Key 2f1d7a9c-0000-4000-8000-000000000000:0123456789abcdef");
        value.set_sensitive(true);
        Self { value }
    }
}

#[async_trait]
impl Middleware for SetsHeader {
    async fn handle(
        &self,
        mut request: Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        request.headers_mut().insert(AUTHORIZATION, self.value.clone());
        next.run(request, extensions).await
    }
}

struct AnswersAtOnce;

#[async_trait]
impl Middleware for AnswersAtOnce {
    async fn handle(
        &self,
        request: Request,
        _: &mut Extensions,
        _: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        Ok(Response::builder().url(request.url().clone()).body(Bytes::new()).unwrap().into())
    }
}

/// A server on a thread of its own, for as long as the process lives.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
            }
        });
    });
    address
}

async fn answer(request: http::Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    drop(request.into_body().collect().await);
    Ok(Response::new(Full::new(Bytes::from_static(b"{}"))))
}
