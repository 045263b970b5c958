//! Connections to fal that may be led elsewhere: `--connect-to` and `--ca-file`.
#![allow(dead_code)] // not every server has these options

use std::{
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
};

use clap::Args;
use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tower::Service;
use tower_fal::error::BoxError;

use super::upstream::tcp;

/// How connections to fal are made.
#[derive(Args, Default)]
pub(crate) struct Connect {
    /// Where every https connection ends, in place of the host of its URL. TLS is still that of the host of the URL, as
    /// with curl's option of this name. It is for egress gateways and for tests
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "demo")]
    connect_to: Option<HostAndPort>,
    /// The certificates to trust, in place of Mozilla's
    #[arg(long, value_name = "PEM", conflicts_with = "demo")]
    ca_file: Option<PathBuf>,
}

impl Connect {
    /// The connector of a client. It speaks plain http too: the origins decide where a key goes.
    pub(crate) fn connector(&self) -> Result<HttpsConnector<ConnectTo>, BoxError> {
        let tcp = ConnectTo { tcp: tcp(), to: self.connect_to.as_ref().map(|to| to.0.clone()) };
        Ok(HttpsConnectorBuilder::new()
            .with_tls_config(self.tls()?)
            .https_or_http()
            .enable_http1()
            .enable_http2()
            .wrap_connector(tcp))
    }

    fn tls(&self) -> Result<ClientConfig, BoxError> {
        let mut roots = RootCertStore::empty();
        match &self.ca_file {
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(path) => {
                let unreadable = |error| format!("cannot read certificates from {}: {error}", path.display());
                for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                    roots.add(certificate.map_err(unreadable)?)?;
                }
                if roots.is_empty() {
                    return Err(format!("there is no certificate in {}", path.display()).into());
                }
            }
        }
        // rustls needs to be told its provider, because several may be compiled in.
        Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth())
    }
}

/// TCP to the host of a URL, or for https to where it is led.
#[derive(Clone)]
pub(crate) struct ConnectTo {
    tcp: HttpConnector,
    to: Option<Uri>,
}

impl Service<Uri> for ConnectTo {
    type Response = <HttpConnector as Service<Uri>>::Response;
    type Error = <HttpConnector as Service<Uri>>::Error;
    type Future = <HttpConnector as Service<Uri>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx)
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let to = self.to.clone().filter(|_| url.scheme_str() == Some("https"));
        self.tcp.call(to.unwrap_or(url))
    }
}

#[derive(Clone)]
struct HostAndPort(Uri);

impl FromStr for HostAndPort {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let url: Option<Uri> = format!("http://{text}/").parse().ok();
        let is_whole = |url: &Uri| {
            url.port_u16().is_some() && url.path() == "/" && url.authority().is_some_and(|authority| authority == text)
        };
        match url.filter(is_whole) {
            Some(url) if !text.contains('@') => Ok(Self(url)),
            _ => Err("it must be like gateway.internal:443"),
        }
    }
}
