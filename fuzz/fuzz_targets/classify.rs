//! Whatever an answer says, reading it does no harm, and what is kept of it is bounded and without the secret. A runner's
//! answer is the application's, and an encoded body has no text.

#![no_main]

use arbitrary::Arbitrary;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_ENCODING};
use libfuzzer_sys::fuzz_target;
use tower_fal::{
    Credential, Scheme,
    error::{Reason, classify},
};

#[derive(Arbitrary, Debug)]
struct Answer<'a> {
    status: Status,
    headers: Vec<(Name, &'a [u8])>,
    body: Body<'a>,
    sent: Option<Sent<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Status {
    Unauthorized,
    Forbidden,
    Other(u16),
}

#[derive(Arbitrary, Debug)]
enum Name {
    ServedFrom,
    BillableUnits,
    RunnerHints,
    ContentEncoding,
    ErrorType,
    RequestId,
}

#[derive(Arbitrary, Debug)]
enum Body<'a> {
    Bytes(&'a [u8]),
    /// Around an echo of what was sent.
    Echo(&'a [u8], &'a [u8]),
    Detail(&'a str, &'a str),
    Nested(u16),
    /// An echo behind so many blanks, which are looked at as one.
    Late(u16),
}

#[derive(Arbitrary, Debug)]
enum Sent<'a> {
    Key(&'a str, &'a str),
    Bearer(&'a str),
}

impl Sent<'_> {
    fn credential(&self) -> Option<Credential> {
        match self {
            Self::Key(id, secret) => Credential::key_pair(id, secret).ok(),
            Self::Bearer(token) => Credential::bearer(token).ok(),
        }
    }
}

/// What must not be shown of a credential.
fn secret(credential: &Credential) -> &str {
    let header = credential.header().to_str().expect("visible ASCII");
    match credential.scheme() {
        Scheme::Bearer => &header["Bearer ".len()..],
        _ => header.split_once(':').expect("a key").1,
    }
}

fuzz_target!(|answer: Answer<'_>| {
    let status = match answer.status {
        Status::Unauthorized => StatusCode::UNAUTHORIZED,
        Status::Forbidden => StatusCode::FORBIDDEN,
        Status::Other(status) => StatusCode::from_u16(status).unwrap_or_default(),
    };
    let sent = answer.sent.and_then(|sent| sent.credential());
    let secret = sent.as_ref().map_or("", secret);
    let headers: HeaderMap = answer
        .headers
        .iter()
        .filter_map(|(name, value)| {
            let name = match name {
                Name::ServedFrom => HeaderName::from_static("x-fal-served-from"),
                Name::BillableUnits => HeaderName::from_static("x-fal-billable-units"),
                Name::RunnerHints => HeaderName::from_static("x-fal-runner-hints"),
                Name::ContentEncoding => CONTENT_ENCODING,
                Name::ErrorType => HeaderName::from_static("x-fal-error-type"),
                Name::RequestId => HeaderName::from_static("x-fal-request-id"),
            };
            Some((name, HeaderValue::from_bytes(value).ok()?))
        })
        .collect();
    let is_late = matches!(answer.body, Body::Late(_));
    let body = match answer.body {
        Body::Bytes(bytes) => bytes.to_vec(),
        Body::Echo(before, after) => [before, secret.as_bytes(), after].concat(),
        Body::Detail(before, after) => format!(r#"{{"detail":{:?}}}"#, format!("{before}{secret}{after}")).into_bytes(),
        Body::Nested(depth) => vec![b'['; depth.into()],
        Body::Late(blanks) => ["é".as_bytes(), &vec![b' '; blanks.into()], secret.as_bytes()].concat(),
    };

    let read = classify(status, &headers, &body, sent.as_ref());

    const RUNNERS: [&str; 3] = ["x-fal-served-from", "x-fal-billable-units", "x-fal-runner-hints"];
    let is_of_a_runner = RUNNERS.iter().any(|name| headers.contains_key(*name));
    assert_eq!(read.reason == Reason::Application, is_of_a_runner);
    if headers.get_all(CONTENT_ENCODING).iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        assert_eq!(read.detail, None);
    }

    for text in [&read.detail, &read.error_type, &read.request_id].into_iter().flatten() {
        assert!(!text.is_empty() && text.chars().count() <= 301, "{} characters", text.chars().count());
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert!(secret.is_empty() || !text.contains(secret), "{text:?} shows {secret:?}");
    }
    if is_late && let Some(detail) = &read.detail {
        let shown = detail.trim_start_matches(['é', ' ', '…']);
        assert!(secret.is_empty() || shown.len() < 4, "{shown:?} is a part of {secret:?}"); // where the text was cut
    }
});
