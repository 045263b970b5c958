//! Sources made of others, in a store: chains, pairs of files, `.env` files.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::Instant;
use tower_fal::{
    CredentialStore,
    error::{SourceErrorKind, report},
    source::{ChainSource, CredentialSource as _, DotenvSource, EnvSource, FileSource},
    store::{ReloadError, Reloaded},
};

use crate::support::{Events, Says, Script, current, key, key_text, status_where};

/// The interval of 5 s and a fifth, what timers round up, and how long a file may take to settle.
const ONE_POLL: Duration = Duration::from_millis(6010 + 200);

/// A Secret of two keys, as kubelet mounts it.
struct PairVolume {
    directory: TempDir,
    updates: u32,
}

impl PairVolume {
    fn new() -> Self {
        let mut volume = Self { directory: tempfile::tempdir().unwrap(), updates: 0 };
        volume.update();
        for name in ["id", "secret"] {
            symlink(PathBuf::from("..data").join(name), volume.directory.path().join(name)).unwrap();
        }
        volume
    }

    fn source(&self) -> FileSource {
        FileSource::pair(self.directory.path().join("id"), self.directory.path().join("secret"))
    }

    fn update(&mut self) {
        self.updates += 1;
        let (root, n) = (self.directory.path(), self.updates);
        let (new, data) = (root.join(format!("..{n}")), root.join("..data"));
        let old = fs::read_link(&data).ok();
        fs::create_dir(&new).unwrap();
        fs::write(new.join("id"), format!("id-{n}")).unwrap();
        fs::write(new.join("secret"), format!("secret-of-id-{n}")).unwrap();
        symlink(new, root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), data).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(old).unwrap();
        }
    }
}

#[tokio::test]
async fn a_pair_is_whole_however_often_its_volume_is_swapped() {
    let mut volume = PairVolume::new();
    let source = volume.source();
    let stop = Arc::new(AtomicBool::new(false));
    let swapping = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::SeqCst) {
                volume.update();
            }
            volume
        }
    });
    let mut whole = 0;
    while whole < 50 {
        // Now and then it is swapped faster than anybody can read.
        if let Ok(Some(pair)) = source.load().await {
            let (id, header) = (pair.key_id().unwrap().as_str(), pair.header().to_str().unwrap());
            assert_eq!(header, format!("Key {id}:secret-of-{id}"));
            whole += 1;
        }
    }
    stop.store(true, Ordering::SeqCst);
    swapping.join().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pair_is_followed_like_any_file() {
    let mut volume = PairVolume::new();
    let store = CredentialStore::builder(volume.source()).build().await.unwrap();
    for n in 2..=6 {
        volume.update();
        let begin = Instant::now();
        status_where(&store, |status| status.generation.get() == n).await;
        assert!(begin.elapsed() <= ONE_POLL, "seen only after {:?}", begin.elapsed());
        assert_eq!(current(&store), format!("id-{n}"));
    }
    assert_eq!(store.status().consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_dotenv_file_is_followed_and_keeps_the_last_good_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(".env");
    let write = |n: u64| fs::write(&path, format!("OTHER='a b'\nFAL_KEY={}\n", key_text(n))).unwrap();
    write(1);
    let store = CredentialStore::builder(DotenvSource::new(&path)).build().await.unwrap();
    write(2);
    status_where(&store, |status| status.generation.get() == 2).await;
    for content in ["", "OTHER=1", "FAL_KEY=half", "FAL_KEY='id:never closed"] {
        fs::write(&path, content).unwrap();
        assert!(store.reload().await.is_err());
        assert_eq!(current(&store), "id-2");
    }
    write(3);
    let begin = Instant::now();
    status_where(&store, |status| status.generation.get() == 3).await;
    assert!(begin.elapsed() <= ONE_POLL);
}

/// Until that source is back, or one in front of it has a key.
#[tokio::test(start_paused = true)]
async fn a_mounted_file_comes_before_the_environment_once_it_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fal_key");
    let env = EnvSource::all().environment(|name| (name == "FAL_KEY").then(|| key_text(1).into()));
    let chain = ChainSource::new().push(FileSource::new(&path).if_present()).push(env);
    let store = CredentialStore::builder(chain).build().await.unwrap();
    assert_eq!((current(&store).as_str(), store.load().source()), ("id-1", "env:FAL_KEY"));

    fs::write(&path, key_text(2)).unwrap();
    status_where(&store, |status| status.generation.get() == 2).await;
    assert_eq!((current(&store), store.load().source()), ("id-2".to_owned(), &*format!("file:{}", path.display())));

    // A file that was there, and one that is wrong, are waited for: the old key of the environment does not come back.
    for content in [None, Some("half"), Some("{}"), Some("")] {
        match content {
            None => fs::remove_file(&path).unwrap(),
            Some(content) => fs::write(&path, content).unwrap(),
        }
        assert!(store.reload().await.is_err());
        assert_eq!(current(&store), "id-2");
    }
    fs::write(&path, key_text(3)).unwrap();
    status_where(&store, |status| status.generation.get() == 3).await;
}

#[tokio::test]
async fn a_wrong_file_before_the_environment_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fal_key");
    let chain = || {
        let env = EnvSource::all().environment(|name| (name == "FAL_KEY").then(|| key_text(1).into()));
        ChainSource::new().push(FileSource::new(&path).if_present()).push(env)
    };
    fs::write(&path, "half").unwrap();
    let error = CredentialStore::builder(chain()).build().await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Invalid);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = CredentialStore::builder(chain()).build().await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Unreadable);
}

#[tokio::test(start_paused = true)]
async fn a_chain_keeps_the_key_of_its_winner() {
    let every = Duration::from_secs(5);
    let [first, winner, last] = [(); 3].map(|()| Script::new(every, Says::Nothing));
    winner.brings(2);
    last.brings(3);
    let chain = ChainSource::new().push(first.clone()).push(winner.clone()).push(last.clone());
    let store = CredentialStore::builder(chain).build().await.unwrap();
    assert_eq!(current(&store), "id-2");

    for says in [Says::Nothing, Says::Error, Says::Malformed, Says::Panic] {
        winner.says(says);
        assert!(store.reload().await.is_err());
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(store.status().consecutive_failures > 500);
        assert_eq!((current(&store), last.loads()), ("id-2".to_owned(), 0));
    }
    winner.brings(4);
    status_where(&store, |status| status.last_error.is_none()).await;
    assert_eq!(current(&store), "id-4");

    first.brings(1);
    status_where(&store, |status| status.generation.get() == 3).await;
    assert_eq!(current(&store), "id-1");
    first.says(Says::Nothing);
    let Err(ReloadError::Failed(error)) = store.reload().await else { panic!("it fell through") };
    assert_eq!(error.kind(), SourceErrorKind::NotFound);
    let said = "chain(script, script, script): script has no credential any more, and the chain waits for it";
    assert_eq!(report(&error), said);
}

#[tokio::test(start_paused = true)]
async fn a_chain_that_may_fall_through_does_so_by_itself() {
    let every = Duration::from_secs(5);
    let (first, second) = (Script::new(every, Says::Here(key(1))), Script::new(every, Says::Here(key(2))));
    let chain = ChainSource::new().push(first.clone()).push(second).fall_through_after(Duration::from_secs(60));
    let store = CredentialStore::builder(chain).build().await.unwrap();
    first.says(Says::Nothing);
    let begin = Instant::now();
    status_where(&store, |status| status.generation.get() == 2).await;
    assert_eq!(current(&store), "id-2");
    let waited = begin.elapsed().as_secs();
    assert!((60..=72).contains(&waited), "it moved on after {waited} s");
    assert!(matches!(store.reload().await, Ok(Reloaded::Unchanged(_))));
}

#[test]
fn a_variable_that_shadows_a_file_is_one_event() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fal_key");
    fs::write(&path, key_text(2)).unwrap();
    let environment = |set: &'static [&'static str], path: &std::path::Path| {
        let path = path.to_owned();
        EnvSource::all().environment(move |name| match name {
            _ if !set.contains(&name) => None,
            "FAL_KEY" => Some(key_text(1).into()),
            _ => Some(path.clone().into()),
        })
    };
    let chain = |set| ChainSource::new().push(environment(set, &path)).push(FileSource::new(&path));

    let shadowed = ["the fal credential comes from a place that cannot be rotated, and shadows a file"];
    assert_eq!(messages_of_ten_loads(chain(&["FAL_KEY"])), shadowed);
    assert_eq!(messages_of_ten_loads(environment(&["FAL_KEY", "FAL_KEY_FILE"], &path)), shadowed);
    let nothing: [&str; 0] = [];
    assert_eq!(messages_of_ten_loads(chain(&["FAL_KEY_FILE"])), nothing);
    assert_eq!(messages_of_ten_loads(environment(&["FAL_KEY"], &path)), nothing);
    fs::remove_file(&path).unwrap();
    assert_eq!(messages_of_ten_loads(chain(&["FAL_KEY"])), nothing);
}

#[test]
fn a_world_writable_directory_is_one_event() {
    let set_mode = |path: &std::path::Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (path, link) = (directory.path().join("fal_key"), elsewhere.path().join("fal_key"));
    fs::write(&path, key_text(1)).unwrap();
    symlink(&path, &link).unwrap();
    let warning = ["the file of the fal key, or its directory, is writable by everyone: chmod o-w it"];
    let nothing: [&str; 0] = [];
    for (directory, mode, events) in [
        (&directory, 0o777, &warning[..]),
        (&directory, 0o1777, &nothing[..]),
        (&directory, 0o700, &nothing[..]),
        (&elsewhere, 0o777, &warning[..]),
    ] {
        set_mode(directory.path(), mode);
        assert_eq!(messages_of_ten_loads(FileSource::new(&link)), events, "{mode:o}");
    }
    set_mode(elsewhere.path(), 0o700);
    // One of two files, which is one warning as well.
    let secret = directory.path().join("secret");
    fs::write(&path, "id").unwrap();
    fs::write(&secret, "secret").unwrap();
    set_mode(&path, 0o666);
    assert_eq!(messages_of_ten_loads(FileSource::pair(&path, &secret)), warning);
}

/// On a runtime of its own, all of whose threads report.
#[allow(clippy::needless_pass_by_value)] // as a store takes it
fn messages_of_ten_loads(source: impl tower_fal::source::CredentialSource) -> Vec<String> {
    let events = Events::default();
    let dispatch = events.dispatch();
    let _on_this_thread = tracing::dispatcher::set_default(&dispatch);
    let on_thread_start = move || std::mem::forget(tracing::dispatcher::set_default(&dispatch));
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().on_thread_start(on_thread_start).build().unwrap();
    runtime.block_on(async {
        for _ in 0..10 {
            source.load().await.unwrap();
        }
    });
    drop(runtime); // which waits for what still runs on other threads
    events.take().into_iter().map(|event| event.message).collect()
}
