use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::CredentialSource;
use crate::{
    credential::{Credential, Scheme},
    error::SourceError,
    events,
};

/// The largest file read, in bytes.
const MAX_FILE_LEN: usize = 64 * 1024;

const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// A file that holds the credential and nothing else.
///
/// The store reads it again every 5 s and compares the content, so every way of replacing a file works: Kubernetes'
/// swap of `..data`, a rename over it, deleting and creating it, writing into it. A file that is missing, empty or
/// half-written for a while costs nothing: the last good credential stays.
///
/// In Kubernetes **mount the Secret as a directory** and name the file inside. A `subPath` mount keeps showing the
/// file as it was when the pod started.
///
/// At most 64 KiB are read, off the runtime's threads. A path is an obligation: a missing file is an error, never
/// "ask the next source". That others may *read* the file is not this crate's to judge (kubelet mounts with mode
/// 0644); that everyone may *write* it is logged as a warning, with the `tracing` feature.
///
/// ```
/// use std::time::Duration;
/// use tower_fal::source::FileSource;
///
/// let key = FileSource::new("/run/secrets/fal/key");
/// let token = FileSource::new("/run/secrets/fal/token").bearer().poll_every(Duration::from_secs(30));
/// # let _ = (key, token);
/// ```
#[derive(Clone, Debug)]
pub struct FileSource {
    path: PathBuf,
    name: Arc<str>,
    scheme: Scheme,
    every: Duration,
    // One read at a time: on a dead network mount each further one would hang one more thread.
    turn: Arc<Mutex<()>>,
    warned: Arc<AtomicBool>,
}

impl FileSource {
    /// A file that holds an API key, `id:secret`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let name = format!("file:{}", path.display()).into();
        Self {
            path,
            name,
            scheme: Scheme::Key,
            every: DEFAULT_POLL_INTERVAL,
            turn: Arc::default(),
            warned: Arc::default(),
        }
    }

    /// The file holds the token of a login in place of a key.
    #[must_use]
    pub fn bearer(mut self) -> Self {
        self.scheme = Scheme::Bearer;
        self
    }

    /// How often to look at the file. Default: every 5 s, each wait varied by a fifth.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.every = every;
        self
    }

    /// The part that blocks.
    pub(super) fn load_blocking(&self) -> Result<Credential, SourceError> {
        let failed = |message: &str, error| SourceError::io(self.name.clone(), message, error);
        // Twice: before, because opening a device can do things; and behind, because the path may have changed.
        let metadata = std::fs::metadata(&self.path).map_err(|error| failed("cannot be found", error))?;
        self.refuse_special(&metadata)?;
        let file = open(&self.path).map_err(|error| failed("cannot be opened", error))?;
        let metadata = file.metadata().map_err(|error| failed("cannot be read", error))?;
        self.refuse_special(&metadata)?;
        self.report_world_writable(&metadata);

        let content = read_bounded(file).map_err(|error| failed("cannot be read", error))?;
        let Some(content) = content else {
            return Err(SourceError::invalid(self.name.clone(), format!("is larger than {MAX_FILE_LEN} bytes")));
        };
        match self.scheme {
            Scheme::Key => Credential::key(&*content),
            Scheme::Bearer => Credential::bearer(&*content),
        }
        .map(|credential| credential.with_source(self.name.clone()))
        .map_err(|error| SourceError::malformed(self.name.clone(), error))
    }

    fn refuse_special(&self, metadata: &Metadata) -> Result<(), SourceError> {
        if metadata.is_file() {
            return Ok(());
        }
        let kind = if metadata.is_dir() { "a directory: name the file in it" } else { "no regular file" };
        Err(SourceError::unreadable(self.name.clone(), format!("is {kind}")))
    }

    fn report_world_writable(&self, metadata: &Metadata) {
        #[cfg(unix)]
        let is = std::os::unix::fs::MetadataExt::mode(metadata) & 0o002 != 0;
        #[cfg(not(unix))]
        let is = {
            let _ = metadata;
            false
        };
        // Once each time that it becomes so, not at every look.
        if is != self.warned.swap(is, Ordering::Relaxed) && is {
            events::world_writable(&self.path);
        }
    }
}

impl CredentialSource for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        let stopped = |_| SourceError::unreadable(self.name.clone(), "was not read: the runtime is shutting down");
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let source = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            let loaded = source.load_blocking();
            drop(turn);
            loaded
        });
        read.await.map_err(stopped)?.map(Some)
    }

    fn poll_interval(&self) -> Option<Duration> {
        Some(self.every)
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        vec![self.path.clone()]
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    // A FIFO that took the file's place in the meantime must not hold the thread until somebody writes to it.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}

/// The whole content, in a buffer that is wiped when it is dropped; `None` when there is too much.
fn read_bounded(mut file: File) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    // All of it at once: a vector that grows, as `read_to_end` lets it, leaves copies of the secret behind.
    let mut content = Zeroizing::new(vec![0; MAX_FILE_LEN + 1]);
    let mut length = 0;
    loop {
        match file.read(&mut content[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if length > MAX_FILE_LEN {
        return Ok(None);
    }
    content.truncate(length);
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use std::{error::Error as _, fs};

    use super::*;
    use crate::error::{SourceErrorKind, report};

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    async fn load_content(content: impl AsRef<[u8]>) -> Result<Credential, SourceError> {
        let directory = directory();
        let path = directory.path().join("key");
        fs::write(&path, content).unwrap();
        FileSource::new(path).load().await.map(Option::unwrap)
    }

    #[tokio::test]
    async fn a_file_holds_a_key_or_a_token() {
        let directory = directory();
        let path = directory.path().join("key");
        fs::write(&path, "id:secret\n").unwrap();
        let key = FileSource::new(&path).load().await.unwrap().unwrap();
        assert_eq!(key.header(), "Key id:secret");
        assert_eq!(key.source(), Some(&*format!("file:{}", path.display())));
        let token = FileSource::new(&path).bearer().load().await.unwrap().unwrap();
        assert_eq!(token.header(), "Bearer id:secret");
    }

    #[tokio::test]
    async fn a_missing_file_is_an_error_that_names_it() {
        let error = FileSource::new("/nowhere/at/all").load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(report(&error).starts_with("file:/nowhere/at/all: cannot be found: "), "{}", report(&error));
        assert!(error.source().is_some());
    }

    #[tokio::test]
    async fn a_file_is_read_up_to_its_greatest_size() {
        let padded = |length: usize| format!("id:secret{}", " ".repeat(length - "id:secret".len()));
        assert_eq!(load_content(padded(MAX_FILE_LEN)).await.unwrap().header(), "Key id:secret");
        for length in [MAX_FILE_LEN + 1, 1024 * 1024] {
            let error = load_content(padded(length)).await.unwrap_err();
            assert_eq!(error.to_string().split(": ").nth(1), Some("is larger than 65536 bytes"));
        }
    }

    #[tokio::test]
    async fn what_is_no_credential_is_refused_without_being_quoted() {
        for content in [&b""[..], b"\n", b"half", b"half:", b"\xFF\xFE\x00", b"id:se\xC3\x28cret"] {
            let error = load_content(content).await.unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Invalid);
            assert!(!report(&error).contains("half"), "{}", report(&error));
        }
    }

    #[tokio::test]
    async fn a_directory_is_refused_with_a_hint() {
        let directory = directory();
        let error = FileSource::new(directory.path()).load().await.unwrap_err();
        assert!(error.to_string().ends_with("is a directory: name the file in it"), "{error}");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_device_is_refused() {
        let error = FileSource::new("/dev/zero").load().await.unwrap_err();
        assert!(error.to_string().ends_with("is no regular file"), "{error}");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_fifo_is_refused_and_holds_no_thread() {
        let directory = directory();
        let path = directory.path().join("key");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = FileSource::new(&path).load().await.unwrap_err();
        assert!(error.to_string().ends_with("is no regular file"), "{error}");
        // What `open` meets when the FIFO takes the file's place between the two looks.
        let opened = tokio::task::spawn_blocking(move || open(&path));
        assert!(opened.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_read_that_hangs_holds_one_thread_however_often_it_is_tried() {
        let source = FileSource::new("/nowhere/at/all");
        let hanging = Arc::clone(&source.turn).lock_owned().await;
        let mut waiting = tokio_test::task::spawn(source.load());
        tokio_test::assert_pending!(waiting.poll());
        drop(waiting);
        drop(hanging);
        assert!(source.load().await.is_err());
        assert!(source.turn.try_lock().is_ok());
    }

    #[test]
    fn debug_shows_the_path() {
        assert!(format!("{:?}", FileSource::new("/key")).contains("/key"));
    }
}
