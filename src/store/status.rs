use std::{sync::Arc, time::SystemTime};

use super::slot::Snapshot;
use crate::{
    credential::{KeyId, Scheme},
    error::SourceError,
    generation::Generation,
};

/// What a store holds and how its source fares, without the secret.
///
/// For a readiness probe: a store always holds a credential, so a source in trouble is no reason to take a server out
/// of service. It is a reason to tell somebody:
///
/// ```
/// # use tower_fal::CredentialStore;
/// fn health(store: &CredentialStore) -> (u16, String) {
///     let status = store.status();
///     match status.last_error {
///         None => (200, format!("ok, key {:?} from {}", status.key_id, status.source)),
///         Some(error) => (200, format!("degraded, {} failures: {error}", status.consecutive_failures)),
///     }
/// }
/// # let store = CredentialStore::fixed(tower_fal::Credential::key("id:secret").unwrap());
/// # assert_eq!(health(&store).0, 200);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// Which of the store's credentials is the current one.
    pub generation: Generation,
    /// Where it was found, such as `env:FAL_KEY` or `file:/run/secrets/fal_key`.
    pub source: Arc<str>,
    /// Whether it is a key or a login's token.
    pub scheme: Scheme,
    /// The public half of a key.
    pub key_id: Option<KeyId>,
    /// When it became the current one.
    pub loaded_at: SystemTime,
    /// When the source last answered with a good credential, a changed one or not.
    pub checked_at: SystemTime,
    /// When a login's token expires.
    pub expires_at: Option<SystemTime>,
    /// Why the last load failed; `None` when it did not.
    pub last_error: Option<SourceError>,
    /// How many loads in a row have failed.
    pub consecutive_failures: u32,
    /// Whether somebody keeps the credential current.
    pub driver: DriverState,
}

/// Whether a store is kept current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DriverState {
    /// The store never reloads: it was made from a fixed credential, or from the environment.
    Absent,
    /// The driver polls the source and answers reloads.
    Running,
    /// The runtime on which the store was built has ended. The credential stays as it is.
    Ended,
}

impl Status {
    pub(super) fn new(snapshot: &Snapshot, now: SystemTime, driver: DriverState) -> Self {
        let credential = snapshot.credential();
        Self {
            generation: snapshot.generation(),
            source: Arc::clone(snapshot.source_arc()),
            scheme: credential.scheme(),
            key_id: credential.key_id().cloned(),
            loaded_at: now,
            checked_at: now,
            expires_at: credential.expires_at(),
            last_error: None,
            consecutive_failures: 0,
            driver,
        }
    }
}
