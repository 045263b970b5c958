use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// What a delivery says: its body, read as JSON. Read it after the layer has verified the bytes.
///
/// Source: fal's documentation, "Webhooks".
///
/// ```
/// use serde::Deserialize;
/// use tower_fal::webhook::{WebhookPayload, WebhookStatus};
///
/// #[derive(Deserialize)]
/// struct Images {
///     images: Vec<Image>,
/// }
///
/// #[derive(Deserialize)]
/// struct Image {
///     url: String,
/// }
///
/// let body = br#"{"request_id":"123","gateway_request_id":"123","status":"OK",
///     "payload":{"images":[{"url":"https://v3.fal.media/files/cat.png"}]}}"#;
/// let webhook = WebhookPayload::from_slice(body)?;
/// assert_eq!(webhook.status, WebhookStatus::Ok);
/// assert_eq!(webhook.output::<Images>()?.images[0].url, "https://v3.fal.media/files/cat.png");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[non_exhaustive]
pub struct WebhookPayload {
    /// The id that the queue gave when the request was submitted. It is the same in each repeat of the delivery.
    pub request_id: String,
    /// The id of the attempt that led to this result. It is another one when fal ran the request again.
    #[serde(default)]
    pub gateway_request_id: Option<String>,
    /// Whether the request succeeded.
    pub status: WebhookStatus,
    /// What the application answered. With an error it may be the application's own answer, such as the list of what is
    /// wrong with the input; it is `None` when there is none, or none that can be shown as JSON.
    #[serde(default)]
    pub payload: Option<Value>,
    /// What went wrong, if something did.
    #[serde(default)]
    pub error: Option<String>,
    /// Why there is no `payload`, although the request succeeded.
    #[serde(default)]
    pub payload_error: Option<String>,
}

/// Whether a request succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub enum WebhookStatus {
    /// `OK`
    #[serde(rename = "OK")]
    Ok,
    /// `ERROR`
    #[serde(rename = "ERROR")]
    Error,
    /// A status that fal did not document when this was written.
    #[serde(other)]
    Unknown,
}

impl WebhookPayload {
    /// Reads the body of a delivery.
    ///
    /// # Errors
    /// When it is not JSON of this form. Members that are not known are passed over.
    pub fn from_slice(body: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body)
    }

    /// The output of a request that succeeded.
    ///
    /// # Errors
    /// When the request failed, when there is no payload, or when it is not of the type.
    pub fn output<T: DeserializeOwned>(&self) -> Result<T, OutputError> {
        match (self.status, &self.payload) {
            (WebhookStatus::Ok, Some(payload)) => T::deserialize(payload).map_err(OutputError::Unexpected),
            (WebhookStatus::Ok, None) => Err(OutputError::Missing(self.payload_error.clone().unwrap_or_default())),
            _ => Err(OutputError::Failed(self.error.clone().unwrap_or_default())),
        }
    }
}

/// Why a delivery has no output. What fal says about it is in the value and not in the text, which may be logged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The request failed. The value is fal's `error`.
    #[error("the request failed; the webhook's `error` and `payload` say why")]
    Failed(String),
    /// The request succeeded, and its result could not be put into the delivery. The value is fal's `payload_error`.
    #[error("the webhook has no payload; fetch the result from the queue")]
    Missing(String),
    /// The payload is not what was expected.
    #[error("the payload of the webhook is not of the expected form")]
    Unexpected(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(body: &str) -> Result<Vec<u8>, OutputError> {
        WebhookPayload::from_slice(body.as_bytes()).unwrap().output()
    }

    #[test]
    fn an_output_is_there_only_when_the_request_succeeded() {
        assert_eq!(output(r#"{"request_id":"r","status":"OK","payload":[1,2],"new":{}}"#).unwrap(), [1, 2]);
        assert!(matches!(
            output(r#"{"request_id":"r","status":"ERROR","payload":[1],"error":"no"}"#),
            Err(OutputError::Failed(error)) if error == "no"
        ));
        assert!(matches!(
            output(r#"{"request_id":"r","status":"OK","payload":null,"payload_error":"odd"}"#),
            Err(OutputError::Missing(error)) if error == "odd"
        ));
        assert!(matches!(output(r#"{"request_id":"r","status":"OK","payload":{}}"#), Err(OutputError::Unexpected(_))));
        assert!(matches!(output(r#"{"request_id":"r","status":"SOON","payload":[1]}"#), Err(OutputError::Failed(_))));
    }

    #[test]
    fn a_body_of_another_form_is_an_error() {
        for body in ["", "{}", "[]", r#"{"request_id":"r"}"#, r#"{"request_id":1,"status":"OK"}"#] {
            assert!(WebhookPayload::from_slice(body.as_bytes()).is_err(), "{body}");
        }
    }
}
