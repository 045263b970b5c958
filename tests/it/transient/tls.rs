//! Connections that fail: some for good, some for now.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rcgen::CertifiedKey;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{CredentialStore, FalAuthError, reqwest::ReqwestService, retry::Transient};

use super::BODY;
use crate::support::key;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone)]
enum Speaks {
    /// With a certificate for another host.
    Tls(TlsAcceptor),
    PlainHttp,
    /// It closes the connection in the middle of the handshake.
    Nothing,
}

struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    // Ends with this.
    _accepting: JoinSet<()>,
}

impl Server {
    async fn start(speaks: Speaks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut served = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                served.spawn(serve(stream, speaks.clone()));
            }
        });
        Self { address, connections, _accepting: accepting }
    }
}

async fn serve(mut stream: TcpStream, speaks: Speaks) {
    if let Speaks::Tls(tls) = speaks {
        // The client breaks it off.
        let _ = tls.accept(stream).await;
        return;
    }
    let mut hello = [0; 1024];
    if stream.read(&mut hello).await.is_ok() && matches!(speaks, Speaks::PlainHttp) {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await;
        while stream.read(&mut hello).await.is_ok_and(|read| read > 0) {}
    }
}

fn certificate() -> (CertificateDer<'static>, TlsAcceptor) {
    let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["elsewhere.test".into()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    (cert.der().clone(), TlsAcceptor::from(Arc::new(server)))
}

fn trusting(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> ClientConfig {
    let mut store = RootCertStore::empty();
    assert_eq!(store.add_parsable_certificates(roots).1, 0);
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth()
}

pub(crate) fn without_roots() -> ClientConfig {
    trusting([])
}

/// How often each client connects for one request, hyper-util's and reqwest's.
async fn connections(speaks: Speaks, tls: ClientConfig, method: Method) -> [usize; 2] {
    let transient = Transient::default().attempts(3).first_delay(Duration::from_millis(1));
    let layer = tower_fal::layer(&CredentialStore::fixed(key(1))).retry(|retry| retry.transient(transient));

    let server = Server::start(speaks.clone()).await;
    let https = HttpsConnectorBuilder::new().with_tls_config(tls.clone()).https_only().enable_http1().build();
    let client = Client::builder(TokioExecutor::new()).build(https);
    assert_fails(layer.clone().layer(client).oneshot(request(&server, &method))).await;
    let hyper_util = server.connections.load(Ordering::SeqCst);

    let server = Server::start(speaks).await;
    let client = ReqwestService::new(reqwest::Client::builder().no_proxy().tls_backend_preconfigured(tls)).unwrap();
    assert_fails(layer.layer(client).oneshot(request(&server, &method))).await;
    [hyper_util, server.connections.load(Ordering::SeqCst)]
}

fn request(server: &Server, method: &Method) -> Request<Full<Bytes>> {
    let uri = format!("https://{}/fal-ai/flux", server.address);
    Request::builder().method(method).uri(uri).body(Full::from(BODY)).unwrap()
}

async fn assert_fails<T>(sent: impl Future<Output = Result<T, FalAuthError>>) {
    let result = tokio::time::timeout(PATIENCE, sent).await.expect("it hangs");
    assert!(matches!(result, Err(FalAuthError::Transport(_))));
}

#[tokio::test]
async fn a_certificate_that_is_refused_is_one_attempt() {
    for method in [Method::GET, Method::POST] {
        let (root, acceptor) = certificate();
        let wrong_host = connections(Speaks::Tls(acceptor.clone()), trusting([root]), method.clone()).await;
        let unknown_issuer = connections(Speaks::Tls(acceptor), without_roots(), method.clone()).await;
        assert_eq!((wrong_host, unknown_issuer), ([1, 1], [1, 1]), "{method}");
    }
}

#[tokio::test]
async fn tls_to_a_plain_port_is_one_attempt() {
    for method in [Method::GET, Method::POST] {
        assert_eq!(connections(Speaks::PlainHttp, without_roots(), method.clone()).await, [1, 1], "{method}");
    }
}

#[tokio::test]
async fn a_handshake_that_breaks_off_is_tried_again() {
    for method in [Method::GET, Method::POST] {
        assert_eq!(connections(Speaks::Nothing, without_roots(), method.clone()).await, [3, 3], "{method}");
    }
}
