//! fal's hosts and header names, each written once and with its source.
//!
//! [`mock`](crate::mock) has literals of its own: it is what the rest of the crate is tested against.

use http::HeaderMap;

/// The hosts of fal's API, as its own clients call them: running models, their queue, their sockets, the REST API
/// (its older name too), and the platform API. Not the CDN and not the login, which take other credentials.
///
/// Source: `fal_client` 1.0.3 (`client.py`), `@fal-ai/client` 1.10.1 (`config.ts`), `fal` 1.83.0 (`flags.py`), and
/// fal's documentation, "Platform APIs".
pub(crate) const API_HOSTS: [&str; 6] =
    ["fal.run", "queue.fal.run", "ws.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "api.fal.ai"];

/// Hosts of the API, and those to which `fal_client` turns when they cannot be reached.
///
/// Source: `fal_client` 1.0.3 (`client.py`, `_BACKUP_DOMAINS`).
pub(crate) const BACKUP_HOSTS: [(&str, &str); 2] = [("fal.run", "falrun.com"), ("queue.fal.run", "queue.falrun.com")];

/// Where realtime tokens are minted, and where they are used.
#[cfg(feature = "realtime")]
pub(crate) mod token {
    /// The REST API. Older clients call it `rest.alpha.fal.ai`.
    ///
    /// Source: fal's documentation, "Real-time inference"; `@fal-ai/client` 1.10.1 (`config.ts`).
    pub(crate) const REST: &str = "https://rest.fal.ai";

    /// The newer endpoint.
    ///
    /// Source: fal's documentation, "Real-time inference".
    pub(crate) const REALTIME_PATH: &str = "/tokens/realtime";

    /// The older endpoint, with the slash at its end.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`auth.ts`), `fal_client` 1.0.3 (`client.py`).
    pub(crate) const TOKENS_PATH: &str = "/tokens/";

    /// Where the sockets of the realtime protocol are opened.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`realtime.ts`).
    pub(crate) const SOCKETS: &str = "wss://fal.run";

    /// The parameter of the query that holds the token.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`realtime.ts`, `streaming.ts`).
    pub(crate) const PARAMETER: &str = "fal_jwt_token";
}

/// Where the public keys are with which fal signs its webhooks. Older pages name `rest.alpha.fal.ai`.
///
/// Source: fal's documentation, "Webhooks".
#[cfg(feature = "webhook")]
pub(crate) const WEBHOOK_KEYS: &str = "https://rest.fal.ai/.well-known/jwks.json";

/// Whether a runner handled the request: then the answer is the application's, and fal had accepted the credential.
pub(crate) fn is_of_a_runner(headers: &HeaderMap) -> bool {
    [header::SERVED_FROM, header::BILLABLE_UNITS, header::RUNNER_HINTS].iter().any(|name| headers.contains_key(name))
}

/// Header names, in lower case as HTTP/2 has them.
#[allow(dead_code)] // which of them are used depends on the features
pub(crate) mod header {
    use http::HeaderName;

    /// In each answer of fal's gateway: the id of the request, which fal's support asks for.
    ///
    /// Source: `fal_client` 1.0.3 (`client.py`), which takes an answer without it for one of the ingress.
    pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-fal-request-id");

    /// The type of an error of the platform, such as `startup_timeout`.
    ///
    /// Source: fal's documentation, "Request errors".
    pub(crate) const ERROR_TYPE: HeaderName = HeaderName::from_static("x-fal-error-type");

    /// `true` or `false`: whether a model's error may go away when the request is repeated.
    ///
    /// Source: fal's documentation, "Errors".
    pub(crate) const RETRYABLE: HeaderName = HeaderName::from_static("x-fal-retryable");

    /// `1` or `0`: whether a request has to be repeated, such as one that was refused because too many were running.
    ///
    /// Source: fal's documentation, "Concurrency limits".
    pub(crate) const NEEDS_RETRY: HeaderName = HeaderName::from_static("x-fal-needs-retry");

    /// `user` when the timeout was the one that the caller had asked for.
    ///
    /// Source: fal's documentation, "Platform Headers"; `fal_client` 1.0.3 (`client.py`).
    pub(crate) const REQUEST_TIMEOUT_TYPE: HeaderName = HeaderName::from_static("x-fal-request-timeout-type");

    /// The runner that served the request. An answer of fal's own has none.
    ///
    /// Source: fal's documentation, "Platform Headers": "internal identifier of the runner that served the request".
    pub(crate) const SERVED_FROM: HeaderName = HeaderName::from_static("x-fal-served-from");

    /// What the request is billed.
    ///
    /// Source: fal's documentation, "Platform Headers".
    pub(crate) const BILLABLE_UNITS: HeaderName = HeaderName::from_static("x-fal-billable-units");

    /// What a runner says about itself, so that later requests can be routed to it.
    ///
    /// Source: fal's documentation, "Platform Headers"; `fal` 1.83.0 (`app.py`), where the application sets it.
    pub(crate) const RUNNER_HINTS: HeaderName = HeaderName::from_static("x-fal-runner-hints");

    /// In the answers of ordinary runs: a bearer token for fal's CDN, which is a secret.
    ///
    /// Source: fal-ai/fal pull request #1136.
    pub(crate) const CDN_TOKEN: HeaderName = HeaderName::from_static("x-fal-cdn-token");

    /// The account that a request acts for, where a credential may act for several: a team under a login.
    ///
    /// Source: `fal` 1.83.0 (`sdk.py`).
    pub(crate) const USER_ID: HeaderName = HeaderName::from_static("x-fal-user-id");

    /// The id of the request whose result a webhook delivers.
    ///
    /// Source of the four headers of a webhook: fal's documentation, "Webhooks".
    pub(crate) const WEBHOOK_REQUEST_ID: HeaderName = HeaderName::from_static("x-fal-webhook-request-id");

    /// The account whose key submitted that request.
    pub(crate) const WEBHOOK_USER_ID: HeaderName = HeaderName::from_static("x-fal-webhook-user-id");

    /// When the webhook was signed, in seconds since 1970.
    pub(crate) const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("x-fal-webhook-timestamp");

    /// The Ed25519 signature in hexadecimal digits.
    pub(crate) const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("x-fal-webhook-signature");
}
