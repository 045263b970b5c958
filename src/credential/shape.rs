//! The one judge of texts: which can be a credential, and which surely cannot.
//!
//! What files, variables, `.env` files, closures and callers bring all passes through [`key`], [`key_pair`] or
//! [`token`]. fal guarantees no format for its keys, so the table [`SHAPES`] holds only what is surely something else:
//! the texts that are found in the place of a key when a deployment went wrong.

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    decoded_len_estimate,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use zeroize::Zeroizing;

use super::error::{CredentialError, Part, Problem};

/// The longest value taken, in bytes. Common servers refuse a header line from 8 to 16 KiB upwards.
pub(super) const MAX_VALUE_LEN: usize = 16 * 1024;

/// The longest user id of an account taken, in bytes. It ends up in logs.
const MAX_ACCOUNT_LEN: usize = 256;

/// The longest key id taken, in bytes. Those seen in the wild are UUIDs. An id ends up in logs and labels.
pub(super) const MAX_KEY_ID_LEN: usize = 256;

/// The two halves of `id:secret`.
pub(super) fn key(input: &[u8]) -> Result<(&str, &str), CredentialError> {
    let key = accept(Part::Key, input)?;
    let Some((id, secret)) = key.split_once(':') else {
        return Err(Part::Key.has(no_colon(key)));
    };
    if id.is_empty() {
        return Err(Part::Key.has(Problem::NothingBeforeColon));
    }
    if secret.is_empty() {
        return Err(Part::Key.has(Problem::NothingAfterColon));
    }
    refuse_shape(Part::KeyId, id)?;
    refuse_shape(Part::KeySecret, secret)?;
    halves(id, secret)
}

/// The two halves, each from a place of its own.
pub(super) fn key_pair<'a>(id: &'a [u8], secret: &'a [u8]) -> Result<(&'a str, &'a str), CredentialError> {
    let id = accept(Part::KeyId, id)?;
    let secret = accept(Part::KeySecret, secret)?;
    if id.contains(':') {
        return Err(Part::KeyId.has(Problem::IdWithColon));
    }
    if secret.strip_prefix(id).is_some_and(|rest| rest.starts_with(':')) {
        return Err(Part::KeySecret.has(Problem::WholeKeyAsSecret));
    }
    halves(id, secret)
}

fn halves<'a>(id: &'a str, secret: &'a str) -> Result<(&'a str, &'a str), CredentialError> {
    if id.len() > MAX_KEY_ID_LEN {
        return Err(Part::KeyId.has(Problem::TooLong { most: MAX_KEY_ID_LEN }));
    }
    if is_hex_secret(id) && is_uuid(secret) {
        return Err(Part::Key.has(Problem::Swapped));
    }
    Ok((id, secret))
}

/// The token of a login.
///
/// Source of its alphabet: RFC 6750, section 2.1.
pub(super) fn token(input: &[u8]) -> Result<&str, CredentialError> {
    let token = accept(Part::Token, input)?;
    if token.contains(':') {
        return Err(Part::Token.has(Problem::KeyAsToken));
    }
    let without_padding = token.trim_end_matches('=');
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte);
    if without_padding.is_empty() || !without_padding.bytes().all(is_allowed) {
        return Err(Part::Token.has(Problem::NoToken));
    }
    Ok(token)
}

/// The user id of an account, such as `github|1`.
pub(super) fn account(input: &[u8]) -> Result<&str, CredentialError> {
    let account = accept(Part::Account, input)?;
    // It is shown, so what may be a secret is refused.
    if may_be_credential(account.as_bytes()) {
        return Err(Part::Account.has(Problem::CredentialAsAccount));
    }
    if account.len() > MAX_ACCOUNT_LEN {
        return Err(Part::Account.has(Problem::TooLong { most: MAX_ACCOUNT_LEN }));
    }
    Ok(account)
}

/// Trims a value and refuses what cannot be one.
fn accept(part: Part, input: &[u8]) -> Result<&str, CredentialError> {
    if input.starts_with(b"\xFF\xFE") || input.starts_with(b"\xFE\xFF") {
        return Err(part.has(Problem::Utf16));
    }
    let value = trim(input);
    if value.is_empty() {
        return Err(part.has(Problem::Empty));
    }
    // Before each byte is checked: the name of the mistake helps more than the position of a blank.
    if let Ok(text) = std::str::from_utf8(value) {
        refuse_shape(part, text)?;
    }
    if value.len() > MAX_VALUE_LEN {
        return Err(part.has(Problem::TooLong { most: MAX_VALUE_LEN }));
    }
    let invisible = value.iter().position(|byte| !byte.is_ascii_graphic());
    match std::str::from_utf8(value) {
        Ok(text) if invisible.is_none() => Ok(text),
        _ => {
            let index = invisible.unwrap_or_default();
            // `value` is a part of `input`: the distance between the two starts was trimmed.
            let trimmed = value.as_ptr().addr() - input.as_ptr().addr();
            Err(part.has(Problem::NotVisible { position: trimmed + index, class: class(value[index]) }))
        }
    }
}

fn class(byte: u8) -> &'static str {
    match byte {
        b'\n' | b'\r' => "a line break",
        b' ' | b'\t' => "a blank",
        byte if byte.is_ascii() => "a control character",
        _ => "a byte outside ASCII",
    }
}

/// What is left of a text without the byte order mark, blanks and line breaks at its ends.
pub(crate) fn trim(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text).trim_ascii()
}

/// Whether a text that should be something else, and would be shown, may be a credential in the wrong place.
///
/// It rather says so once too often: a path for which it does can be written with `./` in front.
pub(crate) fn may_be_credential(text: &[u8]) -> bool {
    let text = trim(text);
    let is_drive = matches!(text, [letter, b':', b'/' | b'\\', ..] if letter.is_ascii_alphabetic());
    let is_plainly_a_path = is_drive || matches!(text, [b'/' | b'\\' | b'.' | b'~', ..]);
    let suspicious = |&byte: &u8| matches!(byte, b':' | b'=' | b'"' | b'\'' | b'`') || byte.is_ascii_whitespace();
    !is_plainly_a_path && (text.starts_with(b"eyJ") || text.iter().any(suspicious))
}

/// Whether a text stands in quotes, or in half of them.
pub(crate) fn has_quote_at_an_end(text: &str) -> bool {
    let is_quote = |c: char| matches!(c, '"' | '\'' | '`' | '“' | '”' | '‘' | '’' | '«' | '»');
    text.starts_with(is_quote) || text.ends_with(is_quote)
}

/// A shape that surely is no credential, and what an error says of it behind "the key", "the token" and so on.
struct Shape {
    fits: fn(Part, &str) -> bool,
    says: &'static str,
}

fn refuse_shape(part: Part, text: &str) -> Result<(), CredentialError> {
    for scheme in ["Key", "Bearer", "Basic", "Token"] {
        if strip_prefix(text, scheme).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_whitespace())) {
            return Err(part.has(Problem::WithScheme(scheme)));
        }
    }
    match SHAPES.iter().find(|shape| (shape.fits)(part, text)) {
        Some(shape) => Err(part.has(Problem::Shape(shape.says))),
        None => Ok(()),
    }
}

/// The first that fits is reported, so what is more special stands further up.
///
/// A whole key is judged first, then each of its halves. So what stands at its end is judged as the end of its secret.
static SHAPES: &[Shape] = &[
    Shape {
        fits: |_, text| starts_with_any(text, &["authorization:", "authorization="]),
        says: "is a whole header: remove `authorization:` and the scheme, and keep only what follows",
    },
    Shape {
        fits: |_, text| starts_with_any(text, &["fal_key=", "fal_key_id=", "fal_key_secret="]) || is_assignment(text),
        says: "starts with a name and `=`, such as `FAL_KEY=`: keep only what stands behind the `=`",
    },
    Shape {
        fits: |_, text| starts_with_any(text, &["fal_key:", "fal_key_id:", "fal_key_secret:", "fal_api_key:"]),
        says: "starts with a name and `:`, such as `FAL_KEY:`: keep only what stands behind that `:`",
    },
    Shape {
        fits: |_, text| is_template(text),
        says: "holds a template that nothing has filled in, such as `${…}` or `{{…}}`: store the value itself",
    },
    Shape {
        fits: |_, text| starts_with_any(text, &["-----BEGIN"]),
        says: "is a PEM or PGP block: store the value itself, and in clear",
    },
    Shape { fits: |_, text| is_encrypted(text), says: "is encrypted: decrypt it, and store the result" },
    Shape {
        fits: |_, text| starts_with_any(text, URLS),
        says: "is a URL: store the value itself, not the address where it is kept",
    },
    Shape {
        fits: |_, text| starts_with_any(text, REFERENCES) || (text.starts_with("ref+") && text.contains("://")),
        says: "is a reference to a secret, such as `op://…` or `arn:…`, that nothing has resolved: store the secret \
               itself",
    },
    Shape {
        fits: |_, text| is_markup(text),
        says: "is HTML or XML, such as an error page of the place that should have answered with the value",
    },
    Shape {
        fits: |part, text| text.starts_with('<') || (part != Part::Key && text.ends_with('>')),
        says: "has angle brackets around it, as a placeholder has: store the value itself, without the brackets",
    },
    Shape {
        fits: |_, text| text.starts_with('{') && text.contains('"'),
        says: "is a JSON object: store only the value in it",
    },
    Shape {
        fits: |_, text| text.starts_with('[') || text.starts_with("- "),
        says: "is a list: store one value only, and nothing around it",
    },
    Shape { fits: |_, text| has_quote_at_an_end(text), says: "has a quote at an end: remove the quotes around it" },
    Shape {
        fits: |part, text| text.starts_with(['(', '{']) || (part != Part::Key && text.ends_with([')', ']', '}'])),
        says: "has a bracket at an end: remove the brackets around it",
    },
    Shape {
        fits: |part, text| is_path(part, text),
        says: "is the path of a file: store what is in that file, or name the file where a path is asked for",
    },
    Shape { fits: |_, text| text.ends_with([',', ';']), says: "ends with a comma or a semicolon: remove it" },
    Shape { fits: |_, text| is_list_of_keys(text), says: "is a list of keys: store one key only" },
    Shape {
        fits: |_, text| text.ends_with("\\n") || text.ends_with("\\r"),
        says: "ends with a line break that is written out as `\\n`: remove these two characters",
    },
    Shape {
        fits: |_, text| text.contains("***") || is_one_character_repeated(text),
        says: "is masked, such as `***`: copy the value itself, not what a page or a log shows of it",
    },
    Shape {
        fits: |_, text| is_placeholder(text),
        says: "is a placeholder, such as `undefined`, `null` or `changeme`: store the value itself",
    },
    Shape { fits: is_base64_of_a_credential, says: "is in base64: decode it once" },
];

/// Beginnings of URLs, and of the names that databases have in configurations.
const URLS: &[&str] = &["http://", "https://", "ftp://", "ssh://", "git://", "postgres://", "redis://", "data:"];

/// Beginnings of what a tool should have replaced by a secret. No id of fal's is one of these words.
const REFERENCES: &[&str] = &[
    "arn:",
    "op://",
    "vault:",
    "hashivault:",
    "secretref:",
    "secret://",
    "secrets://",
    "secretmanager:",
    "secretsmanager:",
    "secretKeyRef:",
    "aws-sm:",
    "awssm:",
    "aws-ssm:",
    "ssm:",
    "gcp-sm:",
    "gcpsm:",
    "sm://",
    "s3://",
    "gs://",
    "azkv:",
    "akv:",
    "keyvault:",
    "azurekeyvault:",
    "@Microsoft.KeyVault(",
    "keyring:",
    "keychain:",
    "kms:",
    "sops:",
    "doppler:",
    "infisical:",
    "bitwarden:",
    "bws:",
    "berglas:",
    "env:",
    "$env:",
    "file:",
    "projects/",
    "!secret",
    "!env",
    "!ref",
    "!sub",
    "!getatt",
    "!include",
];

/// What programs write for a value that is missing, and people for one that is still to come.
const PLACEHOLDERS: &[&str] = &[
    "undefined",
    "null",
    "none",
    "nil",
    "nan",
    "changeme",
    "change-me",
    "change_me",
    "replaceme",
    "replace-me",
    "replace_me",
    "placeholder",
    "redacted",
    "todo",
    "fixme",
    "tbd",
    "insert-key-here",
];

fn is_assignment(text: &str) -> bool {
    let text = text.strip_prefix("export ").unwrap_or(text).trim_start();
    let Some((name, value)) = text.split_once('=') else {
        return false;
    };
    let name = name.trim_end();
    // In base64, which ids and secrets may be, a `=` stands at the end only.
    let has_value = !value.is_empty() && !value.starts_with(['=', ':']);
    let speaks_of_a_key = || {
        let name = Zeroizing::new(name.to_ascii_lowercase());
        ["key", "token", "secret", "password", "fal"].iter().any(|word| name.contains(word))
    };
    has_value && is_name(name) && ((is_upper(name) && name.contains('_')) || speaks_of_a_key())
}

fn is_template(text: &str) -> bool {
    let has_pair = |open: &str, close: &str| text.split_once(open).is_some_and(|(_, rest)| rest.contains(close));
    let between = |around: &str| text.strip_prefix(around).and_then(|rest| rest.strip_suffix(around));
    has_pair("{{", "}}")
        || has_pair("${", "}")
        || has_pair("$(", ")")
        || has_pair("#{", "}")
        || has_pair("<%", "%>")
        || text.strip_prefix('$').is_some_and(|name| is_name(name) && is_upper(name))
        || between("%").is_some_and(is_name)
        || between("__").is_some_and(|name| is_name(name) && is_upper(name))
}

fn is_encrypted(text: &str) -> bool {
    let is_age = text.starts_with("age1") && text.len() >= 58 && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_age
        || starts_with_any(
            text,
            &[
                "ENC[",
                "ENC(",
                "{cipher}",
                "encrypted:",
                "!vault",
                "$ANSIBLE_VAULT",
                "age-encryption.org/",
                "AGE-SECRET-KEY-",
            ],
        )
}

fn is_markup(text: &str) -> bool {
    let starts = ["<!", "<?", "<html", "<head", "<body", "<error"];
    starts_with_any(text, &starts) || (text.starts_with('<') && (text.contains("</") || text.contains("/>")))
}

fn is_path(part: Part, text: &str) -> bool {
    let is_drive = matches!(text.as_bytes(), [letter, b':', b'\\', ..] if letter.is_ascii_alphabetic());
    let is_relative = starts_with_any(text, &["./", "../", "~/", "\\\\"]);
    let is_absolute = match part {
        Part::Key | Part::KeyId | Part::Account => text.starts_with('/'),
        Part::Token => starts_with_any(text, &["/run/", "/var/", "/etc/", "/mnt/", "/tmp/", "/opt/", "/vault/"]),
        Part::KeySecret => false, // base64 may begin with a slash
    };
    is_drive || is_relative || is_absolute
}

/// Whether there are several keys whose ids are of one length, between commas or semicolons.
fn is_list_of_keys(text: &str) -> bool {
    let id_length = |key: &str| {
        key.split_once(':').filter(|(id, secret)| !id.is_empty() && !secret.is_empty()).map(|(id, _)| id.len())
    };
    let mut keys = text.split([',', ';']).map(|key| id_length(key.trim()));
    match (keys.next().flatten(), keys.next().flatten()) {
        (Some(first), Some(second)) => first == second && keys.all(|length| length == Some(first)),
        _ => false,
    }
}

fn is_one_character_repeated(text: &str) -> bool {
    let first = text.chars().next().filter(|first| matches!(first, '*' | 'x' | 'X' | '.' | '_' | '-' | '?'));
    first.is_some_and(|first| text.len() >= 3 && text.chars().all(|c| c == first))
}

fn is_placeholder(text: &str) -> bool {
    starts_with_any(text, &["your-", "your_"]) || PLACEHOLDERS.iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Whether a text holds in base64 what should be in it in clear.
fn is_base64_of_a_credential(part: Part, text: &str) -> bool {
    if text.len() > MAX_VALUE_LEN {
        return false;
    }
    // The command `base64` breaks its lines.
    let mut encoded = Zeroizing::new(Vec::with_capacity(text.len())); // so that it never moves
    encoded.extend(text.bytes().filter(|byte| !byte.is_ascii_whitespace()));
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    [STANDARD, URL_SAFE].iter().any(|alphabet| {
        let mut decoded = Zeroizing::new(vec![0; decoded_len_estimate(encoded.len())]);
        let Ok(length) = GeneralPurpose::new(alphabet, config).decode_slice(&*encoded, &mut decoded) else {
            return false;
        };
        let Ok(inner) = std::str::from_utf8(trim(&decoded[..length])) else {
            return false;
        };
        match part {
            Part::Key => {
                let has_halves = inner.split_once(':').is_some_and(|(id, secret)| !id.is_empty() && !secret.is_empty());
                has_halves && inner.bytes().all(|byte| byte.is_ascii_graphic())
            }
            Part::KeyId | Part::KeySecret | Part::Account => is_uuid(inner) || is_hex_secret(inner),
            Part::Token => inner.starts_with("eyJ") && inner.matches('.').count() == 2,
        }
    })
}

/// What a text without a `:` is, where a key should be.
fn no_colon(text: &str) -> Problem {
    if text.starts_with("eyJ") {
        Problem::TokenAsKey
    } else if text.contains("%3A") || text.contains("%3a") {
        Problem::UrlEncoded
    } else {
        Problem::NoColon
    }
}

/// Whether it has the form that the ids of fal's keys have today.
///
/// Source: GitGuardian's page of its detector of fal keys.
fn is_uuid(text: &str) -> bool {
    let is_hyphen = |index: usize| matches!(index, 8 | 13 | 18 | 23);
    text.len() == 36
        && text.bytes().enumerate().all(
            |(index, byte)| {
                if is_hyphen(index) { byte == b'-' } else { byte.is_ascii_hexdigit() }
            },
        )
}

/// Whether it has the form that the secrets of fal's keys have today. Source: as for [`is_uuid`].
fn is_hex_secret(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether it may be the name of a variable.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_upper(text: &str) -> bool {
    !text.bytes().any(|byte| byte.is_ascii_lowercase())
}

/// Without regard to case.
fn starts_with_any(text: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| strip_prefix(text, prefix).is_some())
}

/// Without regard to case.
fn strip_prefix<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
    use proptest::prelude::*;

    use super::*;
    use crate::credential::Credential;

    const UUID: &str = "0f3b9c1e-7d52-4a86-9e14-c0ffee15dead";
    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015";

    fn key_error(value: impl AsRef<[u8]>) -> String {
        Credential::key(value).unwrap_err().to_string()
    }

    fn pair_error(id: &str, secret: &str) -> String {
        Credential::key_pair(id, secret).unwrap_err().to_string()
    }

    fn token_error(value: impl AsRef<[u8]>) -> String {
        Credential::bearer(value).unwrap_err().to_string()
    }

    #[test]
    fn the_ends_of_a_text_are_trimmed() {
        for value in ["id:secret\n", "id:secret\r\n", " \t id:secret \n\n", "\u{feff}id:secret", "\u{feff} id:secret"] {
            assert_eq!(Credential::key(value).unwrap().header(), "Key id:secret", "{value:?}");
        }
        assert_eq!(Credential::key_pair(" id\n", "\tsecret\n").unwrap().header(), "Key id:secret");
        assert_eq!(Credential::bearer("token\n").unwrap().header(), "Bearer token");
    }

    #[test]
    fn a_blank_text_is_empty() {
        for value in ["", " ", "\n", "\u{feff}", " \t\r\n"] {
            let error = Credential::key(value).unwrap_err();
            assert!(error.is_empty(), "{value:?}");
            assert_eq!(error.to_string(), "the key is empty");
        }
    }

    #[test]
    fn a_key_needs_something_on_both_sides_of_a_colon() {
        assert_eq!(key_error("idsecret"), "the key has no `:`; a fal key has the form `id:secret`");
        assert_eq!(key_error(":secret"), "the key has nothing before its `:`; a fal key has the form `id:secret`");
        assert_eq!(key_error("id:"), "the key has nothing behind its `:`; a fal key has the form `id:secret`");
        assert!(Credential::key(":").is_err());
    }

    #[test]
    fn an_invisible_byte_is_refused_with_its_place_and_class() {
        for (value, position, class) in [
            (&b"id:sec\nret"[..], 6, "a line break"),
            (b"id:sec\rret", 6, "a line break"),
            (b"id:sec ret", 6, "a blank"),
            (b"id:sec\0ret", 6, "a control character"),
            (b"id:sec\x7Fret", 6, "a control character"),
            (b"id:sec\xC3\xA9", 6, "a byte outside ASCII"),
            (b"\xFFid:secret", 0, "a byte outside ASCII"),
            (b" \n id:sec\tret", 9, "a blank"),
            (b"\xEF\xBB\xBFid:s\xEF\xBB\xBF", 7, "a byte outside ASCII"),
        ] {
            let error = Credential::key(value).unwrap_err();
            assert_eq!(error.position(), Some(position), "{value:?}");
            assert!(error.to_string().contains(class), "{error}");
        }
    }

    #[test]
    fn utf_16_is_named() {
        assert_eq!(key_error(b"\xFF\xFEi\0d\0:\0"), "the key is UTF-16 text: save it as UTF-8");
    }

    #[test]
    fn a_pair_names_the_half_that_is_wrong() {
        assert_eq!(pair_error("", "secret"), "the key id is empty");
        assert_eq!(pair_error("id", " "), "the key secret is empty");
        assert!(pair_error("id:secret", "secret").starts_with("the key id holds a `:`"));
        assert!(pair_error("id", "id:secret").starts_with("the key secret is the whole key"));
        assert_eq!(Credential::key_pair("id", "se:cret").unwrap().header(), "Key id:se:cret");
    }

    #[test]
    fn values_have_a_greatest_length() {
        assert!(Credential::bearer("t".repeat(MAX_VALUE_LEN)).is_ok());
        assert!(Credential::bearer("t".repeat(MAX_VALUE_LEN + 1)).is_err());
        assert!(Credential::key(format!("{}:s", "i".repeat(MAX_KEY_ID_LEN))).is_ok());
        assert!(Credential::key(format!("{}:s", "i".repeat(MAX_KEY_ID_LEN + 1))).is_err());
        assert!(Credential::key_pair("i".repeat(MAX_KEY_ID_LEN + 1), "s").is_err());
    }

    /// Texts that stand where a whole key should, with a part of what the error says of each.
    const NO_KEYS: &[(&str, &str)] = &[
        ("Key id:secret", "starts with `Key `: remove that"),
        ("key id:secret", "starts with `Key `"),
        ("Bearer id:secret", "starts with `Bearer `"),
        ("Basic\tid:secret", "starts with `Basic `"),
        ("Authorization: Key id:secret", "whole header"),
        ("FAL_KEY=id:secret", "behind the `=`"),
        ("FAL_API_KEY=id:secret", "behind the `=`"),
        ("export FAL_KEY=id:secret", "behind the `=`"),
        ("FAL_KEY = \"id:secret\"", "behind the `=`"),
        ("ACME_CREDENTIAL=id:secret", "behind the `=`"),
        ("fal_key: id:secret", "behind that `:`"),
        ("FAL_KEY:id:secret", "behind that `:`"),
        ("{{key}}:{{secret}}", "template"),
        ("{{ .Data.key }}", "template"),
        ("${A}:${B}", "template"),
        ("${FAL_KEY}", "template"),
        ("prefix-${ID}:secret", "template"),
        ("id:$(cat /run/key)", "template"),
        ("<%= key %>:x", "template"),
        ("$A_B:$A_C", "the key id holds a template"),
        ("id:$FAL_SECRET", "the key secret holds a template"),
        ("%FAL_KEY_ID%:%FAL_KEY_SECRET%", "the key id holds a template"),
        ("__FAL_ID__:__FAL_SECRET__", "the key id holds a template"),
        ("-----BEGIN PGP MESSAGE-----\nabc:def", "PEM"),
        ("ENC[AES256_GCM,data:abc,iv:def]", "encrypted"),
        ("ENC(abc):ENC(def)", "encrypted"),
        ("id:ENC[AES256_GCM,data:abc]", "the key secret is encrypted"),
        ("encrypted:BDqDBibm4wsYqMpCjTQ6BsDHmMadg9K3dAt", "encrypted"),
        ("{cipher}682bc583f4641835fa2db009355293665d2647dade3375c0", "encrypted"),
        ("!vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3161", "encrypted"),
        ("$ANSIBLE_VAULT;1.1;AES256\n3161", "encrypted"),
        ("age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p", "encrypted"),
        ("<!DOCTYPE html><p>a:b</p>", "HTML"),
        ("<html>a:b</html>", "HTML"),
        ("<Error><Code>AccessDenied</Code></Error>", "HTML"),
        ("<key_id>:<key_secret>", "angle brackets"),
        ("<your key>", "angle brackets"),
        ("id:<secret>", "angle brackets"),
        (r#"{"FAL_KEY":"id:secret"}"#, "JSON object"),
        (r#"{"id":"a","secret":"b"}"#, "JSON object"),
        ("{\n  \"id\": 1\n}", "JSON object"),
        (r#"["id:secret"]"#, "list"),
        ("[id:secret]", "list"),
        ("- id:secret", "list"),
        ("\"id:secret\"", "remove the quotes"),
        ("'id:secret'", "remove the quotes"),
        ("`id:secret`", "remove the quotes"),
        ("id:secret\"", "remove the quotes"),
        ("“id:secret”", "remove the quotes"),
        (r#""id":"secret""#, "remove the quotes"),
        (r#"id":"secret"#, "the key id has a quote"),
        ("(id:secret)", "remove the brackets"),
        ("id:secret}", "remove the brackets"),
        ("{id}:{secret}", "remove the brackets"),
        ("id:(secret", "the key secret has a bracket"),
        ("https://vault/v1/x", "URL"),
        ("HTTP://vault:8200", "URL"),
        ("arn:aws:secretsmanager:eu-west-1:123456789012:secret:fal-AbCdEf", "reference"),
        ("op://vault/fal/credential", "reference"),
        ("vault:secret/data/fal#key", "reference"),
        ("vault:v1:8SDd3WHDOjf7mq69CyCqYjBXAiQQAVZRkFM13ok481zoCmHnSeDX9vyf7w==", "reference"),
        ("projects/1234/secrets/fal/versions/latest", "reference"),
        ("secretref:fal-key", "reference"),
        ("@Microsoft.KeyVault(SecretUri=https://x.vault.azure.net/secrets/fal)", "reference"),
        ("keyring:fal", "reference"),
        ("ref+vault://secret/fal#key", "reference"),
        ("file:/run/secrets/fal", "reference"),
        ("env:FAL_KEY", "reference"),
        ("$env:FAL_KEY", "reference"),
        ("!secret fal_key", "reference"),
        ("/run/secrets/fal:x", "path"),
        ("./key", "path"),
        ("C:\\keys\\fal", "path"),
        ("id:secret,", "comma"),
        ("id:secret;", "comma"),
        ("id:secret,id:secret", "list of keys"),
        ("id-1:secret; id-2:secret; id-3:secret", "list of keys"),
        ("id:secret\\n", "line break that is written out"),
        ("id:***", "masked"),
        ("id:ab***yz", "masked"),
        ("xxxx:xxxx", "the key id is masked"),
        ("undefined:undefined", "the key id is a placeholder"),
        ("undefined", "the key is a placeholder"),
        ("null:null", "placeholder"),
        ("None:None", "placeholder"),
        ("nil:nil", "placeholder"),
        ("id:undefined", "the key secret is a placeholder"),
        ("changeme:CHANGEME", "placeholder"),
        ("your-key-id:your-key-secret", "placeholder"),
        ("FAL_KEY=", "behind the `=`"),
        ("id%3Asecret", "URL-encoded"),
        ("eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "token of a login"),
    ];

    #[test]
    fn what_is_surely_no_key_is_named_and_not_shown() {
        for (text, phrase) in NO_KEYS {
            let error = Credential::key(text).map(drop).expect_err(text).to_string();
            assert!(error.contains(phrase), "{text}: {error}");
            let is_example = ["undefined", "FAL_KEY="].contains(text); // of the sentence
            let is_shown = error.contains(text) && !is_example;
            assert!(error.len() < 200 && !is_shown, "{error}");
        }
    }

    #[test]
    fn every_row_of_the_table_has_an_example() {
        let mut said: BTreeSet<String> = NO_KEYS.iter().map(|(text, _)| key_error(text)).collect();
        said.insert(key_error(STANDARD.encode("id:secret")));
        for shape in SHAPES {
            assert!(said.iter().any(|error| error.ends_with(shape.says)), "no example: {}", shape.says);
        }
    }

    #[test]
    fn the_halves_of_a_pair_are_judged_like_those_of_a_key() {
        for half in [
            "${A}",
            "<id>",
            "null",
            "{{ id }}",
            "$FAL_KEY_ID",
            "%ID%",
            "undefined",
            "op://a/b",
            "{\"a\":1}",
            "'id'",
            "FAL_KEY_ID=id",
            "vault:secret/fal",
            "ENC[abc]",
            "***",
            "id,",
            "./id",
            "arn:aws:x",
            "Bearer id",
            "[id]",
        ] {
            assert!(pair_error(half, "secret").starts_with("the key id "), "{half}");
            assert!(pair_error("id", half).starts_with("the key secret "), "{half}");
        }
    }

    #[test]
    fn what_is_surely_no_token_is_refused() {
        for (text, phrase) in [
            (r#"{"access_token":"abc"}"#, "JSON object"),
            ("${TOKEN}", "template"),
            ("$TOKEN", "template"),
            ("undefined", "placeholder"),
            ("null", "placeholder"),
            ("op://vault/fal/token", "reference"),
            ("https://example.com/token", "URL"),
            ("<html>no</html>", "HTML"),
            ("id:secret", "which no token has"),
            ("Bearer abc", "starts with `Bearer `"),
            ("FAL_TOKEN=abc", "behind the `=`"),
            ("/run/secrets/token", "path"),
            ("\"abc\"", "quote"),
            ("abc,", "comma"),
            ("ab|c", "a character that no token has"),
            ("=", "a character that no token has"),
            ("ab=c", "a character that no token has"),
        ] {
            let error = token_error(text);
            assert!(error.starts_with("the token ") && error.contains(phrase), "{text}: {error}");
        }
        for token in ["abc", "e30.e30.c2ln", "/abc+def==", "a-b._~c"] {
            assert!(Credential::bearer(token).is_ok(), "{token}");
        }
    }

    #[test]
    fn swapped_halves_are_refused() {
        let says = "the halves seem to be swapped";
        assert!(key_error(format!("{HEX}:{UUID}")).ends_with(says));
        assert!(pair_error(HEX, UUID).ends_with(says));
        for (id, secret) in [(UUID, HEX), (UUID, UUID), (HEX, HEX), (&HEX[1..], UUID), (HEX, &UUID[1..])] {
            assert!(Credential::key_pair(id, secret).is_ok(), "{id} {secret}");
        }
    }

    #[test]
    fn base64_of_a_credential_is_refused() {
        let key = format!("{UUID}:{HEX}\n");
        let wrapped = STANDARD.encode(&key);
        let wrapped = format!("{}\n{}\n", &wrapped[..76], &wrapped[76..]);
        let jwt = format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", "e30".repeat(40));
        for error in [
            key_error(STANDARD.encode(&key)),
            key_error(STANDARD_NO_PAD.encode(&key)),
            key_error(wrapped),
            key_error(URL_SAFE.encode("id:\u{7e}\u{7f}\u{7e}".replace('\u{7f}', "~?"))),
            pair_error(&STANDARD.encode(UUID), HEX),
            pair_error(UUID, &STANDARD.encode(format!("{HEX}\n"))),
            key_error(format!("{}:{}", STANDARD.encode(UUID), STANDARD.encode(HEX))),
            token_error(STANDARD.encode(jwt)),
        ] {
            assert!(error.ends_with("is in base64: decode it once"), "{error}");
        }
    }

    #[test]
    fn unusual_keys_are_accepted() {
        for key in [
            "abc123def456:sk_live_4eC39HqLyjWDarjtT1zdp7dc",
            &format!("{UUID}:{HEX}"),
            "id:se:cr:et",
            "id::",
            "my-key.v2_prod:secret",
            "Keyless:secret",
            "key:value",
            "bearer-1:secret",
            "nullable:undefined-behaviour",
            "aWQ=:c2VjcmV0",
            "id:ab+/cd==",
            "id://8Qk+ZA==",
            "id:/run/8Qk+ZA==",
            "0:0",
            "id:pa$$word",
            "id:a,b:c",
            "id:a=b",
            "id:]abc",
            "id:ab(c)d",
            "envoy:file",
        ] {
            assert_eq!(Credential::key(key).unwrap().header(), &format!("Key {key}"));
        }
    }

    proptest! {
        /// Over what services use for the ids and the secrets of their keys.
        #[test]
        fn plausible_keys_are_accepted(
            id in "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[a-z0-9]{12,24}|[A-Za-z0-9][A-Za-z0-9._-]{6,40}[A-Za-z0-9]",
            secret in "[0-9a-f]{32}|sk_(live|test)_[A-Za-z0-9]{24}|[A-Za-z0-9+/]{43}=|[A-Za-z0-9_-]{20,64}|[a-z0-9]{8}:[a-z0-9]{8}",
        ) {
            let key = format!("{id}:{secret}");
            let credential = Credential::key(&key).unwrap();
            prop_assert_eq!(credential.header(), &format!("Key {key}"));
            prop_assert!(Credential::key_pair(&id, &secret).is_ok());
        }
    }

    #[test]
    fn a_credential_in_the_wrong_place_is_recognised() {
        for text in [
            "id:secret",
            "Key id:secret",
            "\"id:secret\"",
            "'id",
            "FAL_KEY=id:secret",
            "Bearer token",
            "id:se/cret",
            "id:secret extra",
            "a\nb",
            "eyJhbGciOiJSUzI1NiJ9",
        ] {
            assert!(may_be_credential(text.as_bytes()), "{text}");
        }
        for text in
            ["/run/secrets/fal key", "./id:x", "../a b", "~/fal", "C:\\key", "c:/key", "fal_key", "dir/fal_key", ""]
        {
            assert!(!may_be_credential(text.as_bytes()), "{text}");
        }
    }
}
