//! How an answer goes out.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Response};
use http_body_util::{Either, Full, channel::Channel};
use serde_json::Value;

use super::{
    answer::{Answer, Content},
    connection::Connection,
    job::{Follow, Lines, Stage},
    request_id::request_id,
};

pub(super) type Body = Either<Full<Bytes>, Channel<Bytes>>;

/// How many events a stream has.
const EVENTS: usize = 3;

pub(super) fn response(answer: Answer, number: u64, connection: &Connection) -> Response<Body> {
    let body = match answer.content {
        Content::Nothing => Either::Left(Full::default()),
        Content::Json(value) => Either::Left(Full::from(value.to_string())),
        Content::Events(value) => Either::Right(events(value, connection)),
        Content::Statuses(job) => Either::Right(statuses(job, connection)),
        Content::Bytes(bytes) => Either::Left(Full::from(bytes)),
    };
    let mut response = Response::new(body);
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    if let Ok(id) = HeaderValue::try_from(request_id(number)) {
        response.headers_mut().insert("x-fal-request-id", id);
    }
    response
}

/// Sends each event as soon as the test allows it.
fn events(mut output: Value, connection: &Connection) -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(1);
    let mut allowed = connection.shared.events.subscribe();
    connection.tasks.spawn(async move {
        for event in 0..EVENTS {
            if allowed.wait_for(|allowed| event < *allowed).await.is_err() {
                return;
            }
            // Only an object has room for the number.
            if let Value::Object(fields) = &mut output {
                fields.insert("event".to_owned(), event.into());
            }
            if sender.send_data(format!("data: {output}\n\n").into()).await.is_err() {
                return;
            }
        }
    });
    body
}

/// Polls the job for each event that the test allows, until it is completed.
fn statuses(follow: Follow, connection: &Connection) -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(1);
    let mut allowed = connection.shared.events.subscribe();
    let shared = Arc::clone(&connection.shared);
    connection.tasks.spawn(async move {
        for event in 0.. {
            if allowed.wait_for(|allowed| event < *allowed).await.is_err() {
                return;
            }
            let polled = shared.state().job(&follow.app, &follow.id).map(|job| (job.poll(), job.logs(Lines::New)));
            // Many later ones may have pushed it out of the queue.
            let Some((stage, logs)) = polled else { return };
            let status = follow.status(stage, logs);
            let sent = sender.send_data(format!("data: {status}\n\n").into()).await;
            if sent.is_err() || matches!(stage, Stage::Completed(_)) {
                return;
            }
        }
    });
    body
}
