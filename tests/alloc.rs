//! A request costs no allocation of ours.
//!
//! A target of its own, because it needs an allocator of its own: counting calls means implementing [`GlobalAlloc`],
//! and that is `unsafe` by nature. The crate itself forbids `unsafe`. The counter is per thread, so tests that run
//! at the same time do not count each other.

#![allow(clippy::unwrap_used)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    convert::Infallible,
    future::{Future as _, Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use tower::{Layer as _, Service, service_fn};
use tower_fal::{
    Credential, CredentialStore, FalAuth, FalAuthLayer,
    auth::Stamp,
    origin::{EveryRequest, FalOrigins, OriginPolicy},
    retry::ReplayBody,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more, and nobody who would read it.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: every call goes to `System` as it came; counting touches a thread-local cell that needs no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; `pointer` came from `System`.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often this thread allocates while `work` runs. Dropping what it returns does not count.
fn allocations<T>(work: impl FnOnce() -> T) -> usize {
    let before = ALLOCATIONS.get();
    let result = black_box(work());
    let after = ALLOCATIONS.get();
    drop(result);
    after - before
}

/// A ready service that hands the request back as the body of its answer.
#[derive(Clone)]
struct NoOp(StatusCode);

impl Service<Request<()>> for NoOp {
    type Response = Response<Request<()>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let mut response = Response::new(request);
        *response.status_mut() = self.0;
        ready(Ok(response))
    }
}

/// A store with whose key this thread has sent a request: the first load of a thread allocates in arc-swap, and the first
/// success of a key is noted.
fn store() -> CredentialStore {
    let store = CredentialStore::fixed(Credential::key("house-id:house-secret").unwrap());
    let mut service = FalAuthLayer::new(store.clone()).layer(NoOp(StatusCode::OK));
    drop(exchange(&mut service, request("https://fal.run/a")));
    assert!(store.status().accepted);
    store
}

/// A request with four headers, whose map has room for one more.
fn request(uri: &str) -> Request<()> {
    Request::post(uri)
        .header("accept", "*/*")
        .header("content-type", "application/json")
        .header("user-agent", "alloc")
        .header("x-request-id", "7")
        .body(())
        .unwrap()
}

/// One request through a service, up to its response.
fn exchange<P: OriginPolicy>(service: &mut FalAuth<NoOp, P>, request: Request<()>) -> Response<Request<()>> {
    let mut context = Context::from_waker(Waker::noop());
    assert!(service.poll_ready(&mut context).is_ready());
    match pin!(service.call(request)).poll(&mut context) {
        Poll::Ready(Ok(response)) => response,
        Poll::Pending => unreachable!("the service inside is always ready"),
    }
}

fn carries_a_credential(response: &Response<Request<()>>) -> bool {
    response.body().headers().contains_key(AUTHORIZATION)
}

#[test]
fn control_the_counter_counts() {
    assert_eq!(allocations(|| Box::new(7)), 1);
    assert_eq!(allocations(|| vec![0_u8; 100]), 1);
    assert_eq!(allocations(|| (Box::new(7), vec![7_u8; 100])), 2);
    assert_eq!(allocations(|| 7), 0);
}

#[test]
fn control_a_stamp_is_seen() {
    let mut refused = FalAuthLayer::new(store()).layer(NoOp(StatusCode::UNAUTHORIZED));
    let given = request("https://fal.run/a");
    let counted = allocations(|| {
        let response = exchange(&mut refused, given);
        assert!(response.extensions().get::<Stamp>().is_some());
        response
    });
    assert!(counted > 0);
}

#[test]
fn a_kept_service_allocates_nothing_per_request() {
    let mut service = FalAuthLayer::new(store()).layer(NoOp(StatusCode::OK));
    for uri in ["https://fal.run/a", "https://QUEUE.fal.run:443/a", "https://ws.fal.run/a"] {
        for _ in 0..3 {
            let given = request(uri);
            let counted = allocations(|| {
                let response = exchange(&mut service, given);
                assert!(carries_a_credential(&response));
                response
            });
            assert_eq!(counted, 0, "{uri}");
        }
    }
}

#[test]
fn a_service_that_is_cloned_for_each_request_allocates_nothing() {
    let service = FalAuthLayer::new(store()).layer(NoOp(StatusCode::OK));
    for _ in 0..3 {
        let given = request("https://fal.run/a");
        let counted = allocations(|| {
            let response = exchange(&mut service.clone(), given);
            assert!(carries_a_credential(&response));
            response
        });
        assert_eq!(counted, 0);
    }
}

#[test]
fn an_account_allocates_nothing() {
    let store = store();
    store.replace(Credential::bearer("token").unwrap().for_account("github|1").unwrap());
    let mut service = FalAuthLayer::new(store).layer(NoOp(StatusCode::OK));
    drop(exchange(&mut service, request("https://fal.run/a"))); // its first success
    for _ in 0..3 {
        let mut given = request("https://fal.run/a");
        given.headers_mut().remove("accept"); // the map has room for one more, and this one brings two
        let counted = allocations(|| {
            let response = exchange(&mut service, given);
            assert!(carries_a_credential(&response) && response.body().headers().contains_key("x-fal-user-id"));
            response
        });
        assert_eq!(counted, 0);
    }
}

#[test]
fn a_request_that_is_not_admitted_allocates_nothing() {
    let mut service = FalAuthLayer::new(store()).layer(NoOp(StatusCode::UNAUTHORIZED));
    let counted_for = |service: &mut FalAuth<NoOp>, given| {
        allocations(|| {
            let response = exchange(service, given);
            assert!(!carries_a_credential(&response));
            response
        })
    };
    for uri in ["https://example.com/a", "http://fal.run/a", "/a"] {
        assert_eq!(counted_for(&mut service, request(uri)), 0, "{uri}");
    }
}

#[test]
fn an_own_credential_allocates_nothing() {
    let own = Credential::key("customer-id:customer-secret").unwrap();
    for layer in [FalAuthLayer::new(store()), FalAuthLayer::per_request()] {
        let mut service = layer.layer(NoOp(StatusCode::OK));
        let mut given = request("https://fal.run/a");
        given.extensions_mut().insert(own.clone());
        let counted = allocations(|| {
            let response = exchange(&mut service, given);
            assert_eq!(response.body().headers()[AUTHORIZATION], "Key customer-id:customer-secret");
            response
        });
        assert_eq!(counted, 0);
    }
}

#[test]
fn no_policy_allocates() {
    fn counted<P: OriginPolicy + Clone>(layer: &FalAuthLayer<P>, uri: &str) -> usize {
        let mut service = layer.layer(NoOp(StatusCode::OK));
        let given = request(uri);
        allocations(|| {
            let response = exchange(&mut service, given);
            assert!(carries_a_credential(&response));
            response
        })
    }

    let wide = FalOrigins::new().subdomains().backups().loopback_http().and("https://gateway.example.com").unwrap();
    for uri in [
        "https://api.fal.ai/a",
        "https://Gateway.fal.run/a",
        "https://falrun.com/a",
        "http://[::1]:80/a",
        "https://GATEWAY.example.com/a",
    ] {
        assert_eq!(counted(&FalAuthLayer::new(store()).origins(wide.clone()), uri), 0, "{uri}");
    }
    assert_eq!(counted(&FalAuthLayer::for_origin(store(), "https://fal.run").unwrap(), "/a"), 0);
    assert_eq!(counted(&FalAuthLayer::for_origin(store(), "https://fal.run").unwrap(), "https://FAL.run/a"), 0);
    assert_eq!(counted(&FalAuthLayer::new(store()).origins(EveryRequest), "/a"), 0);
    assert_eq!(counted(&FalAuthLayer::new(store()).keep_existing(), "https://fal.run/a"), 0);
}

#[test]
fn a_header_that_is_replaced_allocates_nothing() {
    let mut service = FalAuthLayer::new(store()).layer(NoOp(StatusCode::OK));
    let mut given = request("https://fal.run/a");
    given.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic old"));
    let counted = allocations(|| exchange(&mut service, given));
    assert_eq!(counted, 0);
}

#[test]
fn loading_and_cloning_allocate_nothing_from_the_first_time_on() {
    let store = store();
    let credential = Credential::key("id:secret").unwrap();
    let header = credential.header();
    let snapshot = store.load();
    let layer = FalAuthLayer::new(store.clone());
    let service = layer.layer(NoOp(StatusCode::OK));
    for _ in 0..3 {
        assert_eq!(allocations(|| store.load()), 0);
        assert_eq!(allocations(|| store.generation()), 0);
        assert_eq!(allocations(|| store.clone()), 0);
        assert_eq!(allocations(|| snapshot.clone()), 0);
        assert_eq!(allocations(|| credential.clone()), 0);
        assert_eq!(allocations(|| header.clone()), 0);
        assert_eq!(allocations(|| credential.key_id().cloned()), 0);
        assert_eq!(allocations(|| layer.clone()), 0);
        assert_eq!(allocations(|| layer.layer(NoOp(StatusCode::OK))), 0);
        assert_eq!(allocations(|| service.clone()), 0);
    }
}

#[test]
fn loading_after_a_rotation_allocates_nothing() {
    let store = store();
    for number in 0..3 {
        store.replace(Credential::key(format!("id-{number}:secret")).unwrap());
        assert_eq!(allocations(|| store.load()), 0);
    }
}

#[test]
fn authorizing_a_handshake_allocates_nothing() {
    let store = store();
    let mut handshake = request("wss://ws.fal.run/a");
    let counted = allocations(|| store.authorize(&mut handshake));
    assert_eq!(counted, 0);
    assert_eq!(handshake.headers()[AUTHORIZATION], "Key house-id:house-secret");
}

/// One is for the headers. One more is for the body, if there is one.
#[test]
fn a_replay_kept_ready_costs_one_or_two_allocations() {
    let answer = |request: Request<ReplayBody<Full<Bytes>>>| {
        drop(request);
        ready(Ok::<_, Infallible>(Response::new(Full::<Bytes>::default())))
    };
    let mut service = tower_fal::layer(&store()).layer(service_fn(answer));
    for (body, more) in [(Full::from("{}"), 1), (Full::default(), 0)] {
        let head = request("https://fal.run/a").into_parts().0;
        let copy = allocations(|| head.clone());
        let given = request("https://fal.run/a").map(|()| body);
        let counted = allocations(|| match pin!(service.call(given)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(response)) => response,
            _ => unreachable!("the service inside is always ready"),
        });
        assert_eq!(counted, 1 + more);
        assert!(counted <= copy + more);
    }
}
