//! A fal that writes down what arrives byte by byte, a proxy in front of it, and a client that sends any bytes.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    task::AbortHandle,
};
use tower::Service;
use tower_fal::{
    Credential, CredentialStore,
    proxy::{FalProxy, UploadBody},
    retry::ReplayBody,
};

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const KEY: &str = "id-1:secret-of-id-1";

/// What belongs to no answer and no output.
pub(crate) const SECRET: &str = "secret-of-id";

pub(crate) fn store() -> CredentialStore {
    CredentialStore::fixed(Credential::key(KEY).unwrap())
}

/// A task that ends with this.
pub(crate) struct Task(AbortHandle);

impl Task {
    pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A request as fal has got it.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Sent {
    pub(crate) fn host(&self) -> &str {
        self.header("host").unwrap_or_default()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find_map(|(of, value)| of.eq_ignore_ascii_case(name).then_some(value))
    }
}

/// A fal that reads whole requests and answers each with the same bytes.
pub(crate) struct RawFal {
    pub(crate) address: SocketAddr,
    sent: Arc<Mutex<Vec<Sent>>>,
    _serving: Task,
}

impl RawFal {
    pub(crate) async fn new(answer: impl Into<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, sent) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<Sent>>>::default());
        let (log, answer) = (Arc::clone(&sent), Arc::new(answer.into()));
        let serving = Task::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                tokio::spawn(async move {
                    let mut connection = Connection::new(stream);
                    while let Some(sent) = connection.request().await {
                        log.lock().unwrap().push(sent);
                        if connection.stream.write_all(&answer).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, sent, _serving: serving }
    }

    pub(crate) async fn ok() -> Self {
        Self::new("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}").await
    }

    pub(crate) fn sent(&self) -> Vec<Sent> {
        self.sent.lock().unwrap().clone()
    }
}

/// One connection of a fal.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, read: Vec::new() }
    }

    async fn more(&mut self) -> Option<()> {
        let read = self.stream.read_buf(&mut self.read).await.ok()?;
        (read > 0).then_some(())
    }

    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(place) = self.read.windows(end.len()).position(|window| window == end) {
                return Some(self.read.drain(..place + end.len()).collect());
            }
            self.more().await?;
        }
    }

    async fn exactly(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.read.len() < length {
            self.more().await?;
        }
        Some(self.read.drain(..length).collect())
    }

    /// The head of the next request.
    pub(crate) async fn head(&mut self) -> Option<String> {
        Some(String::from_utf8(self.until(b"\r\n\r\n").await?).unwrap())
    }

    pub(crate) async fn request(&mut self) -> Option<Sent> {
        let mut sent = Sent { head: self.head().await?, body: Vec::new() };
        if sent.header("transfer-encoding").is_some() {
            loop {
                let size = self.until(b"\r\n").await?;
                let size = usize::from_str_radix(str::from_utf8(&size).unwrap().trim(), 16).unwrap();
                let chunk = self.exactly(size + 2).await?;
                sent.body.extend_from_slice(&chunk[..size]);
                if size == 0 {
                    return Some(sent);
                }
            }
        }
        let length = sent.header("content-length").map_or(0, |length| length.parse().unwrap());
        sent.body = self.exactly(length).await?;
        Some(sent)
    }
}

/// Connects to one address, whatever the URI says. The proxy has judged that before.
#[derive(Clone)]
pub(crate) struct ConnectTo {
    address: SocketAddr,
    /// How many connections it has made.
    pub(crate) connections: Arc<AtomicUsize>,
}

impl ConnectTo {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, connections: Arc::default() }
    }
}

impl Service<http::Uri> for ConnectTo {
    type Response = TokioIo<TcpStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: http::Uri) -> Self::Future {
        let (address, connections) = (self.address, Arc::clone(&self.connections));
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            connections.fetch_add(1, Ordering::Relaxed);
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}

pub(crate) type Upstream = Client<ConnectTo, ReplayBody<UploadBody<Body>>>;

pub(crate) fn client(fal: SocketAddr) -> Upstream {
    Client::builder(TokioExecutor::new()).build(ConnectTo::new(fal))
}

/// A proxy in front of this address, which everyone may call.
pub(crate) fn proxy(fal: SocketAddr) -> FalProxy<Upstream> {
    FalProxy::over(&store(), client(fal)).allow_anonymous()
}

/// A port that refuses connections as long as this is kept: nobody listens, and no other test is given it.
pub(crate) fn nobody() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    socket
}

/// A server on loopback.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// `None` for one that somebody else runs.
    _serving: Option<Task>,
}

impl Server {
    #[cfg(unix)]
    pub(crate) fn at(address: SocketAddr) -> Self {
        Self { address, _serving: None }
    }

    pub(crate) async fn new(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Task::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let router = router.clone();
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                        let mut router = router.clone();
                        async move { Ok::<_, Infallible>(router.call(request.map(Body::new)).await.unwrap()) }
                    });
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, _serving: Some(serving) }
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Sends these bytes, and returns all that comes until the connection ends.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The server may answer, and close, before it has read everything.
        let _ = stream.write_all(bytes).await;
        read_to_end(&mut stream).await
    }

    pub(crate) async fn send(&self, request: Raw<'_>) -> Answer {
        Answer::parse(&self.raw(&request.bytes()).await)
    }
}

pub(crate) async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let reading = async {
        // A reset loses nothing that came before it.
        while stream.read_buf(&mut read).await.is_ok_and(|more| more > 0) {}
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the connection does not end");
    String::from_utf8_lossy(&read).into_owned()
}

/// A request, line by line.
pub(crate) struct Raw<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) host: &'a str,
    pub(crate) target: Option<&'a str>,
    pub(crate) content_type: Option<&'a str>,
    pub(crate) lines: Vec<String>,
    pub(crate) body: &'a str,
}

impl<'a> Raw<'a> {
    pub(crate) fn post(target: &'a str) -> Self {
        Self {
            method: "POST",
            path: "/api/fal/proxy",
            host: "localhost",
            target: Some(target),
            content_type: Some("application/json"),
            lines: Vec::new(),
            body: "{}",
        }
    }

    pub(crate) fn get(target: &'a str) -> Self {
        Self { method: "GET", body: "", ..Self::post(target) }
    }

    pub(crate) fn line(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut text =
            format!("{} {} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.method, self.path, self.host);
        let target = self.target.map(|target| format!("x-fal-target-url: {target}"));
        let content_type = self.content_type.map(|value| format!("content-type: {value}"));
        let length = (!self.body.is_empty()).then(|| format!("content-length: {}", self.body.len()));
        for line in target.iter().chain(&content_type).chain(&length).chain(&self.lines) {
            text.push_str(line);
            text.push_str("\r\n");
        }
        text.push_str("\r\n");
        text.push_str(self.body);
        text.into_bytes()
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// In lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{text:?}"));
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find_map(|(of, value)| (of == name).then_some(value))
    }

    pub(crate) fn rule(&self) -> Option<&str> {
        self.header("x-tower-fal-rule")
    }
}
