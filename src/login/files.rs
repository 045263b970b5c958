//! Small files that other programs write: read to a limit, off the runtime's threads, and not while they are written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    path::Path,
    time::{Duration, SystemTime},
};

use zeroize::Zeroizing;

use super::error::{LoginError, LoginErrorKind};

/// The longest file that is read, in bytes.
pub(super) const MAX_LEN: usize = 64 * 1024;

/// A file that was written to less than this ago may be half-written. It is read again after this time.
const SETTLE: Duration = Duration::from_millis(100);

/// How often a file is read until it is at rest.
const MOST_LOOKS: u32 = 10;

/// Runs it on a thread for blocking work.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LoginError> + Send + 'static,
) -> Result<T, LoginError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(LoginError::new(LoginErrorKind::File, "the runtime is shutting down: keep it until `settled` has returned"))
    })
}

/// What is in a file as soon as nothing writes to it. A file that is missing is like an empty one.
pub(super) async fn settled(path: &Path) -> Result<Look, LoginError> {
    let mut last: Option<Look> = None;
    for _ in 0..MOST_LOOKS {
        let look = look(path).await?;
        if look.is_at_rest || last.is_some_and(|last| last.bytes == look.bytes) {
            return Ok(look);
        }
        last = Some(look);
        tokio::time::sleep(SETTLE).await;
    }
    let message = format!("{} is written to again and again: see which program does that", path.display());
    Err(LoginError::new(LoginErrorKind::File, message))
}

/// What is in a file at this moment.
pub(super) async fn look(path: &Path) -> Result<Look, LoginError> {
    let path = path.to_owned();
    blocking(move || look_now(&path)).await
}

fn broken(path: &Path, rule: &str) -> LoginError {
    LoginError::new(LoginErrorKind::File, format!("{} {rule}", path.display()))
}

#[derive(Default)]
pub(super) struct Look {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// When it was written, if the file system says so.
    pub(super) written_at: Option<SystemTime>,
    is_at_rest: bool,
}

fn look_now(path: &Path) -> Result<Look, LoginError> {
    let now = SystemTime::now();
    let failed = |error| LoginError::file(path, "cannot be read: let the user of this process read it", error);
    let mut file = match open(path) {
        Ok(Some(file)) => file,
        Ok(None) => return Err(broken(path, "is no regular file: remove it")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Look { is_at_rest: true, ..Look::default() });
        }
        Err(error) => return Err(failed(error)),
    };
    // The whole buffer at once: a vector that grows leaves copies of the tokens behind.
    let mut bytes = Zeroizing::new(vec![0; MAX_LEN + 1]);
    let mut length = 0;
    loop {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    if length > MAX_LEN {
        return Err(broken(path, "is longer than 65536 bytes: remove what does not belong there"));
    }
    bytes.truncate(length);
    let written_at = file.metadata().and_then(|metadata| metadata.modified()).ok();
    let is_at_rest =
        written_at.and_then(|written| now.duration_since(written).ok()).is_some_and(|since| since >= SETTLE);
    Ok(Look { bytes, written_at, is_at_rest })
}

/// `None` if it is something else than a file. Checked before, as opening a device may have an effect, and after.
fn open(path: &Path) -> io::Result<Option<File>> {
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut options = OpenOptions::new();
    options.read(true);
    // A FIFO that has taken the file's place must not hold the thread.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path)?;
    Ok(file.metadata()?.is_file().then_some(file))
}
