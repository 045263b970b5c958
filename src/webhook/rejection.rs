use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::json;

use super::body::ResponseBody;

/// Why a delivery was not believed, or not handled now.
///
/// It is in the extensions of the response that the layer gives, and with
/// [`observe`](super::VerifyWebhookLayer::observe) in those of the request that the handler gets. It holds nothing of
/// what the caller sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// 401 `missing_header`: one of the four headers of a webhook is not there.
    #[error("the header `{0}` is missing")]
    MissingHeader(&'static str),
    /// 401 `repeated_header`: one of the four headers is there more than once, so that two readers could read two values.
    #[error("the header `{0}` is there more than once")]
    RepeatedHeader(&'static str),
    /// 401 `invalid_header`: one of the four headers does not have its form. An id is 1 to 256 visible characters of
    /// ASCII, the timestamp is decimal digits without a sign, and the signature is 128 hexadecimal digits.
    #[error("the header `{0}` does not have its form")]
    InvalidHeader(&'static str),
    /// 401 `bad_signature`: no key of fal's has signed these ids, this timestamp and this body.
    #[error(
        "no key of fal's has signed this delivery; if fal has sent it, look for what changes the body on its way, \
         such as a middleware that reads and writes JSON"
    )]
    BadSignature,
    /// 401 `stale`: fal has signed the delivery, but its timestamp and the clock of this server are further apart than is
    /// [tolerated](super::VerifyWebhookLayer::tolerance). The value is how far.
    #[error(
        "fal has signed this delivery, but its timestamp and the clock of this server are {0:?} apart; look at the \
         clock, and raise the tolerance if fal repeats deliveries with their first timestamp"
    )]
    Stale(Duration),
    /// 403 `other_account`: fal has signed the delivery, but for another account than the expected ones.
    #[error("fal has signed this delivery for another account; if it is one of yours, add its user id to the accounts")]
    OtherAccount,
    /// 413 `body_too_long`: the body has more bytes than the [limit](super::VerifyWebhookLayer::max_body).
    #[error("the body has more than {0} bytes")]
    BodyTooLong(usize),
    /// 503 `body_timeout`: the body did not arrive within its [time](super::VerifyWebhookLayer::body_timeout). fal
    /// delivers again after a 503, and after most statuses below 500 it does not.
    #[error("the body did not arrive within {0:?}")]
    BodyTimeout(Duration),
    /// 400 `body_cut_off`: the connection failed before the end of the body.
    #[error("the body was cut off before its end")]
    BodyCutOff,
    /// 503 `no_keys`: fal's public keys could not be fetched, so that nothing can be judged.
    #[error("the public keys of fal's webhooks could not be fetched; the status of the keys says why")]
    NoKeys {
        /// When they are fetched again.
        retry_after: Duration,
    },
    /// 503 `keys_held_back`: no known key has signed the delivery, and fal may have a newer one; but for the sake of a
    /// signature that nobody knows, the keys are fetched only once a minute.
    #[error("no known key has signed this delivery, and newer keys are not fetched more than once a minute")]
    KeysHeldBack {
        /// When they may be fetched again.
        retry_after: Duration,
    },
    /// 503 `being_handled`: a delivery with the same id is being handled at this moment.
    #[error("a delivery with the same id is being handled")]
    BeingHandled,
    /// 503 `seen_ids_failed`: the [`SeenIds`](super::SeenIds) could not say whether the delivery is a repeat.
    #[error("it could not be found out whether this delivery is a repeat")]
    SeenIdsFailed,
}

impl Rejection {
    /// The status of the response.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::MissingHeader(_)
            | Self::RepeatedHeader(_)
            | Self::InvalidHeader(_)
            | Self::BadSignature
            | Self::Stale(_) => StatusCode::UNAUTHORIZED,
            Self::OtherAccount => StatusCode::FORBIDDEN,
            Self::BodyTooLong(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyCutOff => StatusCode::BAD_REQUEST,
            Self::BodyTimeout(_)
            | Self::NoKeys { .. }
            | Self::KeysHeldBack { .. }
            | Self::BeingHandled
            | Self::SeenIdsFailed => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// A short name that does not change: the `reason` of the response's body, and of the event and the metric.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::MissingHeader(_) => "missing_header",
            Self::RepeatedHeader(_) => "repeated_header",
            Self::InvalidHeader(_) => "invalid_header",
            Self::BadSignature => "bad_signature",
            Self::Stale(_) => "stale",
            Self::OtherAccount => "other_account",
            Self::BodyTooLong(_) => "body_too_long",
            Self::BodyTimeout(_) => "body_timeout",
            Self::BodyCutOff => "body_cut_off",
            Self::NoKeys { .. } => "no_keys",
            Self::KeysHeldBack { .. } => "keys_held_back",
            Self::BeingHandled => "being_handled",
            Self::SeenIdsFailed => "seen_ids_failed",
        }
    }

    /// When a repeat may succeed. Each 503 has it, and no other status.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoKeys { retry_after } | Self::KeysHeldBack { retry_after } => Some(*retry_after),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The response: problem details (RFC 9457) with the status and the reason, and nothing of the request.
    pub(super) fn into_response<R>(self) -> Response<ResponseBody<R>> {
        let status = self.status();
        let title = status.canonical_reason().unwrap_or_default();
        let body = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "reason": self.as_str() });
        let mut response = Response::new(ResponseBody::own(Bytes::from(body.to_string())));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(wait) = self.retry_after() {
            headers.insert(RETRY_AFTER, whole_seconds(wait).into());
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Rounded up, and never none: a caller that came back at once would be too early.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        for (wait, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60)] {
            assert_eq!(whole_seconds(Duration::from_millis(wait)), seconds);
        }
        assert_eq!(whole_seconds(Duration::MAX), u64::MAX);
    }
}
