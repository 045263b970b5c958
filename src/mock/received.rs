//! What the log says of a request.

use http::{Method, StatusCode, Version};

use crate::credential::KeyId;

/// One request that arrived. It holds no secret: neither the credential nor the query is kept.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Received {
    /// The method.
    pub method: Method,
    /// Whom the request was meant for: host and port of `:authority` or `host`, as they were sent. Empty if neither
    /// was.
    pub host: String,
    /// The path, never the query.
    pub path: String,
    /// [`Version::HTTP_11`] or [`Version::HTTP_2`], seldom anything else.
    pub version: Version,
    /// The credential that it showed.
    pub presented: Presented,
    /// The status that it was answered with. `None` until then, and for good if it was never answered.
    pub status: Option<StatusCode>,
}

/// The credential of a request, as far as it may be shown. The id is there if it was a well-formed key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Presented {
    /// No `authorization` header.
    Nothing,
    /// A credential that was valid. The answer may have been 403 all the same.
    Accepted(Option<KeyId>),
    /// Anything else.
    Refused(Option<KeyId>),
}

impl Presented {
    /// The id of the key, valid or not, if it was a well-formed key.
    #[must_use]
    pub fn key_id(&self) -> Option<&KeyId> {
        match self {
            Self::Nothing => None,
            Self::Accepted(key_id) | Self::Refused(key_id) => key_id.as_ref(),
        }
    }
}
