//! What a proxy wants: the final refusal as a response, as it came.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    FalAuthError,
    error::{LockReason, Reason, Refusal},
    retry::{Passthrough, PeekedBody},
};

use super::{
    Answer, AnswerBody, Client, ELSEWHERE, Lazy, RELOAD_WAIT, World, answer, answer_with, assert_took, locked, post,
    request, timed,
};

fn proxy(world: &World) -> Client<Passthrough> {
    world.client_by(&world.retry().passthrough())
}

fn refusal_in<B>(response: &Response<B>) -> Option<&Refusal> {
    response.extensions().get()
}

fn with_headers(mut answer: Answer) -> Answer {
    for (name, value) in [("x-fal-request-id", "request-7"), ("set-cookie", "a=1"), ("set-cookie", "b=2")] {
        answer.headers_mut().append(name, value.parse().unwrap());
    }
    answer
}

#[tokio::test(start_paused = true)]
async fn the_final_refusal_is_a_response_with_the_reason_beside_it() {
    for status in [401, 403] {
        let world = World::new().await;
        let given = with_headers(answer(status, locked().into_body().collect().await.unwrap().to_bytes()));
        let headers = given.headers().clone();
        world.fal.will_answer(given);
        let (response, took) = timed(proxy(&world).oneshot(post())).await;
        let response = response.unwrap();
        assert_took(took, if status == 401 { RELOAD_WAIT } else { Duration::ZERO });
        assert_eq!((response.status().as_u16(), response.headers()), (status, &headers));
        let refusal = refusal_in(&response).unwrap().clone();
        assert_eq!((refusal.status().as_u16(), refusal.key_id().unwrap().as_str()), (status, "id-1"));
        if status == 403 {
            assert_eq!(refusal.reason(), Reason::AccountLocked(LockReason::ExhaustedBalance));
        }
        assert_eq!(response.body().size_hint().exact(), Some(refusal.body().len() as u64));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&body, refusal.body());
        assert_eq!(body, locked().into_body().collect().await.unwrap().to_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn three_mebibytes_pass_whole_with_trailers_and_size_hint() {
    const PIECES: u64 = 3 * 1024;
    for status in [401, 403] {
        let world = World::new().await;
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "7".parse().unwrap())]);
        let body = Lazy::new(PIECES, vec![b'a'; 1024]).trailers(trailers.clone()).exact();
        let read = body.read();
        world.fal.will_answer(answer_with(status, body));
        let response = proxy(&world).oneshot(post()).await.unwrap();
        assert_eq!(read.pieces(), 16, "the rest comes when it is wanted");
        assert_eq!(refusal_in(&response).unwrap().body().len(), 16 * 1024);
        let mut body = response.into_body();
        let mut left = PIECES * 1024;
        assert_eq!(body.size_hint().exact(), Some(left));
        while left > 0 {
            assert!(!body.is_end_stream());
            left -= body.frame().await.unwrap().unwrap().into_data().unwrap().len() as u64;
            assert_eq!(body.size_hint().exact(), Some(left));
        }
        assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(body.frame().await.is_none());
        assert!(read.to_its_end());
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_without_length_and_an_empty_one_keep_their_framing() {
    let world = World::new().await;
    world.fal.will_answer(answer_with(403, Lazy::new(2, "ab")));
    let body = proxy(&world).oneshot(post()).await.unwrap().into_body();
    assert_eq!((body.size_hint().lower(), body.size_hint().upper()), (0, None));
    assert_eq!(body.collect().await.unwrap().to_bytes(), "abab");

    world.fal.will_answer(answer(403, ""));
    let body = proxy(&world).oneshot(post()).await.unwrap().into_body();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
}

#[tokio::test(start_paused = true)]
async fn short_trailers_are_not_lost_in_what_was_read() {
    let world = World::new().await;
    let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "7".parse().unwrap())]);
    world.fal.will_answer(answer_with(403, Lazy::new(1, "{}").trailers(trailers.clone())));
    let collected = proxy(&world).oneshot(post()).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(collected.trailers(), Some(&trailers));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_goes_on_where_the_reading_stopped() {
    let world = World::new().await;
    world.fal.will_answer(answer_with(403, Lazy::new(3, "ab").hangs()));
    let (response, took) = timed(proxy(&world).oneshot(post())).await;
    assert_took(took, Duration::from_secs(1));
    let mut body = response.unwrap().into_body();
    for _ in 0..3 {
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
    }
    assert!(tokio::time::timeout(Duration::from_secs(60), body.frame()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_fails_fails_for_the_caller_at_the_same_place() {
    let world = World::new().await;
    world.fal.will_answer(answer_with(403, Lazy::new(2, "ab").fails()));
    let mut body = proxy(&world).oneshot(post()).await.unwrap().into_body();
    for _ in 0..2 {
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
    }
    assert!(!body.is_end_stream());
    assert_eq!(body.frame().await.unwrap().unwrap_err().to_string(), "the connection was reset");
    assert!(body.frame().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn it_reloads_and_sends_again_like_the_other() {
    let world = World::new().await;
    world.fal.knows_only(2);
    world.source.brings(2);
    let response = proxy(&world).oneshot(post()).await.unwrap();
    assert_eq!((response.status(), world.fal.keys(), world.reloads()), (StatusCode::OK, vec![1, 2], 1));
    assert!(refusal_in(&response).is_none(), "it was not refused in the end");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), r#"{"images":[]}"#);
}

#[tokio::test(start_paused = true)]
async fn the_refusal_of_the_second_attempt_is_the_one_that_passes() {
    let world = World::new().await;
    world.source.brings(2);
    world.fal.will_answer(answer(401, "the first"));
    world.fal.will_answer(answer(401, "the second"));
    let response = proxy(&world).oneshot(post()).await.unwrap();
    assert!(refusal_in(&response).unwrap().was_replayed());
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "the second");
}

#[tokio::test(start_paused = true)]
async fn a_response_that_is_none_of_ours_passes_and_has_no_refusal() {
    for status in [200, 401, 403, 500] {
        let world = World::new().await;
        world.fal.will_answer(with_headers(answer(status, "as it came")));
        let request = request(Method::POST, ELSEWHERE, "{}");
        let response = proxy(&world).oneshot(request).await.unwrap();
        assert!(refusal_in(&response).is_none());
        assert_eq!((response.status().as_u16(), response.headers().len()), (status, 3));
        assert_eq!(response.body().size_hint().exact(), Some(10));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "as it came");
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_fails_is_still_an_error() {
    let world = World::new().await;
    world.fal.will_fail("connection reset");
    assert!(matches!(proxy(&world).oneshot(post()).await, Err(FalAuthError::Transport(_))));
}

#[tokio::test(start_paused = true)]
async fn both_ways_to_ask_for_it_give_the_same_type() {
    let world = World::new().await;
    let client: Client<Passthrough> = tower_fal::layer(&world.store).passthrough().layer(world.fal.clone());
    let response: Response<PeekedBody<AnswerBody>> = client.oneshot(post()).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), Bytes::from(r#"{"images":[]}"#));
}
