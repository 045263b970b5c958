//! Which text can be a credential, and which cannot.

use super::error::{CredentialError, Part, Problem};

/// The longest value taken, in bytes. Common servers refuse a header line from 8 to 16 KiB upwards.
pub(super) const MAX_VALUE_LEN: usize = 16 * 1024;

/// What is left of a text without the byte order mark, blanks and line breaks at its ends.
pub(crate) fn trim(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text).trim_ascii()
}

/// Whether a text that should be something else, and would be shown, may be a credential in the wrong place.
///
/// It is meant to say so once too often: a path like this can be written with `./` in front.
pub(crate) fn may_be_credential(text: &[u8]) -> bool {
    let text = trim(text);
    let is_drive = matches!(text, [letter, b':', b'/' | b'\\', ..] if letter.is_ascii_alphabetic());
    let is_plainly_a_path = is_drive || matches!(text, [b'/' | b'\\' | b'.' | b'~', ..]);
    let suspicious = |&byte: &u8| matches!(byte, b':' | b'=' | b'"' | b'\'' | b'`') || byte.is_ascii_whitespace();
    !is_plainly_a_path && (text.starts_with(b"eyJ") || text.iter().any(suspicious))
}

/// Trims a value and refuses what cannot be one.
pub(super) fn accept(part: Part, input: &[u8]) -> Result<&[u8], CredentialError> {
    if input.starts_with(b"\xFF\xFE") || input.starts_with(b"\xFE\xFF") {
        return Err(part.has(Problem::Utf16));
    }
    let value = trim(input);
    if value.is_empty() {
        return Err(part.has(Problem::Empty));
    }
    // Before the bytes are looked at one by one: here the hint helps more than the position of a blank.
    if let Some(packaging) = packaging(value) {
        return Err(part.has(packaging));
    }
    if value.len() > MAX_VALUE_LEN {
        return Err(part.has(Problem::TooLong { most: MAX_VALUE_LEN }));
    }
    if let Some(index) = value.iter().position(|byte| !byte.is_ascii_graphic()) {
        let class = match value[index] {
            b'\n' | b'\r' => "a line break",
            b' ' | b'\t' => "a blank",
            byte if byte.is_ascii() => "a control character",
            _ => "a byte outside ASCII",
        };
        // `value` is a part of `input`, so what was trimmed at the front is what `input` has more up to here.
        let trimmed = value.as_ptr().addr() - input.as_ptr().addr();
        return Err(part.has(Problem::NotVisible { position: trimmed + index, class }));
    }
    Ok(value)
}

/// What people copy along with a key.
fn packaging(value: &[u8]) -> Option<Problem> {
    let starts_with =
        |prefix: &str| value.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()));
    for scheme in ["Key ", "Bearer "] {
        if starts_with(scheme) {
            return Some(Problem::WithScheme(scheme));
        }
    }
    if starts_with("FAL_KEY=") {
        return Some(Problem::Assignment("FAL_KEY="));
    }
    matches!(value[0], b'"' | b'\'' | b'`').then_some(Problem::Quoted)
}
