use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header::SET_COOKIE};

use crate::wire::header;

/// The longest body that is kept, in bytes.
const MAX_BODY: usize = 16 * 1024;

/// The most that is kept of the headers, in bytes, as HTTP/2 counts them: 32 for each, beside its name and its value.
const MAX_HEADERS: usize = 16 * 1024;

/// What is kept of a refused response: copies, as the originals are parts of the client's read buffer, which is larger
/// by far and would live as long.
#[derive(Clone)]
pub(crate) struct Kept {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Kept {
    /// Copies the body and the headers as far as they fit. Headers that hold a secret of their own are left out.
    pub(crate) fn copy(headers: &HeaderMap, body: &[u8]) -> Self {
        Self { headers: copy_headers(headers), body: Bytes::copy_from_slice(&body[..body.len().min(MAX_BODY)]) }
    }
}

fn copy_headers(headers: &HeaderMap) -> HeaderMap {
    let mut copies = HeaderMap::new();
    let mut left = MAX_HEADERS;
    for (name, value) in headers {
        let size = name.as_str().len() + value.len() + 32;
        if holds_secret(name) || size > left {
            continue;
        }
        // Its bytes are those of a header value, so this is never an error.
        let Ok(mut copy) = HeaderValue::from_bytes(value.as_bytes()) else { continue };
        copy.set_sensitive(value.is_sensitive());
        copies.append(name, copy);
        left -= size;
    }
    copies
}

/// A cookie, or the token that fal gives out for its CDN.
fn holds_secret(name: &HeaderName) -> bool {
    *name == SET_COOKIE || *name == header::CDN_TOKEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_holds_no_memory_of_the_original() {
        let buffer = Bytes::from(vec![b'x'; 400 * 1024]);
        let mut headers = HeaderMap::new();
        headers.insert("x-a", HeaderValue::from_maybe_shared(buffer.slice(10..20)).unwrap());
        headers.append("x-a", HeaderValue::from_maybe_shared(buffer.slice(30..50)).unwrap());
        let body = buffer.slice(100..200);
        let kept = Kept::copy(&headers, &body);
        drop((headers, body));
        assert!(buffer.is_unique());
        let lengths: Vec<_> = kept.headers.get_all("x-a").iter().map(HeaderValue::len).collect();
        assert_eq!((lengths, kept.body), (vec![10, 20], Bytes::from(vec![b'x'; 100])));
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut headers = HeaderMap::new();
        for n in 0..2000 {
            headers.insert(HeaderName::try_from(format!("x-{n:04}")).unwrap(), HeaderValue::from_static("four"));
        }
        let kept = Kept::copy(&headers, &[b'x'; MAX_BODY + 1]);
        assert_eq!((kept.headers.len(), kept.body.len()), (MAX_HEADERS / (6 + 4 + 32), MAX_BODY));

        let mut headers = HeaderMap::new();
        headers.insert("x-long", HeaderValue::from_bytes(&[b'x'; MAX_HEADERS]).unwrap());
        headers.insert("x-short", HeaderValue::from_static("short"));
        assert_eq!(Kept::copy(&headers, b"").headers.keys().collect::<Vec<_>>(), ["x-short"]);
    }

    #[test]
    fn secrets_are_left_out_and_marks_stay() {
        let mut headers = HeaderMap::new();
        let mut sensitive = HeaderValue::from_static("hush");
        sensitive.set_sensitive(true);
        headers.insert("x-fal-cdn-token", HeaderValue::from_static("hush"));
        headers.insert("set-cookie", HeaderValue::from_static("hush"));
        headers.append("set-cookie", HeaderValue::from_static("hush"));
        headers.insert("x-mine", sensitive);
        let kept = Kept::copy(&headers, b"").headers;
        assert_eq!(kept.len(), 1);
        assert!(kept["x-mine"].is_sensitive());
    }
}
