//! The bodies of refusals: as much is read as it takes, and no longer than it may.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body::{Body, Frame};
use tower::ServiceExt as _;
use tower_fal::{
    error::{BoxError, Reason},
    retry::Transient,
};

use super::{ADMITTED, Lazy, World, accepted, answer, answer_with, assert_took, post, refusal, request, timed};

const PEEK: usize = 16 * 1024;
const READ_TIMEOUT: Duration = Duration::from_secs(1);
const GIB: u64 = 1024 * 1024 * 1024;

#[tokio::test(start_paused = true)]
async fn of_a_gibibyte_sixteen_kibibytes_are_read() {
    for status in [401, 403] {
        let world = World::new().await;
        let body = Lazy::new(GIB / 1024, vec![b'a'; 1024]);
        let read = body.read();
        world.fal.will_answer(answer_with(status, body));
        let request = tokio::spawn(world.client().oneshot(post()));
        world.fal.arrivals_reach(1).await;
        if status == 401 {
            world.source.loads_reach(2).await;
            assert!(read.is_dropped(), "others may need the connection while this one waits");
        }
        let refusal = refusal(request.await.unwrap());
        assert_eq!((read.pieces(), refusal.body().len()), (16, PEEK));
        assert!(refusal.detail().unwrap().chars().count() <= 301);
        assert!(refusal.to_string().len() < 1024);
    }
}

#[tokio::test(start_paused = true)]
async fn of_one_huge_piece_sixteen_kibibytes_are_shown() {
    let world = World::new().await;
    world.fal.will_answer(answer(403, vec![b'a'; 1024 * 1024]));
    assert_eq!(refusal(world.client().oneshot(post()).await).body().len(), PEEK);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_read_for_a_second() {
    for (limit, set) in [(READ_TIMEOUT, false), (Duration::from_millis(50), true)] {
        let world = World::new().await;
        let body = Lazy::new(1, r#"{"detail":"User is locked. Reason: Admin lock."}"#).hangs();
        let read = body.read();
        world.fal.will_answer(answer_with(403, body));
        let retry = if set { world.retry().read_timeout(limit) } else { world.retry() };
        let (result, took) = timed(world.client_by(&retry).oneshot(post())).await;
        assert_took(took, limit);
        assert!(read.is_dropped());
        // What has come by then is what is looked at.
        assert!(matches!(refusal(result).reason(), Reason::AccountLocked(_)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_401_whose_body_never_begins_is_still_worth_another_key() {
    let world = World::new().await;
    world.fal.will_answer(answer_with(401, Lazy::new(0, "").hangs()));
    world.fal.accept(2);
    world.source.brings(2);
    let (result, took) = timed(world.client().oneshot(post())).await;
    accepted(result);
    assert_took(took, READ_TIMEOUT);
    assert_eq!(world.fal.keys(), [1, 2]);
}

/// Its connection can be used again.
#[tokio::test(start_paused = true)]
async fn a_short_body_is_read_to_its_end() {
    let world = World::new().await;
    let body = Lazy::new(15, vec![b'a'; 1024]).trailers(HeaderMap::new());
    let read = body.read();
    world.fal.will_answer(answer_with(401, body));
    let request = tokio::spawn(world.client().oneshot(post()));
    world.source.loads_reach(2).await;
    assert!(read.to_its_end());
    refusal(request.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_fails_is_read_as_far_as_it_came() {
    let world = World::new().await;
    let body = Lazy::new(1, r#"{"detail":"Insufficient permissions"}"#).fails();
    world.fal.will_answer(answer_with(403, body));
    assert_eq!(refusal(world.client().oneshot(post()).await).reason(), Reason::InsufficientPermissions);
}

#[tokio::test(start_paused = true)]
async fn a_text_in_many_pieces_is_read_as_one() {
    let world = World::new().await;
    let text = r#"{"detail":"User is locked. Reason: TOP_UP."}"#;
    let pieces = text.bytes().map(|byte| Bytes::copy_from_slice(&[byte])).collect();
    world.fal.will_answer(answer_with(403, Pieces(pieces)));
    let refusal = refusal(world.client().oneshot(post()).await);
    assert_eq!((refusal.detail(), refusal.body()), (Some("User is locked. Reason: TOP_UP."), &Bytes::from(text)));
}

#[tokio::test(start_paused = true)]
async fn any_bytes_are_an_answer() {
    let nested = "[".repeat(10_000);
    let nested_detail = format!(r#"{{"detail":{}1{}}}"#, r#"{"msg":"#.repeat(1_000), "}".repeat(1_000));
    let html = "<html>\r\n<head><title>401 Authorization Required</title></head><body>nginx</body></html>";
    for (body, detail) in [
        (Bytes::new(), None),
        (Bytes::from_static(b"\xff\xfe\x00\xc3\x28"), Some("\u{fffd}\u{fffd} \u{fffd}(")),
        (Bytes::from(nested), Some("[[[")),
        (Bytes::from(nested_detail), Some("{\"detail\":{\"msg\":")),
        (Bytes::from(html), Some("401 Authorization Required")),
        (Bytes::from_static(b"null"), None),
        (Bytes::from_static(b"{\"detail\":null}"), None),
        (Bytes::from_static(b"\xef\xbb\xbf{}"), Some("\u{feff}{}")),
    ] {
        for status in [401, 403] {
            let world = World::new().await;
            world.fal.will_answer(answer(status, body.clone()));
            let refusal = refusal(world.client().oneshot(post()).await);
            assert_eq!(refusal.reason(), Reason::Unknown);
            match (refusal.detail(), detail) {
                (Some(found), Some(wanted)) => assert!(found.starts_with(wanted), "{found} for {body:?}"),
                (found, wanted) => assert_eq!(found, wanted),
            }
            assert_eq!(refusal.body(), &body);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_passing_is_let_go_before_the_wait() {
    for (body, pieces) in [(Lazy::new(GIB, "a".repeat(1024)), 16), (Lazy::new(3, "a"), 3)] {
        let world = World::new().await;
        let read = body.read();
        let mut busy = answer_with(503, body);
        busy.headers_mut().insert("retry-after", "5".parse().unwrap());
        world.fal.will_answer(busy);
        let client = world.client_by(&world.retry().transient(Transient::default()));
        let request = request(Method::GET, ADMITTED, "");
        let request = tokio::spawn(client.oneshot(request));
        world.fal.arrivals_reach(1).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((read.pieces(), read.is_dropped(), request.is_finished()), (pieces, true, false));
        accepted(request.await.unwrap());
    }
}

/// A body in these pieces.
struct Pieces(VecDeque<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_of_empty_pieces_without_end_is_not_read_for_ever() {
    let world = World::new().await;
    let body = Lazy::new(u64::MAX, "");
    let read = body.read();
    world.fal.will_answer(answer_with(403, body));
    refusal(world.client().oneshot(post()).await);
    assert!(read.pieces() <= PEEK as u64, "{} pieces", read.pieces());
}
