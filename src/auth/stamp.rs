//! What goes along with a request and its response, in their extensions.

use http::StatusCode;

use crate::{
    credential::{AccountId, Credential, KeyId},
    store::{Generation, Mark, Snapshot},
};

/// Whether it is a status with which fal refuses a credential.
#[inline]
pub(crate) fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What a request was sent with to which fal answered `401` or `403`: in that response's extensions.
///
/// A 401 or 403 without a `Stamp` answers a request that carried no credential of this layer.
///
/// ```
/// # use http::Response;
/// # use tower_fal::auth::Stamp;
/// fn log(response: &Response<()>) {
///     if let Some(stamp) = response.extensions().get::<Stamp>() {
///         eprintln!("fal refused {:?} from {}", stamp.key_id(), stamp.source());
///     }
/// }
/// # log(&Response::new(()));
/// ```
#[derive(Clone, Debug)]
pub struct Stamp {
    sent_with: SentWith,
}

/// The credential that one request carries.
#[derive(Clone, Debug)]
pub(crate) enum SentWith {
    /// One of the store's, and the evidence for it when the request was sent.
    Stores(Snapshot, Mark),
    /// The one that the request brought in its extensions.
    Own(Credential),
}

impl Stamp {
    pub(super) fn new(sent_with: SentWith) -> Self {
        Self { sent_with }
    }

    /// Which of the store's credentials it was; `None` when the request brought its own.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.snapshot().map(Snapshot::generation)
    }

    /// The public half of the key; `None` for a login's token.
    #[must_use]
    pub fn key_id(&self) -> Option<&KeyId> {
        self.credential().key_id()
    }

    /// The account that the credential acts for, if it [names one](Credential::for_account).
    #[must_use]
    pub fn account(&self) -> Option<&AccountId> {
        self.credential().account()
    }

    /// Where the credential was found, such as `env:FAL_KEY`. A request's own one is `request` unless its
    /// [source](Credential::with_source) was noted.
    #[must_use]
    pub fn source(&self) -> &str {
        match &self.sent_with {
            SentWith::Stores(snapshot, _) => snapshot.source(),
            SentWith::Own(credential) => credential.source().unwrap_or("request"),
        }
    }

    pub(crate) fn credential(&self) -> &Credential {
        self.sent_with.credential()
    }

    /// What a store had issued; `None` when the request brought its own credential.
    pub(crate) fn snapshot(&self) -> Option<&Snapshot> {
        self.issued().map(|(snapshot, _)| snapshot)
    }

    /// The same with the evidence for it when the request was sent.
    pub(crate) fn issued(&self) -> Option<(&Snapshot, Mark)> {
        match &self.sent_with {
            SentWith::Stores(snapshot, mark) => Some((snapshot, *mark)),
            SentWith::Own(_) => None,
        }
    }
}

impl SentWith {
    pub(super) fn credential(&self) -> &Credential {
        match self {
            Self::Stores(snapshot, _) => snapshot.credential(),
            Self::Own(credential) => credential,
        }
    }
}

/// In a request's extensions: which of the store's credentials to send it with, if not with the current one. Another
/// store's layer passes it by.
#[derive(Clone)]
pub(crate) struct SendWith(pub(crate) Snapshot);

/// In a response's extensions: the client inside has followed a redirect to another origin, and the response comes from
/// there.
#[cfg_attr(not(feature = "reqwest"), allow(dead_code))] // only reqwest follows redirects inside of a service of ours
#[derive(Clone)]
pub(crate) struct CrossedOrigin;
