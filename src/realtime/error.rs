use std::{error::Error, fmt, sync::Arc, time::Duration};

use http::StatusCode;

use super::app::InvalidApp;
use crate::{
    caller::InvalidPattern,
    error::{BoxError, FalAuthError},
};

/// Why there is no token.
///
/// It is `Clone`, so that one failed call can answer everybody who waits for it. No text in it comes from the answer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MintError {
    /// The text is not the path of an application.
    InvalidApp(InvalidApp),
    /// The application is not on the minter's list, or no application was named.
    NotAllowed,
    /// Several applications were named, and [`Body::App`](super::Body::App) names one only.
    OneApp,
    /// There is no answer, or fal has refused the credential. [`FalAuthError::find`] finds the refusal.
    Failed(Arc<dyn Error + Send + Sync>),
    /// There was no answer within the minter's [timeout](super::TokenMinterBuilder::timeout).
    TimedOut(Duration),
    /// The answer has a status that is no success.
    Status(StatusCode),
    /// The answer is a success without a token, or too long to be one.
    NoToken,
    /// The token expires before the advertised life has ended.
    ShortLived,
    /// As many other tokens are being minted as the minter may
    /// [hold](super::TokenMinterBuilder::max_cached).
    Busy,
    /// The call ended without a result: its runtime was shut down.
    Interrupted,
}

impl MintError {
    /// Why fal refused the call, or that there was no answer.
    pub fn auth_error(&self) -> Option<&FalAuthError> {
        FalAuthError::find(self)
    }

    pub(super) fn failed(error: impl Into<BoxError>) -> Self {
        Self::Failed(error.into().into())
    }
}

impl fmt::Display for MintError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidApp(error) => error.fmt(f),
            Self::NotAllowed => f.write_str("the application is not on the list of this minter: see `allow_app`"),
            Self::OneApp => {
                f.write_str("a token is for one application only with `Body::App`: use `Body::AllowedApps`")
            }
            Self::Failed(_) => f.write_str("the call that mints a token failed"),
            Self::TimedOut(limit) => write!(f, "there was no token within {limit:?}"),
            Self::Status(StatusCode::UNAUTHORIZED) => f.write_str(
                "the call that mints a token was answered with 401, and it had no credential of this crate's: put \
                 `tower_fal::layer` around the minter's service, and let its origins admit the URL",
            ),
            Self::Status(status) => write!(f, "the call that mints a token was answered with {status}"),
            Self::NoToken => f.write_str("the answer to the call that mints a token has no token in it"),
            Self::ShortLived => f.write_str(
                "the token expires too soon: advertise a shorter `lifetime`, or set the clock of this machine",
            ),
            Self::Busy => f.write_str("too many other tokens are being minted: see `max_cached`"),
            Self::Interrupted => f.write_str("the call that mints a token was ended with its runtime"),
        }
    }
}

impl Error for MintError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            // The error inside an `Arc`, so that it can be downcast to.
            Self::Failed(error) => Some(&**error),
            _ => None,
        }
    }
}

/// Why options do not make a [`TokenMinter`](super::TokenMinter).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidMinter {
    /// No application is on the list.
    #[error("no application may have a token: name one with `allow_app`")]
    NoApps,
    /// An entry of the list is no pattern.
    #[error("an application of the list cannot be one")]
    Pattern(#[source] InvalidPattern),
    /// The `rest_url` is none.
    #[error("the URL has a scheme and a host, such as `https://rest.fal.ai`, and no query")]
    Url,
    /// The life together with the reuse window is out of bounds.
    #[error("the lifetime is at least a second, and together with the reuse window at most an hour, in whole seconds")]
    Lifetime,
    /// The reuse window is shorter than the timeout.
    #[error("the reuse window is at least as long as the timeout: a token grows older while it is on its way from fal")]
    ReuseWindow,
    /// No token could be kept, so none could be minted.
    #[error("`max_cached` is at least 1: a token is kept while it is minted")]
    MaxCached,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_in_it() {
        let error = MintError::failed(FalAuthError::NoCredential);
        assert!(matches!(error.clone().auth_error(), Some(FalAuthError::NoCredential)));
        assert!(MintError::Busy.auth_error().is_none());
    }
}
