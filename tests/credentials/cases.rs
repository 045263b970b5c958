//! Which credential an environment resolves to, as `tests/cases/credentials/NAME/` says. A new case needs no code:
//!
//! | file | holds |
//! |---|---|
//! | `env.json` | the variables of the process, and no others but `HOME` (see below) |
//! | `home/` | the files in the home directory, where the process runs; none if it is not there |
//! | `http.json` | what fal's hosts see, in order, and what they answer; nobody is called if it is not there |
//! | `expected.json` | `arguments` of `whoami`; the line that it prints, with `value` in place of `value_sha256`, or the parts of its `error` |
//! | `after/` | the files in the home directory that are different afterwards |
//!
//! `{home}` stands for the home directory and `{network}` for the address at which fal's hosts are; `null` takes a
//! variable away. Each secret has the word `hush` in it, which nothing that is printed may have.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Output,
};

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use crate::{
    example::example,
    network::{Exchange, Network},
};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases/credentials");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    #[serde(default)]
    arguments: Vec<String>,
    found: Option<BTreeMap<String, Value>>,
    error: Option<Vec<String>>,
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// One case at a time is picked by `CASE=name`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_resolves_as_it_says() {
    let only = env::var("CASE").ok();
    let mut names: Vec<_> = fs::read_dir(CASES).unwrap().map(|case| case.unwrap().path()).collect();
    names.sort();
    assert!(names.len() >= 60, "only {} cases", names.len());
    let mut running = JoinSet::new();
    let mut wrong = Vec::new();
    for case in names {
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        if running.len() >= 4 {
            wrong.extend(running.join_next().await.unwrap().unwrap());
        }
        running.spawn(async move { run(&case).await.err().map(|said| format!("{name}: {said}")) });
    }
    wrong.extend(running.join_all().await.into_iter().flatten());
    assert!(wrong.is_empty(), "{} cases are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Runs a case. The error says what is wrong, without a secret.
async fn run(case: &Path) -> Result<(), String> {
    let expected: Expected = read(&case.join("expected.json"))?.ok_or("has no expected.json")?;
    let variables: BTreeMap<String, Option<String>> = read(&case.join("env.json"))?.unwrap_or_default();
    let exchanges: Vec<Exchange> = read(&case.join("http.json"))?.unwrap_or_default();
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("home");
    fs::create_dir(&home).unwrap();
    let before = files(&case.join("home"));
    for (path, content) in &before {
        let path = home.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    let network = Network::start(exchanges).await;
    let roots = directory.path().join("roots.pem");
    fs::write(&roots, &network.certificate).unwrap();
    let address = network.address.to_string();
    let filled = |text: &str| text.replace("{home}", home.to_str().unwrap()).replace("{network}", &address);
    let mut command = example("whoami");
    command.env_clear().args(&expected.arguments).current_dir(&home);
    command.env("HOME", &home).env("HTTPS_PROXY", format!("http://{address}")).env("SSL_CERT_FILE", &roots);
    for (name, value) in &variables {
        match value {
            Some(value) => command.env(name, filled(value)),
            None => command.env_remove(name),
        };
    }
    let output = command.output().await.unwrap();

    let Output { status, stdout, stderr } = output;
    let text = |bytes| String::from_utf8(bytes).map_err(|_| "printed something else than text".to_owned());
    let (printed, told) = (text(stdout)?, text(stderr)?);
    if printed.contains("hush") || told.contains("hush") {
        return Err("a secret was printed".to_owned());
    }
    let printed = printed.replace(home.to_str().unwrap(), "{home}").replace(&address, "{network}");
    let surprises = network.surprises();
    if !surprises.is_empty() {
        return Err(format!("{}; printed {printed}", surprises.join(", ")));
    }
    if !told.is_empty() {
        return Err(format!("told {told}"));
    }
    let line = printed.strip_suffix('\n').filter(|line| !line.contains('\n'));
    let line = line.ok_or_else(|| format!("printed no single line: {printed}"))?;
    let printed: Value = serde_json::from_str(line).map_err(|error| format!("printed no JSON: {error}"))?;
    is_as_expected(expected, &printed, status.code())?;

    let mut after = before;
    after.extend(files(&case.join("after")));
    let left = files(&home).into_iter().filter(|(path, _)| !is_lock(path)).collect::<Files>();
    if left != after {
        let names = |files: &Files| files.keys().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        return Err(format!("left other files: {} in place of {}", names(&left), names(&after)));
    }
    Ok(())
}

fn is_as_expected(expected: Expected, printed: &Value, code: Option<i32>) -> Result<(), String> {
    match (expected.found, expected.error) {
        (Some(mut found), None) => {
            let Some(Value::String(value)) = found.remove("value") else {
                return Err("expects no `value`".to_owned());
            };
            if !value.contains("hush") {
                return Err("expects a `value` without the word `hush`".to_owned());
            }
            let digest: String = Sha256::digest(value).iter().map(|byte| format!("{byte:02x}")).collect();
            found.insert("value_sha256".to_owned(), digest.into());
            for name in ["key_id", "account", "expires_at"] {
                found.entry(name.to_owned()).or_insert(Value::Null);
            }
            if *printed != json!(found) || code != Some(0) {
                return Err(format!("printed {printed} and ended with {code:?}, expected {}", json!(found)));
            }
        }
        (None, Some(parts)) => {
            let error = printed["error"].as_str().filter(|_| printed.as_object().unwrap().len() == 1);
            let error = error.ok_or_else(|| format!("printed {printed} in place of an error"))?;
            let missing: Vec<_> = parts.iter().filter(|part| !error.contains(*part)).collect();
            if !missing.is_empty() || code != Some(1) {
                return Err(format!("said {error:?} and ended with {code:?}, and did not say {missing:?}"));
            }
        }
        _ => return Err("expects neither `found` nor `error`, or both".to_owned()),
    }
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, String> {
    match fs::read(path) {
        Ok(content) => {
            serde_json::from_slice(&content).map(Some).map_err(|error| format!("{}: {error}", path.display()))
        }
        Err(_) => Ok(None),
    }
}

/// All files below a directory, by their paths there.
fn files(directory: &Path) -> Files {
    let mut found = Files::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.insert(path.strip_prefix(directory).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Locks stay where they are: whoever removes one breaks it for those who wait for it.
fn is_lock(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == ".tower-fal.lock" || name == ".portalock")
}
