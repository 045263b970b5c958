//! The examples as processes.

use std::{
    collections::HashMap,
    env,
    path::PathBuf,
    process,
    sync::{LazyLock, Mutex},
};

use serde_json::Value;
use tokio::process::Command;

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
