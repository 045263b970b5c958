use std::{
    convert::Infallible,
    fmt,
    future::{Ready, ready},
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Body as AnyBody,
    extract::{Request as Inbound, State},
    response::{IntoResponse as _, Response as Outbound},
};
use bytes::Bytes;
use http::{Extensions, Request, Response, StatusCode, Uri};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Channel};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{
        Client as Hyper,
        connect::{HttpConnector, dns::Name},
    },
    rt::TokioExecutor,
};
use reqwest_middleware::ClientWithMiddleware;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tower::{Layer as _, Service, ServiceExt as _, util::BoxCloneSyncService};
use tower_fal::{
    CredentialStore, FalAuthError,
    error::{BoxError, Refusal},
    reqwest::ReqwestService,
    retry::ReplayBody,
};

use super::tls_fal::TlsFal;
use crate::support::key;

/// The columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stack {
    HyperHttp1,
    HyperHttp2,
    ReqwestService,
    ReqwestMiddleware,
    AxumForwarded,
}

/// One request, for a client of any kind.
pub(super) struct Sent {
    pub(super) url: &'static str,
    pub(super) body: Payload,
    /// The number of the key that it brings.
    pub(super) own: Option<u64>,
}

pub(super) enum Payload {
    Whole(&'static str),
    Streamed(&'static [&'static str]),
}

/// What became of it.
pub(super) enum Outcome {
    Answered(StatusCode, String),
    Refused(Refusal),
    Failed(BoxError),
}

/// A client of any kind.
#[derive(Clone)]
pub(super) struct Client {
    inner: Kind,
    // A server in front of it, if there is one, ends with this.
    _server: Option<Arc<JoinSet<()>>>,
}

#[derive(Clone)]
enum Kind {
    Tower(Tower),
    Reqwest(ClientWithMiddleware),
    Forwarded { front: SocketAddr, errors: Errors, free: Arc<Semaphore> },
}

type Tower = BoxCloneSyncService<Request<AnyBody>, Response<AnyBody>, FalAuthError>;

/// What the forwarding server could not pass on, by the number that its answer carries.
type Errors = Arc<Mutex<Vec<Option<FalAuthError>>>>;

/// How many requests the forwarding server takes at once.
const MOST_FORWARDED: u32 = 1000;

impl Stack {
    /// With a refused key it waits until there is another one.
    pub(super) async fn client(self, store: &CredentialStore, fal: &TlsFal) -> Client {
        self.client_that_waits(Duration::from_secs(30), store, fal).await
    }

    /// With a refused key it waits so long for another one.
    pub(super) async fn client_that_waits(self, wait: Duration, store: &CredentialStore, fal: &TlsFal) -> Client {
        let layer = tower_fal::layer(store).retry(|retry| retry.reload_wait(wait));
        let inner = match self {
            Self::HyperHttp1 | Self::HyperHttp2 => Kind::Tower(boxed(layer.layer(hyper(fal, self)))),
            Self::ReqwestService => Kind::Tower(boxed(layer.layer(ReqwestService::new(reqwest(fal)).unwrap()))),
            Self::ReqwestMiddleware => Kind::Reqwest(layer.reqwest(reqwest(fal)).unwrap()),
            Self::AxumForwarded => return forwarded(boxed(layer.layer(hyper(fal, self)))).await,
        };
        Client { inner, _server: None }
    }
}

impl Client {
    pub(super) async fn send(&self, sent: Sent) -> Outcome {
        let result = match &self.inner {
            Kind::Tower(tower) => through_tower(tower.clone(), sent).await,
            Kind::Reqwest(client) => through_reqwest(client, sent).await,
            Kind::Forwarded { front, errors, .. } => through_a_server(*front, errors, sent).await,
        };
        let error = match result {
            Ok((status, body)) => return Outcome::Answered(status, body),
            Err(error) => error,
        };
        match FalAuthError::find(&*error).and_then(FalAuthError::refusal) {
            Some(refusal) => Outcome::Refused(refusal.clone()),
            None => Outcome::Failed(error),
        }
    }
}

impl Client {
    /// Waits until nothing is under way in a server in front: it takes a while to see that a caller has gone.
    pub(super) async fn idle(&self) {
        if let Kind::Forwarded { free, .. } = &self.inner {
            drop(free.acquire_many(MOST_FORWARDED).await.unwrap());
        }
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(status, body) => write!(f, "{status} {body}"),
            Self::Refused(refusal) => fmt::Debug::fmt(refusal, f),
            Self::Failed(error) => write!(f, "{}", tower_fal::error::report(&**error)),
        }
    }
}

type Answered = Result<(StatusCode, String), BoxError>;

async fn through_tower(tower: Tower, sent: Sent) -> Answered {
    let mut request = Request::post(sent.url).body(sent.body.into_body())?;
    request.extensions_mut().extend(sent.own.map(extension).unwrap_or_default());
    read(tower.oneshot(request).await?).await
}

async fn through_reqwest(client: &ClientWithMiddleware, sent: Sent) -> Answered {
    let request = client.post(sent.url);
    let request = match sent.body {
        Payload::Whole(text) => request.body(text),
        Payload::Streamed(pieces) => request.body(reqwest::Body::wrap(stream(pieces))),
    };
    let request = match sent.own {
        Some(n) => request.with_extension(key(n)),
        None => request,
    };
    let response = request.send().await?;
    Ok((response.status(), response.text().await?))
}

/// The URL goes along in the path, the number of the key in a header.
async fn through_a_server(front: SocketAddr, errors: &Errors, sent: Sent) -> Answered {
    let mut request = Request::post(format!("http://{front}/{}", sent.url.strip_prefix("https://").unwrap()));
    if let Some(n) = sent.own {
        request = request.header(TENANT, n);
    }
    let client: Hyper<_, AnyBody> = Hyper::builder(TokioExecutor::new()).build(HttpConnector::new());
    let response = client.request(request.body(sent.body.into_body())?).await?;
    let Some(number) = response.headers().get(ERROR) else { return read(response).await };
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    let number: usize = number.to_str()?.parse()?;
    let error = errors.lock().unwrap()[number].take();
    Err(error.expect("an error for each such answer").into())
}

async fn read<B: Body<Error: Into<BoxError>>>(response: Response<B>) -> Answered {
    let status = response.status();
    let body = response.into_body().collect().await.map_err(Into::into)?.to_bytes();
    Ok((status, String::from_utf8(body.to_vec())?))
}

fn extension(n: u64) -> Extensions {
    let mut extensions = Extensions::new();
    extensions.insert(key(n));
    extensions
}

impl Payload {
    fn into_body(self) -> AnyBody {
        match self {
            Self::Whole(text) => AnyBody::from(text),
            Self::Streamed(pieces) => AnyBody::new(stream(pieces)),
        }
    }
}

fn stream(pieces: &[&'static str]) -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(pieces.len());
    for piece in pieces {
        sender.try_send(Frame::data(Bytes::from_static(piece.as_bytes()))).unwrap();
    }
    body
}

fn hyper(fal: &TlsFal, stack: Stack) -> Hyper<HttpsConnector<HttpConnector<Names>>, ReplayBody<AnyBody>> {
    let mut names = HttpConnector::new_with_resolver(Names(fal.address));
    names.enforce_http(false);
    let https = HttpsConnectorBuilder::new().with_tls_config(fal.client.clone()).https_only();
    match stack {
        Stack::HyperHttp2 => {
            Hyper::builder(TokioExecutor::new()).http2_only(true).build(https.enable_http2().wrap_connector(names))
        }
        _ => Hyper::builder(TokioExecutor::new()).build(https.enable_http1().wrap_connector(names)),
    }
}

fn reqwest(fal: &TlsFal) -> reqwest::ClientBuilder {
    ["fal.run", "elsewhere.test"]
        .iter()
        .fold(reqwest::Client::builder(), |builder, name| builder.resolve(name, fal.address))
        .tls_backend_preconfigured(fal.client.clone())
        .http1_only()
        .no_proxy()
}

fn boxed<S, R>(service: S) -> Tower
where
    S: Service<Request<AnyBody>, Response = Response<R>, Error = FalAuthError> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    R: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let service = service.map_response(|response: Response<R>| response.map(AnyBody::new));
    BoxCloneSyncService::new(service)
}

const TENANT: &str = "x-tenant";
const ERROR: &str = "x-error";

/// A server on loopback that forwards what it is sent.
async fn forwarded(fal: Tower) -> Client {
    let (errors, free) = (Errors::default(), Arc::new(Semaphore::new(MOST_FORWARDED as usize)));
    let app = Router::new().fallback(forward).with_state((fal, Arc::clone(&errors), Arc::clone(&free)));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let front = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, app).await.unwrap() });
    Client { inner: Kind::Forwarded { front, errors, free }, _server: Some(Arc::new(server)) }
}

type Shared = (Tower, Errors, Arc<Semaphore>);

async fn forward(State((fal, errors, free)): State<Shared>, inbound: Inbound) -> Outbound {
    let _under_way = free.acquire().await.unwrap();
    let uri: Uri = format!("https:/{}", inbound.uri().path()).parse().unwrap();
    let tenant = inbound.headers().get(TENANT).map(|n| n.to_str().unwrap().parse().unwrap());
    let mut request = Request::post(uri).body(inbound.into_body()).unwrap();
    request.extensions_mut().extend(tenant.map(extension).unwrap_or_default());
    match fal.oneshot(request).await {
        Ok(response) => response,
        Err(error) => {
            let mut errors = errors.lock().unwrap();
            errors.push(Some(error));
            (StatusCode::BAD_GATEWAY, [(ERROR, (errors.len() - 1).to_string())]).into_response()
        }
    }
}

/// Every name leads to the one address.
#[derive(Clone)]
pub(super) struct Names(SocketAddr);

impl Service<Name> for Names {
    type Response = std::iter::Once<SocketAddr>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        ready(Ok(std::iter::once(self.0)))
    }
}
