//! Which host a request is for, and what it asks for.

use http::{
    Method,
    header::{HOST, UPGRADE},
    request::Parts,
    uri::Scheme,
};

use super::token::Form;

/// One of fal's hosts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    Run,
    Queue,
    /// HTTP over WebSockets.
    Ws,
    Rest,
    /// The Platform API.
    Platform,
    /// Where uploads go.
    Storage,
}

impl Host {
    /// Its name at fal.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Run => "fal.run",
            Self::Queue => "queue.fal.run",
            Self::Ws => "ws.fal.run",
            Self::Rest => "rest.fal.ai",
            Self::Platform => "api.fal.ai",
            Self::Storage => "v3.fal.media",
        }
    }

    /// What a path begins with where the name of the host does not say it.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Run => "/run",
            Self::Queue => "/queue",
            Self::Ws => "/ws",
            Self::Rest => "/rest",
            Self::Platform => "/api",
            Self::Storage => "/storage",
        }
    }

    /// The host that an authority names, if it is one of fal's. Only the first label counts.
    pub(super) fn named(authority: &str) -> Option<Self> {
        Some(match authority.split_once('.')?.0.to_ascii_lowercase().as_str() {
            "fal" | "falrun" => Self::Run,
            "queue" => Self::Queue,
            "ws" => Self::Ws,
            "rest" => Self::Rest,
            "api" => Self::Platform,
            "v3" | "v3b" => Self::Storage,
            _ => return None,
        })
    }

    /// The host that the beginning of a path names, and the rest of the path.
    fn prefixed(path: &str) -> Option<(Self, &str)> {
        let hosts = [Self::Run, Self::Queue, Self::Ws, Self::Rest, Self::Platform, Self::Storage];
        hosts.into_iter().find_map(|host| {
            let rest = path.strip_prefix(host.prefix())?;
            rest.starts_with('/').then_some((host, rest))
        })
    }
}

/// Which hosts a connection leads to, when the `host` of a request names none of fal's.
#[derive(Clone)]
pub(super) enum Plays {
    /// This one.
    One(Host),
    /// All of them. The beginning of the path says which. The scheme is that of the URLs in answers.
    All(Scheme),
}

/// What a request is about.
pub(super) struct Target<'a> {
    pub(super) host: Host,
    /// The path on that host.
    pub(super) path: &'a str,
    /// `owner/app`, with `workflows/` or `comfy/` before it if that is in the path; empty on the hosts that have none.
    pub(super) app: String,
    pub(super) call: Call<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call<'a> {
    Run,
    Stream,
    /// Opens a WebSocket. The host decides between the realtime protocol and HTTP.
    Connect,
    Submit,
    Status(&'a str),
    /// The status as a stream, which ends when the job does.
    StatusStream(&'a str),
    Result(&'a str),
    Cancel(&'a str),
    /// Asks for a realtime token.
    Mint(Form),
    /// Asks where to upload a file.
    Initiate,
    /// Asks where to upload a file in parts.
    InitiateParts,
    Upload,
    /// A part of an upload: the id of the upload, and the number of the part.
    Part(&'a str, &'a str),
    /// Says that all parts of an upload have been sent.
    Complete(&'a str),
    /// A browser asks whether a page may upload.
    Preflight,
    /// The public keys of the webhooks.
    WebhookKeys,
    /// Anything else on the hosts that run no application.
    Other,
}

impl<'a> Target<'a> {
    /// `Err` is the path, if fal would not know it.
    pub(super) fn of(head: &'a Parts, plays: &Plays) -> Result<Self, &'a str> {
        let path = head.uri.path();
        let (host, path) = match (Host::named(authority(head)), plays) {
            (Some(host), _) => (host, path),
            (None, Plays::One(host)) => (*host, path),
            (None, Plays::All(_)) => Host::prefixed(path).unwrap_or((Host::Run, path)),
        };
        let (app, call) = call(host, head, path).ok_or(path)?;
        Ok(Self { host, path, app, call })
    }
}

fn call<'a>(host: Host, head: &Parts, path: &'a str) -> Option<(String, Call<'a>)> {
    let method = &head.method;
    match host {
        Host::Run | Host::Queue | Host::Ws => {}
        Host::Rest => return Some((String::new(), rest(method, path))),
        Host::Platform => return Some((String::new(), Call::Other)),
        Host::Storage => return storage(method, path).map(|call| (String::new(), call)),
    }
    let segments: Vec<_> = path.split('/').skip(1).collect();
    let names = if segments.first().is_some_and(|first| NAMESPACES.contains(first)) { 3 } else { 2 };
    let (app, below) = segments.split_at_checked(names)?;
    if app.iter().any(|name| name.is_empty()) {
        return None;
    }
    let call = match (host, method, below) {
        (Host::Queue, &Method::POST, _) => Call::Submit,
        (Host::Queue, &Method::GET, ["requests", id, "status"]) => Call::Status(id),
        (Host::Queue, &Method::GET, ["requests", id, "status", "stream"]) => Call::StatusStream(id),
        (Host::Queue, &Method::GET, ["requests", id]) => Call::Result(id),
        (Host::Queue, &Method::PUT, ["requests", id, "cancel"]) => Call::Cancel(id),
        (Host::Queue, _, _) => return None,
        // This host takes only handshakes, so anything else is a wrong one.
        (Host::Ws, _, _) => Call::Connect,
        _ if wants_socket(head) => Call::Connect,
        (_, &(Method::POST | Method::GET), [.., "stream"]) => Call::Stream,
        _ => Call::Run,
    };
    Some((app.join("/"), call))
}

/// What stands before `owner/app` in the ids of some endpoints.
///
/// Source: `@fal-ai/client` 1.10.1 (`utils.ts`).
const NAMESPACES: [&str; 2] = ["workflows", "comfy"];

fn rest(method: &Method, path: &str) -> Call<'static> {
    match (method, path) {
        (&Method::POST, "/storage/upload/initiate") => Call::Initiate,
        (&Method::POST, "/storage/upload/initiate-multipart") => Call::InitiateParts,
        (&Method::POST, "/tokens/") => Call::Mint(Form::Aliases),
        (&Method::POST, "/tokens/realtime") => Call::Mint(Form::Paths),
        (&Method::GET, WEBHOOK_KEYS) => Call::WebhookKeys,
        _ => Call::Other,
    }
}

fn storage<'a>(method: &Method, path: &'a str) -> Option<Call<'a>> {
    let segments: Vec<_> = path.strip_prefix(UPLOADS)?.split('/').collect();
    Some(match (method, segments.as_slice()) {
        (&Method::OPTIONS, _) => Call::Preflight,
        (&Method::PUT, [id, part]) => Call::Part(id, part),
        (&Method::PUT, _) => Call::Upload,
        (&Method::POST, [id, "complete"]) => Call::Complete(id),
        _ => return None,
    })
}

/// Whether a request asks for a WebSocket, in the right form or not. Over HTTP/2 none does.
fn wants_socket(head: &Parts) -> bool {
    head.headers.get(UPGRADE).is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Where the public keys of the webhooks are.
pub(super) const WEBHOOK_KEYS: &str = "/.well-known/jwks.json";

/// What the path of an upload begins with.
pub(super) const UPLOADS: &str = "/upload/";

/// The host and port that a request is for: `:authority`, that of an absolute URI, or the `host` header. It may be
/// empty.
pub(super) fn authority(head: &Parts) -> &str {
    let in_uri = head.uri.authority().map(|authority| authority.as_str());
    let in_header = || head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let authority = in_uri.or_else(in_header).unwrap_or_default();
    // `user:password@` may come before it, and does not belong into a log.
    authority.rsplit('@').next().unwrap_or_default()
}
