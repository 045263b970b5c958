//! Whatever `Retry-After` says, it is a wait or nothing.

#![no_main]

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use libfuzzer_sys::fuzz_target;

// It is private: the source itself is compiled here, so that the crate need not show it to anyone.
#[path = "../../src/retry/retry_after.rs"]
mod retry_after;

/// Up to the year 9999, where `Retry-After` ends as well.
const LAST_SECOND: u64 = 253_402_300_799;

fuzz_target!(|input: (u64, &[u8])| {
    let (now, value) = input;
    let now = Duration::from_secs(now % LAST_SECOND);
    let Ok(header) = HeaderValue::from_bytes(value) else { return };
    let headers = HeaderMap::from_iter([(RETRY_AFTER, header)]);

    let wait = retry_after::retry_after(&headers, SystemTime::UNIX_EPOCH + now);

    let text = std::str::from_utf8(value.trim_ascii()).unwrap_or_default();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let seconds =
            text.bytes().fold(0_u64, |sum, digit| sum.saturating_mul(10).saturating_add((digit - b'0').into()));
        assert_eq!(wait, Some(Duration::from_secs(seconds)));
    } else if let Some(wait) = wait {
        assert!(text.contains(' '), "{text:?} is no date"); // none of its three forms is without
        assert!(wait + now <= Duration::from_secs(LAST_SECOND), "{text:?} is {wait:?}");
    }
});
