//! What can go wrong, as values that say what to do next.

use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use crate::credential::CredentialError;

mod classify;
mod fal_auth;
mod reason;
mod refusal;

pub(crate) use self::refusal::{RefusalParts, Replayed};
pub use self::{
    classify::{Classification, classify},
    reason::{LockReason, Reason},
};
pub use self::{fal_auth::FalAuthError, refusal::Refusal};

/// A boxed error of any kind, as everywhere in Tower.
pub type BoxError = Box<dyn Error + Send + Sync>;

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

/// Why a reload failed. The last good credential is still there.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// The source failed.
    #[error("the fal credential could not be reloaded")]
    Failed(#[source] SourceError),
    /// The source has not answered yet; the load goes on.
    #[error("the source of the fal credential has not answered yet")]
    Pending,
    /// The runtime on which the store was built has ended. Build a store on a runtime that lives.
    #[error("the runtime that reloads the fal credential has ended: build the store on one that lives as long")]
    DriverGone,
    /// The store was made by [`fixed`](crate::CredentialStore::fixed) or [`from_env`](crate::CredentialStore::from_env).
    #[error("this store never reloads: use `CredentialStore::builder` with a source, or `replace`")]
    NeverReloads,
}

/// An error and its causes, from the outside in.
pub(crate) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    fn cause<'a>(error: &&'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
        let error: &'a (dyn Error + 'static) = *error;
        // Its `source()` leaves out the error that it was made from.
        #[cfg(feature = "reqwest-middleware")]
        match error.downcast_ref() {
            Some(reqwest_middleware::Error::Middleware(error)) => return Some(error.as_ref()),
            Some(reqwest_middleware::Error::Reqwest(error)) => return Some(error),
            None => {}
        }
        // An `io::Error` names what is behind the error that it wraps, and not that error.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source())
    }
    std::iter::successors(Some(error), cause)
}

/// An error and its causes in one line: `a: b: c`.
///
/// ```
/// # use tower_fal::error::{report, SourceError};
/// let error = SourceError::new("vault", "connection refused");
/// assert_eq!(report(&error), "vault: could not load a credential: connection refused");
/// ```
#[must_use]
pub fn report(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line
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

    #[test]
    fn a_report_names_every_cause() {
        let error = SourceError::malformed("file:/key", Credential::key("id").unwrap_err());
        assert_eq!(
            report(&error),
            "file:/key: holds no credential: the key has no `:`; a fal key has the form `id:secret`"
        );
    }
}
