//! A text that is accepted as a credential goes onto the wire as it was given, has none of the shapes that surely are
//! something else, and nothing shows its secret. A key of a form that services use is accepted.
//!
//! The input is a text. As two lines it is also a key in two halves, and its bytes choose the letters of a usual key.

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
    if !text.is_empty() {
        accepts_usual_key(text);
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
    let secret = std::str::from_utf8(secret).expect("ASCII");
    // The id is shown, and may hold the very same text. What is short may stand there by chance.
    let shown = format!("{credential:?} {header:?}").replace(&format!("{:?}", id.unwrap_or_default()), "");
    assert!(secret.len() < 12 || !shown.contains(secret), "{shown}");

    match id {
        Some(id) => {
            assert!(!id.contains(':'));
            assert_no_other_shape(id);
        }
        None => {
            let body = secret.trim_end_matches('=');
            assert!(body.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte)), "{secret}");
        }
    }
    assert_no_other_shape(secret);
}

/// Written without a look at the table in the crate: what an operator would call nonsense at first sight.
fn assert_no_other_shape(text: &str) {
    let (first, last) = (text.as_bytes()[0], text.as_bytes()[text.len() - 1]);
    assert!(!b"\"'`([{<".contains(&first), "it begins with a quote or a bracket: {text}");
    assert!(!b"\"'`)]}>,;".contains(&last), "it ends with a quote, a bracket or a comma: {text}");
    for (open, close) in [("{{", "}}"), ("${", "}"), ("$(", ")")] {
        let opened = text.find(open).map(|at| &text[at + open.len()..]);
        assert!(!opened.is_some_and(|rest| rest.contains(close)), "it holds a template: {text}");
    }
    assert!(!text.contains("***"), "it is masked: {text}");
    let lower = text.to_ascii_lowercase();
    for word in ["undefined", "null", "none", "nil", "changeme"] {
        assert_ne!(lower, word, "it is a placeholder");
    }
    for start in ["http://", "https://", "op://", "arn:", "vault:", "encrypted:", "enc[", "fal_key=", "-----begin"] {
        assert!(!lower.starts_with(start), "it starts with `{start}`: {text}");
    }
}

/// A key of a form that services use, with letters chosen by the bytes.
fn accepts_usual_key(bytes: &[u8]) {
    const HEX: &[u8] = b"0123456789abcdef";
    const LOWER: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    const BASE64: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = bytes.iter().copied().cycle().map(usize::from);
    let mut letters = |count: usize, alphabet: &[u8]| -> String {
        bytes.by_ref().take(count).map(|byte| char::from(alphabet[byte % alphabet.len()])).collect()
    };
    let form = letters(2, HEX).into_bytes();
    let id = match form[0] % 3 {
        0 => [8, 4, 4, 4, 12].map(|count| letters(count, HEX)).join("-"),
        1 => format!("a{}1", letters(16, LOWER)),
        _ => format!("7{}-{}.{}_2", letters(4, LOWER), letters(4, LOWER), letters(8, LOWER)),
    };
    let secret = match form[1] % 4 {
        0 => letters(32, HEX),
        1 => format!("sk_live_{}", letters(32, LOWER)),
        2 => format!("Z{}=", letters(32, BASE64)),
        _ => format!("k{}:{}", letters(16, LOWER), letters(16, LOWER)),
    };
    let whole = format!("{id}:{secret}");
    let key = Credential::key(&whole).expect("a usual key");
    assert_eq!(key.header(), &format!("Key {whole}"));
    assert_eq!(Credential::key_pair(&id, &secret).expect("a usual pair").header(), key.header());
    assert!(Credential::bearer(&whole).is_err(), "a key was accepted as a token");
}
