//! The applications behind fal. Each answers as the test has set, or else with what it received.

use serde_json::{Value, json};

use super::{answer::Answer, connection::Connection, failure::Point};

/// The longest body in which a `prompt` is looked for, in bytes.
pub(super) const MAX_PARSED: usize = 64 * 1024;

/// The output for an input of this length that begins like this: the path, the length and the `prompt`.
pub(super) fn output(path: &str, length: u64, start: &[u8]) -> Value {
    let mut output = json!({ "images": [], "seed": 0, "path": path, "bytes": length });
    if length <= MAX_PARSED as u64
        && let Ok(Value::Object(mut input)) = serde_json::from_slice(start)
        && let Some(prompt) = input.remove("prompt")
    {
        output["prompt"] = prompt;
    }
    output
}

/// Runs the application that a path leads to.
pub(super) fn run(path: &str, output: Value, connection: &Connection) -> Answer {
    let mut state = connection.shared.state();
    state.runs += 1;
    if let Some(failed) = state.next_failure(path, Point::Application).and_then(Answer::failure) {
        return failed;
    }
    state.answer(path).unwrap_or_else(|| Answer::json(output))
}
