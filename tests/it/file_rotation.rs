//! Every way in which a key file is replaced, and every state in which it may be met meanwhile.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::FutureExt as _;
use tempfile::TempDir;
use tokio::{task::JoinSet, time::Instant};
use tower_fal::{
    CredentialStore,
    error::{SourceErrorKind, report},
    source::FileSource,
    store::{ReloadError, Reloaded},
};

use crate::support::{KubeletVolume, Says, Script, current, key, key_text, status_where};

/// 5 s and a fifth; twice 100 ms for a file that was just written and may be written still; and what timers round up.
const ONE_POLL: Duration = Duration::from_millis(6000 + 2 * 100 + 10);

struct KeyFile {
    directory: TempDir,
    path: PathBuf,
}

impl KeyFile {
    /// A file that holds the key number 1.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fal_key");
        fs::write(&path, key_text(1)).unwrap();
        Self { directory, path }
    }

    async fn store(&self) -> CredentialStore {
        store(&self.path).await
    }

    fn write(&self, content: impl AsRef<[u8]>) {
        fs::write(&self.path, content).unwrap();
    }

    /// More of the content, or the beginning of it if the file is empty. The file is never old enough to be at rest,
    /// however long this thread is stopped before the file is read: its time is in the future.
    fn write_on(&self, more: impl AsRef<[u8]>) {
        let mut file = OpenOptions::new().append(true).open(&self.path).unwrap();
        file.write_all(more.as_ref()).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(60 * 60)).unwrap();
    }

    fn rename_over(&self, content: impl AsRef<[u8]>) {
        let new = self.aside();
        fs::write(&new, content).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    fn aside(&self) -> PathBuf {
        self.directory.path().join("aside")
    }
}

async fn store(path: &Path) -> CredentialStore {
    CredentialStore::builder(FileSource::new(path)).build().await.unwrap()
}

/// Paused time stands still while a file is read, so this is exact.
async fn assert_seen_within_one_poll(store: &CredentialStore, n: u64) {
    let begin = Instant::now();
    let id = format!("id-{n}");
    status_where(store, |status| status.key_id.as_ref().is_some_and(|current| current.as_str() == id)).await;
    assert!(begin.elapsed() <= ONE_POLL, "seen only after {:?}", begin.elapsed());
}

/// A look at the file now finds nothing good, is reported, and changes nothing.
async fn assert_refused(store: &CredentialStore, kind: SourceErrorKind) {
    let before = (current(store), store.generation());
    match store.reload().await {
        Err(ReloadError::Failed(error)) => {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(!report(&error).contains("secret-of"), "the content is in the error");
        }
        other => panic!("it was not refused as {kind:?}: {other:?}"),
    }
    assert_eq!((current(store), store.generation()), before);
    assert_eq!(store.status().last_error.unwrap().kind(), kind);
}

#[tokio::test(start_paused = true)]
async fn kubelets_swap_is_seen_within_one_poll() {
    let mut volume = KubeletVolume::new(key_text(1));
    let store = store(&volume.path()).await;
    for n in 2..=6 {
        volume.update(key_text(n));
        assert_seen_within_one_poll(&store, n).await;
    }
    assert_eq!(store.generation().get(), 6);
    assert_eq!(store.status().consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_rename_over_the_file_is_seen_within_one_poll() {
    let file = KeyFile::new();
    let store = file.store().await;
    for n in 2..=6 {
        file.rename_over(key_text(n));
        assert_seen_within_one_poll(&store, n).await;
    }
    assert_eq!((store.generation().get(), store.status().consecutive_failures), (6, 0));
}

#[tokio::test(start_paused = true)]
async fn a_write_of_the_same_length_and_time_is_seen_within_one_poll() {
    let file = KeyFile::new();
    let store = file.store().await;
    let modified = fs::metadata(&file.path).unwrap().modified().unwrap();
    file.write(key_text(2));
    File::open(&file.path).unwrap().set_modified(modified).unwrap();
    assert_seen_within_one_poll(&store, 2).await;
}

#[tokio::test(start_paused = true)]
async fn the_same_content_in_a_new_file_is_no_rotation() {
    let mut volume = KubeletVolume::new(key_text(1));
    let store = store(&volume.path()).await;
    let mut subscription = store.subscribe();
    volume.update(format!("{}\n", key_text(1)));
    assert!(matches!(store.reload().await, Ok(Reloaded::Unchanged(_))));
    tokio::time::sleep(10 * ONE_POLL).await;
    assert!(subscription.changed().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_reader_between_truncate_and_write_keeps_the_old_key() {
    let file = KeyFile::new();
    let store = file.store().await;
    let mut writer = OpenOptions::new().write(true).truncate(true).open(&file.path).unwrap();
    assert_refused(&store, SourceErrorKind::Invalid).await;
    writer.write_all(b"id-2").unwrap();
    assert_refused(&store, SourceErrorKind::Invalid).await;
    writer.write_all(b":").unwrap();
    assert_refused(&store, SourceErrorKind::Invalid).await;
    writer.write_all(b"secret-of-id-2\n").unwrap();
    drop(writer);
    assert_seen_within_one_poll(&store, 2).await;
    assert_eq!(store.status().consecutive_failures, 0);
}

/// A writer that trickles, as over a slow link: it writes twice between two looks.
#[tokio::test(start_paused = true)]
async fn a_file_that_is_being_written_keeps_the_old_key() {
    let file = KeyFile::new();
    let store = file.store().await;
    file.write("");
    file.write_on("id-2:");
    let trickle = async {
        for byte in "secret-of-id-2\n".repeat(3).bytes() {
            file.write_on([byte]);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let reload = async {
        assert_refused(&store, SourceErrorKind::Unreadable).await;
        let error = store.status().last_error.unwrap().to_string();
        assert!(error.contains("is being written"), "{error}");
    };
    tokio::join!(trickle, reload);
    file.write(key_text(2));
    assert_seen_within_one_poll(&store, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_mode_between_two_writes_is_no_end() {
    let file = KeyFile::new();
    let store = file.store().await;
    file.write("");
    file.write_on("id-2:secret-");
    fs::set_permissions(&file.path, Permissions::from_mode(0o600)).unwrap();
    let write_the_rest = async {
        tokio::time::sleep(Duration::from_millis(58)).await;
        file.write_on("of-id-2");
    };
    let (reloaded, ()) = tokio::join!(store.reload(), write_the_rest);
    assert!(matches!(reloaded, Ok(Reloaded::Changed(_))));
    assert_eq!(*store.load().credential().header(), format!("Key {}", key_text(2)));
    assert_eq!(store.generation().get(), 2); // and no other in between
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_missing_for_an_hour_keeps_the_old_key() {
    let file = KeyFile::new();
    let store = file.store().await;
    fs::remove_file(&file.path).unwrap();
    assert_refused(&store, SourceErrorKind::NotFound).await;
    tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    assert!(store.status().consecutive_failures > 500);
    assert_eq!(current(&store), "id-1");
    file.write(key_text(2));
    assert_seen_within_one_poll(&store, 2).await;
    assert_eq!(store.status().consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_loses_its_key_keeps_the_old_one() {
    let mut volume = KubeletVolume::new(key_text(1));
    let store = store(&volume.path()).await;
    let aside = volume.path().with_extension("aside");
    fs::rename(volume.path(), &aside).unwrap();
    assert_refused(&store, SourceErrorKind::NotFound).await;
    fs::rename(&aside, volume.path()).unwrap();
    volume.update(key_text(2));
    assert_seen_within_one_poll(&store, 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_no_key_keeps_the_old_one() {
    let file = KeyFile::new();
    let store = file.store().await;
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(1024 * 1024).collect();
    let contents = [
        &b""[..],
        b"\n",
        b"id-2",
        b"id-2:",
        b":secret-of-id-2",
        b"id-2:secret\nid-3:secret",
        b"Key id-2:secret-of-id-2",
        b"id-2:secret\xC3\x28",
        br#"{"FAL_KEY":"id-2:secret-of-id-2"}"#,
        b"${FAL_KEY_ID}:${FAL_KEY_SECRET}",
        b"<html>502: secret-of-id-2</html>",
        b"undefined:undefined",
        b"op://vault/fal/secret-of-id-2",
        b"vault:secret-of-id-2",
        b"ENC[AES256_GCM,data:secret-of-id-2]",
        b"FAL_KEY=id-2:secret-of-id-2",
        b"id-2:secret-of-id-2,",
        b"aWQtMjpzZWNyZXQtb2YtaWQtMg==",
        b"\xFF\xFEi\0d\0:\0",
        &noise,
        &noise[..64 * 1024],
        &noise[..1024],
    ];
    for (next, content) in (2..).zip(contents) {
        file.write(content);
        assert_refused(&store, SourceErrorKind::Invalid).await;
        file.write(key_text(next));
        assert_seen_within_one_poll(&store, next).await;
    }
}

/// Nobody may read the file until the returned closure is called.
///
/// Mode bits do not stop root, under whom containers run tests; there a directory takes the place of the file, which
/// is just as unreadable. Either way the test has something to see.
fn take_permission_away(file: &KeyFile) -> impl FnOnce() {
    fs::set_permissions(&file.path, Permissions::from_mode(0o000)).unwrap();
    let root = File::open(&file.path).is_ok();
    let (path, aside) = (file.path.clone(), file.aside());
    if root {
        fs::rename(&path, &aside).unwrap();
        fs::create_dir(&path).unwrap();
    }
    move || {
        if root {
            fs::remove_dir(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_permission_taken_away_and_given_back_keeps_the_old_key() {
    let file = KeyFile::new();
    let store = file.store().await;
    file.write(key_text(2));
    let give_back = take_permission_away(&file);
    assert_refused(&store, SourceErrorKind::Unreadable).await;
    status_where(&store, |status| status.consecutive_failures > 5).await;
    assert_eq!(current(&store), "id-1");
    give_back();
    assert_seen_within_one_poll(&store, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_on_the_way_that_is_swapped_is_no_matter() {
    let root = tempfile::tempdir().unwrap();
    let (mounted, aside) = (root.path().join("mounted"), root.path().join("aside"));
    fs::create_dir(&mounted).unwrap();
    fs::write(mounted.join("fal_key"), key_text(1)).unwrap();
    let store = store(&mounted.join("fal_key")).await;

    fs::rename(&mounted, &aside).unwrap();
    fs::write(&mounted, "no directory").unwrap();
    assert_refused(&store, SourceErrorKind::Unreadable).await;
    fs::remove_file(&mounted).unwrap();
    assert_refused(&store, SourceErrorKind::NotFound).await;
    fs::write(aside.join("fal_key"), key_text(2)).unwrap();
    fs::rename(&aside, &mounted).unwrap();
    assert_seen_within_one_poll(&store, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_missing_or_broken_file_fails_at_the_start() {
    let file = KeyFile::new();
    for (content, text) in [
        (Some("half"), "holds no credential: the key has no `:`; a fal key has the form `id:secret`"),
        (Some(""), "holds no credential: the key is empty"),
        (
            None,
            "cannot be found; put the credential there, or name the file that has it: No such file or directory (os \
             error 2)",
        ),
    ] {
        match content {
            Some(content) => file.write(content),
            None => fs::remove_file(&file.path).unwrap(),
        }
        let error = CredentialStore::builder(FileSource::new(&file.path)).build().await.unwrap_err();
        assert_eq!(report(&error), format!("file:{}: {text}", file.path.display()));
    }
}

// Many rotations, many readers

const READERS: usize = 8;

/// Tasks that load again and again until they see the last generation.
struct Readers {
    tasks: JoinSet<()>,
    seen: Arc<[AtomicU64; READERS]>,
}

impl Readers {
    fn start(store: &CredentialStore, last: u64) -> Self {
        let seen: Arc<[AtomicU64; READERS]> = Arc::default();
        let mut tasks = JoinSet::new();
        for reader in 0..READERS {
            let (store, seen) = (store.clone(), Arc::clone(&seen));
            tasks.spawn(async move {
                while seen[reader].load(Ordering::SeqCst) < last {
                    let snapshot = store.load();
                    let generation = snapshot.generation().get();
                    assert!(seen[reader].swap(generation, Ordering::SeqCst) <= generation, "a generation went back");
                    // The key that was published as this generation, and its own secret.
                    let whole = *snapshot.credential().header() == format!("Key {}", key_text(generation));
                    assert!(whole, "generation {generation} is torn");
                    assert_eq!(snapshot.credential().key_id().unwrap().as_str(), format!("id-{generation}"));
                    tokio::task::yield_now().await;
                }
            });
        }
        Self { tasks, seen }
    }

    /// Waits until each of them has seen a generation, so that they are in the midst of it.
    async fn reach(&mut self, generation: u64) {
        while self.seen.iter().any(|seen| seen.load(Ordering::SeqCst) < generation) {
            if let Some(ended) = self.tasks.try_join_next() {
                ended.unwrap();
            }
            tokio::task::yield_now().await;
        }
    }

    async fn end(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_rotations_are_whole_to_eight_readers() {
    const LAST: u64 = 10_001;
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).build().await.unwrap();
    let mut readers = Readers::start(&store, LAST);
    for n in 2..=LAST {
        // Through both doors: by hand and through the source.
        let generation = if n % 10 == 0 {
            source.brings(n);
            let Reloaded::Changed(generation) = store.reload().await.unwrap() else { panic!("{n} was not seen") };
            generation
        } else {
            store.replace(key(n))
        };
        assert_eq!(generation.get(), n);
        if n % 100 == 0 {
            readers.reach(n).await;
        }
    }
    readers.end().await;
    assert_eq!((store.generation().get(), store.status().generation.get()), (LAST, LAST));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn five_hundred_swaps_of_a_volume_are_whole_to_eight_readers() {
    const LAST: u64 = 500;
    let mut volume = KubeletVolume::new(key_text(1));
    // It is read by hand only: a poll between the swap and the reload would have seen the change before it.
    let source = FileSource::new(volume.path()).poll_every(Duration::from_secs(60 * 60));
    let store = CredentialStore::builder(source).build().await.unwrap();
    let mut readers = Readers::start(&store, LAST);
    for n in 2..=LAST {
        volume.update(key_text(n));
        let generation = match store.reload().await.unwrap() {
            Reloaded::Changed(generation) => generation,
            other => panic!("{n} was not seen: {other:?}"),
        };
        assert_eq!(generation.get(), n);
        if n % 100 == 0 {
            readers.reach(n).await;
        }
    }
    readers.end().await;
    assert_eq!((store.generation().get(), store.status().consecutive_failures), (LAST, 0));
}
