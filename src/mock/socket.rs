//! WebSockets: the handshake, and the messages after it.

use std::time::Instant;

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue, Request, request::Parts};
use http_body_util::BodyExt as _;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, handshake::server::create_response, protocol::Role},
};

use super::{
    answer::{Answer, Content},
    application::{output, run},
    connection::Connection,
    request_id::request_id,
    send::response,
};

/// A connection whose handshake was accepted.
pub(super) struct Socket {
    pub(super) upgrade: OnUpgrade,
    pub(super) protocol: Protocol,
    pub(super) path: String,
    /// The number of the handshake.
    pub(super) number: u64,
}

/// Which messages answer which.
#[derive(Clone, Copy)]
pub(super) enum Protocol {
    /// `fal.run`: each message is an input, and is answered with its output.
    ///
    /// Source: `fal` 1.83.0 (`apps.py`), `@fal-ai/client` 1.10.1 (`realtime.ts`).
    Realtime,
    /// `fal.run` with a token that is not valid.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`realtime.ts`), which looks for exactly this message.
    Refusal,
    /// `ws.fal.run`: each message is the body of a request. Its response comes between a `start` and an `end`.
    ///
    /// Source: fal's documentation, "HTTP over WebSockets"; `fal` 1.83.0 (`apps.py`).
    Http,
}

/// The headers that accept a handshake. The error says which rule it breaks.
pub(super) fn handshake(head: &Parts) -> Result<HeaderMap, String> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.version_mut() = head.version;
    *request.headers_mut() = head.headers.clone();
    create_response(&request).map(|response| response.into_parts().0.headers).map_err(|error| error.to_string())
}

type Stream = WebSocketStream<TokioIo<Upgraded>>;

impl Socket {
    /// Answers messages until either side closes the socket.
    pub(super) async fn serve(self, connection: &Connection) -> tungstenite::Result<()> {
        let Self { upgrade, protocol, path, number } = self;
        // HTTP has ended on this connection, so the upgrade is ready now or never.
        let Ok(upgraded) = upgrade.await else { return Ok(()) };
        let mut stream = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        if let Protocol::Refusal = protocol {
            stream.send(text(&json!({ "status": "error", "error": "Unauthorized" }))).await?;
            stream.close(None).await?;
        }
        while let Some(message) = stream.next().await {
            let message = message?;
            // Pings and closes are answered by the stream itself.
            let (Message::Text(_) | Message::Binary(_)) = message else { continue };
            match protocol {
                Protocol::Realtime => realtime(&mut stream, message, &path, connection).await?,
                Protocol::Refusal => {}
                Protocol::Http => http(&mut stream, message, &path, number, connection).await?,
            }
        }
        Ok(())
    }
}

fn application(path: &str, input: &[u8], connection: &Connection) -> Answer {
    run(path, output(path, input.len() as u64, input), connection)
}

async fn realtime(
    stream: &mut Stream,
    message: Message,
    path: &str,
    connection: &Connection,
) -> tungstenite::Result<()> {
    let (is_text, input) = (message.is_text(), message.into_data());
    let answer = application(path, &input, connection);
    stream
        .send(match answer.content {
            content if !answer.status.is_success() => {
                let reason = if let Content::Json(body) = &content { body["detail"].as_str() } else { None };
                let reason = reason.unwrap_or_default();
                text(&json!({ "type": "x-fal-error", "error": "INTERNAL_ERROR", "reason": reason }))
            }
            Content::Bytes(bytes) => Message::Binary(bytes),
            Content::Json(output) if is_text => text(&output),
            // The mock reads no msgpack, so it returns that of the client.
            _ => Message::Binary(input),
        })
        .await
}

async fn http(
    stream: &mut Stream,
    message: Message,
    path: &str,
    number: u64,
    connection: &Connection,
) -> tungstenite::Result<()> {
    let begun = Instant::now();
    let answer = application(path, &message.into_data(), connection);
    let answer = if path.ends_with("/stream") { answer.streamed() } else { answer };
    let (head, mut body) = response(answer, number, connection).into_parts();
    let (id, status) = (request_id(number), head.status.as_u16());
    let header = |(name, value): (&HeaderName, &HeaderValue)| Some((name.to_string(), value.to_str().ok()?.into()));
    let headers: Map<String, Value> = head.headers.iter().filter_map(header).collect();
    stream.send(text(&json!({ "type": "start", "request_id": id, "status": status, "headers": headers }))).await?;
    let mut first_byte = None;
    while let Some(Ok(frame)) = body.frame().await {
        first_byte.get_or_insert_with(|| begun.elapsed().as_secs_f64());
        let data = frame.into_data().unwrap_or_default();
        stream.send(Message::text(String::from_utf8_lossy(&data).into_owned())).await?;
    }
    let end = json!({ "type": "end", "request_id": id, "status": status, "time_to_first_byte_seconds": first_byte });
    stream.send(text(&end)).await
}

fn text(value: &Value) -> Message {
    Message::text(value.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{StatusCode, Uri, header::AUTHORIZATION, uri::Scheme};
    use tokio::{
        io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
        net::TcpStream,
    };
    use tokio_tungstenite::{MaybeTlsStream, client_async, connect_async, tungstenite::client::IntoClientRequest as _};

    use super::*;
    use crate::{
        credential::Credential,
        mock::{Failure, Lock, MockFal, Presented},
    };

    const TOKEN: &str = "e30.e30.signature";

    /// How long a test waits for what must happen.
    const PATIENCE: Duration = Duration::from_secs(30);

    type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

    async fn accepting(text: &str) -> (MockFal, Credential) {
        let (fal, credential) = (MockFal::start().await.unwrap(), Credential::key(text).unwrap());
        fal.accept(&credential);
        (fal, credential)
    }

    fn handshake(url: &Uri, authorization: &str) -> Request<()> {
        let mut request = url.into_client_request().unwrap();
        if !authorization.is_empty() {
            request.headers_mut().insert(AUTHORIZATION, authorization.parse().unwrap());
        }
        request
    }

    async fn connect(url: Uri, authorization: &str) -> Client {
        connect_async(handshake(&url, authorization)).await.unwrap().0
    }

    /// The answer to a handshake that is not accepted.
    async fn refused(url: Uri, authorization: &str) -> (u16, Value) {
        let tungstenite::Error::Http(response) = connect_async(handshake(&url, authorization)).await.unwrap_err()
        else {
            panic!("not an answer")
        };
        (response.status().as_u16(), serde_json::from_slice(response.body().as_deref().unwrap()).unwrap())
    }

    /// What comes next, if anything does.
    async fn message<S>(socket: &mut WebSocketStream<S>) -> Option<tungstenite::Result<Message>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        tokio::time::timeout(PATIENCE, socket.next()).await.unwrap()
    }

    async fn next<S>(socket: &mut WebSocketStream<S>) -> Value
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let message = message(socket).await.unwrap().unwrap();
        assert!(message.is_text(), "{message:?}");
        serde_json::from_str(message.to_text().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn realtime_answers_text_with_text_and_bytes_with_bytes() {
        let (fal, credential) = accepting("id:secret").await;
        let mut socket = connect(fal.realtime_url("fal-ai/flux/realtime?max_buffering=1"), "Key id:secret").await;
        let runs = fal.runs();
        for _ in 0..2 {
            socket.send(Message::text(r#"{"prompt":"a cat"}"#)).await.unwrap();
            let expected =
                json!({"images": [], "seed": 0, "path": "/fal-ai/flux/realtime", "bytes": 18, "prompt": "a cat"});
            assert_eq!(next(&mut socket).await, expected);
        }
        socket.send(Message::binary(b"\x80".as_slice())).await.unwrap();
        assert_eq!(message(&mut socket).await.unwrap().unwrap(), Message::binary(b"\x80".as_slice()));
        assert_eq!(fal.runs() - runs, 3);

        socket.send(Message::Ping("are you there".into())).await.unwrap();
        assert_eq!(message(&mut socket).await.unwrap().unwrap(), Message::Pong("are you there".into()));
        socket.close(None).await.unwrap();
        assert!(matches!(message(&mut socket).await, Some(Ok(Message::Close(_)))));
        assert!(message(&mut socket).await.is_none());

        let [received] = fal.received().try_into().unwrap();
        assert_eq!(received.presented, Presented::Accepted(credential.key_id().cloned()));
        assert_eq!(received.status, Some(StatusCode::SWITCHING_PROTOCOLS));
        assert_eq!((received.method.as_str(), received.path.as_str()), ("GET", "/fal-ai/flux/realtime"));
    }

    #[tokio::test]
    async fn a_message_fails_and_the_socket_goes_on() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut socket = connect(fal.realtime_url("a/b/realtime"), "Key id:secret").await;
        fal.fail_next(1, Failure::Application(StatusCode::INTERNAL_SERVER_ERROR));
        socket.send(Message::text("{}")).await.unwrap();
        let expected = json!({
            "type": "x-fal-error", "error": "INTERNAL_ERROR", "reason": "The application has rules of its own",
        });
        assert_eq!(next(&mut socket).await, expected);
        socket.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut socket).await["bytes"], 2);
    }

    #[tokio::test]
    async fn each_message_is_answered_as_the_test_sets() {
        let (fal, _credential) = accepting("id:secret").await;
        fal.answer("a/b", json!({"meow": 1}));
        let mut realtime = connect(fal.realtime_url("a/b/realtime"), "Key id:secret").await;
        let mut http = connect(fal.ws_url("a/b"), "Key id:secret").await;
        realtime.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut realtime).await, json!({"meow": 1}));
        http.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut http).await["status"], 200);
        assert_eq!(next(&mut http).await, json!({"meow": 1}));

        fal.answer("a/b", Answer::json(json!({"detail": "no"})).status(StatusCode::FORBIDDEN));
        realtime.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut realtime).await["reason"], "no");
        fal.answer("a/b", Answer::bytes("application/msgpack", b"\x80".as_slice()));
        realtime.send(Message::binary(b"\x81".as_slice())).await.unwrap();
        assert_eq!(message(&mut realtime).await.unwrap().unwrap(), Message::binary(b"\x80".as_slice()));
    }

    #[tokio::test]
    async fn a_realtime_token_is_checked_inside_the_socket() {
        let fal = MockFal::start().await.unwrap();
        let url = fal.realtime_url(&format!("a/b/realtime?max_buffering=1&fal_jwt_token={TOKEN}"));
        let mut socket = connect(url.clone(), "").await;
        assert_eq!(next(&mut socket).await, json!({"status": "error", "error": "Unauthorized"}));
        assert_eq!(message(&mut socket).await.unwrap().unwrap(), Message::Close(None));
        assert_eq!(fal.received()[0].presented, Presented::Refused(None));

        fal.accept(&Credential::bearer(TOKEN).unwrap());
        let mut socket = connect(url.clone(), "").await;
        socket.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut socket).await["bytes"], 2);
        assert_eq!(fal.received()[1].presented, Presented::Accepted(None));

        // A header counts more than the token, and only the realtime protocol takes a token.
        assert_eq!(refused(url, "Key id:other").await.0, 401);
        assert_eq!(refused(fal.ws_url(&format!("a/b?fal_jwt_token={TOKEN}")), "").await.0, 401);
        assert_eq!(fal.runs(), 1);
        assert!(!format!("{:?}", fal.received()).contains(TOKEN));
    }

    /// Asks for a token as a client does.
    async fn mint(fal: &MockFal, path: &str, body: Value) -> String {
        let mut stream = TcpStream::connect(fal.rest_url("").authority().unwrap().as_str()).await.unwrap();
        let body = body.to_string();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Key id:secret\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        match serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap() {
            Value::String(token) => token,
            token => token["token"].as_str().unwrap().to_owned(),
        }
    }

    /// Whether a socket to this path opens for this token, or is refused within.
    async fn admits(fal: &MockFal, path: &str, token: &str) -> bool {
        let mut socket = connect(fal.realtime_url(&format!("{path}?fal_jwt_token={token}")), "").await;
        socket.send(Message::text("{}")).await.unwrap();
        let said = next(&mut socket).await;
        assert!(said["path"] == format!("/{path}") || said == json!({"status": "error", "error": "Unauthorized"}));
        said.get("path").is_some()
    }

    #[tokio::test]
    async fn a_minted_token_is_for_its_apps_alone() {
        let (fal, _credential) = accepting("id:secret").await;
        let by_alias =
            mint(&fal, "/tokens/", json!({"allowed_apps": ["flux", "other"], "token_expiration": 120})).await;
        let by_path =
            mint(&fal, "/tokens/realtime", json!({"allowed_apps": ["fal-ai/flux/realtime"], "duration": 120}));
        let by_path = by_path.await;
        for (path, alias, whole) in [
            ("fal-ai/flux/realtime", true, true),
            ("fal-ai/flux/other", true, false),
            ("someone/other/realtime", true, false),
            ("workflows/fal-ai/flux/realtime", true, false),
            ("fal-ai/sdxl/realtime", false, false),
            ("flux/sdxl/realtime", false, false),
        ] {
            assert_eq!(admits(&fal, path, &by_alias).await, alias, "{path}");
            assert_eq!(admits(&fal, path, &by_path).await, whole, "{path}");
        }
        // It is no bearer for anything else.
        let bearer = format!("Bearer {by_path}");
        assert_eq!(refused(fal.realtime_url("fal-ai/flux/realtime"), &bearer).await.0, 401);
        assert!(!format!("{:?}", fal.received()).contains(&by_path));
    }

    #[tokio::test(start_paused = true)]
    async fn a_minted_token_opens_sockets_until_its_life_ends() {
        let (fal, credential) = accepting("id:secret").await;
        let token = mint(&fal, "/tokens/realtime", json!({"app": "a/b/realtime", "duration": 120})).await;
        // The key is no longer asked.
        fal.revoke(&credential);
        let mut open = connect(fal.realtime_url(&format!("a/b/realtime?fal_jwt_token={token}")), "").await;
        tokio::time::advance(Duration::from_secs(119)).await;
        assert!(admits(&fal, "a/b/realtime", &token).await);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!admits(&fal, "a/b/realtime", &token).await);
        // A socket that is open stays so.
        open.send(Message::text("{}")).await.unwrap();
        assert!(open.next().await.unwrap().unwrap().is_text());
    }

    #[tokio::test]
    async fn a_stream_takes_a_token_for_its_path() {
        let (fal, _credential) = accepting("id:secret").await;
        let token = mint(&fal, "/tokens/realtime", json!({"app": "a/b/stream", "duration": 120})).await;
        let status = async |path: &str| {
            let mut stream = TcpStream::connect(fal.run_url("").authority().unwrap().as_str()).await.unwrap();
            let head = format!("POST {path}?fal_jwt_token={token} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            String::from_utf8_lossy(&answer[9..]).into_owned()
        };
        assert_eq!(status("/a/b/stream").await, "200");
        assert_eq!(status("/a/c/stream").await, "401");
        assert_eq!(status("/a/b").await, "401");
        assert_eq!(fal.runs(), 1);
    }

    #[tokio::test]
    async fn http_over_a_websocket_is_a_response_between_start_and_end() {
        let (fal, _credential) = accepting("id:secret").await;
        let mut socket = connect(fal.ws_url("fal-ai/flux"), "Key id:secret").await;
        for status in [200, 422] {
            if status == 422 {
                fal.fail_next(1, Failure::Application(StatusCode::UNPROCESSABLE_ENTITY));
            }
            socket.send(Message::text("{}")).await.unwrap();
            let start = next(&mut socket).await;
            assert_eq!((&start["type"], &start["status"]), (&json!("start"), &json!(status)));
            assert_eq!(start["headers"]["content-type"], "application/json");
            let body = next(&mut socket).await;
            assert_eq!(body.get("bytes"), (status == 200).then_some(&json!(2)));
            let end = next(&mut socket).await;
            assert_eq!((&end["type"], &end["status"]), (&json!("end"), &json!(status)));
            assert_eq!(end["request_id"], start["request_id"]);
            assert!(end["time_to_first_byte_seconds"].is_f64());
        }
        assert_eq!(fal.runs(), 2);
    }

    #[tokio::test]
    async fn a_stream_over_a_websocket_waits_event_by_event() {
        let (fal, _credential) = accepting("id:secret").await;
        fal.hold_events_after(0);
        let mut socket = connect(fal.ws_url("a/b/stream"), "Key id:secret").await;
        socket.send(Message::text("{}")).await.unwrap();
        assert_eq!(next(&mut socket).await["headers"]["content-type"], "text/event-stream");
        for event in 0..3 {
            let early = tokio::time::timeout(Duration::from_millis(20), socket.next()).await;
            assert!(early.is_err(), "event {event} came too early");
            fal.hold_events_after(event + 1);
            let message = message(&mut socket).await.unwrap().unwrap();
            let data = message.to_text().unwrap().strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
            assert_eq!(serde_json::from_str::<Value>(data).unwrap()["event"], event);
        }
        assert_eq!(next(&mut socket).await["type"], "end");
    }

    #[tokio::test]
    async fn a_handshake_is_refused_as_a_run_is() {
        let (fal, credential) = accepting("id:secret").await;
        let detail = |status: u16, detail: &str| (status, json!({ "detail": detail }));
        for url in [fal.ws_url("a/b"), fal.realtime_url("a/b/realtime")] {
            let nothing = r#"Cannot access application "a/b". Authentication is required to access this application."#;
            assert_eq!(refused(url.clone(), "").await, detail(401, nothing));
            let unknown = detail(401, "invalid key credentials");
            assert_eq!(refused(url.clone(), "Key id:other").await, unknown);
            let no_jwt = detail(401, "bearer: unable to decode issuer");
            assert_eq!(refused(url.clone(), "Bearer id:secret").await, no_jwt);
            fal.lock(Lock::Admin);
            assert_eq!(refused(url.clone(), "Key id:secret").await.0, 403);
            fal.unlock();
            fal.deny(&credential);
            assert_eq!(refused(url.clone(), "Key id:secret").await, detail(403, "Insufficient permissions"));
            fal.accept(&credential);
            fal.fail_next(1, Failure::Status(StatusCode::SERVICE_UNAVAILABLE));
            assert_eq!(refused(url.clone(), "Key id:secret").await.0, 503);
            fal.fail_next(1, Failure::Disconnect);
            assert!(!matches!(connect_async(handshake(&url, "")).await.unwrap_err(), tungstenite::Error::Http(_)));
            connect(url, "Key id:secret").await;
        }
        assert_eq!(fal.runs(), 0);
    }

    #[tokio::test]
    async fn a_wrong_handshake_is_a_bad_request() {
        let (fal, _credential) = accepting("id:secret").await;
        let upgrade = "upgrade: websocket\r\nconnection: upgrade\r\n";
        for (url, headers) in
            [(fal.ws_url("a/b"), ""), (fal.ws_url("a/b"), upgrade), (fal.realtime_url("a/b"), upgrade)]
        {
            let mut stream = TcpStream::connect(url.authority().unwrap().as_str()).await.unwrap();
            let head =
                format!("GET {} HTTP/1.1\r\nhost: x\r\nauthorization: Key id:secret\r\n{headers}\r\n", url.path());
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 400");
        }
        assert_eq!(fal.runs(), 0);
    }

    #[tokio::test]
    async fn a_served_connection_leads_to_both_protocols() {
        let (fal, _credential) = accepting("id:secret").await;
        for (url, first) in [
            ("wss://localhost/ws/a/b", "start"),
            ("wss://ws.fal.run/a/b", "start"),
            ("wss://localhost/run/a/b/realtime", "/a/b/realtime"),
            ("wss://fal.run/a/b/realtime", "/a/b/realtime"),
        ] {
            let (ours, theirs) = tokio::io::duplex(4096);
            tokio::spawn(fal.serve_connection(theirs, Scheme::HTTPS));
            let request = handshake(&Uri::from_static(url), "Key id:secret");
            let (mut socket, _) = client_async(request, ours).await.unwrap();
            socket.send(Message::text("{}")).await.unwrap();
            let said = next(&mut socket).await;
            assert_eq!(said.get("type").unwrap_or(&said["path"]), first, "{url}");
        }
    }

    #[tokio::test]
    async fn dropping_the_last_handle_ends_the_sockets() {
        let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let (fal, _credential) = accepting("id:secret").await;
        fal.hold_events_after(1);
        let mut idle = connect(fal.realtime_url("a/b"), "Key id:secret").await;
        let mut held = connect(fal.ws_url("a/b/stream"), "Key id:secret").await;
        held.send(Message::text("{}")).await.unwrap();
        for _ in 0..2 {
            message(&mut held).await.unwrap().unwrap();
        }
        drop(fal);
        for socket in [&mut idle, &mut held] {
            assert!(message(socket).await.is_none_or(|message| message.is_err()));
        }
        let wait = async {
            while alive() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap();
    }
}
