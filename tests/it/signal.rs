//! SIGHUP. It is the whole process that gets it, so these are the only stores in it that listen, and one test.

use std::{process::Command, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tower_fal::CredentialStore;

use crate::support::{Says, Script, current, key};

#[tokio::test]
async fn sighup_asks_for_a_load_that_begins_after_it() {
    tokio::time::timeout(Duration::from_secs(60), hang_up_and_look()).await.expect("a SIGHUP was not heard");
}

async fn hang_up_and_look() {
    let source = Script::new(None, Says::Here(key(1)));
    let store = CredentialStore::builder(source.clone()).reload_on_sighup().build().await.unwrap();

    source.brings(2);
    hang_up().await;
    source.loads_reach(2).await;
    reaches(&store, 2).await;

    // While a load is under way that has made up its mind already.
    source.close();
    let reload = tokio::spawn({
        let store = store.clone();
        async move { store.reload().await }
    });
    source.loads_reach(3).await;
    source.brings(3);
    hang_up().await;
    source.open();
    reload.await.unwrap().unwrap();
    reaches(&store, 3).await;
    assert_eq!((current(&store), source.loads()), ("id-3".to_owned(), 4));

    // What goes wrong is no end of it.
    source.says(Says::Error);
    hang_up().await;
    source.loads_reach(5).await;
    source.brings(4);
    hang_up().await;
    reaches(&store, 4).await;

    // The last handle ends it all; the process goes on.
    drop(store);
    hang_up().await;
    let store = CredentialStore::builder(source).reload_on_sighup().build().await.unwrap();
    assert_eq!(current(&store), "id-4");
}

/// Sends it to this process, and returns when everybody who listens has it.
async fn hang_up() {
    let mut hangups = signal(SignalKind::hangup()).unwrap();
    // A shell's own `kill`, as not every system has the program.
    assert!(Command::new("sh").args(["-c", "kill -HUP $PPID"]).status().unwrap().success());
    hangups.recv().await.unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

async fn reaches(store: &CredentialStore, generation: u64) {
    store.subscribe().wait_for(|status| status.generation.get() == generation).await.unwrap();
}
