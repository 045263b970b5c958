//! What the tests of the login need.

use std::{fs, path::PathBuf, time::Duration};

use tempfile::TempDir;
use tokio::process::Command;
use tower_fal::{
    Credential, SourceError,
    error::report,
    login::LoginSource,
    mock::MockAuthorization,
    source::{CredentialSource as _, LoadReason},
};

pub(crate) const MINUTE: Duration = Duration::from_secs(60);
pub(crate) const EXPIRED: Duration = Duration::ZERO;

/// A home directory, and the server that it has a login of. Nothing is read from the environment.
pub(crate) struct World {
    pub(crate) server: MockAuthorization,
    pub(crate) home: TempDir,
}

impl World {
    /// Without a port, so that time may be paused.
    pub(crate) fn new() -> Self {
        Self { server: MockAuthorization::new(), home: tempfile::tempdir().unwrap() }
    }

    /// With a login whose access token lives this long.
    pub(crate) fn with_access(life: Duration) -> Self {
        let world = Self::new();
        world.write(world.server.log_in_with_access(life));
        world
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.home.path().join("auth0_token")
    }

    pub(crate) fn write(&self, tokens: impl AsRef<[u8]>) {
        fs::write(self.path(), tokens).unwrap();
    }

    pub(crate) fn choose(&self, team: &str) {
        fs::write(self.home.path().join("config.toml"), format!("[__internal__]\nteam = \"{team}\"\n")).unwrap();
    }

    /// The lines of the file.
    pub(crate) fn tokens(&self) -> Vec<String> {
        fs::read_to_string(self.path()).unwrap().lines().map(str::to_owned).collect()
    }

    pub(crate) fn source(&self) -> LoginSource {
        self.source_with(self.server.clone())
    }

    pub(crate) fn source_with(&self, client: MockAuthorization) -> LoginSource {
        let config = self.home.path().join("config.toml").into_os_string();
        let source = LoginSource::with_client(client).environment(move |name| match name {
            "FAL_CONFIG_PATH" => Some(config.clone()),
            _ => None,
        });
        source.home(self.home.path()).authority(self.server.url()).unwrap().rest(self.server.url()).unwrap()
    }

    /// That an error does not show a token or a word of the server.
    pub(crate) fn assert_no_leak(&self, error: &SourceError) {
        let texts = format!("{} {error:?} {}", report(error), error.summary());
        let file = fs::read(self.path()).unwrap_or_default();
        let file = String::from_utf8_lossy(&file).into_owned();
        for secret in file.lines().filter(|line| line.len() > 8).chain(["mock-refresh", "said-by-the-mock", "\u{1b}"]) {
            assert!(!texts.contains(secret), "{texts}");
        }
    }
}

/// Without the proxies and the directory of root certificates of whoever runs the tests.
pub(crate) fn without_network(command: &mut Command) {
    for name in
        ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"]
    {
        command.env_remove(name);
    }
    command.env_remove("SSL_CERT_DIR");
}

/// The token that a credential sends.
pub(crate) fn token(credential: &Credential) -> String {
    credential.header().to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned()
}

pub(crate) async fn load(source: &LoginSource) -> Credential {
    source.load().await.map_err(|error| report(&error)).unwrap().unwrap()
}

pub(crate) async fn refused(source: &LoginSource, credential: &Credential) -> Result<Credential, SourceError> {
    source.load_because(LoadReason::Refused(credential)).await.map(Option::unwrap)
}
