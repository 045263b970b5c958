//! From a request to its answer: the outline first, then each of its steps.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST},
    request::Parts,
};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use serde_json::{Value, json};

use super::{
    Failure, Received, Shared,
    connection::{Connection, Host},
    state::{Job, State, request_id},
};

/// The longest body that is looked into for a `prompt`, in bytes. A longer one is only counted.
const MAX_PARSED: u64 = 64 * 1024;

/// How much of a refused upload is read, in bytes, before it is cut off.
const MAX_DISCARDED: usize = 16 * 1024 * 1024;

pub(super) async fn answer(request: Request<Incoming>, connection: &Connection) -> Response<Full<Bytes>> {
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
        Next::Run => match perform(&head, body).await {
            Ok(output) => Reply::ok(output),
            Err(_) => Reply::body_cut_off(),
        },
        Next::Submit { app } => match perform(&head, body).await {
            Ok(output) => submit(shared, number, app, output),
            Err(_) => Reply::body_cut_off(),
        },
    };

    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    shared.state().answered(number, reply.status);
    let mut response = reply.into_response(number);
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
enum Next {
    HangUp,
    /// Answer without waiting for the body.
    Reply(Reply),
    Run,
    Submit {
        app: String,
    },
}

fn decide(state: &mut State, head: &Parts, connection: &Connection) -> Next {
    match state.next_failure() {
        Some(Failure::Disconnect) => return Next::HangUp,
        Some(Failure::Status(status)) => {
            return Next::Reply(Reply::detail(status, status.canonical_reason().unwrap_or_default()));
        }
        None => {}
    }
    let path = head.uri.path();
    let Some(target) = Target::of(host(head, connection), &head.method, path) else {
        return Next::Reply(Reply::detail(StatusCode::NOT_FOUND, format!("Path {path} not found")));
    };
    if let Some(refusal) = refusal(state, &target, &head.headers) {
        return Next::Reply(refusal);
    }
    match target.call {
        Call::Run => Next::Run,
        Call::Submit => Next::Submit { app: target.app },
        Call::Status(id) => Next::Reply(match state.job(&target.app, id) {
            Some(job) => status(&connection.shared, id, job),
            None => Reply::unknown_id(),
        }),
        Call::Result(id) => Next::Reply(match state.job(&target.app, id) {
            Some(job) => Reply::ok(job.output.clone()),
            None => Reply::unknown_id(),
        }),
    }
}

/// What a request is about.
struct Target<'a> {
    host: Host,
    /// `owner/app`
    app: String,
    call: Call<'a>,
}

enum Call<'a> {
    Run,
    Submit,
    Status(&'a str),
    Result(&'a str),
}

impl<'a> Target<'a> {
    fn of(host: Host, method: &Method, path: &'a str) -> Option<Self> {
        if matches!(host, Host::Rest | Host::Platform) {
            return Some(Self { host, app: String::new(), call: Call::Run });
        }
        let mut segments = path.split('/').skip(1);
        let (owner, app) = (segments.next()?, segments.next()?);
        if owner.is_empty() || app.is_empty() {
            return None;
        }
        let below: Vec<_> = segments.collect();
        let call = match (host, method, below.as_slice()) {
            (Host::Run | Host::Rest | Host::Platform, _, _) => Call::Run,
            (Host::Queue, &Method::POST, _) => Call::Submit,
            (Host::Queue, &Method::GET, ["requests", id, "status"]) => Call::Status(id),
            (Host::Queue, &Method::GET, ["requests", id]) => Call::Result(id),
            (Host::Queue, _, _) => return None,
        };
        Some(Self { host, app: format!("{owner}/{app}"), call })
    }
}

fn refusal(state: &mut State, target: &Target<'_>, headers: &HeaderMap) -> Option<Reply> {
    if let Some(grant) = state.granted(headers) {
        if !grant.permitted {
            return Some(match target.host {
                Host::Platform => Reply::platform(StatusCode::FORBIDDEN, "Access denied"),
                _ => Reply::detail(StatusCode::FORBIDDEN, "Insufficient permissions"),
            });
        }
        // A locked account can still look at what it has queued.
        let reason = state.lock.filter(|_| matches!(target.call, Call::Run | Call::Submit))?.as_str();
        return Some(Reply::detail(StatusCode::FORBIDDEN, format!("User is locked. Reason: {reason}.")));
    }
    let authorization = headers.get(AUTHORIZATION);
    if let (None, Call::Status(id) | Call::Result(id)) = (authorization, &target.call) {
        // fal looks for the request before it misses the key: without any key, an unknown id is just unknown.
        state.job(&target.app, id)?;
    }
    Some(match target.host {
        Host::Platform => Reply::platform(StatusCode::UNAUTHORIZED, "Authentication required"),
        _ => Reply::detail(StatusCode::UNAUTHORIZED, unauthorized(target, authorization)),
    })
}

/// Why a credential that is not valid is refused.
fn unauthorized(target: &Target<'_>, authorization: Option<&HeaderValue>) -> String {
    let Some(authorization) = authorization else {
        if matches!(target.host, Host::Rest) {
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

/// Plays the application: reads the whole body and says what came.
async fn perform(head: &Parts, mut body: Incoming) -> hyper::Result<Value> {
    let mut bytes: u64 = 0;
    let mut kept = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        bytes += data.len() as u64;
        if bytes <= MAX_PARSED {
            kept.extend_from_slice(&data);
        }
    }
    let mut output = json!({ "images": [], "seed": 0, "path": head.uri.path(), "bytes": bytes });
    if bytes <= MAX_PARSED
        && let Ok(Value::Object(mut input)) = serde_json::from_slice(&kept)
        && let Some(prompt) = input.remove("prompt")
    {
        output["prompt"] = prompt;
    }
    Ok(output)
}

fn submit(shared: &Shared, number: u64, app: String, output: Value) -> Reply {
    let job = Job { app, polls: 0, output };
    let reply = queued(shared, &request_id(number), &job);
    shared.state().submit(number, job);
    reply
}

fn status(shared: &Shared, id: &str, job: &mut Job) -> Reply {
    let reply = queued(shared, id, job);
    job.polls += 1;
    reply
}

/// Where a job stands, and the URLs by which to follow it.
fn queued(shared: &Shared, id: &str, job: &Job) -> Reply {
    let url = format!("{}/{}/requests/{id}", shared.queue_origin(), job.app);
    let mut body = json!({
        "status": match job.polls { 0 => "IN_QUEUE", 1 => "IN_PROGRESS", _ => "COMPLETED" },
        "request_id": id,
        "response_url": url,
        "status_url": format!("{url}/status"),
        "cancel_url": format!("{url}/cancel"),
    });
    if job.polls == 0 {
        body["queue_position"] = 0.into();
    }
    Reply::ok(body)
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

struct Reply {
    status: StatusCode,
    body: Value,
}

impl Reply {
    fn ok(body: Value) -> Self {
        Self { status: StatusCode::OK, body }
    }

    fn detail(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, body: json!({ "detail": detail.into() }) }
    }

    /// The Platform API's form.
    fn platform(status: StatusCode, message: &str) -> Self {
        Self { status, body: json!({ "error": { "type": "authorization_error", "message": message } }) }
    }

    fn unknown_id() -> Self {
        Self { status: StatusCode::NOT_FOUND, body: json!({ "status": "NOT_FOUND" }) }
    }

    fn body_cut_off() -> Self {
        Self::detail(StatusCode::BAD_REQUEST, "The request body was cut off")
    }

    fn is_refusal(&self) -> bool {
        matches!(self.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
    }

    fn into_response(self, number: u64) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::from(self.body.to_string()));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Ok(id) = HeaderValue::try_from(request_id(number)) {
            response.headers_mut().insert("x-fal-request-id", id);
        }
        response
    }
}

fn host(head: &Parts, connection: &Connection) -> Host {
    let authority = authority(head).to_ascii_lowercase();
    match authority.split_once('.') {
        Some(("queue", _)) => Host::Queue,
        Some(("rest", _)) => Host::Rest,
        Some(("api", _)) => Host::Platform,
        _ => connection.host,
    }
}

/// Whom a request is meant for: `:authority`, an absolute URI's or the `host` header's; empty if there is none.
fn authority(head: &Parts) -> &str {
    let in_uri = head.uri.authority().map(|authority| authority.as_str());
    let in_header = || head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let authority = in_uri.or_else(in_header).unwrap_or_default();
    // `user:password@` may stand in front, and is nothing for a log.
    authority.rsplit('@').next().unwrap_or_default()
}
