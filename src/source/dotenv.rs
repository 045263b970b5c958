use std::{cell::Cell, fmt, io, path::PathBuf, time::Duration};

use zeroize::Zeroizing;

use super::{
    CredentialSource, FileSource,
    variables::{KeyVariables, shown},
};
use crate::{
    credential::Credential,
    error::{SourceError, SourceErrorKind},
};

/// Stands for a `$` while `dotenvy` reads, which would put the value of a variable in its place. Unicode gives this
/// character no meaning.
const DOLLAR: char = '\u{E000}';

/// The key in a `.env` file: `FAL_KEY`, else `FAL_KEY_ID` and `FAL_KEY_SECRET`.
///
/// The file is read and polled as by [`FileSource`], and its variables never enter the process's environment. So, unlike
/// a variable there, they can be rotated in place.
///
/// The syntax is that of `dotenvy`: `NAME=value`, `export NAME=value`, quotes and comments. But a `$` is a `$`: no
/// variable is put in its place, because a part of a secret would be lost without notice. A variable that is set twice is
/// refused, because programs disagree about which value counts. If the file is missing, or sets none of the variables to
/// a value, this is an error, as with each path that is named. See [`if_present`](Self::if_present).
///
/// ```
/// use tower_fal::source::{ChainSource, DotenvSource, EnvSource};
///
/// // The environment of a deployment, else the `.env` of a developer.
/// let source = ChainSource::new().push(EnvSource::all()).push(DotenvSource::new(".env").if_present());
/// # let _ = source;
/// ```
///
/// # What is wiped, and what is not
/// The content of the file and the values of the variables are wiped. The copies that `dotenvy` makes of each line while
/// it reads are not, and neither are its buffers.
#[derive(Clone)]
pub struct DotenvSource {
    file: FileSource,
    variables: Vec<KeyVariables>,
    if_present: bool,
}

impl DotenvSource {
    /// `FAL_KEY`, else `FAL_KEY_ID` and `FAL_KEY_SECRET`, in this file.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            file: FileSource::named("dotenv", path.into()),
            variables: vec![KeyVariables::whole(), KeyVariables::halves()],
            if_present: false,
        }
    }

    /// The one variable that holds the whole key. Default: `FAL_KEY`, else the two halves.
    #[must_use]
    pub fn variable(mut self, name: impl Into<String>) -> Self {
        self.variables = vec![KeyVariables::Whole(name.into())];
        self
    }

    /// The two variables that hold the halves of the key. Default: `FAL_KEY`, else `FAL_KEY_ID` and `FAL_KEY_SECRET`.
    #[must_use]
    pub fn pair_variables(mut self, id: impl Into<String>, secret: impl Into<String>) -> Self {
        self.variables = vec![KeyVariables::Halves { id: id.into(), secret: secret.into() }];
        self
    }

    /// Lets a file that is missing, or that sets none of the variables, mean "I have no credential, ask the next source"
    /// in place of an error. Default: an error.
    #[must_use]
    pub fn if_present(mut self) -> Self {
        self.file = self.file.if_present();
        self.if_present = true;
        self
    }

    /// How often to read the file. Default: every 5 s, each wait varied by up to a fifth.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.file = self.file.poll_every(every);
        self
    }

    fn find(&self, content: &[u8]) -> Result<Option<Credential>, SourceError> {
        let Lines { set, bad } = self.read(content)?;
        let value = |name: &str| {
            let (_, value) = set.iter().find(|(set, _)| set == name)?;
            Some(Zeroizing::new(value.as_bytes().to_vec()))
        };
        for variables in &self.variables {
            match (variables.load(self.name(), value), &bad) {
                // The variable that is missing may be in that line.
                (Err(error), Some(bad)) if error.kind() == SourceErrorKind::NotFound => {
                    return Err(self.unreadable(bad));
                }
                (Ok(None), _) => {}
                (found, _) => return found,
            }
        }
        match bad {
            Some(bad) => Err(self.unreadable(&bad)),
            None => Ok(None),
        }
    }

    /// The variables of this source that the file sets, and the first line that cannot be read.
    fn read(&self, content: &[u8]) -> Result<Lines, SourceError> {
        if content.starts_with(b"\xFF\xFE") || content.starts_with(b"\xFE\xFF") {
            return Err(SourceError::invalid(self.name(), "is UTF-16 text: save it as UTF-8"));
        }
        let text = to_text(content);
        let lines_read = Cell::new(0);
        let mut lines = Lines { set: Vec::new(), bad: None };
        for line in dotenvy::from_read_iter(LineByLine { rest: text.as_bytes(), lines_read: &lines_read }) {
            match line {
                Ok((name, value)) => {
                    let value = Zeroizing::new(value);
                    if self.variables.iter().flat_map(KeyVariables::names).any(|wanted| wanted == name) {
                        if lines.set.iter().any(|(set, _)| *set == name) {
                            return Err(SourceError::invalid(self.name(), format!("{} is set twice", shown(&name))));
                        }
                        lines.set.push((name, with_dollars(&value)));
                    }
                }
                // The error holds what stands in the line, so it goes no further.
                Err(dotenvy::Error::LineParse(line, _)) => {
                    let line = Zeroizing::new(line);
                    // A line that has others in it begins with a quote that stays open.
                    let breaks = line.matches('\n').count();
                    let number = lines_read.get().saturating_sub(breaks) + usize::from(line.ends_with('\n'));
                    lines.bad.get_or_insert(BadLine { number, is_unclosed: breaks > 0 });
                }
                Err(_) => return Err(SourceError::invalid(self.name(), "cannot be read as a `.env` file")),
            }
        }
        Ok(lines)
    }

    fn unreadable(&self, bad: &BadLine) -> SourceError {
        let hint = if bad.is_unclosed {
            "opens a quote and does not close it: put a `\\` before it, or double quotes around the value"
        } else {
            "cannot be read: put single quotes around its value"
        };
        SourceError::invalid(self.name(), format!("{}; line {} {hint}", self.says_missing(), bad.number))
    }

    fn says_missing(&self) -> String {
        let variables: Vec<_> = self.variables.iter().map(KeyVariables::to_string).collect();
        format!("does not set {}", variables.join(" or "))
    }
}

impl CredentialSource for DotenvSource {
    fn name(&self) -> &str {
        self.file.name()
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        let Some(content) = self.file.settled().await? else {
            return Ok(None);
        };
        match self.find(&content.bytes)? {
            None if !self.if_present => Err(SourceError::not_found(self.name(), self.says_missing())),
            found => Ok(found),
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
        let variables: Vec<_> = self.variables.iter().map(KeyVariables::to_string).collect();
        f.debug_struct("DotenvSource")
            .field("name", &self.name())
            .field("variables", &variables)
            .field("if_present", &self.if_present)
            .finish_non_exhaustive()
    }
}

/// What was found in a file.
struct Lines {
    set: Vec<(String, Zeroizing<String>)>,
    bad: Option<BadLine>,
}

struct BadLine {
    number: usize,
    is_unclosed: bool,
}

/// The content as `dotenvy` can read it: with a [`DOLLAR`] for each `$` that it would replace, and with U+FFFD for what is
/// no UTF-8, which may be in a comment or in another variable.
fn to_text(content: &[u8]) -> Zeroizing<String> {
    let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
    // Of all that is written, a `$` and an invalid byte grow the most, to three bytes. The text never moves.
    let mut text = Zeroizing::new(String::with_capacity(3 * content.len() + 1));
    let mut is_escaped = false;
    for chunk in content.utf8_chunks() {
        for c in chunk.valid().chars() {
            text.push(match c {
                '$' if !is_escaped => DOLLAR,
                DOLLAR => char::REPLACEMENT_CHARACTER,
                c => c,
            });
            is_escaped = c == '\\' && !is_escaped;
        }
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    text.push('\n'); // without it, a blank at the very end is an error
    text
}

fn with_dollars(value: &str) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(value.len()));
    text.extend(value.chars().map(|c| if c == DOLLAR { '$' } else { c }));
    text
}

/// Hands out at most one line at a time, so that it is known which one was read last.
struct LineByLine<'a> {
    rest: &'a [u8],
    lines_read: &'a Cell<usize>,
}

impl io::Read for LineByLine<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let line = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |end| end + 1);
        let (line, rest) = self.rest.split_at(line.min(buffer.len()));
        buffer[..line.len()].copy_from_slice(line);
        self.rest = rest;
        self.lines_read.set(self.lines_read.get() + usize::from(line.ends_with(b"\n")));
        Ok(line.len())
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
            "FAL_KEY_ID=other\nFAL_KEY=id:secret\n",
        ] {
            assert_eq!(load(content, |source| source).await, "Key id:secret", "{content}");
        }
        assert_eq!(load("FAL_KEY=no:no\nMINE=id:secret", |source| source.variable("MINE")).await, "Key id:secret");
        let long = format!("OTHER={}\nFAL_KEY=id:secret", "x".repeat(60_000));
        assert_eq!(load(long, |source| source).await, "Key id:secret");
    }

    #[tokio::test]
    async fn a_key_may_be_in_two_halves() {
        let content = "FAL_KEY_ID=id\nexport FAL_KEY_SECRET='secret'\n";
        assert_eq!(load(content, |source| source).await, "Key id:secret");
        let pair = |source: DotenvSource| source.pair_variables("I", "S");
        assert_eq!(load("FAL_KEY=no:no\nI=id\nS=secret", pair).await, "Key id:secret");
        assert_eq!(
            load("FAL_KEY_ID=id", |source| source).await,
            ": FAL_KEY_ID is set and FAL_KEY_SECRET is not: set both"
        );
        assert_eq!(load("FAL_KEY=no:no\nS=secret", pair).await, ": S is set and I is not: set both");
        assert_eq!(load("FAL_KEY=no:no", pair).await, ": does not set I+S");
        assert_eq!(load("I=id\nI=id\nS=secret", pair).await, ": I is set twice");
    }

    #[tokio::test]
    async fn a_dollar_is_a_dollar() {
        for (content, key) in [
            ("FAL_KEY=id:pa$$word", "id:pa$$word"),
            ("FAL_KEY=id:abc$NOSUCHVAR", "id:abc$NOSUCHVAR"),
            ("FAL_KEY=\"id:abc$PATH\"", "id:abc$PATH"),
            ("FAL_KEY='id:abc$PATH'", "id:abc$PATH"),
            ("PART=secret\nFAL_KEY=id:x$PART", "id:x$PART"),
            ("FAL_KEY=id:a\\$b", "id:a$b"),
            ("FAL_KEY=id:a\\\\$b", "id:a\\$b"),
            ("FAL_KEY='id:a\\$b'", "id:a\\$b"),
            ("FAL_KEY=id:a$", "id:a$"),
        ] {
            assert_eq!(load(content, |source| source).await, format!("Key {key}"), "{content}");
        }
        for template in ["FAL_KEY=$A_B:$A_C", "A_B=1\nA_C=2\nFAL_KEY=${A_B}:${A_C}", "FAL_KEY=\"id:$FAL_SECRET\""] {
            let error = load(template, |source| source).await;
            assert!(error.contains("holds a template that nothing has filled in"), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_wrong_is_said_and_never_quoted() {
        let none = ": does not set FAL_KEY or FAL_KEY_ID+FAL_KEY_SECRET";
        for (content, said) in [
            (
                "FAL_KEY=hush",
                ": holds no credential: the key has no `:`; a fal key has the form `id:secret`".to_owned(),
            ),
            ("FAL_KEY=hush:hush\nFAL_KEY=hush:more", ": FAL_KEY is set twice".to_owned()),
            ("", none.to_owned()),
            ("FAL_KEY=", none.to_owned()),
            ("FAL_KEY=' '", none.to_owned()),
            ("#\nFAL_KEY=hush:hush hush", format!("{none}; line 2 cannot be read: put single quotes around its value")),
            (
                "\u{feff}FAL_KEY_ID=hush\n\n=hush",
                format!("{none}; line 3 cannot be read: put single quotes around its value"),
            ),
        ] {
            assert_eq!(load(content, |source| source).await, said);
        }
        assert_eq!(load(b"\xFF\xFEF\0A\0L\0", |source| source).await, ": is UTF-16 text: save it as UTF-8");
        let mistaken = DotenvSource::new("hush:hush").variable("hush:hush");
        assert!(!format!("{mistaken:?} {}", mistaken.name()).contains("hush"));
    }

    #[tokio::test]
    async fn the_line_of_a_quote_that_stays_open_is_named() {
        let hint = "opens a quote and does not close it: put a `\\` before it, or double quotes around the value";
        for (content, line) in [
            ("TITLE=it's mine\nFAL_KEY=hush:hush", 1),
            ("# a comment\n\nA=1\r\nTITLE=it's mine\nFAL_KEY=hush:hush\nB=2\n", 4),
            ("A=1\nTITLE=it's mine\nFAL_KEY=hush:hush\nNOTE=that's all\n", 2),
            ("A=1\nexport FAL_KEY = 'hush:hush", 2),
            ("A='1\n2'\nFAL_KEY=\"hush:hush", 3),
        ] {
            let said = format!(": does not set FAL_KEY or FAL_KEY_ID+FAL_KEY_SECRET; line {line} {hint}");
            assert_eq!(load(content, |source| source).await, said, "{content}");
        }
        for advised in ["TITLE=it\\'s\\ mine\nFAL_KEY=id:secret", "TITLE=\"it's mine\"\nFAL_KEY=id:secret"] {
            assert_eq!(load(advised, |source| source).await, "Key id:secret");
        }
    }

    #[tokio::test]
    async fn a_byte_that_is_no_utf_8_matters_only_in_the_key() {
        assert_eq!(load(b"# caf\xE9\nNAME=caf\xE9\nFAL_KEY=id:secret", |source| source).await, "Key id:secret");
        let error = load(b"FAL_KEY=id:hush\xE9", |source| source).await;
        assert!(error.contains("a byte outside ASCII at byte 7"), "{error}");
        let error = load("FAL_KEY=id:\u{E000}", |source| source).await;
        assert!(error.contains("a byte outside ASCII at byte 3"), "{error}");
    }

    #[tokio::test]
    async fn a_file_may_be_missing_but_not_wrong() {
        let missing = DotenvSource::new("/nowhere/.env");
        assert_eq!(missing.load().await.unwrap_err().kind(), SourceErrorKind::NotFound);
        assert!(missing.if_present().load().await.unwrap().is_none());
        let if_present = |source: DotenvSource| source.if_present();
        assert_eq!(load("OTHER=1", if_present).await, "none");
        assert_eq!(load("FAL_KEY=", if_present).await, "none");
        assert!(load("FAL_KEY=half", if_present).await.contains("has no `:`"));
        assert!(load("TITLE=it's mine\nFAL_KEY=id:secret", if_present).await.contains("line 1"));
        assert!(load("FAL_KEY_ID=id", if_present).await.contains("set both"));
    }

    #[tokio::test]
    async fn the_process_environment_is_left_alone() {
        load("FAL_DOTENV_TEST=id:secret\nFAL_KEY=id:secret", |source| source.variable("FAL_DOTENV_TEST")).await;
        assert!(std::env::var_os("FAL_DOTENV_TEST").is_none());
    }
}
