//! Plays fal: small and large answers, streams, uploads and downloads, on one thread, over HTTP/1.1.

#![forbid(unsafe_code)]

use std::{
    convert::Infallible,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt as _, Either, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Body, Frame, Incoming},
    header::HeaderValue,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    net::TcpListener,
    time::{Interval, interval},
};
use tokio_rustls::TlsAcceptor;
use tower_fal_proxy_bench::{AUTHORIZATION, BoxError, EVENTS};

#[derive(Parser)]
struct Options {
    /// Where to listen for http
    #[arg(long)]
    http: SocketAddr,
    /// Where to listen for https
    #[arg(long)]
    https: SocketAddr,
    /// Where to write the certificate of the CA
    #[arg(long)]
    ca_out: PathBuf,
    /// The keys that are accepted, each on its own line. The file is read again and again
    #[arg(long)]
    keys: Option<PathBuf>,
}

/// The values of `authorization` that are accepted.
static ACCEPTED: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// How often the file of the keys is read.
const EVERY: Duration = Duration::from_millis(20);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), BoxError> {
    let options = Options::parse();
    let tls = tls(&options.ca_out)?;
    match options.keys {
        None => accept(vec![AUTHORIZATION.to_owned()]),
        Some(file) => {
            accept_all_in(&file)?;
            tokio::spawn(async move {
                let mut every = interval(EVERY);
                loop {
                    every.tick().await;
                    if let Err(error) = accept_all_in(&file) {
                        eprintln!("{error}");
                    }
                }
            });
        }
    }
    let (http, https) = (TcpListener::bind(options.http).await?, TcpListener::bind(options.https).await?);
    println!("ready");
    loop {
        let (stream, tls) = tokio::select! {
            accepted = http.accept() => (accepted?.0, None),
            accepted = https.accept() => (accepted?.0, Some(tls.clone())),
        };
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            match tls {
                None => serve(stream).await,
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => serve(stream).await,
                    Err(error) => eprintln!("TLS handshake: {error}"),
                },
            }
        });
    }
}

fn accept(values: Vec<String>) {
    *ACCEPTED.write().unwrap_or_else(PoisonError::into_inner) = values;
}

fn accept_all_in(file: &Path) -> std::io::Result<()> {
    accept(fs::read_to_string(file)?.lines().map(|key| format!("Key {key}")).collect());
    Ok(())
}

fn is_accepted(value: &HeaderValue) -> bool {
    ACCEPTED.read().unwrap_or_else(PoisonError::into_inner).iter().any(|accepted| value == accepted)
}

async fn serve(io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
    // A client may leave when it likes.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(io), service_fn(answer)).await;
}

type Answer = Either<Full<Bytes>, Written>;

async fn answer(request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    if !request.headers().get("authorization").is_some_and(is_accepted) {
        return Ok(with(StatusCode::UNAUTHORIZED, "application/json", Either::Left(Full::from("{}"))));
    }
    let path = request.uri().path().to_owned();
    let mut body = request.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => length += frame.data_ref().map_or(0, Bytes::len),
            Err(_) => return Ok(with(StatusCode::BAD_REQUEST, "application/json", Either::Left(Full::from("{}")))),
        }
    }
    let json = |size: usize| {
        let text = format!("{{\"bytes\":{length:10},\"text\":\"{}\"}}", "x".repeat(size.saturating_sub(30)));
        Either::Left(Full::from(text))
    };
    Ok(match path.rsplit('/').next() {
        Some("large") => with(StatusCode::OK, "application/json", json(64 * 1024)),
        Some("stream") => with(StatusCode::OK, "text/event-stream", Either::Right(Written::events(EVENTS, false))),
        Some("idle") => with(StatusCode::OK, "text/event-stream", Either::Right(Written::events(1, true))),
        Some("download") => with(StatusCode::OK, "application/octet-stream", Either::Right(Written::gibibyte())),
        _ => with(StatusCode::OK, "application/json", json(1024)),
    })
}

fn with(status: StatusCode, content_type: &'static str, body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", HeaderValue::from_static(content_type));
    response
}

/// The time between two events. Without it, a slow proxy would find several at once, and have less to do.
const BETWEEN: Duration = Duration::from_millis(2);

/// A body that is written piece by piece.
struct Written {
    piece: Bytes,
    left: usize,
    every: Option<Interval>,
    /// Whether it never ends.
    open: bool,
}

impl Written {
    fn events(left: usize, open: bool) -> Self {
        let piece = Bytes::from(format!("data: {{\"text\":\"{}\"}}\n\n", "x".repeat(80)));
        Self { piece, left, every: Some(interval(BETWEEN)), open }
    }

    fn gibibyte() -> Self {
        Self { piece: Bytes::from(vec![b'x'; 64 * 1024]), left: 16 * 1024, every: None, open: false }
    }
}

impl Body for Written {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return if self.open { Poll::Pending } else { Poll::Ready(None) };
        }
        if let Some(every) = &mut self.every {
            ready!(every.poll_tick(cx));
        }
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(self.piece.clone()))))
    }
}

fn tls(ca_out: &Path) -> Result<TlsAcceptor, BoxError> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "CA of a benchmark");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    fs::write(ca_out, ca.self_signed(&ca_key)?.pem())?;
    let key = KeyPair::generate()?;
    let mut server = CertificateParams::new(vec!["fal.run".to_owned(), "queue.fal.run".to_owned()])?;
    server.distinguished_name.push(DnType::CommonName, "the upstream of a benchmark");
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, &Issuer::new(ca, ca_key))?;
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
