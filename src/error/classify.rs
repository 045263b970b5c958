use http::{HeaderMap, HeaderName, StatusCode, header::CONTENT_ENCODING};
use serde_json::Value;

use super::{LockReason, Reason};
use crate::{
    credential::{Credential, Scheme},
    wire::{header, is_of_a_runner},
};

/// The longest detail kept, in characters.
const MAX_DETAIL_LEN: usize = 300;

/// What a 401 or 403 answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Classification {
    /// Why the request was refused.
    pub reason: Reason,
    /// fal's own words: one line of at most 300 characters, without the secret if the answer repeats it.
    pub detail: Option<String>,
    /// The error type: of the body (`error_type`, or the Platform API's `error.type`), else of `X-Fal-Error-Type`.
    pub error_type: Option<String>,
    /// The `x-fal-request-id`: what fal's support asks for.
    pub request_id: Option<String>,
}

/// Reads a 401 or 403 answer: its status, its headers and as much of its body as there is.
///
/// An answer with the headers of a runner (`x-fal-served-from`, `x-fal-billable-units`, `x-fal-runner-hints`) is the
/// *application's*, whatever it says: fal checks the credential before it chooses a runner. Without these headers, fal's
/// own texts are recognised by their first words, in upper or lower case, and any other text has the reason
/// [`Unknown`](Reason::Unknown). A body with a `content-encoding` has no text: what decompresses it belongs inside the
/// layer that reads it.
///
/// `sent` is the credential that was refused, if it is known. It tells a credential of the wrong kind from a malformed
/// one, and its secret is removed from what is kept.
///
/// It is a pure function, and takes any bytes.
///
/// Source: fal-ai/fal issues #489, #914, #1068, #1072, #1147; fal-ai/fal-js issue #169; `fal` 1.83.0 (`sdk.py`); fal's
/// documentation, "Platform APIs", "Errors" and "Request errors".
///
/// ```
/// use http::{HeaderMap, StatusCode};
/// use tower_fal::error::{LockReason, Reason, classify};
///
/// let body = br#"{"detail":"User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}"#;
/// let read = classify(StatusCode::FORBIDDEN, &HeaderMap::new(), body, None);
/// assert_eq!(read.reason, Reason::AccountLocked(LockReason::ExhaustedBalance));
/// ```
#[must_use]
pub fn classify(status: StatusCode, headers: &HeaderMap, body: &[u8], sent: Option<&Credential>) -> Classification {
    let said = if is_encoded(headers) { Said::default() } else { Said::read(body) };
    let value_of = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let reason = if is_of_a_runner(headers) {
        Reason::Application
    } else {
        said.text.as_deref().and_then(|text| fals_own(status, text, sent)).unwrap_or(Reason::Unknown)
    };
    Classification {
        reason,
        detail: said.text.as_deref().and_then(|text| clean(text, sent)),
        error_type: said
            .error_type
            .as_deref()
            .or_else(|| value_of(header::ERROR_TYPE))
            .and_then(|text| clean(text, sent)),
        request_id: value_of(header::REQUEST_ID).and_then(|text| clean(text, sent)),
    }
}

/// Whether the body is something else than the text that it stands for, such as compressed.
fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// fal's own texts.
fn fals_own(status: StatusCode, text: &str, sent: Option<&Credential>) -> Option<Reason> {
    let text = text.trim();
    let starts_with = |prefix: &str| text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    match status {
        StatusCode::UNAUTHORIZED => {
            if starts_with("invalid key credentials") || starts_with("No user found for Key ID and Secret") {
                Some(Reason::UnknownCredential)
            } else if starts_with("Invalid Key Authorization header format") {
                // The host took a login's token for a key: it takes nothing but keys.
                let took_token_for_key = sent.is_some_and(|sent| sent.scheme() == Scheme::Bearer);
                Some(if took_token_for_key { Reason::WrongScheme } else { Reason::MalformedCredential })
            } else if starts_with("bearer: unable to decode issuer") {
                Some(Reason::WrongScheme)
            } else if starts_with("bearer:") {
                Some(Reason::UnknownCredential)
            } else if starts_with("Authorization header is required")
                || starts_with("Authentication required")
                || (starts_with("Cannot access application")
                    && text.to_ascii_lowercase().contains("authentication is required"))
            {
                Some(Reason::MissingCredential)
            } else {
                None
            }
        }
        StatusCode::FORBIDDEN => {
            if starts_with("User is locked") {
                Some(Reason::AccountLocked(lock_reason(text)))
            } else if starts_with("Insufficient permissions") {
                Some(Reason::InsufficientPermissions)
            } else if starts_with("Access denied") || text.eq_ignore_ascii_case("Forbidden") {
                Some(Reason::AccessDenied)
            } else {
                None
            }
        }
        _ => None,
    }
}

fn lock_reason(text: &str) -> LockReason {
    let text = text.to_ascii_lowercase();
    let says = |words: &str| text.contains(words);
    // In this order: the text of an exhausted balance says "top up" as well.
    if says("exhausted balance") {
        LockReason::ExhaustedBalance
    } else if says("admin lock") {
        LockReason::Admin
    } else if says("archived") {
        LockReason::Archived
    } else if says("budget") {
        LockReason::BudgetExceeded
    } else if says("payment method") || says("payment_method") {
        LockReason::NoPaymentMethod
    } else if says("top_up") || says("top up") {
        LockReason::TopUp
    } else {
        LockReason::Other
    }
}

/// What a body says, in whichever of fal's forms.
#[derive(Default)]
struct Said {
    text: Option<String>,
    error_type: Option<String>,
}

impl Said {
    fn read(body: &[u8]) -> Self {
        // `serde_json` gives up on what is nested too deep; that is text then, like everything else.
        match serde_json::from_slice(body) {
            Ok(Value::Object(object)) => {
                let error = object.get("error");
                let in_error = |name| error.and_then(|error| error.get(name)).and_then(Value::as_str);
                let string = |name: &str| object.get(name).and_then(Value::as_str);
                let text = object
                    .get("detail")
                    .and_then(text_of)
                    .or_else(|| in_error("message").map(ToOwned::to_owned))
                    .or_else(|| error.and_then(Value::as_str).map(ToOwned::to_owned))
                    .or_else(|| string("message").map(ToOwned::to_owned));
                let error_type = string("error_type").or_else(|| in_error("type")).map(ToOwned::to_owned);
                Self { text, error_type }
            }
            Ok(Value::String(text)) => Self { text: Some(text), error_type: None },
            Ok(_) => Self::default(),
            Err(_) => Self { text: plain_text(body), error_type: None },
        }
    }
}

/// `detail` is a text, a list of `{"msg": …}`, or one of those.
fn text_of(detail: &Value) -> Option<String> {
    let message = |value: &Value| value.get("msg").or_else(|| value.get("message"))?.as_str().map(ToOwned::to_owned);
    match detail {
        Value::String(text) => Some(text.clone()),
        Value::Array(items) => {
            let messages: Vec<_> = items.iter().take(8).filter_map(message).collect();
            (!messages.is_empty()).then(|| messages.join("; "))
        }
        Value::Object(_) => message(detail),
        _ => None,
    }
}

/// A body that is no JSON: the title of a page, such as an ingress puts up, or the text itself.
fn plain_text(body: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
    let text = text.trim();
    if !text.starts_with('<') {
        return (!text.is_empty()).then(|| text.to_owned());
    }
    let lower = text.to_ascii_lowercase(); // of the same length, so its places are those of `text`
    let start = lower.find("<title>")? + "<title>".len();
    let end = start + lower[start..].find("</title>")?;
    Some(text[start..end].to_owned())
}

/// One bounded line, without control characters and without the secret that an answer may have echoed.
fn clean(text: &str, sent: Option<&Credential>) -> Option<String> {
    // Before it is cut, or half a secret may be left at the end.
    let text = sent.map_or_else(|| text.to_owned(), |sent| sent.strike_out(text));
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if let Some((end, _)) = line.char_indices().nth(MAX_DETAIL_LEN) {
            line.truncate(end);
            line.push('…');
            break;
        }
    }
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason_401(body: &str) -> Reason {
        classify(StatusCode::UNAUTHORIZED, &HeaderMap::new(), body.as_bytes(), None).reason
    }

    fn reason_403(body: &str) -> Reason {
        classify(StatusCode::FORBIDDEN, &HeaderMap::new(), body.as_bytes(), None).reason
    }

    #[test]
    fn each_401_of_fal_has_its_reason() {
        for (body, reason) in [
            (r#"{"detail":"invalid key credentials"}"#, Reason::UnknownCredential),
            (r#"{"detail":"No user found for Key ID and Secret"}"#, Reason::UnknownCredential),
            (r#"{"detail":"NO USER FOUND for key id and secret"}"#, Reason::UnknownCredential),
            (
                r#"{"detail":"Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."}"#,
                Reason::MalformedCredential,
            ),
            (r#"{"detail":"Authorization header is required"}"#, Reason::MissingCredential),
            (
                r#"{"detail":"Cannot access application \"owner/app\". Authentication is required to do so."}"#,
                Reason::MissingCredential,
            ),
            (r#"{"detail":"bearer: unable to decode issuer"}"#, Reason::WrongScheme),
            (r#"{"detail":"bearer: invalid token"}"#, Reason::UnknownCredential),
            (
                r#"{"error":{"type":"authorization_error","message":"Authentication required","request_id":"r"}}"#,
                Reason::MissingCredential,
            ),
            (r#"{"detail":[{"msg":"invalid key credentials"}]}"#, Reason::UnknownCredential),
            (r#"{"detail":{"message":"invalid key credentials"}}"#, Reason::UnknownCredential),
            (r#""invalid key credentials""#, Reason::UnknownCredential),
            ("invalid key credentials\n", Reason::UnknownCredential),
            ("<html><head><title>401 Authorization Required</title></head>", Reason::Unknown),
            (r#"{"detail":"something new"}"#, Reason::Unknown),
            (r#"{"detail":"User is locked. Reason: TOP_UP."}"#, Reason::Unknown),
            ("", Reason::Unknown),
            ("null", Reason::Unknown),
        ] {
            assert_eq!(reason_401(body), reason, "{body}");
        }
    }

    #[test]
    fn each_403_of_fal_has_its_reason() {
        let locked = |lock| Reason::AccountLocked(lock);
        for (body, reason) in [
            (
                r#"{"detail":"User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}"#,
                locked(LockReason::ExhaustedBalance),
            ),
            (
                r#"{"detail":"User is locked. Reason: Admin lock. Please contact support@fal.ai."}"#,
                locked(LockReason::Admin),
            ),
            (r#"{"detail":"User is locked. Reason: TOP_UP."}"#, locked(LockReason::TopUp)),
            (r#"{"detail":"User is locked. Reason: This account has been archived."}"#, locked(LockReason::Archived)),
            (
                r#"{"detail":"User is locked. Reason: Please add a payment method."}"#,
                locked(LockReason::NoPaymentMethod),
            ),
            (r#"{"detail":"User is locked. Reason: User budget exceeded."}"#, locked(LockReason::BudgetExceeded)),
            (r#"{"detail":"user is locked"}"#, locked(LockReason::Other)),
            (r#"{"detail":"Insufficient permissions for this call"}"#, Reason::InsufficientPermissions),
            (r#"{"error":{"type":"authorization_error","message":"Access denied"}}"#, Reason::AccessDenied),
            ("Forbidden", Reason::AccessDenied),
            (r#"{"detail":"Forbidden"}"#, Reason::AccessDenied),
            ("<html><title>403 Forbidden</title>", Reason::Unknown),
            (r#"{"detail":"invalid key credentials"}"#, Reason::Unknown),
        ] {
            assert_eq!(reason_403(body), reason, "{body}");
        }
    }

    #[test]
    fn an_answer_of_a_runner_is_the_applications_whatever_it_says() {
        for name in ["x-fal-served-from", "x-fal-billable-units", "x-fal-runner-hints"] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), "".parse().unwrap())]);
            let read = |status, body: &str| classify(status, &headers, body.as_bytes(), None).reason;
            for body in [
                "",
                r#"{"detail":"log in to my app"}"#,
                r#"{"detail":"invalid key credentials"}"#,
                "No user found for Key ID and Secret",
                "Invalid Key Authorization header format.",
                "bearer: unable to decode issuer",
                "bearer: expired",
                "Authentication required",
                "Authorization header is required",
            ] {
                assert_eq!(read(StatusCode::UNAUTHORIZED, body), Reason::Application, "{name}, {body}");
            }
            for body in [
                "",
                r#"{"detail":"User is locked. Reason: Exhausted balance."}"#,
                "Access denied",
                "Forbidden",
                "Insufficient permissions",
            ] {
                assert_eq!(read(StatusCode::FORBIDDEN, body), Reason::Application, "{name}, {body}");
            }
        }
    }

    #[test]
    fn an_encoded_body_has_no_text() {
        let body = br#"{"detail":"invalid key credentials","error_type":"of_the_body"}"#;
        let read = |coding: &[&str]| {
            let headers = coding.iter().map(|coding| (CONTENT_ENCODING, coding.parse().unwrap()));
            let headers = headers.chain([(header::ERROR_TYPE, "of_the_header".parse().unwrap())]).collect();
            classify(StatusCode::UNAUTHORIZED, &headers, body, None)
        };
        for coding in [&["gzip"][..], &["br"], &["identity", "gzip"], &[""]] {
            let read = read(coding);
            assert_eq!((read.reason, read.detail), (Reason::Unknown, None), "{coding:?}");
            assert_eq!(read.error_type.as_deref(), Some("of_the_header"), "{coding:?}");
        }
        for coding in [&[][..], &["identity"], &["Identity"]] {
            assert_eq!(read(coding).reason, Reason::UnknownCredential, "{coding:?}");
            assert!(read(coding).detail.is_some(), "{coding:?}");
        }
    }

    #[test]
    fn a_token_where_only_keys_are_taken_is_the_wrong_scheme() {
        let body = br#"{"detail":"Invalid Key Authorization header format."}"#;
        let token = Credential::bearer("token").unwrap();
        let read = classify(StatusCode::UNAUTHORIZED, &HeaderMap::new(), body, Some(&token));
        assert_eq!(read.reason, Reason::WrongScheme);
    }

    #[test]
    fn other_statuses_have_no_reason_of_fals() {
        let read = classify(StatusCode::OK, &HeaderMap::new(), br#"{"detail":"User is locked."}"#, None);
        assert_eq!(read.reason, Reason::Unknown);
    }

    #[test]
    fn the_error_type_comes_from_the_body_or_from_the_header() {
        let typed = |headers: &HeaderMap, body: &str| {
            classify(StatusCode::FORBIDDEN, headers, body.as_bytes(), None).error_type
        };
        let header = HeaderMap::from_iter([("x-fal-error-type".parse().unwrap(), "from_header".parse().unwrap())]);
        assert_eq!(typed(&header, r#"{"error_type":"from_body"}"#).as_deref(), Some("from_body"));
        assert_eq!(typed(&header, r#"{"error":{"type":"nested"}}"#).as_deref(), Some("nested"));
        assert_eq!(typed(&header, "no").as_deref(), Some("from_header"));
        assert_eq!(typed(&HeaderMap::new(), "no"), None);
    }

    #[test]
    fn a_detail_is_one_bounded_line() {
        let detail = |body: &str| classify(StatusCode::FORBIDDEN, &HeaderMap::new(), body.as_bytes(), None).detail;
        assert_eq!(detail(" a\n\tb\u{7}c \r\n").as_deref(), Some("a b c"));
        assert_eq!(detail(&"é".repeat(1000)).unwrap().chars().count(), MAX_DETAIL_LEN + 1);
        assert_eq!(detail("\u{1}\n"), None);
        assert_eq!(detail("<title>403 Forbidden</title>").as_deref(), Some("403 Forbidden"));
        assert_eq!(detail("<title>no end"), None);
    }

    #[test]
    fn an_echoed_secret_is_struck_out_wherever_a_detail_is_cut() {
        let sent = Credential::key("the-id:hush-hush").unwrap();
        for lead in [0, 1, MAX_DETAIL_LEN - 12, MAX_DETAIL_LEN - 3] {
            let body = format!("{} Key the-id:hush-hush, and hush-hush", "x".repeat(lead));
            let read = classify(StatusCode::FORBIDDEN, &HeaderMap::new(), body.as_bytes(), Some(&sent));
            assert!(!read.detail.as_ref().unwrap().contains("hus"), "{read:?}");
        }
    }

    #[test]
    fn a_secret_that_looks_like_its_replacement_is_struck_out() {
        let sent = Credential::key("the-id:]abc").unwrap();
        let read = classify(StatusCode::FORBIDDEN, &HeaderMap::new(), b"]abcabc", Some(&sent));
        assert!(!read.detail.as_ref().unwrap().contains("]abc"), "{read:?}");
    }

    #[test]
    fn hostile_bodies_are_read_without_harm() {
        let deep = "[".repeat(10_000);
        for body in [deep.as_bytes(), b"\xFF\xFE{\"detail\"", b"{\"detail\":", "<title>\u{130}</title>".as_bytes()] {
            assert_eq!(classify(StatusCode::UNAUTHORIZED, &HeaderMap::new(), body, None).reason, Reason::Unknown);
        }
    }
}
