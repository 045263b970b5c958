use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::Deref,
    sync::Arc,
};

use http::uri::Scheme;
use rcgen::CertifiedKey;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tower_fal::mock::MockFal;

/// A host that is not fal's, and plays fal all the same.
pub(super) const ELSEWHERE: &str = "https://elsewhere.test/fal-ai/flux/dev";

/// fal behind TLS, under its own names, for clients that are told where to find them.
pub(super) struct TlsFal {
    fal: MockFal,
    pub(super) address: SocketAddr,
    pub(super) client: ClientConfig,
    // Ends with this.
    _accepting: JoinSet<()>,
}

impl TlsFal {
    pub(super) async fn start() -> Self {
        let names = ["fal.run", "queue.fal.run", "elsewhere.test"].map(str::to_owned);
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der())),
            )
            .unwrap();
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();

        let fal = MockFal::start().await.unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, TlsAcceptor::from(Arc::new(server)), fal.clone()));
        Self { fal, address, client, _accepting: accepting }
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, fal: MockFal) {
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, fal) = (tls.clone(), fal.clone());
        connections.spawn(async move {
            if let Ok(stream) = tls.accept(socket).await {
                fal.serve_connection(stream, Scheme::HTTPS).await;
            }
        });
    }
}

impl Deref for TlsFal {
    type Target = MockFal;

    fn deref(&self) -> &MockFal {
        &self.fal
    }
}
