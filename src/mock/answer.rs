//! From a request to its answer: the outline first, then each of its steps.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CONNECTION},
    request::Parts,
};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use serde_json::{Value, json};

use super::{
    Received,
    connection::Connection,
    failure::{ErrorType, Failure},
    reply::{Body, Reply},
    state::{Job, Stage, State, request_id},
    target::{Call, Host, Target, UPLOADS, authority},
};

/// The longest body that is looked into for a `prompt`, in bytes. A longer one is only counted.
const MAX_PARSED: u64 = 64 * 1024;

/// How much of a refused upload is read, in bytes, before it is cut off.
const MAX_DISCARDED: usize = 16 * 1024 * 1024;

pub(super) async fn answer(request: Request<Incoming>, connection: &Connection) -> Response<Body> {
    let (head, body) = request.into_parts();
    let shared = &connection.shared;
    let (number, next, latency, closes) = {
        let mut state = shared.state();
        let number = log(&mut state, &head);
        let next = decide(&mut state, &head, connection);
        (number, next, state.latency, state.close_on_refusal)
    };

    let mut close = false;
    let reply = match next {
        Next::HangUp => {
            connection.hang_up.notify_one();
            // The connection takes this future along.
            std::future::pending().await
        }
        Next::Reply(reply) => {
            close = closes && reply.is_refusal();
            if !close {
                discard(body, connection);
            }
            reply
        }
        Next::Perform(target) => match read(&target, body).await {
            Ok(output) => perform(target, output, &head, number, connection),
            Err(_) => Reply::body_cut_off(),
        },
    };

    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    shared.state().answered(number, reply.status);
    let mut response = reply.into_response(number, connection);
    // HTTP/2 has no such header.
    if close && head.version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn log(state: &mut State, head: &Parts) -> u64 {
    let presented = state.presented(&head.headers);
    state.arrived(Received {
        method: head.method.clone(),
        host: authority(head).to_owned(),
        path: head.uri.path().to_owned(),
        version: head.version,
        presented,
        status: None,
    })
}

/// What follows once the head of a request is known.
enum Next<'a> {
    HangUp,
    /// Answer without waiting for the body.
    Reply(Reply),
    /// Read the body, and do what is asked.
    Perform(Target<'a>),
}

fn decide<'a>(state: &mut State, head: &'a Parts, connection: &Connection) -> Next<'a> {
    if let Some(failure) = state.next_failure(|failure| !failure.is_the_applications()) {
        return Reply::failure(failure).map_or(Next::HangUp, Next::Reply);
    }
    let target = match Target::of(head, &connection.plays) {
        Ok(target) => target,
        Err(path) => return Next::Reply(Reply::detail(StatusCode::NOT_FOUND, format!("Path {path} not found"))),
    };
    if let Some(refusal) = refusal(state, &target, &head.headers) {
        return Next::Reply(refusal);
    }
    let (Call::Status(id) | Call::Result(id) | Call::Cancel(id)) = target.call else { return Next::Perform(target) };
    let Some(job) = state.job(&target.app, id) else {
        return Next::Reply(Reply::queue(StatusCode::NOT_FOUND, "NOT_FOUND"));
    };
    Next::Reply(match target.call {
        Call::Status(_) => {
            let stage = job.poll();
            queued(id, &target.app, stage, head, connection)
        }
        Call::Cancel(_) => cancel(job),
        _ => job.complete().clone(),
    })
}

fn refusal(state: &mut State, target: &Target<'_>, headers: &HeaderMap) -> Option<Reply> {
    if target.call == Call::Upload {
        // Its URL is all the permission that it needs.
        return None;
    }
    let looks_at = match target.call {
        Call::Status(id) | Call::Result(id) | Call::Cancel(id) => Some(id),
        _ => None,
    };
    if let Some(grant) = state.granted(headers) {
        if !grant.permitted {
            return Some(match target.host {
                Host::Platform => Reply::platform_api(StatusCode::FORBIDDEN, "Access denied"),
                _ => Reply::detail(StatusCode::FORBIDDEN, "Insufficient permissions"),
            });
        }
        // A locked account can still look at what it has queued.
        let reason = state.lock.filter(|_| looks_at.is_none())?.as_str();
        return Some(Reply::detail(StatusCode::FORBIDDEN, format!("User is locked. Reason: {reason}.")));
    }
    let authorization = headers.get(AUTHORIZATION);
    if let (None, Some(id)) = (authorization, looks_at) {
        // fal looks for the request before it misses the key: without any key, an unknown id is just unknown.
        state.job(&target.app, id)?;
    }
    Some(match target.host {
        Host::Platform => Reply::platform_api(StatusCode::UNAUTHORIZED, "Authentication required"),
        _ => Reply::detail(StatusCode::UNAUTHORIZED, unauthorized(target, authorization)),
    })
}

/// Why a credential that is not valid is refused.
fn unauthorized(target: &Target<'_>, authorization: Option<&HeaderValue>) -> String {
    let Some(authorization) = authorization else {
        if target.host == Host::Rest {
            return "Authorization header is required".to_owned();
        }
        return format!(
            "Cannot access application \"{}\". Authentication is required to access this application.",
            target.app
        );
    };
    let mut words = authorization.as_bytes().splitn(2, |&byte| byte == b' ');
    let scheme = words.next().unwrap_or_default();
    let value = words.next().unwrap_or_default();
    if scheme.eq_ignore_ascii_case(b"Bearer") {
        if is_jwt(value) { "bearer: invalid token" } else { "bearer: unable to decode issuer" }
    } else if !value.contains(&b':') {
        "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
    } else {
        match target.host {
            Host::Queue => "invalid key credentials",
            _ => "No user found for Key ID and Secret",
        }
    }
    .to_owned()
}

/// Whether a token has three parts, of which the second holds claims. Who signed it is not looked at.
fn is_jwt(token: &[u8]) -> bool {
    let parts: Vec<_> = token.split(|&byte| byte == b'.').collect();
    let [_header, claims, _signature] = parts.as_slice() else { return false };
    URL_SAFE_NO_PAD
        .decode(claims)
        .is_ok_and(|claims| serde_json::from_slice::<Value>(&claims).is_ok_and(|claims| claims.is_object()))
}

/// Reads the whole body and says what came: the output of every application there is.
async fn read(target: &Target<'_>, mut body: Incoming) -> hyper::Result<Value> {
    let mut bytes: u64 = 0;
    let mut kept = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        bytes += data.len() as u64;
        if bytes <= MAX_PARSED {
            kept.extend_from_slice(&data);
        }
    }
    let mut output = json!({ "images": [], "seed": 0, "path": target.path, "bytes": bytes });
    if bytes <= MAX_PARSED
        && let Ok(Value::Object(mut input)) = serde_json::from_slice(&kept)
        && let Some(prompt) = input.remove("prompt")
    {
        output["prompt"] = prompt;
    }
    Ok(output)
}

/// Does what is asked, now that the whole request is there.
fn perform(target: Target<'_>, output: Value, head: &Parts, number: u64, connection: &Connection) -> Reply {
    match target.call {
        Call::Run => run(output, connection),
        Call::Stream => run(output, connection).streamed(),
        Call::Submit => {
            let reply = queued(&request_id(number), &target.app, Stage::Queued, head, connection);
            let output = run(output, connection);
            connection.shared.state().submit(number, Job { app: target.app, stage: Stage::Queued, output });
            reply
        }
        Call::Initiate => initiated(number, head, connection),
        _ => Reply::ok(output),
    }
}

/// Plays the application.
fn run(output: Value, connection: &Connection) -> Reply {
    let mut state = connection.shared.state();
    state.runs += 1;
    let failure = state.next_failure(Failure::is_the_applications);
    failure.and_then(Reply::failure).unwrap_or_else(|| Reply::application(StatusCode::OK, output))
}

/// Where a job stands, and the URLs by which to follow it.
fn queued(id: &str, app: &str, stage: Stage, head: &Parts, connection: &Connection) -> Reply {
    let path = format!("/{app}/requests/{id}");
    let url = connection.plays.url(&connection.shared, head, Host::Queue, &path);
    let mut body = json!({
        "request_id": id,
        "response_url": url,
        "status_url": format!("{url}/status"),
        "cancel_url": format!("{url}/cancel"),
    });
    body["status"] = match stage {
        Stage::Queued => {
            body["queue_position"] = 0.into();
            "IN_QUEUE".into()
        }
        Stage::InProgress => {
            body["logs"] = Value::Null;
            "IN_PROGRESS".into()
        }
        Stage::Done | Stage::Completed => {
            body["logs"] = Value::Null;
            "COMPLETED".into()
        }
    };
    Reply::ok(body)
}

fn cancel(job: &mut Job) -> Reply {
    if job.stage == Stage::Completed {
        return Reply::queue(StatusCode::BAD_REQUEST, "ALREADY_COMPLETED");
    }
    job.output = Reply::error(ErrorType::ClientCancelled);
    job.complete();
    Reply::queue(StatusCode::ACCEPTED, "CANCELLATION_REQUESTED")
}

/// Where to upload a file, and where it will be found.
fn initiated(number: u64, head: &Parts, connection: &Connection) -> Reply {
    let url = |path: String| connection.plays.url(&connection.shared, head, Host::Storage, &path);
    let id = request_id(number);
    Reply::ok(json!({
        "upload_url": url(format!("{UPLOADS}{id}?signature=of-the-mock")),
        "file_url": url(format!("/files/{id}")),
    }))
}

/// Reads the rest of an upload that was answered already, next to the answer.
///
/// A server that stops reading makes a client that only writes believe that the connection broke, and the answer
/// is lost; one that reads on without end is an open tap.
fn discard(mut body: Incoming, connection: &Connection) {
    if body.is_end_stream() {
        return;
    }
    connection.tasks.spawn(async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > MAX_DISCARDED {
                return;
            }
        }
    });
}
