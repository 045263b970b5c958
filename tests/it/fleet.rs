//! Eight processes on one secret directory, as eight pods have it from kubelet: rotated under load, then spoilt.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Request, StatusCode, header::CONTENT_TYPE};
use serde_json::Value;
use tokio::task::JoinSet;
use tower_fal::{
    Credential,
    mock::{MockFal, Presented},
};

use crate::{
    app::App,
    support::{KubeletVolume, key, key_text},
};

const PODS: usize = 8;
const CALLERS: usize = 3;

/// Those who call one of the processes, again and again.
#[derive(Clone, Default)]
struct Caller {
    sent: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

/// How many requests have shown a key that fal does not take.
fn refused(fal: &MockFal) -> usize {
    fal.received().iter().filter(|received| matches!(received.presented, Presented::Refused(_))).count()
}

fn order() -> Request<String> {
    Request::post("/images").header(CONTENT_TYPE, "application/json").body(r#"{"prompt":"a cat"}"#.to_owned()).unwrap()
}

/// A corrupt secret ends none of the processes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_rotates_without_a_failed_request() {
    let fal = MockFal::start().await.unwrap();
    fal.accept(&key(1));
    let mut secret = KubeletVolume::new(key_text(1));
    let path = secret.path();
    let (run, queue) = (fal.run_origin(), fal.queue_origin());
    let arguments =
        ["--key-file", path.to_str().unwrap(), "--fal-run-url", &run, "--fal-queue-url", &queue, "--drain-delay", "0"];
    let mut pods = Vec::new();
    for _ in 0..PODS {
        pods.push(Arc::new(App::start("axum_images", &arguments).await));
    }

    let stop = Arc::new(AtomicBool::new(false));
    let mut calls = JoinSet::new();
    let mut callers = Vec::new();
    for pod in &pods {
        for _ in 0..CALLERS {
            let caller = Caller::default();
            callers.push(caller.clone());
            let (pod, stop) = (Arc::clone(pod), Arc::clone(&stop));
            calls.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    caller.sent.fetch_add(1, Ordering::Relaxed);
                    let answer = pod.send(order()).await;
                    assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
                    caller.answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    }
    // An answer to what was sent from now on, for each of them.
    let each_is_answered = async || {
        let sent: Vec<_> = callers.iter().map(|caller| caller.sent.load(Ordering::Relaxed)).collect();
        for (caller, sent) in callers.iter().zip(sent) {
            while caller.answered.load(Ordering::Relaxed) <= sent {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    let each_has = async |id: &str| {
        for pod in &pods {
            pod.ready_where(|status, report| status == StatusCode::OK && report["key_id"] == id).await;
        }
    };
    let story = async {
        each_is_answered().await;

        fal.accept(&key(2));
        secret.update(key_text(2));
        each_has("id-2").await;
        // What the queries of docs/rotation.md tell: every one of them has it. And what was sent before is answered.
        each_is_answered().await;
        fal.clear_received();
        fal.revoke(&key(1));
        each_is_answered().await;
        assert_eq!(refused(&fal), 0, "none of them had the old key any more");

        // The wrong way round: revoked before any of them has another. That is what a replay is for.
        fal.accept(&key(3));
        fal.revoke(&key(2));
        while refused(&fal) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        secret.update(key_text(3));
        each_has("id-3").await;
        each_is_answered().await;

        secret.update("half a key");
        for pod in &pods {
            let report = pod.ready_where(|_, report| report["consecutive_failures"] != 0).await;
            assert_eq!((&report["ready"], &report["key_id"]), (&true.into(), &"id-3".into()), "{report}");
            assert_eq!(report["degraded"], Value::from(vec!["reload_failing"]), "{report}");
            pod.ready_where(|status, _| status == StatusCode::OK).await;
        }
        each_is_answered().await;
    };
    tokio::select! {
        () = story => {}
        Some(Err(failed)) = calls.join_next() => std::panic::resume_unwind(failed.into_panic()),
    }
    stop.store(true, Ordering::Relaxed);
    calls.join_all().await;

    let sent: u64 = callers.iter().map(|caller| caller.sent.load(Ordering::Relaxed)).sum();
    let answered: u64 = callers.iter().map(|caller| caller.answered.load(Ordering::Relaxed)).sum();
    assert!(sent >= 3 * (PODS * CALLERS) as u64, "{sent}");
    assert_eq!(answered, sent, "none of them failed");
    assert_eq!(fal.runs(), sent, "and none of them ran twice");
    for pod in pods {
        let pod = Arc::into_inner(pod).unwrap();
        pod.signal("TERM").await;
        pod.ended().await.well();
    }
}

#[test]
fn the_manifests_agree_with_the_server_and_with_each_other() {
    let manifest =
        |name: &str| fs::read_to_string(format!("{}/examples/kubernetes/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (deployment, secret) = (manifest("deployment.yaml"), manifest("secret.yaml"));
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.trim_start().trim_start_matches("- ").starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name}"));
        line.split(" #").next().unwrap().split_once(':').unwrap().1.trim().to_owned()
    };
    // The file that the server looks for is the one that the Secret becomes.
    let key_file = deployment.lines().skip_while(|line| !line.contains("FAL_KEY_FILE")).nth(1).unwrap();
    assert_eq!(key_file.trim(), format!("value: {}/key", after(&deployment, "mountPath")));
    // And the placeholder is none that a pod would take.
    assert!(secret.contains("\n  key: ") && Credential::key(after(&secret, "key")).is_err());
    assert_eq!(after(&secret, "name"), after(&deployment, "secretName"));
    assert!(!deployment.lines().any(|line| line.trim_start().starts_with("subPath")), "it would never be rotated");

    // The probes ask the admin listener, on the port that the server is told to open.
    let probes: Vec<_> = deployment.lines().filter(|line| line.contains("httpGet:")).collect();
    assert!(probes.len() == 2 && probes.iter().all(|probe| probe.contains("port: admin")), "{probes:?}");
    let ports: Vec<_> = deployment.lines().skip_while(|line| !line.contains("- name: admin")).collect();
    assert_eq!(ports[1].trim(), "containerPort: 3001");
    assert!(after(&deployment, "args").contains(r#"--admin, "0.0.0.0:3001""#));

    // Open requests have the time that they were promised.
    let args = after(&deployment, "args");
    let seconds = |name: &str| -> u64 {
        let value = args.split(name).nth(1).unwrap().split('"').nth(1).unwrap();
        value.parse().unwrap()
    };
    let grace: u64 = after(&deployment, "terminationGracePeriodSeconds").parse().unwrap();
    assert!(grace > seconds("--drain-delay") + seconds("--drain-timeout"));
}
