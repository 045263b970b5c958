//! What `FalAuth` is measured against, over a service that does nothing.

use std::{
    cell::RefCell,
    convert::Infallible,
    future::{Future, Ready, ready},
    pin::{Pin, pin},
    sync::{Arc, RwLock},
    task::{Context, Poll, Waker},
};

use arc_swap::ArcSwap;
use http::{HeaderValue, Request, Response, header::AUTHORIZATION};
use tokio::sync::watch;
use tower::{Layer as _, Service};
use tower_fal::{Credential, CredentialStore, FalAuthLayer, origin::EveryRequest};
use tower_http::set_header::SetRequestHeaderLayer;

/// A service, what it is, and how it is given a new key (in case it can be).
pub(crate) struct Peer<S> {
    pub(crate) name: &'static str,
    pub(crate) service: S,
    #[allow(dead_code)] // `contend` rotates, `inject` does not
    pub(crate) rotate: Box<dyn Fn(usize) + Send + Sync>,
}

fn peer<S>(name: &'static str, service: S, rotate: impl Fn(usize) + Send + Sync + 'static) -> Peer<S> {
    Peer { name, service, rotate: Box::new(rotate) }
}

/// Something to be done with each of the peers, whose types differ.
pub(crate) trait Visit {
    fn visit<S>(&mut self, peer: Peer<S>)
    where
        S: Service<Request<()>, Response = Response<()>, Error = Infallible> + Clone + Send + 'static;
}

pub(crate) fn visit_all(visitor: &mut impl Visit) {
    visitor.visit(peer("the service alone", NoOp, |_| {}));
    let value = header(0);
    let service = Insert(NoOp, move || Some(value.clone()));
    visitor.visit(peer("floor: insert a clone of one prebuilt value", service, |_| {}));

    let fixed = SetRequestHeaderLayer::overriding(AUTHORIZATION, header(0));
    visitor.visit(peer("tower-http, a fixed value", fixed.layer(NoOp), |_| {}));

    let slot = Arc::new(ArcSwap::from_pointee(header(0)));
    let current = Arc::clone(&slot);
    let layer = SetRequestHeaderLayer::overriding(AUTHORIZATION, move |_: &Request<()>| {
        Some(HeaderValue::clone(&current.load()))
    });
    let rotate = move |number| slot.store(Arc::new(header(number)));
    visitor.visit(peer("tower-http over `ArcSwap`", layer.layer(NoOp), rotate));

    let lock = Arc::new(RwLock::new(header(0)));
    let current = Arc::clone(&lock);
    let service = Insert(NoOp, move || current.read().ok().map(|value| value.clone()));
    let rotate = move |number| {
        let next = header(number);
        if let Ok(mut value) = lock.write() {
            *value = next;
        }
    };
    visitor.visit(peer("std `RwLock`", service, rotate));

    let (sender, current) = watch::channel(header(0));
    let service = Insert(NoOp, move || Some(current.borrow().clone()));
    visitor.visit(peer("`tokio::sync::watch`", service, move |number| {
        sender.send_replace(header(number));
    }));

    let text = Arc::new(tokio::sync::RwLock::new(key(0)));
    let service = KubeLike { inner: NoOp, key: Arc::clone(&text) };
    visitor.visit(peer("like kube: tokio `RwLock`, `format!`, boxed future", service, move |number| {
        if let Ok(mut text) = text.try_write() {
            *text = key(number);
        }
    }));

    let store = CredentialStore::fixed(credential(0));
    let layer = FalAuthLayer::new(store.clone()).origins(EveryRequest);
    visitor.visit(peer("**`FalAuth`**, every request admitted", layer.layer(NoOp), rotate_store(store)));

    let store = CredentialStore::fixed(credential(0));
    let layer = FalAuthLayer::new(store.clone());
    visitor.visit(peer("**`FalAuth`**", layer.layer(NoOp), rotate_store(store)));
}

fn rotate_store(store: CredentialStore) -> impl Fn(usize) + Send + Sync {
    move |number| {
        store.replace(credential(number));
    }
}

fn key(number: usize) -> String {
    format!("2f1d7a9c-0000-4000-8000-{number:012}:0123456789abcdef0123456789abcdef")
}

fn header(number: usize) -> HeaderValue {
    credential(number).header().clone()
}

fn credential(number: usize) -> Credential {
    match Credential::key(key(number)) {
        Ok(credential) => credential,
        Err(error) => unreachable!("{error}"),
    }
}

/// With four headers, so that the map has room for another one.
pub(crate) fn request() -> Request<()> {
    Request::post("https://queue.fal.run/fal-ai/flux/dev")
        .header("accept", "application/json")
        .header("content-type", "application/json")
        .header("user-agent", "bench")
        .header("x-request-id", "0123456789")
        .body(())
        .unwrap_or_default()
}

/// Calls a service that is always ready, up to the response.
#[inline(always)] // for each of them alike: where it is a call, the request is moved once more
pub(crate) fn exchange<S>(service: &mut S, request: Request<()>) -> Poll<Result<S::Response, S::Error>>
where
    S: Service<Request<()>>,
{
    let mut context = Context::from_waker(Waker::noop());
    let _ = service.poll_ready(&mut context);
    pin!(service.call(request)).poll(&mut context)
}

thread_local! {
    /// The requests that this thread has sent: dropping them is left out of what is measured.
    static SENT: RefCell<Vec<Request<()>>> = const { RefCell::new(Vec::new()) };
}

/// Makes room for so many requests, and drops those that were sent.
pub(crate) fn forget_sent(room: usize) {
    SENT.with_borrow_mut(|sent| {
        sent.clear();
        sent.reserve(room);
    });
}

/// Puts the request aside and answers.
#[derive(Clone)]
pub(crate) struct NoOp;

impl Service<Request<()>> for NoOp {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        SENT.with_borrow_mut(|sent| sent.push(request));
        ready(Ok(Response::new(())))
    }
}

/// Inserts whatever value the closure has, and nothing more.
#[derive(Clone)]
struct Insert<S, F>(S, F);

impl<S: Service<Request<()>>, F: Fn() -> Option<HeaderValue>> Service<Request<()>> for Insert<S, F> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<()>) -> S::Future {
        if let Some(value) = self.1() {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        self.0.call(request)
    }
}

/// As the auth layers of `kube` and of others do it: a lock that is awaited, and a header made for each request.
#[derive(Clone)]
struct KubeLike<S> {
    inner: S,
    key: Arc<tokio::sync::RwLock<String>>,
}

impl<S> Service<Request<()>> for KubeLike<S>
where
    S: Service<Request<()>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<()>) -> Self::Future {
        let mut inner = self.inner.clone();
        let key = Arc::clone(&self.key);
        Box::pin(async move {
            let text = format!("Key {}", key.read().await);
            if let Ok(mut value) = HeaderValue::try_from(text) {
                value.set_sensitive(true);
                request.headers_mut().insert(AUTHORIZATION, value);
            }
            inner.call(request).await
        })
    }
}
