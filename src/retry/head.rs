use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, request::Parts};

/// Values longer than this (bytes) are cheaper to share than to copy.
const LONGEST_COPY: usize = 512;

/// The head of a request, kept for another attempt.
///
/// Hardly any request is sent again, so this is cheap to make and to drop. A clone of a [`HeaderMap`] counts the references to
/// each value, and often has to allocate the counter; here the headers are copied into one buffer, and only another
/// attempt makes a map of them.
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    version: Version,
    fields: Vec<Field>,
    /// Of each field the name, and the value if it is copied; one after the other.
    bytes: Vec<u8>,
    pub(crate) extensions: Extensions,
}

struct Field {
    name_length: usize,
    value: Value,
}

enum Value {
    /// Its length.
    Copied(usize),
    /// A long one; and a sensitive one, as its buffer may be one that is wiped.
    Shared(HeaderValue),
}

impl Head {
    pub(crate) fn keep(head: &Parts) -> Self {
        let length = |(name, value): (&HeaderName, &HeaderValue)| {
            name.as_str().len() + if is_copied(value) { value.len() } else { 0 }
        };
        let mut bytes = Vec::with_capacity(head.headers.iter().map(length).sum());
        let mut fields = Vec::with_capacity(head.headers.len());
        for (name, value) in &head.headers {
            bytes.extend_from_slice(name.as_str().as_bytes());
            let name_length = name.as_str().len();
            let value = if is_copied(value) {
                bytes.extend_from_slice(value.as_bytes());
                Value::Copied(value.len())
            } else {
                Value::Shared(value.clone())
            };
            fields.push(Field { name_length, value });
        }
        Self {
            method: head.method.clone(),
            uri: head.uri.clone(),
            version: head.version,
            fields,
            bytes,
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
        let mut bytes = Bytes::copy_from_slice(&self.bytes);
        let mut headers = HeaderMap::new();
        for field in &self.fields {
            let name = HeaderName::from_bytes(&bytes.split_to(field.name_length));
            let value = match &field.value {
                Value::Copied(length) => HeaderValue::from_maybe_shared(bytes.split_to(*length)),
                Value::Shared(value) => Ok(value.clone()),
            };
            // What was valid in one map is so in another.
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
        headers
    }
}

fn is_copied(value: &HeaderValue) -> bool {
    !value.is_sensitive() && value.len() <= LONGEST_COPY
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
        assert_eq!(kept.bytes, b"authorizationaccept*/*");
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
