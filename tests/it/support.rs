//! What several integration tests need.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use tempfile::TempDir;
use tokio::{net::TcpSocket, sync::watch, time::Instant};
use tower_fal::{
    Credential, CredentialStore,
    error::{BoxError, SourceError},
    source::CredentialSource,
    store::Status,
};
use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

#[path = "../example/mod.rs"]
mod example_process;

pub(crate) use self::example_process::example;

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

/// A port that refuses connections as long as this is kept: nobody listens, and no other test is given it.
pub(crate) fn nobody() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    socket
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
    Fails(io::ErrorKind),
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
            Says::Fails(kind) => Err(failed(io::Error::from(kind).into())),
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

/// Whoever collects events calls this before it makes its dispatcher.
///
/// With one dispatcher alone, `tracing` asks the thread that reaches an event first whether it is enabled. This may be
/// another test's thread, which has no subscriber: the event would be switched off for all threads.
pub(crate) fn keep_events_enabled() {
    static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(Events::default()));
    LazyLock::force(&SECOND);
}

/// What `tracing` was told: events, new spans, and what was recorded in a span later.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Mutex<Vec<Entry>>>);

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// `None` for what was recorded in a span later.
    pub(crate) metadata: Option<&'static Metadata<'static>>,
    pub(crate) message: String,
    /// Without the message.
    pub(crate) fields: BTreeMap<String, String>,
}

impl Events {
    /// A dispatcher that records here.
    pub(crate) fn dispatch(&self) -> Dispatch {
        keep_events_enabled();
        Dispatch::new(self.clone())
    }

    /// What was recorded since the last time.
    pub(crate) fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    /// As [`take`](Self::take), without what other crates say.
    pub(crate) fn take_ours(&self) -> Vec<Entry> {
        let is_ours = |event: &Entry| event.metadata.is_some_and(|about| about.target().starts_with("tower_fal"));
        self.take().into_iter().filter(is_ours).collect()
    }

    fn add(&self, metadata: Option<&'static Metadata<'static>>, record: impl FnOnce(&mut Fields)) {
        let mut fields = Fields::default();
        record(&mut fields);
        let message = fields.0.remove("message").unwrap_or_default();
        self.0.lock().unwrap().push(Entry { metadata, message, fields: fields.0 });
    }
}

impl Entry {
    pub(crate) fn level(&self) -> Level {
        *self.metadata.unwrap().level()
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.metadata, self.message)?;
        self.fields.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

impl Subscriber for Events {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        self.add(Some(attributes.metadata()), |fields| attributes.record(fields));
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        self.add(None, |fields| values.record(fields));
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        self.add(Some(event.metadata()), |fields| event.record(fields));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

/// Records counters and gauges, which Prometheus' own exporter then shows. What happens on another thread is not seen.
pub(crate) struct Metrics(PrometheusRecorder);

impl Metrics {
    pub(crate) fn new() -> Self {
        Self(PrometheusBuilder::new().build_recorder())
    }

    pub(crate) fn recorder(&self) -> &PrometheusRecorder {
        &self.0
    }

    /// The counters by `name label=value …`.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        self.series("counter").into_iter().map(|(series, value)| (series, value.parse().unwrap())).collect()
    }

    /// The gauges by `name label=value …`.
    pub(crate) fn gauges(&self) -> BTreeMap<String, f64> {
        self.series("gauge").into_iter().map(|(series, value)| (series, value.parse().unwrap())).collect()
    }

    /// The series of a kind, and their values as Prometheus reads them.
    fn series(&self, kind: &str) -> Vec<(String, String)> {
        let text = self.0.handle().render();
        let families = text.split_terminator("\n\n");
        let of_this_kind = families.filter(|family| family.lines().next().unwrap().ends_with(kind));
        let lines = of_this_kind.flat_map(|family| family.lines().skip(1));
        let read = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) =
                series.strip_suffix("\"}").and_then(|series| series.split_once('{')).unwrap_or((series, ""));
            let labels = labels.split_terminator("\",").map(|label| label.replacen("=\"", "=", 1));
            let labels: BTreeSet<_> = labels.map(|label| format!(" {label}")).collect();
            (name.to_owned() + &labels.into_iter().collect::<String>(), value.to_owned())
        };
        lines.map(read).collect()
    }
}
