//! Bodies that are sent again, over real sockets: what reaches the peer, and what becomes of the upload that is over.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Request, Response, StatusCode, Version,
    header::{AUTHORIZATION, CONTENT_LENGTH, TRAILER, TRANSFER_ENCODING},
};
use http_body_util::{BodyExt as _, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{
    CredentialStore, FalAuth, FalAuthError, FalRetry, FalRetryLayer,
    error::{Reason, Refusal},
    mock::{MockFal, Presented},
    origin::FalOrigins,
    retry::ReplayBody,
};

use crate::support::{Says, Script, key};

mod failed_body;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

const UNKNOWN_KEY: &str = r#"{"detail":"invalid key credentials"}"#;

const PROTOCOLS: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Protocol {
    Http1,
    Http2,
}

type Stack<B> = FalRetry<FalAuth<Client<HttpConnector, ReplayBody<B>>>>;
type AnyBody = UnsyncBoxBody<Bytes, Infallible>;

fn http_client<B>(protocol: Protocol) -> Client<HttpConnector, B>
where
    B: Body<Data: Send> + Send,
{
    Client::builder(TokioExecutor::new()).http2_only(protocol == Protocol::Http2).build_http()
}

/// The client that a user has, and its retry layer, which tells of the memory.
fn fal<B>(
    protocol: Protocol,
    store: &CredentialStore,
    set: fn(FalRetryLayer) -> FalRetryLayer,
) -> (Stack<B>, FalRetryLayer)
where
    B: Body<Data: Send> + Send + Unpin,
    ReplayBody<B>: Body<Data: Send>,
{
    let mut memory = None;
    let layer = tower_fal::layer(store).auth(|auth| auth.origins(FalOrigins::new().loopback_http())).retry(|retry| {
        let retry = set(retry);
        memory = Some(retry.clone());
        retry
    });
    (layer.layer(http_client(protocol)), memory.unwrap())
}

fn as_it_is(layer: FalRetryLayer) -> FalRetryLayer {
    layer
}

/// A store with the key that peers here refuse.
fn revoked() -> CredentialStore {
    CredentialStore::fixed(key(1))
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

#[track_caller]
fn refusal<T>(result: Result<T, FalAuthError>) -> Refusal {
    match result {
        Err(FalAuthError::Unauthorized(refusal)) => refusal,
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("it was accepted"),
    }
}

/// A server that refuses the first key, accepts any other, and notes what it gets.
#[derive(Clone)]
struct Peer {
    address: SocketAddr,
    refuses: When,
    refusal: Bytes,
    /// Whose key is replaced when the first one was refused.
    store: Option<CredentialStore>,
    log: Arc<watch::Sender<Log>>,
}

#[derive(Clone, Copy, PartialEq)]
enum When {
    AfterTheBody,
    /// And goes on reading.
    AfterTheFirstFrame,
}

#[derive(Clone, Default)]
struct Log {
    connections: usize,
    heads: usize,
    /// Those that have ended, one way or another.
    uploads: Vec<Upload>,
}

#[derive(Clone, Debug)]
struct Upload {
    connection: usize,
    key: String,
    sent: Sent,
}

/// What a peer can tell of an upload.
#[derive(Clone, Debug, PartialEq)]
struct Sent {
    version: Version,
    length: Option<String>,
    encoding: Option<String>,
    bytes: Vec<u8>,
    trailers: Option<HeaderMap>,
    complete: bool,
}

impl Peer {
    async fn start(refuses: When, store: Option<&CredentialStore>) -> Self {
        Self::start_with(refuses, store, Bytes::from(UNKNOWN_KEY)).await
    }

    async fn start_with(refuses: When, store: Option<&CredentialStore>, refusal: Bytes) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let peer = Self { address, refuses, refusal, store: store.cloned(), log: Arc::default() };
        tokio::spawn(peer.clone().listen(listener));
        peer
    }

    async fn listen(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            self.log.send_modify(|log| log.connections += 1);
            let (peer, connection) = (self.clone(), self.log.borrow().connections);
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let peer = peer.clone();
                    async move { Ok::<_, Infallible>(peer.answer(request, connection).await) }
                });
                // How it ends is in the log of uploads.
                let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>, connection: usize) -> Response<Full<Bytes>> {
        self.log.send_modify(|log| log.heads += 1);
        let header = |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let mut upload = Upload {
            connection,
            key: header(AUTHORIZATION).unwrap_or_default(),
            sent: Sent {
                version: request.version(),
                length: header(CONTENT_LENGTH),
                encoding: header(TRANSFER_ENCODING),
                bytes: Vec::new(),
                trailers: None,
                complete: false,
            },
        };
        let refused = upload.key == *key(1).header();
        let mut body = request.into_body();
        if refused && self.refuses == When::AfterTheFirstFrame {
            upload.sent.read_frame(&mut body).await;
            let log = Arc::clone(&self.log);
            tokio::spawn(async move {
                while upload.sent.read_frame(&mut body).await {}
                log.send_modify(|log| log.uploads.push(upload));
            });
        } else {
            while upload.sent.read_frame(&mut body).await {}
            self.log.send_modify(|log| log.uploads.push(upload));
        }
        if !refused {
            return Response::new(Full::default());
        }
        if let Some(store) = &self.store {
            store.replace(key(2));
        }
        let mut response = Response::new(Full::new(self.refusal.clone()));
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        response
    }

    fn post<B>(&self, body: B) -> Request<B> {
        Request::post(format!("http://{}/fal-ai/flux/dev", self.address))
            .header(TRAILER, "x-checksum") // HTTP/1.1 sends none that were not announced
            .body(body)
            .unwrap()
    }

    async fn log_where(&self, wanted: impl Fn(&Log) -> bool) -> Log {
        within(self.log.subscribe().wait_for(wanted)).await.unwrap().clone()
    }

    async fn uploads(&self, count: usize) -> Vec<Upload> {
        self.log_where(|log| log.uploads.len() >= count).await.uploads
    }
}

impl Sent {
    /// Whether there may be more.
    async fn read_frame(&mut self, body: &mut Incoming) -> bool {
        match body.frame().await {
            None => {
                self.complete = true;
                return false;
            }
            Some(Err(_)) => return false,
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => self.bytes.extend_from_slice(&data),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            },
        }
        true
    }
}

/// A body in pieces, which states its length or does not.
struct Pieces {
    frames: VecDeque<Frame<Bytes>>,
    length: Option<u64>,
}

impl Pieces {
    fn new<const N: usize>(pieces: [&'static str; N]) -> Self {
        Self { frames: pieces.map(|piece| Frame::data(piece.into())).into(), length: None }
    }

    fn sized(mut self) -> Self {
        self.length = Some(self.frames.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum());
        self
    }

    fn and_trailers(self) -> Self {
        self.and_trailers_of(&["x-checksum"])
    }

    fn and_trailers_of(mut self, names: &[&str]) -> Self {
        let trailers = names.iter().map(|name| (name.parse().unwrap(), "12".parse().unwrap()));
        self.frames.push_back(Frame::trailers(HeaderMap::from_iter(trailers)));
        self
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = self.frames.pop_front();
        if let (Some(length), Some(data)) = (&mut self.length, frame.as_ref().and_then(Frame::data_ref)) {
            *length -= data.len() as u64;
        }
        Poll::Ready(frame.map(Ok))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// A body that is still being made. Who makes it is told when it is dropped: `closed()` of the sender.
struct Unfinished {
    pieces: mpsc::Receiver<Bytes>,
    length: Option<u64>,
}

impl Unfinished {
    fn new(length: Option<u64>) -> (mpsc::Sender<Bytes>, Self) {
        let (sender, pieces) = mpsc::channel(1);
        (sender, Self { pieces, length })
    }
}

impl Body for Unfinished {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = ready!(self.pieces.poll_recv(cx));
        if let (Some(length), Some(piece)) = (&mut self.length, &piece) {
            *length -= piece.len() as u64;
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Every way to frame a body.
fn bodies() -> Vec<(&'static str, fn() -> AnyBody)> {
    vec![
        ("none", || Empty::new().boxed_unsync()),
        ("an empty text", || Full::default().boxed_unsync()),
        ("one piece", || Full::from("hello").boxed_unsync()),
        ("of known length", || Pieces::new(["hel", "", "lo"]).sized().boxed_unsync()),
        ("a stream", || Pieces::new(["hel", "", "lo"]).boxed_unsync()),
        ("an empty stream", || Pieces::new([]).boxed_unsync()),
        ("a stream of nothing", || Pieces::new(["", ""]).boxed_unsync()),
        ("a stream with trailers", || Pieces::new(["hel", "lo"]).and_trailers().boxed_unsync()),
        ("nothing but trailers", || Pieces::new([]).and_trailers().boxed_unsync()),
        ("a long stream", || {
            const PIECE: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
            Pieces::new([PIECE; 2048]).and_trailers().boxed_unsync()
        }),
    ]
}

#[tokio::test]
async fn a_replay_has_the_bytes_trailers_and_framing_of_the_upload() {
    for protocol in PROTOCOLS {
        for (name, body) in bodies() {
            let store = revoked();
            let peer = Peer::start(When::AfterTheBody, Some(&store)).await;
            let plain = within(http_client(protocol).request(peer.post(body()))).await.unwrap();
            assert_eq!(plain.status(), StatusCode::OK);

            let (fal, memory) = fal(protocol, &store, as_it_is);
            let response = within(fal.oneshot(peer.post(body()))).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK, "{protocol:?}, {name}");

            let uploads = peer.uploads(3).await;
            let [plain, first, second] = &uploads[..] else { panic!("{} uploads", uploads.len()) };
            assert!(plain.sent.complete);
            assert_eq!(first.sent, plain.sent, "first, {protocol:?}, {name}");
            assert_eq!(second.sent, plain.sent, "second, {protocol:?}, {name}");
            assert_eq!(
                (&*first.key, &*second.key),
                (key(1).header().to_str().unwrap(), key(2).header().to_str().unwrap())
            );
            assert_eq!(memory.replay_memory_used(), 0, "{protocol:?}, {name}");
        }
    }
}

/// Nor does the account that they act for.
#[tokio::test]
async fn a_credential_in_the_trailers_does_not_go_to_fal() {
    const NAMES: [&str; 5] = ["authorization", "x-checksum", "cookie", "proxy-authorization", "x-fal-user-id"];
    for protocol in PROTOCOLS {
        for body in [|| Pieces::new(["hel", "lo"]), || Pieces::new([])] {
            let store = revoked();
            let peer = Peer::start(When::AfterTheBody, Some(&store)).await;
            let (fal, memory) = fal(protocol, &store, as_it_is);
            let mut request = peer.post(body().and_trailers_of(&NAMES));
            request.headers_mut().insert(TRAILER, NAMES.join(", ").parse().unwrap());
            within(fal.clone().oneshot(request)).await.unwrap();
            // A map of trailers of which none is left, and a map that was empty.
            for names in [&["cookie"][..], &[]] {
                within(fal.clone().oneshot(peer.post(body().and_trailers_of(names)))).await.unwrap();
            }
            let uploads = peer.uploads(4).await;
            for Upload { sent, .. } in &uploads[..2] {
                let trailers = sent.trailers.as_ref().unwrap();
                assert_eq!(trailers.keys().collect::<Vec<_>>(), ["x-checksum"], "{protocol:?}");
            }
            for Upload { sent, .. } in &uploads[2..] {
                assert!(sent.trailers.as_ref().is_none_or(HeaderMap::is_empty), "{protocol:?}");
            }
            assert!(uploads.iter().all(|upload| upload.sent.complete));
            assert_eq!(memory.replay_memory_used(), 0);
        }
    }
}

#[tokio::test]
async fn trailers_and_framing_are_there_to_be_lost() {
    // What the test above relies on: the table has uploads of each kind, as the peer sees them.
    for protocol in PROTOCOLS {
        let (mut lengths, mut chunked, mut trailers) = (0, 0, 0);
        for (_, body) in bodies() {
            let peer = Peer::start(When::AfterTheBody, None).await;
            within(http_client(protocol).request(peer.post(body()))).await.unwrap();
            let Sent { length, encoding, trailers: sent, .. } = peer.uploads(1).await.remove(0).sent;
            lengths += usize::from(length.is_some_and(|length| length != "0"));
            chunked += usize::from(encoding.is_some());
            trailers += usize::from(sent.is_some());
        }
        assert_eq!((lengths, trailers), (2, 3), "{protocol:?}");
        assert_eq!(chunked, if protocol == Protocol::Http1 { 6 } else { 0 });
    }
}

/// The peer reads on while the second attempt is sent.
#[tokio::test]
async fn a_refusal_during_an_upload_is_followed_by_the_whole_body() {
    for protocol in PROTOCOLS {
        for length in [None, Some(11)] {
            let store = revoked();
            let peer = Peer::start(When::AfterTheFirstFrame, Some(&store)).await;
            let (fal, memory) = fal(protocol, &store, as_it_is);
            let (sender, body) = Unfinished::new(length);
            let answered = tokio::spawn(fal.oneshot(peer.post(body)));

            sender.send("hello ".into()).await.unwrap();
            peer.log_where(|log| log.heads == 2).await; // sent again, while the rest is not there yet
            sender.send("world".into()).await.unwrap();
            drop(sender);

            let response = within(answered).await.unwrap().unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let uploads = peer.uploads(2).await;
            let first = uploads.iter().find(|upload| upload.key == *key(1).header()).unwrap();
            let second = uploads.iter().find(|upload| upload.key == *key(2).header()).unwrap();
            assert!(!first.sent.complete, "{protocol:?}: the upload that was given up looks complete");
            assert_eq!(first.sent.bytes, b"hello ");
            assert!(second.sent.complete);
            assert_eq!(second.sent.bytes, b"hello world");
            assert_eq!((&first.sent.length, &first.sent.encoding), (&second.sent.length, &second.sent.encoding));
            assert_eq!(memory.replay_memory_used(), 0);
        }
    }
}

/// The body is dropped.
#[tokio::test]
async fn a_typed_refusal_during_an_upload_ends_it_with_an_error() {
    for protocol in PROTOCOLS {
        let peer = Peer::start(When::AfterTheFirstFrame, None).await;
        let (fal, memory) = fal(protocol, &revoked(), as_it_is);
        let (sender, body) = Unfinished::new(None);
        let answered = tokio::spawn(fal.oneshot(peer.post(body)));

        sender.send("hello".into()).await.unwrap();
        let refusal = refusal(within(answered).await.unwrap());
        assert_eq!(refusal.reason(), Reason::UnknownCredential);
        assert!(sender.is_closed(), "the body is still there");
        assert_eq!(memory.replay_memory_used(), 0);

        let upload = peer.uploads(1).await.remove(0).sent;
        assert!(!upload.complete, "{protocol:?}: the upload that was given up looks complete");
        assert_eq!(upload.bytes, b"hello");
    }
}

/// The answer is no refusal. The memory for a replay is freed.
#[tokio::test]
async fn an_early_answer_lets_the_upload_go_on() {
    for protocol in PROTOCOLS {
        let peer = Peer::start(When::AfterTheFirstFrame, None).await;
        // Not stamped, as it is not sent to an origin that was admitted: a 401 like any other answer.
        let layer = tower_fal::FalRetryLayer::new(revoked());
        let fal = layer.layer(http_client(protocol));
        let (sender, body) = Unfinished::new(None);
        let mut request = peer.post(body);
        request.headers_mut().insert(AUTHORIZATION, key(1).header().clone());
        let answered = tokio::spawn(fal.oneshot(request));

        sender.send("hello ".into()).await.unwrap();
        let response = within(answered).await.unwrap().unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(layer.replay_memory_used(), 0);
        sender.send("world".into()).await.unwrap();
        drop(sender);
        let upload = peer.uploads(1).await.remove(0).sent;
        assert!(upload.complete);
        assert_eq!(upload.bytes, b"hello world");
    }
}

#[tokio::test]
async fn a_caller_who_goes_away_takes_the_body_along() {
    for protocol in PROTOCOLS {
        let peer = Peer::start(When::AfterTheBody, None).await;
        let (fal, memory) = fal(protocol, &revoked(), as_it_is);
        let (sender, body) = Unfinished::new(None);
        let answered = tokio::spawn(fal.oneshot(peer.post(body)));
        sender.send("hello".into()).await.unwrap();
        peer.log_where(|log| log.heads == 1).await;

        answered.abort();
        within(sender.closed()).await;
        assert!(!peer.uploads(1).await.remove(0).sent.complete);
        assert_eq!(memory.replay_memory_used(), 0);
    }
}

/// Reads until `enough`, or the end; returns what came.
async fn read_until(stream: &mut TcpStream, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut read = Vec::new();
    while !enough(&read) {
        match stream.read_buf(&mut read).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    read
}

fn http1_401() -> String {
    format!("HTTP/1.1 401 Unauthorized\r\ncontent-length: {}\r\n\r\n{UNKNOWN_KEY}", UNKNOWN_KEY.len())
}

/// The next one is whole.
#[tokio::test]
async fn on_the_wire_a_superseded_upload_is_cut_off() {
    for (length, whole) in [(None, "6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"), (Some(11), "hello world")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let store = revoked();
        let (fal, _) = fal(Protocol::Http1, &store, as_it_is);
        let (sender, body) = Unfinished::new(length);
        let request = Request::post(format!("http://{address}/fal-ai/flux/dev")).body(body).unwrap();
        let answered = tokio::spawn(fal.oneshot(request));

        sender.send("hello ".into()).await.unwrap();
        let (mut first, _) = within(listener.accept()).await.unwrap();
        let mut sent = within(read_until(&mut first, |read| contains(read, "hello "))).await;
        store.replace(key(2));
        first.write_all(http1_401().as_bytes()).await.unwrap();
        sent.extend(within(read_until(&mut first, |_| false)).await);
        let cut_off = if length.is_some() { "\r\n\r\nhello " } else { "\r\n\r\n6\r\nhello \r\n" };
        assert!(sent.ends_with(cut_off.as_bytes()), "{:?}", String::from_utf8_lossy(&sent));

        let (mut second, _) = within(listener.accept()).await.unwrap();
        sender.send("world".into()).await.unwrap();
        drop(sender);
        let sent = within(read_until(&mut second, |read| read.ends_with(whole.as_bytes()))).await;
        assert!(sent.ends_with(format!("\r\n\r\n{whole}").as_bytes()), "{:?}", String::from_utf8_lossy(&sent));
        assert!(contains(&sent, if length.is_some() { "content-length: 11" } else { "transfer-encoding: chunked" }));
        second.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        assert_eq!(within(answered).await.unwrap().unwrap().status(), StatusCode::OK);
    }
}

fn contains(text: &[u8], part: &str) -> bool {
    text.windows(part.len()).any(|window| window == part.as_bytes())
}

/// It answers first. The request does not hang.
#[tokio::test]
async fn a_peer_that_closes_with_the_upload_unread_is_one_attempt() {
    // Whether we see the answer or only that we cannot write any more is the kernel's to say.
    for _ in 0..20 {
        for long in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (fal, memory) = fal(Protocol::Http1, &revoked(), as_it_is);
            let (sender, unfinished) = Unfinished::new(None);
            let body = if long {
                drop(unfinished);
                Full::from(vec![0; 8 << 20]).boxed_unsync()
            } else {
                unfinished.boxed_unsync()
            };
            let request = Request::post(format!("http://{address}/fal-ai/flux/dev")).body(body).unwrap();
            let answered = tokio::spawn(fal.oneshot(request));

            let (mut stream, _) = within(listener.accept()).await.unwrap();
            within(read_until(&mut stream, |read| contains(read, "\r\n\r\n"))).await;
            stream.write_all(http1_401().as_bytes()).await.unwrap();
            drop(stream);

            match within(answered).await.unwrap() {
                Err(FalAuthError::Unauthorized(refusal)) => assert!(!refusal.was_replayed()),
                Err(FalAuthError::Transport(_)) => {}
                other => panic!("{other:?}"),
            }
            within(sender.closed()).await;
            assert_eq!(memory.replay_memory_used(), 0);
            tokio::select! {
                biased;
                _ = listener.accept() => panic!("a second attempt"),
                () = std::future::ready(()) => {}
            }
        }
    }
}

/// The refusal says that it was not replayable.
#[tokio::test]
async fn a_body_over_its_limit_is_one_attempt() {
    let limit = |layer: FalRetryLayer| layer.max_body(10);
    for protocol in PROTOCOLS {
        let bodies: [(usize, AnyBody); 5] = [
            (1, Full::from("0123456789a").boxed_unsync()),
            (1, Pieces::new(["0123456789", "a"]).boxed_unsync()),
            (2, Full::from("0123456789").boxed_unsync()),
            (2, Pieces::new(["01234", "", "56789"]).boxed_unsync()),
            (1, Pieces::new(["01234", "", "56789"]).and_trailers().boxed_unsync()),
        ];
        for (attempts, body) in bodies {
            let store = revoked();
            let peer = Peer::start(When::AfterTheBody, Some(&store)).await;
            let (fal, memory) = fal(protocol, &store, limit);
            let result = within(fal.oneshot(peer.post(body))).await;
            if attempts == 1 {
                assert!(!refusal(result).is_replayable());
            } else {
                assert_eq!(result.unwrap().status(), StatusCode::OK);
            }
            assert!(peer.uploads(attempts).await.iter().all(|upload| upload.sent.complete));
            assert_eq!(peer.log.borrow().heads, attempts);
            assert_eq!((memory.replay_memory_used(), memory.replay_memory_refused()), (0, 0));
        }
    }
}

/// It is counted.
#[tokio::test]
async fn a_body_without_memory_for_it_is_one_attempt() {
    let limit = |layer: FalRetryLayer| layer.replay_memory(10);
    for protocol in PROTOCOLS {
        let store = revoked();
        let peer = Peer::start(When::AfterTheBody, Some(&store)).await;
        let (fal, memory) = fal(protocol, &store, limit);
        let result = within(fal.oneshot(peer.post(Pieces::new(["0123456789", "a"])))).await;
        assert!(!refusal(result).is_replayable());
        let uploads = peer.uploads(1).await;
        assert_eq!((uploads.len(), uploads[0].sent.complete, &*uploads[0].sent.bytes), (1, true, &b"0123456789a"[..]));
        assert_eq!((memory.replay_memory_used(), memory.replay_memory_refused()), (0, 1));
    }
}

#[tokio::test]
async fn the_connection_of_a_small_refusal_is_used_again() {
    for protocol in PROTOCOLS {
        let store = revoked();
        let peer = Peer::start(When::AfterTheBody, Some(&store)).await;
        let (fal, _) = fal(protocol, &store, as_it_is);
        within(fal.oneshot(peer.post(Full::<Bytes>::from("hello")))).await.unwrap();
        let log = peer.log_where(|log| log.uploads.len() == 2).await;
        assert_eq!(log.connections, 1, "{protocol:?}");
    }
}

/// The replay is sent on another one.
#[tokio::test]
async fn a_long_refusal_closes_its_connection() {
    let store = revoked();
    let refusal = Bytes::from(vec![b'x'; 32 << 20]);
    let peer = Peer::start_with(When::AfterTheBody, Some(&store), refusal).await;
    let (fal, _) = fal(Protocol::Http1, &store, as_it_is);
    within(fal.oneshot(peer.post(Full::<Bytes>::from("hello")))).await.unwrap();
    let uploads = peer.uploads(2).await;
    assert_eq!((uploads[0].connection, uploads[1].connection), (1, 2));
}

#[tokio::test]
async fn fal_as_it_is_played_gets_the_whole_body_with_the_new_key() {
    for protocol in PROTOCOLS {
        for (name, body) in bodies() {
            let mock = MockFal::start().await.unwrap();
            mock.accept(&key(2));
            let plain = Request::post(mock.run_url("/fal-ai/flux/dev")).header(AUTHORIZATION, key(2).header());
            let plain = within(http_client(protocol).request(plain.body(body()).unwrap())).await.unwrap();
            let plain = within(plain.into_body().collect()).await.unwrap().to_bytes();

            let source = Script::new(None, Says::Here(key(1)));
            let store = CredentialStore::builder(source.clone()).build().await.unwrap();
            source.brings(2);
            let (fal, _) = fal(protocol, &store, as_it_is);
            let request = Request::post(mock.run_url("/fal-ai/flux/dev")).body(body()).unwrap();
            let response = within(fal.oneshot(request)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK, "{protocol:?}, {name}");
            assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), plain, "{protocol:?}, {name}");
            let presented: Vec<_> = mock.received().into_iter().map(|received| received.presented).collect();
            let [_, Presented::Refused(_), Presented::Accepted(_)] = &presented[..] else {
                panic!("{protocol:?}, {name}: {presented:?}")
            };
        }
    }
}

#[tokio::test]
async fn fal_that_closes_on_a_refusal_is_one_attempt_and_no_hang() {
    for protocol in PROTOCOLS {
        let mock = MockFal::start().await.unwrap();
        mock.close_on_refusal(true);
        let (fal, memory) = fal(protocol, &revoked(), as_it_is);
        let (sender, body) = Unfinished::new(None);
        let request = Request::post(mock.run_url("/fal-ai/flux/dev")).body(body).unwrap();
        let answered = tokio::spawn(fal.oneshot(request));
        // It may be over before it has begun.
        let _ = sender.send("hello".into()).await;
        match within(answered).await.unwrap() {
            Err(FalAuthError::Unauthorized(_) | FalAuthError::Transport(_)) => {}
            other => panic!("{other:?}"),
        }
        within(sender.closed()).await;
        assert_eq!((mock.requests(), memory.replay_memory_used()), (1, 0));
    }
}
