//! Texts from elsewhere without what may be secret in them.
//!
//! An error of an HTTP client names a URL with a token in its query, one of a parser quotes the value that it cannot
//! read. [`redact`] leaves out what looks like a secret. That is a guess, and it rather leaves out too much. A secret that
//! is known is left out by [`Credential::strike_out`](super::Credential).

use std::fmt::{self, Display, Write as _};

/// In place of what is left out.
const GAP: &str = "…";

/// The longest text that is kept, in characters.
const MAX_LEN: usize = 500;

/// The longest text that is read, in bytes.
const MAX_READ: usize = 16 * 1024;

/// A text in one line of at most 500 characters, without
///
/// * the query and the user of a URL,
/// * what follows `Key`, `Bearer`, `Basic` or `Token`, and `id:secret`,
/// * long words of mixed letters and digits, and lists of numbers, which may be bytes,
/// * the values that serde quotes.
pub(crate) fn redact(text: &(impl Display + ?Sized)) -> String {
    let mut read = Bounded::default();
    let is_whole = write!(read, "{text}").is_ok();
    let text = without_lists(&without_quoted_values(&read.text));

    let mut line = String::new();
    let mut words =
        text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()).peekable();
    let mut previous = "";
    while let Some(word) = words.next() {
        if !line.is_empty() {
            line.push(' ');
        }
        if !is_whole && words.peek().is_none() {
            line.push_str(GAP); // half of a secret does not look like one
        } else if follows_scheme(previous, word) {
            line.push_str(GAP);
        } else {
            line.push_str(&redact_word(word));
        }
        previous = word;
        if line.chars().count() > MAX_LEN {
            // The whole word: a part of a secret could not be told from any other text.
            line.truncate(line.rfind(' ').map_or(0, |end| end + 1));
            line.push_str(GAP);
            break;
        }
    }
    line
}

/// Takes a text up to [`MAX_READ`].
#[derive(Default)]
struct Bounded {
    text: String,
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let mut room = more.len().min(MAX_READ - self.text.len());
        while !more.is_char_boundary(room) {
            room -= 1;
        }
        self.text.push_str(&more[..room]);
        if room < more.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

/// Without the values in serde's messages, such as `invalid type: string "…", expected u8`.
fn without_quoted_values(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    let next = |rest: &str| {
        let starts = ["string \"", "variant `", "field `", "value \"", "value `"];
        starts.iter().filter_map(|start| rest.find(start).map(|at| at + start.len())).min()
    };
    while let Some(at) = next(rest) {
        let (before, value) = rest.split_at(at);
        let quote = if before.ends_with('"') { '"' } else { '`' };
        kept.push_str(before);
        kept.push_str(GAP);
        rest = &value[end_of_quoted(value, quote)..];
    }
    kept.push_str(rest);
    kept
}

fn end_of_quoted(value: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in value.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            _ if c == quote => return at,
            _ => {}
        }
    }
    value.len()
}

/// Without lists of several numbers, as bytes are printed.
fn without_lists(text: &str) -> String {
    let mut kept = String::new();
    let mut parts = text.split('[');
    kept.push_str(parts.next().unwrap_or_default());
    for part in parts {
        kept.push('[');
        let end = part.find(']').unwrap_or(part.len());
        let is_list = part[..end].contains(',')
            && part[..end].bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b',' | b' ' | b'\n' | b'x'));
        if is_list {
            kept.push_str(GAP);
        }
        kept.push_str(if is_list { &part[end..] } else { part });
    }
    kept
}

/// Whether a word may be the credential behind the name of its scheme.
fn follows_scheme(previous: &str, word: &str) -> bool {
    let scheme = previous.trim_matches(|c: char| !c.is_ascii_alphabetic());
    let is_one_of = |names: &[&str]| names.iter().any(|name| scheme.eq_ignore_ascii_case(name));
    let is_key = word.split_once(':').is_some_and(|(id, secret)| !id.is_empty() && !secret.is_empty());
    let is_token = word.len() >= 20 || (word.len() >= 8 && word.bytes().any(|byte| byte.is_ascii_digit()));
    (is_key && is_one_of(&["key", "basic"])) || (is_token && is_one_of(&["bearer", "basic", "token"]))
}

fn redact_word(word: &str) -> String {
    let Some(at) = query(word) else {
        return redact_atoms(word);
    };
    // A bracket or a comma behind a URL does not belong to it.
    let closing = &word[word.trim_end_matches([')', ']', '}', '>', '"', '\'', '`', ',', ';', ':', '.']).len()..];
    format!("{}{GAP}{closing}", redact_atoms(&word[..=at]))
}

/// Where a query begins.
fn query(word: &str) -> Option<usize> {
    let at = word.find('?')?;
    (word[..at].contains("://") || word[at..].contains('=')).then_some(at)
}

/// Redacts each part between quotes, brackets, commas and the like.
fn redact_atoms(word: &str) -> String {
    let ends_atom = |c: char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '~' | '+' | '/' | ':' | '@' | '-');
    let mut kept = String::new();
    for piece in word.split_inclusive(ends_atom) {
        let atom = piece.trim_end_matches(ends_atom);
        kept.push_str(&redact_atom(atom));
        kept.push_str(&piece[atom.len()..]);
    }
    kept
}

fn redact_atom(atom: &str) -> String {
    let scheme = atom.find("://").map_or(0, |at| at + "://".len());
    if let Some((user, host)) = atom[scheme..].rsplit_once('@')
        && (scheme > 0 || user.contains(':'))
        && !user.contains('/')
    {
        return format!("{}{GAP}@{}", &atom[..scheme], redact_atom(host));
    }
    let is_path = scheme > 0 || atom.starts_with(['/', '.', '~']);
    if is_path {
        let segments = atom.split('/').map(|segment| if is_secret(segment) { GAP } else { segment });
        return segments.collect::<Vec<_>>().join("/");
    }
    if is_secret(atom) { GAP.to_owned() } else { atom.to_owned() }
}

/// Whether a text looks like a key, a token or a half of one. A UUID does not: ids of requests have that form.
fn is_secret(text: &str) -> bool {
    is_key(text) || text.split(['.', ':']).any(is_random)
}

/// `id:secret`, but neither `host:port/path` nor a name with more than one `:`, such as an ARN.
fn is_key(text: &str) -> bool {
    let Some((id, secret)) = text.split_once(':') else {
        return false;
    };
    let has_port = secret.split('/').next().is_some_and(|port| port.len() <= 5 && port.parse::<u16>().is_ok());
    let has_digit = secret.bytes().any(|byte| byte.is_ascii_digit());
    !id.is_empty() && secret.len() >= 16 && has_digit && !has_port && !secret.contains(':')
}

/// Whether a word looks as if it was made of random bytes: long hexadecimal digits, or long with letters of both cases
/// and several digits.
fn is_random(word: &str) -> bool {
    let count = |is: fn(&u8) -> bool| word.bytes().filter(is).count();
    let is_hex = word.len() >= 32 && count(u8::is_ascii_hexdigit) == word.len();
    let is_mixed = word.len() >= 20
        && count(u8::is_ascii_lowercase) > 0
        && count(u8::is_ascii_uppercase) > 0
        && count(u8::is_ascii_digit) > 1;
    is_hex || is_mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_needs_is_kept() {
        for text in [
            "connection refused",
            "No such file or directory (os error 2)",
            "error sending request for url (https://vault.internal:8200/v1/secret/data/fal)",
            "dns error: failed to lookup address information: Name or service not known",
            "tcp connect error: 10.0.0.12:8200: deadline has elapsed",
            "arn:aws:secretsmanager:eu-central-1:123456789012:secret:fal-AbCdEf: AccessDeniedException",
            "request 0f3b9c1e-7d52-4a86-9e14-c0ffee15dead failed with status 503",
            "fal-sync-5d9f8b7c6d-x2x4z is not ready, at 2026-11-26T12:00:00.123456Z",
            "the key has no `:`; a fal key has the form `id:secret`",
            "invalid utf-8 sequence of 1 bytes from index 5",
            "std::io::Error at src/vault.rs:12:5",
            "bearer token expired, and the key: none",
            "what? no, me@example.com",
            "projects/1234/secrets/fal/versions/latest was not found",
            "/var/run/secrets/kubernetes.io/serviceaccount/token: permission denied",
        ] {
            assert_eq!(redact(text), text);
        }
    }

    #[test]
    fn what_looks_like_a_secret_is_left_out() {
        for (text, left) in [
            (
                "error sending request for url (https://v/v1?token=hush&b=?c): broken",
                "error sending request for url (https://v/v1?…): broken",
            ),
            ("at https://v?hush", "at https://v?…"),
            ("GET /v1/fal?sig=hush, failed", "GET /v1/fal?…, failed"),
            ("https://me:hush@v/x and redis://:hush@r:6379", "https://…@v/x and redis://…@r:6379"),
            ("me:hush@host", "…@host"),
            ("sent Authorization: Key id:hush", "sent Authorization: Key …"),
            ("sent `Bearer hush-hush-1`", "sent `Bearer …"),
            ("Basic aHVzaDpodXNo1", "Basic …"),
            ("no such key: house:hush-hush-hush-1!", "no such key: …"),
            ("got \"9f86d081884c7d659a2feaa0c55ad015\"", "got \"…\""),
            ("got q7RtzLw9Xv-2KpYdBn_hJ5mGc0sVfEaU.", "got …"),
            ("eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "…"),
            ("secret=q7RtzLw9Xv2KpYdBnhJ5/x, more", "secret=…, more"),
            (
                r#"invalid type: string "id:\"hush\"", expected u8 at line 1"#,
                r#"invalid type: string "…", expected u8 at line 1"#,
            ),
            ("unknown variant `hush`, expected `a`", "unknown variant `…`, expected `a`"),
            ("FromUtf8Error { bytes: [104, 117, 115, 104] }", "FromUtf8Error { bytes: […] }"),
            ("[0x68, 0x75] and [a, z]", "[…] and [a, z]"),
            ("one\n\ttwo\u{7}three", "one two three"),
        ] {
            assert_eq!(redact(text), left);
        }
    }

    #[test]
    fn a_text_is_bounded_and_ends_in_no_half_of_a_secret() {
        let long = redact(&"word ".repeat(100_000));
        assert_eq!(long, format!("{}{GAP}", "word ".repeat(MAX_LEN / 5)));
        assert_eq!(redact(&format!("a {}", "b".repeat(MAX_LEN))), "a …");
        let cut = format!("{}id:hush-hush-hush-1", " ".repeat(MAX_READ - 8));
        assert_eq!(redact(&cut), GAP);
        assert_eq!(redact(&"é".repeat(MAX_READ)), GAP);
        assert_eq!(redact(""), "");
    }
}
