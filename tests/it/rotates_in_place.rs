//! The table of docs/rotation.md of what rotates in place, row by row, as far as there is no Docker, no systemd and no cluster in
//! it. Mounts are real ones, in a namespace of their own: those tests run where the system lets them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::{NamedTempFile, TempDir};
use tower_fal::{
    CredentialStore,
    source::{CredentialSource, DotenvSource, EnvSource, FileSource},
    store::Reloaded,
};

use crate::support::{KubeletVolume, current, key_text, status_where};

async fn store(source: impl CredentialSource) -> CredentialStore {
    CredentialStore::builder(source).build().await.unwrap()
}

/// By itself, at one of the next polls.
async fn assert_rotates(store: &CredentialStore, n: u64) {
    let id = format!("id-{n}");
    status_where(store, |status| status.key_id.as_ref().is_some_and(|current| current.as_str() == id)).await;
}

/// Not in an hour, nor when asked to; and nothing looks wrong.
async fn assert_stays(store: &CredentialStore, n: u64) {
    tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    assert!(matches!(store.reload().await, Ok(Reloaded::Unchanged(_))));
    assert_eq!((current(store), store.status().consecutive_failures), (format!("id-{n}"), 0));
}

#[tokio::test(start_paused = true)]
async fn a_kubernetes_secret_volume_does() {
    let mut volume = KubeletVolume::new(key_text(1));
    let store = store(FileSource::new(volume.path())).await;
    for n in 2..=4 {
        volume.update(key_text(n));
        assert_rotates(&store, n).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_vault_agent_renders_does() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fal_key");
    let render = |n| {
        let new = NamedTempFile::new_in(directory.path()).unwrap();
        fs::write(&new, key_text(n)).unwrap();
        new.persist(&path).unwrap();
    };
    render(1);
    let store = store(FileSource::new(&path)).await;
    for n in 2..=4 {
        render(n);
        assert_rotates(&store, n).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_dotenv_file_does_rewritten_or_renamed_over() {
    let directory = tempfile::tempdir().unwrap();
    let (path, aside) = (directory.path().join(".env"), directory.path().join("aside"));
    let write = |path, n| fs::write(path, format!("FAL_KEY={}\n", key_text(n))).unwrap();
    write(&path, 1);
    let store = store(DotenvSource::new(&path)).await;
    write(&path, 2);
    assert_rotates(&store, 2).await;
    write(&aside, 3);
    fs::rename(aside, &path).unwrap();
    assert_rotates(&store, 3).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_the_environment_names_does() {
    let mut volume = KubeletVolume::new(key_text(1));
    let path = volume.path();
    let environment = move |name: &str| (name == "FAL_KEY_FILE").then(|| path.clone().into());
    let store = store(EnvSource::all().environment(environment)).await;
    volume.update(key_text(2));
    assert_rotates(&store, 2).await;
}

#[test]
fn the_environment_of_a_process_does_not() {
    if is_again() {
        return paused(async || {
            let store = store(EnvSource::key()).await;
            let first = current(&store);
            for fifo in ["BUILT", "CHANGED"] {
                fs::read(env::var_os(fifo).unwrap()).unwrap();
            }
            assert!(matches!(store.reload().await, Ok(Reloaded::Unchanged(_))));
            println!("{first}, then {}", current(&store));
        });
    }
    // Its parent's environment changes while it runs, and it does not; the next process has the change.
    let script = r#"
        mkfifo "$BUILT" "$CHANGED"
        export FAL_KEY="$FIRST"
        "$0" "$@" &
        : > "$BUILT"
        export FAL_KEY="$SECOND"
        : > "$CHANGED"
        wait
        "$0" "$@" &
        : > "$BUILT"
        : > "$CHANGED"
        wait
    "#;
    let directory = tempfile::tempdir().unwrap();
    let mut shell = Command::new("timeout");
    shell.args(["60", "sh", "-c", script]).env("FIRST", key_text(1)).env("SECOND", key_text(2));
    shell.env("BUILT", directory.path().join("built")).env("CHANGED", directory.path().join("changed"));
    let said = again(&mut shell, "the_environment_of_a_process_does_not", 2);
    let ids: Vec<_> = said.lines().filter(|line| line.starts_with("id-")).collect();
    assert_eq!(ids, ["id-1, then id-1", "id-2, then id-2"]);
}

/// Both are mounts of a Secret volume.
#[test]
#[ignore = "needs mount namespaces"]
fn a_sub_path_mount_does_not_and_a_directory_mount_does() {
    in_mount_namespace("a_sub_path_mount_does_not_and_a_directory_mount_does", async || {
        let mut volume = KubeletVolume::new(key_text(1));
        let container = Container::new();
        let file = container.file(&volume.path());
        let by_sub_path = store(FileSource::new(file.path())).await;
        let directory = container.directory(volume.path().parent().unwrap());
        let by_directory = store(FileSource::new(directory.path().join("fal_key"))).await;
        for n in 2..=4 {
            volume.update(key_text(n));
            assert_rotates(&by_directory, n).await;
            assert_stays(&by_sub_path, 1).await;
        }
    });
}

/// Such as the secrets of Docker Compose.
#[test]
#[ignore = "needs mount namespaces"]
fn a_bind_mount_of_a_file_does_until_it_is_renamed_over() {
    let name = "a_bind_mount_of_a_file_does_until_it_is_renamed_over";
    in_mount_namespace(name, async || {
        let host = tempfile::tempdir().unwrap();
        let path = host.path().join("fal_key");
        let shell = |n, command| {
            let mut shell = Command::new("sh");
            shell.args(["-ec", command]).arg(&path).env("KEY", key_text(n)).current_dir(&host);
            assert!(shell.status().unwrap().success());
        };
        let begin = |n| shell(n, r#"echo "$KEY" > "$0""#);
        let container = Container::new();
        for (by_rename, command) in [
            (true, r#"echo "$KEY" > new; mv new "$0""#),
            (true, r#"sed -i "s/.*/$KEY/" "$0""#),
            (true, r#"rm "$0"; echo "$KEY" > "$0""#),
            (false, r#"echo "$KEY" > "$0""#),
            (false, r#"echo "$KEY" > new; cp new "$0""#),
            (false, r#"echo "$KEY" | tee "$0" > /dev/null"#),
        ] {
            begin(1);
            let file = container.file(&path);
            let directory = container.directory(host.path());
            let by_file = store(FileSource::new(file.path())).await;
            let by_directory = store(FileSource::new(directory.path().join("fal_key"))).await;
            shell(2, command);
            assert_rotates(&by_directory, 2).await;
            if by_rename {
                assert_stays(&by_file, 1).await;
                begin(3); // into the new file
                assert_rotates(&by_directory, 3).await;
                assert_stays(&by_file, 1).await;
            } else {
                assert_rotates(&by_file, 2).await;
            }
        }
    });
}

/// Where things are mounted.
struct Container(TempDir);

impl Container {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, of: &Path) -> Mount {
        let at = self.0.path().join("file");
        fs::write(&at, "").unwrap();
        Mount::new(of, at)
    }

    fn directory(&self, of: &Path) -> Mount {
        let at = self.0.path().join("directory");
        fs::create_dir_all(&at).unwrap();
        Mount::new(of, at)
    }
}

/// A bind mount, until it is dropped: a directory in which something is mounted could not be removed.
struct Mount(PathBuf);

impl Mount {
    fn new(of: &Path, at: PathBuf) -> Self {
        assert!(Command::new("mount").arg("--bind").arg(of).arg(&at).status().unwrap().success());
        Self(at)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(std::thread::panicking() || unmounted.unwrap().success());
    }
}

// What is done to a whole process is done to a child: this test again.

const AGAIN: &str = "TOWER_FAL_ROTATES_IN_PLACE_TEST";

fn is_again() -> bool {
    env::var_os(AGAIN).is_some()
}

/// Has `command` run this test again, and returns what was said. It must have passed as often as that.
fn again(command: &mut Command, test: &str, passes: usize) -> String {
    command.arg(env::current_exe().unwrap()).args(["--exact", "--include-ignored", "--nocapture"]);
    let output = command.arg(format!("rotates_in_place::{test}")).env(AGAIN, "").output().unwrap();
    let (said, complaints) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let passed = said.matches("test result: ok. 1 passed").count();
    assert!(output.status.success() && passed == passes, "{said}{complaints}");
    said.into_owned()
}

fn paused(body: impl AsyncFnOnce()) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap().block_on(body());
}

/// Nobody else sees what is mounted, and it goes with the process.
fn in_mount_namespace(test: &str, body: impl AsyncFnOnce()) {
    if is_again() {
        paused(body);
    } else {
        again(Command::new("unshare").arg("-rm"), test, 1);
    }
}
