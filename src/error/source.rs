use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use super::BoxError;
use crate::credential::CredentialError;

/// Why a [source](crate::source) brought no credential.
///
/// One pointer and `Clone`, so that one failed reload can answer everyone who waits for it. The text names the
/// source and what to do next, never the content of what was read; the cause is in [`source()`](Error::source).
///
/// ```
/// # use tower_fal::error::{SourceError, SourceErrorKind};
/// let error = SourceError::new("vault", "connection refused");
/// assert_eq!(error.kind(), SourceErrorKind::Other);
/// assert_eq!(error.source_name(), "vault");
/// ```
#[derive(Clone)]
pub struct SourceError {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<str>,
    kind: SourceErrorKind,
    message: String,
    cause: Option<BoxError>,
}

/// The kinds of [`SourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// There is no credential where one was expected.
    NotFound,
    /// There is something, and it cannot be read: permissions, an I/O error, a directory in place of a file.
    Unreadable,
    /// What was read is no credential, or one that has expired already.
    Invalid,
    /// The source did not answer within the store's load time-out, or ran into a time-out of its own.
    TimedOut,
    /// The source panicked.
    Panicked,
    /// The error of a source that is not part of this crate.
    Other,
}

impl SourceError {
    /// The error of a source called `source`, for those who write their own.
    ///
    /// A `cause` that is a `SourceError` already is returned as it is; a [`CredentialError`] and an [`io::Error`]
    /// get the kind that fits. Its text will be logged: it must not hold the secret.
    pub fn new(source: impl Into<Arc<str>>, cause: impl Into<BoxError>) -> Self {
        let cause = match cause.into().downcast::<Self>() {
            Ok(already) => return *already,
            Err(cause) => cause,
        };
        let kind = if cause.is::<CredentialError>() {
            SourceErrorKind::Invalid
        } else if let Some(error) = cause.downcast_ref::<io::Error>() {
            kind_of(error)
        } else {
            SourceErrorKind::Other
        };
        Self::assemble(source, kind, "could not load a credential".to_owned(), Some(cause))
    }

    pub(crate) fn not_found(source: impl Into<Arc<str>>, message: impl Into<String>) -> Self {
        Self::assemble(source, SourceErrorKind::NotFound, message.into(), None)
    }

    pub(crate) fn unreadable(source: impl Into<Arc<str>>, message: impl Into<String>) -> Self {
        Self::assemble(source, SourceErrorKind::Unreadable, message.into(), None)
    }

    pub(crate) fn invalid(source: impl Into<Arc<str>>, message: impl Into<String>) -> Self {
        Self::assemble(source, SourceErrorKind::Invalid, message.into(), None)
    }

    pub(crate) fn malformed(source: impl Into<Arc<str>>, cause: CredentialError) -> Self {
        Self::assemble(source, SourceErrorKind::Invalid, "holds no credential".to_owned(), Some(cause.into()))
    }

    pub(crate) fn io(source: impl Into<Arc<str>>, message: impl Into<String>, cause: io::Error) -> Self {
        Self::assemble(source, kind_of(&cause), message.into(), Some(cause.into()))
    }

    pub(crate) fn timed_out(source: impl Into<Arc<str>>, limit: Duration) -> Self {
        Self::assemble(source, SourceErrorKind::TimedOut, format!("did not answer within {limit:?}"), None)
    }

    pub(crate) fn panicked(source: impl Into<Arc<str>>) -> Self {
        // Without the panic's own text: nobody knows what it holds.
        Self::assemble(source, SourceErrorKind::Panicked, "panicked while it loaded a credential".to_owned(), None)
    }

    /// The error of a source that has others behind it, with the kind of what went wrong there.
    pub(crate) fn chained(
        source: impl Into<Arc<str>>,
        kind: SourceErrorKind,
        message: String,
        cause: Option<Self>,
    ) -> Self {
        Self::assemble(source, kind, message, cause.map(Into::into))
    }

    fn assemble(source: impl Into<Arc<str>>, kind: SourceErrorKind, message: String, cause: Option<BoxError>) -> Self {
        Self { inner: Arc::new(Inner { source: source.into(), kind, message, cause }) }
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> SourceErrorKind {
        self.inner.kind
    }

    /// The name of the source that failed, such as `file:/run/secrets/fal_key`.
    #[must_use]
    pub fn source_name(&self) -> &str {
        &self.inner.source
    }
}

fn kind_of(error: &io::Error) -> SourceErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => SourceErrorKind::NotFound,
        io::ErrorKind::TimedOut => SourceErrorKind::TimedOut,
        _ => SourceErrorKind::Unreadable,
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.inner.source, self.inner.message)
    }
}

impl fmt::Debug for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceError")
            .field("source", &self.inner.source)
            .field("kind", &self.inner.kind)
            .field("message", &self.inner.message)
            .field("cause", &self.inner.cause)
            .finish()
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.inner.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::Credential;

    #[test]
    fn a_source_error_is_one_pointer() {
        assert_eq!(size_of::<SourceError>(), size_of::<usize>());
    }

    #[test]
    fn the_cause_decides_the_kind() {
        let kind = |cause: BoxError| SourceError::new("mine", cause).kind();
        assert_eq!(kind("anything".into()), SourceErrorKind::Other);
        assert_eq!(kind(Credential::key("").unwrap_err().into()), SourceErrorKind::Invalid);
        assert_eq!(kind(io::Error::from(io::ErrorKind::NotFound).into()), SourceErrorKind::NotFound);
        assert_eq!(kind(io::Error::from(io::ErrorKind::PermissionDenied).into()), SourceErrorKind::Unreadable);
    }

    #[test]
    fn a_source_error_is_not_wrapped_again() {
        let inner = SourceError::panicked("inner");
        let outer = SourceError::new("outer", inner.clone());
        assert_eq!(outer.to_string(), inner.to_string());
    }
}
