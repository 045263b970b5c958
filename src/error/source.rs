use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use serde_json::error::Category;

use super::{BoxError, foreign, report};
use crate::credential::{Credential, CredentialError, redact};

/// What an error of [`SourceError::new`] says before its cause.
const NO_CREDENTIAL: &str = "could not load a credential";

/// Why a [source](crate::source) could not load a credential.
///
/// It is one pointer and `Clone`, so that one failed reload can answer every request that waits for it. The text names
/// the source and what to do next, and never the content of what was read. The cause is in [`source()`](Error::source).
///
/// # The errors of other crates
/// An error that this crate does not know may hold a secret: a URL with a token in its query, the value that a parser
/// cannot read, the bytes of a text that is no UTF-8. So only its text is kept, and the texts of its causes, in at most
/// 500 characters each. What looks like a secret is left out of them, and so are, in a store, the secrets of the
/// credentials that it knows. Of serde_json's errors only the kind and the place are kept. The error itself is dropped:
/// it cannot be downcast to, and it is not in `Debug`.
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
    cause: Option<Cause>,
}

/// What is behind a [`SourceError`]. None of these can show a secret.
#[derive(Clone)]
enum Cause {
    Credential(CredentialError),
    Source(SourceError),
    /// An error of the system: a number, without a text of others.
    System(Arc<io::Error>),
    Foreign(Foreign),
}

/// The kinds of [`SourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// There is no credential where one was expected.
    NotFound,
    /// There is something, and it cannot be read: permissions, an I/O error, a directory in place of a file.
    Unreadable,
    /// What was read is not a credential, or is one that has expired already.
    Invalid,
    /// The source did not answer within the store's load timeout, or ran into a timeout of its own.
    TimedOut,
    /// The source panicked.
    Panicked,
    /// The error of a source that is not part of this crate.
    Other,
}

impl SourceError {
    /// The error of a source called `source`, for sources of your own.
    ///
    /// A `cause` that is a `SourceError` already is returned as it is. A [`CredentialError`] and an [`io::Error`] get
    /// the [kind](Self::kind) that fits, and all others are [`Other`](SourceErrorKind::Other). The error of another
    /// crate is kept [as text](Self#the-errors-of-other-crates).
    pub fn new(source: impl Into<Arc<str>>, cause: impl Into<BoxError>) -> Self {
        let cause = match cause.into().downcast::<Self>() {
            Ok(already) => return *already,
            Err(cause) => cause,
        };
        let cause = match cause.downcast::<CredentialError>() {
            Ok(cause) => {
                return Self::with_cause(source, SourceErrorKind::Invalid, NO_CREDENTIAL, Cause::Credential(*cause));
            }
            Err(cause) => cause,
        };
        match cause.downcast::<io::Error>() {
            Ok(cause) => Self::io(source, NO_CREDENTIAL, *cause),
            Err(cause) => {
                let cause = Cause::Foreign(Foreign::new(&*cause));
                Self::with_cause(source, SourceErrorKind::Other, NO_CREDENTIAL, cause)
            }
        }
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
        Self::with_cause(source, SourceErrorKind::Invalid, "holds no credential", Cause::Credential(cause))
    }

    pub(crate) fn io(source: impl Into<Arc<str>>, message: impl Into<String>, cause: io::Error) -> Self {
        let kind = kind_of(&cause);
        let cause = match cause.get_ref() {
            Some(_) => Cause::Foreign(Foreign::new(&cause)),
            None => Cause::System(Arc::new(cause)),
        };
        Self::with_cause(source, kind, message, cause)
    }

    pub(crate) fn timed_out(source: impl Into<Arc<str>>, limit: Duration) -> Self {
        Self::assemble(source, SourceErrorKind::TimedOut, format!("did not answer within {limit:?}"), None)
    }

    pub(crate) fn panicked(source: impl Into<Arc<str>>) -> Self {
        // Without the panic's own text, which may hold anything.
        Self::assemble(source, SourceErrorKind::Panicked, "panicked while it loaded a credential".to_owned(), None)
    }

    /// The error of a source that has others behind it, with the kind of what went wrong there.
    pub(crate) fn chained(
        source: impl Into<Arc<str>>,
        kind: SourceErrorKind,
        message: String,
        cause: Option<Self>,
    ) -> Self {
        Self::assemble(source, kind, message, cause.map(Cause::Source))
    }

    fn with_cause(
        source: impl Into<Arc<str>>,
        kind: SourceErrorKind,
        message: impl Into<String>,
        cause: Cause,
    ) -> Self {
        Self::assemble(source, kind, message.into(), Some(cause))
    }

    fn assemble(source: impl Into<Arc<str>>, kind: SourceErrorKind, message: String, cause: Option<Cause>) -> Self {
        Self { inner: Arc::new(Inner { source: source.into(), kind, message, cause }) }
    }

    /// The same error without the secrets of these credentials in the texts of others.
    pub(crate) fn without<'a>(self, credentials: impl Iterator<Item = &'a Credential> + Clone) -> Self {
        let cause = match &self.inner.cause {
            Some(Cause::Source(cause)) => Cause::Source(cause.clone().without(credentials)),
            Some(Cause::Foreign(cause)) => Cause::Foreign(cause.clone().without(credentials)),
            _ => return self,
        };
        let Inner { source, kind, message, .. } = &*self.inner;
        Self::with_cause(Arc::clone(source), *kind, message.clone(), cause)
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> SourceErrorKind {
        self.inner.kind
    }

    /// The name of the source that failed, such as `file:/run/secrets/fal_key`.
    pub fn source_name(&self) -> &str {
        &self.inner.source
    }

    /// The error in one line, in this crate's own words. In place of an error of another crate it has the
    /// [kind](Self::kind), so it suits an answer that others than the operator read, such as that of a readiness probe.
    ///
    /// ```
    /// # use tower_fal::error::SourceError;
    /// let error = SourceError::new("vault", "connection refused");
    /// assert_eq!(error.summary(), "vault: could not load a credential (other; its own error is not shown here)");
    /// ```
    pub fn summary(&self) -> String {
        match &self.inner.cause {
            None => self.to_string(),
            Some(Cause::Source(cause)) => format!("{self}: {}", cause.summary()),
            Some(Cause::Credential(cause)) => format!("{self}: {cause}"),
            Some(Cause::System(cause)) => format!("{self}: {cause}"),
            Some(Cause::Foreign(_)) => format!("{self} ({}; its own error is not shown here)", self.kind().as_str()),
        }
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
            .field("cause", &self.source().map(report))
            .finish()
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self.inner.cause.as_ref()? {
            Cause::Credential(cause) => Some(cause),
            Cause::Source(cause) => Some(cause),
            Cause::System(cause) => Some(&**cause),
            Cause::Foreign(cause) => Some(cause),
        }
    }
}

impl SourceErrorKind {
    /// A short name that does not change, for logs and readiness bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Unreadable => "unreadable",
            Self::Invalid => "invalid",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
            Self::Other => "other",
        }
    }
}

/// What is kept of an error that this crate does not know: its text and those of its causes.
#[derive(Clone)]
struct Foreign {
    text: String,
    cause: Option<Box<Self>>,
}

impl Foreign {
    /// How many causes are kept. A chain that leads back to itself has no end.
    const MOST_CAUSES: usize = 8;

    fn new(error: &(dyn Error + 'static)) -> Self {
        let mut texts: Vec<_> = foreign::causes(error).take(1 + Self::MOST_CAUSES).map(text_of).collect();
        texts.dedup(); // some wrappers show the error inside as their own text
        let cause = texts.drain(1..).rev().fold(None, |cause, text| Some(Box::new(Self { text, cause })));
        Self { text: texts.pop().unwrap_or_default(), cause }
    }

    fn without<'a>(mut self, credentials: impl Iterator<Item = &'a Credential> + Clone) -> Self {
        for credential in credentials.clone() {
            self.text = credential.strike_out(&self.text);
        }
        self.cause = self.cause.map(|cause| Box::new(cause.without(credentials)));
        self
    }
}

fn text_of(error: &(dyn Error + 'static)) -> String {
    match error.downcast_ref::<serde_json::Error>() {
        // Its own text quotes the value that it did not expect.
        Some(error) => {
            let category = match error.classify() {
                Category::Io => "cannot be read",
                Category::Syntax => "has a mistake in its syntax",
                Category::Data => "does not have the expected form",
                Category::Eof => "ends too early",
            };
            format!("the JSON {category}, at line {}, column {}", error.line(), error.column())
        }
        None => redact(error),
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Foreign {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
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

    /// All the ways in which an error is printed.
    fn printed(error: &SourceError) -> String {
        let mut printed = format!("{error} {error:?} {error:#?} {} {}", report(error), error.summary());
        let mut next = error.source();
        while let Some(cause) = next {
            printed += &format!(" {cause} {cause:?}");
            next = cause.source();
        }
        printed
    }

    #[test]
    fn a_text_that_is_no_utf_8_shows_none_of_its_bytes() {
        let error = String::from_utf8(b"id:hush\xFF".to_vec()).unwrap_err();
        let error = SourceError::new("mine", error);
        assert_eq!(report(&error), "mine: could not load a credential: invalid utf-8 sequence of 1 bytes from index 7");
        let bytes = format!("{:?}", b"hush");
        assert!(!printed(&error).contains(bytes.trim_matches(['[', ']'])), "{error:?}");
    }

    #[test]
    fn an_error_of_serde_json_says_where_it_is_and_nothing_else() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the answer: {0}")]
        struct Wrapped(#[from] serde_json::Error);

        let error = || serde_json::from_str::<u8>(r#""id:hush""#).unwrap_err();
        assert!(error().to_string().contains("hush"));
        let plain = SourceError::new("mine", error());
        let said = "could not load a credential: the JSON does not have the expected form, at line 1, column 9";
        assert_eq!(report(&plain), format!("mine: {said}"));
        for error in
            [plain, SourceError::new("mine", Wrapped(error())), SourceError::new("mine", io::Error::other(error()))]
        {
            assert!(!printed(&error).contains("hush"), "{error:?}");
        }
    }

    #[test]
    fn a_foreign_error_is_kept_as_text_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("GET https://me:hush@vault/v1?token=hush failed")]
        struct Outer {
            secret: &'static str,
            #[source]
            cause: io::Error,
        }

        let cause = io::Error::other("connection refused");
        let error = SourceError::new("mine", Outer { secret: "hush", cause });
        let said = "mine: could not load a credential: GET https://…@vault/v1?… failed: connection refused";
        assert_eq!(report(&error), said);
        assert_eq!(error.summary(), "mine: could not load a credential (other; its own error is not shown here)");
        assert!(!printed(&error).contains("hush"), "{error:?}");
    }

    #[test]
    fn an_error_that_is_its_own_cause_comes_to_an_end() {
        #[derive(Debug, thiserror::Error)]
        #[error("endless {0}")]
        struct Endless(u8, #[source] Option<Box<Self>>);

        let endless = (0..100).fold(None, |cause, n| Some(Box::new(Endless(n, cause)))).unwrap();
        let causes = report(&SourceError::new("mine", endless)).matches("endless").count();
        assert_eq!(causes, 1 + Foreign::MOST_CAUSES);
    }

    #[test]
    fn a_known_secret_is_left_out_of_the_texts_of_others() {
        let known = [Credential::key("id:hush").unwrap(), Credential::bearer("hush-2").unwrap()];
        let inner = SourceError::new("inner", "the server said: id:hush, hush and hush-2");
        let outer = SourceError::chained("outer", inner.kind(), "inner failed".to_owned(), Some(inner));
        assert!(printed(&outer).contains("hush"));
        let outer = outer.without(known.iter().rev());
        let said = "outer: inner failed: inner: could not load a credential: the server said: …, … and …";
        assert_eq!(report(&outer), said);
        assert!(!printed(&outer).contains("hush"), "{outer:?}");
    }

    #[test]
    fn a_summary_has_our_own_words_in_full() {
        for (error, said) in [
            (SourceError::not_found("mine", "has none"), "mine: has none"),
            (
                SourceError::malformed("mine", Credential::key("").unwrap_err()),
                "mine: holds no credential: the key is empty",
            ),
            (
                SourceError::io("mine", "cannot be read", io::ErrorKind::PermissionDenied.into()),
                "mine: cannot be read: permission denied",
            ),
            (
                SourceError::new("mine", io::Error::new(io::ErrorKind::TimedOut, "hush")),
                "mine: could not load a credential (timed_out; its own error is not shown here)",
            ),
        ] {
            assert_eq!(error.summary(), said);
        }
    }
}
