//! A text that is accepted as a credential goes onto the wire as it was given, and nothing shows its secret.
//!
//! The input is a text. As two lines it is also a key in two halves.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_fal::{Credential, CredentialError, Scheme};

fuzz_target!(|text: &[u8]| {
    check(Credential::key(text), "Key ", given(text));
    check(Credential::bearer(text), "Bearer ", given(text));
    if let Some(end) = text.iter().position(|&byte| byte == b'\n') {
        let (id, secret) = (&text[..end], &text[end + 1..]);
        check(Credential::key_pair(id, secret), "Key ", [given(id), b":", given(secret)].concat());
    }
});

/// The text without what may stand at its ends.
fn given(text: &[u8]) -> &[u8] {
    let text = text.trim_ascii();
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text).trim_ascii()
}

fn check(credential: Result<Credential, CredentialError>, scheme: &str, given: impl AsRef<[u8]>) {
    let credential = match credential {
        Ok(credential) => credential,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 300 && !text.chars().any(char::is_control), "{text:?}");
            return;
        }
    };
    let header = credential.header();
    assert!(header.is_sensitive());
    let value = header.as_bytes().strip_prefix(scheme.as_bytes()).expect("the scheme");
    assert_eq!(value, given.as_ref());
    assert!(value.iter().all(u8::is_ascii_graphic));

    let id = credential.key_id().map(|id| id.as_str());
    assert_eq!(id.is_some(), credential.scheme() == Scheme::Key);
    let secret = match id {
        Some(id) => value.strip_prefix(id.as_bytes()).and_then(|rest| rest.strip_prefix(b":")).expect("`id:secret`"),
        None => value,
    };
    assert!(!secret.is_empty());
    // The id is shown, and may hold the very same text. What is short may stand there by chance.
    let shown = format!("{credential:?} {header:?}").replace(&format!("{:?}", id.unwrap_or_default()), "");
    let secret = std::str::from_utf8(secret).expect("ASCII");
    assert!(secret.len() < 12 || !shown.contains(secret), "{shown}");
}
