//! What several of these tests need.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinHandle};
use tower::Service;
use tower_fal::{
    mock::MockFal,
    webhook::{PublicKeys, Rejection, VerifiedWebhook, VerifyWebhookLayer, WebhookKeys},
};

pub(crate) const BODY: &[u8] = br#"{"request_id":"r-1","status":"OK","payload":{"seed": 1.0}}"#;

pub(crate) type HttpClient = Client<HttpConnector, Full<Bytes>>;

pub(crate) fn client() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

/// The keys of the mock, fetched over a socket.
pub(crate) fn keys_of(fal: &MockFal) -> WebhookKeys {
    WebhookKeys::from_url(client(), fal.webhook_keys_url()).unwrap()
}

/// The keys of the mock, without a fetch.
pub(crate) fn fixed_keys_of(fal: &MockFal) -> WebhookKeys {
    WebhookKeys::fixed(PublicKeys::from_jwks(fal.webhook_jwks().to_string().as_bytes()).unwrap())
}

pub(crate) fn layer(keys: WebhookKeys) -> VerifyWebhookLayer {
    VerifyWebhookLayer::for_accounts(keys, [MockFal::USER_ID]).unwrap()
}

/// A delivery that fal has signed now.
pub(crate) fn delivery(fal: &MockFal, request_id: &str) -> Request<Full<Bytes>> {
    signed(fal, request_id, BODY)
}

pub(crate) fn signed(fal: &MockFal, request_id: &str, body: &[u8]) -> Request<Full<Bytes>> {
    let headers = fal.sign_webhook(MockFal::USER_ID, request_id, SystemTime::now(), body);
    with_headers(headers, Bytes::copy_from_slice(body))
}

pub(crate) fn with_headers(headers: HeaderMap, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::post("/webhook").body(Full::new(body)).unwrap();
    request.headers_mut().extend(headers);
    request
}

/// A delivery that is right in all but its body.
pub(crate) fn forged(fal: &MockFal) -> Request<Full<Bytes>> {
    let headers = fal.sign_webhook(MockFal::USER_ID, "r-forged", SystemTime::now(), BODY);
    with_headers(headers, Bytes::from_static(b"{}"))
}

/// The number of times that the mock was asked for its keys.
pub(crate) fn fetches(fal: &MockFal) -> usize {
    fal.received().iter().filter(|request| request.path == "/.well-known/jwks.json").count()
}

/// What a handler was given.
#[derive(Clone, Debug)]
pub(crate) struct Handled {
    pub(crate) webhook: Option<VerifiedWebhook>,
    pub(crate) rejection: Option<Rejection>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Result<Bytes, String>,
    pub(crate) trailers: Option<HeaderMap>,
}

/// A handler that notes what it is given, and answers with a status.
#[derive(Clone)]
pub(crate) struct Handler {
    pub(crate) handled: Arc<Mutex<Vec<Handled>>>,
    statuses: Arc<Mutex<Vec<StatusCode>>>,
}

impl Handler {
    pub(crate) fn new() -> Self {
        Self { handled: Arc::default(), statuses: Arc::default() }
    }

    /// Answers with these, and then with 200.
    pub(crate) fn answering(statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        let mut statuses: Vec<_> = statuses.into_iter().collect();
        statuses.reverse();
        Self { handled: Arc::default(), statuses: Arc::new(Mutex::new(statuses)) }
    }

    pub(crate) fn count(&self) -> usize {
        self.handled.lock().unwrap().len()
    }

    pub(crate) fn last(&self) -> Handled {
        self.handled.lock().unwrap().last().unwrap().clone()
    }

    /// Whether each delivery that it was given was a repeat.
    pub(crate) fn repeats(&self) -> Vec<bool> {
        self.handled.lock().unwrap().iter().map(|handled| handled.webhook.as_ref().unwrap().is_repeat()).collect()
    }
}

impl<B> Service<Request<B>> for Handler
where
    B: http_body::Body<Data = Bytes, Error: std::fmt::Display + Send> + Send + 'static,
{
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let handler = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let (body, trailers) = match body.collect().await {
                Ok(body) => {
                    let trailers = body.trailers().cloned();
                    (Ok(body.to_bytes()), trailers)
                }
                Err(error) => (Err(error.to_string()), None),
            };
            handler.handled.lock().unwrap().push(Handled {
                webhook: head.extensions.get().cloned(),
                rejection: head.extensions.get().cloned(),
                headers: head.headers,
                body,
                trailers,
            });
            let status = handler.statuses.lock().unwrap().pop().unwrap_or(StatusCode::OK);
            Ok(Response::builder().status(status).body(Full::from("handled")).unwrap())
        })
    }
}

/// The reason in the body of an answer of the layer's, which must say the same as its status and its extensions.
pub(crate) async fn reason<B>(response: Response<B>) -> String
where
    B: http_body::Body<Data = Bytes, Error: std::fmt::Debug>,
{
    let (head, body) = response.into_parts();
    assert_eq!(head.headers["content-type"], "application/problem+json");
    let body: Value = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap();
    assert_eq!(body["status"], head.status.as_u16());
    if let Some(rejection) = head.extensions.get::<Rejection>() {
        assert_eq!((rejection.status(), rejection.as_str()), (head.status, body["reason"].as_str().unwrap()));
    }
    assert_eq!(head.status == 503, head.headers.contains_key("retry-after"));
    body["reason"].as_str().unwrap().to_owned()
}

/// A router on a socket, until it is dropped.
pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Served {
    pub(crate) async fn new(router: axum::Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, task }
    }

    pub(crate) fn url(&self, path: &str) -> Uri {
        format!("http://{}{path}", self.address).parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
