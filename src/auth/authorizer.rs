//! Which credential a request carries: the one decision for the Tower layer, the reqwest middleware and handshakes.

use std::fmt;

use http::{Extensions, HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header::AUTHORIZATION};

use super::stamp::{CrossedOrigin, SendWith, SentWith, Stamp};
use crate::{
    credential::Credential,
    origin::OriginPolicy,
    store::CredentialStore,
    wire::{self, header::USER_ID},
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

    /// Puts the credential on a handshake that is made without Tower. Returns whether it did.
    pub(super) fn authorize_handshake<B>(&self, request: &mut Request<B>) -> bool {
        let admitted = self.origins.admits_handshake(request.uri());
        let (method, uri, headers) = (request.method(), request.uri(), request.headers());
        let sent_with = self.choose_if(admitted, method, uri, headers, request.extensions());
        sent_with.inspect(|sent_with| sent_with.put_into(request.headers_mut())).is_some()
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
        self.choose_if(self.origins.admits(uri), method, uri, headers, extensions)
    }

    #[inline]
    fn choose_if(
        &self,
        admitted: bool,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        extensions: &Extensions,
    ) -> Option<SentWith> {
        // The response to a TRACE echoes the request, so it must carry no credential: RFC 9110, 9.3.8.
        let is_refused = *method == Method::TRACE || (self.keep_existing && headers.contains_key(AUTHORIZATION));
        if is_refused || !admitted || !self.origins.admits_host(uri, headers) {
            return None;
        }
        match (extensions.get::<Credential>(), &self.store) {
            (Some(own), _) => Some(SentWith::Own(own.clone())),
            // One snapshot, for the header and for the stamp.
            (None, Some(store)) => {
                let asked_for = extensions.get().filter(|SendWith(snapshot)| store.issued(snapshot));
                let snapshot = asked_for.map_or_else(|| store.load(), |SendWith(snapshot)| snapshot.clone());
                let mark = snapshot.mark();
                Some(SentWith::Stores(snapshot, mark))
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

impl SentWith {
    #[inline]
    pub(crate) fn put_into(&self, headers: &mut HeaderMap) {
        let credential = self.credential();
        let is_replaced = headers.insert(AUTHORIZATION, credential.header().clone()).is_some();
        if is_replaced || credential.account_header().is_some() {
            put_account(credential.account_header(), headers);
        }
    }

    /// Notes what a response proves about the credential: nothing new if it was accepted when the request was sent.
    #[inline]
    pub(crate) fn observe(&self, status: StatusCode, headers: &HeaderMap, extensions: &Extensions) {
        if let Self::Stores(snapshot, mark) = self
            && snapshot.wants_proof()
            && is_proof(status, headers, extensions)
        {
            snapshot.note_accepted(*mark);
        }
    }

    /// Marks a refused response with what its request was sent with.
    #[cold]
    pub(crate) fn stamp(&self, extensions: &mut Extensions) {
        // Where two of these layers are stacked, the inner one's header was sent, so its stamp is the true one.
        if extensions.get::<Stamp>().is_none() && extensions.get::<CrossedOrigin>().is_none() {
            extensions.insert(Stamp::new(self.clone()));
        }
    }
}

/// Puts the account beside its credential. A credential without one leaves a caller's own as it is, and takes away that
/// of a credential which it replaces: a handshake may be authorized again, and two of these layers may be stacked.
#[cold]
fn put_account(account: Option<&HeaderValue>, headers: &mut HeaderMap) {
    if let Some(account) = account {
        headers.insert(USER_ID, account.clone());
    } else if headers.get(USER_ID).is_some_and(HeaderValue::is_sensitive) {
        headers.remove(USER_ID);
    }
}

/// Whether a response proves that fal has accepted the credential of its request: only then comes a 2xx, or any response of
/// a runner. A gateway's 502 proves nothing.
#[cold]
fn is_proof(status: StatusCode, headers: &HeaderMap, extensions: &Extensions) -> bool {
    (status.is_success() || wire::is_of_a_runner(headers)) && extensions.get::<CrossedOrigin>().is_none()
}
