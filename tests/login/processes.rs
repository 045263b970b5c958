//! Several processes with one login, and processes that are killed.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant, SystemTime},
};

use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rustix::fs::{FlockOperation, flock};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};
use tower_fal::{
    Credential,
    error::report,
    login::{LoginSource, settled},
    mock::{Endpoint, EndpointFailure, MockAuthorization},
    source::CredentialSource as _,
};

use crate::support::{EXPIRED, World, token};

const CHILD: &str = "TOWER_FAL_LOGIN_CHILD";

/// What a child does: it says that it is there, waits for a line, and prints the token or the error.
#[tokio::test]
async fn child() {
    let Ok(url) = env::var(CHILD) else { return };
    // Without the roots of the system, which take long to read.
    let client = Client::builder(TokioExecutor::new()).build_http();
    let source = LoginSource::with_client(client).authority(&url).unwrap().rest(&url).unwrap();
    println!("\nready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    match source.load().await {
        Ok(credential) => println!("\ntoken {}", token(&credential.unwrap())),
        Err(error) => println!("\nerror {}", report(&error)),
    }
    settled().await;
}

/// This test binary as a child with this home directory.
fn child_of(world: &World, program: impl FnOnce(&Path) -> Command) -> Child {
    let mut command = program(&env::current_exe().unwrap());
    command
        .args(["--exact", "processes::child", "--nocapture"])
        .env(CHILD, world.server.url())
        .env("FAL_HOME_DIR", world.home.path())
        .env("FAL_CONFIG_PATH", "")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command.spawn().unwrap()
}

async fn ready(child: &mut Child) {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    while lines.next_line().await.unwrap().unwrap() != "ready" {}
}

fn go(child: &mut Child) {
    let stdin = child.stdin.take().unwrap();
    // Into the pipe: nobody has to read for that.
    let mut stdin = std::fs::File::from(stdin.into_owned_fd().unwrap());
    stdin.write_all(b"go\n").unwrap();
}

/// The line of its output that begins so.
fn said<'a>(output: &'a Output, word: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
}

async fn world(access: Duration) -> World {
    let server = MockAuthorization::start().await.unwrap();
    let world = World { server, home: tempfile::tempdir().unwrap() };
    world.write(world.server.log_in_with_access(access));
    world
}

/// Both locks are free. Not at once if another test has just made a process: until that runs its program, it has the
/// open files of this one.
async fn assert_usable(world: &World) {
    for name in [".tower-fal.lock", ".portalock"] {
        if let Ok(file) = fs::File::open(world.home.path().join(name)) {
            until(|| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_processes_renew_one_login_once() {
    let world = world(EXPIRED).await;
    let before = fs::read_to_string(world.path()).unwrap();
    let mut children: Vec<_> = (0..50).map(|_| child_of(&world, |program| Command::new(program))).collect();
    for child in &mut children {
        ready(child).await;
    }
    // A reader in a tight loop.
    let (path, stop) = (world.path(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let reader = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            let mut seen = BTreeSet::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                seen.insert(fs::read_to_string(&path).unwrap());
            }
            seen
        }
    });
    children.iter_mut().for_each(go);
    let mut tokens = BTreeSet::new();
    for child in children {
        let output = child.wait_with_output().await.unwrap();
        let token = said(&output, "token").unwrap_or_else(|| panic!("{:?}", said(&output, "error")));
        tokens.insert(token.to_owned());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let after = fs::read_to_string(world.path()).unwrap();
    assert_eq!((world.server.refreshes(), world.server.reuses()), (1, 0));
    assert_eq!(tokens, BTreeSet::from([world.tokens()[1].clone()]));
    let seen = reader.join().unwrap();
    assert!(seen.contains(&after) && seen.is_subset(&BTreeSet::from([before, after])), "a half-written file was seen");
}

async fn killed(mut child: Child) {
    child.start_kill().unwrap(); // SIGKILL
    assert!(!child.wait().await.unwrap().success());
}

#[tokio::test]
async fn a_process_killed_while_it_waits_for_a_lock_changes_nothing() {
    let world = world(EXPIRED).await;
    let before = world.tokens();
    let held = fs::File::create(world.home.path().join(".portalock")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let mut child = child_of(&world, |program| Command::new(program));
    ready(&mut child).await;
    go(&mut child);
    // It has the first lock and waits for the second.
    let ours = world.home.path().join(".tower-fal.lock");
    until(|| {
        let Ok(file) = fs::File::open(&ours) else { return false };
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    })
    .await;
    killed(child).await;
    drop(held);
    assert_usable(&world).await;
    assert_eq!((world.tokens(), world.server.received(Endpoint::Token)), (before, 0));
}

#[tokio::test]
async fn a_process_killed_while_it_asks_leaves_a_good_login() {
    let world = world(EXPIRED).await;
    let before = world.tokens();
    world.server.fail_next(Endpoint::Token, EndpointFailure::Hang);
    let mut child = child_of(&world, |program| Command::new(program));
    ready(&mut child).await;
    go(&mut child);
    until(|| world.server.received(Endpoint::Token) == 1).await;
    killed(child).await;
    assert_usable(&world).await;
    assert_eq!(world.tokens(), before);

    // What it left beside the file is in nobody's way.
    let mut next = child_of(&world, |program| Command::new(program));
    ready(&mut next).await;
    go(&mut next);
    let output = next.wait_with_output().await.unwrap();
    assert_eq!(said(&output, "token"), Some(&*world.tokens()[1]));
    let left: BTreeSet<_> = fs::read_dir(world.home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left, BTreeSet::from([".portalock", ".tower-fal.lock", "auth0_token"].map(String::from)));
}

/// Killed from before the first step of a renewal to after the last one.
#[tokio::test]
async fn a_process_killed_at_any_moment_leaves_a_whole_file() {
    const ROUNDS: u32 = 60;
    let world = world(EXPIRED).await;
    let renew = async |kill_after: Option<Duration>| {
        let before = world.server.log_in_with_access(EXPIRED);
        world.write(&before);
        // So that nobody waits for its writer to finish.
        let long_ago = SystemTime::now() - Duration::from_secs(60);
        fs::File::options().write(true).open(world.path()).unwrap().set_modified(long_ago).unwrap();
        let mut child = child_of(&world, |program| Command::new(program));
        ready(&mut child).await;
        go(&mut child);
        if let Some(wait) = kill_after {
            tokio::time::sleep(wait).await;
            child.start_kill().unwrap();
        }
        child.wait().await.unwrap();
        assert_usable(&world).await;
        let after = fs::read_to_string(world.path()).unwrap();
        if after == before {
            return false;
        }
        let (refresh, access) = after.split_once('\n').unwrap();
        assert!(refresh.starts_with("mock-refresh-"), "{after:?}");
        assert!(world.server.accepts(&Credential::bearer(access).unwrap()), "{after:?}");
        true
    };
    let began = Instant::now();
    assert!(renew(None).await);
    let whole = began.elapsed();
    let mut renewed = 0;
    for round in 0..ROUNDS {
        renewed += u32::from(renew(Some(whole * round / ROUNDS)).await);
    }
    assert!((1..ROUNDS).contains(&renewed), "{renewed} of {ROUNDS} were renewed: the moments were all on one side");
}

#[cfg(target_os = "linux")]
#[ignore = "needs mount namespaces"]
#[tokio::test]
async fn nothing_is_spent_on_a_full_disk() {
    let world = world(EXPIRED).await;
    let before = world.tokens();
    // 32 KiB: enough for the tokens and the locks, and not for what may come.
    let script = "mount -t tmpfs -o size=32k none \"$FAL_HOME_DIR\" && printf %s \"$TOKENS\" >\"$FAL_HOME_DIR/auth0_token\" && exec \"$0\" \"$@\"";
    let mut child = child_of(&world, |program| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]).arg(program).env("TOKENS", before.join("\n"));
        command
    });
    ready(&mut child).await;
    go(&mut child);
    let output = child.wait_with_output().await.unwrap();
    let error = said(&output, "error").unwrap();
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(world.server.received(Endpoint::Token), 0);
}

async fn until(reached: impl Fn() -> bool) {
    for _ in 0..3000 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came to that");
}
