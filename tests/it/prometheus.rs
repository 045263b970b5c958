//! The queries of the documentation, asked of a real Prometheus.
//!
//! Five processes have the same key. Then three of them rotate, one does not, and one is down. Without Debian's
//! package `prometheus`, or the same program from elsewhere in the `PATH`, this test cannot run.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Read as _},
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{self, Stdio},
    time::Duration,
};

use axum::{Router, routing::get};
use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tower::{Layer as _, ServiceExt as _};
use tower_fal::{CredentialStore, mock::MockFal, origin::FalOrigins, source::FileSource};

use crate::support::{key, key_text};

/// How long the test waits for what must happen, by the clock on the wall. Prometheus scrapes each second.
const PATIENCE: Duration = Duration::from_secs(120);

/// Set in the five processes, which run the same test: the file of the key, the address, and a URL of fal.
const KEY_FILE: &str = "TOWER_FAL_PROMETHEUS_TEST_KEY_FILE";
const LISTEN: &str = "TOWER_FAL_PROMETHEUS_TEST_LISTEN";
const FAL_URL: &str = "TOWER_FAL_PROMETHEUS_TEST_FAL_URL";

const ROTATES: [&str; 3] = ["rotates 1", "rotates 2", "rotates 3"];
const STAYS: &str = "stays";
const IS_DOWN: &str = "is down";
const ALL: [&str; 5] = [ROTATES[0], ROTATES[1], ROTATES[2], STAYS, IS_DOWN];

#[tokio::test]
#[ignore = "needs Prometheus"]
async fn the_queries_name_each_process_that_needs_the_old_key() {
    if env::var_os(KEY_FILE).is_some() {
        return one_of_the_five().await;
    }
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    fal.accept(&key(2));
    let mut fleet = Fleet::start(&fal).await;
    let prometheus = Prometheus::start(&fleet).await;
    // A further query of the documentation gets a further column.
    prometheus.assert_answers([&ALL, &ALL]).await;

    fleet.stop(IS_DOWN).await;
    ROTATES.iter().for_each(|name| fleet.give(name, 2));
    prometheus.assert_answers([&[STAYS], &[STAYS, IS_DOWN]]).await;

    // Back to the old key: what was said of the new one is still there, and 0.
    fleet.give(ROTATES[0], 1);
    prometheus.assert_answers([&[ROTATES[0], STAYS], &[ROTATES[0], STAYS, IS_DOWN]]).await;

    ALL.iter().for_each(|name| fleet.give(name, 2));
    fleet.start_again(IS_DOWN, &fal).await;
    prometheus.assert_answers([&[], &[]]).await;
}

/// The queries as they stand in the documentation, one a line, for the keys of this test.
fn queries() -> Vec<String> {
    let documentation = include_str!("../../docs/rotation.md");
    let (_, queries) = documentation.split_once("```promql\n").unwrap();
    let (queries, _) = queries.split_once("```").unwrap();
    let id = |n| key(n).key_id().unwrap().to_string();
    queries.lines().map(|query| query.replace("OLD", &id(1)).replace("NEW", &id(2))).collect()
}

struct Fleet {
    keys: TempDir,
    processes: Vec<Process>,
}

struct Process {
    name: &'static str,
    child: Child,
    /// As Prometheus names the instance.
    address: String,
}

impl Fleet {
    async fn start(fal: &MockFal) -> Self {
        let mut fleet = Self { keys: tempfile::tempdir().unwrap(), processes: Vec::new() };
        for name in ALL {
            fleet.give(name, 1);
            fleet.processes.push(Process::start(name, "127.0.0.1:0", fleet.keys.path(), fal).await);
        }
        fleet
    }

    /// Puts key `n` into the file of a process.
    fn give(&self, name: &str, n: u64) {
        let new = self.keys.path().join("new");
        fs::write(&new, key_text(n)).unwrap();
        fs::rename(new, self.keys.path().join(name)).unwrap();
    }

    async fn stop(&mut self, name: &str) {
        self.process(name).child.kill().await.unwrap();
    }

    async fn start_again(&mut self, name: &str, fal: &MockFal) {
        let keys = self.keys.path().to_owned();
        let process = self.process(name);
        *process = Process::start(process.name, &process.address.clone(), &keys, fal).await;
    }

    fn process(&mut self, name: &str) -> &mut Process {
        self.processes.iter_mut().find(|process| process.name == name).unwrap()
    }
}

impl Process {
    /// Returns once it listens.
    async fn start(name: &'static str, listen: &str, keys: &Path, fal: &MockFal) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "--ignored", "--nocapture"]);
        command.arg("prometheus::the_queries_name_each_process_that_needs_the_old_key");
        command.env(KEY_FILE, keys.join(name)).env(LISTEN, listen);
        command.env(FAL_URL, fal.run_url("/fal-ai/flux/dev").to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while let Some(line) = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap() {
            if let Some((_, address)) = line.split_once("listening on ") {
                return Self { name, child, address: address.to_owned() };
            }
        }
        panic!("{name} has ended");
    }
}

/// Has a key from a file, and sends a request to fal whenever it is asked for its metrics.
#[expect(clippy::print_stdout, reason = "a process of its own, which the test reads")]
async fn one_of_the_five() {
    let metrics = PrometheusBuilder::new().install_recorder().unwrap();
    let source = FileSource::new(env::var_os(KEY_FILE).unwrap()).poll_every(Duration::from_millis(100));
    let store = CredentialStore::builder(source).build().await.unwrap();
    let fal = tower_fal::layer(&store)
        .auth(|auth| auth.origins(FalOrigins::new().loopback_http()))
        .layer(Client::builder(TokioExecutor::new()).build_http());
    let url: Uri = env::var(FAL_URL).unwrap().parse().unwrap();
    let scrape = async move || {
        let request = Request::post(url).body(Full::<Bytes>::from("{}")).unwrap();
        let answer = fal.oneshot(request).await.unwrap();
        assert!(answer.status().is_success());
        answer.into_body().collect().await.unwrap();
        metrics.render()
    };
    let listener = tokio::net::TcpListener::bind(env::var(LISTEN).unwrap()).await.unwrap();
    println!("listening on {}", listener.local_addr().unwrap());
    // Its standard input ends with the test, however that ends.
    std::thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        process::exit(0);
    });
    axum::serve(listener, Router::new().route("/metrics", get(scrape))).await.unwrap();
}

struct Prometheus {
    _process: Child,
    _data: TempDir,
    url: String,
    /// What it scrapes: the address and the name.
    targets: Vec<(String, &'static str)>,
}

impl Prometheus {
    /// Returns once it takes queries.
    async fn start(fleet: &Fleet) -> Self {
        let targets: Vec<_> = fleet.processes.iter().map(|process| (process.address.clone(), process.name)).collect();
        let data = tempfile::tempdir().unwrap();
        let addresses: Vec<_> = targets.iter().map(|(address, _)| address).collect();
        let configuration = serde_json::json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s" },
            "scrape_configs": [{ "job_name": "my-server", "static_configs": [{ "targets": addresses }] }],
        });
        // JSON is YAML.
        let file = data.path().join("prometheus.yml");
        fs::write(&file, configuration.to_string()).unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", data.path().join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}")).arg("--log.level=error");
        let process = command.kill_on_drop(true).spawn().expect("Debian has it in the package `prometheus`");
        let prometheus = Self { _process: process, _data: data, url: format!("http://127.0.0.1:{port}"), targets };
        let begin = Instant::now();
        while get_text(&format!("{}/-/ready", prometheus.url)).await.is_none() {
            assert!(begin.elapsed() < PATIENCE, "Prometheus does not answer");
            sleep(Duration::from_millis(100)).await;
        }
        prometheus
    }

    /// Asks the queries of the documentation until each names these processes, and no others.
    async fn assert_answers<const QUERIES: usize>(&self, wanted: [&[&str]; QUERIES]) {
        let queries = queries();
        assert_eq!(queries.len(), QUERIES, "the documentation has another number of queries: {queries:#?}");
        let wanted = wanted.map(|names| names.iter().copied().collect::<BTreeSet<_>>());
        let begin = Instant::now();
        loop {
            let mut answers = Vec::new();
            for query in &queries {
                answers.push(self.ask(query).await);
            }
            if answers == wanted {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "{answers:#?}, and not {wanted:#?}");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// The processes in the answer.
    async fn ask(&self, query: &str) -> BTreeSet<&'static str> {
        let url = reqwest::Url::parse_with_params(&format!("{}/api/v1/query", self.url), [("query", query)]).unwrap();
        let answer = get_text(url.as_str()).await.unwrap_or_else(|| panic!("Prometheus refuses `{query}`"));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let series = answer["data"]["result"].as_array().unwrap();
        let name = |series: &Value| {
            let instance = series["metric"]["instance"].as_str().unwrap();
            self.targets.iter().find(|(address, _)| address == instance).unwrap().1
        };
        series.iter().map(name).collect()
    }
}

/// The body of a successful answer.
async fn get_text(url: &str) -> Option<String> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let answer = client.get(url.parse().unwrap()).await.ok().filter(|answer| answer.status().is_success())?;
    let body = answer.into_body().collect().await.ok()?.to_bytes();
    Some(String::from_utf8(body.into()).unwrap())
}
