//! Connections to fal that may be led elsewhere: `--connect-to`, `--connect-to-http` and `--ca-file`.
#![allow(dead_code)] // not every server has these options

use std::{
    path::PathBuf,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
};

use clap::Args;
use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
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
    /// Where every connection to fal ends, in place of the host of its URL. TLS is still that of the host of the URL, as
    /// with curl's option of this name. It is for egress gateways and for tests
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "demo")]
    connect_to: Option<HostAndPort>,
    /// The same without TLS: requests, and the key in them, go there in clear. It is for gateways that encrypt
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["demo", "connect_to"])]
    connect_to_http: Option<HostAndPort>,
    /// The certificates to trust, in place of Mozilla's
    #[arg(long, value_name = "PEM", conflicts_with = "demo")]
    ca_file: Option<PathBuf>,
}

impl Connect {
    /// The connector of a client. It speaks plain http too: the origins decide where a key goes.
    pub(crate) fn connector(&self, http2: bool) -> Result<Connector, BoxError> {
        if let Some(HostAndPort(to)) = &self.connect_to_http {
            return Ok(Connector::plain(to));
        }
        let to = self.connect_to.as_ref().map_or(To::Itself, |HostAndPort(to)| To::One(Arc::new(to.clone())));
        let https = HttpsConnectorBuilder::new().with_tls_config(self.tls()?).https_or_http().enable_http1();
        let tcp = ConnectTo { tcp: tcp(), to };
        Ok(Connector::Tls(if http2 { https.enable_http2().wrap_connector(tcp) } else { https.wrap_connector(tcp) }))
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

/// Connections over TLS, or in clear to where they are led.
#[derive(Clone)]
pub(crate) enum Connector {
    Tls(HttpsConnector<ConnectTo>),
    Plain(ConnectTo),
}

impl Connector {
    fn plain(to: &Uri) -> Self {
        Self::Plain(ConnectTo { tcp: tcp(), to: To::One(Arc::new(to.clone())) })
    }

    /// In clear, to the first of these origins whose host begins so.
    pub(crate) fn plain_by_host(origins: Vec<(&'static str, Uri)>) -> Self {
        Self::Plain(ConnectTo { tcp: tcp(), to: To::ByHost(origins.into()) })
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<<HttpConnector as Service<Uri>>::Response>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Self::Tls(https) => https.poll_ready(cx),
            Self::Plain(tcp) => tcp.poll_ready(cx).map_err(Into::into),
        }
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        match self {
            Self::Tls(https) => Box::pin(https.call(url)),
            Self::Plain(tcp) => {
                let connecting = tcp.call(url);
                Box::pin(async { Ok(MaybeHttpsStream::Http(connecting.await?)) })
            }
        }
    }
}

/// TCP to the host of a URL, or for https to where it is led.
#[derive(Clone)]
pub(crate) struct ConnectTo {
    tcp: HttpConnector,
    to: To,
}

#[derive(Clone)]
enum To {
    Itself,
    One(Arc<Uri>),
    ByHost(Arc<[(&'static str, Uri)]>),
}

impl Service<Uri> for ConnectTo {
    type Response = <HttpConnector as Service<Uri>>::Response;
    type Error = <HttpConnector as Service<Uri>>::Error;
    type Future = <HttpConnector as Service<Uri>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx)
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let host = url.host().unwrap_or_default();
        let to = match &self.to {
            _ if url.scheme_str() != Some("https") => None,
            To::Itself => None,
            To::One(to) => Some(Uri::clone(to)),
            To::ByHost(origins) => origins.iter().find(|(of, _)| host.starts_with(of)).map(|(_, to)| to.clone()),
        };
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
