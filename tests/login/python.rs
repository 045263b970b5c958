//! fal's own Python packages, unchanged, with the same login: its lock, its files, its command line.
//!
//! `FAL_LOGIN_PYTHON` names a Python with `fal` 1.83.0, `fal_client` 1.0.3 and `portalocker` below 3, as `.ci/run` makes
//! one; without it, `python3` does.

use std::{
    env,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};
use tower_fal::mock::{Endpoint, MockAuthorization};

use crate::{
    example::example,
    proxy::Proxy,
    support::{EXPIRED, MINUTE, World, load, refused, token},
};

struct Python {
    world: World,
    proxy: Proxy,
}

/// A process that is being talked to.
struct Talk {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Python {
    async fn new() -> Self {
        let world = World { server: MockAuthorization::start().await.unwrap(), home: tempfile::tempdir().unwrap() };
        world.server.add_team("Acme", "team-acme");
        let proxy = Proxy::start(&world.server).await;
        Self { world, proxy }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("FAL_LOGIN_PYTHON").unwrap_or_else(|| "python3".into()));
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/login/fal_tools.py")).args(arguments);
        self.of_tools(&mut command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// A program with this home, and no network but the proxy.
    fn of_tools<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let home = self.world.home.path();
        command
            .env_clear()
            .env("HOME", home)
            .env("FAL_HOME_DIR", home)
            .env("FAL_CONFIG_PATH", home.join("config.toml"));
        command.env("HTTPS_PROXY", self.proxy.url()).env("SSL_CERT_FILE", self.proxy.roots(&self.world));
        command.env("PATH", env::var_os("PATH").unwrap()).env("FAL_DONT_OPEN_LINKS", "1")
    }

    fn talk(&self, arguments: &[&str]) -> Talk {
        let mut child = self.command(arguments).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Talk { child, lines }
    }

    /// Runs it with these lines on stdin, and returns what it prints.
    async fn run(&self, arguments: &[&str], stdin: &str) -> String {
        let mut child = self.command(arguments).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).await.unwrap();
        let output = child.wait_with_output().await.unwrap();
        let [said, told] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(output.status.success(), "{said}{told}");
        said
    }
}

impl Talk {
    async fn says(&mut self, expected: &str) {
        assert_eq!(self.lines.next_line().await.unwrap().as_deref(), Some(expected));
    }

    async fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").await.unwrap();
    }
}

#[ignore = "needs Python with portalocker"]
#[tokio::test]
async fn ours_waits_while_fals_tools_hold_their_lock() {
    let python = Python::new().await;
    python.world.write(python.world.server.log_in_with_access(EXPIRED));
    let mut holder = python.talk(&["hold"]);
    holder.says("held").await;
    let source = python.world.source();
    let loading = tokio::spawn(async move { load(&source).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!loading.is_finished() && python.world.server.received(Endpoint::Token) == 0);
    let began = Instant::now();
    holder.go_on().await;
    holder.says("released").await;
    assert!(python.world.server.accepts(&loading.await.unwrap()));
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(holder.child.wait().await.unwrap().success());
}

#[ignore = "needs Python with portalocker"]
#[tokio::test]
async fn fals_tools_wait_while_ours_is_held() {
    let python = Python::new().await;
    python.world.write(python.world.server.log_in_with_access(EXPIRED));
    python.world.server.set_latency(Duration::from_secs(3));
    let mut tools = python.talk(&["try"]);
    tools.says("ready").await;
    let source = python.world.source();
    let loading = tokio::spawn(async move { load(&source).await });
    while python.world.server.received(Endpoint::Token) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tools.go_on().await;
    tools.says("busy").await;
    loading.await.unwrap();
    tools.go_on().await;
    tools.says("free").await;
}

/// What `whoami --check` prints.
async fn whoami(python: &Python) -> Value {
    let output = python.of_tools(example("whoami").arg("--check")).output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"))
}

#[ignore = "needs Python with portalocker"]
#[tokio::test]
async fn a_login_by_fals_tools_is_found_with_its_account() {
    let python = Python::new().await;
    python.world.server.set_device_code(Duration::from_secs(1), MINUTE);
    python.world.server.confirm_after(0);
    // The account is asked for by its number: the personal one is the first.
    python.run(&["cli", "auth", "login", "--connection", "github", "--no-browser"], "2\n").await;
    let ours = whoami(&python).await;
    assert_eq!((&ours["account"], &ours["accepted"]), (&json!("team-acme"), &json!(true)), "{ours}");
    let theirs = python.run(&["resolve"], "").await;
    assert_eq!(theirs.trim_end(), format!("found Bearer {} team-acme", python.world.tokens()[1]));
    assert_eq!(python.world.server.reuses(), 0);
}

#[ignore = "needs Python with portalocker"]
#[tokio::test]
async fn a_login_by_ours_is_found_by_fals_tools() {
    let python = Python::new().await;
    let world = &python.world;
    world.server.set_device_code(Duration::from_secs(1), MINUTE);
    world.server.confirm_after(0);
    let output = python.of_tools(example("login").arg("--no-browser")).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(world.tokens().len(), 1);
    world.choose("Acme");
    let theirs = python.run(&["resolve"], "").await;
    assert_eq!(theirs.trim_end(), format!("found Bearer {} team-acme", world.tokens()[1]));
    // What they have renewed is found by ours, and what ours has renewed by both of theirs.
    let ours = load(&world.source()).await;
    assert_eq!(token(&ours), world.tokens()[1]);
    world.server.refuse(&ours);
    let renewed = refused(&world.source(), &ours).await.unwrap();
    for command in ["resolve", "client"] {
        let theirs = python.run(&[command], "").await;
        assert!(theirs.starts_with(&format!("found Bearer {}", token(&renewed))), "{command}");
    }
    assert_eq!((world.server.refreshes(), world.server.reuses()), (2, 0));
}
