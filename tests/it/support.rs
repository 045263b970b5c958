//! What several integration tests need.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use metrics::{Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Recorder, SharedString, Unit};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{process::Command, sync::watch, time::Instant};
use tower_fal::{
    Credential, CredentialStore,
    error::{BoxError, SourceError},
    source::CredentialSource,
    store::Status,
};
use tracing::{Event, Metadata, Subscriber, field::Field, span};

/// How long a test waits for what must happen. Of paused time, so that a failing test does not take as long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2 * 60 * 60);

/// The credential number `n`. Its secret tells whether it belongs to its id.
pub(crate) fn key(n: u64) -> Credential {
    Credential::key(key_text(n)).unwrap()
}

pub(crate) fn key_text(n: u64) -> String {
    format!("id-{n}:secret-of-id-{n}")
}

/// A token that says when it expires, in seconds since 1970. Nobody checks its signature.
pub(crate) fn bearer_until(seconds: u64) -> Credential {
    let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"exp":{seconds}}}"#));
    Credential::bearer(format!("e30.{claims}.signature")).unwrap()
}

/// The id of the current key: what a test may show when it fails.
pub(crate) fn current(store: &CredentialStore) -> String {
    store.load().credential().key_id().unwrap().to_string()
}

/// Waits until the status is as wanted, and returns it. Needs paused time.
pub(crate) async fn status_where(store: &CredentialStore, wanted: impl Fn(&Status) -> bool) -> Status {
    let mut status = store.subscribe();
    let reached = tokio::time::timeout(PATIENCE, status.wait_for(|status| wanted(status))).await;
    match reached {
        Ok(Some(status)) => status,
        _ => panic!("it never came to that: {:?}", store.status()),
    }
}

/// A source that does as it is told and notes when it was asked.
#[derive(Clone)]
pub(crate) struct Script {
    every: Option<Duration>,
    says: Arc<Mutex<Says>>,
    open: Arc<watch::Sender<bool>>,
    loads: Arc<watch::Sender<Vec<Instant>>>,
}

#[derive(Clone)]
pub(crate) enum Says {
    Here(Credential),
    Nothing,
    Malformed,
    Error,
    Panic,
    Hang,
}

impl Script {
    pub(crate) fn new(every: impl Into<Option<Duration>>, says: Says) -> Self {
        Self {
            every: every.into(),
            says: Arc::new(Mutex::new(says)),
            open: Arc::new(watch::Sender::new(true)),
            loads: Arc::new(watch::Sender::new(Vec::new())),
        }
    }

    pub(crate) fn says(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }

    pub(crate) fn brings(&self, n: u64) {
        self.says(Says::Here(key(n)));
    }

    /// From now on a load makes up its mind when it begins, and says so after [`open`](Self::open).
    pub(crate) fn close(&self) {
        self.open.send_replace(false);
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// How often it was asked.
    pub(crate) fn loads(&self) -> usize {
        self.loads.borrow().len()
    }

    pub(crate) async fn loads_reach(&self, count: usize) {
        let mut loads = self.loads.subscribe();
        let reached = tokio::time::timeout(PATIENCE, loads.wait_for(|loads| loads.len() >= count)).await;
        assert!(reached.is_ok(), "{} loads, {count} wanted", self.loads());
    }

    /// The seconds between the loads, from load number `first` on.
    pub(crate) fn gaps(&self, first: usize) -> Vec<f64> {
        self.loads.borrow()[first..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
    }
}

impl CredentialSource for Script {
    fn name(&self) -> &str {
        "script"
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        let says = self.says.lock().unwrap().clone();
        self.loads.send_modify(|loads| loads.push(Instant::now()));
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        if self.loads() > 10_000 {
            return std::future::pending().await; // a hot loop is to fail a test, not to keep it from its end
        }
        let failed = |cause: BoxError| SourceError::new("script", cause);
        match says {
            Says::Here(credential) => Ok(Some(credential)),
            Says::Nothing => Ok(None),
            Says::Malformed => Credential::key("half").map(Some).map_err(|error| failed(error.into())),
            Says::Error => Err(failed("connection refused".into())),
            Says::Panic => panic!("as told"),
            Says::Hang => std::future::pending().await,
        }
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.every
    }
}

/// Key 1 is everywhere at first: in the source, in the store, and at `fal`, which is handed in.
pub(crate) struct World<F> {
    pub(crate) fal: F,
    pub(crate) source: Script,
    pub(crate) store: CredentialStore,
}

impl<F> World<F> {
    pub(crate) async fn around(fal: F) -> Self {
        let source = Script::new(None, Says::Here(key(1)));
        let store = CredentialStore::builder(source.clone()).build().await.unwrap();
        Self { fal, source, store }
    }

    /// How often the source was asked after the start.
    pub(crate) fn reloads(&self) -> usize {
        self.source.loads() - 1
    }
}

/// A directory that is written as kubelet's atomic writer does it for a mounted Secret:
///
/// ```text
/// fal_key -> ..data/fal_key
/// ..data  -> ..2026_01_31_10_00_00.1
/// ..2026_01_31_10_00_00.1/fal_key
/// ```
#[cfg(unix)]
pub(crate) struct KubeletVolume {
    directory: TempDir,
    updates: u32,
}

#[cfg(unix)]
impl KubeletVolume {
    const KEY: &str = "fal_key";

    pub(crate) fn new(content: impl AsRef<[u8]>) -> Self {
        let mut volume = Self { directory: tempfile::tempdir().unwrap(), updates: 0 };
        volume.update(content);
        symlink(Path::new("..data").join(Self::KEY), &volume.path());
        volume
    }

    /// The file as a container names it.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join(Self::KEY)
    }

    /// A new directory, a new link, a rename, and only then is the old directory removed.
    pub(crate) fn update(&mut self, content: impl AsRef<[u8]>) {
        self.updates += 1;
        let root = self.directory.path();
        let (data, data_tmp) = (root.join("..data"), root.join("..data_tmp"));
        let old = fs::read_link(&data).ok();
        let new = PathBuf::from(format!("..2026_01_31_10_00_00.{}", self.updates));
        fs::create_dir(root.join(&new)).unwrap();
        fs::write(root.join(&new).join(Self::KEY), content).unwrap();
        symlink(new, &data_tmp);
        fs::rename(data_tmp, data).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(root.join(old)).unwrap();
        }
    }
}

#[cfg(unix)]
fn symlink(to: PathBuf, at: &Path) {
    std::os::unix::fs::symlink(to, at).unwrap();
}

/// `examples/NAME.rs` as a process, which is killed when its handle is dropped.
///
/// Cargo builds it first, once for each process of tests: with `--test it` nothing else does, and what an earlier
/// build left would be run in its place.
pub(crate) fn example(name: &'static str) -> Command {
    static BUILT: LazyLock<Mutex<HashMap<&str, PathBuf>>> = LazyLock::new(Mutex::default);
    let mut built = BUILT.lock().unwrap();
    let mut command = Command::new(built.entry(name).or_insert_with(|| build_example(name)));
    command.kill_on_drop(true);
    command
}

/// With the profile and in the target directory of these tests, so that `cargo test` has left nothing to do.
fn build_example(name: &str) -> PathBuf {
    let tests = env::current_exe().unwrap();
    let directory = tests.ancestors().nth(2).unwrap();
    let profile = directory.file_name().unwrap().to_str().unwrap();
    let mut cargo = process::Command::new(env!("CARGO"));
    cargo
        .args(["build", "--frozen", "--message-format=json", "--example", name])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
        .args(["--profile", if profile == "debug" { "dev" } else { profile }])
        .arg("--target-dir")
        .arg(directory.parent().unwrap());
    // What Cargo tells a test of its package, ring's build script would take for a reason to build ring anew.
    for (variable, _) in env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(variable);
        }
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let artifacts = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>().map(Result::unwrap);
    let executable = artifacts
        .filter(|artifact| artifact["target"]["name"] == name)
        .find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from));
    executable.unwrap()
}

/// The texts of all events.
#[derive(Clone, Default)]
pub(crate) struct Messages(Arc<Mutex<Vec<String>>>);

impl Messages {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Subscriber for Messages {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut |field: &Field, value: &dyn std::fmt::Debug| {
            if field.name() == "message" {
                self.0.lock().unwrap().push(format!("{value:?}"));
            }
        });
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Records counters and gauges under `name label=value …`. What is recorded on another thread is not seen.
#[derive(Default)]
pub(crate) struct Recorded {
    counters: Mutex<BTreeMap<String, Arc<Count>>>,
    gauges: Mutex<BTreeMap<String, Arc<Level>>>,
}

impl Recorded {
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let counters = self.counters.lock().unwrap();
        counters.iter().map(|(name, count)| (name.clone(), count.0.load(Ordering::SeqCst))).collect()
    }

    pub(crate) fn gauges(&self) -> BTreeMap<String, f64> {
        let gauges = self.gauges.lock().unwrap();
        gauges.iter().map(|(name, value)| (name.clone(), *value.0.lock().unwrap())).collect()
    }

    fn name(key: &Key) -> String {
        let labels: BTreeSet<_> = key.labels().map(|label| format!(" {}={}", label.key(), label.value())).collect();
        key.name().to_owned() + &labels.into_iter().collect::<String>()
    }
}

#[derive(Default)]
struct Count(AtomicU64);

impl CounterFn for Count {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Ordering::SeqCst);
    }

    fn absolute(&self, _: u64) {
        unreachable!("nothing is counted so");
    }
}

#[derive(Default)]
struct Level(Mutex<f64>);

impl GaugeFn for Level {
    fn increment(&self, _: f64) {
        unreachable!("a recorder that was installed late would be wrong for ever");
    }

    fn decrement(&self, _: f64) {
        unreachable!("a recorder that was installed late would be wrong for ever");
    }

    fn set(&self, value: f64) {
        *self.0.lock().unwrap() = value;
    }
}

impl Recorder for Recorded {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &metrics::Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::clone(self.counters.lock().unwrap().entry(Self::name(key)).or_default()))
    }

    fn register_gauge(&self, key: &Key, _: &metrics::Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::clone(self.gauges.lock().unwrap().entry(Self::name(key)).or_default()))
    }

    fn register_histogram(&self, _: &Key, _: &metrics::Metadata<'_>) -> Histogram {
        unreachable!("there are no histograms");
    }
}
