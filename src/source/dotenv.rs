use std::{fmt, path::PathBuf, time::Duration};

use zeroize::Zeroizing;

use super::{CredentialSource, FileSource, env::shown};
use crate::{
    credential::{Credential, trim},
    error::{SourceError, SourceErrorKind},
};

/// The longest value that is taken of any variable in the file, and how many `$` there may be: each one may bring in
/// another value.
const MAX_VALUE_LEN: usize = 64 * 1024;
const MOST_SUBSTITUTIONS: usize = 1000;

/// One variable of a `.env` file.
///
/// The file is read and polled as [`FileSource`] does it, and the variable never enters the process's environment:
/// unlike one that does, it can be rotated in place.
///
/// The syntax is that of `dotenvy`: `NAME=value`, `export NAME=value`, quotes, comments, and `$OTHER` for another
/// value outside of single quotes. A variable that is set twice is refused, as programs do not agree on which one
/// counts. A file that is missing, and one that does not set the variable or sets it to nothing, is an error: a path
/// is an obligation, [`if_present`](Self::if_present) lifts it.
///
/// ```
/// use tower_fal::source::{ChainSource, DotenvSource, EnvSource};
///
/// // The environment of a deployment, else the `.env` of whoever develops.
/// let source = ChainSource::new().push(EnvSource::all()).push(DotenvSource::new(".env").if_present());
/// # let _ = source;
/// ```
///
/// # What is wiped, and what is not
/// The file's content and the variable's value are wiped. The copies that `dotenvy` makes of each line while it
/// reads are not, nor are the buffers through which it does.
#[derive(Clone)]
pub struct DotenvSource {
    file: FileSource,
    variable: String,
    if_present: bool,
}

impl DotenvSource {
    /// `FAL_KEY`, in this file.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { file: FileSource::named("dotenv", path.into()), variable: "FAL_KEY".to_owned(), if_present: false }
    }

    /// The variable that holds the key. Default: `FAL_KEY`.
    #[must_use]
    pub fn variable(mut self, name: impl Into<String>) -> Self {
        self.variable = name.into();
        self
    }

    /// A file that is missing, or does not set the variable, is *not mine, ask the next one* in place of an error.
    #[must_use]
    pub fn if_present(mut self) -> Self {
        self.if_present = true;
        self
    }

    /// How often to look at the file. Default: every 5 s, each wait varied by a fifth.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.file = self.file.poll_every(every);
        self
    }

    /// The variable's value, if it has one.
    fn find(&self, content: &[u8]) -> Result<Option<Zeroizing<String>>, SourceError> {
        let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
        if content.iter().filter(|byte| **byte == b'$').count() > MOST_SUBSTITUTIONS {
            return Err(self.invalid(format!("has more than {MOST_SUBSTITUTIONS} `$`")));
        }
        let mut found = None;
        let mut has_bad_line = false;
        // A blank at the very end, and no line break behind it, would be an error.
        for line in dotenvy::from_read_iter(std::io::Read::chain(content, &b"\n"[..])) {
            let (name, value) = match line {
                Ok((name, value)) => (name, Zeroizing::new(value)),
                // The error holds a part of the line, without a name: it goes no further.
                Err(dotenvy::Error::LineParse(line, _)) => {
                    drop(Zeroizing::new(line));
                    has_bad_line = true;
                    continue;
                }
                Err(_) => return Err(self.invalid("is no UTF-8 text".to_owned())),
            };
            if value.len() > MAX_VALUE_LEN {
                return Err(self.invalid(format!("has a value that is longer than {MAX_VALUE_LEN} bytes")));
            }
            if name == self.variable && found.replace(value).is_some() {
                return Err(self.invalid(self.says("is set twice")));
            }
        }
        let found = found.filter(|value| !trim(value.as_bytes()).is_empty());
        if found.is_none() && has_bad_line {
            let hint = "is not set in it, or by a line that cannot be read: put the value into single quotes";
            return Err(self.invalid(self.says(hint)));
        }
        Ok(found)
    }

    fn says(&self, what: &str) -> String {
        format!("{} {what}", shown(&self.variable))
    }

    fn invalid(&self, message: String) -> SourceError {
        SourceError::invalid(self.name(), message)
    }
}

impl CredentialSource for DotenvSource {
    fn name(&self) -> &str {
        self.file.name()
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        let content = match self.file.settled().await {
            Err(error) if self.if_present && error.kind() == SourceErrorKind::NotFound => return Ok(None),
            content => content?,
        };
        let Some(key) = self.find(&content.bytes)? else {
            let missing = || SourceError::not_found(self.name(), self.says("is not set in it"));
            return if self.if_present { Ok(None) } else { Err(missing()) };
        };
        match Credential::key(&*key) {
            Ok(credential) => Ok(Some(credential.with_source(self.name()))),
            Err(error) => Err(SourceError::malformed(self.name(), error)),
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.file.poll_interval()
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        self.file.watched_paths()
    }
}

impl fmt::Debug for DotenvSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DotenvSource")
            .field("name", &self.name())
            .field("variable", &shown(&self.variable))
            .field("if_present", &self.if_present)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::report;

    async fn load(content: impl AsRef<[u8]>, options: impl Fn(DotenvSource) -> DotenvSource) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".env");
        fs::write(&path, content).unwrap();
        let source = options(DotenvSource::new(&path));
        let name = format!("dotenv:{}", path.display());
        assert_eq!(source.name(), name);
        match source.load().await {
            Ok(Some(key)) => {
                assert_eq!(key.source(), Some(&*name));
                key.header().to_str().unwrap().to_owned()
            }
            Ok(None) => "none".to_owned(),
            Err(error) => report(&error).strip_prefix(&*name).unwrap().to_owned(),
        }
    }

    #[tokio::test]
    async fn one_variable_is_taken_out_of_many_lines() {
        for content in [
            "FAL_KEY=id:secret",
            "FAL_KEY=id:secret ",
            "\u{feff}FAL_KEY = id:secret\r\n",
            "# a comment\n\nOTHER=1\nexport FAL_KEY='id:secret' # mine\nLAST=2\n",
            "A B C\nFAL_KEY=\"id:secret\"\n",
            "FAL_KEY_OLD=no:no\nFAL_KEY=id:secret\n",
            "ID=id\nFAL_KEY=${ID}:secret\n",
        ] {
            assert_eq!(load(content, |source| source).await, "Key id:secret", "{content}");
        }
        assert_eq!(load("FAL_KEY=no:no\nMINE=id:secret", |source| source.variable("MINE")).await, "Key id:secret");
        assert_eq!(load("FAL_KEY='id:$HOME'", |source| source).await, "Key id:$HOME");
    }

    #[tokio::test]
    async fn what_is_wrong_is_said_and_never_quoted() {
        let cannot_be_read =
            ": FAL_KEY is not set in it, or by a line that cannot be read: put the value into single quotes";
        for (content, said) in [
            ("FAL_KEY=hush:hush hush", cannot_be_read),
            ("export FAL_KEY = 'hush:hush", cannot_be_read),
            ("OTHER='hush\nFAL_KEY=hush:hush", cannot_be_read),
            ("FAL_KEY=hush:hush\nFAL_KEY=hush:more", ": FAL_KEY is set twice"),
            ("FAL_KEY=hush", ": holds no credential: the key has no `:`; a fal key has the form `id:secret`"),
            ("", ": FAL_KEY is not set in it"),
            ("FAL_KEY=", ": FAL_KEY is not set in it"),
            ("FAL_KEY=' '", ": FAL_KEY is not set in it"),
        ] {
            assert_eq!(load(content, |source| source).await, said);
        }
        assert_eq!(load(b"FAL_KEY=hush:\xFF\xFE", |source| source).await, ": is no UTF-8 text");
        let mistaken = DotenvSource::new("hush:hush").variable("hush:hush");
        assert!(!format!("{mistaken:?} {}", mistaken.name()).contains("hush"));
    }

    #[tokio::test]
    async fn a_file_that_may_be_missing_is_passed_over_and_one_that_is_wrong_is_not() {
        let missing = DotenvSource::new("/nowhere/.env");
        assert_eq!(missing.load().await.unwrap_err().kind(), SourceErrorKind::NotFound);
        assert!(missing.if_present().load().await.unwrap().is_none());
        let if_present = |source: DotenvSource| source.if_present();
        assert_eq!(load("OTHER=1", if_present).await, "none");
        assert_eq!(load("FAL_KEY=", if_present).await, "none");
        assert!(load("FAL_KEY=half", if_present).await.contains("has no `:`"));
    }

    #[tokio::test]
    async fn values_that_grow_out_of_one_another_are_bounded() {
        let double = |lines: usize| {
            let lines = (1..=lines).map(|n| format!("A{n}=${{A{}}}${{A{}}}\n", n - 1, n - 1));
            format!("A0=0123456789\n{}FAL_KEY=id:secret", lines.collect::<String>())
        };
        assert_eq!(load(double(10), |source| source).await, "Key id:secret");
        assert_eq!(load(double(100), |source| source).await, ": has a value that is longer than 65536 bytes");
        assert_eq!(load(double(501), |source| source).await, ": has more than 1000 `$`");
    }

    #[tokio::test]
    async fn the_process_environment_is_left_alone() {
        load("FAL_DOTENV_TEST=id:secret\nFAL_KEY=id:secret", |source| source.variable("FAL_DOTENV_TEST")).await;
        assert!(std::env::var_os("FAL_DOTENV_TEST").is_none());
    }
}
