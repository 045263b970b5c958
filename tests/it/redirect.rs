//! Redirects: tower-http's `FollowRedirect` outside, `FalAuth` inside, so that each hop is looked at again.

use std::{
    convert::Infallible,
    future::ready,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, LOCATION},
};
use http_body_util::Empty;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_fal::{Credential, CredentialStore, FalAuthLayer};
use tower_http::follow_redirect::{
    FollowRedirectLayer,
    policy::{FilterCredentials, Limited, Policy, PolicyExt as _, Standard},
};

const OURS: Option<&str> = Some("Key house-id:house-secret");
const CUSTOMERS: Option<&str> = Some("Key customer-id:customer-secret");

fn house() -> FalAuthLayer {
    FalAuthLayer::new(CredentialStore::fixed(Credential::key("house-id:house-secret").unwrap()))
}

fn customer() -> Credential {
    Credential::key("customer-id:customer-secret").unwrap()
}

/// tower-http's standard policy, told to keep a request's own credential on its way to another origin.
fn keeping_credentials<E>() -> impl Policy<Empty<Bytes>, E> + Clone {
    Limited::default().and::<_, Empty<Bytes>, E>(FilterCredentials::new().allow_extension::<Credential>())
}

/// Starts at the first URI, is redirected from each to the next, and returns the credential that each of them saw.
async fn walk(
    layer: FalAuthLayer,
    policy: impl Policy<Empty<Bytes>, Infallible> + Clone,
    own: Option<Credential>,
    hops: &'static [&'static str],
) -> Vec<Option<String>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let hosts = service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<Empty<Bytes>>| {
            let mut seen = seen.lock().unwrap();
            assert_eq!(request.uri(), hops[seen.len()]);
            let credential = request.headers().get(AUTHORIZATION);
            seen.push(credential.map(|value| value.to_str().unwrap().to_owned()));
            let mut response = Response::new(());
            if let Some(next) = hops.get(seen.len()) {
                *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                response.headers_mut().insert(LOCATION, HeaderValue::from_static(next));
            }
            ready(Ok(response))
        }
    });
    let service = FollowRedirectLayer::with_policy(policy).layer(layer.layer(hosts));
    let mut request = Request::get(hops[0]).body(Empty::new()).unwrap();
    if let Some(own) = own {
        request.extensions_mut().insert(own);
    }
    service.oneshot(request).await.unwrap();
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(seen.len(), hops.len());
    seen
}

async fn walk_as_house(hops: &'static [&'static str]) -> Vec<Option<String>> {
    walk(house(), Standard::default(), None, hops).await
}

fn are(seen: &[Option<String>], expected: &[Option<&str>]) {
    let seen: Vec<_> = seen.iter().map(Option::as_deref).collect();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_redirect_to_another_host_carries_no_credential() {
    are(&walk_as_house(&["https://fal.run/a", "https://example.com/b"]).await, &[OURS, None]);
    are(&walk_as_house(&["https://fal.run/a", "https://fal.run.example.com/b"]).await, &[OURS, None]);
    are(&walk_as_house(&["https://fal.run/a", "https://fal.run@example.com/b"]).await, &[OURS, None]);
    are(&walk_as_house(&["https://fal.run/a", "https://fal.run:8443/b"]).await, &[OURS, None]);
}

#[tokio::test]
async fn a_redirect_between_two_admitted_hosts_carries_the_credential() {
    are(&walk_as_house(&["https://fal.run/a", "https://queue.fal.run/b"]).await, &[OURS, OURS]);
    are(&walk_as_house(&["https://fal.run/a", "https://fal.run/b"]).await, &[OURS, OURS]);
}

#[tokio::test]
async fn a_way_out_and_back_carries_the_credential_at_home_only() {
    let hops = &["https://fal.run/a", "https://example.com/b", "https://fal.run/c"];
    are(&walk_as_house(hops).await, &[OURS, None, OURS]);
}

#[tokio::test]
async fn a_redirect_that_falls_back_to_http_carries_no_credential() {
    are(&walk_as_house(&["https://fal.run/a", "http://fal.run/a"]).await, &[OURS, None]);
    are(&walk_as_house(&["https://fal.run/a", "http://fal.run:443/a"]).await, &[OURS, None]);
}

/// The credential is put on at fal, and not before.
#[tokio::test]
async fn a_redirect_from_another_host_to_fal_is_authenticated() {
    are(&walk_as_house(&["https://example.com/a", "https://fal.run/b"]).await, &[None, OURS]);
}

/// It does not widen where the credential goes.
#[tokio::test]
async fn a_redirect_policy_that_strips_nothing_leaks_nothing() {
    let lax = FilterCredentials::new().block_none().keep_all_extensions();
    let hops = &["https://fal.run/a", "https://example.com/b", "http://fal.run/c", "https://queue.fal.run/d"];
    are(&walk(house(), lax.clone(), None, hops).await, &[OURS, None, None, OURS]);
    are(&walk(house(), lax, Some(customer()), hops).await, &[CUSTOMERS, None, None, CUSTOMERS]);
}

#[tokio::test]
async fn an_own_credential_that_the_redirect_policy_allows_is_kept() {
    let hops = &["https://fal.run/a", "https://queue.fal.run/b", "https://example.com/c", "https://fal.run/d"];
    for layer in [house(), FalAuthLayer::per_request()] {
        let seen = walk(layer, keeping_credentials(), Some(customer()), hops).await;
        are(&seen, &[CUSTOMERS, CUSTOMERS, None, CUSTOMERS]);
    }
}

/// With the standard policy of the redirecting layer.
#[tokio::test]
async fn an_own_credential_survives_a_redirect_within_its_origin() {
    let hops = &["https://fal.run/a", "https://fal.run/b"];
    for layer in [house(), FalAuthLayer::per_request()] {
        are(&walk(layer, Standard::default(), Some(customer()), hops).await, &[CUSTOMERS, CUSTOMERS]);
    }
}

/// A redirect to another origin drops it.
#[tokio::test]
async fn per_request_never_replaces_a_dropped_own_credential() {
    let hops = &["https://fal.run/a", "https://queue.fal.run/b", "https://fal.run/c"];
    let seen = walk(FalAuthLayer::per_request(), Standard::default(), Some(customer()), hops).await;
    are(&seen, &[CUSTOMERS, None, None]);
}

/// Why `per_request` is there: a layer with a store cannot know that the request had a credential of its own.
#[tokio::test]
async fn with_a_store_its_key_replaces_a_dropped_own_credential() {
    let hops = &["https://fal.run/a", "https://queue.fal.run/b"];
    let seen = walk(house(), Standard::default(), Some(customer()), hops).await;
    are(&seen, &[CUSTOMERS, OURS]);
}
