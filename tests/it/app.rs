//! The `axum_*` examples as processes: started, called, told to end.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use axum::Router;
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, Error, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Command},
    task::JoinHandle,
    time::timeout,
};
use tower_fal::mock::MockFal;

use crate::support::{example, key, key_text};

/// How long a test waits for what must happen, by the clock on the wall.
const PATIENCE: Duration = Duration::from_secs(30);

/// One of the examples, which ends with this.
pub(crate) struct App {
    child: Child,
    /// Kept, or it would write into a closed pipe.
    _stdout: BufReader<ChildStdout>,
    log: JoinHandle<String>,
    /// Such as `http://127.0.0.1:3000`.
    pub(crate) url: String,
    /// The same of the admin listener.
    pub(crate) admin: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// How it ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) log: String,
}

/// An answer as a whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl App {
    /// Returns once it listens.
    pub(crate) async fn start(name: &'static str, arguments: &[&str]) -> Self {
        let mut command = app(name);
        command.args(arguments);
        Self::of(command).await
    }

    /// Returns once it listens, on free ports of this machine.
    pub(crate) async fn of(mut command: Command) -> Self {
        command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        Self::started(command).await
    }

    /// Returns once it listens where it was told.
    pub(crate) async fn started(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let log = tokio::spawn(async move {
            let mut log = String::new();
            stderr.read_to_string(&mut log).await.unwrap();
            log
        });
        let mut urls = Vec::new();
        for before in ["listening on ", "admin on "] {
            let mut line = String::new();
            stdout.read_line(&mut line).await.unwrap();
            let Some(url) = line.trim_end().strip_prefix(before) else {
                panic!("{line}{}", log.await.unwrap());
            };
            urls.push(url.to_owned());
        }
        let [url, admin] = urls.try_into().unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { child, _stdout: stdout, log, url, admin, client }
    }

    /// Against a fal in this process that takes key number 1, which it has from a file.
    pub(crate) async fn against(name: &'static str, fal: &MockFal, more: &[&str]) -> (Self, KeyFile) {
        fal.accept(&key(1));
        let file = KeyFile::new(&key_text(1));
        let (path, run, queue) = (file.path(), fal.run_origin(), fal.queue_origin());
        let mut arguments = vec!["--key-file", path.to_str().unwrap()];
        arguments.extend(["--fal-run-url", &run, "--fal-queue-url", &queue]);
        arguments.extend(more);
        (Self::start(name, &arguments).await, file)
    }

    pub(crate) async fn send(&self, request: Request<String>) -> Answer {
        Answer::of(self.open(request).await.unwrap()).await
    }

    /// The answer as soon as it begins.
    pub(crate) fn open(
        &self,
        request: Request<String>,
    ) -> impl Future<Output = Result<Response<Incoming>, Error>> + Send + use<> {
        let (mut head, body) = request.into_parts();
        head.uri = format!("{}{}", self.url, head.uri).parse().unwrap();
        self.client.request(Request::from_parts(head, Full::from(body)))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(String::new()).unwrap()).await
    }

    /// What the admin listener says.
    pub(crate) async fn admin(&self, path: &str) -> Answer {
        let request = Request::get(format!("{}{path}", self.admin)).body(Full::default()).unwrap();
        Answer::of(self.client.request(request).await.unwrap()).await
    }

    pub(crate) fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// What comes back for these bytes, until the connection is closed.
    pub(crate) async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("no answer").unwrap();
        answer
    }

    /// Whether a body of so many bytes is refused before it is sent. (A client that sends it meanwhile may see no
    /// answer, as the server does not read on.)
    pub(crate) async fn refuses_body_of(&self, bytes: usize, path: &str) -> bool {
        let head = "host: localhost\r\ncontent-type: application/json\r\nconnection: close";
        let request = format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {bytes}\r\n\r\n");
        self.raw(&request).await.starts_with("HTTP/1.1 413")
    }

    /// Sends a signal.
    pub(crate) async fn signal(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &kill]).status().await.unwrap().success());
    }

    /// Waits until the admin listener's `/readyz` says what is wanted, and returns it.
    pub(crate) async fn ready_where(&self, wanted: impl Fn(StatusCode, &Value) -> bool) -> Value {
        let reached = timeout(PATIENCE, async {
            loop {
                let answer = self.admin("/readyz").await;
                let report = answer.json();
                if wanted(answer.status, &report) {
                    return report;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        reached.await.expect("/readyz never came to that")
    }

    /// Waits until no more connections are accepted.
    pub(crate) async fn refuses_connections(&self) {
        let address = self.address();
        let refused = timeout(PATIENCE, async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        refused.await.expect("it goes on accepting");
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(mut self) -> Ended {
        let code = timeout(PATIENCE, self.child.wait()).await.expect("it does not end").unwrap().code();
        Ended { code, log: self.log.await.unwrap() }
    }

    /// Tells it to end without waiting for anybody.
    pub(crate) async fn end(self) -> Ended {
        self.signal("TERM").await;
        // Two signals that come at once are one.
        self.ready_where(|status, _| status == 503).await;
        self.signal("TERM").await;
        self.ended().await
    }
}

impl Ended {
    /// The log, if that is how it should end: with success, and with nothing in the log that is for nobody.
    pub(crate) fn well(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.log);
        assert!(!self.log.contains("secret") && !self.log.contains("hush"), "{}", self.log);
        self.log
    }
}

impl Answer {
    pub(crate) async fn of(response: Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Self { status: head.status, headers: head.headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{}", self.body))
    }

    /// The status and the reason of a problem, in which there is nothing else.
    pub(crate) fn problem(&self) -> (u16, String) {
        assert_eq!(self.headers["content-type"], "application/problem+json", "{}", self.body);
        let mut body = self.json();
        let reason = body["reason"].take();
        let status = self.status;
        let expected = serde_json::json!({
            "type": "about:blank", "title": status.canonical_reason(), "status": status.as_u16(), "reason": null,
        });
        assert_eq!(body, expected);
        (status.as_u16(), reason.as_str().unwrap().to_owned())
    }
}

/// The example without what this environment may have of keys.
pub(crate) fn app(name: &'static str) -> Command {
    let mut command = example(name);
    for variable in ["FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"] {
        command.env_remove(variable);
    }
    command
}

/// What it says if it does not even start: its exit code, standard output and standard error.
pub(crate) async fn gives_up(command: &mut Command) -> (Option<i32>, String, String) {
    let output = timeout(PATIENCE, command.output()).await.expect("it has started").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Raises the limit of open files of this process, as far as the system allows it.
pub(crate) fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// A server within the test, which ends with this.
pub(crate) struct Served {
    pub(crate) url: String,
    task: JoinHandle<std::io::Result<()>>,
}

impl Served {
    pub(crate) async fn new(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self { url, task: tokio::spawn(axum::serve(listener, router).into_future()) }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A file that is replaced as a whole.
pub(crate) struct KeyFile {
    directory: TempDir,
}

impl KeyFile {
    pub(crate) fn new(content: &str) -> Self {
        let file = Self { directory: tempfile::tempdir().unwrap() };
        file.replace(content);
        file
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("fal_key")
    }

    pub(crate) fn replace(&self, content: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, content).unwrap();
        fs::rename(new, self.path()).unwrap();
    }
}
