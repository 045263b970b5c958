//! The file in which fal's own tools keep the tokens of the login.
//!
//! The first line is the refresh token and the second, if there is one, the access token. fal's SDK writes both without
//! a line break at the end, straight into the file: whoever reads without its lock may see half of it.
//!
//! Source: `fal` 1.83.0 (`auth/local.py`), `fal_client` 1.0.3 (`auth.py`).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{
    error::{LoginError, LoginErrorKind},
    files::{self, Look, MAX_LEN, blocking},
};

const NAME: &str = "auth0_token";
/// What is about to take the place of the file. Only one process at a time has it, by the lock.
const NEXT_NAME: &str = ".auth0_token.tower-fal";

/// The longest token, in bytes. Two of them and a line break fit into the file.
const MAX_TOKEN_LEN: usize = 16 * 1024;

/// A token, in memory that is wiped when it is dropped.
#[derive(Clone)]
pub(super) struct Token(Zeroizing<String>);

impl Token {
    /// `None` for what is no token: it is empty, too long, or has other characters than a token may have in a header or
    /// in a line of the file.
    pub(super) fn new(text: impl Into<String>) -> Option<Self> {
        let text = Zeroizing::new(text.into());
        let is_token =
            !text.is_empty() && text.len() <= MAX_TOKEN_LEN && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_token.then_some(Self(text))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

/// What is in the file.
#[derive(Clone, PartialEq)]
pub(super) struct Tokens {
    pub(super) refresh: Token,
    pub(super) access: Option<Token>,
}

impl Tokens {
    /// `Ok(None)` for a file without a token.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, &'static str> {
        let text = std::str::from_utf8(bytes).map_err(|_| "is not text")?;
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let mut next = || lines.next().map(|line| Token::new(line).ok_or("has a line that is no token")).transpose();
        let Some(refresh) = next()? else { return Ok(None) };
        Ok(Some(Self { refresh, access: next()? }))
    }

    fn text(&self) -> Zeroizing<String> {
        // The length is exact: a string that grows leaves copies behind.
        let access = self.access.as_ref().map_or("", Token::as_str);
        let mut text = Zeroizing::new(String::with_capacity(self.refresh.as_str().len() + 1 + access.len()));
        text.push_str(self.refresh.as_str());
        if !access.is_empty() {
            text.push('\n');
            text.push_str(access);
        }
        text
    }
}

/// What one look found.
pub(super) struct Found {
    pub(super) tokens: Tokens,
    /// When the file was written, if the file system says so.
    pub(super) written_at: Option<SystemTime>,
}

#[derive(Clone, Debug)]
pub(super) struct TokenFile {
    directory: PathBuf,
}

impl TokenFile {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    pub(super) fn no_login(&self) -> LoginError {
        let message = format!("{} has no login: run `fal auth login`", self.path().display());
        LoginError::new(LoginErrorKind::NoLogin, message)
    }

    /// What is in the file as soon as nothing writes to it; `None` if it is missing or empty.
    pub(super) async fn settled(&self) -> Result<Option<Found>, LoginError> {
        self.understood(&files::settled(&self.path()).await?)
    }

    /// What is in the file at this moment, for those who have the locks.
    pub(super) async fn now(&self) -> Result<Option<Found>, LoginError> {
        self.understood(&files::look(&self.path()).await?)
    }

    fn understood(&self, look: &Look) -> Result<Option<Found>, LoginError> {
        match Tokens::parse(&look.bytes) {
            Ok(tokens) => Ok(tokens.map(|tokens| Found { tokens, written_at: look.written_at })),
            Err(rule) => {
                let message = format!("{} {rule}: remove it, and run `fal auth login`", self.path().display());
                Err(LoginError::new(LoginErrorKind::File, message))
            }
        }
    }

    /// Makes room for new tokens next to the file.
    pub(super) async fn make_room(&self) -> Result<Room, LoginError> {
        let (directory, path) = (self.directory.clone(), self.path());
        blocking(move || Room::make(&directory, path)).await
    }

    pub(super) async fn remove(&self) -> Result<(), LoginError> {
        let path = self.path();
        blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(LoginError::file(&path, "cannot be removed: remove it yourself", error))
            }
            _ => Ok(()),
        })
        .await
    }
}

/// A file next to the token file, as long as any that may be written. Its room is taken on the disk, so that a full or a
/// read-only disk is found before a refresh token is spent. It is removed when it is dropped.
pub(super) struct Room {
    file: Option<File>,
    path: PathBuf,
    /// The file whose place it takes: where a link leads to, if there is one.
    target: PathBuf,
}

impl Room {
    fn make(directory: &Path, path: PathBuf) -> Result<Self, LoginError> {
        let target = fs::canonicalize(&path).unwrap_or(path);
        // On the same file system as the target, or it could not be renamed.
        let path = target.parent().unwrap_or(directory).join(NEXT_NAME);
        let failed = |error| {
            let what =
                "cannot be written: the login cannot be renewed without a place on the disk that can be written to";
            LoginError::file(&path, what, error)
        };
        // A process that was killed may have left one.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&path).map_err(failed)?;
        let mut room = Self { file: Some(file), path: path.clone(), target };
        // Written and not only reserved: not every file system can do the latter.
        room.take().map_err(failed)?;
        Ok(room)
    }

    fn take(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(&[b'\n'; MAX_LEN])?;
        file.sync_all()
    }

    /// Puts the tokens in the place of the file.
    pub(super) async fn fill(mut self, tokens: Tokens) -> Result<(), LoginError> {
        blocking(move || {
            self.put(&tokens).map_err(|error| {
                let what = "cannot be written, and the tokens that it was for are lost unless a later attempt succeeds: \
                            see to the disk, or run `fal auth login`";
                LoginError::file(&self.target, what, error)
            })
        })
        .await
    }

    fn put(&mut self, tokens: &Tokens) -> io::Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let text = tokens.text();
        let written = (|| {
            file.rewind()?;
            file.write_all(text.as_bytes())?;
            file.set_len(text.len() as u64)?;
            file.sync_all()?;
            fs::rename(&self.path, &self.target)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&self.path);
        }
        written?;
        // The rename itself. Not every file system can be asked for this, and the file is whole in any case.
        if let Some(directory) = self.target.parent() {
            let _ = File::open(directory).and_then(|directory| directory.sync_all());
        }
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: impl AsRef<[u8]>) -> Result<(String, Option<String>), &'static str> {
        let tokens = Tokens::parse(text.as_ref())?.ok_or("none")?;
        Ok((tokens.refresh.as_str().to_owned(), tokens.access.map(|access| access.as_str().to_owned())))
    }

    #[test]
    fn the_first_two_lines_that_are_not_blank_are_the_tokens() {
        let both = Ok(("R".to_owned(), Some("A".to_owned())));
        for text in ["R\nA", "R\nA\n", "R\r\nA\r\n", "\nR\n\n \nA\n\n", "R\nA\nthird line", " R \n\tA"] {
            assert_eq!(parsed(text), both, "{text:?}");
        }
        assert_eq!(parsed("R"), Ok(("R".to_owned(), None)));
        assert_eq!(parsed("R\r\n"), Ok(("R".to_owned(), None)));
    }

    #[test]
    fn a_file_without_a_line_has_no_tokens() {
        for text in ["", "\n", " \r\n\t\n"] {
            assert!(Tokens::parse(text.as_bytes()).unwrap().is_none(), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_token_is_refused_by_a_rule() {
        assert_eq!(parsed(b"\xff\xfe"), Err("is not text"));
        for text in ["two words", "R\nA\u{7}", "\0\0", "R\u{e9}"] {
            assert_eq!(parsed(text), Err("has a line that is no token"), "{text:?}");
        }
        assert_eq!(parsed("x".repeat(MAX_TOKEN_LEN + 1)), Err("has a line that is no token"));
    }

    #[test]
    fn the_longest_tokens_fit_into_the_longest_file() {
        let longest = || Token::new("x".repeat(MAX_TOKEN_LEN)).unwrap();
        assert!(Tokens { refresh: longest(), access: Some(longest()) }.text().len() <= MAX_LEN);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_file_is_replaced_with_the_rights_of_its_user_alone() {
        use std::os::unix::fs::PermissionsExt as _;

        let directory = tempfile::tempdir().unwrap();
        let file = TokenFile::new(directory.path().to_owned());
        fs::write(file.path(), "R0\nA0").unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(directory.path().join(NEXT_NAME), "what a killed process has left").unwrap();

        let tokens = Tokens { refresh: Token::new("R1").unwrap(), access: Token::new("A1") };
        let room = file.make_room().await.unwrap();
        assert_eq!(fs::metadata(directory.path().join(NEXT_NAME)).unwrap().len(), MAX_LEN as u64);
        assert_eq!(fs::read(file.path()).unwrap(), b"R0\nA0");
        room.fill(tokens).await.unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"R1\nA1");
        assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);

        drop(file.make_room().await.unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a room that is not filled is removed");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_link_in_place_of_the_file_stays_a_link() {
        let [home, elsewhere] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let target = elsewhere.path().join("token");
        fs::write(&target, "R0").unwrap();
        let file = TokenFile::new(home.path().to_owned());
        std::os::unix::fs::symlink(&target, file.path()).unwrap();
        let tokens = Tokens { refresh: Token::new("R1").unwrap(), access: None };
        file.make_room().await.unwrap().fill(tokens).await.unwrap();
        assert!(fs::symlink_metadata(file.path()).unwrap().is_symlink());
        assert_eq!(fs::read(target).unwrap(), b"R1");
    }
}
