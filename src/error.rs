//! What can go wrong, as values that say what to do next.

use std::{error::Error, io};

mod classify;
mod fal_auth;
mod reason;
mod refusal;
mod source;

pub(crate) use self::refusal::{RefusalParts, Replayed};
pub use self::{
    classify::{Classification, classify},
    reason::{LockReason, Reason},
    source::{SourceError, SourceErrorKind},
};
pub use self::{fal_auth::FalAuthError, refusal::Refusal};

/// A boxed error of any kind, as everywhere in Tower.
pub type BoxError = Box<dyn Error + Send + Sync>;

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
    fn a_report_names_every_cause() {
        let error = SourceError::malformed("file:/key", Credential::key("id").unwrap_err());
        assert_eq!(
            report(&error),
            "file:/key: holds no credential: the key has no `:`; a fal key has the form `id:secret`"
        );
    }
}
