//! A request body that ends with an error: over HTTP/1.1 and over HTTP/2, the request's own error names it.

use std::{
    error::Error,
    io, iter,
    pin::Pin,
    task::{Context, Poll},
};

use axum::response::IntoResponse as _;
use http_body_util::{LengthLimitError, Limited};
use tower_fal::{reqwest::ReqwestService, retry::Transient};

use super::*;
use crate::support::nobody;

/// Sends the body by each client, and returns how it failed.
async fn failures<B>(protocol: Protocol, peer: &Peer, body: impl Fn() -> B) -> [FalAuthError; 2]
where
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + Unpin + 'static,
{
    let layer = tower_fal::layer(&revoked())
        .auth(|auth| auth.origins(FalOrigins::new().loopback_http()))
        .retry(|retry| retry.transient(Transient::default()));
    let hyper_util = within(layer.clone().layer(http_client(protocol)).oneshot(peer.post(body()))).await;

    let builder = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(crate::transient::without_roots());
    let builder = if protocol == Protocol::Http2 { builder.http2_prior_knowledge() } else { builder };
    let reqwest = within(layer.layer(ReqwestService::new(builder).unwrap()).oneshot(peer.post(body()))).await;
    [hyper_util.unwrap_err(), reqwest.unwrap_err()]
}

fn causes(error: &FalAuthError) -> impl Iterator<Item = &(dyn Error + 'static)> {
    iter::successors(error.source(), |error| (*error).source())
}

#[tokio::test]
async fn a_body_over_its_limit_is_named_and_is_a_413() {
    for protocol in PROTOCOLS {
        let peer = Peer::start(When::AfterTheBody, None).await;
        for error in failures(protocol, &peer, || Limited::new(Pieces::new(["hel", "lo"]), 4)).await {
            let named = causes(&error).filter(|cause| cause.is::<LengthLimitError>()).count();
            assert_eq!(named, 1, "{protocol:?}: {error:?}");
            assert_eq!(error.into_response().status(), StatusCode::PAYLOAD_TOO_LARGE, "{protocol:?}");
        }
        // A client may give up before the head has left, so there may be fewer; a body that failed is not sent again.
        assert!(peer.log.borrow().heads <= 2);
    }
}

/// One piece, and then the error that the disk gave.
struct Unreadable(bool);

impl Body for Unreadable {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let begun = std::mem::replace(&mut self.0, true);
        Poll::Ready(Some(if begun { Err(io::Error::other("bad sector")) } else { Ok(Frame::data("hello".into())) }))
    }
}

#[tokio::test]
async fn any_other_error_of_a_body_is_named_and_is_a_502() {
    for protocol in PROTOCOLS {
        let peer = Peer::start(When::AfterTheBody, None).await;
        for error in failures(protocol, &peer, || Unreadable(false)).await {
            assert!(causes(&error).any(|cause| cause.to_string() == "bad sector"), "{protocol:?}: {error:?}");
            assert_eq!(error.into_response().status(), StatusCode::BAD_GATEWAY);
        }
    }
}

#[tokio::test]
async fn another_failure_is_not_blamed_on_the_body() {
    for protocol in PROTOCOLS {
        let nobody = nobody();
        let address = nobody.local_addr().unwrap();
        let (fal, _) = fal(protocol, &revoked(), as_it_is);
        let request = Request::post(format!("http://{address}/fal-ai/flux/dev")).body(Unreadable(false)).unwrap();
        let error = within(fal.oneshot(request)).await.unwrap_err();
        assert!(!causes(&error).any(|cause| cause.to_string().contains("body")), "{error:?}");
    }
}
