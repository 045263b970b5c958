//! What the log says of a request.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, StatusCode, Version};

use crate::credential::KeyId;

/// One request that arrived.
///
/// Its credential is never kept. What else may be secret (the query, the headers, the body) is kept only after
/// [`keep_content`](super::MockFal::keep_content), and `Debug` does not show it.
#[derive(Clone)]
#[non_exhaustive]
pub struct Received {
    /// The method.
    pub method: Method,
    /// The host that the request was meant for, and its port: `:authority` or `host` as it was sent. It is empty if
    /// the request had neither.
    pub host: String,
    /// The path, without the query.
    pub path: String,
    /// [`Version::HTTP_11`] or [`Version::HTTP_2`], seldom anything else.
    pub version: Version,
    /// The credential of the request.
    pub presented: Presented,
    /// The status that it was answered with. It is `None` until then, and stays `None` if there was no answer.
    pub status: Option<StatusCode>,
    /// The query, as it was sent. `None` unless content is kept, or if there was none.
    pub query: Option<String>,
    /// The headers, but for `authorization`. Empty unless content is kept.
    pub headers: HeaderMap,
    /// How long the body was, in bytes. `None` until all of it has arrived; it stays `None` for a body that was cut
    /// off or not read, and for a WebSocket.
    pub body_length: Option<u64>,
    /// The first MiB of the body. `None` unless content is kept, and as long as `body_length` is `None`.
    pub body: Option<Bytes>,
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("method", &self.method)
            .field("host", &self.host)
            .field("path", &self.path)
            .field("version", &self.version)
            .field("presented", &self.presented)
            .field("status", &self.status)
            .field("headers", &self.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>())
            .field("body_length", &self.body_length)
            .finish_non_exhaustive()
    }
}

/// The credential of a request, as far as it may be shown: the id of a key of the right form.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Presented {
    /// There was none.
    Nothing,
    /// A valid credential. The answer may still have been a 403.
    Accepted(Option<KeyId>),
    /// Anything else.
    Refused(Option<KeyId>),
}

impl Presented {
    /// The id of the key, valid or not, if it was a key of the right form.
    pub fn key_id(&self) -> Option<&KeyId> {
        match self {
            Self::Nothing => None,
            Self::Accepted(key_id) | Self::Refused(key_id) => key_id.as_ref(),
        }
    }
}
