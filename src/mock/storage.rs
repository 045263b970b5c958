//! Where uploads go: a file at once or in parts, from a page of any origin.

use std::collections::{BTreeMap, BTreeSet};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::json;

use super::{answer::Answer, request_id::request_number};

/// How many uploads in parts are known at once. The oldest goes first.
const MAX_UPLOADS: usize = 10_000;

/// The largest number of a part.
const MAX_PARTS: u32 = 10_000;

/// The uploads in parts that were begun, and which parts of each have arrived.
#[derive(Default)]
pub(super) struct Parts(BTreeMap<u64, BTreeSet<(u32, String)>>);

/// What ends an upload in parts.
///
/// Source: `@fal-ai/client` 1.10.1 (`storage.ts`).
#[derive(Deserialize)]
struct Completion {
    parts: Vec<Part>,
}

#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
struct Part {
    part_number: u32,
    etag: String,
}

impl Parts {
    /// Begins an upload, under the number of the request that asked for it.
    pub(super) fn begin(&mut self, number: u64) {
        self.0.insert(number, BTreeSet::new());
        if self.0.len() > MAX_UPLOADS {
            self.0.pop_first();
        }
    }

    /// A part of this length has arrived. A later one of the same number takes its place.
    pub(super) fn add(&mut self, id: &str, part: &str, length: u64) -> Answer {
        let Some(parts) = request_number(id).and_then(|number| self.0.get_mut(&number)) else { return unknown() };
        let Some(number) = part.parse().ok().filter(|number| (1..=MAX_PARTS).contains(number)) else {
            return Answer::detail(StatusCode::BAD_REQUEST, "The number of a part is from 1 to 10000");
        };
        let etag = format!("part-{number}-of-{length}-bytes");
        parts.retain(|(other, _)| *other != number);
        parts.insert((number, etag.clone()));
        Answer::ok(json!({ "partNumber": number, "etag": etag }))
    }

    /// The client says that it has sent all parts.
    pub(super) fn complete(&mut self, id: &str, body: &[u8]) -> Answer {
        let Some(number) = request_number(id).filter(|number| self.0.contains_key(number)) else { return unknown() };
        let named = serde_json::from_slice::<Completion>(body).map(|completion| completion.parts).unwrap_or_default();
        let named: BTreeSet<_> = named.into_iter().map(|part| (part.part_number, part.etag)).collect();
        if named.is_empty() || self.0.get(&number) != Some(&named) {
            return Answer::detail(StatusCode::BAD_REQUEST, "The parts are not those that have arrived");
        }
        self.0.remove(&number);
        Answer::ok(json!({ "ok": true }))
    }
}

fn unknown() -> Answer {
    Answer::detail(StatusCode::NOT_FOUND, "Upload not found")
}

/// Allows pages of any origin to read an answer, and to send what they want to upload.
pub(super) fn allow_every_origin(headers: &mut HeaderMap) {
    for (name, value) in [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-methods", "GET, POST, PUT"),
        ("access-control-allow-headers", "*"),
        ("access-control-expose-headers", "*"),
    ] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
}
