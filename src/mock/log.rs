//! The requests that arrived.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::StatusCode;

use super::received::Received;

/// How many requests the log holds. The oldest goes first.
const MAX_REQUESTS: usize = 10_000;

/// How many bytes of hosts, paths and content it holds. The oldest request goes first.
const MAX_BYTES: usize = 16 * 1024 * 1024;

#[derive(Default)]
pub(super) struct Log {
    arrived: u64,
    kept: BTreeMap<u64, Received>,
    /// How long the kept requests are together.
    bytes: usize,
}

impl Log {
    /// Keeps a request, and gives it its number.
    pub(super) fn add(&mut self, received: Received) -> u64 {
        self.arrived += 1;
        self.bytes += size(&received);
        self.kept.insert(self.arrived, received);
        self.drop_the_oldest();
        self.arrived
    }

    /// Notes that the whole body of a request has arrived, and keeps as much of it as is given.
    pub(super) fn add_body(&mut self, number: u64, length: u64, body: Option<Bytes>) {
        let Some(received) = self.kept.get_mut(&number) else { return };
        received.body_length = Some(length);
        self.bytes += body.as_ref().map_or(0, Bytes::len);
        received.body = body;
        self.drop_the_oldest();
    }

    /// Notes how a request was answered.
    pub(super) fn add_status(&mut self, number: u64, status: StatusCode) {
        if let Some(received) = self.kept.get_mut(&number) {
            received.status = Some(status);
        }
    }

    pub(super) fn received(&self) -> Vec<Received> {
        self.kept.values().cloned().collect()
    }

    /// Forgets the requests, and goes on counting.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
        self.bytes = 0;
    }

    /// How many requests have arrived.
    pub(super) fn arrived(&self) -> u64 {
        self.arrived
    }

    fn drop_the_oldest(&mut self) {
        while self.kept.len() > MAX_REQUESTS || self.bytes > MAX_BYTES {
            let Some((_, dropped)) = self.kept.pop_first() else { return };
            self.bytes -= size(&dropped);
        }
    }
}

/// How many bytes of a request are kept, apart from what all requests have.
fn size(received: &Received) -> usize {
    let headers = received.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    let query = received.query.as_ref().map_or(0, String::len);
    let body = received.body.as_ref().map_or(0, Bytes::len);
    received.host.len() + received.path.len() + query + headers.sum::<usize>() + body
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method, Version};

    use super::*;
    use crate::mock::Presented;

    fn request(path: String) -> Received {
        Received {
            method: Method::GET,
            host: String::new(),
            path,
            version: Version::HTTP_11,
            presented: Presented::Nothing,
            status: None,
            query: None,
            headers: HeaderMap::new(),
            body_length: None,
            body: None,
        }
    }

    #[test]
    fn the_log_drops_the_oldest_of_too_many() {
        let mut log = Log::default();
        for n in 0..10_001 {
            let number = log.add(request(n.to_string()));
            log.add_status(number, StatusCode::OK);
        }
        log.add_status(1, StatusCode::OK);
        let kept = log.received();
        assert_eq!((kept.len(), log.arrived()), (10_000, 10_001));
        assert_eq!((kept[0].path.as_str(), kept[9_999].path.as_str()), ("1", "10000"));
    }

    #[test]
    fn the_log_drops_the_oldest_of_what_is_too_long() {
        let mut log = Log::default();
        let mib = 1024 * 1024;
        let body = Bytes::from(vec![0; mib - 1]);
        for n in 0..10 {
            let number = log.add(request(n.to_string()));
            log.add_body(number, mib as u64, Some(body.clone()));
        }
        // One byte of the path and the rest of the body.
        assert_eq!((log.bytes, log.received().len()), (10 * mib, 10));
        for _ in 0..10 {
            log.add(request("x".repeat(mib)));
        }
        assert_eq!(log.bytes, 16 * mib);
        let kept = log.received();
        assert_eq!((kept.len(), kept[0].path.as_str()), (16, "4"));

        // A body that comes after its request was dropped is nothing.
        log.add_body(1, mib as u64, Some(body));
        assert_eq!(log.bytes, 16 * mib);
        log.clear();
        assert_eq!((log.bytes, log.received().len(), log.arrived()), (0, 0, 20));
    }
}
