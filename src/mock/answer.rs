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
    application::{MAX_PARSED, output, run},
    connection::Connection,
    failure::ErrorType,
    received::Received,
    reply::Reply,
    request_id::request_id,
    send::{Body, response},
    socket::{self, Protocol, Socket},
    state::{Job, Stage, State},
    target::{Call, Host, Target, UPLOADS, authority},
};
use crate::credential::Credential;

/// How much of a refused upload is read, in bytes, before it is cut off.
const MAX_DISCARDED: usize = 16 * 1024 * 1024;

/// The answer to a request, and what the connection becomes if that was a handshake and is accepted.
pub(super) async fn answer(
    mut request: Request<Incoming>,
    connection: &Connection,
) -> (Response<Body>, Option<Socket>) {
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let target = Target::of(&head, &connection.plays);
    let shown = shown(&head, target.as_ref().ok());
    let shared = &connection.shared;
    let (number, next, latency, closes) = {
        let mut state = shared.state();
        let number = log(&mut state, &head, &shown);
        let next = decide(&mut state, &head, target, &shown, connection);
        (number, next, state.latency, state.close_on_refusal)
    };

    let mut close = false;
    let mut socket = None;
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
        Next::Connect(headers, protocol, path) => {
            socket = Some(Socket { upgrade, protocol, path: path.to_owned(), number });
            Reply::switching(headers)
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
    let mut response = response(reply, number, connection);
    // HTTP/2 has no such header.
    if close && head.version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    (response, socket)
}

/// The credentials that a request shows: its `authorization` headers, or its realtime token as the bearer that it is.
fn shown(head: &Parts, target: Option<&Target<'_>>) -> Vec<HeaderValue> {
    let headers: Vec<_> = head.headers.get_all(AUTHORIZATION).iter().cloned().collect();
    let is_realtime = target.is_some_and(|target| target.host == Host::Run && target.call == Call::Connect);
    if !headers.is_empty() || !is_realtime {
        return headers;
    }
    let query = head.uri.query().unwrap_or_default();
    let token = query.split('&').find_map(|pair| pair.strip_prefix("fal_jwt_token="));
    // The copy that this makes wipes itself.
    token.and_then(|token| Credential::bearer(token).ok()).map(|token| token.header().clone()).into_iter().collect()
}

fn log(state: &mut State, head: &Parts, shown: &[HeaderValue]) -> u64 {
    state.arrived(Received {
        method: head.method.clone(),
        host: authority(head).to_owned(),
        path: head.uri.path().to_owned(),
        version: head.version,
        presented: state.presented(shown),
        status: None,
    })
}

/// What follows once the head of a request is known.
enum Next<'a> {
    HangUp,
    /// Answer without waiting for the body.
    Reply(Reply),
    /// Accept the handshake with these headers, and talk about this path.
    Connect(HeaderMap, Protocol, &'a str),
    /// Read the body, and do what is asked.
    Perform(Target<'a>),
}

fn decide<'a>(
    state: &mut State,
    head: &Parts,
    target: Result<Target<'a>, &str>,
    shown: &[HeaderValue],
    connection: &Connection,
) -> Next<'a> {
    if let Some(failure) = state.next_failure(|failure| !failure.is_the_applications()) {
        return Reply::failure(failure).map_or(Next::HangUp, Next::Reply);
    }
    let target = match target {
        Ok(target) => target,
        Err(path) => return Next::Reply(Reply::detail(StatusCode::NOT_FOUND, format!("Path {path} not found"))),
    };
    let refusal = refusal(state, &target, shown);
    if target.call == Call::Connect {
        // A realtime token is looked at only once the socket is open.
        let by_token = !shown.is_empty() && !head.headers.contains_key(AUTHORIZATION);
        return match (refusal, socket::handshake(head)) {
            (Some(refusal), Ok(headers)) if by_token && refusal.status == StatusCode::UNAUTHORIZED => {
                Next::Connect(headers, Protocol::Refusal, target.path)
            }
            (Some(refusal), _) => Next::Reply(refusal),
            (None, Err(rule)) => Next::Reply(Reply::detail(StatusCode::BAD_REQUEST, rule)),
            (None, Ok(headers)) if target.host == Host::Ws => Next::Connect(headers, Protocol::Http, target.path),
            (None, Ok(headers)) => Next::Connect(headers, Protocol::Realtime, target.path),
        };
    }
    if let Some(refusal) = refusal {
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

fn refusal(state: &mut State, target: &Target<'_>, shown: &[HeaderValue]) -> Option<Reply> {
    if target.call == Call::Upload {
        // Its URL is all the permission that it needs.
        return None;
    }
    let looks_at = match target.call {
        Call::Status(id) | Call::Result(id) | Call::Cancel(id) => Some(id),
        _ => None,
    };
    if let Some(grant) = state.granted(shown) {
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
    let authorization = shown.first();
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

/// Reads the whole body, for what the application will put out.
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
    Ok(output(target.path, bytes, &kept))
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

/// Where a job stands, and the URLs by which to follow it.
fn queued(id: &str, app: &str, stage: Stage, head: &Parts, connection: &Connection) -> Reply {
    let path = format!("/{app}/requests/{id}");
    let url = connection.url(head, Host::Queue, &path);
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
    let url = |path: String| connection.url(head, Host::Storage, &path);
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
