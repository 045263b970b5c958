//! What being able to replay costs a request that is not refused: `cargo bench --bench retry`.
//!
//! One call over a service that does nothing, with a body of one piece, polled to its end. Making the request and
//! dropping the response are not measured. The allocations are counted by `tests/alloc.rs`.
//!
//! | case | is |
//! |---|---|
//! | `service_alone` | the service that does nothing |
//! | `auth` | `FalAuth` around it |
//! | `layer` | `FalRetry` around `FalAuth`, as `tower_fal::layer` makes it |
//! | `clone_of_the_head` | cloning and dropping the request's head: what it costs to keep one as others do |
//! | `tower_retry` | `tower::retry` around `FalAuth`, with a policy that clones the request and never retries |

#![forbid(unsafe_code)]

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use divan::{Bencher, black_box};
use http::{Request, Response, request::Parts};
use http_body_util::Full;
use tower::{Layer as _, Service, retry::Policy};
use tower_fal::{Credential, CredentialStore, FalAuthLayer};

type Body = Full<Bytes>;

fn main() {
    divan::main();
}

#[divan::bench(sample_count = 500, sample_size = 64)]
fn service_alone(bencher: Bencher) {
    call(bencher, Nothing);
}

#[divan::bench(sample_count = 500, sample_size = 64)]
fn auth(bencher: Bencher) {
    call(bencher, FalAuthLayer::new(store()).layer(Nothing));
}

#[divan::bench(sample_count = 500, sample_size = 64)]
fn layer(bencher: Bencher) {
    call(bencher, tower_fal::layer(&store()).layer(Nothing));
}

#[divan::bench(sample_count = 500, sample_size = 64)]
fn tower_retry(bencher: Bencher) {
    call(bencher, tower::retry::Retry::new(ClonesAndNeverRetries, FalAuthLayer::new(store()).layer(Nothing)));
}

#[divan::bench(sample_count = 500, sample_size = 64)]
fn clone_of_the_head(bencher: Bencher) {
    // Of a fresh request: the first clone of a value costs more than the next one.
    let head = || -> Parts { request().into_parts().0 };
    bencher.with_inputs(head).bench_local_refs(|head| drop(black_box(head.clone())));
}

fn call<S>(bencher: Bencher, mut service: S)
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    bencher.with_inputs(request).bench_local_values(|request| {
        let response = pin!(service.call(request));
        match response.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result.ok(),
            Poll::Pending => None,
        }
    });
}

/// With four headers, so that the map has room for another one.
fn request() -> Request<Body> {
    Request::post("https://fal.run/fal-ai/flux/dev")
        .header("accept", "application/json")
        .header("content-type", "application/json")
        .header("user-agent", "bench")
        .header("x-request-id", "0123456789")
        .body(Full::new(Bytes::from_static(br#"{"prompt":"a lighthouse"}"#)))
        .unwrap_or_default()
}

fn store() -> CredentialStore {
    let key = "2f1d7a9c-0000-4000-8000-000000000000:0123456789abcdef0123456789abcdef";
    match Credential::key(key) {
        Ok(credential) => CredentialStore::fixed(credential),
        Err(error) => unreachable!("{error}"),
    }
}

/// Takes any body and is done at once.
#[derive(Clone)]
struct Nothing;

impl<B> Service<Request<B>> for Nothing {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        drop(black_box(request));
        ready(Ok(Response::default()))
    }
}

#[derive(Clone)]
struct ClonesAndNeverRetries;

impl<T> Policy<Request<Body>, T, Infallible> for ClonesAndNeverRetries {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request<Body>, _: &mut Result<T, Infallible>) -> Option<Self::Future> {
        None
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}
