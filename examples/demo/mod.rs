//! The choice that `stream`, `websocket` and `queue` give you: a fal in this process, or the real one.

use std::sync::Arc;

use clap::{ArgAction, Args};
use rustls::{ClientConfig, RootCertStore};
use serde::de::IgnoredAny;
use tower_fal::{CredentialStore, error::BoxError, source::EnvSource};

use crate::terminal::Printable;

/// Where the example runs its app.
#[derive(Args)]
pub(crate) struct Target {
    /// Use a fal inside this process: it needs no key and no network. This is the default
    #[arg(long, conflicts_with = "live")]
    demo: bool,
    /// Run APP with INPUT, which is JSON, at the real fal, which bills it. This needs FAL_KEY, or FAL_KEY_ID and
    /// FAL_KEY_SECRET, or FAL_KEY_FILE
    #[arg(long, action = ArgAction::Set, num_args = 2, value_names = ["APP", "INPUT"])]
    live: Option<Vec<String>>,
}

/// What to run at the real fal.
pub(crate) struct Live {
    pub(crate) store: CredentialStore,
    pub(crate) app: String,
    pub(crate) input: String,
}

impl Target {
    /// `None` asks for the demonstration.
    pub(crate) async fn live(self) -> Result<Option<Live>, BoxError> {
        let Some([app, input]) = self.live.as_deref() else { return Ok(None) };
        // What was mistyped here would be a riddle in fal's answer.
        serde_json::from_str::<IgnoredAny>(input).map_err(|error| format!("INPUT is not JSON: {error}"))?;
        let store = CredentialStore::builder(EnvSource::all()).build().await?;
        let credential = format!("{:?} from {}", store.load().credential(), store.status().source);
        eprintln!("credential: {}", Printable(&credential));
        Ok(Some(Live { store, app: app.clone(), input: input.clone() }))
    }
}

/// rustls with the roots of Mozilla. Its provider is named here, because several may be compiled in.
#[allow(dead_code)] // `stream` has a connector that brings this
pub(crate) fn tls() -> Result<ClientConfig, rustls::Error> {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
