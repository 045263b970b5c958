//! A page in Chromium with fal's own client in it.

use std::{process::Stdio, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ends with its browser.
pub(crate) struct Page {
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Page {
    /// Opens a page of this origin, whose client has the proxy there. fal's hosts lead to this address.
    pub(crate) async fn with_client(origin: &str, fal: &str) -> Self {
        let mut page = Self::open(&[origin, fal]).await;
        page.call("fal.config({ proxyUrl: '/api/fal/proxy' })").await;
        page
    }

    /// Opens the page that is at this origin.
    pub(crate) async fn at(origin: &str) -> Self {
        Self::open(&[origin]).await
    }

    async fn open(arguments: &[&str]) -> Self {
        let mut command = Command::new("node");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/page.mjs")).args(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("Node.js is needed: apt-get install nodejs npm");
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut page = Self { child, stdin, stdout: BufReader::new(stdout).lines() };
        assert_eq!(page.result().await, Ok(json!("ready")), "npm ci --prefix tests/e2e; apt-get install chromium");
        page
    }

    /// Runs the body of an async function in the page. An error is what the client has thrown.
    pub(crate) async fn run(&mut self, body: &str) -> Result<Value, Value> {
        self.begin(body).await;
        self.result().await
    }

    /// The same for what must not fail.
    pub(crate) async fn call(&mut self, body: &str) -> Value {
        self.run(body).await.unwrap_or_else(|error| panic!("{body}: {error}"))
    }

    /// Begins to run it. [`result`](Self::result) waits for its end.
    pub(crate) async fn begin(&mut self, body: &str) {
        self.stdin.write_all(format!("{}\n", json!(body)).as_bytes()).await.unwrap();
    }

    pub(crate) async fn result(&mut self) -> Result<Value, Value> {
        let line = tokio::time::timeout(PATIENCE, self.stdout.next_line()).await.expect("the page does not answer");
        let line = line.unwrap().expect("the page has ended");
        let mut result: Value = serde_json::from_str(&line).unwrap();
        match result.get_mut("error") {
            Some(error) => Err(error.take()),
            None => Ok(result["ok"].take()),
        }
    }

    /// Closes the browser, which leaves nothing behind.
    pub(crate) async fn close(mut self) {
        drop(self.stdin);
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("the browser does not end");
        assert!(ended.unwrap().success());
    }
}
