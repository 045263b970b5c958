//! What can go wrong, as values that say what to do next.
//!
//! A request that went through [`FalRetry`](crate::retry) without success is a [`FalAuthError`]. If it was refused, the
//! [`Refusal`] inside has the [`Reason`]:
//!
//! | reason | status | is it worth trying again? | what to do |
//! |---|---|---|---|
//! | [`MissingCredential`](Reason::MissingCredential) | 401 | no | look for what removes `authorization` on the way to fal |
//! | [`MalformedCredential`](Reason::MalformedCredential) | 401 | no | configure the whole key, `id:secret` |
//! | [`WrongScheme`](Reason::WrongScheme) | 401 | no | API keys: [`Credential::key`], tokens of a login: [`Credential::bearer`] |
//! | [`UnknownCredential`](Reason::UnknownCredential) | 401 | soon, if the store can load a new key | configure a valid key, from fal.ai/dashboard/keys |
//! | [`AccountLocked`](Reason::AccountLocked) | 403 | not until the account is unlocked | see [`LockReason`]: most often, top up at fal.ai/dashboard/billing |
//! | [`InsufficientPermissions`](Reason::InsufficientPermissions) | 403 | no | use a key that has the permission |
//! | [`AccessDenied`](Reason::AccessDenied) | 403 | no | check the name of the app and the account of the key |
//! | [`Application`](Reason::Application) | either | no | the application's own rules refused the request: read [`detail`](Refusal::detail) |
//! | [`Unknown`](Reason::Unknown) | either | a 401 soon, a 403 no | read [`detail`](Refusal::detail), and give [`request_id`](Refusal::request_id) to support@fal.ai |
//!
//! [`FalAuthError::is_retryable`] is the third column as a function. [`Transport`](FalAuthError::Transport) means that
//! there was no answer: whether to try again is for the error inside to say.
//!
//! ```
//! use tower_fal::{FalAuthError, error::{Reason, report}};
//!
//! /// What to tell the operator of this server.
//! fn advice(error: &FalAuthError) -> String {
//!     let Some(refusal) = error.refusal() else {
//!         return format!("no answer from fal: {}", report(error));
//!     };
//!     match refusal.reason() {
//!         Reason::UnknownCredential => format!("replace the key from {}", refusal.source_name()),
//!         Reason::AccountLocked(why) => format!("the account is locked: {why:?}"),
//!         Reason::Application => format!("the application refused it: {}", refusal.detail().unwrap_or("no reason")),
//!         _ => refusal.to_string(), // a sentence that says what to do
//!     }
//! }
//! # assert_eq!(advice(&FalAuthError::Transport("refused".into())),
//! #     "no answer from fal: the request to fal failed before there was an answer: refused");
//! ```
//!
//! A store that cannot load a credential has a [`SourceError`], or a [`ReloadError`] when a reload was asked for.
//! [`classify`] is what reads an answer of fal's; it can be used on its own.

use std::{error::Error, iter};

#[cfg(doc)]
use crate::Credential;

mod classify;
mod fal_auth;
pub(crate) mod foreign;
mod kept;
#[cfg(feature = "axum")]
pub(crate) mod problem;
mod reason;
mod refusal;
mod reload;
mod source;

pub use self::{
    classify::{Classification, classify},
    fal_auth::FalAuthError,
    reason::{LockReason, Reason},
    refusal::Refusal,
    reload::ReloadError,
    source::{SourceError, SourceErrorKind},
};
pub(crate) use self::{
    kept::Kept,
    refusal::{RefusalParts, Replayed},
};

/// A boxed error of any kind, as everywhere in Tower.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// An error and its causes in one line: `a: b: c`. A cause with the same text as the error that it caused is left out.
///
/// ```
/// # use tower_fal::error::{report, SourceError};
/// let error = SourceError::new("vault", "connection refused");
/// assert_eq!(report(&error), "vault: could not load a credential: connection refused");
/// ```
pub fn report(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<_> = iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
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
