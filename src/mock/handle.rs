//! From a request to its answer: the outline first, then each of its steps.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CONNECTION},
    request::Parts,
};
use hyper::body::{Body as _, Incoming};
use serde_json::json;

use super::{
    answer::Answer,
    application::{MAX_PARSED, output, run},
    connection::Connection,
    failure::{Failure, Point},
    job::{Follow, Lines, Stage},
    received::Received,
    refusal::{Credentials, refusal},
    request_id::request_id,
    send::{Body, response},
    socket::{self, Protocol, Socket},
    state::State,
    storage,
    target::{Call, Host, Target, UPLOADS, authority},
    upload::{self, Upload},
    webhook::Webhooks,
};

/// How much of a body is kept, in bytes, where content is kept.
const MAX_KEPT: usize = 1024 * 1024;

/// How much of a refused upload is read, in bytes, before it is cut off.
const MAX_READ_ON: u64 = 16 * 1024 * 1024;

/// Returns the answer to a request, and the WebSocket that its connection becomes if it was a handshake.
pub(super) async fn handle(
    mut request: Request<Incoming>,
    connection: &Arc<Connection>,
) -> (Response<Body>, Option<Socket>) {
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let target = Target::of(&head, &connection.plays);
    let credentials = Credentials::of(&head, target.as_ref().ok());
    let is_storage = target.as_ref().is_ok_and(|target| target.host == Host::Storage);
    let shared = &connection.shared;
    let (number, next, latency, closes, keep_content) = {
        let mut state = shared.state();
        let number = log(&mut state, &head, &credentials, target.as_ref().ok());
        let next = decide(&mut state, &head, target, &credentials, connection);
        (number, next, state.latency, state.close_on_refusal, state.keep_content)
    };

    let mut close = false;
    let mut socket = None;
    let answer = match next {
        Next::HangUp => {
            connection.hang_up.notify_one();
            // This future ends with its connection.
            std::future::pending().await
        }
        Next::Answer(answer) => {
            close = closes && answer.is_refusal();
            if !close {
                read_on(body, number, keep_content, connection);
            }
            answer
        }
        Next::Connect(headers, protocol, path) => {
            socket = Some(Socket { upgrade, protocol, path: path.to_owned(), number });
            Answer::switching(headers)
        }
        Next::Perform(target) => {
            let kept = if keep_content { MAX_KEPT } else { MAX_PARSED };
            match upload::read(body, kept, u64::MAX).await {
                Some(upload) => {
                    log_body(&upload, number, keep_content, connection);
                    perform(target, &upload, &head, number, connection)
                }
                None => Answer::body_cut_off(),
            }
        }
    };

    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    shared.state().log.add_status(number, answer.status);
    let mut response = response(answer, number, connection);
    if is_storage {
        storage::allow_every_origin(response.headers_mut());
    }
    // HTTP/2 has no such header.
    if close && head.version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    (response, socket)
}

/// Logs that a request has arrived, and returns its number.
fn log(state: &mut State, head: &Parts, credentials: &Credentials, target: Option<&Target<'_>>) -> u64 {
    let mut received = Received {
        method: head.method.clone(),
        host: authority(head).to_owned(),
        path: head.uri.path().to_owned(),
        version: head.version,
        presented: state.presented(credentials, target),
        status: None,
        query: None,
        headers: HeaderMap::new(),
        body_length: None,
        body: None,
    };
    if state.keep_content {
        received.query = head.uri.query().map(str::to_owned);
        received.headers = head.headers.clone();
        received.headers.remove(AUTHORIZATION);
    }
    state.log.add(received)
}

/// Logs that the body of a request has arrived.
fn log_body(upload: &Upload, number: u64, keep_content: bool, connection: &Connection) {
    let body = keep_content.then(|| Bytes::copy_from_slice(&upload.start));
    connection.shared.state().log.add_body(number, upload.length, body);
}

/// Reads the rest of an upload that was answered already, next to the answer.
///
/// When a server stops reading, a client that only writes believes that the connection broke, and the answer is lost.
/// When it reads on without end, anybody can keep it busy.
fn read_on(body: Incoming, number: u64, keep_content: bool, connection: &Arc<Connection>) {
    if body.is_end_stream() {
        return log_body(&Upload::default(), number, keep_content, connection);
    }
    let kept = if keep_content { MAX_KEPT } else { 0 };
    let connection = Arc::clone(connection);
    connection.tasks.clone().spawn(async move {
        if let Some(upload) = upload::read(body, kept, MAX_READ_ON).await {
            log_body(&upload, number, keep_content, &connection);
        }
    });
}

/// What follows from the head of a request.
enum Next<'a> {
    HangUp,
    /// Answer without waiting for the body.
    Answer(Answer),
    /// Accept the handshake with these headers, for this path.
    Connect(HeaderMap, Protocol, &'a str),
    /// Read the body, and do what is asked.
    Perform(Target<'a>),
}

fn decide<'a>(
    state: &mut State,
    head: &Parts,
    target: Result<Target<'a>, &str>,
    credentials: &Credentials,
    connection: &Connection,
) -> Next<'a> {
    let path = target.as_ref().map_or_else(|path| *path, |target| target.path);
    if let Some(failure) = state.next_failure(path, Point::Arrival) {
        return Answer::failure(failure).map_or(Next::HangUp, Next::Answer);
    }
    let target = match target {
        Ok(target) => target,
        Err(path) => return Next::Answer(unknown_path(path)),
    };
    let refusal = refusal(state, &target, credentials);
    if target.call == Call::Connect {
        // fal checks a realtime token only after the socket is open.
        return match (refusal, socket::handshake(head)) {
            (Some(refusal), Ok(headers)) if credentials.are_a_token && refusal.status == StatusCode::UNAUTHORIZED => {
                Next::Connect(headers, Protocol::Refusal, target.path)
            }
            (Some(refusal), _) => Next::Answer(refusal),
            (None, Err(rule)) => Next::Answer(Answer::detail(StatusCode::BAD_REQUEST, rule)),
            (None, Ok(headers)) if target.host == Host::Ws => Next::Connect(headers, Protocol::Http, target.path),
            (None, Ok(headers)) => Next::Connect(headers, Protocol::Realtime, target.path),
        };
    }
    if let Some(refusal) = refusal {
        return Next::Answer(refusal);
    }
    let (Call::Status(id) | Call::StatusStream(id) | Call::Result(id) | Call::Cancel(id)) = target.call else {
        return Next::Perform(target);
    };
    let Some(job) = state.job(&target.app, id) else {
        return Next::Answer(Answer::queue(StatusCode::NOT_FOUND, "NOT_FOUND"));
    };
    Next::Answer(match target.call {
        Call::Status(_) => {
            let follow = follow(id, &target.app, head, connection);
            let stage = job.poll();
            let logs = job.logs(if follow.with_logs { Lines::All } else { Lines::None });
            Answer::ok(follow.status(stage, logs))
        }
        Call::StatusStream(_) => Answer::statuses(follow(id, &target.app, head, connection)),
        Call::Cancel(_) if job.cancel() => Answer::queue(StatusCode::ACCEPTED, "CANCELLATION_REQUESTED"),
        Call::Cancel(_) => Answer::queue(StatusCode::BAD_REQUEST, "ALREADY_COMPLETED"),
        _ => job.result(),
    })
}

fn unknown_path(path: &str) -> Answer {
    Answer::detail(StatusCode::NOT_FOUND, format!("Path {path} not found"))
}

/// Carries out a request whose whole body has arrived.
fn perform(target: Target<'_>, upload: &Upload, head: &Parts, number: u64, connection: &Connection) -> Answer {
    let output = output(target.path, upload.length, &upload.start);
    let state = || connection.shared.state();
    match target.call {
        Call::Run => run(target.path, output, connection),
        Call::Stream => run(target.path, output, connection).streamed(),
        Call::Submit => {
            let follow = follow(&request_id(number), &target.app, head, connection);
            let failure = state().next_failure(target.path, Point::Queue);
            let outcome = match failure {
                Some(Failure::Job(error)) => Err(error),
                _ => Ok(run(target.path, output, connection)),
            };
            Webhooks::submitted(&connection.shared, head, &request_id(number), &outcome);
            state().submit(number, target.app, outcome);
            Answer::ok(follow.status(Stage::Queued, Vec::new()))
        }
        Call::Mint(form) => state().tokens.mint(form, &upload.start),
        Call::WebhookKeys => {
            let set = state().answer(target.path);
            set.or_else(|| connection.shared.webhooks.keys()).unwrap_or_else(|| unknown_path(target.path))
        }
        Call::Initiate => initiated(number, head, connection),
        Call::InitiateParts => {
            state().parts.begin(number);
            initiated(number, head, connection)
        }
        Call::Part(id, part) => state().parts.add(id, part, upload.length),
        Call::Complete(id) => state().parts.complete(id, &upload.start),
        Call::Preflight => Answer::preflight(),
        _ => Answer::ok(output),
    }
}

/// A job as the client that sent this request follows it.
fn follow(id: &str, app: &str, head: &Parts, connection: &Connection) -> Follow {
    let url = connection.url(head, Host::Queue, &format!("/{app}/requests/{id}"));
    let with_logs =
        head.uri.query().is_some_and(|query| query.split('&').any(|pair| matches!(pair, "logs=1" | "logs=true")));
    Follow { app: app.to_owned(), id: id.to_owned(), url, with_logs }
}

/// The URLs for the upload of a file and for the file.
fn initiated(number: u64, head: &Parts, connection: &Connection) -> Answer {
    let url = |path: String| connection.url(head, Host::Storage, &path);
    let id = request_id(number);
    Answer::ok(json!({
        "upload_url": url(format!("{UPLOADS}{id}?signature=of-the-mock")),
        "file_url": url(format!("/files/{id}")),
    }))
}
