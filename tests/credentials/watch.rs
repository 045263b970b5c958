//! `whoami --watch` while the places change in which it has found a credential.

use std::{fs, process::Stdio, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout},
    time::timeout,
};

use crate::example::example;

/// A change shows within this time.
const SHOWS: Duration = Duration::from_secs(12);

struct Watching {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watching {
    fn start(home: &std::path::Path, seconds: &str) -> Self {
        let mut command = example("whoami");
        command.env_clear().env("HOME", home).args(["--watch", seconds]).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    async fn line(&mut self) -> Option<Value> {
        let line = timeout(SHOWS, self.lines.next_line()).await.expect("the change did not show in time");
        line.unwrap().map(|line| serde_json::from_str(&line).unwrap())
    }

    async fn ends_well(mut self) {
        assert_eq!(self.line().await, None);
        assert!(self.process.wait().await.unwrap().success());
    }
}

fn config(profile: &str) -> String {
    format!("[__internal__]\nprofile = \"{profile}\"\n[work]\nkey = \"work:hush\"\n[home]\nkey = \"home:hush\"\n")
}

/// A login's token that is good until 2100. Nobody checks its signature.
fn token() -> String {
    format!("e30.{}.hush", URL_SAFE_NO_PAD.encode(r#"{"exp":4102444800}"#))
}

#[tokio::test]
async fn another_profile_shows_in_12_s_and_ctrl_c_ends_it() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join(".fal")).unwrap();
    fs::write(home.path().join(".fal/auth0_token"), format!("hush\n{}", token())).unwrap();
    let path = home.path().join(".fal/config.toml");
    fs::write(&path, config("work")).unwrap();
    let mut watching = Watching::start(home.path(), "3600");
    assert_eq!(watching.line().await.unwrap()["key_id"], "work");
    fs::write(&path, config("home")).unwrap();
    assert_eq!(watching.line().await.unwrap()["key_id"], "home");

    // As `fal auth login` leaves it.
    fs::write(&path, config("").replace("profile = \"\"\n", "")).unwrap();
    let login = watching.line().await.unwrap();
    assert_eq!((&login["scheme"], &login["expires_at"]), (&"Bearer".into(), &4_102_444_800_u64.into()));

    let id = rustix::process::Pid::from_raw(watching.process.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    watching.ends_well().await;
}

#[tokio::test]
async fn it_ends_after_the_time_that_it_is_given() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join(".fal")).unwrap();
    fs::write(home.path().join(".fal/config.toml"), config("work")).unwrap();
    let mut watching = Watching::start(home.path(), "0");
    assert_eq!(watching.line().await.unwrap()["key_id"], "work");
    watching.ends_well().await;
}
