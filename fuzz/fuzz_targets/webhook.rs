//! A delivery of a webhook that is believed has each of its four headers once and in its form, a timestamp near the clock,
//! and a signature of one of the keys; and one that has all of these is believed. A set of keys is read without harm.
//!
//! The input is text: the time now in seconds since 1970, a line with a JSON Web Key Set, lines with headers whose names
//! have no `x-fal-webhook-`, an empty line, and the body. `OURS` in the set is the public key of the fuzz target, and
//! `SIGNED` as a signature is a good one with that key, of the first value of each other header.

#![no_main]

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{Signature, Signer as _, SigningKey};
use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest as _, Sha256};
use tower_fal::webhook::{Accounts, PublicKeys, Rejection, verify};

const PREFIX: &str = "x-fal-webhook-";
const NAMES: [&str; 4] = ["request-id", "user-id", "timestamp", "signature"];

/// The last second of the year 9999, so that the time is one of the system's.
const LAST_SECOND: u64 = 253_402_300_799;

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is signed, given the first value of each of the three headers.
fn message(headers: &HeaderMap, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    for name in &NAMES[..3] {
        message.extend_from_slice(headers.get(format!("{PREFIX}{name}")).map_or(&b""[..], HeaderValue::as_bytes));
        message.push(b'\n');
    }
    message.extend_from_slice(hexadecimal(&Sha256::digest(body)).as_bytes());
    message
}

fuzz_target!(|input: &[u8]| {
    let mut lines = input.splitn(3, |&byte| byte == b'\n');
    let now = lines.next().and_then(|line| std::str::from_utf8(line).ok()?.trim().parse::<u64>().ok());
    let now = now.unwrap_or(1_800_000_000) % LAST_SECOND;
    let set = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    let rest = lines.next().unwrap_or_default();
    let end = rest.windows(2).position(|two| two == b"\n\n").unwrap_or(rest.len());
    let (head, body) = (&rest[..end], rest.get(end + 2..).unwrap_or_default());

    let ours = SigningKey::from_bytes(&[7; 32]);
    let x = URL_SAFE_NO_PAD.encode(ours.verifying_key());
    let read = PublicKeys::from_jwks(set.replace("OURS", &x).as_bytes());
    if let Ok(keys) = &read {
        assert!((1..=32).contains(&keys.len()));
    }
    // Whatever the set was, there is one to go on with.
    let usual = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{x}"}}]}}"#);
    let has_ours = read.is_err();
    let keys = read.unwrap_or_else(|_| PublicKeys::from_jwks(usual.as_bytes()).expect("a key"));

    let mut headers = HeaderMap::new();
    for line in head.split(|&byte| byte == b'\n') {
        let mut parts = line.splitn(2, |&byte| byte == b':');
        let (name, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let name = [PREFIX.as_bytes(), name].concat();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    let signed = message(&headers, body);
    let good = HeaderValue::from_str(&hexadecimal(&ours.sign(&signed).to_bytes())).expect("digits");
    let mut is_signed = false;
    for (name, value) in &mut headers {
        if name.as_str().ends_with("signature") && value.as_bytes() == b"SIGNED" {
            *value = good.clone();
            is_signed = true;
        }
    }

    let judged = verify(&headers, body, &keys, &Accounts::any(), SystemTime::UNIX_EPOCH + Duration::from_secs(now));

    let once = NAMES.map(|name| {
        let mut values = headers.get_all(format!("{PREFIX}{name}")).iter();
        values.next().filter(|_| values.next().is_none()).map(HeaderValue::as_bytes)
    });
    let [Some(request), Some(user), Some(timestamp), Some(signature)] = once else {
        assert!(matches!(
            judged,
            Err(Rejection::MissingHeader(_) | Rejection::RepeatedHeader(_) | Rejection::InvalidHeader(_))
        ));
        return;
    };
    let is_id = |id: &[u8]| !id.is_empty() && id.len() <= 256 && id.iter().all(|byte| (b'!'..=b'~').contains(byte));
    let digits = !timestamp.is_empty() && timestamp.len() <= 20 && timestamp.iter().all(u8::is_ascii_digit);
    // Saturating: what is no number of 20 digits at most is refused below, however long it is.
    let seconds = timestamp
        .iter()
        .fold(0_u128, |sum, digit| sum.saturating_mul(10).saturating_add(u128::from(digit.wrapping_sub(b'0'))));
    let is_formed = is_id(request)
        && is_id(user)
        && digits
        && seconds <= u128::from(u64::MAX)
        && signature.len() == 128
        && signature.iter().all(u8::is_ascii_hexdigit);
    assert_eq!(is_formed, !matches!(judged, Err(Rejection::InvalidHeader(_))), "{judged:?}");
    let is_near = seconds.abs_diff(u128::from(now)) <= 300;
    match judged {
        Ok(webhook) => {
            assert!(is_near);
            assert_eq!((webhook.request_id().as_bytes(), webhook.user_id().as_bytes()), (request, user));
            // Nobody but the fuzz target can sign for its key; of others the input does not have the secret.
            let bytes: Vec<u8> = (0..64)
                .map(|at| u8::from_str_radix(std::str::from_utf8(&signature[2 * at..2 * at + 2]).expect("digits"), 16))
                .map(|byte| byte.expect("a byte"))
                .collect();
            let signature = Signature::from_slice(&bytes).expect("64 bytes");
            assert!(ours.verifying_key().verify_strict(&signed, &signature).is_ok());
        }
        Err(Rejection::Stale(_)) => assert!(!is_near),
        Err(Rejection::BadSignature) => assert!(!(is_signed && has_ours)),
        Err(_) => assert!(!is_formed),
    }
});
