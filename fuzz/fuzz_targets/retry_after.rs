//! `Retry-After` is read as a wait, or as nothing.
//!
//! The input is the header's value. A second line is the time now, in seconds since 1970.

#![no_main]

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use libfuzzer_sys::fuzz_target;
use tower_fal::__fuzz::retry_after;

/// The last second of the year 9999, where the dates of `Retry-After` end as well.
const LAST_SECOND: u64 = 253_402_300_799;

/// The time now, where the input has none: in November 1994, as the dates in RFC 9110.
const NOW: u64 = 784_111_777;

fuzz_target!(|input: &[u8]| {
    let mut lines = input.splitn(2, |&byte| byte == b'\n');
    let value = lines.next().unwrap_or_default();
    let now = lines.next().and_then(|line| std::str::from_utf8(line).ok()?.trim().parse::<u64>().ok());
    let now = Duration::from_secs(now.unwrap_or(NOW) % LAST_SECOND);
    let Ok(header) = HeaderValue::from_bytes(value) else { return };
    let headers = HeaderMap::from_iter([(RETRY_AFTER, header)]);

    let wait = retry_after(&headers, SystemTime::UNIX_EPOCH + now);

    let text = std::str::from_utf8(value.trim_ascii()).unwrap_or_default();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let seconds =
            text.bytes().fold(0_u64, |sum, digit| sum.saturating_mul(10).saturating_add((digit - b'0').into()));
        assert_eq!(wait, Some(Duration::from_secs(seconds)));
    } else if let Some(wait) = wait {
        assert!(text.contains(' '), "{text:?} is no date"); // each of the three forms of a date has a blank
        assert!(wait + now <= Duration::from_secs(LAST_SECOND), "{text:?} is {wait:?}");
    }
});
