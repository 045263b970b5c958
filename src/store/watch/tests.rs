use std::{
    fs, io,
    sync::atomic::{AtomicBool, AtomicUsize},
};

use notify::{NullWatcher, RecursiveMode, Watcher};
use tempfile::TempDir;

use super::*;
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
    async fn store(&self, watcher: MakeWatcher) -> CredentialStore {
        self.write(1);
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

/// A watcher that hears what a test tells it.
fn told() -> (MakeWatcher, Arc<Mutex<Option<Arc<Heard>>>>) {
    let ears = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&ears);
    let make: MakeWatcher = Arc::new(move |heard| {
        *kept.lock().unwrap() = Some(heard);
        Ok(Box::new(NullWatcher))
    });
    (make, ears)
}

/// It says that it watches, and hears nothing.
fn deaf() -> MakeWatcher {
    Arc::new(|_| Ok(Box::new(NullWatcher)))
}

#[tokio::test(start_paused = true)]
async fn without_a_watcher_the_file_is_polled() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let file = key_file();
    let used_up: MakeWatcher = Arc::new(move |_| {
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
    let (make, ears) = told();
    let file = key_file();
    let store = file.store(make).await;
    for n in [2, 12] {
        // One event that announces a change, and from then on none.
        tokio::time::sleep(Duration::from_secs(300)).await;
        let heard: Arc<Heard> = ears.lock().unwrap().clone().unwrap();
        heard.hear(Ok(Event::new(EventKind::Any)));
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
    let (make, ears) = told();
    let file = key_file();
    let store = file.store(make).await;
    for n in 2..=10 {
        tokio::time::sleep(Duration::from_secs(300)).await;
        file.time_to_see(&store, n).await;
        tokio::time::sleep(GRACE / 2).await;
        let heard: Arc<Heard> = ears.lock().unwrap().clone().unwrap();
        heard.hear(Ok(Event::new(EventKind::Any)));
    }
    tokio::time::sleep(2 * GRACE).await;
    assert_eq!(log.count("changed without a file event"), 0);
}

#[tokio::test(start_paused = true)]
async fn polls_are_slow_only_while_events_are_known_to_come() {
    let works = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&works);
    let (make, ears) = told();
    let make: MakeWatcher = Arc::new(move |heard| match switch.load(Ordering::SeqCst) {
        true => make(heard),
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
    let heard: Arc<Heard> = ears.lock().unwrap().clone().unwrap();
    heard.hear(Ok(Event::new(EventKind::Any))); // without a change
    assert!((50..=75).contains(&polls(300).await), "no event has announced a change");
    heard.hear(Ok(Event::new(EventKind::Any)));
    file.time_to_see(&store, 2).await;
    assert!((7..=13).contains(&polls(300).await));
}

#[tokio::test(start_paused = true)]
async fn an_event_is_heard_also_after_it_was_deaf() {
    let (make, ears) = told();
    let file = key_file();
    let store = file.store(make).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    file.time_to_see(&store, 2).await;
    tokio::time::sleep(Duration::from_secs(300)).await;

    let heard: Arc<Heard> = ears.lock().unwrap().clone().unwrap();
    heard.hear(Ok(Event::new(EventKind::Any)));
    let time = file.time_to_see(&store, 3).await;
    assert!(time <= SETTLED, "seen only after {time:?}");
    heard.hear(Err(notify::Error::generic("the queue is broken")));
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
    let make: MakeWatcher = Arc::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Panics))
    });
    let store = file.store(make).await;
    for n in 2..=5 {
        let time = file.time_to_see(&store, n).await;
        assert!(time <= ONE_POLL, "seen only after {time:?}");
    }
    assert!(made.load(Ordering::SeqCst) > 1, "it is never made again");
}

#[test]
fn every_event_is_a_hint_but_for_what_a_load_makes_itself() {
    use notify::event::{AccessMode::*, CreateKind, DataChange, Flag, MetadataKind, RemoveKind, RenameMode};
    let heard = Heard::default();
    for reading in [AccessKind::Open(Any), AccessKind::Close(Read), AccessKind::Read, AccessKind::Any] {
        heard.hear(Ok(Event::new(EventKind::Access(reading))));
    }
    assert_eq!(heard.count.load(Ordering::SeqCst), 0);
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
        heard.hear(Ok(Event::new(kind)));
        assert_eq!(heard.count.load(Ordering::SeqCst), count, "{kind:?}");
    }
    let lost = Event::new(EventKind::Other).set_flag(Flag::Rescan);
    heard.hear(Ok(lost));
    heard.hear(Err(notify::Error::generic("the queue is broken")));
    assert_eq!(heard.count.load(Ordering::SeqCst), 9);
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
