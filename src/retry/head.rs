use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, request::Parts};

/// Values longer than this (bytes) are cheaper to share than to copy.
const LONGEST_COPY: usize = 512;

/// The head of a request, kept for another attempt.
///
/// Hardly any request is sent again, so this is cheap to make and to drop. A clone of a [`HeaderMap`] counts the references to
/// each value, and often has to allocate the counter; here the headers are written into one buffer, and only another
/// attempt makes a map of them.
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    version: Version,
    /// A line for each field as HTTP/1.1 has it, `name:value`. No name has a colon in it, and no value the end of a line.
    /// A line without a colon is that of a value which is shared.
    lines: Vec<u8>,
    /// The long values; and the sensitive ones, as their buffers may be wiped.
    shared: Vec<HeaderValue>,
    pub(crate) extensions: Extensions,
}

impl Head {
    pub(crate) fn keep(head: &Parts) -> Self {
        // Hardly any request has more than that; counting would be one more walk through the map.
        let mut lines = Vec::with_capacity(48 * head.headers.len());
        let mut shared = Vec::new();
        for (name, value) in &head.headers {
            lines.extend_from_slice(name.as_str().as_bytes());
            if value.is_sensitive() || value.len() > LONGEST_COPY {
                shared.push(value.clone());
            } else {
                lines.push(b':');
                lines.extend_from_slice(value.as_bytes());
            }
            lines.push(b'\n');
        }
        Self {
            method: head.method.clone(),
            uri: head.uri.clone(),
            version: head.version,
            lines,
            shared,
            extensions: head.extensions.clone(),
        }
    }

    /// The request as it was, for another attempt.
    pub(crate) fn request<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers();
        *request.extensions_mut() = self.extensions.clone();
        request
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let mut shared = self.shared.iter();
        let lines = Bytes::copy_from_slice(&self.lines);
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let (name, value) = match line.iter().position(|byte| *byte == b':') {
                Some(colon) => {
                    let value = lines.slice_ref(&line[colon + 1..]);
                    (&line[..colon], HeaderValue::from_maybe_shared(value).ok())
                }
                None => (line, shared.next().cloned()),
            };
            // What was valid in one map is so in another. `from_bytes` refuses a quote, which names of HTTP/2 may have.
            if let (Ok(name), Some(value)) = (HeaderName::from_lowercase(name), value) {
                headers.append(name, value);
            }
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use http::header::{ACCEPT, AUTHORIZATION};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let byte = || prop_oneof![Just(b'\t'), 32..127_u8, 128..=255_u8];
        let long = (byte(), LONGEST_COPY..LONGEST_COPY + 2).prop_map(|(byte, length)| [byte].repeat(length));
        prop_oneof![vec(byte(), 0..20), long]
    }

    #[test]
    fn the_next_attempt_has_the_same_head() {
        let mut request = Request::new(());
        *request.method_mut() = Method::from_bytes(b"PURGE").unwrap();
        *request.uri_mut() = "https://fal.run:443/a/b?c=d".parse().unwrap();
        *request.version_mut() = Version::HTTP_2;
        request.extensions_mut().insert("kept");
        let head = request.into_parts().0;
        let again = Head::keep(&head).request(()).into_parts().0;
        assert_eq!((&again.method, &again.uri, again.version), (&head.method, &head.uri, head.version));
        assert_eq!(again.extensions.get(), Some(&"kept"));
        assert!(again.headers.is_empty());
    }

    #[test]
    fn a_name_of_http_2_comes_back() {
        let mut request = Request::new(());
        let name = HeaderName::from_lowercase(b"x\"y").unwrap();
        request.headers_mut().insert(name, HeaderValue::from_static("a"));
        let head = request.into_parts().0;
        assert_eq!(Head::keep(&head).request(()).headers(), &head.headers);
    }

    /// Whoever wipes its buffer would miss a copy.
    #[test]
    fn a_sensitive_value_is_not_copied_and_stays_sensitive() {
        let mut secret = HeaderValue::from_static("secret");
        secret.set_sensitive(true);
        let mut request = Request::new(());
        request.headers_mut().insert(AUTHORIZATION, secret);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("*/*"));
        let head = request.into_parts().0;
        let kept = Head::keep(&head);
        assert_eq!(kept.lines, b"authorization\naccept:*/*\n");
        let again = kept.request(()).into_parts().0;
        assert_eq!(again.headers, head.headers);
        assert!(again.headers[AUTHORIZATION].is_sensitive());
        assert!(!again.headers[ACCEPT].is_sensitive());
    }

    proptest! {
        /// Names that come more than once keep the order of their values.
        #[test]
        fn the_next_attempt_has_the_same_headers(
            fields in vec(("[a-d]|accept|x-[a-z0-9!_]{0,90}", value()), 0..40),
        ) {
            let mut request = Request::new(());
            for (name, value) in fields {
                request.headers_mut().append(HeaderName::try_from(name)?, HeaderValue::from_bytes(&value)?);
            }
            let head = request.into_parts().0;
            let again = Head::keep(&head).request(()).into_parts().0;
            prop_assert!(again.headers.iter().eq(&head.headers));
        }
    }
}
