use std::{error::Error, fmt, io, path::Path, sync::Arc};

use crate::error::{BoxError, SourceError, report};

/// How much is kept of the text of an error of a client, in characters.
const LONGEST_CAUSE: usize = 300;

/// Why a login could not be found, renewed, made or ended.
///
/// It is one pointer and `Clone`. The text names what to do next. It never holds a token, nor anything that the login's
/// endpoints have said.
///
/// ```
/// use tower_fal::login::{DeviceLogin, LoginErrorKind};
///
/// let error = DeviceLogin::new().authority("http://auth.example.com").unwrap_err();
/// assert_eq!(error.kind(), LoginErrorKind::Setting);
/// ```
#[derive(Clone)]
pub struct LoginError {
    inner: Arc<Inner>,
}

struct Inner {
    kind: LoginErrorKind,
    message: String,
    cause: Option<Cause>,
}

/// The kinds of [`LoginError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoginErrorKind {
    /// Nobody is logged in, or fal takes the login no more: somebody has to log in.
    NoLogin,
    /// The user, or the organisation, did not allow the login.
    Denied,
    /// The user did not confirm the login in time.
    TooLate,
    /// There was no answer, or one of a server that is overloaded or broken. It may be there later.
    Unreachable,
    /// There was an answer that does not follow the protocol.
    Answer,
    /// A file cannot be read, holds something else, or cannot be written.
    File,
    /// A lock is held by another process for too long, or there are no locks on this file system.
    Lock,
    /// The account that was chosen cannot be used.
    Account,
    /// The identity that came with a login is not to be trusted.
    Identity,
    /// A setting in code or in the environment cannot be used.
    Setting,
}

impl LoginError {
    pub(super) fn new(kind: LoginErrorKind, message: impl Into<String>) -> Self {
        Self { inner: Arc::new(Inner { kind, message: message.into(), cause: None }) }
    }

    /// The error of a client. Only its text is kept, without control characters.
    pub(super) fn because(kind: LoginErrorKind, message: impl Into<String>, cause: &(dyn Error + 'static)) -> Self {
        let text: String = report(cause).chars().filter(|c| !c.is_control()).take(LONGEST_CAUSE).collect();
        Self { inner: Arc::new(Inner { kind, message: message.into(), cause: Some(Cause::Text(text)) }) }
    }

    /// Something cannot be done with a file.
    pub(super) fn file(path: &Path, what: &str, cause: io::Error) -> Self {
        let message = format!("{} {what}", path.display());
        Self { inner: Arc::new(Inner { kind: LoginErrorKind::File, message, cause: Some(Cause::System(cause)) }) }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> LoginErrorKind {
        self.inner.kind
    }

    /// The same as the error of a source.
    pub(super) fn of_source(self, name: &Arc<str>) -> SourceError {
        let system = match (&self.inner.cause, self.kind()) {
            (Some(Cause::System(cause)), _) => Some(cause.kind()),
            (_, LoginErrorKind::Unreachable | LoginErrorKind::Lock | LoginErrorKind::File) => {
                Some(io::ErrorKind::Other)
            }
            (_, LoginErrorKind::NoLogin) => Some(io::ErrorKind::NotFound),
            _ => None,
        };
        let error: BoxError = match system {
            // An error of the system is how a source says of which kind its error is.
            Some(kind) => io::Error::new(kind, self).into(),
            None => self.into(),
        };
        SourceError::new(Arc::clone(name), error)
    }
}

/// What is behind an error: nothing of it comes from an answer.
enum Cause {
    System(io::Error),
    Text(String),
}

impl fmt::Display for LoginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for LoginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginError")
            .field("kind", &self.inner.kind)
            .field("message", &self.inner.message)
            .field("cause", &self.source().map(ToString::to_string))
            .finish()
    }
}

impl Error for LoginError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self.inner.cause.as_ref()? {
            Cause::System(cause) => Some(cause),
            cause @ Cause::Text(_) => Some(cause),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(cause) => cause.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for Cause {}
