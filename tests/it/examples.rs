//! How the examples answer `--help` and wrong arguments.

use crate::support::example;

#[allow(clippy::print_stderr, clippy::print_stdout)]
#[path = "../../examples/terminal/mod.rs"]
mod terminal;

use self::terminal::Printable;

/// Each example, a word of its help, and an option that takes a value, if it has one.
const EXAMPLES: [(&str, &str, Option<&str>); 13] = [
    ("axum_byok", "tenants' own keys", Some("--tenants")),
    ("axum_images", "FAL_KEY_FILE", Some("--key-file")),
    ("axum_proxy", "FAL_KEY_FILE", Some("--listen")),
    ("hyper_client", "FAL_KEY_FILE", None),
    ("login", "--demo", None),
    ("proxy", "--allow-target", Some("--key-file")),
    ("queue", "--live", Some("--live")),
    ("quickstart", "takes no arguments", None),
    ("realtime_token", "--allow-app", Some("--key-file")),
    ("stream", "--live", Some("--live")),
    ("websocket", "--live", Some("--live")),
    ("webhook_receiver", "--account", None),
    ("whoami", "FAL_KEY_FILE", None),
];

/// Runs an example without the keys of this environment: its exit code, standard output and standard error.
async fn run(name: &'static str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = example(name);
    for variable in ["FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE"] {
        command.env_remove(variable);
    }
    let output = command.args(arguments).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn each_example_answers_help() {
    for (name, says, _) in EXAMPLES {
        let (code, printed, told) = run(name, &["--help"]).await;
        assert!(code == Some(0) && printed.contains(says) && told.is_empty(), "{name}: {printed}{told}");
    }
}

/// A wrong argument may be a key, so nothing of it is printed.
#[tokio::test]
async fn wrong_arguments_end_an_example_with_2_and_one_line() {
    for (name, _, option) in EXAMPLES {
        let mut wrong = vec![
            vec!["--hush".to_owned()],
            vec!["--hush=hush".to_owned()],
            vec!["-xhush".to_owned()],
            vec!["hush".to_owned()],
            vec!["hush".to_owned(), "{}".to_owned(), "hush".to_owned()],
            vec!["--".to_owned(), "hush".to_owned()],
        ];
        if let Some(option) = option {
            wrong.push(vec![option.to_owned()]);
            wrong.push(vec![option.to_owned(), "hush".to_owned(), "hush".to_owned(), "hush".to_owned()]);
            wrong.push(vec!["--demo=hush".to_owned()]);
            wrong.push(vec!["--demo".to_owned(), "--demo".to_owned()]);
        }
        for arguments in wrong {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let (code, printed, told) = run(name, &arguments).await;
            assert_eq!((code, printed.as_str()), (Some(2), ""), "{name} {arguments:?}: {told}");
            let is_one_line = told.matches('\n').count() == 1 && told.ends_with(" See --help.\n");
            assert!(is_one_line && !told.contains("hush"), "{name} {arguments:?}: {told}");
        }
    }
}

#[tokio::test]
async fn an_option_that_would_have_no_effect_is_refused() {
    for (name, arguments, says) in [
        ("queue", &["--demo", "--file", "x"][..], "--demo cannot be used together with --file <PATH>."),
        ("queue", &["--demo", "--rest-url", "https://a.example"], "--demo cannot be used together with --rest-url"),
        ("proxy", &["--allow-anonymous", "--client-dir", "x"], "--demo is missing."),
        ("proxy", &["--allow-anonymous", "--key-file", "x", "--client-dir", "x"], "--client-dir <DIR>."),
        ("proxy", &["--allow-anonymous", "--max-in-flight", "0"], "The value of --max-in-flight <N> cannot be used"),
        ("webhook_receiver", &["--demo", "--account", "x"], "together with --account <USER_ID>. See"),
    ] {
        let (code, printed, told) = run(name, arguments).await;
        assert!(code == Some(2) && printed.is_empty() && told.contains(says), "{name} {arguments:?}: {told}");
    }
}

#[tokio::test]
async fn input_that_is_no_json_is_not_sent() {
    for (name, arguments, code) in [
        ("stream", &["--live", "a/b", "{hush"][..], 1),
        ("websocket", &["--live", "a/b", "{hush"], 1),
        ("queue", &["--live", "a/b", "{hush"], 1),
        ("hyper_client", &["a/b", "{hush"], 2),
    ] {
        let (ended, printed, told) = run(name, arguments).await;
        let says = told.contains("is not JSON: key must be a string") && !told.contains("hush");
        assert!(ended == Some(code) && printed.is_empty() && says, "{name}: {told}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn an_argument_that_is_not_utf_8_is_refused() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    let output = example("stream").arg("--live").arg(OsStr::from_bytes(b"\xff")).arg("{}").output().await.unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), told.as_str()),
        (Some(2), "There is an argument that is not UTF-8. See --help.\n")
    );
}

/// What an app answers could move the cursor, change what was printed before, or set the title of the window.
#[test]
fn text_from_strangers_is_escaped_for_a_terminal() {
    for (text, printed) in [
        ("a\u{e4}\u{4e16}\u{1f600}\n\tb", "a\u{e4}\u{4e16}\u{1f600}\n\tb"),
        ("\u{1b}[2J", "\\u{1b}[2J"),
        ("\u{1b}]0;title\u{7}", "\\u{1b}]0;title\\u{7}"),
        ("a\rb\u{8}\u{0}", "a\\u{d}b\\u{8}\\u{0}"),
        // The controls that are one byte in Latin-1, such as CSI.
        ("\u{9b}2J\u{7f}", "\\u{9b}2J\\u{7f}"),
        ("a\u{202e}b\u{2066}c\u{200f}", "a\\u{202e}b\\u{2066}c\\u{200f}"),
    ] {
        assert_eq!(Printable(text).to_string(), printed);
    }
}
