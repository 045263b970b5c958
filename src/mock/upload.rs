//! What becomes of the body of a request.

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};

use super::scope::Tasks;

/// How much of a refused upload is read, in bytes, before it is cut off.
const MAX_DISCARDED: usize = 16 * 1024 * 1024;

/// A body that has arrived to its end.
pub(super) struct Upload {
    /// How long it was, in bytes.
    pub(super) length: u64,
    /// How it begins.
    pub(super) start: Vec<u8>,
}

/// Reads the whole body, and keeps as much of its start.
pub(super) async fn read(mut body: Incoming, kept: usize) -> hyper::Result<Upload> {
    let mut upload = Upload { length: 0, start: Vec::new() };
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        upload.length += data.len() as u64;
        let room = kept - upload.start.len();
        upload.start.extend_from_slice(&data[..data.len().min(room)]);
    }
    Ok(upload)
}

/// Reads the rest of an upload that was answered already, next to the answer.
///
/// A server that stops reading makes a client that only writes believe that the connection broke, and the answer
/// is lost; one that reads on without end is an open tap.
pub(super) fn discard(mut body: Incoming, tasks: &Tasks) {
    if body.is_end_stream() {
        return;
    }
    tasks.spawn(async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > MAX_DISCARDED {
                return;
            }
        }
    });
}
