//! `examples/proxy` as a process: what it needs, what it survives, and how it ends.

use std::{
    env, fs,
    path::PathBuf,
    process::Stdio,
    sync::{LazyLock, Mutex},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    task::JoinHandle,
};
use tower_fal::{Credential, mock::Presented};

use crate::{
    service::{Mock, read_until},
    support::{Answer, KEY, PATIENCE, Raw, SECRET, Server},
};

const RUN: &str = "https://fal.run/fal-ai/flux/dev";

/// Cargo builds it first, once for these tests, with their profile and in their target directory.
fn command() -> Command {
    static BUILT: LazyLock<Mutex<Option<PathBuf>>> = LazyLock::new(Mutex::default);
    let mut command = Command::new(BUILT.lock().unwrap().get_or_insert_with(build));
    command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in ["FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"] {
        command.env_remove(name);
    }
    command
}

fn build() -> PathBuf {
    let tests = env::current_exe().unwrap();
    let directory = tests.ancestors().nth(2).unwrap();
    let profile = directory.file_name().unwrap().to_str().unwrap();
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo
        .args(["build", "--frozen", "--message-format=json", "--example", "proxy"])
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
    let mut executables = artifacts.filter(|artifact| artifact["target"]["name"] == "proxy");
    executables.find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from)).unwrap()
}

/// How it ends when it does not start: its code, and what it says.
async fn refuses(arguments: &[&str]) -> (i32, String) {
    let output = tokio::time::timeout(PATIENCE, command().args(arguments).output()).await.unwrap().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// The program, against a fal in this process that takes the key of its file.
struct Program {
    mock: Mock,
    server: Server,
    admin: Server,
    child: Child,
    log: JoinHandle<String>,
    /// Kept, or it would write into a closed pipe.
    _stdout: BufReader<ChildStdout>,
    directory: TempDir,
}

impl Program {
    async fn start(arguments: &[&str]) -> Self {
        let (mock, directory) = (Mock::new().await, tempfile::tempdir().unwrap());
        let key_file = directory.path().join("key");
        fs::write(&key_file, KEY).unwrap();
        let mut command = command();
        command
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--drain-delay", "0"])
            .args(["--connect-to-http", &mock.address.to_string()])
            .arg("--key-file")
            .arg(&key_file)
            .args(arguments);
        let mut child = command.spawn().unwrap();
        let (mut stdout, mut stderr) = (BufReader::new(child.stdout.take().unwrap()), child.stderr.take().unwrap());
        let log = tokio::spawn(async move {
            let mut log = String::new();
            stderr.read_to_string(&mut log).await.unwrap();
            log
        });
        let mut servers = Vec::new();
        for before in ["listening on http://", "admin on http://"] {
            let mut line = String::new();
            stdout.read_line(&mut line).await.unwrap();
            let Some(address) = line.trim_end().strip_prefix(before) else { panic!("{line}{}", log.await.unwrap()) };
            servers.push(Server::at(address.parse().unwrap()));
        }
        let [server, admin] = servers.try_into().ok().unwrap();
        Self { mock, server, admin, child, log, _stdout: stdout, directory }
    }

    fn key_file(&self) -> PathBuf {
        self.directory.path().join("key")
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(process, signal).unwrap();
    }

    async fn get(&self, path: &str) -> Answer {
        self.admin.send(Raw { path, target: None, content_type: None, ..Raw::get("") }).await
    }

    /// Waits until it has a key of this id.
    async fn has_key(&self, id: &str) {
        let loaded = async {
            while serde_json::from_str::<Value>(&self.get("/readyz").await.body).unwrap()["key_id"] != *id {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, loaded).await.expect("it does not load the key");
    }

    /// Ends it by SIGTERM. Its log holds no secret.
    async fn end(mut self) -> String {
        self.signal(rustix::process::Signal::TERM);
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("it does not end").unwrap();
        assert_eq!(ended.code(), Some(0));
        let log = self.log.await.unwrap();
        assert!(!log.contains(SECRET), "{log}");
        log
    }
}

#[tokio::test]
async fn it_refuses_to_start_without_saying_who_may_call() {
    let (code, said) = refuses(&[]).await;
    assert_eq!(code, 2);
    assert!(said.contains("--auth-token-file") && said.contains("--allow-anonymous"), "{said}");
    assert_eq!(refuses(&["--allow-anonymous", "--auth-token-file", "x"]).await.0, 2);
}

#[tokio::test]
async fn it_refuses_to_start_without_a_credential() {
    let (code, said) = refuses(&["--allow-anonymous", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("FAL_KEY") && said.contains("--key-file"), "{said}");
    let (code, said) = refuses(&["--allow-anonymous", "--listen", "127.0.0.1:0", "--key-file", "/nowhere/key"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("/nowhere/key"), "{said}");
}

#[tokio::test]
async fn it_refuses_options_that_cannot_be_right() {
    for (option, value, names) in [
        ("--allow-target", "evil.com/**", "may not carry the credential"),
        ("--allow-target", "rest.fal.ai/tokens/", "allow_realtime"),
        ("--allow-endpoint", "/fal-ai/flux", "empty segment"),
        ("--allow-endpoint", "flux", "write owner/app"),
        ("--allow-endpoint", "fal-ai/flux, fal-ai/other", "has a character"),
        ("--allow-webhook", "https://app.example", "the host cannot be one"),
        ("--allow-realtime", "flux", "owner"),
        ("--allow-host", "https://app.example", "the host cannot be one"),
        ("--path", "fal", "the path cannot be"),
        ("--path", "/a b", "the path cannot be"),
        ("--path", "/a?b", "the path cannot be"),
        ("--path", "/a#b", "the path cannot be"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let key_file = directory.path().join("key");
        fs::write(&key_file, KEY).unwrap();
        let key_file = key_file.to_str().unwrap();
        let arguments = ["--allow-anonymous", "--listen", "127.0.0.1:0", "--key-file", key_file, option, value];
        let (code, said) = refuses(&arguments).await;
        assert!(code == 1 && said.contains(names), "{option} {value}: {code} {said}");
        assert!(!said.contains(SECRET));
    }
}

#[tokio::test]
async fn each_option_has_an_environment_variable() {
    let output = command().arg("--help").output().await.unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let options: Vec<_> = help.lines().filter_map(|line| line.trim_start().strip_prefix("--")).collect();
    assert!(options.len() > 25, "{help}");
    for option in options {
        let name = option.split([' ', '=']).next().unwrap().replace('-', "_").to_ascii_uppercase();
        assert!(help.contains(&format!("[env: FAL_PROXY_{name}=")), "{name}");
    }
    let mut program = command();
    let program = program.env("FAL_PROXY_ALLOW_ANONYMOUS", "true").env("FAL_PROXY_LISTEN", "no address");
    let output = program.output().await.unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("--listen"));
}

#[tokio::test]
async fn options_that_would_do_nothing_are_refused() {
    for (arguments, names) in [
        (
            &["--allow-origin", "https://app.example/"][..],
            "--allow-origin <ORIGIN> cannot be used: it must be like https",
        ),
        (&["--allow-origin", "https://App.example"], "--allow-origin"),
        (&["--allow-origin", "app.example"], "--allow-origin"),
        (&["--allow-origin", ""], "--allow-origin"),
        (&["--http2", "--connect-to-http", "127.0.0.1:1"], "--http2 cannot be used together with --connect-to-http"),
        (&["--http2", "--demo"], "--http2 cannot be used together with --demo"),
        (&["--first-byte-timeout", "-1"], "--first-byte-timeout <SECONDS> cannot be used: it must be a number"),
        (&["--admin", "3001"], "--admin <ADDR> cannot be used: it must be like 127.0.0.1:3001, or `off`"),
    ] {
        let (code, said) = refuses(&[&["--allow-anonymous"][..], arguments].concat()).await;
        assert!(code == 2 && said.contains(names), "{arguments:?}: {code} {said}");
    }
}

#[tokio::test]
async fn a_variable_that_says_off_or_nothing_is_not_set() {
    let directory = tempfile::tempdir().unwrap();
    let (key_file, tokens) = (directory.path().join("key"), directory.path().join("tokens"));
    fs::write(&key_file, KEY).unwrap();
    fs::write(&tokens, "token-of-acme").unwrap();
    let mut program = command();
    program.args(["--listen", "127.0.0.1:0", "--admin", "off"]).env("FAL_PROXY_KEY_FILE", &key_file);
    for (name, value) in [
        ("FAL_PROXY_DEMO", "False"),
        ("FAL_PROXY_ALLOW_ANONYMOUS", "0"),
        ("FAL_PROXY_LOG_REQUESTS", "1"),
        ("FAL_PROXY_ALLOW_ENDPOINT", ""),
        ("FAL_PROXY_ALLOW_ORIGIN", ""),
        ("FAL_PROXY_MAX_IN_FLIGHT", ""),
        ("FAL_PROXY_CA_FILE", ""),
    ] {
        program.env(name, value);
    }
    let mut child = program.env("FAL_PROXY_AUTH_TOKEN_FILE", &tokens).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
    let mut log = String::new();
    let Some(address) = line.trim_end().strip_prefix("listening on http://") else {
        child.stderr.take().unwrap().read_to_string(&mut log).await.unwrap();
        panic!("{line}{log}");
    };
    let answer = Server::at(address.parse().unwrap()).send(Raw::post(RUN)).await;
    assert_eq!(answer.status, 401, "{answer:?}");
    child.start_kill().unwrap();
    child.stderr.take().unwrap().read_to_string(&mut log).await.unwrap();
    assert!(log.contains("fal.run/fal-ai/flux/dev"), "{log}");

    let (mut unclear, said) = (command(), "--allow-anonymous cannot be used");
    let output = unclear.env("FAL_PROXY_ALLOW_ANONYMOUS", "perhaps").output().await.unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains(said));
}

#[tokio::test]
async fn those_who_run_it_have_a_listener_on_loopback() {
    // Either this test has the port, or somebody else has it.
    let _taken = std::net::TcpListener::bind("127.0.0.1:3001");
    let (code, said) = refuses(&["--demo", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(code, 1);
    assert!(
        said.contains("cannot listen on 127.0.0.1:3001") && said.contains("another address with --admin"),
        "{said}"
    );
}

#[tokio::test]
async fn a_star_is_any_host() {
    let any = ["--allow-anonymous", "--allow-host", "*", "--allow-webhook", "*", "--allow-origin", "*"];
    let program = Program::start(&any).await;
    let webhook = "https://queue.fal.run/fal-ai/flux/dev?fal_webhook=https://app.example/hook";
    let answer =
        program.server.send(Raw { host: "app.example", ..Raw::post(webhook) }.line("origin: https://b.c")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some("*")), "{answer:?}");
    program.end().await;

    let program = Program::start(&["--allow-anonymous"]).await;
    let foreign = Raw { host: "app.example", ..Raw::post(RUN) };
    assert_eq!(program.server.send(foreign).await.status, 400);
    assert_eq!(program.server.send(Raw::post(webhook)).await.status, 403);
    program.end().await;
}

/// The line that `--demo` prints can be given to a shell as it is, but for what it says about the browser.
#[tokio::test]
async fn the_line_to_try_is_right_for_each_option() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = directory.path().join("tokens");
    fs::write(&tokens, "TOKEN").unwrap();
    let tokens = tokens.to_str().unwrap();
    for arguments in [
        &[][..],
        &["--path", "/fal/"],
        &["--path", "/"],
        &["--allow-endpoint", "acme/cats*/*"],
        &["--allow-endpoint", "acme/**", "--allow-endpoint", "fal-ai/**"],
        &["--auth-token-file", tokens],
        &["--listen", "0.0.0.0:0"],
    ] {
        let mut command = command();
        command.args(["--demo", "--admin", "off"]).args(arguments);
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let listening = stdout.next_line().await.unwrap().unwrap();
        let line = stdout.next_line().await.unwrap().unwrap();
        assert!(listening.starts_with("listening on http://"), "{listening}");
        let curl = line.strip_prefix("try: curl ").unwrap().split(", or open").next().unwrap();
        let words: Vec<_> = curl
            .split('\'')
            .enumerate()
            .flat_map(|(place, part)| if place % 2 == 1 { vec![part] } else { part.split_whitespace().collect() })
            .collect();
        let (url, flags) = words.split_last().unwrap();
        let url: http::Uri = url.parse().unwrap();
        assert_eq!((url.host(), flags[0]), (Some("127.0.0.1"), "-d"), "{line}");
        let header = |name: &str| flags.iter().find_map(|flag| flag.strip_prefix(name));
        let raw = Raw { path: url.path(), body: flags[1], ..Raw::post(header("x-fal-target-url:").unwrap()) };
        let raw = match header("authorization: ") {
            Some(token) => raw.line(&format!("authorization: {token}")),
            None => raw,
        };
        let server = Server::at(url.authority().unwrap().as_str().parse().unwrap());
        let answer = server.send(raw).await;
        assert_eq!(answer.status, 200, "{line} {answer:?}");
        child.kill().await.unwrap();
    }
}

#[tokio::test]
async fn it_follows_its_key_file_and_outlives_it() {
    let program = Program::start(&["--allow-anonymous"]).await;
    assert_eq!(program.server.send(Raw::post(RUN)).await.status, 200);
    program.mock.fal.accept(&Credential::key("id-2:secret-of-id-2").unwrap());
    fs::write(program.key_file(), "id-2:secret-of-id-2").unwrap();
    program.has_key("id-2").await;
    assert_eq!(program.server.send(Raw::post(RUN)).await.status, 200);
    let second = program.mock.fal.received().last().unwrap().presented.clone();
    assert!(matches!(&second, Presented::Accepted(Some(id)) if id.as_str() == "id-2"), "{second:?}");

    fs::remove_file(program.key_file()).unwrap();
    program.signal(rustix::process::Signal::HUP);
    let failed = async { while !program.get("/readyz").await.body.contains("last_error\":\"") {} };
    tokio::time::timeout(PATIENCE, failed).await.expect("it does not notice");
    assert_eq!(program.server.send(Raw::post(RUN)).await.status, 200, "the last good key goes on");
    program.end().await;
}

#[tokio::test]
async fn callers_have_tokens_that_are_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    fs::write(&file, "# who may call\nacme token-of-acme\n").unwrap();
    let program = Program::start(&["--auth-token-file", file.to_str().unwrap(), "--max-in-flight", "1"]).await;
    let send = |line: &'static str| program.server.send(Raw { host: "app.example", ..Raw::post(RUN) }.line(line));
    assert_eq!(send("authorization: Bearer token-of-acme").await.status, 200);
    assert_eq!(send("authorization: Key token-of-acme").await.status, 200);
    assert_eq!(send("authorization: Bearer token-of-zeta").await.status, 401);
    assert_eq!(send("x-nothing: here").await.status, 401);
    fs::write(&file, "zeta token-of-zeta\n").unwrap();
    let read = async { while send("authorization: Bearer token-of-zeta").await.status != 200 {} };
    tokio::time::timeout(PATIENCE, read).await.expect("it does not read the file again");
    assert_eq!(send("authorization: Bearer token-of-acme").await.status, 401);
    let log = program.end().await;
    assert!(!log.contains("token-of"), "{log}");
}

#[tokio::test]
async fn probes_and_metrics_are_beside_the_proxy() {
    let program = Program::start(&["--allow-anonymous", "--log-requests"]).await;
    let probe = |path| program.server.send(Raw { path, target: None, content_type: None, ..Raw::get("") });
    assert_eq!((probe("/healthz").await.status, probe("/readyz").await.status), (200, 200));
    assert_eq!(
        (probe("/").await.status, probe("/metrics").await.status, probe("/demo/status").await.status),
        (404, 404, 404)
    );
    let run = program.server.send(Raw::post("https://fal.run/fal-ai/flux/dev?hush=secret-of-id")).await;
    assert_eq!(run.status, 200);
    assert_eq!(program.server.send(Raw { host: "app.example", ..Raw::post(RUN) }).await.status, 400);
    let metrics = program.get("/metrics").await.body;
    assert!(metrics.contains("server_requests_total{status=\"200\"} 1"), "{metrics}");
    let log = program.end().await;
    assert!(log.contains("fal.run/fal-ai/flux/dev") && !log.contains("hush"), "{log}");
}

#[tokio::test]
async fn pages_of_other_origins_may_call_if_they_are_named() {
    let program = Program::start(&["--allow-anonymous", "--allow-origin", "https://app.example"]).await;
    let preflight = Raw { method: "OPTIONS", target: None, content_type: None, body: "", ..Raw::post("") }
        .line("origin: https://app.example")
        .line("access-control-request-method: POST")
        .line("access-control-request-headers: x-fal-target-url,content-type");
    let answer = program.server.send(preflight).await;
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"), "{answer:?}");
    assert_eq!(answer.header("access-control-allow-headers"), Some("x-fal-target-url,content-type"));
    let answer = program.server.send(Raw::post(RUN).line("origin: https://app.example")).await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("access-control-expose-headers").unwrap().contains("x-fal-request-id"));
    assert_eq!(program.mock.fal.received().len(), 1, "a preflight is not forwarded");
    let other = program.server.send(Raw::post(RUN).line("origin: https://evil.example")).await;
    assert_eq!(other.header("access-control-allow-origin"), None);
    program.end().await;
}

#[tokio::test]
async fn open_streams_end_before_the_process_does() {
    let program = Program::start(&["--allow-anonymous"]).await;
    program.mock.fal.hold_events_after(1);
    let mut streams = Vec::new();
    for _ in 0..100 {
        let mut stream = program.server.connect().await;
        stream.write_all(&Raw::post(&format!("{RUN}/stream")).bytes()).await.unwrap();
        streams.push(stream);
    }
    for stream in &mut streams {
        read_until(stream, "\"event\":0").await;
    }
    program.signal(rustix::process::Signal::TERM);
    // It accepts nobody any more, and goes on with those that are open.
    let closed = async { while tokio::net::TcpStream::connect(program.server.address).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, closed).await.expect("it still accepts");
    program.mock.fal.hold_events_after(usize::MAX);
    for stream in &mut streams {
        read_until(stream, "\"event\":2").await;
    }
    let mut program = program;
    let ended = tokio::time::timeout(PATIENCE, program.child.wait()).await.expect("it does not end").unwrap();
    assert_eq!(ended.code(), Some(0));
    assert!(!program.log.await.unwrap().contains(SECRET));
}

/// The limit of open files of this process, which is raised as far as the system allows it.
fn most_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    maximum.unwrap_or(u64::MAX)
}

#[tokio::test]
async fn a_thousand_slow_clients_do_not_keep_a_fast_one_waiting() {
    let program = Program::start(&["--allow-anonymous"]).await;
    let mut slow = Vec::new();
    // Where 1,024 files are all that there is, the program takes fewer connections, too.
    for number in 0..if most_files() >= 4096 { 1000 } else { 400 } {
        let mut stream = program.server.connect().await;
        let bytes = Raw { body: "", ..Raw::post(RUN) }.line("content-length: 100").bytes();
        // Half of them do not end their heads, the others their bodies.
        stream.write_all(if number % 2 == 0 { &bytes[..bytes.len() / 2] } else { &bytes }).await.unwrap();
        slow.push(stream);
    }
    let answer = tokio::time::timeout(PATIENCE, program.server.send(Raw::post(RUN))).await.unwrap();
    assert_eq!(answer.status, 200);
    drop(slow);
    program.end().await;
}

#[tokio::test]
async fn oversized_heads_are_refused() {
    let program = Program::start(&["--allow-anonymous"]).await;
    let head = Raw::post(RUN).line(&format!("x-long: {}", "x".repeat(64 * 1024)));
    let answer = program.server.send(head).await;
    assert_eq!(answer.status, 431);
    assert_eq!(program.server.send(Raw::post(RUN)).await.status, 200);
    program.end().await;
}

#[tokio::test]
async fn the_demo_has_a_page_and_a_key_that_rotates() {
    let mut command = command();
    let mut child = command.args(["--demo", "--listen", "127.0.0.1:0", "--admin", "off"]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    let server = Server::at(line.trim_end().strip_prefix("listening on http://").unwrap().parse().unwrap());
    let get = |path| server.send(Raw { path, target: None, content_type: None, ..Raw::get("") });
    let page = get("/").await;
    assert!(
        page.status == 200 && page.body.contains("<!doctype html>") && page.header("content-security-policy").is_none()
    );
    let status = async || serde_json::from_str::<Value>(&get("/demo/status").await.body).unwrap();
    assert_eq!(status().await["generation"], 1);
    let rotate = Raw { path: "/demo/rotate", target: None, ..Raw::post("") };
    assert_eq!(server.send(rotate).await.status, 200);
    assert_eq!(server.send(Raw::post(RUN)).await.status, 200, "a request that was refused is sent again");
    assert_eq!(
        (status().await["generation"].as_u64(), status().await["key_id"].as_str()),
        (Some(2), Some("demo-key-2"))
    );
    assert_eq!(get("/demo/client/..%2f..%2fetc/passwd").await.status, 404);
}
