//! The two locks under which a login is renewed: our own, and that of fal's command line.
//!
//! fal's command line removes its lock file when it releases the lock, and again when a process that has had it exits,
//! whoever holds it then. So its lock alone excludes nobody for certain, and ours keeps the processes of this crate
//! apart. Neither file is ever removed by us.
//!
//! Source: `fal` 1.83.0 (`auth/local.py`) with `portalocker` 2.10.1 (`TemporaryFileLock`).

use std::{fs::File, path::Path, time::Duration};

use tokio::time::Instant;

use super::{
    error::{LoginError, LoginErrorKind},
    files::blocking,
};

const OURS: &str = ".tower-fal.lock";
const OF_FALS_TOOLS: &str = ".portalock";

/// How often a lock that is held is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// Both locks. They are released when this is dropped, and when the process ends, however it does.
#[derive(Debug)]
pub(super) struct Locks {
    _ours: File,
    _of_fals_tools: File,
}

impl Locks {
    /// Takes both locks, and waits no longer for each than this.
    pub(super) async fn take(home: &Path, ours: Duration, of_fals_tools: Duration) -> Result<Self, LoginError> {
        let ours = take(home, OURS, ours, "another process that uses this login is renewing it").await?;
        let of_fals_tools = take(home, OF_FALS_TOOLS, of_fals_tools, "fal's own tools hold it").await?;
        Ok(Self { _ours: ours, _of_fals_tools: of_fals_tools })
    }
}

async fn take(home: &Path, name: &str, limit: Duration, holder: &str) -> Result<File, LoginError> {
    let path = home.join(name);
    let began = Instant::now();
    loop {
        let tried = path.clone();
        if let Some(file) = blocking(move || try_to_take(&tried)).await? {
            return Ok(file);
        }
        if began.elapsed() >= limit {
            let message = format!(
                "the lock {} was not free within {limit:?}, as {holder}: see which process hangs",
                path.display()
            );
            return Err(LoginError::new(LoginErrorKind::Lock, message));
        }
        // Varied, so that many processes do not try in step.
        tokio::time::sleep(PAUSE.mul_f64(fastrand::f64() + 0.5)).await;
    }
}

/// `None` if another process holds it.
#[cfg(unix)]
fn try_to_take(path: &Path) -> Result<Option<File>, LoginError> {
    use std::{
        fs::{self, OpenOptions},
        os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    };

    use rustix::fs::{FlockOperation, flock};

    let opened = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|error| {
        LoginError::file(path, "cannot be opened, so the login cannot be renewed: make its directory writable", error)
    })?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
        Err(error) => {
            let what = "cannot be locked, so the login is not renewed: keep it on a file system with flock";
            return Err(LoginError::file(path, what, error.into()));
        }
    }
    // A lock on a file that was removed meanwhile excludes nobody.
    let same =
        |metadata: &fs::Metadata, other: &fs::Metadata| (metadata.dev(), metadata.ino()) == (other.dev(), other.ino());
    let is_there = match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(there)) => same(&held, &there),
        _ => false,
    };
    Ok(is_there.then_some(file))
}

#[cfg(not(unix))]
fn try_to_take(path: &Path) -> Result<Option<File>, LoginError> {
    let what = "cannot be locked on this system, so the login is not renewed: use a key";
    Err(LoginError::file(path, what, std::io::ErrorKind::Unsupported.into()))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_lock_is_held_by_one_and_free_when_it_is_dropped() {
        let home = tempfile::tempdir().unwrap();
        let first = Locks::take(home.path(), SHORT, SHORT).await.unwrap();
        let error = Locks::take(home.path(), SHORT, SHORT).await.unwrap_err();
        assert_eq!(error.kind(), LoginErrorKind::Lock);
        assert!(error.to_string().contains("another process that uses this login is renewing it"), "{error}");
        drop(first);
        // Not at once if another test has just made a process: until that runs its program, it has our open files.
        Locks::take(home.path(), LONG, LONG).await.unwrap();
    }

    #[tokio::test]
    async fn the_lock_of_fals_tools_is_waited_for_and_named() {
        let home = tempfile::tempdir().unwrap();
        let theirs = try_to_take(&home.path().join(OF_FALS_TOOLS)).unwrap().unwrap();
        let error = Locks::take(home.path(), SHORT, SHORT).await.unwrap_err();
        assert!(error.to_string().contains("fal's own tools hold it"), "{error}");
        let waiting = tokio::spawn({
            let home = home.path().to_owned();
            async move { Locks::take(&home, SHORT, LONG).await }
        });
        tokio::task::yield_now().await;
        drop(theirs);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn ours_excludes_even_if_fals_tools_remove_their_lock() {
        let home = tempfile::tempdir().unwrap();
        let _held = Locks::take(home.path(), SHORT, SHORT).await.unwrap();
        std::fs::remove_file(home.path().join(OF_FALS_TOOLS)).unwrap();
        let error = Locks::take(home.path(), SHORT, SHORT).await.unwrap_err();
        assert!(error.to_string().contains("another process that uses this login is renewing it"), "{error}");
    }

    #[tokio::test]
    async fn where_there_is_no_lock_there_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(OURS)).unwrap();
        let error = Locks::take(home.path(), SHORT, SHORT).await.unwrap_err();
        assert_eq!(error.kind(), LoginErrorKind::File);
        assert!(error.to_string().contains("so the login cannot be renewed"), "{error}");
    }

    #[tokio::test]
    async fn a_lock_file_that_was_removed_is_made_again() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(OF_FALS_TOOLS);
        let removed = try_to_take(&path).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        let locks = Locks::take(home.path(), SHORT, SHORT).await.unwrap();
        assert!(try_to_take(&path).unwrap().is_none());
        drop((removed, locks));
        assert!(path.exists(), "we remove no lock file");
    }
}
