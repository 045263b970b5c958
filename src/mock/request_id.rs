//! The id of a request, as `x-fal-request-id` and the queue have it.

/// Every request has a UUID of its own, in which it is counted.
const PREFIX: &str = "00000000-0000-4000-8000-";

pub(super) fn request_id(number: u64) -> String {
    format!("{PREFIX}{number:012x}")
}

/// The number in such an id.
pub(super) fn request_number(id: &str) -> Option<u64> {
    u64::from_str_radix(id.strip_prefix(PREFIX)?, 16).ok()
}
