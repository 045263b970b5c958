//! The applications behind fal: all of them answer with what came to them.

use http::StatusCode;
use serde_json::{Value, json};

use super::{answer::Answer, connection::Connection, failure::Failure};

/// The longest body that is looked into for a `prompt`, in bytes. A longer one is only counted.
pub(super) const MAX_PARSED: usize = 64 * 1024;

/// What every application puts out: what came to it. Of what is longer than [`MAX_PARSED`] only the length counts.
pub(super) fn output(path: &str, bytes: u64, input: &[u8]) -> Value {
    let mut output = json!({ "images": [], "seed": 0, "path": path, "bytes": bytes });
    if bytes <= MAX_PARSED as u64
        && let Ok(Value::Object(mut input)) = serde_json::from_slice(input)
        && let Some(prompt) = input.remove("prompt")
    {
        output["prompt"] = prompt;
    }
    output
}

/// Plays the application.
pub(super) fn run(output: Value, connection: &Connection) -> Answer {
    let mut state = connection.shared.state();
    state.runs += 1;
    let failure = state.next_failure(Failure::is_the_applications);
    failure.and_then(Answer::failure).unwrap_or_else(|| Answer::application(StatusCode::OK, output))
}
