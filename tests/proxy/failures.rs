//! What clients, networks and fal can do to the proxy. After each of them it serves the next request, and no answer holds
//! the key.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::body::Body;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
};
use tower_fal::{
    Credential, CredentialStore,
    proxy::{FalProxy, UploadBody},
    retry::ReplayBody,
    source,
};

use crate::{
    service::{Mock, read_until},
    support::{
        Answer, ConnectTo, Connection, KEY, PATIENCE, Raw, RawFal, SECRET, Server, Task, client, nobody, proxy,
        read_to_end, store,
    },
};

const RUN: &str = "https://fal.run/fal-ai/flux/dev";

/// A fal whose connections a test serves by hand.
struct ByHand {
    address: std::net::SocketAddr,
    connections: mpsc::UnboundedReceiver<Connection>,
    _accepting: Task,
}

impl ByHand {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (send, connections) = mpsc::unbounded_channel();
        let accepting = Task::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if send.send(Connection::new(stream)).is_err() {
                    return;
                }
            }
        });
        Self { address, connections, _accepting: accepting }
    }

    async fn next(&mut self) -> Connection {
        tokio::time::timeout(PATIENCE, self.connections.recv()).await.expect("nobody connects").unwrap()
    }

    /// The proxy still serves.
    async fn serves_another(&mut self, server: &Server) {
        let (answer, ()) = tokio::join!(server.send(Raw::post(RUN)), async {
            let mut connection = self.next().await;
            connection.request().await.unwrap();
            connection.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        });
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}

async fn is_closed(stream: &mut TcpStream) {
    let mut rest = [0; 4096];
    let reading = async { while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(PATIENCE, reading).await.expect("the connection is still open");
}

fn chunked(target: &str, chunk: &str) -> Vec<u8> {
    let head = Raw { body: "", ..Raw::post(target) }.line("transfer-encoding: chunked").bytes();
    [head, format!("{:x}\r\n{chunk}\r\n", chunk.len()).into_bytes()].concat()
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_request_before_its_head() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let mut leaving = server.connect().await;
    leaving.write_all(&Raw::post(RUN).bytes()).await.unwrap();
    let mut connection = fal.next().await;
    connection.request().await.unwrap();
    drop(leaving);
    is_closed(&mut connection.stream).await;
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_upload() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let mut leaving = server.connect().await;
    leaving.write_all(&chunked(RUN, "{\"half\":")).await.unwrap();
    let mut connection = fal.next().await;
    let head = connection.head().await.unwrap();
    assert!(head.contains("transfer-encoding: chunked"));
    drop(leaving);
    assert!(connection.request().await.is_none(), "the upload must not look complete");
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_stream() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let mut leaving = server.connect().await;
    leaving.write_all(&Raw::post(RUN).bytes()).await.unwrap();
    let mut connection = fal.next().await;
    connection.request().await.unwrap();
    let head =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
    connection.stream.write_all(head).await.unwrap();
    read_until(&mut leaving, "data: 1").await;
    drop(leaving);
    is_closed(&mut connection.stream).await;
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn an_upload_is_streamed_as_it_comes() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let mut stream = server.connect().await;
    stream.write_all(&chunked(RUN, "{\"first\":1,")).await.unwrap();
    let mut connection = fal.next().await;
    read_until(&mut connection.stream, "first").await;
    stream.write_all(b"b\r\n\"second\":2}\r\n0\r\n\r\n").await.unwrap();
    read_until(&mut connection.stream, "second").await;
    connection.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
    assert_eq!(Answer::parse(&read_to_end(&mut stream).await).status, 200);
}

#[tokio::test]
async fn what_breaks_after_sending_is_no_reason_to_send_again() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    // It closes; it closes in the head; it is no HTTP; it speaks another protocol.
    let ends: [&[u8]; 4] = [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ];
    for end in ends {
        let (answer, ()) = tokio::join!(server.send(Raw::post(RUN)), async {
            let mut connection = fal.next().await;
            connection.request().await.unwrap();
            connection.stream.write_all(end).await.unwrap();
        });
        assert_eq!((answer.status, answer.rule()), (500, Some("broken")), "{}", String::from_utf8_lossy(end));
        assert!(!answer.body.contains(SECRET));
    }
    // It resets the connection.
    let (answer, ()) = tokio::join!(server.send(Raw::post(RUN)), async {
        let connection = fal.next().await;
        // What has come and is not read makes the system reset the connection.
        connection.stream.readable().await.unwrap();
    });
    assert_eq!((answer.status, answer.rule()), (500, Some("broken")));
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn a_502_says_that_nothing_was_sent() {
    let nobody = nobody();
    let server = Server::new(proxy(nobody.local_addr().unwrap()).into_router()).await;
    let answer = server.send(Raw::post(RUN)).await;
    assert_eq!((answer.status, answer.rule()), (502, Some("not_connected")));
}

#[tokio::test]
async fn an_answer_that_ends_early_does_not_look_complete() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    for head in ["content-length: 9", "transfer-encoding: chunked"] {
        let (text, ()) = tokio::join!(async { server.raw(&Raw::post(RUN).bytes()).await }, async {
            let mut connection = fal.next().await;
            connection.request().await.unwrap();
            let text = format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n4\r\nhalf\r\n");
            let text = if head.contains("length") { format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\nhalf") } else { text };
            connection.stream.write_all(text.as_bytes()).await.unwrap();
        });
        let answer = Answer::parse(&text);
        assert_eq!(answer.status, 200);
        let is_short = answer.header("content-length") == Some("9") && answer.body.len() < 9;
        assert!(is_short || !answer.body.ends_with("0\r\n\r\n"), "{text}");
    }
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn an_answer_before_the_upload_ends_is_handed_on() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let mut stream = server.connect().await;
    stream.write_all(&chunked(RUN, "{\"half\":")).await.unwrap();
    let mut connection = fal.next().await;
    connection.head().await.unwrap();
    let early = b"HTTP/1.1 422 Unprocessable Entity\r\ncontent-length: 5\r\nconnection: close\r\n\r\nearly";
    connection.stream.write_all(early).await.unwrap();
    let begun = read_until(&mut stream, "early").await;
    assert!(begun.starts_with("HTTP/1.1 422"), "{begun}");
    drop(stream);
    fal.serves_another(&server).await;
}

#[tokio::test]
async fn informational_answers_are_passed_over() {
    let fal = RawFal::new(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    )
    .await;
    let server = Server::new(proxy(fal.address).into_router()).await;
    let answer = server.send(Raw::post(RUN)).await;
    assert_eq!((answer.status, &*answer.body), (200, "{}"));
    assert!(answer.header("link").is_none());
}

/// The refusal is one of the key's, so its start is read and the rest is handed on behind it.
#[tokio::test]
async fn an_error_of_a_gibibyte_passes_through() {
    const LENGTH: u64 = 1 << 30;
    for status in ["401 Unauthorized", "500 Internal Server Error"] {
        let mut fal = ByHand::new().await;
        let server = Server::new(proxy(fal.address).into_router()).await;
        let mut stream = server.connect().await;
        stream.write_all(&Raw::post(RUN).bytes()).await.unwrap();
        let mut connection = fal.next().await;
        connection.request().await.unwrap();
        let sending = Task::spawn(async move {
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {LENGTH}\r\n\r\n");
            connection.stream.write_all(head.as_bytes()).await.unwrap();
            let piece = vec![b'x'; 1 << 20];
            for _ in 0..LENGTH >> 20 {
                connection.stream.write_all(&piece).await.unwrap();
            }
        });
        let (mut read, mut buffer) = (0, vec![0; 1 << 20]);
        loop {
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                more => read += more as u64,
            }
        }
        drop(sending);
        assert!(read > LENGTH && read < LENGTH + 4096, "{status}: {read}");
    }
}

#[tokio::test]
async fn a_body_that_reaches_the_limit_in_a_chunk_is_cut_off() {
    let mut fal = ByHand::new().await;
    let server = Server::new(proxy(fal.address).max_body(64 * 1024).into_router()).await;
    let mut stream = server.connect().await;
    stream.write_all(&chunked(RUN, &"x".repeat(60 * 1024))).await.unwrap();
    let mut connection = fal.next().await;
    connection.head().await.unwrap();
    let _ = stream.write_all(format!("{:x}\r\n{}", 8 * 1024, "y".repeat(5 * 1024)).as_bytes()).await;
    let answer = Answer::parse(&read_to_end(&mut stream).await);
    assert_eq!((answer.status, answer.rule()), (413, Some("body_length")), "{answer:?}");
    assert!(connection.request().await.is_none(), "the upload must not look complete");
    fal.serves_another(&server).await;
}

/// A client over TLS, which trusts this certificate.
fn https(fal: std::net::SocketAddr, trusted: &CertifiedKey<rcgen::KeyPair>) -> FalProxy<Https> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.cert.der().clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let https = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1();
    let client = Client::builder(TokioExecutor::new()).build(https.wrap_connector(ConnectTo::new(fal)));
    FalProxy::over(&store(), client).allow_anonymous()
}

type Https = Client<hyper_rustls::HttpsConnector<ConnectTo>, ReplayBody<UploadBody<Body>>>;

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificate(name: &str) -> CertifiedKey<rcgen::KeyPair> {
    generate_simple_self_signed([name.to_owned()]).unwrap()
}

#[tokio::test]
async fn a_certificate_of_another_host_or_of_nobodys_is_not_accepted() {
    let (ours, others) = (certificate("fal.run"), certificate("evil.example"));
    for (of_server, trusted, status) in [(&ours, &ours, 200), (&others, &others, 502), (&ours, &others, 502)] {
        let config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![of_server.cert.der().clone()],
                of_server.signing_key.serialize_der().try_into().unwrap(),
            )
            .unwrap();
        let (listener, requests) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::<AtomicU64>::default());
        let (address, counted) = (listener.local_addr().unwrap(), Arc::clone(&requests));
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let _serving = Task::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                if stream.read_u8().await.is_ok() {
                    counted.fetch_add(1, Ordering::Relaxed);
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
                    let _ = stream.write_all(answer).await;
                }
            }
        });
        let server = Server::new(https(address, trusted).into_router()).await;
        let answer = server.send(Raw::post(RUN)).await;
        assert_eq!(answer.status, status, "{answer:?}");
        let sent = u64::from(status == 200);
        assert_eq!(requests.load(Ordering::Relaxed), sent);
        assert!(status == 200 || answer.rule() == Some("not_connected"));
    }
}

/// Tells at its end, also after a panic, that a worker holds no key any more.
struct Ended {
    worker: usize,
    earliest: Arc<[AtomicU64]>,
    one_more: Arc<Notify>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.earliest[self.worker].store(u64::MAX, Ordering::Relaxed);
        self.one_more.notify_one();
    }
}

/// Long bodies cannot be sent again, so the old key must be valid until the new one is in use.
#[tokio::test]
async fn keys_rotate_under_long_bodies_and_no_request_fails() {
    const REQUESTS: u64 = 2_000;
    const ROTATIONS: u64 = 10;
    const WORKERS: usize = 32;

    let mock = Mock::new().await;
    let in_use = Arc::new(AtomicU64::new(1));
    let current = Arc::clone(&in_use);
    let key = |number: u64| Credential::key(format!("id-{number}:secret-of-id-{number}")).unwrap();
    let source = source::from_fn("test", None, move || {
        let number = current.load(Ordering::Relaxed);
        async move { Ok(Credential::key(format!("id-{number}:secret-of-id-{number}"))?) }
    });
    let store = CredentialStore::builder(source).build().await.unwrap();
    let server =
        Arc::new(Server::new(FalProxy::over(&store, client(mock.address)).allow_anonymous().into_router()).await);

    let body = |length: usize| Arc::<str>::from(format!("{{\"prompt\":\"{}\"}}", "x".repeat(length)));
    let (long, longest) = (body(300 << 10), body(2 << 20));
    let (finished, one_more) = (Arc::<AtomicU64>::default(), Arc::<Notify>::default());
    let begun = Arc::<AtomicU64>::default();
    // Which key each worker's request can have at the earliest.
    let earliest: Arc<[AtomicU64]> = (0..WORKERS).map(|_| AtomicU64::new(1)).collect();
    let published = Arc::new(AtomicU64::new(1));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (server, long, longest) = (Arc::clone(&server), Arc::clone(&long), Arc::clone(&longest));
            let (begun, finished, one_more) = (Arc::clone(&begun), Arc::clone(&finished), Arc::clone(&one_more));
            let (earliest, published) = (Arc::clone(&earliest), Arc::clone(&published));
            let end = Ended { worker, earliest: Arc::clone(&earliest), one_more: Arc::clone(&one_more) };
            Task::spawn(async move {
                let _end = end;
                loop {
                    earliest[worker].store(published.load(Ordering::Relaxed), Ordering::Relaxed);
                    let number = begun.fetch_add(1, Ordering::Relaxed);
                    if number >= REQUESTS {
                        break;
                    }
                    let body = if number % 10 == 0 { &longest } else { &long };
                    let answer = server.send(Raw { body, ..Raw::post(RUN) }).await;
                    if answer.status == 200 {
                        finished.fetch_add(1, Ordering::Relaxed);
                    } else {
                        eprintln!("{}", answer.head);
                    }
                    one_more.notify_one();
                }
            })
        })
        .collect();
    let is_over = || earliest.iter().all(|earliest| earliest.load(Ordering::Relaxed) == u64::MAX);
    let until = async |is_so: &dyn Fn() -> bool| {
        while !is_so() && !is_over() {
            one_more.notified().await;
        }
    };
    for old in 1..=ROTATIONS {
        until(&|| finished.load(Ordering::Relaxed) >= old * (REQUESTS / (ROTATIONS + 1))).await;
        // As in the manual: the new key is valid before it is in use, and the old one until no request has it any more.
        let new = old + 1;
        mock.fal.accept(&key(new));
        in_use.store(new, Ordering::Relaxed);
        store.reload().await.unwrap();
        published.store(new, Ordering::Relaxed);
        until(&|| earliest.iter().all(|earliest| earliest.load(Ordering::Relaxed) >= new)).await;
        assert!(!is_over(), "the last key is used too");
        mock.fal.revoke(&key(old));
    }
    until(&|| false).await;
    drop(workers);
    assert_eq!(finished.load(Ordering::Relaxed), REQUESTS);
    assert_eq!(mock.fal.runs(), REQUESTS);
}

/// What the manual says about those that are too long to be sent again.
#[tokio::test]
async fn a_long_body_is_not_sent_again_when_its_key_is_revoked_first() {
    let mock = Mock::new().await;
    let server = Server::new(mock.proxy().into_router()).await;
    mock.fal.revoke(&Credential::key(KEY).unwrap());
    let body = format!("{{\"prompt\":\"{}\"}}", "x".repeat(300 << 10));
    let answer = server.send(Raw { body: &body, ..Raw::post(RUN) }).await;
    assert_eq!((answer.status, answer.rule()), (401, None));
    assert_eq!(mock.fal.runs(), 0);
}
