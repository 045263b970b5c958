//! `examples/login.rs` as a process.

use std::{
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};
use tower_fal::mock::{Endpoint, MockAuthorization};

use crate::{
    example::example,
    proxy::Proxy,
    support::{MINUTE, World, without_network},
};

/// A file in the home.
const ROOTS: &str = "roots.pem";

async fn world() -> World {
    let world = World { server: MockAuthorization::start().await.unwrap(), home: tempfile::tempdir().unwrap() };
    world.server.set_device_code(Duration::from_secs(1), MINUTE);
    world
}

fn login(world: &World, arguments: &[&str]) -> Command {
    let mut command = example("login");
    command.args(arguments).args(["--authority", &world.server.url(), "--rest", &world.server.url()]);
    of_home(&mut command, world.home.path());
    command
}

/// In this home, and with nothing of the network of whoever runs the tests: neither proxies nor root certificates.
fn of_home(command: &mut Command, home: &Path) {
    let root = rcgen::generate_simple_self_signed(["auth.fal.ai".to_owned()]).unwrap().cert.pem();
    std::fs::write(home.join(ROOTS), root).unwrap();
    without_network(command);
    command.env("SSL_CERT_FILE", home.join(ROOTS));
    command.env("FAL_HOME_DIR", home).env("FAL_CONFIG_PATH", home.join("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
}

/// The URL that it has printed.
async fn url(child: &mut Child) -> String {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if let Some(url) = line.trim().strip_prefix("http://") {
            return format!("http://{url}");
        }
    }
}

/// The one line on stderr of an example that has failed.
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(!said.contains('\u{1b}') && !said.contains("said-by-the-mock"), "{said}");
    said
}

fn done(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test]
async fn the_demonstration_plays_all_of_it() {
    let home = tempfile::tempdir().unwrap();
    let mut command = example("login");
    of_home(&mut command, home.path());
    let said = done(&command.arg("--demo").output().await.unwrap());
    for part in
        ["It has to show this code: ", "You are logged in.", "demo-team, which is user-id-of", "You are logged out."]
    {
        assert!(said.contains(part), "{said}");
    }
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [ROOTS], "the home of the user is left alone");
}

#[tokio::test]
async fn a_login_that_is_confirmed_in_a_browser_is_found_and_ended() {
    let world = world().await;
    world.server.add_team("Acme", "team-acme");
    let mut child = login(&world, &["--connection", "github", "--no-browser"]).spawn().unwrap();
    let browser = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let page = browser.get(url(&mut child).await.parse().unwrap()).await.unwrap();
    assert_eq!(page.status(), 200);
    done(&child.wait_with_output().await.unwrap());
    assert_eq!(world.tokens().len(), 1);

    world.choose("acme");
    let said = done(&login(&world, &["status"]).output().await.unwrap());
    assert!(said.contains("Account: acme, which is team-acme") && said.contains("59 min"), "{said}");
    assert_eq!(world.tokens().len(), 2);
    assert!(done(&login(&world, &["logout"]).output().await.unwrap()).contains("You are logged out."));
    assert!(!world.path().exists());
    assert!(failure(&login(&world, &["status"]).output().await.unwrap()).contains("nobody is logged in"));
}

#[tokio::test]
async fn a_login_that_is_not_allowed_is_one_line() {
    let world = world().await;
    let mut child = login(&world, &["login", "--no-browser"]).spawn().unwrap();
    url(&mut child).await;
    world.server.deny();
    let said = failure(&child.wait_with_output().await.unwrap());
    assert!(said.contains("was not allowed"), "{said}");
    assert!(!world.path().exists());
}

/// Ctrl-c.
#[cfg(unix)]
fn interrupt(child: &Child) {
    let id = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
}

#[cfg(unix)]
#[tokio::test]
async fn ctrl_c_ends_a_login_with_one_line() {
    let world = world().await;
    let mut child = login(&world, &["--no-browser"]).spawn().unwrap();
    url(&mut child).await;
    interrupt(&child);
    assert!(failure(&child.wait_with_output().await.unwrap()).starts_with("interrupted"));
    world.server.confirm();
    assert!(!world.path().exists());
    assert_eq!(world.server.refreshes(), 0);
}

#[tokio::test]
async fn options_that_do_nothing_are_refused() {
    let world = world().await;
    for arguments in [&["status", "--no-browser"][..], &["logout", "--connection", "github"]] {
        assert!(failure(&login(&world, arguments).output().await.unwrap()).contains("belong to login"));
    }
    for arguments in [&["register"][..], &["--connection", "a/b"], &["--demo"]] {
        assert_eq!(login(&world, arguments).output().await.unwrap().status.code(), Some(2));
    }
    assert_eq!(world.server.received(Endpoint::DeviceCode), 0);
}

#[cfg(unix)]
#[tokio::test]
async fn ctrl_c_of_whoami_loses_no_renewal() {
    let world = world().await;
    let proxy = Proxy::start(&world.server).await;
    world.write(world.server.log_in());
    world.server.set_latency(Duration::from_secs(1));
    let mut command = example("whoami");
    of_home(&mut command, world.home.path());
    command
        .env("FAL_FORCE_AUTH_BY_USER", "1")
        .env("HTTPS_PROXY", proxy.url())
        .env("SSL_CERT_FILE", proxy.roots(&world));
    let child = command.spawn().unwrap();
    while world.server.refreshes() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    interrupt(&child);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "{\"error\":\"interrupted\"}\n");
    assert_eq!(world.tokens().len(), 2);
}
