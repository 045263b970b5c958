use std::{error::Error, fmt};

use http::StatusCode;

use super::{BoxError, Refusal, ReloadError, foreign::causes};

/// Why a request that went through [`FalRetry`](crate::retry) has no response.
///
/// At most 24 bytes, and it can be matched without downcasts. The [module docs](super) say what to do about each reason.
///
/// ```
/// use tower_fal::{FalAuthError, error::Reason};
///
/// fn what_to_do(error: &FalAuthError) -> &'static str {
///     match error {
///         FalAuthError::Unauthorized(_) => "look at the key",
///         FalAuthError::Forbidden(refusal) => match refusal.reason() {
///             Reason::AccountLocked(_) => "pay the bill",
///             _ => "look at the key's permissions",
///         },
///         _ => "look at the network",
///     }
/// }
/// # let _ = what_to_do;
/// ```
///
/// With the feature `axum` it is a handler's response: the page of `tower_fal::axum` says which one.
#[doc(alias = "401")]
#[doc(alias = "403")]
#[derive(Debug)]
#[non_exhaustive]
pub enum FalAuthError {
    /// 401: the credential was refused. Another one was refused as well, did not arrive in time, or could not be tried
    /// because the request cannot be replayed. Or the application behind fal refused the request by its own rules.
    Unauthorized(Refusal),
    /// 403: the credential is valid, but it may not do this.
    Forbidden(Refusal),
    /// The request brought no credential of its own, where each one has to, and was not sent: see
    /// [`require_credential`](crate::FalRetryLayer::require_credential).
    NoCredential,
    /// The service inside failed; its error is in [`source()`](Error::source).
    Transport(BoxError),
}

impl FalAuthError {
    /// Finds this error in another one: in a [`BoxError`], behind any number of wrappers whose `source()` leads here,
    /// in an `anyhow::Error` (pass `error.as_ref()`), and with the `reqwest-middleware` feature in a
    /// `reqwest_middleware::Error`, also in one that went through reqwest-retry.
    ///
    /// It cannot be found in a wrapper of yours that is `#[error(transparent)]`: the `source()` of such a wrapper is the
    /// cause of the error inside, not that error. Give the variant a text of its own.
    ///
    /// ```
    /// use tower_fal::{FalAuthError, error::BoxError};
    ///
    /// fn status(error: &BoxError) -> u16 {
    ///     match FalAuthError::find(&**error) {
    ///         Some(FalAuthError::Forbidden(_)) => 503,
    ///         _ => 502,
    ///     }
    /// }
    /// # let _ = status;
    /// ```
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        causes(error).find_map(|error| error.downcast_ref())
    }

    /// The refusal, if it is one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => Some(refusal),
            Self::NoCredential | Self::Transport(_) => None,
        }
    }

    /// Whether retrying the same request shortly may succeed without anyone's help.
    ///
    /// It may after a 401 for a key that fal does not know, or no longer knows, if the store can still load another one:
    /// a rotation may be under way. It will not after a 403, a refusal by the application, or a refusal of a request's
    /// own credential. Nor is [`Transport`](Self::Transport) retryable here: ask the error inside.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unauthorized(refusal) => {
                let may_be_rotated =
                    !matches!(refusal.reload_error(), Some(ReloadError::NeverReloads | ReloadError::DriverGone));
                let by_fal = refusal.reason().is_cured_by_another_key();
                refusal.generation().is_some() && by_fal && may_be_rotated
            }
            Self::Forbidden(_) | Self::NoCredential | Self::Transport(_) => false,
        }
    }

    /// The error of an inner service. An error of ours is returned as it is, not wrapped again.
    pub(crate) fn from_inner(error: impl Into<BoxError>) -> Self {
        match error.into().downcast::<Self>() {
            Ok(ours) => *ours,
            Err(other) => Self::Transport(other),
        }
    }
}

impl From<Refusal> for FalAuthError {
    fn from(refusal: Refusal) -> Self {
        if refusal.status() == StatusCode::FORBIDDEN { Self::Forbidden(refusal) } else { Self::Unauthorized(refusal) }
    }
}

impl fmt::Display for FalAuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => refusal.fmt(f),
            Self::NoCredential => f.write_str(
                "the request brought no credential of its own, and was not sent: put a `Credential` into its extensions",
            ),
            Self::Transport(_) => f.write_str("the request to fal failed before there was an answer"),
        }
    }
}

impl Error for FalAuthError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            // The refusal's text is already this error's own text, so its cause comes next.
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => refusal.source(),
            Self::NoCredential => None,
            Self::Transport(error) => Some(&**error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::error::Reason;

    #[test]
    fn a_fal_auth_error_is_small() {
        assert!(size_of::<FalAuthError>() <= 24);
        assert!(size_of::<Result<http::Response<()>, FalAuthError>>() <= size_of::<http::Response<()>>() + 8);
    }

    #[test]
    fn an_error_of_ours_is_found_and_not_wrapped_again() {
        let inner: BoxError = FalAuthError::Transport("broken".into()).into();
        assert!(FalAuthError::find(&*inner).is_some());
        let passed_on = FalAuthError::from_inner(inner);
        assert!(passed_on.source().unwrap().downcast_ref::<FalAuthError>().is_none());

        let wrapped: BoxError = io::Error::other(passed_on).into();
        assert!(FalAuthError::find(&*wrapped).is_some());
        assert!(FalAuthError::find(&io::Error::other("else")).is_none());
    }

    fn refused() -> FalAuthError {
        let (status, reason) = (StatusCode::FORBIDDEN, Reason::Unknown);
        Refusal::new(crate::error::RefusalParts::of_request(status, reason, "test".into())).into()
    }

    #[test]
    fn it_is_found_in_an_anyhow_error() {
        let error = anyhow::Error::from(refused()).context("while drawing").context("while serving");
        assert!(FalAuthError::find(error.as_ref()).is_some());
    }

    #[cfg(feature = "reqwest-middleware")]
    #[test]
    fn it_is_found_in_a_reqwest_middleware_error() {
        let error = reqwest_middleware::Error::middleware(refused());
        assert!(
            error.source().is_none_or(|source| !source.is::<FalAuthError>()),
            "`source()` leads to it now, so the look inside can go"
        );
        assert!(FalAuthError::find(&error).is_some());
        let boxed: BoxError = error.into();
        assert!(FalAuthError::find(&*boxed).is_some());
    }
}
