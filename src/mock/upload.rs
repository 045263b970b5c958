//! The body of a request.

use http_body_util::BodyExt as _;
use hyper::body::Incoming;

/// A body that has arrived to its end.
#[derive(Default)]
pub(super) struct Upload {
    /// How long it was, in bytes.
    pub(super) length: u64,
    /// How it begins.
    pub(super) start: Vec<u8>,
}

/// Reads a body to its end and keeps its first `kept` bytes.
///
/// `None` is a body that was cut off, or that was longer than `longest` bytes.
pub(super) async fn read(mut body: Incoming, kept: usize, longest: u64) -> Option<Upload> {
    let mut upload = Upload::default();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        upload.length += data.len() as u64;
        if upload.length > longest {
            return None;
        }
        let room = kept - upload.start.len();
        upload.start.extend_from_slice(&data[..data.len().min(room)]);
    }
    Some(upload)
}
