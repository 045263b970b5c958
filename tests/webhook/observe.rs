//! The day of the switch: everything passes, and what would have been refused is logged.

use std::{
    convert::Infallible,
    io::{self, Write},
    sync::{Arc, LazyLock, Mutex},
    time::SystemTime,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    mock::MockFal,
    webhook::{Rejection, VerifiedWebhook, VerifyWebhook},
};
use tracing::{Dispatch, Level};

use crate::support::{BODY, Handler, delivery, fixed_keys_of, forged, layer, with_headers};

/// What was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn dispatch(&self) -> Dispatch {
        // With one dispatcher alone, `tracing` asks the first thread that reaches an event whether it is enabled, and that
        // may be another test's.
        static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Log::default().only());
        LazyLock::force(&SECOND);
        self.only()
    }

    fn only(&self) -> Dispatch {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(Level::DEBUG).with_ansi(false);
        Dispatch::new(subscriber.with_writer(move || log.clone()).finish())
    }

    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

async fn observing() -> (MockFal, Handler, VerifyWebhook<Handler>) {
    let fal = MockFal::start().await.unwrap();
    let handler = Handler::new();
    let verify = layer(fixed_keys_of(&fal)).max_body(1024).observe().skip_repeats().layer(handler.clone());
    (fal, handler, verify)
}

#[tokio::test]
async fn everything_passes_and_is_logged() {
    let (fal, handler, verify) = observing().await;
    let log = Log::default();
    let _guard = tracing::dispatcher::set_default(&log.dispatch());
    let other = fal.sign_webhook("hush", "hush", SystemTime::now(), BODY);
    for (request, reason) in [
        (Request::post("/").body(Full::from("hush")).unwrap(), "missing_header"),
        (forged(&fal), "bad_signature"),
        (with_headers(other, Bytes::from_static(BODY)), "other_account"),
    ] {
        let sent = request.clone().into_body().collect().await.unwrap().to_bytes();
        assert_eq!(verify.clone().oneshot(request).await.unwrap().status(), StatusCode::OK);
        let handled = handler.last();
        assert_eq!((handled.rejection.unwrap().as_str(), handled.body.unwrap()), (reason, sent));
        assert_eq!(handled.webhook, None);
        let logged = log.take();
        assert!(logged.contains("a webhook delivery would have been refused") && logged.contains(reason), "{logged}");
        assert!(!logged.contains("hush"), "{logged}");
    }
    for is_repeat in [false, true] {
        verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap();
        let handled = handler.last();
        assert_eq!((handled.rejection, handled.webhook.unwrap().is_repeat()), (None, is_repeat));
        assert_eq!(log.take(), "");
    }
}

#[tokio::test]
async fn what_is_refused_is_logged_without_what_was_sent() {
    let (fal, _, _) = observing().await;
    let log = Log::default();
    let _guard = tracing::dispatcher::set_default(&log.dispatch());
    let verify = layer(fixed_keys_of(&fal)).layer(Handler::new());
    let mut request = forged(&fal);
    request.headers_mut().insert("x-fal-webhook-request-id", "hush".parse().unwrap());
    let response = verify.oneshot(request).await.unwrap();
    let logged = log.take();
    assert!(logged.contains("a webhook delivery was refused") && logged.contains("bad_signature"), "{logged}");
    let shown = format!("{logged} {:?} {:?}", response.headers(), response.extensions().get::<Rejection>());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(!shown.contains("hush") && !body.windows(4).any(|four| four == b"hush"), "{shown} {body:?}");
}

/// The beginning was read already, and goes along with the rest.
#[tokio::test]
async fn a_body_that_is_too_long_is_handed_on_whole() {
    let (fal, handler, verify) = observing().await;
    let headers = fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), BODY);
    let pieces: Vec<_> =
        (0..=255_u8).map(|byte| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![byte; 100])))).collect();
    let whole: Vec<u8> = (0..=255_u8).flat_map(|byte| [byte; 100]).collect();
    let request = with_headers(headers, Bytes::new()).map(|_| StreamBody::new(stream::iter(pieces)));
    assert_eq!(verify.oneshot(request).await.unwrap().status(), StatusCode::OK);
    let handled = handler.last();
    assert_eq!((handled.rejection, handled.body.unwrap()), (Some(Rejection::BodyTooLong(1024)), Bytes::from(whole)));
}

#[tokio::test]
async fn a_body_that_is_cut_off_is_cut_off_for_the_handler_too() {
    let (fal, handler, verify) = observing().await;
    let headers = fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), BODY);
    let pieces = [Ok(Frame::data(Bytes::from_static(BODY))), Err(io::Error::other("cut off"))];
    let request = with_headers(headers, Bytes::new()).map(|_| StreamBody::new(stream::iter(pieces)));
    assert_eq!(verify.oneshot(request).await.unwrap().status(), StatusCode::OK);
    let handled = handler.last();
    assert_eq!((handled.rejection, handled.body.unwrap_err().as_str()), (Some(Rejection::BodyCutOff), "cut off"));
}

/// What another layer or a caller's own code has put there is nothing that was verified here.
#[tokio::test]
async fn only_what_this_layer_has_verified_counts() {
    let (fal, handler, verify) = observing().await;
    verify.clone().oneshot(delivery(&fal, "r-1")).await.unwrap();
    let webhook: VerifiedWebhook = handler.last().webhook.unwrap();
    let mut request = forged(&fal);
    request.extensions_mut().insert(webhook);
    verify.oneshot(request).await.unwrap();
    assert_eq!(handler.last().webhook, None);
}
