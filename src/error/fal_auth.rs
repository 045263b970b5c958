use std::{error::Error, fmt};

use http::StatusCode;

use super::{BoxError, Reason, Refusal, ReloadError, foreign::causes};

/// Why a request that went through [`FalRetry`](crate::retry) has no response.
///
/// At most 24 bytes, and to be matched without downcasts:
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
/// With the feature `axum` it is a handler's response; which one, its `IntoResponse` says.
#[derive(Debug)]
#[non_exhaustive]
pub enum FalAuthError {
    /// 401: the credential was refused, and another one did not help, could not be had in time, or could not be tried
    /// because the request cannot be sent again. Or the application behind fal refused the request by its own rules.
    Unauthorized(Refusal),
    /// 403: the credential is valid and does not help.
    Forbidden(Refusal),
    /// The service inside failed; its error is in [`source()`](Error::source).
    Transport(BoxError),
}

impl FalAuthError {
    /// Finds this error in another one: in a [`BoxError`], behind any number of wrappers whose `source()` leads here,
    /// in an `anyhow::Error` (pass `error.as_ref()`), and with the `reqwest-middleware` feature in a
    /// `reqwest_middleware::Error`.
    ///
    /// A wrapper of your own that is `#[error(transparent)]` hides it: its `source()` is that of the error inside, so
    /// that the error itself is not on the way. Give such a variant a text of its own.
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
    #[must_use]
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        causes(error).find_map(|error| error.downcast_ref())
    }

    /// The refusal, if it is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => Some(refusal),
            Self::Transport(_) => None,
        }
    }

    /// Whether the very same request may well succeed a little later, without anybody doing anything.
    ///
    /// So it is with a 401 for a key that fal does not know (any more), while the store can still bring another one:
    /// a rotation may be under way. Not with a 403, an application's own refusal, or a request that brought its own
    /// credential. Of what happens in the service inside this crate knows nothing: ask its own error.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unauthorized(refusal) => {
                let may_be_rotated =
                    !matches!(refusal.reload_error(), Some(ReloadError::NeverReloads | ReloadError::DriverGone));
                let by_fal = matches!(refusal.reason(), Reason::UnknownCredential | Reason::Unknown);
                refusal.generation().is_some() && by_fal && may_be_rotated
            }
            Self::Forbidden(_) | Self::Transport(_) => false,
        }
    }

    /// The error of a service inside: one of ours is passed on, not wrapped again.
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
            Self::Transport(_) => f.write_str("the request to fal failed before there was an answer"),
        }
    }
}

impl Error for FalAuthError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            // The refusal's text is this error's own, so what comes next is what is behind it.
            Self::Unauthorized(refusal) | Self::Forbidden(refusal) => refusal.source(),
            Self::Transport(error) => Some(&**error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

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
        assert!(error.source().is_none_or(|source| !source.is::<FalAuthError>()), "`source()` has it by now");
        assert!(FalAuthError::find(&error).is_some());
        let boxed: BoxError = error.into();
        assert!(FalAuthError::find(&*boxed).is_some());
    }
}
