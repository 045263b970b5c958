use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use notify::{
    Event, EventKind, NullWatcher, RecursiveMode, Watcher,
    event::{AccessKind, ModifyKind, RemoveKind, RenameMode},
};
use tempfile::TempDir;

use super::{
    listeners::Listeners,
    watcher::{MakeWatcher, Watching},
    *,
};
use crate::{CredentialStore, source::FileSource};

/// How long a file may take to settle that was written and renamed within a tick of the system's clock.
const SETTLED: Duration = Duration::from_millis(200);
/// A poll at 5 s and a fifth, and one of 30 s; timers round up.
const ONE_POLL: Duration = Duration::from_millis(6010 + 200);
const ONE_SLOW_POLL: Duration = Duration::from_millis(36_010 + 200);

/// The events of this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn collect(&self) -> tracing::subscriber::DefaultGuard {
        // With one dispatcher alone, `tracing` asks the thread that reaches an event first whether it is enabled. This may
        // be another test's thread, which has no subscriber: the event would be switched off for all threads.
        static SECOND: LazyLock<tracing::Dispatch> =
            LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish()));
        LazyLock::force(&SECOND);
        let log = self.clone();
        tracing::subscriber::set_default(tracing_subscriber::fmt().with_writer(move || log.clone()).finish())
    }

    fn count(&self, text: &str) -> usize {
        String::from_utf8_lossy(&self.0.lock().unwrap()).matches(text).count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct KeyFile(TempDir);

impl KeyFile {
    async fn store(&self, make: MakeWatcher) -> CredentialStore {
        self.write(1);
        let watcher = Arc::new(DirectoryWatcher::new(make));
        CredentialStore::builder(FileSource::new(self.path())).watch_files_with(watcher).build().await.unwrap()
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("fal_key")
    }

    fn write(&self, n: u64) {
        let aside = self.path().with_extension("aside");
        fs::write(&aside, format!("id-{n}:secret")).unwrap();
        fs::rename(aside, self.path()).unwrap();
    }

    /// How long it takes until the store has a new key. Paused time stands still while a file is read.
    async fn time_to_see(&self, store: &CredentialStore, n: u64) -> Duration {
        let begin = Instant::now();
        self.write(n);
        let mut status = store.subscribe();
        status.wait_for(|status| status.generation.get() == n).await.unwrap();
        begin.elapsed()
    }
}

fn key_file() -> KeyFile {
    KeyFile(tempfile::tempdir().unwrap())
}

/// A watcher that notes what it is asked for. A test tells it what it hears.
#[derive(Clone, Default)]
struct Fake {
    calls: Arc<Mutex<Vec<String>>>,
    made: Arc<AtomicUsize>,
    dies: Arc<AtomicBool>,
    listeners: Arc<Mutex<Option<Arc<Listeners>>>>,
}

impl Fake {
    fn make(&self) -> MakeWatcher {
        let fake = self.clone();
        Box::new(move |listeners| {
            fake.made.fetch_add(1, Ordering::SeqCst);
            *fake.listeners.lock().unwrap() = Some(listeners);
            Ok(Box::new(fake.clone()))
        })
    }

    fn watcher(&self) -> Arc<DirectoryWatcher> {
        Arc::new(DirectoryWatcher::new(self.make()))
    }

    fn hear(&self, event: notify::Result<Event>) {
        let listeners = self.listeners.lock().unwrap().clone();
        listeners.expect("no watcher was made").hear(event);
    }

    /// What was watched and unwatched since the last call.
    fn calls(&self) -> Vec<String> {
        mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Watcher for Fake {
    fn new<F: notify::EventHandler>(_: F, _: notify::Config) -> notify::Result<Self> {
        Ok(Self::default())
    }

    fn watch(&mut self, path: &Path, _: RecursiveMode) -> notify::Result<()> {
        assert!(!self.dies.load(Ordering::SeqCst), "as told");
        self.calls.lock().unwrap().push(format!("watch {}", path.display()));
        Ok(())
    }

    fn unwatch(&mut self, path: &Path) -> notify::Result<()> {
        self.calls.lock().unwrap().push(format!("unwatch {}", path.display()));
        Ok(())
    }

    fn kind() -> notify::WatcherKind {
        notify::WatcherKind::NullWatcher
    }
}

/// An event without a path, which all have to hear.
fn any() -> notify::Result<Event> {
    Ok(Event::new(EventKind::Any))
}

/// It says that it watches, and hears nothing.
fn deaf() -> MakeWatcher {
    Box::new(|_| Ok(Box::new(NullWatcher)))
}

#[tokio::test(start_paused = true)]
async fn without_a_watcher_the_file_is_polled() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let file = key_file();
    let used_up: MakeWatcher = Box::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Err(io::Error::from_raw_os_error(libc::EMFILE).into())
    });
    let store = file.store(used_up).await;
    for n in 2..=20 {
        let time = file.time_to_see(&store, n).await;
        assert!(time <= ONE_POLL, "seen only after {time:?}");
    }
    assert!(tries.load(Ordering::SeqCst) > 10, "it is never tried again");
}

#[tokio::test(start_paused = true)]
async fn where_no_events_come_each_rotation_costs_one_poll() {
    let log = Log::default();
    let _of_this_thread = log.collect();
    let file = key_file();
    let store = file.store(deaf()).await;
    for n in 2..=20 {
        let time = file.time_to_see(&store, n).await;
        assert!(time <= ONE_POLL, "number {n} is seen only after {time:?}");
    }
    tokio::time::sleep(2 * GRACE).await;
    assert_eq!(log.count("changed without a file event"), 1);
}

#[tokio::test(start_paused = true)]
async fn events_that_stop_cost_one_slow_poll_and_no_more() {
    let log = Log::default();
    let _of_this_thread = log.collect();
    let fake = Fake::default();
    let file = key_file();
    let store = file.store(fake.make()).await;
    for n in [2, 12] {
        // One event that announces a change, and from then on none.
        tokio::time::sleep(Duration::from_secs(300)).await;
        fake.hear(any());
        let announced = file.time_to_see(&store, n).await;
        assert!(announced <= SETTLED, "seen only after {announced:?}");
        tokio::time::sleep(Duration::from_secs(300)).await;
        let first = file.time_to_see(&store, n + 1).await;
        assert!(first <= ONE_SLOW_POLL, "seen only after {first:?}");
        tokio::time::sleep(2 * GRACE).await;
        for n in n + 2..n + 10 {
            let time = file.time_to_see(&store, n).await;
            assert!(time <= ONE_POLL, "number {n} is seen only after {time:?}");
        }
    }
    assert_eq!(log.count("changed without a file event"), 2);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_comes_after_the_poll_is_none_that_was_missed() {
    let log = Log::default();
    let _of_this_thread = log.collect();
    let fake = Fake::default();
    let file = key_file();
    let store = file.store(fake.make()).await;
    for n in 2..=10 {
        tokio::time::sleep(Duration::from_secs(300)).await;
        file.time_to_see(&store, n).await;
        tokio::time::sleep(GRACE / 2).await;
        fake.hear(any());
    }
    tokio::time::sleep(2 * GRACE).await;
    assert_eq!(log.count("changed without a file event"), 0);
}

#[tokio::test(start_paused = true)]
async fn polls_are_slow_only_while_events_are_known_to_come() {
    let works = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&works);
    let fake = Fake::default();
    let make = fake.make();
    let make: MakeWatcher = Box::new(move |listeners| match switch.load(Ordering::SeqCst) {
        true => make(listeners),
        false => Err(notify::Error::generic("not now")),
    });
    let file = key_file();
    let store = file.store(make).await;
    let polls = async |seconds| {
        let mut polls = 0;
        let mut last = store.status().checked_at;
        for _ in 0..seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let checked = store.status().checked_at;
            polls += u32::from(checked != mem::replace(&mut last, checked));
        }
        polls
    };
    assert!((50..=75).contains(&polls(300).await));
    works.store(true, Ordering::SeqCst);
    tokio::time::sleep(ONE_POLL).await;
    assert!((50..=75).contains(&polls(300).await), "no event has proven that they come");
    fake.hear(any()); // without a change
    assert!((50..=75).contains(&polls(300).await), "no event has announced a change");
    fake.hear(any());
    file.time_to_see(&store, 2).await;
    assert!((7..=13).contains(&polls(300).await));
}

#[tokio::test(start_paused = true)]
async fn an_event_is_heard_also_after_it_was_deaf() {
    let fake = Fake::default();
    let file = key_file();
    let store = file.store(fake.make()).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    file.time_to_see(&store, 2).await;
    tokio::time::sleep(Duration::from_secs(300)).await;

    fake.hear(any());
    let time = file.time_to_see(&store, 3).await;
    assert!(time <= SETTLED, "seen only after {time:?}");
    fake.hear(Err(notify::Error::generic("the queue is broken")));
    let time = file.time_to_see(&store, 4).await;
    assert!(time <= SETTLED, "seen only after {time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_panics_is_made_again() {
    #[derive(Debug)]
    struct Panics;
    impl Watcher for Panics {
        fn new<F: notify::EventHandler>(_: F, _: notify::Config) -> notify::Result<Self> {
            Ok(Self)
        }
        fn watch(&mut self, _: &Path, _: RecursiveMode) -> notify::Result<()> {
            panic!("as told")
        }
        fn unwatch(&mut self, _: &Path) -> notify::Result<()> {
            panic!("as told")
        }
        fn kind() -> notify::WatcherKind {
            notify::WatcherKind::NullWatcher
        }
    }
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("as told")
        }
    }
    let file = key_file();
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let make: MakeWatcher = Box::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Panics))
    });
    let store = file.store(make).await;
    for n in 2..=5 {
        let time = file.time_to_see(&store, n).await;
        assert!(time <= ONE_POLL, "seen only after {time:?}");
    }
    let before = made.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let made = made.load(Ordering::SeqCst) - before;
    assert!((10..=16).contains(&made), "it was made {made} times, and not with each poll");
}

#[tokio::test]
async fn every_event_is_a_hint_but_for_those_of_a_load() {
    use notify::event::{AccessMode::*, CreateKind, DataChange, Flag, MetadataKind, RemoveKind, RenameMode};
    let fake = Fake::default();
    let watcher = fake.watcher();
    let root = tempfile::tempdir().unwrap();
    let listener = Listener::new(watcher);
    assert!(watch(&listener, &[root.path()]).await.is_new);
    for reading in [AccessKind::Open(Any), AccessKind::Close(Read), AccessKind::Read, AccessKind::Any] {
        fake.hear(Ok(Event::new(EventKind::Access(reading))));
    }
    assert_eq!(listener.heard().count(), 0);
    let hints = [
        EventKind::Any,
        EventKind::Access(AccessKind::Close(Write)),
        EventKind::Create(CreateKind::Any),
        EventKind::Modify(ModifyKind::Data(DataChange::Any)),
        EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any)),
        EventKind::Modify(ModifyKind::Name(RenameMode::Any)),
        EventKind::Remove(RemoveKind::Any),
    ];
    for (count, kind) in (1..).zip(hints) {
        fake.hear(Ok(Event::new(kind)));
        assert_eq!(listener.heard().count(), count, "{kind:?}");
    }
    let lost = Event::new(EventKind::Other).set_flag(Flag::Rescan);
    fake.hear(Ok(lost));
    fake.hear(Err(notify::Error::generic("the queue is broken")));
    assert_eq!(listener.heard().count(), 9);
}

/// Has the listener listen to these directories.
async fn watch(listener: &Listener, directories: &[&Path]) -> Watching {
    let files = directories.iter().map(|directory| directory.join("fal_key")).collect();
    let directories = Directories::of(files);
    assert!(directories.failure.is_none());
    listener.watch(directories.wanted).await.unwrap()
}

fn canonical(path: &Path) -> String {
    fs::canonicalize(path).unwrap().display().to_string()
}

fn event(kind: EventKind, path: impl Into<PathBuf>) -> notify::Result<Event> {
    Ok(Event::new(kind).add_path(path.into()))
}

fn counts<const N: usize>(listeners: [&Listener; N]) -> [u64; N] {
    listeners.map(|listener| listener.heard().count())
}

#[tokio::test]
async fn a_store_hears_of_its_own_directories_only() {
    let fake = Fake::default();
    let watcher = fake.watcher();
    let root = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(root.path()).unwrap();
    let (a, b) = (root.join("a"), root.join("b"));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    let [one, two, both] = [(); 3].map(|()| Listener::new(Arc::clone(&watcher)));
    assert!(watch(&one, &[&a]).await.is_new);
    assert!(watch(&two, &[&b]).await.is_new);
    assert!(watch(&both, &[&a, &b]).await.is_new);
    assert!(!watch(&both, &[&a, &b]).await.is_new);
    assert_eq!(fake.made.load(Ordering::SeqCst), 1);
    let [path_a, path_b] = [&a, &b].map(|path| path.display().to_string());
    let expected = [&path_a, &path_b].map(|path| [format!("unwatch {path}"), format!("watch {path}")]);
    assert_eq!(fake.calls(), expected.concat());

    fake.hear(event(EventKind::Create(notify::event::CreateKind::File), a.join("fal_key")));
    assert_eq!(counts([&one, &two, &both]), [1, 0, 1]);
    fake.hear(event(EventKind::Any, &b)); // the directory itself
    assert_eq!(counts([&one, &two, &both]), [1, 1, 2]);
    fake.hear(event(EventKind::Any, root.join("c").join("fal_key")));
    fake.hear(event(EventKind::Any, a.join("deeper").join("fal_key")));
    assert_eq!(counts([&one, &two, &both]), [1, 1, 2]);
    fake.hear(any()); // heard once for each directory
    assert_eq!(counts([&one, &two, &both]), [2, 2, 4]);

    // What a store does not want any more, it does not hear of, and others still do.
    assert!(!watch(&both, &[&b]).await.is_new);
    fake.hear(event(EventKind::Any, a.join("fal_key")));
    assert_eq!(counts([&one, &two, &both]), [3, 2, 4]);
    assert_eq!(fake.calls(), [""; 0]);

    // A directory without a listener is not watched any more as soon as another store looks.
    drop(one);
    assert!(!watch(&two, &[&b]).await.is_new);
    assert_eq!(fake.calls(), [format!("unwatch {path_a}")]);
}

#[tokio::test]
async fn a_directory_that_is_lost_is_watched_again() {
    let fake = Fake::default();
    let watcher = fake.watcher();
    let root = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(root.path()).unwrap();
    let (outer, inner) = (root.join("outer"), root.join("outer").join("inner"));
    fs::create_dir_all(&inner).unwrap();
    let [one, two] = [(); 2].map(|()| Listener::new(Arc::clone(&watcher)));
    assert!(watch(&one, &[&outer]).await.is_new);
    assert!(watch(&two, &[&inner]).await.is_new);
    fake.calls();

    // It is moved away, and what was below it goes with it.
    fake.hear(event(EventKind::Modify(ModifyKind::Name(RenameMode::From)), &outer));
    assert!(one.heard().count() >= 1 && two.heard().count() >= 1);
    assert!(watch(&two, &[&inner]).await.is_new);
    assert!(watch(&one, &[&outer]).await.is_new);
    let [path_outer, path_inner] = [&outer, &inner].map(|path| path.display().to_string());
    let lost = [format!("unwatch {path_outer}"), format!("unwatch {path_inner}")];
    let again = [&path_inner, &path_outer].map(|path| [format!("unwatch {path}"), format!("watch {path}")]);
    assert_eq!(fake.calls(), [lost.to_vec(), again.concat()].concat());

    // A file of this name is no directory.
    fake.hear(event(EventKind::Remove(RemoveKind::Any), outer.join("fal_key")));
    assert!(!watch(&one, &[&outer]).await.is_new);

    // An error may be about any of them.
    fake.hear(Err(notify::Error::generic("the queue is broken")));
    assert!(watch(&one, &[&outer]).await.is_new);
    assert!(watch(&two, &[&inner]).await.is_new);
}

#[tokio::test]
async fn a_directory_replaced_without_an_event_is_watched_anew() {
    let fake = Fake::default();
    let watcher = fake.watcher();
    let root = tempfile::tempdir().unwrap();
    let mounted = root.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let [one, two] = [(); 2].map(|()| Listener::new(Arc::clone(&watcher)));
    assert!(watch(&one, &[&mounted]).await.is_new);
    assert!(watch(&two, &[&mounted]).await.is_new);
    fs::rename(&mounted, root.path().join("old")).unwrap();
    fs::create_dir(&mounted).unwrap();
    assert_eq!(counts([&one, &two]), [0, 0]);
    assert!(watch(&one, &[&mounted]).await.is_new);
    assert_eq!(counts([&one, &two]), [0, 1], "the other one has to look, too");
    assert!(watch(&two, &[&mounted]).await.is_new);
    assert!(!watch(&one, &[&mounted]).await.is_new);
    fake.hear(event(EventKind::Any, fs::canonicalize(&mounted).unwrap()));
    assert_eq!(counts([&one, &two]), [1, 2]);
}

#[tokio::test]
async fn a_directory_that_has_two_paths_is_watched_once() {
    let fake = Fake::default();
    let watcher = fake.watcher();
    let root = tempfile::tempdir().unwrap();
    let [one, two] = [(); 2].map(|()| Listener::new(Arc::clone(&watcher)));
    assert!(watch(&one, &[root.path()]).await.is_new);
    fake.calls();
    // As with a bind mount: another path, and the same directory behind it.
    let by_another_path = || {
        let directories = Directories::of(vec![root.path().join("fal_key")]).wanted;
        directories.into_values().map(|directory| (PathBuf::from("/elsewhere"), directory)).collect()
    };
    assert!(two.watch(by_another_path()).await.unwrap().is_new);
    assert!(!two.watch(by_another_path()).await.unwrap().is_new);
    assert_eq!(fake.calls(), [""; 0], "a second watch would take the place of the first");
    fake.hear(event(EventKind::Any, canonical(root.path())));
    assert_eq!(counts([&one, &two]), [1, 1]);
}

#[tokio::test]
async fn a_watcher_that_dies_is_made_again_for_all() {
    let fake = Fake::default();
    let watcher = fake.watcher();
    let roots = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [one, two, three] = [(); 3].map(|()| Listener::new(Arc::clone(&watcher)));
    assert!(watch(&one, &[roots[0].path()]).await.is_new);
    assert!(watch(&two, &[roots[1].path()]).await.is_new);
    fake.dies.store(true, Ordering::SeqCst);
    let failed = watch(&three, &[roots[2].path()]).await;
    assert!(!failed.is_new && failed.failure.is_some());
    assert_eq!(counts([&one, &two, &three]), [1, 1, 0]);
    fake.dies.store(false, Ordering::SeqCst);
    for (listener, root) in [&one, &two, &three].into_iter().zip(&roots) {
        assert!(watch(listener, &[root.path()]).await.is_new);
    }
    assert_eq!(fake.made.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn events_without_a_change_are_answered_ever_more_slowly() {
    let mut pace = Pace::default();
    let waits: Vec<_> = (0..10).map(|_| pace.next(0).as_millis()).collect();
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    assert_eq!(pace.next(1), DEBOUNCE); // there was a change
    assert_eq!(pace.next(1), 2 * DEBOUNCE);
    tokio::time::advance(3 * LONGEST_DEBOUNCE).await;
    assert_eq!(pace.next(1), DEBOUNCE);
}
