//! Which credential a request carries: the one decision for the Tower layer, the reqwest middleware and handshakes.

use std::{fmt, sync::Arc};

use http::{Extensions, HeaderMap, Method, Request, Uri, header::AUTHORIZATION};

use super::stamp::{CrossedOrigin, SendWith, Stamp};
use crate::{
    credential::Credential,
    origin::OriginPolicy,
    store::{CredentialStore, Snapshot},
};

/// Decides which credential a request carries, if any.
#[derive(Clone)]
pub(crate) struct Authorizer<P> {
    store: Option<CredentialStore>,
    origins: P,
    /// Whether a request that has an `authorization` header already keeps it.
    pub(super) keep_existing: bool,
}

impl<P> Authorizer<P> {
    pub(super) fn new(store: Option<CredentialStore>, origins: P) -> Self {
        Self { store, origins, keep_existing: false }
    }

    pub(super) fn with_origins<Q>(self, origins: Q) -> Authorizer<Q> {
        Authorizer { store: self.store, origins, keep_existing: self.keep_existing }
    }
}

impl<P: OriginPolicy> Authorizer<P> {
    /// Puts the credential on the request, and returns it.
    #[inline]
    pub(super) fn authorize<B>(&self, request: &mut Request<B>) -> Option<SentWith> {
        let sent_with = self.choose(request.method(), request.uri(), request.headers(), request.extensions())?;
        sent_with.put_into(request.headers_mut());
        Some(sent_with)
    }

    /// The credential for a request; `None` if it is sent as it is.
    #[inline]
    pub(crate) fn choose(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        extensions: &Extensions,
    ) -> Option<SentWith> {
        // The response to a TRACE echoes the request, so it must carry no credential: RFC 9110, 9.3.8.
        let is_refused = *method == Method::TRACE || (self.keep_existing && headers.contains_key(AUTHORIZATION));
        if is_refused || !self.origins.admits(uri) {
            return None;
        }
        match (extensions.get::<Credential>(), &self.store) {
            (Some(own), _) => Some(SentWith::Own(own.clone())),
            // One snapshot, for the header and for the stamp.
            (None, Some(store)) => {
                let asked_for = extensions.get().map(|SendWith(snapshot)| snapshot.clone());
                Some(SentWith::Stores(asked_for.unwrap_or_else(|| store.load())))
            }
            (None, None) => None,
        }
    }
}

impl<P> fmt::Debug for Authorizer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorizer")
            .field("store", &self.store)
            .field("origins", &std::any::type_name::<P>())
            .field("keep_existing", &self.keep_existing)
            .finish()
    }
}

/// The credential that one request carries.
#[derive(Clone, Debug)]
pub(crate) enum SentWith {
    /// One of the store's.
    Stores(Snapshot),
    /// The one that the request brought in its extensions.
    Own(Credential),
}

impl SentWith {
    fn credential(&self) -> &Credential {
        match self {
            Self::Stores(snapshot) => snapshot.credential(),
            Self::Own(credential) => credential,
        }
    }

    #[inline]
    pub(crate) fn put_into(&self, headers: &mut HeaderMap) {
        headers.insert(AUTHORIZATION, self.credential().header().clone());
    }

    /// Marks a refused response with what its request was sent with.
    #[cold]
    pub(crate) fn stamp(&self, extensions: &mut Extensions) {
        // Where two of these layers are stacked, the inner one's header was sent, so its stamp is the true one.
        if extensions.get::<Stamp>().is_some() || extensions.get::<CrossedOrigin>().is_some() {
            return;
        }
        let (generation, source) = match self {
            Self::Stores(snapshot) => (Some(snapshot.generation()), Arc::clone(snapshot.source_arc())),
            Self::Own(credential) => (None, credential.source_arc().map_or_else(|| "request".into(), Arc::clone)),
        };
        extensions.insert(Stamp::new(generation, self.credential().clone(), source));
    }
}
