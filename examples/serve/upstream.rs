use std::{path::PathBuf, time::Duration};

use axum::http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tower_fal::{
    Credential, CredentialStore,
    error::{BoxError, SourceError, SourceErrorKind, report},
    mock::MockFal,
    origin::FalOrigins,
    source::{EnvSource, FileSource},
};

use super::Options;

/// How long a connection to fal may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where fal is: the real one, the one of the command line, or in a demonstration one in this process.
pub(crate) struct Upstream {
    /// In place of `https://fal.run`, without a slash at its end.
    pub(crate) run_url: String,
    /// In place of `https://queue.fal.run`, without a slash at its end.
    pub(crate) queue_url: String,
    /// Who may see a key: fal, and where the URLs lead.
    pub(crate) origins: FalOrigins,
    /// Where the keys are, if not in the environment.
    pub(crate) keys: Option<PathBuf>,
    /// In a demonstration.
    mock: Option<MockFal>,
}

impl Upstream {
    pub(crate) async fn new(options: &Options) -> Result<Self, BoxError> {
        let mut upstream = Self {
            run_url: "https://fal.run".to_owned(),
            queue_url: "https://queue.fal.run".to_owned(),
            origins: FalOrigins::new(),
            keys: options.keys.clone(),
            mock: None,
        };
        if options.demo {
            let mock = MockFal::start().await?;
            (upstream.run_url, upstream.queue_url) = (mock.run_origin(), mock.queue_origin());
            upstream.origins = upstream.origins.loopback_http();
            upstream.mock = Some(mock);
        }
        if let Some(url) = &options.run_url {
            upstream.run_url = upstream.named("--fal-run-url", url)?;
        }
        if let Some(url) = &options.queue_url {
            upstream.queue_url = upstream.named("--fal-queue-url", url)?;
        }
        Ok(upstream)
    }

    /// Whoever names a URL in place of fal's admits its origin, which is refused if the key went there in clear.
    fn named(&mut self, option: &str, url: &str) -> Result<String, BoxError> {
        let parsed: Uri = url.parse().map_err(|_| format!("{option} is no URL"))?;
        let (Some(scheme), Some(authority), None) = (parsed.scheme(), parsed.authority(), parsed.query()) else {
            return Err(format!("{option} must be https://host/path, with no more than that").into());
        };
        let origins = std::mem::take(&mut self.origins);
        self.origins = origins.and(&format!("{scheme}://{authority}")).map_err(|error| format!("{option}: {error}"))?;
        Ok(format!("{scheme}://{authority}{}", parsed.path().trim_end_matches('/')))
    }

    /// The server's own credential. It fails here and now if there is none.
    #[allow(dead_code)] // axum_byok has none
    pub(crate) async fn store(&self) -> Result<CredentialStore, BoxError> {
        if let Some(key) = self.demo_key("demo-key")? {
            return Ok(CredentialStore::fixed(key));
        }
        let store = match &self.keys {
            Some(path) => CredentialStore::builder(FileSource::new(path)),
            None => CredentialStore::builder(EnvSource::all()),
        };
        store.watch_files().build().await.map_err(|error| match error.kind() {
            SourceErrorKind::NotFound => {
                format!("{}\nOr --key-file PATH, or --demo; see --help.", report(&error)).into()
            }
            _ => error.into(),
        })
    }

    /// In a demonstration, a key that its fal takes from now on.
    pub(crate) fn demo_key(&self, id: &str) -> Result<Option<Credential>, SourceError> {
        let Some(mock) = &self.mock else { return Ok(None) };
        let key = Credential::key_pair(id, "not-a-secret").map_err(|error| SourceError::new("demo", error))?;
        mock.accept(&key);
        Ok(Some(key))
    }

    /// For a client that reaches all of these. The origins say where a key goes, not the connector.
    pub(crate) fn connector() -> Result<HttpsConnector<HttpConnector>, BoxError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // Named, so that it does not matter which other providers are compiled in.
        Ok(HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
            .https_or_http()
            .enable_http1()
            .enable_http2()
            .wrap_connector(tcp))
    }
}
