use std::{path::Path, time::Duration};

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tower_fal::{
    Credential, CredentialStore,
    error::{BoxError, SourceError, SourceErrorKind, report},
    mock::MockFal,
    source::{EnvSource, FileSource},
};

use super::options::FalUrls;
use crate::terminal::BaseUrl;

/// How long it may take to connect to fal.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where fal is: the real one, the URLs of the command line, or with `--demo` a fal in this process.
#[allow(dead_code)] // no example uses both URLs
pub(crate) struct Upstream {
    /// `https://fal.run`, or what takes its place.
    pub(crate) run: BaseUrl,
    /// `https://queue.fal.run`, or what takes its place.
    pub(crate) queue: BaseUrl,
    /// With `--demo`.
    mock: Option<MockFal>,
}

impl Upstream {
    pub(crate) async fn new(demo: bool, urls: &FalUrls) -> Result<Self, BoxError> {
        let mock = if demo { Some(MockFal::start().await?) } else { None };
        let url = |named: &Option<BaseUrl>, of_mock: fn(&MockFal) -> String, of_fal: &str| match (named, &mock) {
            (Some(named), _) => Ok(named.clone()),
            (None, Some(mock)) => of_mock(mock).parse(),
            (None, None) => of_fal.parse(),
        };
        let run = url(&urls.fal_run_url, MockFal::run_origin, "https://fal.run")?;
        let queue = url(&urls.fal_queue_url, MockFal::queue_origin, "https://queue.fal.run")?;
        Ok(Self { run, queue, mock })
    }

    /// The fal of `--demo`.
    #[allow(dead_code)] // only for what its URLs do not say
    pub(crate) fn mock(&self) -> Option<&MockFal> {
        self.mock.as_ref()
    }

    /// The store with the server's own key: from this file, or from the environment. It is an error if there is none.
    #[allow(dead_code)] // axum_byok has no key of its own
    pub(crate) async fn store(&self, key_file: Option<&Path>) -> Result<CredentialStore, BoxError> {
        if let Some(key) = self.demo_key("demo-key")? {
            return Ok(CredentialStore::fixed(key));
        }
        let store = match key_file {
            Some(path) => CredentialStore::builder(FileSource::new(path)),
            None => CredentialStore::builder(EnvSource::all()),
        };
        store.watch_files().build().await.map_err(|error| match error.kind() {
            SourceErrorKind::NotFound => {
                format!("{}. Or use --key-file PATH, or --demo. See --help.", report(&error)).into()
            }
            _ => error.into(),
        })
    }

    /// With `--demo`, a key that its fal accepts from now on.
    pub(crate) fn demo_key(&self, id: &str) -> Result<Option<Credential>, SourceError> {
        let Some(mock) = &self.mock else { return Ok(None) };
        let key = Credential::key_pair(id, "not-a-secret").map_err(|error| SourceError::new("demo", error))?;
        mock.accept(&key);
        Ok(Some(key))
    }

    /// The connector of a client for all of these. It speaks plain http too: the origins decide where a key goes.
    #[allow(dead_code)] // `Connect` has one too
    pub(crate) fn connector() -> Result<HttpsConnector<HttpConnector>, BoxError> {
        // rustls needs to be told its provider, because several may be compiled in.
        Ok(HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())?
            .https_or_http()
            .enable_http1()
            .enable_http2()
            .wrap_connector(tcp()))
    }
}

/// TCP as a client of fal needs it.
pub(super) fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp
}
