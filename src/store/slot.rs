use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;

use crate::{credential::Credential, generation::Generation};

/// A credential as the store held it at one moment: what one request is sent with.
///
/// Cheap to clone. It keeps its secret in memory for as long as it lives, so it belongs to a request and not into
/// a struct.
#[derive(Clone)]
pub struct Snapshot {
    inner: Arc<Published>,
}

struct Published {
    credential: Credential,
    generation: Generation,
    source: Arc<str>,
}

impl Snapshot {
    pub(super) fn new(credential: Credential, generation: Generation, source: Arc<str>) -> Self {
        Self { inner: Arc::new(Published { credential, generation, source }) }
    }

    /// The credential.
    #[must_use]
    pub fn credential(&self) -> &Credential {
        &self.inner.credential
    }

    /// Which of the store's credentials it is.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.inner.generation
    }

    /// Where the credential was found, such as `env:FAL_KEY`.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.inner.source
    }

    pub(crate) fn source_arc(&self) -> &Arc<str> {
        &self.inner.source
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("credential", self.credential())
            .field("generation", &self.generation().get())
            .field("source", &self.source())
            .finish()
    }
}

/// Where the current snapshot lies: many readers, who take no lock, and one writer at a time.
///
/// The only place that knows of `arc-swap`.
pub(super) struct Slot(ArcSwap<Published>);

impl Slot {
    pub(super) fn new(first: Snapshot) -> Self {
        Self(ArcSwap::new(first.inner))
    }

    pub(super) fn load(&self) -> Snapshot {
        // A whole reference, not a guard: it stays with the request until the response is there, and guards that
        // live long or pile up cost every other reader.
        Snapshot { inner: self.0.load_full() }
    }

    pub(super) fn publish(&self, next: Snapshot) {
        self.0.store(next.inner);
    }
}
