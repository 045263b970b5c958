//! What can go wrong, as values that say what to do next.

use std::error::Error;

mod classify;
mod fal_auth;
pub(crate) mod foreign;
#[cfg(feature = "axum")]
pub(crate) mod problem;
mod reason;
mod refusal;
mod reload;
mod source;

pub(crate) use self::refusal::{RefusalParts, Replayed};
pub use self::{
    classify::{Classification, classify},
    fal_auth::FalAuthError,
    reason::{LockReason, Reason},
    refusal::Refusal,
    reload::ReloadError,
    source::{SourceError, SourceErrorKind},
};

/// A boxed error of any kind, as everywhere in Tower.
pub type BoxError = Box<dyn Error + Send + Sync>;

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
