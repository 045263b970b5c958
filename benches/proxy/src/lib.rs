//! What the programs of the benchmark have in common.

#![forbid(unsafe_code)]

use std::{
    error::Error as StdError,
    fs,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hyper::Uri;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tokio::net::TcpStream;

/// An error of any kind, for programs that end with it.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// What the upstream wants to see in `authorization`, so that a proxy that adds nothing is noticed.
pub const AUTHORIZATION: &str = "Key bench:not-a-secret";

/// How many events a stream has.
pub const EVENTS: usize = 50;

/// Connects to one address, whatever the URI says.
#[derive(Clone, Copy)]
pub struct Fixed(pub SocketAddr);

impl tower_service::Service<Uri> for Fixed {
    type Response = TokioIo<TcpStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self(address) = *self;
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}

/// TLS that trusts one CA.
///
/// # Errors
/// When the file holds no certificate.
pub fn trusting(ca_file: &Path) -> Result<ClientConfig, BoxError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(ca_file)?)?)?;
    Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
