//! One look at one file: what is in it, and whether it was being written.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read as _},
    path::Path,
    time::{Duration, SystemTime},
};

use zeroize::Zeroizing;

/// The largest file read, in bytes.
pub(super) const MAX_FILE_LEN: usize = 64 * 1024;

/// A file whose last write is less than this ago may be half-written. It is read again after this time.
pub(super) const SETTLE: Duration = Duration::from_millis(100);

pub(super) struct Found {
    /// In a buffer that is wiped when it is dropped.
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) stamp: Stamp,
    /// No write was seen during the look.
    pub(super) is_whole: bool,
    /// Nor shortly before it.
    pub(super) is_at_rest: bool,
    pub(super) is_world_writable: bool,
}

pub(super) enum Failed {
    Io(&'static str, io::Error),
    Directory,
    /// A device, a FIFO or a socket.
    Special,
    TooLong,
}

/// What changes with each write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { length: metadata.len(), modified: metadata.modified().ok() }
    }

    /// Whether the last write was a while before this time. A write in the future tells nothing.
    fn is_settled_at(&self, time: SystemTime) -> bool {
        let since = self.modified.and_then(|modified| time.duration_since(modified).ok());
        since.is_some_and(|since| since >= SETTLE)
    }
}

/// Reads a file. This blocks.
pub(super) fn read(path: &Path) -> Result<Found, Failed> {
    // Before the look: if this thread is stopped in the middle of it, a write meanwhile must not look like an old one.
    read_at(path, SystemTime::now())
}

fn read_at(path: &Path, now: SystemTime) -> Result<Found, Failed> {
    let failed = |what| move |error| Failed::Io(what, error);
    // Checked twice. Before, because opening a device can have an effect; after, because the path may have changed.
    refuse_special(&std::fs::metadata(path).map_err(failed("cannot be found"))?)?;
    let mut file = open(path).map_err(failed("cannot be opened"))?;
    let before = file.metadata().map_err(failed("cannot be read"))?;
    refuse_special(&before)?;

    let stated = usize::try_from(before.len()).unwrap_or(usize::MAX);
    // The files of procfs and of some FUSE file systems state a length of 0, whatever is in them.
    let most = if stated == 0 { MAX_FILE_LEN } else { stated.min(MAX_FILE_LEN) };
    let bytes = read_up_to(&mut file, most + 1).map_err(failed("cannot be read"))?;
    if bytes.len() > MAX_FILE_LEN {
        return Err(Failed::TooLong);
    }
    let stamp = Stamp::of(&file.metadata().map_err(failed("cannot be read"))?);
    let is_whole = stamp == Stamp::of(&before) && (stated == 0 || stated == bytes.len());
    Ok(Found {
        bytes,
        stamp,
        is_whole,
        is_at_rest: is_whole && stamp.is_settled_at(now),
        is_world_writable: is_world_writable(&before),
    })
}

fn refuse_special(metadata: &Metadata) -> Result<(), Failed> {
    match metadata {
        _ if metadata.is_file() => Ok(()),
        _ if metadata.is_dir() => Err(Failed::Directory),
        _ => Err(Failed::Special),
    }
}

/// Whether every user may write into a file, or replace the files in a directory. In a sticky directory, such as
/// `/tmp`, they may not.
pub(super) fn is_world_writable(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(metadata);
        mode & 0o002 != 0 && !(metadata.is_dir() && mode & 0o1000 != 0)
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        false
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    // A FIFO that has taken the file's place must not hold the thread until something writes to it.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}

/// The content, or the first `most` bytes of it.
fn read_up_to(file: &mut File, most: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    // The whole buffer at once: a vector that grows, as in `read_to_end`, leaves copies of the secret behind.
    let mut content = Zeroizing::new(vec![0; most]);
    let mut length = 0;
    while length < most {
        match file.read(&mut content[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    content.truncate(length);
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_at_rest_a_while_after_its_last_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "id:secret").unwrap();
        let written = fs::metadata(file.path()).unwrap().modified().unwrap();
        for (looked, is_at_rest) in [
            (written + SETTLE, true),
            (written + SETTLE - Duration::from_nanos(1), false),
            // A thread that was stopped for a minute after its look had begun, or a clock that was set back.
            (written - Duration::from_secs(60), false),
        ] {
            let found = read_at(file.path(), looked).ok().unwrap();
            assert_eq!((found.is_whole, found.is_at_rest), (true, is_at_rest), "{looked:?}");
        }
    }

    /// What is done to the file and not to its content is no sign that the writer has finished.
    #[cfg(unix)]
    #[test]
    fn a_change_of_the_mode_or_the_name_is_no_rest() {
        use std::os::unix::fs::PermissionsExt as _;

        let directory = tempfile::tempdir().unwrap();
        let (aside, path) = (directory.path().join("aside"), directory.path().join("key"));
        fs::write(&aside, "id:ha").unwrap();
        let written = fs::metadata(&aside).unwrap().modified().unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(aside, &path).unwrap();
        assert!(!read_at(&path, written + SETTLE / 2).ok().unwrap().is_at_rest);
    }

    #[cfg(unix)]
    #[test]
    fn a_fifo_in_place_of_the_file_holds_no_thread() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(matches!(read(&path), Err(Failed::Special)));
        assert!(open(&path).is_ok()); // as when it takes the file's place after the first check
    }

    #[cfg(unix)]
    #[test]
    fn a_sticky_directory_is_not_world_writable() {
        use std::os::unix::fs::PermissionsExt as _;

        let directory = tempfile::tempdir().unwrap();
        for (mode, expected) in [(0o700, false), (0o775, false), (0o777, true), (0o1777, false)] {
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_world_writable(&fs::metadata(directory.path()).unwrap()), expected, "{mode:o}");
        }
    }
}
