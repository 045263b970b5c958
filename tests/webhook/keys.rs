//! fal's public keys: when they are fetched, when they are not, and what happens without them. Time is paused, and the
//! client is a function, so that minutes and outages take no time.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream};
use http::{HeaderMap, Request, Response, StatusCode, header::CACHE_CONTROL};
use http_body::Frame;
use http_body_util::{BodyExt as _, Either, Full, StreamBody};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_fal::{
    mock::{Failure, MockFal},
    webhook::{Rejection, ResponseBody, VerifyWebhook, WebhookKeys},
};

use crate::support::{
    BODY, Handler, PATIENCE, client, delivery, fetches, forged, keys_of, layer, reason, with_headers,
};

const MINUTE: Duration = Duration::from_secs(60);

/// An endpoint for keys that does as it is told, and notes when it was asked.
#[derive(Clone)]
struct Endpoint {
    says: Arc<Mutex<Says>>,
    fetches: Arc<watch::Sender<Vec<Instant>>>,
    open: Arc<watch::Sender<bool>>,
}

#[derive(Clone)]
enum Says {
    Set(String, Option<&'static str>),
    Status(u16),
    Endless,
    Hang,
    Panic,
    Refused,
}

type Answer = Response<Either<Full<Bytes>, StreamBody<stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>>>;

impl Endpoint {
    fn of(fal: &MockFal) -> Self {
        Self::saying(Says::Set(fal.webhook_jwks().to_string(), None))
    }

    fn saying(says: Says) -> Self {
        Self {
            says: Arc::new(Mutex::new(says)),
            fetches: Arc::new(watch::Sender::new(Vec::new())),
            open: Arc::new(watch::Sender::new(true)),
        }
    }

    fn says(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }

    fn publishes_keys_of(&self, fal: &MockFal) {
        self.says(Says::Set(fal.webhook_jwks().to_string(), None));
    }

    fn fetches(&self) -> usize {
        self.fetches.borrow().len()
    }

    /// The seconds between the fetches.
    fn gaps(&self) -> Vec<u64> {
        self.fetches.borrow().windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect()
    }

    async fn fetches_reach(&self, count: usize) {
        let mut fetches = self.fetches.subscribe();
        fetches.wait_for(|fetches| fetches.len() >= count).await.unwrap();
    }

    fn keys(&self) -> WebhookKeys {
        let endpoint = self.clone();
        WebhookKeys::new(service_fn(move |request: Request<Full<Bytes>>| {
            let endpoint = endpoint.clone();
            async move { endpoint.answer(&request).await }
        }))
    }

    async fn answer(&self, request: &Request<Full<Bytes>>) -> Result<Answer, io::Error> {
        assert_eq!(request.uri(), "https://rest.fal.ai/.well-known/jwks.json");
        assert!(!request.headers().contains_key("authorization"));
        self.fetches.send_modify(|fetches| fetches.push(Instant::now()));
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        let says = self.says.lock().unwrap().clone();
        let mut answer = Response::builder();
        Ok(match says {
            Says::Set(set, caching) => {
                if let Some(caching) = caching {
                    answer = answer.header(CACHE_CONTROL, caching);
                }
                answer.body(Either::Left(Full::from(set))).unwrap()
            }
            Says::Status(status) => answer
                .status(status)
                .header("location", "https://example.com/")
                .body(Either::Left(Full::default()))
                .unwrap(),
            Says::Endless => {
                let blanks = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[b' '; 1024])))).boxed();
                answer.body(Either::Right(StreamBody::new(blanks))).unwrap()
            }
            Says::Hang => std::future::pending().await,
            Says::Panic => panic!("as told"),
            Says::Refused => return Err(io::ErrorKind::ConnectionRefused.into()),
        })
    }
}

struct World {
    fal: MockFal,
    endpoint: Endpoint,
    keys: WebhookKeys,
    handler: Handler,
    verify: VerifyWebhook<Handler>,
}

impl World {
    async fn new() -> Self {
        let fal = MockFal::start().await.unwrap();
        let endpoint = Endpoint::of(&fal);
        Self::with(fal, endpoint)
    }

    fn with(fal: MockFal, endpoint: Endpoint) -> Self {
        let (keys, handler) = (endpoint.keys(), Handler::new());
        let verify = layer(keys.clone()).layer(handler.clone());
        Self { fal, endpoint, keys, handler, verify }
    }

    async fn answers(&self, request: Request<Full<Bytes>>) -> Response<ResponseBody<Full<Bytes>>> {
        timeout(PATIENCE, self.verify.clone().oneshot(request)).await.unwrap().unwrap()
    }

    /// What becomes of a delivery: its status, and the reason if there is one.
    async fn sends(&self, request: Request<Full<Bytes>>) -> (u16, String) {
        let response = self.answers(request).await;
        let status = response.status().as_u16();
        (status, if status == 200 { String::new() } else { reason(response).await })
    }

    async fn delivers(&self) -> (u16, String) {
        self.sends(delivery(&self.fal, "r-1")).await
    }

    async fn forges(&self) -> (u16, String) {
        self.sends(forged(&self.fal)).await
    }
}

fn accepted() -> (u16, String) {
    (200, String::new())
}

fn refused(status: u16, reason: &str) -> (u16, String) {
    (status, reason.to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_cold_start_under_a_thousand_deliveries_is_one_fetch() {
    let world = World::new().await;
    world.endpoint.open.send_replace(false);
    let deliveries = (0..1000).map(|n| world.sends(delivery(&world.fal, &format!("r-{n}"))));
    let ((), results) = tokio::join!(
        async {
            world.endpoint.fetches_reach(1).await;
            sleep(Duration::from_secs(1)).await; // all of them wait by now
            world.endpoint.open.send_replace(true);
        },
        join_all(deliveries),
    );
    assert!(results.iter().all(|result| *result == accepted()), "{results:?}");
    assert_eq!((world.endpoint.fetches(), world.handler.count()), (1, 1000));
}

/// Those who have waited for the keys know that theirs are the newest.
#[tokio::test(start_paused = true)]
async fn a_cold_start_under_forged_deliveries_is_one_fetch() {
    let world = World::new().await;
    let results = join_all((0..100).map(|_| world.forges())).await;
    assert!(results.iter().all(|result| *result == refused(401, "bad_signature")), "{results:?}");
    assert_eq!(world.endpoint.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn forged_deliveries_cause_one_fetch_a_minute_at_most() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    let mut forged = forged(&world.fal);
    // A signature that no key can have made, so that a hundred thousand of them are soon judged.
    forged.headers_mut().insert("x-fal-webhook-signature", "ff".repeat(64).parse().unwrap());
    let start = Instant::now();
    let mut answers = [0, 0];
    for n in 0..100_000 {
        let response = world.verify.clone().oneshot(forged.clone()).await.unwrap();
        answers[usize::from(response.status() == StatusCode::SERVICE_UNAVAILABLE)] += 1;
        if n % 100 == 0 {
            sleep(Duration::from_millis(250)).await;
        }
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    let forced = world.endpoint.fetches() - 1;
    assert!(forced as f64 <= minutes.ceil(), "{forced} fetches in {minutes} minutes");
    assert!(forced >= 4, "{forced} fetches in {minutes} minutes");
    // Each fetch has answered one of them, and the others were held back.
    assert_eq!(answers, [forced, 100_000 - forced]);
    assert!(world.endpoint.gaps()[1..].iter().all(|gap| *gap >= 60), "{:?}", world.endpoint.gaps());
    // Meanwhile what fal has signed is believed.
    assert_eq!(world.delivers().await, accepted());
}

#[tokio::test(start_paused = true)]
async fn deliveries_with_a_new_key_are_one_fetch() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    world.fal.rotate_webhook_key();
    world.endpoint.publishes_keys_of(&world.fal);
    let results = join_all((0..100).map(|n| world.sends(delivery(&world.fal, &format!("r-{n}"))))).await;
    assert!(results.iter().all(|result| *result == accepted()), "{results:?}");
    assert_eq!(world.endpoint.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_new_key_within_the_minute_is_held_back_and_not_lost() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    assert_eq!(world.forges().await, refused(401, "bad_signature"));
    world.fal.rotate_webhook_key();
    world.endpoint.publishes_keys_of(&world.fal);
    sleep(Duration::from_secs(20)).await;

    let response = world.answers(delivery(&world.fal, "r-2")).await;
    assert_eq!(response.headers()["retry-after"], "40");
    let rejection = response.extensions().get::<Rejection>().unwrap();
    assert!(
        matches!(rejection, Rejection::KeysHeldBack { retry_after } if retry_after.as_secs() == 40),
        "{rejection:?}"
    );
    assert_eq!(reason(response).await, "keys_held_back");
    sleep(Duration::from_secs(40)).await;
    assert_eq!(world.sends(delivery(&world.fal, "r-2")).await, accepted());
    assert_eq!(world.endpoint.fetches(), 3);
}

/// Nobody can cause a fetch with a delivery that would not be believed anyway.
#[tokio::test(start_paused = true)]
async fn what_is_wrong_in_more_than_its_signature_causes_no_fetch() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    let signed = |user, at| world.fal.sign_webhook(user, "r-1", at, BODY);
    for headers in [
        signed("other", SystemTime::now()),
        signed(MockFal::USER_ID, SystemTime::now() - Duration::from_secs(400)),
        HeaderMap::new(),
    ] {
        let (status, reason) = world.sends(with_headers(headers, Bytes::from_static(b"{}"))).await;
        assert!(status == 401 && ["bad_signature", "missing_header"].contains(&reason.as_str()), "{reason}");
    }
    // With a good signature each has a reason of its own.
    let body = Bytes::from_static(BODY);
    let other = world.sends(with_headers(signed("other", SystemTime::now()), body.clone())).await;
    assert_eq!(other, refused(403, "other_account"));
    let old = signed(MockFal::USER_ID, SystemTime::now() - Duration::from_secs(400));
    assert_eq!(world.sends(with_headers(old, body)).await, refused(401, "stale"));
    assert_eq!(world.endpoint.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_any_keys_deliveries_are_answered_with_503() {
    let fal = MockFal::start().await.unwrap();
    let set = fal.webhook_jwks().to_string();
    for says in [
        Says::Refused,
        Says::Status(500),
        Says::Status(302),
        Says::Status(204),
        Says::Endless,
        Says::Hang,
        Says::Panic,
        Says::Set("<html>Bad Gateway</html>".to_owned(), None),
        Says::Set(r#"{"keys":[]}"#.to_owned(), None),
        Says::Set(r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#.to_owned(), None),
        // All of it would be read by somebody who does not look at the length.
        Says::Set(format!("{}{set}", " ".repeat(100 * 1024 * 1024)), None),
    ] {
        let world = World::with(fal.clone(), Endpoint::saying(says));
        assert!(!world.keys.status().is_ready() && world.keys.status().is_degraded());
        let before = Instant::now();
        let response = world.answers(delivery(&world.fal, "r-1")).await;
        assert!(before.elapsed() <= Duration::from_secs(5));
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(reason(response).await, "no_keys");
        let status = world.keys.status();
        assert!(!status.is_ready() && status.is_degraded() && status.last_error.is_some(), "{status:?}");
        assert_eq!(world.handler.count(), 0);

        // When it is well again, so is everything.
        world.endpoint.says(Says::Set(set.clone(), None));
        world.endpoint.fetches_reach(2).await;
        assert_eq!(world.delivers().await, accepted());
        let status = world.keys.status();
        assert_eq!((status.is_degraded(), status.consecutive_failures, status.last_error), (false, 0, None));
    }
}

#[tokio::test(start_paused = true)]
async fn without_any_keys_the_waits_between_fetches_grow() {
    let world = World::with(MockFal::start().await.unwrap(), Endpoint::saying(Says::Refused));
    // Whoever asks does not make it sooner.
    for _ in 0..300 {
        assert_eq!(world.delivers().await, refused(503, "no_keys"));
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(world.endpoint.gaps(), [1, 2, 4, 8, 16, 32, 60, 60, 60]);
}

#[tokio::test(start_paused = true)]
async fn the_last_good_keys_are_kept_through_an_outage() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    let outages = [Says::Refused, Says::Set("<html>".to_owned(), None), Says::Set(r#"{"keys":[]}"#.to_owned(), None)];
    for (n, outage) in outages.into_iter().enumerate() {
        world.endpoint.says(outage);
        sleep(Duration::from_secs(60 * 60 + 1)).await;
        assert_eq!(world.delivers().await, accepted());
        let status = world.keys.status();
        assert!(status.is_ready() && status.is_degraded(), "{n}: {status:?}");
    }
    world.endpoint.publishes_keys_of(&world.fal);
    sleep(MINUTE).await;
    assert!(!world.keys.status().is_degraded());
    assert!(world.endpoint.gaps()[1..].iter().all(|gap| *gap == 60), "{:?}", world.endpoint.gaps());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_signature_during_an_outage_is_held_back() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    world.fal.rotate_webhook_key();
    world.endpoint.says(Says::Hang);
    let before = Instant::now();
    assert_eq!(world.delivers().await, refused(503, "no_keys"));
    assert_eq!(before.elapsed().as_secs(), 5); // less than the 15 s that fal waits
    assert_eq!(world.delivers().await, refused(503, "keys_held_back"));
    world.endpoint.publishes_keys_of(&world.fal);
    sleep(MINUTE).await;
    assert_eq!(world.delivers().await, accepted());
}

#[tokio::test(start_paused = true)]
async fn the_headers_say_when_the_keys_are_fetched_again() {
    for (caching, gap) in [
        (None, 60 * 60),
        (Some("max-age=600"), 600),
        (Some("max-age=1"), 60),
        (Some("no-store"), 60),
        (Some("max-age=31536000"), 24 * 60 * 60),
    ] {
        let fal = MockFal::start().await.unwrap();
        let endpoint = Endpoint::saying(Says::Set(fal.webhook_jwks().to_string(), caching));
        let world = World::with(fal, endpoint);
        world.endpoint.fetches_reach(4).await;
        assert_eq!(world.endpoint.gaps(), [gap; 3], "{caching:?}");
    }
}

/// Nobody waits for a refresh: there are keys.
#[tokio::test(start_paused = true)]
async fn a_refresh_takes_place_in_the_background() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    world.endpoint.says(Says::Hang);
    world.endpoint.fetches_reach(2).await;
    let before = Instant::now();
    assert_eq!(world.delivers().await, accepted());
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_dropped_interrupts_no_fetch() {
    let world = World::new().await;
    world.endpoint.open.send_replace(false);
    assert!(timeout(Duration::from_secs(1), world.delivers()).await.is_err());
    world.endpoint.open.send_replace(true);
    assert_eq!(world.delivers().await, accepted());
    assert_eq!(world.endpoint.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_handle() {
    let world = World::new().await;
    assert_eq!(world.delivers().await, accepted());
    let World { endpoint, keys, verify, .. } = world;
    drop(verify);
    sleep(Duration::from_secs(2 * 60 * 60 + 1)).await;
    assert_eq!(endpoint.fetches(), 3);
    drop(keys);
    sleep(Duration::from_secs(24 * 60 * 60)).await;
    assert_eq!(endpoint.fetches(), 3);
    assert_eq!(Arc::strong_count(&endpoint.says), 1); // nobody holds the client any more
}

#[test]
fn keys_outlive_the_runtime_that_fetched_them() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let fal = second.block_on(MockFal::start()).unwrap();
    let (known, unknown) = first.block_on(async {
        let known = World::new().await;
        assert_eq!(known.delivers().await, accepted());
        (known, World::with(fal, Endpoint::saying(Says::Hang)))
    });
    drop(first);
    second.block_on(async {
        assert_eq!(known.delivers().await, accepted());
        known.fal.rotate_webhook_key();
        assert_eq!(known.delivers().await, refused(503, "no_keys"));
        assert_eq!(unknown.delivers().await, refused(503, "no_keys"));
    });
}

#[tokio::test]
async fn keys_in_clear_are_taken_from_this_machine_only() {
    for url in ["http://rest.fal.ai/.well-known/jwks.json", "http://10.0.0.1/jwks", "ftp://rest.fal.ai/", "/jwks.json"]
    {
        assert!(WebhookKeys::from_url(client(), url.parse().unwrap()).is_err(), "{url}");
    }
    for url in ["https://example.com/jwks.json", "http://127.0.0.1:1/jwks", "http://[::1]:1/jwks"] {
        assert!(WebhookKeys::from_url(client(), url.parse().unwrap()).is_ok(), "{url}");
    }
}

#[tokio::test]
async fn the_keys_of_the_mock_are_fetched_over_a_socket() {
    let fal = MockFal::start().await.unwrap();
    let verify = layer(keys_of(&fal)).layer(Handler::new());
    let status = async |request| verify.clone().oneshot(request).await.unwrap().status();
    assert_eq!(status(delivery(&fal, "r-1")).await, StatusCode::OK);
    fal.rotate_webhook_key();
    assert_eq!(status(delivery(&fal, "r-2")).await, StatusCode::OK);
    assert_eq!(fetches(&fal), 2);

    fal.fail_next(usize::MAX, Failure::Disconnect);
    let keys = keys_of(&fal);
    let verify = layer(keys.clone()).layer(Handler::new());
    let response = verify.oneshot(delivery(&fal, "r-3")).await.unwrap();
    assert_eq!(reason(response).await, "no_keys");
    assert_eq!(keys.status().last_error.unwrap(), "the keys of fal's webhooks could not be fetched");
}

#[tokio::test]
async fn the_mock_answers_for_its_keys_as_the_test_has_set() {
    let fal = MockFal::start().await.unwrap();
    let status_of = async || {
        let keys = keys_of(&fal);
        let verify = layer(keys.clone()).layer(Handler::new());
        let status = verify.oneshot(delivery(&fal, "r-1")).await.unwrap().status();
        (status, keys.status().last_error)
    };
    fal.answer("/.well-known/jwks.json", tower_fal::mock::Answer::bytes("text/html", "<html>"));
    let (status, error) = status_of().await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(error.unwrap(), "the answer that should have fal's keys cannot be used: it is not a JSON Web Key Set");
    fal.fail_next_on("/.well-known/jwks.json", 1, Failure::Status(StatusCode::BAD_GATEWAY));
    let (status, error) = status_of().await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(error.unwrap(), "the keys of fal's webhooks could not be fetched: the answer has the status 502");
    fal.clear_answer("/.well-known/jwks.json");
    assert_eq!(status_of().await, (StatusCode::OK, None));
    // The keys are public: nobody has shown a key to get them.
    assert!(fal.received().iter().all(|request| request.presented == tower_fal::mock::Presented::Nothing));
}

#[tokio::test]
async fn the_status_is_one_flat_object() {
    let fal = MockFal::start().await.unwrap();
    let keys = keys_of(&fal);
    let response = layer(keys.clone()).layer(Handler::new()).oneshot(delivery(&fal, "r-1")).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "handled");
    let mut status = serde_json::to_value(keys.status()).unwrap();
    assert!(status["fetched_at"].take().as_u64().unwrap() > 1_700_000_000);
    let expected = serde_json::json!({ "ready": true, "degraded": false, "keys": 1, "fetched_at": null,
        "consecutive_failures": 0, "last_error": null });
    assert_eq!(status, expected);
}
