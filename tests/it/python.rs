//! fal's official Python client, unchanged, against the mock: so the mock is what that client takes for fal.
//!
//! `FAL_CLIENT_PYTHON` names a Python with `fal_client` 1.0.3, as `.ci/run` makes one; without it, `python3` does.

use std::{env, path::Path};

use serde_json::{Value, json};
use tokio::process::Command;

use crate::mock_process::MockProcess;

const KEY: &str = "python-key:not-a-secret";

/// Every call of the driver against the mock, as it is now.
async fn drive(mock: &MockProcess) -> Value {
    let python = env::var_os("FAL_CLIENT_PYTHON").unwrap_or_else(|| "python3".into());
    let fal = mock.fal.strip_prefix("https://").unwrap();
    let output = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fal_client_driver.py"))
        .env("FAL_KEY", KEY)
        .env("FAL_RUN_HOST", format!("{fal}/run"))
        .env("FAL_QUEUE_RUN_HOST", format!("{fal}/queue"))
        .env("SSL_CERT_FILE", mock.ca())
        .env_remove("FAL_FORCE_AUTH_BY_USER")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every call of the driver that does not end in a stream's own error, each with this refusal.
fn refused(status: u16, message: &str) -> Value {
    let error = || json!({"status": status, "message": message, "error_type": null});
    json!({
        "tls": "TLSv1.3",
        "run": error(),
        "stream": {"error": "SSEError"},
        "queued": error(),
        "by_id": error(),
        "cancelled": error(),
        "subscribe": error(),
        "realtime": {"error": "InvalidStatus"},
        "asynchronous": error(),
    })
}

#[tokio::test]
#[ignore = "needs Python with fal_client"]
async fn fals_python_client_runs_streams_queues_and_cancels() {
    let mock = MockProcess::start(KEY, true).await;
    let output = json!({"images": [], "seed": 0, "path": "/fal-ai/flux/dev", "bytes": 18, "prompt": "a cat"});
    let event = |event| {
        json!({
            "images": [], "seed": 0, "path": "/fal-ai/flux/dev/stream", "bytes": 18, "prompt": "a cat", "event": event,
        })
    };
    let cancelled =
        |message: Value, error_type, status| json!({"status": status, "message": message, "error_type": error_type});
    let expected = json!({
        "tls": "TLSv1.3",
        "run": output,
        "stream": [event(0), event(1), event(2)],
        "queued": {"statuses": ["Queued", "InProgress", "Completed"], "result": output},
        "by_id": {"status": "Queued", "result": output},
        "cancelled": {
            "again": cancelled(json!(r#"{"status":"ALREADY_COMPLETED"}"#), json!(null), 400),
            "result": cancelled(json!("client cancelled"), json!("client_cancelled"), 499),
        },
        "subscribe": output,
        "realtime": {"prompt": "a cat"},
        "asynchronous": {"run": output, "events": [0, 1, 2], "subscribe": output},
    });
    assert_eq!(drive(&mock).await, expected);
    assert_eq!(mock.received().await["runs"], 10);
}

#[tokio::test]
#[ignore = "needs Python with fal_client"]
async fn fals_python_client_shows_the_words_of_a_401_and_a_403() {
    let mock = MockProcess::start(KEY, true).await;
    assert_eq!(mock.tell("/revoke", &json!({"key": KEY})).await, 200);
    let expected = refused(401, "invalid key credentials");
    assert_eq!(drive(&mock).await, expected);

    assert_eq!(mock.tell("/accept", &json!({"key": KEY})).await, 200);
    assert_eq!(mock.tell("/lock", &json!({"reason": "Admin lock"})).await, 200);
    let locked = "User is locked. Reason: Admin lock. Please contact support@fal.ai.";
    assert_eq!(drive(&mock).await, refused(403, locked));
    assert_eq!(mock.received().await["runs"], 0);
}
