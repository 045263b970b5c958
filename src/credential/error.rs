//! Why a text is not a credential.

use std::fmt;

/// Why a text is not a credential. The error names the rule and the position, never the content.
///
/// ```
/// # use tower_fal::Credential;
/// let error = Credential::key("Bearer id:secret").unwrap_err();
/// assert_eq!(error.to_string(), "the key starts with `Bearer `: remove that, the scheme is added when it is sent");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {part} {problem}")]
pub struct CredentialError {
    part: Part,
    problem: Problem,
}

impl CredentialError {
    /// The offset of the first byte that is not allowed, in the text as it was passed in. `None` if the text was refused
    /// for another reason.
    pub fn position(&self) -> Option<usize> {
        match self.problem {
            Problem::NotVisible { position, .. } => Some(position),
            _ => None,
        }
    }

    /// Whether the text was empty, or blank.
    pub fn is_empty(&self) -> bool {
        self.problem == Problem::Empty
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Key,
    KeyId,
    KeySecret,
    Token,
    Account,
}

impl Part {
    pub(super) fn has(self, problem: Problem) -> CredentialError {
        CredentialError { part: self, problem }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "key",
            Self::KeyId => "key id",
            Self::KeySecret => "key secret",
            Self::Token => "token",
            Self::Account => "account's user id",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Problem {
    #[error("is empty")]
    Empty,
    #[error("is longer than {most} bytes: this is something else")]
    TooLong { most: usize },
    #[error("has {class} at byte {position}; only visible ASCII may stand there")]
    NotVisible { position: usize, class: &'static str },
    #[error("is UTF-16 text: save it as UTF-8")]
    Utf16,
    #[error("starts with `{0} `: remove that, the scheme is added when it is sent")]
    WithScheme(&'static str),
    /// Surely something else. The text says what it is, and what to do.
    #[error("{0}")]
    Shape(&'static str),
    #[error("has no `:`; a fal key has the form `id:secret`")]
    NoColon,
    #[error("is URL-encoded, as `%3A` stands for its `:`: decode it once")]
    UrlEncoded,
    #[error("is the token of a login and no API key: use `Credential::bearer`, or `bearer()` of the source")]
    TokenAsKey,
    #[error("has nothing before its `:`; a fal key has the form `id:secret`")]
    NothingBeforeColon,
    #[error("has nothing behind its `:`; a fal key has the form `id:secret`")]
    NothingAfterColon,
    #[error("holds a `:`; give only the part before it, or the whole key where a key is asked for")]
    IdWithColon,
    #[error("is the whole key; give only the part behind the first `:`")]
    WholeKeyAsSecret,
    #[error("has an id that looks like a secret and a secret that looks like an id: the halves seem to be swapped")]
    Swapped,
    #[error("holds a `:`, which no token has; an API key needs `Credential::key`, or a source without `bearer()`")]
    KeyAsToken,
    #[error("has a character that no token has: only letters, digits and `-._~+/` are in one, with `=` at its end")]
    NoToken,
    #[error("looks like a credential: give the user id that fal has for the account")]
    CredentialAsAccount,
    #[error("cannot be sent in a header")]
    NoHeaderValue,
}
