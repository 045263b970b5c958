use std::{
    borrow::Cow,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use zeroize::Zeroizing;

use self::read::{Failed, Found, MAX_FILE_LEN, SETTLE, Stamp, is_world_writable};
use super::CredentialSource;
use crate::{
    credential::{Credential, Scheme, may_be_credential},
    error::{SourceError, SourceErrorKind},
    events,
};

mod read;

const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How often a file is read until it is at rest, and how often links are followed until they lead to the same files.
const MOST_LOOKS: u32 = 10;

/// A file that holds the credential and nothing else.
///
/// The store reads it again every 5 s and compares the content, so it notices every way of replacing a file: the swap of
/// `..data` by Kubernetes, a rename over it, a new file in its place, a write into it. While the file is missing, empty
/// or malformed, the last good credential stays.
///
/// # A file that is being written
/// A file that was written to less than 100 ms ago may hold half a key. It is read again every 100 ms, until its last
/// write is old enough or two looks find the same. A file that is different at each of 10 looks is an error. A writer
/// that pauses for longer than 100 ms in the middle of a key cannot be noticed, so write the key to another file and
/// rename that one.
///
/// # Mount the directory
/// Mount the *directory*, and name the file in it. Kubelet and most tools rotate a key by putting another file in its
/// place. A mount of the file alone, such as Kubernetes' `subPath` or a secret of Docker Compose, keeps showing the file
/// that was there when the container started: it shows what is written into that file, and never the next file.
/// [`docs::rotation`](crate::docs::rotation) has a table of what rotates in place.
///
/// # What it does not do
/// * It never answers that it has no credential: a missing file is an error, unless you say
///   [`if_present`](Self::if_present).
/// * It reads at most 64 KiB, on a thread for blocking work. A read that hangs, on a dead network mount, holds that
///   thread, and the end of the runtime waits for it: use `Runtime::shutdown_timeout` where that can happen.
/// * It does not judge who may *read* the file, as kubelet mounts it with mode 0644. If every user may *write* it, or
///   replace it in its directory, this is logged as a warning, with the `tracing` feature.
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
    if_present: bool,
    // One read at a time: on a dead network mount each further one would hang one more thread.
    turn: Arc<tokio::sync::Mutex<()>>,
    seen: Arc<Mutex<Seen>>,
}

/// What the last look found, apart from the content.
#[derive(Default)]
struct Seen {
    /// The file that the path led to.
    resolved: Option<PathBuf>,
    /// The file or the directory that was world-writable.
    world_writable: Option<PathBuf>,
}

impl FileSource {
    /// A file that holds an API key, `id:secret`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::named("file", path.into())
    }

    /// The two halves of an API key, in a file each, such as two keys of one Kubernetes Secret.
    ///
    /// Both are read at one moment: if a link on the way to either is swapped meanwhile, as kubelet does it, both are
    /// read again. If two plain files are written one after the other, the pair of a new id and an old secret cannot be
    /// recognised. fal refuses it, and the store loads again.
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
            if_present: false,
            turn: Arc::default(),
            seen: Arc::default(),
        }
    }

    /// The file holds the token of a login in place of a key. A token has no halves, so a [`pair`](Self::pair) with this
    /// is an error.
    #[must_use]
    pub fn bearer(mut self) -> Self {
        self.scheme = Scheme::Bearer;
        self
    }

    /// How often to read the file. Default: every 5 s, each wait varied by up to a fifth.
    #[must_use]
    pub fn poll_every(mut self, every: Duration) -> Self {
        self.every = every;
        self
    }

    /// Lets a missing file mean "I have no credential, ask the next source" in place of an error. Default: an error.
    ///
    /// Only a file that is not there is meant, and of a pair, both files. A file that cannot be read, is empty or holds
    /// something else than a credential is still an error.
    ///
    /// ```
    /// use tower_fal::source::{ChainSource, EnvSource, FileSource};
    ///
    /// // The mounted file of a deployment, else the environment.
    /// let file = FileSource::new("/run/secrets/fal/key").if_present();
    /// let source = ChainSource::new().push(file).push(EnvSource::all());
    /// # let _ = source;
    /// ```
    #[must_use]
    pub fn if_present(mut self) -> Self {
        self.if_present = true;
        self
    }

    /// What is in the file, or in both, as soon as nothing writes to it. `None` if it may be missing, and is.
    pub(super) async fn settled(&self) -> Result<Option<Content>, SourceError> {
        let Some(mut last) = self.look_elsewhere().await? else {
            return Ok(None);
        };
        let mut is_always_same = true;
        for _ in 1..MOST_LOOKS {
            if last.is_at_rest {
                return Ok(Some(last));
            }
            tokio::time::sleep(SETTLE).await;
            let Some(mut next) = self.look_elsewhere().await? else {
                return Ok(None);
            };
            let is_same = next.bytes == last.bytes && next.secret == last.secret;
            is_always_same &= is_same;
            next.is_at_rest |= is_same && next.stamps == last.stamps;
            last = next;
        }
        // Some file systems state the present as the time of the last write. Then only the content can tell.
        if last.is_at_rest || is_always_same {
            return Ok(Some(last));
        }
        let message =
            "is being written: it was different each time that it was read; write another file, and rename it";
        Err(SourceError::unreadable(self.name.clone(), message))
    }

    /// [`look`](Self::look), off the runtime's threads.
    async fn look_elsewhere(&self) -> Result<Option<Content>, SourceError> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let source = self.clone();
        let look = tokio::task::spawn_blocking(move || {
            let content = source.look();
            drop(turn);
            content
        });
        look.await.unwrap_or_else(|error| {
            Err(if error.is_panic() {
                SourceError::panicked(self.name.clone())
            } else {
                SourceError::unreadable(self.name.clone(), "was not read: the runtime is shutting down")
            })
        })
    }

    /// What is in the file, or in both files, at this moment. This blocks.
    fn look(&self) -> Result<Option<Content>, SourceError> {
        let content = match &self.secret_path {
            None => self.look_at_one(),
            Some(secret_path) => self.look_at_both(secret_path),
        };
        match content {
            Err(error) if self.if_present && error.kind() == SourceErrorKind::NotFound && self.is_absent() => Ok(None),
            content => content.map(Some),
        }
    }

    fn look_at_one(&self) -> Result<Content, SourceError> {
        let found = self.read(Half { path: &self.path, label: None })?;
        let resolved = std::fs::canonicalize(&self.path).ok();
        let directories = [Some(&self.path), resolved.as_ref()].into_iter().flatten().filter_map(|path| path.parent());
        self.report_world_writable([(&*self.path, &found)], directories);
        let is_swapped = self.leads_elsewhere(resolved.as_deref());
        Ok(Content {
            is_at_rest: found.is_at_rest || (found.is_whole && is_swapped),
            bytes: found.bytes,
            secret: None,
            stamps: [Some(found.stamp), None],
        })
    }

    fn look_at_both(&self, secret_path: &Path) -> Result<Content, SourceError> {
        let id_half = Half { path: &self.path, label: Some("id") };
        let secret_half = Half { path: secret_path, label: Some("secret") };
        let resolve = || Ok([self.resolve(id_half)?, self.resolve(secret_half)?]);
        let replaced = SourceError::unreadable(self.name.clone(), "is replaced again and again");
        let read = |[id_path, secret_path]: &[PathBuf; 2]| {
            let id = self.read(Half { path: id_path, ..id_half })?;
            let secret = self.read(Half { path: secret_path, ..secret_half })?;
            let named = [&*self.path, secret_half.path].into_iter();
            let directories = named.chain([&**id_path, &**secret_path]).filter_map(Path::parent);
            self.report_world_writable([(&**id_path, &id), (&**secret_path, &secret)], directories);
            // The swap of one link swaps both files.
            let is_swapped = id_path.parent() == secret_path.parent() && self.leads_elsewhere(Some(id_path));
            Ok(Content {
                is_at_rest: (id.is_at_rest && secret.is_at_rest) || (id.is_whole && secret.is_whole && is_swapped),
                bytes: id.bytes,
                secret: Some(secret.bytes),
                stamps: [Some(id.stamp), Some(secret.stamp)],
            })
        };
        read_unchanged(resolve, read, replaced)
    }

    fn read(&self, half: Half<'_>) -> Result<Found, SourceError> {
        let unreadable = |message| SourceError::unreadable(self.name.clone(), message);
        read::read(half.path).map_err(|failed| match failed {
            Failed::Io(what, error) => self.failed(half, what, error),
            Failed::Directory => unreadable(half.says(format_args!("is a directory: name the file in it"))),
            Failed::Special => unreadable(half.says(format_args!("is no regular file"))),
            Failed::TooLong => {
                let message = half.says(format_args!("is larger than {MAX_FILE_LEN} bytes"));
                SourceError::invalid(self.name.clone(), message)
            }
        })
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

    fn is_absent(&self) -> bool {
        let is_missing =
            |path: &PathBuf| std::fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        is_missing(&self.path) && self.secret_path.as_ref().is_none_or(is_missing)
    }

    /// Whether a link on the way was swapped since the last look. The one that swaps it, such as kubelet, has written
    /// the file before.
    fn leads_elsewhere(&self, resolved: Option<&Path>) -> bool {
        let last = std::mem::replace(&mut self.seen().resolved, resolved.map(Path::to_owned));
        last.is_some() && last.as_deref() != resolved
    }

    /// Warns each time that a file becomes world-writable, or a directory in which it can be replaced.
    fn report_world_writable<'a>(
        &self,
        files: impl IntoIterator<Item = (&'a Path, &'a Found)>,
        directories: impl Iterator<Item = &'a Path>,
    ) {
        let mut files = files.into_iter().filter(|(_, found)| found.is_world_writable).map(|(path, _)| path);
        let mut directories = directories
            .map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path })
            .filter(|path| std::fs::metadata(path).is_ok_and(|metadata| is_world_writable(&metadata)));
        let found = files.next().or_else(|| directories.next());
        let last = std::mem::replace(&mut self.seen().world_writable, found.map(Path::to_owned));
        if let Some(path) = found
            && last.as_deref() != found
        {
            events::world_writable(path);
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn credential(&self, content: &Content) -> Result<Credential, SourceError> {
        match (self.scheme, &content.secret) {
            (Scheme::Key, None) => Credential::key(&*content.bytes),
            (Scheme::Key, Some(secret)) => Credential::key_pair(&*content.bytes, &**secret),
            (Scheme::Bearer, None) => Credential::bearer(&*content.bytes),
            (Scheme::Bearer, Some(_)) => {
                let message = "is a pair, and a token has no halves: name the one file with the token";
                return Err(SourceError::invalid(self.name.clone(), message));
            }
        }
        .map(|credential| credential.with_source(self.name.clone()))
        .map_err(|error| SourceError::malformed(self.name.clone(), error))
    }
}

impl CredentialSource for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        self.settled().await?.map(|content| self.credential(&content)).transpose()
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
            .field("if_present", &self.if_present)
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

/// What one look found, in buffers that are wiped.
pub(super) struct Content {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// The second half of a pair.
    secret: Option<Zeroizing<Vec<u8>>>,
    stamps: [Option<Stamp>; 2],
    is_at_rest: bool,
}

/// The name of a path as it is shown. `FileSource::new(env::var("FAL_KEY")?)` must not show the key.
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
    replaced: SourceError,
) -> Result<T, SourceError> {
    let mut last = Err(replaced);
    for _ in 0..MOST_LOOKS {
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

#[cfg(test)]
mod tests {
    use std::{error::Error as _, fs};

    use super::*;
    use crate::error::report;

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

    /// Writes to a file that is never old enough to be at rest, however long this thread is stopped before the file is
    /// read: its time is in the future.
    fn write_just_now(path: &Path, content: impl AsRef<[u8]>) {
        fs::write(path, content).unwrap();
        let time = std::time::SystemTime::now() + Duration::from_secs(60 * 60);
        fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_secret_is_not_taken_while_it_is_being_written() {
        let directory = directory();
        let path = directory.path().join("key");
        write_just_now(&path, "id:half-of-a-");
        let source = FileSource::new(&path);
        let load = tokio::spawn({
            let source = source.clone();
            async move { source.load().await }
        });
        // Until it has looked once. This task never sleeps, so the paused clock stands still.
        while source.seen().resolved.is_none() {
            tokio::task::yield_now().await;
        }
        drop(source.turn.lock().await);
        fs::write(&path, "id:half-of-a-secret").unwrap();
        assert_eq!(load.await.unwrap().unwrap().unwrap().header(), "Key id:half-of-a-secret");
    }

    #[cfg(unix)]
    #[tokio::test(start_paused = true)]
    async fn a_file_behind_a_swapped_link_is_taken_at_once() {
        let directory = directory();
        let link = directory.path().join("key");
        let point_to = |name: &str| {
            let (target, next) = (directory.path().join(name), directory.path().join("next"));
            fs::write(&target, format!("{name}:secret")).unwrap();
            std::os::unix::fs::symlink(target, &next).unwrap();
            fs::rename(next, &link).unwrap();
        };
        point_to("id-1");
        let source = FileSource::new(&link);
        for (name, waits) in [("id-1", SETTLE), ("id-2", Duration::ZERO), ("id-3", Duration::ZERO)] {
            point_to(name);
            let begin = tokio::time::Instant::now();
            let key = source.load().await.unwrap().unwrap();
            assert_eq!(key.key_id().unwrap().as_str(), name);
            assert!(begin.elapsed() <= waits + Duration::from_millis(1), "{:?}", begin.elapsed());
        }
    }

    /// Writes to the file at twice the rate at which it is read.
    #[tokio::test(start_paused = true)]
    async fn a_file_that_changes_at_each_look_is_an_error() {
        let directory = directory();
        let path = directory.path().join("key");
        write_just_now(&path, "id:");
        let source = FileSource::new(&path);
        let write = async {
            loop {
                let mut content = fs::read(&path).unwrap();
                content.push(b'y');
                write_just_now(&path, content);
                tokio::time::sleep(SETTLE / 2).await;
            }
        };
        tokio::select! {
            loaded = source.load() => {
                let error = loaded.unwrap_err();
                assert_eq!(error.kind(), SourceErrorKind::Unreadable);
                assert!(error.to_string().contains("is being written"), "{error}");
            }
            () = write => unreachable!(),
        }
        assert!(source.load().await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_whose_time_always_changes_is_taken_for_its_content() {
        let directory = directory();
        let path = directory.path().join("key");
        fs::write(&path, "id:secret").unwrap();
        let touch = async {
            for second in 0.. {
                let time = std::time::SystemTime::now() + Duration::from_secs(second);
                fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
                tokio::time::sleep(SETTLE / 2).await;
            }
        };
        tokio::select! {
            loaded = async { FileSource::new(&path).load().await } => assert!(loaded.unwrap().is_some()),
            () = touch => unreachable!(),
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_file_that_states_no_length_is_read() {
        // The name of this thread is such a file, and it can be set.
        let path = PathBuf::from("/proc").join(fs::read_link("/proc/thread-self").unwrap()).join("comm");
        fs::write(&path, "id:secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(FileSource::new(path).load().await.unwrap().unwrap().header(), "Key id:secret");
    }

    #[tokio::test]
    async fn a_missing_file_is_no_error_if_it_may_be_missing() {
        let directory = directory();
        let [key, id, secret] = ["key", "id", "secret"].map(|name| directory.path().join(name));
        let one = FileSource::new(&key).if_present();
        let pair = FileSource::pair(&id, &secret).if_present();
        assert!(one.load().await.unwrap().is_none());
        assert!(pair.load().await.unwrap().is_none());

        fs::write(&id, "id").unwrap();
        let error = pair.load().await.unwrap_err();
        assert!(error.to_string().contains("the file of the secret cannot be found"), "{error}");
        fs::write(&secret, "secret").unwrap();
        assert_eq!(pair.load().await.unwrap().unwrap().header(), "Key id:secret");

        fs::write(&key, "").unwrap();
        assert_eq!(one.load().await.unwrap_err().kind(), SourceErrorKind::Invalid);
        fs::write(&key, "half").unwrap();
        assert_eq!(one.load().await.unwrap_err().kind(), SourceErrorKind::Invalid);
        fs::remove_file(&key).unwrap();
        fs::create_dir(&key).unwrap();
        assert_eq!(one.load().await.unwrap_err().kind(), SourceErrorKind::Unreadable);
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
        let replaced = SourceError::unreadable("pair", "is replaced again and again");
        let pair = read_unchanged(resolve, read_and_swap_until(5), replaced).unwrap();
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
