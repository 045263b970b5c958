use std::{
    borrow::Cow,
    fmt,
    fs::{File, Metadata, OpenOptions},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::CredentialSource;
use crate::{
    credential::{Credential, Scheme, may_be_credential},
    error::SourceError,
    events,
};

/// The largest file read, in bytes.
const MAX_FILE_LEN: usize = 64 * 1024;

const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// A file that was written into a shorter time ago than this may be half-written: it is read again after as long.
const SETTLE: Duration = Duration::from_millis(100);

/// How often a file is read until it stands still.
const MOST_READS: u32 = 10;

/// A file that holds the credential and nothing else.
///
/// The store reads it again every 5 s and compares the content, so every way of replacing a file works: Kubernetes'
/// swap of `..data`, a rename over it, deleting and creating it, writing into it. A file that is missing, empty or
/// malformed for a while costs nothing: the last good credential stays. One that was written into less than 100 ms ago
/// is read again until it stands still; still, half a secret cannot be told from a short one, so whoever writes the
/// file had better write another one and rename it.
///
/// **Mount the directory** and name the file in it. A mount of the file alone, such as Kubernetes' `subPath` or a secret
/// of Docker Compose, keeps showing the very file that was there when the container started: it sees what is written
/// into that one, and nothing of another one that takes its place, which is how kubelet and most tools rotate. The
/// README has a table of what rotates in place.
///
/// At most 64 KiB are read, on a thread for blocking work. (A read that hangs, on a dead network mount, holds that
/// thread, and with it the end of the runtime: use `Runtime::shutdown_timeout` where that can happen.) A path is an
/// obligation: a missing file is an error, never "ask the next source". That others may *read* the file is not this
/// crate's to judge (kubelet mounts with mode 0644); that everyone may *write* it is logged as a warning, with the
/// `tracing` feature.
///
/// ```
/// use std::time::Duration;
/// use tower_fal::source::FileSource;
///
/// let key = FileSource::new("/run/secrets/fal/key");
/// let token = FileSource::new("/run/secrets/fal/token").bearer().poll_every(Duration::from_secs(30));
/// let halves = FileSource::pair("/run/secrets/fal/id", "/run/secrets/fal/secret");
/// # let _ = (key, token, halves);
/// ```
#[derive(Clone)]
pub struct FileSource {
    /// The file with the whole key, or with its id.
    path: PathBuf,
    /// The file with the secret half, if it is not in the other one.
    secret_path: Option<PathBuf>,
    name: Arc<str>,
    scheme: Scheme,
    every: Duration,
    // One read at a time: on a dead network mount each further one would hang one more thread.
    turn: Arc<Mutex<()>>,
    warned: Arc<AtomicBool>,
    /// Which file the path led to when it was last looked at.
    resolved: Arc<std::sync::Mutex<Option<PathBuf>>>,
}

impl FileSource {
    /// A file that holds an API key, `id:secret`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::named("file", path.into())
    }

    /// The two halves of an API key, in a file each, such as two keys of one Kubernetes Secret.
    ///
    /// Both are read at one moment: if a link on the way to either is swapped meanwhile, as kubelet does it, both are
    /// read again. Two plain files that are written one after the other cannot be told from two that belong
    /// together; until the second one is there, fal refuses the mixture, and the store looks again.
    pub fn pair(id_path: impl Into<PathBuf>, secret_path: impl Into<PathBuf>) -> Self {
        let secret_path = secret_path.into();
        let id = Self::new(id_path);
        let name = format!("{}+{}", id.name, shown(&secret_path)).into();
        Self { name, secret_path: Some(secret_path), ..id }
    }

    /// A source of another kind that reads its file in the same way.
    pub(super) fn named(kind: &str, path: PathBuf) -> Self {
        Self {
            name: format!("{kind}:{}", shown(&path)).into(),
            path,
            secret_path: None,
            scheme: Scheme::Key,
            every: DEFAULT_POLL_INTERVAL,
            turn: Arc::default(),
            warned: Arc::default(),
            resolved: Arc::default(),
        }
    }

    /// The file holds the token of a login in place of a key. There is no such thing in two files.
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

    /// What the file holds at this moment, or both files, and whether they were at rest. This blocks.
    fn read(&self) -> Result<Content, SourceError> {
        let Some(secret_path) = &self.secret_path else {
            let one = self.read_file(Half { path: &self.path, label: None })?;
            let is_linked = || self.leads_elsewhere(std::fs::canonicalize(&self.path).ok());
            return Ok(Content {
                at_rest: one.is_whole && (is_linked() || one.at_rest),
                bytes: one.bytes,
                secret: None,
            });
        };
        let id_half = Half { path: &self.path, label: Some("id") };
        let secret_half = Half { path: secret_path, label: Some("secret") };
        let resolve = || Ok((self.resolve(id_half)?, self.resolve(secret_half)?));
        let in_vain = SourceError::unreadable(self.name.clone(), "is replaced again and again");
        let read = |(id_path, secret_path): &(PathBuf, PathBuf)| {
            let id = self.read_file(Half { path: id_path, ..id_half })?;
            let secret = self.read_file(Half { path: secret_path, ..secret_half })?;
            // With one link both files are swapped.
            let is_linked = || id_path.parent() == secret_path.parent() && self.leads_elsewhere(Some(id_path.clone()));
            let is_whole = id.is_whole && secret.is_whole;
            let at_rest = is_whole && (is_linked() || (id.at_rest && secret.at_rest));
            Ok(Content { at_rest, bytes: id.bytes, secret: Some(secret.bytes) })
        };
        read_unchanged(resolve, read, in_vain)
    }

    fn read_file(&self, half: Half<'_>) -> Result<OneFile, SourceError> {
        let failed = |what: &str, error| self.failed(half, what, error);
        // Twice: before, because opening a device can do things; and behind, because the path may have changed.
        let metadata = std::fs::metadata(half.path).map_err(|error| failed("cannot be found", error))?;
        self.refuse_special(&metadata, half)?;
        let file = open(half.path).map_err(|error| failed("cannot be opened", error))?;
        let metadata = file.metadata().map_err(|error| failed("cannot be read", error))?;
        self.refuse_special(&metadata, half)?;
        self.report_world_writable(&metadata, half.path);

        let Some(length) = usize::try_from(metadata.len()).ok().filter(|length| *length <= MAX_FILE_LEN) else {
            let message = half.says(format_args!("is larger than {MAX_FILE_LEN} bytes"));
            return Err(SourceError::invalid(self.name.clone(), message));
        };
        let bytes = read_up_to(file, length + 1).map_err(|error| failed("cannot be read", error))?;
        Ok(OneFile { is_whole: bytes.len() == length, at_rest: is_at_rest(&metadata, SystemTime::now()), bytes })
    }

    fn resolve(&self, half: Half<'_>) -> Result<PathBuf, SourceError> {
        std::fs::canonicalize(half.path).map_err(|error| self.failed(half, "cannot be found", error))
    }

    fn failed(&self, half: Half<'_>, what: &str, error: io::Error) -> SourceError {
        let (what, next) = match error.kind() {
            io::ErrorKind::NotFound => (what, "; put the credential there, or name the file that has it"),
            io::ErrorKind::PermissionDenied => {
                ("may not be read", "; let the user of this process read it and enter its directories")
            }
            _ => (what, ""),
        };
        SourceError::io(self.name.clone(), half.says(format_args!("{what}{next}")), error)
    }

    fn credential(&self, content: &Content) -> Result<Credential, SourceError> {
        match (self.scheme, &content.secret) {
            (Scheme::Key, None) => Credential::key(&*content.bytes),
            (Scheme::Key, Some(secret)) => Credential::key_pair(&*content.bytes, &**secret),
            (Scheme::Bearer, None) => Credential::bearer(&*content.bytes),
            (Scheme::Bearer, Some(_)) => {
                return Err(SourceError::invalid(self.name.clone(), "is a pair, and a login's token has no halves"));
            }
        }
        .map(|credential| credential.with_source(self.name.clone()))
        .map_err(|error| SourceError::malformed(self.name.clone(), error))
    }

    /// [`read`](Self::read), off the runtime's threads.
    async fn read_elsewhere(&self) -> Result<Content, SourceError> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let source = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            let content = source.read();
            drop(turn);
            content
        });
        read.await.unwrap_or_else(|error| {
            Err(if error.is_panic() {
                SourceError::panicked(self.name.clone())
            } else {
                SourceError::unreadable(self.name.clone(), "was not read: the runtime is shutting down")
            })
        })
    }

    /// What is there when nobody is in the midst of writing it.
    pub(super) async fn settled(&self) -> Result<Content, SourceError> {
        let mut last = self.read_elsewhere().await?;
        for _ in 1..MOST_READS {
            if last.at_rest {
                break;
            }
            tokio::time::sleep(SETTLE).await;
            let next = self.read_elsewhere().await?;
            let is_same = next.bytes == last.bytes && next.secret == last.secret;
            last = Content { at_rest: next.at_rest || is_same, ..next };
        }
        Ok(last)
    }

    /// Whether a link on the way was swapped since the last look, as kubelet does it: the file behind it is whole.
    fn leads_elsewhere(&self, resolved: Option<PathBuf>) -> bool {
        let mut known = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let elsewhere = match &*known {
            Some(_) => *known != resolved,
            None => std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_symlink()),
        };
        *known = resolved;
        elsewhere
    }

    fn refuse_special(&self, metadata: &Metadata, half: Half<'_>) -> Result<(), SourceError> {
        if metadata.is_file() {
            return Ok(());
        }
        let kind = if metadata.is_dir() { "a directory: name the file in it" } else { "no regular file" };
        Err(SourceError::unreadable(self.name.clone(), half.says(format_args!("is {kind}"))))
    }

    fn report_world_writable(&self, metadata: &Metadata, path: &Path) {
        #[cfg(unix)]
        let is = std::os::unix::fs::MetadataExt::mode(metadata) & 0o002 != 0;
        #[cfg(not(unix))]
        let is = {
            let _ = metadata;
            false
        };
        // Once each time that it becomes so, not at every look.
        if is != self.warned.swap(is, Ordering::Relaxed) && is {
            events::world_writable(path);
        }
    }
}

impl CredentialSource for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        self.credential(&self.settled().await?).map(Some)
    }

    fn poll_interval(&self) -> Option<Duration> {
        Some(self.every)
    }

    fn watched_paths(&self) -> Vec<PathBuf> {
        std::iter::once(&self.path).chain(&self.secret_path).cloned().collect()
    }
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSource")
            .field("name", &self.name)
            .field("scheme", &self.scheme)
            .field("every", &self.every)
            .finish_non_exhaustive()
    }
}

/// One file of the source: the whole key, or a half of it.
#[derive(Clone, Copy)]
struct Half<'a> {
    path: &'a Path,
    /// What an error calls it; `None` for a file with the whole key.
    label: Option<&'static str>,
}

impl Half<'_> {
    fn says(self, what: fmt::Arguments<'_>) -> String {
        match self.label {
            Some(label) => format!("the file of the {label} {what}"),
            None => what.to_string(),
        }
    }
}

/// What one look at the file brought, in buffers that are wiped.
pub(super) struct Content {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// The second half of a pair.
    secret: Option<Zeroizing<Vec<u8>>>,
    at_rest: bool,
}

struct OneFile {
    bytes: Zeroizing<Vec<u8>>,
    is_whole: bool,
    at_rest: bool,
}

/// A name is shown. `FileSource::new(env::var("FAL_KEY")?)` must not show the key.
fn shown(path: &Path) -> Cow<'_, str> {
    if may_be_credential(path.as_os_str().as_encoded_bytes()) {
        "(not shown, as it may be a key in place of a path)".into()
    } else {
        path.to_string_lossy()
    }
}

/// Reads what lies behind paths that lead to the same places before and after.
///
/// Without it, a volume that is swapped between two reads gives the one half of the old key and the other of the new.
fn read_unchanged<P: PartialEq, T>(
    resolve: impl Fn() -> Result<P, SourceError>,
    read: impl Fn(&P) -> Result<T, SourceError>,
    in_vain: SourceError,
) -> Result<T, SourceError> {
    let mut last = Err(in_vain);
    for _ in 0..MOST_READS {
        let before = match resolve() {
            Ok(before) => before,
            Err(error) => {
                last = Err(error); // a directory may be gone between finding its name and entering it
                continue;
            }
        };
        let content = read(&before);
        if resolve().ok() == Some(before) {
            return content;
        }
    }
    last
}

/// Whether nobody is in the midst of writing: the last write is a while ago, or something else was done to the file
/// since, such as renaming it into its place. What is decided by it is when to look, never what to take.
fn is_at_rest(metadata: &Metadata, now: SystemTime) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        if (metadata.ctime(), metadata.ctime_nsec()) != (metadata.mtime(), metadata.mtime_nsec()) {
            return true;
        }
    }
    let since_written = metadata.modified().ok().and_then(|written| now.duration_since(written).ok());
    since_written.is_none_or(|since| since >= SETTLE)
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    // A FIFO that took the file's place in the meantime must not hold the thread until somebody writes to it.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}

/// The content, or the first `most` bytes of it, in a buffer that is wiped when it is dropped.
fn read_up_to(mut file: File, most: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    // All of it at once: a vector that grows, as `read_to_end` lets it, leaves copies of the secret behind.
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
        let key_as_token = FileSource::new(&path).bearer().load().await.unwrap_err();
        assert!(report(&key_as_token).contains("which no token has"), "{key_as_token:?}");
        fs::write(&path, "e30.e30.c2ln\n").unwrap();
        let token = FileSource::new(&path).bearer().load().await.unwrap().unwrap();
        assert_eq!(token.header(), "Bearer e30.e30.c2ln");
    }

    #[tokio::test]
    async fn a_missing_file_is_an_error_that_names_it() {
        let error = FileSource::new("/nowhere/at/all").load().await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(
            report(&error).starts_with("file:/nowhere/at/all: cannot be found; put the credential there, "),
            "{}",
            report(&error)
        );
        assert!(error.source().is_some());
    }

    /// By hand: nothing is forbidden to root, as whom tests may run.
    #[test]
    fn a_file_that_may_not_be_read_is_not_called_missing() {
        let denied = io::ErrorKind::PermissionDenied.into();
        let error =
            FileSource::new("/key").failed(Half { path: Path::new("/key"), label: None }, "cannot be found", denied);
        assert_eq!(error.kind(), SourceErrorKind::Unreadable);
        let said = "file:/key: may not be read; let the user of this process read it and enter its directories";
        assert_eq!(error.to_string(), said);
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

    #[tokio::test(start_paused = true)]
    async fn half_a_secret_is_not_taken_while_it_is_being_written() {
        let directory = directory();
        let path = directory.path().join("key");
        fs::write(&path, "id:half-of-a-").unwrap();
        let source = FileSource::new(&path);
        let load = tokio::spawn({
            let source = source.clone();
            async move { source.load().await }
        });
        // Until it has looked once. Nobody sleeps here, so the stopped clock stands still.
        while source.resolved.lock().unwrap().is_none() {
            tokio::task::yield_now().await;
        }
        drop(source.turn.lock().await);
        fs::write(&path, "id:half-of-a-secret").unwrap();
        assert_eq!(load.await.unwrap().unwrap().unwrap().header(), "Key id:half-of-a-secret");
    }

    #[cfg(unix)]
    #[tokio::test(start_paused = true)]
    async fn a_file_that_was_renamed_or_linked_into_its_place_is_taken_at_once() {
        let directory = directory();
        let (path, link) = (directory.path().join("key"), directory.path().join("link"));
        fs::write(&path, "id:secret").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let before = tokio::time::Instant::now();
        FileSource::new(&link).load().await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);

        let written = fs::metadata(&path).unwrap();
        let now = written.modified().unwrap();
        assert!(!is_at_rest(&written, now));
        assert!(is_at_rest(&written, now + SETTLE));
        // As a rename does: it changes the inode and not the content.
        fs::File::open(&path).unwrap().set_modified(now - SETTLE / 2).unwrap();
        assert!(is_at_rest(&fs::metadata(&path).unwrap(), now));
    }

    #[cfg(unix)]
    #[test]
    fn a_swap_between_the_two_reads_of_a_pair_is_read_again() {
        let directory = directory();
        let data = directory.path().join("..data");
        let swap = |n: u32| {
            let generation = directory.path().join(n.to_string());
            fs::create_dir(&generation).unwrap();
            fs::write(generation.join("id"), format!("id-{n}")).unwrap();
            fs::write(generation.join("secret"), format!("secret-{n}")).unwrap();
            let next = directory.path().join("next");
            std::os::unix::fs::symlink(generation, &next).unwrap();
            fs::rename(next, &data).unwrap();
        };
        swap(1);
        let resolve = || Ok([data.join("id"), data.join("secret")].map(|path| fs::canonicalize(path).unwrap()));
        let generation = std::cell::Cell::new(1);
        let read_and_swap_until = |last: u32| {
            move |[id, secret]: &[PathBuf; 2]| {
                let id = fs::read_to_string(id).unwrap();
                if generation.get() < last {
                    generation.set(generation.get() + 1);
                    swap(generation.get());
                }
                Ok((id, fs::read_to_string(secret).unwrap()))
            }
        };
        let in_vain = || SourceError::unreadable("pair", "in vain");
        let pair = read_unchanged(resolve, read_and_swap_until(5), in_vain()).unwrap();
        assert_eq!(pair, ("id-5".to_owned(), "secret-5".to_owned()));
    }

    #[tokio::test]
    async fn a_pair_is_read_of_two_files_and_says_which_one_is_wrong() {
        let directory = directory();
        let (id, secret) = (directory.path().join("id"), directory.path().join("secret"));
        let pair = FileSource::pair(&id, &secret);
        assert_eq!(pair.watched_paths(), [id.clone(), secret.clone()]);
        assert_eq!(pair.name(), format!("file:{}+{}", id.display(), secret.display()));
        let said = async || pair.load().await.unwrap_err().to_string().split_once("secret: ").unwrap().1.to_owned();

        fs::write(&secret, "secret\n").unwrap();
        let missing = "cannot be found; put the credential there, or name the file that has it";
        assert_eq!(said().await, format!("the file of the id {missing}"));
        fs::create_dir(&id).unwrap();
        assert_eq!(said().await, "the file of the id is a directory: name the file in it");
        fs::remove_dir(&id).unwrap();
        fs::write(&id, "id\n").unwrap();
        let key = pair.load().await.unwrap().unwrap();
        assert_eq!((key.header().to_str().unwrap(), key.source()), ("Key id:secret", Some(pair.name())));
        fs::write(&secret, "").unwrap();
        assert_eq!(said().await, "holds no credential");
        fs::remove_file(&secret).unwrap();
        assert_eq!(said().await, format!("the file of the secret {missing}"));
        fs::write(&secret, "secret").unwrap();
        assert!(pair.bearer().load().await.is_err());

        let mistaken = FileSource::pair("hush:hush", "hush:hush");
        assert!(!format!("{mistaken:?} {}", mistaken.name()).contains("hush"));
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
    fn debug_and_the_name_show_the_path_but_no_key() {
        let source = FileSource::new("/key");
        assert_eq!(source.name(), "file:/key");
        assert!(format!("{source:?}").contains("/key"));
        let mistaken = FileSource::new("id:hush-hush");
        assert!(!format!("{mistaken:?} {}", mistaken.name()).contains("hush"));
    }
}
