//! A proxy behind which all of fal's hosts are the mock.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use rcgen::CertifiedKey;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tower_fal::mock::MockAuthorization;

use crate::support::World;

/// All hosts are the mock, with a certificate for fal's own.
pub(crate) struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    certificate: String,
    _accepting: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(server: &MockAuthorization) -> Self {
        let hosts = ["auth.fal.ai", "rest.alpha.fal.ai"].map(str::to_owned);
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(hosts).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let tls = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::default());
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, tls, server.clone(), Arc::clone(&asked)));
        Self { address, asked, certificate: cert.pem(), _accepting: accepting }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A file with the roots of those who trust it.
    pub(crate) fn roots(&self, world: &World) -> PathBuf {
        let path = world.home.path().join("ca.pem");
        std::fs::write(&path, &self.certificate).unwrap();
        path
    }

    /// The first lines and the authorizations of the requests so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, server: MockAuthorization, asked: Arc<Mutex<Vec<String>>>) {
    let mut connections = JoinSet::new();
    while let Ok((mut socket, _)) = listener.accept().await {
        let (tls, server, asked) = (tls.clone(), server.clone(), Arc::clone(&asked));
        connections.spawn(async move {
            let head = head(&mut socket).await;
            let mut lines = head.lines();
            let first = lines.next().unwrap_or_default().to_owned();
            let authorization = lines.find_map(|line| line.strip_prefix("Proxy-Authorization: ")).unwrap_or_default();
            asked.lock().unwrap().push(format!("{first} {authorization}").trim().to_owned());
            socket.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await.unwrap();
            if let Ok(stream) = tls.accept(socket).await {
                server.serve_connection(stream).await;
            }
        });
    }
}

async fn head(socket: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}
