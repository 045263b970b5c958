//! What an HTTP/2 server says that it has not processed is sent again, a POST too.

use std::{
    collections::VecDeque,
    error::Error,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuthError, FalLayer, reqwest::ReqwestService, retry::Transient};

use super::BODY;
use crate::support::key;

const PATIENCE: Duration = Duration::from_secs(30);

/// What the server does when the head of a request has come.
#[derive(Clone, Copy, Debug)]
enum Does {
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY without an error, and the stream is none of those that it has looked at.
    ShutDownBefore,
    /// GOAWAY without an error, but it has looked at the stream. Then it closes the connection.
    ShutDownAfter,
}

const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// An HTTP/2 server, frame by frame: a server that is made for use does not do some of this when a test wants it.
struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Log>>,
    // Ends with this.
    _accepting: JoinSet<()>,
}

#[derive(Default)]
struct Log {
    does: VecDeque<Does>,
    heads: usize,
    /// The bodies of the requests that were answered.
    bodies: Vec<Vec<u8>>,
}

impl Server {
    /// It does this with the first requests, and answers those that follow.
    async fn start(does: impl IntoIterator<Item = Does>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Log { does: does.into_iter().collect(), ..Log::default() }));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&log)));
        Self { address, log, _accepting: accepting }
    }

    fn post(&self) -> Request<Full<Bytes>> {
        Request::post(format!("http://{}/fal-ai/flux", self.address)).body(Full::from(BODY)).unwrap()
    }

    fn heads(&self) -> usize {
        self.log.lock().unwrap().heads
    }
}

async fn accept(listener: TcpListener, log: Arc<Mutex<Log>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, Arc::clone(&log)));
    }
}

/// Until the client closes the connection, or the server has to.
async fn serve(mut stream: TcpStream, log: Arc<Mutex<Log>>) {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    const ACK: u8 = 1;
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;
    /// `:status: 200`, which has a number in HPACK's table.
    const OK: [u8; 1] = [0x88];

    let mut preface = [0; 24];
    if stream.read_exact(&mut preface).await.is_err() {
        return;
    }
    let _ = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
    let mut body = Vec::new();
    let mut unprocessed = 0;
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let [a, b, c, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        if stream.read_exact(&mut payload).await.is_err() {
            return;
        }
        let id = u32::from_be_bytes(id);
        let mut reply = Vec::new();
        let mut closes = false;
        if kind == SETTINGS && flags & ACK == 0 {
            reply = frame(SETTINGS, ACK, 0, &[]);
        }
        if kind == HEADERS {
            let mut log = log.lock().unwrap();
            log.heads += 1;
            body.clear();
            match log.does.pop_front() {
                None => {}
                Some(Does::Reset(code)) => reply = frame(RST_STREAM, 0, id, &code.to_be_bytes()),
                Some(Does::ShutDownBefore) => reply = frame(GOAWAY, 0, 0, &[0; 8]),
                Some(Does::ShutDownAfter) => {
                    let last_and_no_error = (u64::from(id) << 32).to_be_bytes();
                    (reply, closes) = (frame(GOAWAY, 0, 0, &last_and_no_error), true);
                }
            }
        }
        if kind == HEADERS && !reply.is_empty() {
            unprocessed = id;
        }
        if kind == DATA {
            body.extend_from_slice(&payload);
        }
        if (kind == DATA || kind == HEADERS) && flags & END_STREAM != 0 && id != unprocessed {
            log.lock().unwrap().bodies.push(std::mem::take(&mut body));
            reply = frame(HEADERS, END_STREAM | END_HEADERS, id, &OK);
        }
        if stream.write_all(&reply).await.is_err() || closes {
            return;
        }
    }
}

fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&id.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

#[derive(Clone, Copy, Debug)]
enum Through {
    HyperUtil,
    Reqwest,
}

/// Sends one POST, and returns the status of the answer.
async fn send(through: Through, transient: &Transient, server: &Server) -> Result<StatusCode, FalAuthError> {
    let transient = transient.clone().first_delay(Duration::from_millis(1));
    let layer: FalLayer = tower_fal::layer(&CredentialStore::fixed(key(1)))
        .auth(|auth| auth.origins(tower_fal::origin::FalOrigins::new().loopback_http()))
        .retry(|retry| retry.transient(transient));
    let sent = async {
        Ok(match through {
            Through::HyperUtil => {
                let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
                layer.layer(client).oneshot(server.post()).await?.status()
            }
            Through::Reqwest => {
                let builder = reqwest::Client::builder().no_proxy().http2_prior_knowledge();
                let builder = builder.tls_backend_preconfigured(super::tls::without_roots());
                layer.layer(ReqwestService::new(builder).unwrap()).oneshot(server.post()).await?.status()
            }
        })
    };
    tokio::time::timeout(PATIENCE, sent).await.expect("it hangs")
}

#[tokio::test]
async fn a_post_that_http2_did_not_process_is_sent_again() {
    for through in [Through::HyperUtil, Through::Reqwest] {
        for does in [Does::Reset(REFUSED_STREAM), Does::ShutDownBefore] {
            let server = Server::start([does, does]).await;
            let status = send(through, &Transient::default(), &server).await.unwrap();
            assert_eq!((status, server.heads()), (StatusCode::OK, 3), "{through:?}, {does:?}");
            assert_eq!(server.log.lock().unwrap().bodies, [BODY.as_bytes()], "{through:?}, {does:?}");
        }
    }
}

#[tokio::test]
async fn a_post_that_http2_may_have_processed_is_sent_once() {
    for through in [Through::HyperUtil, Through::Reqwest] {
        for does in [Does::Reset(CANCEL), Does::ShutDownAfter] {
            let server = Server::start([does]).await;
            let error = send(through, &Transient::default(), &server).await.unwrap_err();
            assert!(matches!(error, FalAuthError::Transport(_)));
            assert_eq!(server.heads(), 1, "{through:?}, {does:?}");
        }
    }
}

#[tokio::test]
async fn not_sent_is_asked_about_the_causes_of_a_clients_error() {
    fn is_of_http2(error: &(dyn Error + 'static)) -> bool {
        error.is::<h2::Error>()
    }
    for through in [Through::HyperUtil, Through::Reqwest] {
        let server = Server::start([Does::Reset(CANCEL)]).await;
        let status = send(through, &Transient::default().not_sent(is_of_http2), &server).await.unwrap();
        assert_eq!((status, server.heads()), (StatusCode::OK, 2), "{through:?}");
    }
}

#[tokio::test]
async fn what_http2_says_holds_whatever_not_sent_says() {
    let server = Server::start([Does::Reset(REFUSED_STREAM)]).await;
    let status = send(Through::HyperUtil, &Transient::default().not_sent(|_| false), &server).await.unwrap();
    assert_eq!((status, server.heads()), (StatusCode::OK, 2));
}
