//! The id of a request, for `x-fal-request-id` and for the queue.

/// How each id begins. The rest of this UUID is the number of the request.
const PREFIX: &str = "00000000-0000-4000-8000-";

pub(super) fn request_id(number: u64) -> String {
    format!("{PREFIX}{number:012x}")
}

/// The number in such an id.
pub(super) fn request_number(id: &str) -> Option<u64> {
    u64::from_str_radix(id.strip_prefix(PREFIX)?, 16).ok()
}
