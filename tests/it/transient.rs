//! What fails in passing is sent again, for requests that may be repeated, and for no others.

use std::{
    error::Error,
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::rt;
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connected, Connection, HttpConnector},
    },
    rt::{TokioExecutor, TokioIo},
};
use tokio::{net::TcpStream, time::Instant};
use tower::{Layer as _, ServiceExt as _, retry::budget::TpsBudget};
use tower_fal::{
    CredentialStore, FalAuth, FalAuthError, FalAuthLayer, FalRetry, FalRetryLayer,
    retry::{Repeatable, ReplayBody, Transient, connection_failed},
};

use crate::{
    retry::{ADMITTED, Answer, Fal, Lazy, answer, answer_with, assert_took, request, timed, unknown_key},
    support::{Says, Script, key, nobody},
};

mod http2;
mod tls;

pub(crate) use self::tls::without_roots;

const CANCEL: &str = "https://queue.fal.run/fal-ai/flux/requests/7d2e/cancel";
const BODY: &str = r#"{"prompt":"a cat"}"#;
const SECOND: Duration = Duration::from_secs(1);

/// One request, and as many answers as it takes.
struct Setup {
    fal: Fal,
    transient: Transient,
}

impl Setup {
    fn new(transient: Transient) -> Self {
        let fal = Fal::default();
        fal.accept(1);
        Self { fal, transient }
    }

    fn retry(&self) -> FalRetryLayer {
        FalRetryLayer::new(CredentialStore::fixed(key(1))).transient(self.transient.clone())
    }

    fn client(&self) -> FalRetry<FalAuth<Fal>> {
        self.retry().layer(FalAuthLayer::new(CredentialStore::fixed(key(1))).layer(self.fal.clone()))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, FalAuthError> {
        self.client().oneshot(request).await
    }

    fn attempts(&self) -> usize {
        self.fal.arrived().len()
    }

    /// The waits between the attempts.
    fn gaps(&self) -> Vec<Duration> {
        self.fal.arrived().windows(2).map(|pair| pair[1].at - pair[0].at).collect()
    }
}

fn get() -> Request<Full<Bytes>> {
    request(Method::GET, ADMITTED, "")
}

fn post() -> Request<Full<Bytes>> {
    request(Method::POST, ADMITTED, BODY)
}

fn repeatable_post() -> Request<Full<Bytes>> {
    let mut request = post();
    request.extensions_mut().insert(Repeatable);
    request
}

fn with_header(mut answer: Answer, name: &'static str, value: &str) -> Answer {
    answer.headers_mut().insert(name, value.parse().unwrap());
    answer
}

fn busy() -> Answer {
    answer(503, "busy")
}

fn busy_for(retry_after: &str) -> Answer {
    with_header(busy(), "retry-after", retry_after)
}

fn refused_connection() -> io::Error {
    io::ErrorKind::ConnectionRefused.into()
}

#[derive(Clone, Copy)]
enum Ends {
    With(u16),
    Unsent,
    Somehow,
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_again_as_a_table() {
    use Ends::{Somehow, Unsent, With};
    let marked = |mut request: Request<Full<Bytes>>| {
        request.extensions_mut().insert(Repeatable);
        request
    };
    let requests: [(&str, Request<Full<Bytes>>, bool); 14] = [
        ("GET", get(), true),
        ("HEAD", request(Method::HEAD, ADMITTED, ""), true),
        ("the queue's PUT cancel", request(Method::PUT, CANCEL, ""), true),
        ("with a query", request(Method::PUT, &format!("{CANCEL}?a=b"), ""), true),
        ("a PUT elsewhere", request(Method::PUT, ADMITTED, BODY), false),
        ("a PUT of a file called cancel", request(Method::PUT, "https://rest.fal.ai/files/cancel", BODY), false),
        ("a PUT cancel of nothing", request(Method::PUT, "https://queue.fal.run/a/b/requests//cancel", ""), false),
        ("a POST cancel", request(Method::POST, CANCEL, ""), false),
        ("POST", post(), false),
        ("POST that is marked", repeatable_post(), true),
        ("PATCH", request(Method::PATCH, ADMITTED, BODY), false),
        ("PATCH that is marked", marked(request(Method::PATCH, ADMITTED, BODY)), true),
        ("DELETE", request(Method::DELETE, ADMITTED, ""), false),
        ("OPTIONS", request(Method::OPTIONS, ADMITTED, ""), false),
    ];
    let transient = |ends: &Ends| !matches!(ends, With(status) if ![429, 502, 503, 504].contains(status));
    let outcomes = [200, 202, 400, 404, 408, 409, 422, 429, 499, 500, 501, 502, 503, 504].map(With);
    for (name, request, may_be_repeated) in requests {
        for ends in outcomes.into_iter().chain([Unsent, Somehow]) {
            let setup = Setup::new(Transient::default());
            let outcome = match ends {
                With(status) => {
                    setup.fal.will_answer(answer(status, "once"));
                    format!("{status}")
                }
                Unsent => {
                    setup.fal.will_fail(refused_connection());
                    "not sent".to_owned()
                }
                Somehow => {
                    setup.fal.will_fail(io::Error::from(io::ErrorKind::ConnectionReset));
                    "failed".to_owned()
                }
            };
            let result = setup.send(request.clone()).await;
            let wanted = transient(&ends) && (may_be_repeated || matches!(ends, Unsent));
            assert_eq!(setup.attempts(), if wanted { 2 } else { 1 }, "{name}, {outcome}");
            match (wanted, ends) {
                (true, _) => assert_eq!(result.unwrap().status(), 200),
                (false, With(status)) => assert_eq!(result.unwrap().status(), status),
                (false, _) => assert!(matches!(result, Err(FalAuthError::Transport(_)))),
            }
            let arrived = setup.fal.arrived();
            let sent = request.clone().into_body().collect().await.unwrap().to_bytes();
            assert!(arrived.iter().all(|arrived| arrived.body == sent && arrived.method == request.method()), "{name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_being_asked_for_nothing_is_sent_again() {
    let setup = Setup::new(Transient::default());
    let store = CredentialStore::fixed(key(1));
    for answer in [busy(), answer(429, "slow down")] {
        let status = answer.status();
        setup.fal.will_answer(answer);
        let client = tower_fal::layer(&store).layer(setup.fal.clone());
        assert_eq!(client.oneshot(get()).await.unwrap().status(), status);
    }
    setup.fal.will_fail(refused_connection());
    assert!(tower_fal::layer(&store).layer(setup.fal.clone()).oneshot(get()).await.is_err());
    assert_eq!(setup.attempts(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_last_answer_is_the_callers_as_it_came() {
    let setup = Setup::new(Transient::default().attempts(3));
    for n in 1..=3 {
        setup.fal.will_answer(with_header(answer(503, format!("busy {n}")), "x-fal-error-type", "busy"));
    }
    let response = setup.send(get()).await.unwrap();
    assert_eq!((response.status().as_u16(), setup.attempts()), (503, 3));
    assert_eq!(response.headers()["x-fal-error-type"], "busy");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "busy 3");
}

#[tokio::test(start_paused = true)]
async fn the_last_failure_is_the_callers() {
    let setup = Setup::new(Transient::default().attempts(2));
    setup.fal.will_fail("the first");
    setup.fal.will_fail("the second");
    let error = setup.send(get()).await.unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "the second");
    assert_eq!(setup.attempts(), 2);
}

#[tokio::test(start_paused = true)]
async fn attempts_are_four_unless_set() {
    for (transient, attempts) in [
        (Transient::default(), 4),
        (Transient::default().attempts(2), 2),
        (Transient::default().attempts(1), 1),
        (Transient::default().attempts(0), 1),
    ] {
        let setup = Setup::new(transient);
        for _ in 0..10 {
            setup.fal.will_answer(busy());
        }
        assert_eq!(setup.send(get()).await.unwrap().status(), 503);
        assert_eq!(setup.attempts(), attempts);
    }
}

#[tokio::test(start_paused = true)]
async fn waits_are_random_up_to_a_limit_that_doubles() {
    let transient =
        Transient::default().attempts(6).first_delay(SECOND).longest_delay(4 * SECOND).deadline(60 * SECOND);
    let limits = [1, 2, 4, 4, 4].map(|seconds| seconds * SECOND);
    let mut longest = [Duration::ZERO; 5];
    let mut shortest = [Duration::MAX; 5];
    for _ in 0..200 {
        let setup = Setup::new(transient.clone().budget(plenty()));
        for _ in 0..5 {
            setup.fal.will_answer(busy());
        }
        assert_eq!(setup.send(get()).await.unwrap().status(), 200);
        for (n, gap) in setup.gaps().into_iter().enumerate() {
            assert!(gap <= limits[n] + Duration::from_millis(2), "wait {n}: {gap:?}");
            longest[n] = longest[n].max(gap);
            shortest[n] = shortest[n].min(gap);
        }
    }
    for n in 0..5 {
        assert!(longest[n] > limits[n] * 4 / 5 && shortest[n] < limits[n] / 5, "{n}: {shortest:?} to {longest:?}");
    }
}

fn plenty() -> TpsBudget {
    TpsBudget::new(Duration::from_secs(60), 1_000_000, 1000.0)
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_obeyed_in_seconds() {
    let setup = Setup::new(Transient::default());
    for seconds in ["7", "0", " 3 "] {
        setup.fal.will_answer(busy_for(seconds));
    }
    assert_eq!(setup.send(get()).await.unwrap().status(), 200);
    for (gap, seconds) in setup.gaps().into_iter().zip([7, 0, 3]) {
        assert_took(gap, seconds * SECOND);
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_obeyed_as_a_date() {
    let setup = Setup::new(Transient::default());
    let began = SystemTime::now();
    setup.fal.will_answer(busy_for(&httpdate::fmt_http_date(began + 6 * SECOND)));
    setup.fal.will_answer(busy_for(&httpdate::fmt_http_date(began - 3600 * SECOND)));
    assert_eq!(setup.send(get()).await.unwrap().status(), 200);
    let gaps = setup.gaps();
    // The wall clock is not paused, and a date has no fractions.
    let shortest = 5.0 - began.elapsed().unwrap().as_secs_f64();
    assert!((shortest..=6.01).contains(&gaps[0].as_secs_f64()), "{gaps:?}");
    assert_took(gaps[1], Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn retry_after_has_a_limit() {
    let far = httpdate::fmt_http_date(SystemTime::now() + 86_400 * SECOND);
    for asked in ["11", "86400", "99999999999999999999999999", &far] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_answer(busy_for(asked));
        assert_eq!(setup.send(get()).await.unwrap().status(), 200);
        assert_took(setup.gaps()[0], 10 * SECOND);
        let setup = Setup::new(Transient::default().longest_delay(2 * SECOND));
        setup.fal.will_answer(busy_for(asked));
        assert_eq!(setup.send(get()).await.unwrap().status(), 200);
        assert_took(setup.gaps()[0], 2 * SECOND);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_after_that_says_nothing_is_no_wait_of_its_own() {
    for nonsense in ["soon", "-1", "1.5", ""] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_answer(busy_for(nonsense));
        assert_eq!(setup.send(get()).await.unwrap().status(), 200);
        assert!(setup.gaps()[0] <= Duration::from_millis(252), "{nonsense}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_would_end_after_the_deadline_is_not_begun() {
    // 3 s, 6 s, and 9 s would be too late; the answer's own time counts as well.
    let setup = Setup::new(Transient::default().attempts(100).deadline(8 * SECOND));
    for _ in 0..10 {
        setup.fal.will_answer(busy_for("3"));
    }
    let (result, took) = timed(setup.send(get())).await;
    assert_eq!((result.unwrap().status().as_u16(), setup.attempts()), (503, 3));
    assert_took(took, 6 * SECOND);

    let setup = Setup::new(Transient::default().deadline(8 * SECOND));
    setup.fal.will_answer(busy_for("9"));
    let (result, took) = timed(setup.send(get())).await;
    assert_eq!((result.unwrap().status().as_u16(), took), (503, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn the_time_that_an_attempt_takes_counts_for_the_deadline() {
    let setup = Setup::new(Transient::default().deadline(8 * SECOND));
    let fal = setup.fal.clone();
    let slow = tower::ServiceBuilder::new()
        .map_request(|request: Request<ReplayBody<Full<Bytes>>>| request)
        .service_fn(move |request| {
            let fal = fal.clone();
            async move {
                tokio::time::sleep(7 * SECOND).await;
                fal.oneshot(request).await
            }
        });
    let client = setup.retry().layer(FalAuthLayer::new(CredentialStore::fixed(key(1))).layer(slow));
    setup.fal.will_answer(busy_for("2"));
    assert_eq!(client.oneshot(get()).await.unwrap().status(), 503);
}

#[tokio::test(start_paused = true)]
async fn a_budget_that_is_used_up_ends_it_and_is_shared_by_clones() {
    // One retry for two requests: four are worth two, and the 200s of the first two retries another one.
    let setup = Setup::new(Transient::default().budget(TpsBudget::new(60 * SECOND, 0, 0.5)));
    for _ in 0..4 {
        assert_eq!(setup.send(get()).await.unwrap().status(), 200);
    }
    for status in [200, 200, 200, 503] {
        let before = setup.attempts();
        setup.fal.will_answer(busy());
        assert_eq!(setup.send(get()).await.unwrap().status(), status);
        assert_eq!(setup.attempts() - before, if status == 200 { 2 } else { 1 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_budget_of_nothing_is_no_retry() {
    let setup = Setup::new(Transient::default().budget(TpsBudget::new(10 * SECOND, 0, 0.0)));
    setup.fal.will_answer(busy());
    let (result, took) = timed(setup.send(get())).await;
    assert_eq!((result.unwrap().status().as_u16(), setup.attempts(), took), (503, 1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn the_callers_own_time_out_is_never_repeated() {
    for request in [get(), repeatable_post()] {
        for (value, sent_again) in [("user", false), ("User", false), ("platform", true)] {
            let setup = Setup::new(Transient::default());
            setup.fal.will_answer(with_header(answer(504, "late"), "x-fal-request-timeout-type", value));
            setup.send(request.clone()).await.unwrap();
            assert_eq!(setup.attempts() == 2, sent_again, "{value}");
        }
    }
    let setup = Setup::new(Transient::default());
    setup.fal.will_answer(with_header(busy(), "x-fal-request-timeout-type", "user"));
    setup.send(get()).await.unwrap();
    assert_eq!(setup.attempts(), 2, "it is about a 504");
}

#[tokio::test(start_paused = true)]
async fn what_fal_calls_not_retryable_is_never_repeated() {
    for status in [429, 502, 503, 504] {
        for request in [get(), repeatable_post()] {
            for (value, sent_again) in [("false", false), ("False", false), ("true", true), ("", true)] {
                let setup = Setup::new(Transient::default());
                setup.fal.will_answer(with_header(answer(status, ""), "x-fal-retryable", value));
                setup.send(request.clone()).await.unwrap();
                assert_eq!(setup.attempts() == 2, sent_again, "{status} {value}");
            }
        }
    }
    // And what it calls retryable is no reason of its own.
    let setup = Setup::new(Transient::default());
    setup.fal.will_answer(with_header(answer(500, ""), "x-fal-retryable", "true"));
    assert_eq!(setup.send(get()).await.unwrap().status(), 500);
}

#[tokio::test(start_paused = true)]
async fn a_post_that_fal_did_not_run_for_want_of_room_is_sent_again() {
    let over_the_limit = || {
        let refused = with_header(answer(429, ""), "x-fal-error-type", "concurrent_requests_limit");
        with_header(refused, "x-fal-needs-retry", "1")
    };
    let without = |name: &str| {
        let mut answer = over_the_limit();
        answer.headers_mut().remove(name).unwrap();
        answer
    };
    for (name, answer, sent_again) in [
        ("as fal says it", over_the_limit(), true),
        ("without a type", without("x-fal-error-type"), false),
        ("without a word about a retry", without("x-fal-needs-retry"), false),
        ("another type", with_header(over_the_limit(), "x-fal-error-type", "rate_limit"), false),
        ("needs no retry", with_header(over_the_limit(), "x-fal-needs-retry", "0"), false),
        ("is not retryable", with_header(over_the_limit(), "x-fal-retryable", "false"), false),
        ("a runner's", with_header(over_the_limit(), "x-fal-served-from", "runner"), false),
        ("a runner's, billed", with_header(over_the_limit(), "x-fal-billable-units", "1"), false),
    ] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_answer(answer);
        let status = setup.send(post()).await.unwrap().status().as_u16();
        assert_eq!((status, setup.attempts()), if sent_again { (200, 2) } else { (429, 1) }, "{name}");
    }
    let setup = Setup::new(Transient::default());
    let (mut parts, body) = over_the_limit().into_parts();
    parts.status = http::StatusCode::SERVICE_UNAVAILABLE;
    setup.fal.will_answer(Answer::from_parts(parts, body));
    assert_eq!((setup.send(post()).await.unwrap().status().as_u16(), setup.attempts()), (503, 1), "it is about a 429");
}

#[tokio::test(start_paused = true)]
async fn the_body_is_sent_again_whole() {
    let setup = Setup::new(Transient::default());
    let retry = setup.retry();
    for _ in 0..3 {
        setup.fal.will_answer(busy());
    }
    let client = retry.layer(FalAuthLayer::new(CredentialStore::fixed(key(1))).layer(setup.fal.clone()));
    assert_eq!(client.oneshot(repeatable_post()).await.unwrap().status(), 200);
    let arrived = setup.fal.arrived();
    assert!(arrived.len() == 4 && arrived.iter().all(|arrived| arrived.body == BODY && arrived.key == 1));
    assert_eq!(retry.replay_memory_used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_not_kept_is_sent_once() {
    let setup = Setup::new(Transient::default());
    let client =
        setup.retry().max_body(4).layer(FalAuthLayer::new(CredentialStore::fixed(key(1))).layer(setup.fal.clone()));
    setup.fal.will_answer(busy());
    assert_eq!(client.oneshot(repeatable_post()).await.unwrap().status(), 503);
    assert_eq!(setup.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_response_that_never_ends_holds_nothing_up_for_long() {
    let setup = Setup::new(Transient::default());
    let body = Lazy::new(1, "busy").hangs();
    let read = body.read();
    setup.fal.will_answer(with_header(answer_with(503, body), "retry-after", "5"));
    assert_eq!(setup.send(get()).await.unwrap().status(), 200);
    assert!(read.is_dropped() && !read.to_its_end());
    assert_took(setup.gaps()[0], 6 * SECOND); // a second to read, and then the wait
}

// Beside the replay for the sake of the credential.

#[tokio::test(start_paused = true)]
async fn attempts_for_the_sake_of_the_credential_are_counted_apart() {
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    source.brings(2);
    let fal = Fal::default();
    fal.accept(2);
    let retry = FalRetryLayer::new(store.clone()).transient(Transient::default().attempts(3));
    let client = retry.layer(FalAuthLayer::new(store.clone()).layer(fal.clone()));
    // Busy, refused, sent again with the new key, busy, accepted.
    fal.will_answer(busy());
    fal.will_answer(unknown_key());
    fal.will_answer(busy());
    assert_eq!(client.clone().oneshot(get()).await.unwrap().status(), 200);
    assert_eq!(fal.keys(), [1, 1, 2, 2]);

    // The second refusal is the last one, whatever lies between.
    source.brings(3);
    for answer in [unknown_key(), busy(), unknown_key()] {
        fal.will_answer(answer);
    }
    let error = client.oneshot(get()).await.unwrap_err();
    assert!(error.refusal().unwrap().was_replayed());
    assert_eq!(fal.keys()[4..], [2, 3, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_repetition_after_a_way_back_takes_the_same_way() {
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    let fal = Fal::default();
    fal.accept(1);
    let retry = FalRetryLayer::new(store.clone()).transient(Transient::default());
    let client = retry.layer(FalAuthLayer::new(store.clone()).layer(fal.clone()));
    source.brings(2);
    store.replace(key(2));
    fal.will_answer(unknown_key());
    fal.will_answer(busy());
    assert_eq!(client.oneshot(get()).await.unwrap().status(), 200);
    assert_eq!(fal.keys(), [2, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_no_failures_in_passing() {
    for status in [401, 403] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_answer(answer(status, ""));
        assert!(setup.send(get()).await.unwrap_err().refusal().is_some());
        assert_eq!(setup.attempts(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_inside_an_error_is_no_transient_failure() {
    for status in [401, 403] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_answer(answer(status, ""));
        let store = CredentialStore::fixed(key(1));
        let inner = tower_fal::layer(&store).layer(setup.fal.clone());
        let outer = FalRetryLayer::per_request().transient(Transient::default()).layer(inner);
        let error = outer.oneshot(get()).await.unwrap_err();
        assert_eq!((error.refusal().unwrap().status().as_u16(), setup.attempts()), (status, 1));
    }
}

// What was certainly not sent.

#[test]
fn a_connection_that_failed_is_told_by_the_kind_of_the_error() {
    use io::ErrorKind;
    for (kind, failed) in [
        (ErrorKind::ConnectionRefused, true),
        (ErrorKind::HostUnreachable, true),
        (ErrorKind::NetworkUnreachable, true),
        (ErrorKind::ConnectionReset, false),
        (ErrorKind::BrokenPipe, false),
        (ErrorKind::TimedOut, false),
        (ErrorKind::UnexpectedEof, false),
        (ErrorKind::Other, false),
    ] {
        assert_eq!(connection_failed(&io::Error::from(kind)), failed, "{kind}");
    }
    assert!(!connection_failed(&fmt::Error));
}

#[derive(Debug, thiserror::Error)]
#[error("while sending")]
struct Wrapped(#[source] Box<dyn Error + Send + Sync>);

#[tokio::test(start_paused = true)]
async fn it_is_found_behind_other_errors() {
    for error in [
        Wrapped(refused_connection().into()).into(),
        Wrapped(Wrapped(refused_connection().into()).into()).into(),
        Box::<dyn Error + Send + Sync>::from(io::Error::other(refused_connection())),
        io::Error::other(Wrapped(refused_connection().into())).into(),
    ] {
        let setup = Setup::new(Transient::default());
        setup.fal.will_fail(error);
        assert_eq!(setup.send(post()).await.unwrap().status(), 200);
        assert_eq!(setup.attempts(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn who_knows_more_may_say_so() {
    fn none_sent(error: &(dyn Error + 'static)) -> bool {
        error.is::<fmt::Error>()
    }
    let setup = Setup::new(Transient::default().not_sent(none_sent));
    setup.fal.will_fail(Wrapped(fmt::Error.into()));
    assert_eq!(setup.send(post()).await.unwrap().status(), 200);
    setup.fal.will_fail(refused_connection());
    assert!(setup.send(post()).await.is_err(), "it takes the place of what was there");
    assert_eq!(setup.attempts(), 3);
}

#[tokio::test]
async fn a_port_that_refuses_is_tried_again_also_with_a_post() {
    let nobody = nobody();
    let url = format!("http://{}/fal-ai/flux", nobody.local_addr().unwrap());
    let connects = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connects);
    let connector = tower::ServiceBuilder::new()
        .map_request(move |uri: Uri| {
            counted.fetch_add(1, Ordering::SeqCst);
            uri
        })
        .service(HttpConnector::new());
    let http = legacy::Client::builder(TokioExecutor::new()).build::<_, ReplayBody<Full<Bytes>>>(connector);
    let store = CredentialStore::fixed(key(1));
    let transient = Transient::default().attempts(3).first_delay(Duration::from_millis(1));
    let client = tower_fal::layer(&store).retry(|retry| retry.transient(transient)).layer(http);
    let began = Instant::now();
    let error = client.oneshot(request(Method::POST, &url, BODY)).await.unwrap_err();
    assert!(error.source().unwrap().downcast_ref::<legacy::Error>().unwrap().is_connect());
    assert_eq!(connects.load(Ordering::SeqCst), 3);
    assert!(began.elapsed() < 60 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_connector_that_fails_is_tried_again_whatever_its_error() {
    let connects = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connects);
    let connector = tower::service_fn(move |_: Uri| {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Err::<TokioIo<TcpStream>, _>(io::Error::other("no such host")))
    });
    let http = legacy::Client::builder(TokioExecutor::new()).build::<_, ReplayBody<Full<Bytes>>>(connector);
    let store = CredentialStore::fixed(key(1));
    let client = tower_fal::layer(&store).retry(|retry| retry.transient(Transient::default())).layer(http);
    assert!(matches!(client.oneshot(post()).await, Err(FalAuthError::Transport(_))));
    assert_eq!(connects.load(Ordering::SeqCst), 4);
}

/// The system can say so of a connection that existed, when a route is gone.
#[tokio::test]
async fn unreachable_behind_a_clients_own_error_is_not_believed() {
    let connects = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connects);
    let connector = tower::service_fn(move |_: Uri| {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Ok::<_, io::Error>(LosesItsRoute::default()))
    });
    let http = legacy::Client::builder(TokioExecutor::new()).build::<_, ReplayBody<Full<Bytes>>>(connector);
    let store = CredentialStore::fixed(key(1));
    let client = tower_fal::layer(&store).retry(|retry| retry.transient(Transient::default())).layer(http);
    let error = client.oneshot(post()).await.unwrap_err();
    let mut causes = std::iter::successors(error.source(), |error| (*error).source());
    assert!(causes.any(connection_failed), "{error:?}: this test has not met its case");
    assert_eq!(connects.load(Ordering::SeqCst), 1);
}

/// A connection that takes a request, and then has no way to its peer.
#[derive(Default)]
struct LosesItsRoute {
    has_sent: bool,
    reading: Option<Waker>,
}

impl rt::Read for LosesItsRoute {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, _: rt::ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.has_sent {
            return Poll::Ready(Err(io::ErrorKind::HostUnreachable.into()));
        }
        self.reading = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl rt::Write for LosesItsRoute {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.has_sent = true;
        self.reading.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Connection for LosesItsRoute {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Its connection breaks afterwards.
#[tokio::test]
async fn a_post_that_was_sent_is_not_repeated() {
    let fal = tower_fal::mock::MockFal::start().await.unwrap();
    let store = CredentialStore::fixed(key(1));
    let http = legacy::Client::builder(TokioExecutor::new()).build_http::<ReplayBody<Full<Bytes>>>();
    let transient = Transient::default().first_delay(Duration::from_millis(1));
    let client = tower_fal::layer(&store).retry(|retry| retry.transient(transient)).layer(http);
    let url = fal.run_url("/fal-ai/flux").to_string();
    fal.fail_next(1, tower_fal::mock::Failure::Disconnect);
    let error = client.clone().oneshot(request(Method::POST, &url, BODY)).await.unwrap_err();
    assert!(matches!(error, FalAuthError::Transport(_)));
    assert_eq!(fal.requests(), 1);

    fal.fail_next(1, tower_fal::mock::Failure::Disconnect);
    let response = client.oneshot(request(Method::GET, &url, "")).await.unwrap();
    assert_eq!((response.status().as_u16(), fal.requests()), (401, 3), "nobody admitted the mock's origin");
}
