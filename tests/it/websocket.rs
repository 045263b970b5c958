//! WebSocket handshakes with the store's credential, over real sockets: tokio-tungstenite on one side, the mock on the
//! other.

use std::{error::Error as _, sync::Arc, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use http::{Request, StatusCode, Uri, header::AUTHORIZATION};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async, connect_async_tls_with_config,
    tungstenite::{Error, Message, client::IntoClientRequest as _},
};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer,
    error::{Classification, LockReason, Reason, classify},
    mock::{Lock, MockFal, Presented},
    origin::FalOrigins,
    store::Reloaded,
};

use crate::{
    mock_process::MockProcess,
    support::{Says, Script, example, key},
};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

fn loopback(store: &CredentialStore) -> FalAuthLayer {
    FalAuthLayer::new(store.clone()).origins(FalOrigins::new().loopback_http())
}

fn handshake(url: &Uri) -> Request<()> {
    url.into_client_request().unwrap()
}

async fn connect(store: &CredentialStore, url: &Uri) -> Result<Socket, Error> {
    let mut handshake = handshake(url);
    assert!(loopback(store).authorize(&mut handshake));
    connect_async(handshake).await.map(|(socket, _)| socket)
}

/// What a server makes of a handshake that is not accepted.
fn said(error: &Error, sent: &Credential) -> (StatusCode, Classification) {
    let Error::Http(response) = error else { panic!("no answer: {error}") };
    let body = response.body().as_deref().unwrap_or_default();
    (response.status(), classify(response.status(), response.headers(), body, Some(sent)))
}

/// Sends one input over `ws.fal.run`'s protocol, and returns the body of the response.
async fn ask(socket: &mut Socket) -> Value {
    socket.send(Message::text(r#"{"prompt":"a cat"}"#)).await.unwrap();
    let mut next = async || {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
        serde_json::from_str::<Value>(message.to_text().unwrap()).unwrap()
    };
    let (start, body, end) = (next().await, next().await, next().await);
    assert_eq!((&start["type"], &start["status"], &end["type"]), (&json!("start"), &json!(200), &json!("end")));
    body
}

fn accepted(n: u64) -> Presented {
    Presented::Accepted(key(n).key_id().cloned())
}

fn refused(n: u64) -> Presented {
    Presented::Refused(key(n).key_id().cloned())
}

fn presented(fal: &MockFal) -> Vec<Presented> {
    fal.received().into_iter().map(|received| received.presented).collect()
}

#[tokio::test]
async fn a_handshake_is_authenticated_on_both_socket_hosts() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let store = CredentialStore::fixed(key(1));
    let mut socket = connect(&store, &fal.ws_url("a/b")).await.unwrap();
    assert_eq!(ask(&mut socket).await["prompt"], "a cat");
    let mut socket = connect(&store, &fal.realtime_url("a/b/realtime")).await.unwrap();
    socket.send(Message::text(r#"{"prompt":"a cat"}"#)).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    assert!(answer.to_text().unwrap().contains(r#""prompt":"a cat""#));
    assert_eq!(presented(&fal), [accepted(1), accepted(1)]);
}

#[tokio::test]
async fn a_refused_handshake_is_classified_by_its_status_and_its_body() {
    let fal = MockFal::start().await.unwrap();
    let sent = key(1);
    let store = CredentialStore::fixed(sent.clone());
    for url in [fal.ws_url("a/b"), fal.realtime_url("a/b/realtime")] {
        let refusal = async || said(&connect(&store, &url).await.unwrap_err(), &sent);

        fal.revoke(&sent);
        let (status, unknown) = refusal().await;
        assert_eq!((status, unknown.reason), (StatusCode::UNAUTHORIZED, Reason::UnknownCredential));
        assert!(unknown.request_id.is_some());

        fal.deny(&sent);
        let (status, denied) = refusal().await;
        assert_eq!((status, denied.reason), (StatusCode::FORBIDDEN, Reason::InsufficientPermissions));

        fal.accept(&sent);
        fal.lock(Lock::ExhaustedBalance);
        let (status, locked) = refusal().await;
        let exhausted = Reason::AccountLocked(LockReason::ExhaustedBalance);
        assert_eq!((status, locked.reason), (StatusCode::FORBIDDEN, exhausted));
        fal.unlock();
    }
}

/// The open socket stays open.
#[tokio::test]
async fn a_handshake_after_a_rotation_has_the_new_credential() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.accept(&key(2));
    let script = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(script.clone()).build().await.unwrap();
    let url = fal.ws_url("a/b");
    let mut before = connect(&store, &url).await.unwrap();
    ask(&mut before).await;

    script.brings(2);
    assert!(matches!(store.reload().await, Ok(Reloaded::Changed(_))));
    let mut after = connect(&store, &url).await.unwrap();
    ask(&mut after).await;
    ask(&mut before).await;
    assert_eq!(presented(&fal), [accepted(1), accepted(2)]);
}

/// They succeed with the credential that it brings.
#[tokio::test]
async fn handshakes_refused_together_cost_one_load() {
    const SOCKETS: usize = 8;
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(2));
    let script = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(script.clone()).build().await.unwrap();
    let url = fal.ws_url("a/b");
    script.brings(2);
    let sockets = join_all((0..SOCKETS).map(async |_| {
        let sent = store.load();
        let error = connect(&store, &url).await.unwrap_err();
        assert_eq!(said(&error, sent.credential()).0, StatusCode::UNAUTHORIZED);
        // All of them have been refused before any of them asks.
        while presented(&fal).iter().filter(|presented| **presented == refused(1)).count() < SOCKETS {
            tokio::task::yield_now().await;
        }
        assert!(matches!(store.reload_past(sent.generation()).await, Ok(Reloaded::Changed(_))));
        ask(&mut connect(&store, &url).await.unwrap()).await;
    }));
    tokio::time::timeout(PATIENCE, sockets).await.unwrap();
    assert_eq!(script.loads(), 2);
    assert_eq!(presented(&fal)[SOCKETS..], vec![accepted(2); SOCKETS]);
}

#[tokio::test]
async fn a_refused_handshake_names_the_credential_it_was_sent_with() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(2));
    let store = CredentialStore::fixed(key(1));
    let sent = store.load();
    let mut handshake = handshake(&fal.ws_url("a/b"));
    handshake.extensions_mut().insert(sent.credential().clone());
    // A rotation between the two: what was loaded is what is sent.
    store.replace(key(2));
    assert!(loopback(&store).authorize(&mut handshake));
    connect_async(handshake).await.unwrap_err();
    assert_eq!(presented(&fal), [refused(1)]);
    assert!(matches!(store.reload_past(sent.generation()).await, Ok(Reloaded::Changed(_))));
    connect(&store, &fal.ws_url("a/b")).await.unwrap();
}

#[tokio::test]
async fn another_host_gets_no_credential() {
    let store = CredentialStore::fixed(key(1));
    for url in [
        "wss://ws.fal.run.example.com/a/b",
        "wss://example.com/ws.fal.run",
        "wss://notfal.run/a/b",
        "wss://ws.fal.run:8443/a/b",
        "ws://ws.fal.run/a/b",
        "ws://ws.fal.run.localhost/a/b",
    ] {
        let mut handshake = handshake(&Uri::from_static(url));
        assert!(!loopback(&store).authorize(&mut handshake), "{url}");
        assert!(!handshake.headers().contains_key(AUTHORIZATION), "{url}");
    }
    // As the socket sees it: to the default policy the mock is another host.
    let fal = MockFal::start().await.unwrap();
    let mut handshake = handshake(&fal.ws_url("a/b"));
    assert!(!store.authorize(&mut handshake));
    let error = connect_async(handshake).await.unwrap_err();
    assert_eq!(said(&error, &key(1)).1.reason, Reason::MissingCredential);
    assert_eq!(presented(&fal), [Presented::Nothing]);
}

/// A server that refuses a handshake and sends back what it was sent.
async fn echo() -> Uri {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/a/b", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let value = head.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap();
        let body = json!({"detail": format!("I know {value} well")}).to_string();
        let length = body.len();
        let answer = format!("HTTP/1.1 401 Unauthorized\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    url
}

#[tokio::test]
async fn the_secret_is_in_nothing_that_a_handshake_prints() {
    let fal = MockFal::start().await.unwrap();
    let store = CredentialStore::fixed(key(1));
    let mut printed = String::new();
    let mut handshake = handshake(&fal.ws_url("a/b"));
    assert!(loopback(&store).authorize(&mut handshake));
    printed += &format!("{handshake:?} {:?} {:?}", loopback(&store), fal);

    let refusal = connect_async(handshake).await.unwrap_err();
    let unreachable = connect(&store, &Uri::from_static("ws://127.0.0.1:1/a/b")).await.unwrap_err();
    for error in [refusal, unreachable] {
        printed += &format!("{error} {error:?} {:?}", error.source());
    }
    printed += &format!("{:?}", fal.received());

    // tungstenite's error holds whatever the peer sent; what is made of it does not.
    let echoed = connect(&store, &echo().await).await.unwrap_err();
    let echoed = said(&echoed, store.load().credential()).1;
    assert!(echoed.detail.as_ref().unwrap().starts_with("I know "));
    printed += &format!("{echoed:?}");

    assert!(printed.contains("id-1") && !printed.contains("secret-of-id-1"), "the secret was printed");
}

#[tokio::test]
async fn the_mock_as_a_process_takes_handshakes_over_tls() {
    let mock = MockProcess::start("id-1:secret-of-id-1", true).await;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(mock.ca()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = Connector::Rustls(Arc::new(config));
    let origin = mock.fal.replacen("https", "wss", 1);
    let url: Uri = format!("{origin}/ws/a/b").parse().unwrap();

    let connect = async |n: u64| {
        let origins = FalOrigins::new().and(&origin).unwrap();
        let mut handshake = handshake(&url);
        assert!(FalAuthLayer::new(CredentialStore::fixed(key(n))).origins(origins).authorize(&mut handshake));
        let connected = connect_async_tls_with_config(handshake, None, true, Some(connector.clone())).await;
        connected.map(|(socket, _)| socket)
    };
    assert_eq!(ask(&mut connect(1).await.unwrap()).await["path"], "/a/b");
    assert_eq!(said(&connect(2).await.unwrap_err(), &key(2)).1.reason, Reason::UnknownCredential);
    let received = mock.received().await;
    let seen = |n: usize| [&received["requests"][n]["presented"], &received["requests"][n]["status"]];
    assert_eq!([seen(0), seen(1)], [[&json!("accepted"), &json!(101)], [&json!("refused"), &json!(401)]]);
}

#[tokio::test]
async fn the_example_is_refused_reloads_and_says_why_in_the_end() {
    let output = example("websocket").output().await.unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    for expected in [
        r#""prompt":"a lighthouse""#,
        "authorize() says false",
        r#""prompt":"a lighthouse at night""#,
        r#"the store now has Credential { scheme: Key, key_id: "second-key" }"#,
        "UnknownCredential: fal does not know key `second-key`",
    ] {
        assert!(printed.contains(expected), "{expected}: {printed}");
    }
    assert!(!printed.contains("websocket-secret"));
}

#[tokio::test]
async fn the_example_says_what_is_missing_for_the_real_fal() {
    let mut command = example("websocket");
    for variable in ["FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"] {
        command.env_remove(variable);
    }
    let output = command.args(["--live", "a/b", "{}"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("set FAL_KEY"));
}
