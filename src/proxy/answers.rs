//! What the proxy answers by itself. What a target or a caller is refused with stands where that is judged.
//!
//! fal's official client sends a request again that is answered with 429, 502, 503 or 504, a billed one too. So the first
//! three are for requests of which nothing was sent to fal, and the last one has a header with which the client sends
//! nothing again.
//!
//! Source: `@fal-ai/client` 1.10.1 (`retry.ts`).

use http::StatusCode;

use crate::answer::Answer;

pub(super) const METHOD: Answer = Answer::new(
    StatusCode::METHOD_NOT_ALLOWED,
    "method",
    "The proxy forwards GET, POST and PUT. For OPTIONS, the server needs a layer for CORS.",
)
.header("allow", "GET, POST, PUT");

pub(super) const NOT_POST: Answer =
    Answer::new(StatusCode::METHOD_NOT_ALLOWED, "method", "Realtime tokens are asked for with POST.")
        .header("allow", "POST");

pub(super) const ENDPOINT: Answer = Answer::new(
    StatusCode::FORBIDDEN,
    "endpoint",
    "The target's endpoint is not one of those that this server allows.",
)
.option("allow_endpoint");

pub(super) const ENDPOINT_OF_CALLER: Answer = Answer::new(
    StatusCode::FORBIDDEN,
    "endpoint",
    "The target's endpoint is not one of those that this caller may use.",
);

/// A 404, so that it does not say whether there is such a request.
pub(super) const NOT_THEIRS: Answer =
    Answer::new(StatusCode::NOT_FOUND, "request_owner", "The caller has submitted no request with this id.");

pub(super) const NO_CREDENTIAL: Answer = Answer::new(
    StatusCode::FORBIDDEN,
    "no_credential",
    "The caller has no credential for fal, and this server lends none.",
);

pub(super) const TOO_LONG: Answer = Answer::new(
    StatusCode::PAYLOAD_TOO_LARGE,
    "body_length",
    "The body of the request is longer than this server allows.",
)
.option("max_body");

pub(super) const NOT_JSON: Answer = Answer::new(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "content_type",
    "The body of the request is not `application/json`.",
);

pub(super) const TOO_MANY: Answer = Answer::new(
    StatusCode::TOO_MANY_REQUESTS,
    "in_flight",
    "As many requests of this caller are under way as this server allows.",
)
.option("max_in_flight")
.header("retry-after", "1");

pub(super) const NOT_CONNECTED: Answer =
    Answer::new(StatusCode::BAD_GATEWAY, "not_connected", "There is no connection to fal. Nothing was sent.");

/// Without the header the official client would send the request up to three times more, while fal runs it.
pub(super) const TIMED_OUT: Answer = Answer::new(
    StatusCode::GATEWAY_TIMEOUT,
    "first_byte_timeout",
    "fal's answer did not begin in time. The request may still be running, and is billed then.",
)
.option("first_byte_timeout")
.header("x-fal-request-timeout-type", "user");

/// Not a 502, which the official client would take for a reason to send the request again.
pub(super) const BROKEN: Answer = Answer::new(
    StatusCode::INTERNAL_SERVER_ERROR,
    "broken",
    "The connection to fal broke before there was an answer. The request may have run, and is billed then.",
);
