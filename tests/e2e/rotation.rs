//! The key rotates while a page is at work, and nobody notices.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;

use crate::servers::Servers;

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn a_page_does_not_notice_a_rotation() {
    let mut servers = Servers::start(&[]).await;
    servers.fal.set_latency(Duration::from_millis(20));
    let body = "globalThis.stop = false;
        globalThis.counts = { run: 0, subscribe: 0, stream: 0, upload: 0, failed: [] };
        const input = { prompt: 'a cat' };
        const calls = {
            run: () => fal.run('fal-ai/flux', { input }),
            subscribe: () => fal.subscribe('fal-ai/flux', { input, pollInterval: 20 }),
            stream: async () => { for await (const event of await fal.stream('fal-ai/flux', { input })); },
            upload: () => fal.storage.upload(new Blob(['meow'])),
        };
        globalThis.finished = Promise.all(Object.entries(calls).map(async ([name, call]) => {
            while (!stop) await call().then(() => counts[name]++, (error) => counts.failed.push(`${name}: ${error.message} ${error.status}`));
        }))";
    servers.page.call(&format!("{body}; 0")).await;
    some_runs(&servers).await;
    for _ in 0..5 {
        servers.rotate();
        some_runs(&servers).await;
    }
    let counts = servers.page.call("stop = true; await finished; return counts").await;
    assert_eq!(counts["failed"], json!([]));
    let count = |name: &str| counts[name].as_u64().unwrap();
    assert!(["run", "subscribe", "stream", "upload"].into_iter().all(|name| count(name) > 0), "{counts}");
    // Each call ran once, however often it was sent.
    assert_eq!(servers.fal.runs(), count("run") + count("subscribe") + count("stream"));

    let received = servers.fal.received();
    let keys: BTreeSet<Option<String>> =
        received.iter().map(|request| request.presented.key_id().map(ToString::to_string)).collect();
    let expected = (0..6).map(|number| Some(format!("e2e-key-{number}"))).chain([None]).collect();
    assert_eq!(keys, expected);
    servers.stop().await;
}

/// Returns after some more runs.
async fn some_runs(servers: &Servers) {
    let wanted = servers.fal.runs() + 10;
    let reached = async {
        while servers.fal.runs() < wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), reached).await.expect("the page sends nothing");
}
