//! Answers of our own to a client of the proxy or of the route for tokens, in the one form that fal's official client
//! shows: `application/json` with `message`.

use axum_core::{body::Body, response::Response};
use http::{HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::json;

/// In each answer of ours, and in none of fal's: the name of the rule.
pub(crate) const RULE: HeaderName = HeaderName::from_static("x-tower-fal-rule");

/// An answer that is not fal's. It holds nothing of the request and no secret: all of its texts are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// A short name that does not change.
    pub(crate) rule: &'static str,
    /// A sentence for whoever sees the client's error.
    pub(crate) message: &'static str,
    /// What whoever runs the server can change, if that is the way out.
    pub(crate) option: Option<&'static str>,
    /// One more header that the status asks for, its name in lower case.
    pub(crate) header: Option<(&'static str, &'static str)>,
}

impl Answer {
    pub(crate) const fn new(status: StatusCode, rule: &'static str, message: &'static str) -> Self {
        Self { status, rule, message, option: None, header: None }
    }

    /// The option that would change it.
    pub(crate) const fn option(mut self, option: &'static str) -> Self {
        self.option = Some(option);
        self
    }

    pub(crate) const fn header(mut self, name: &'static str, value: &'static str) -> Self {
        self.header = Some((name, value));
        self
    }

    /// What the client's developer reads.
    pub(crate) fn body(&self) -> String {
        match self.option {
            Some(option) => json!({ "message": self.message, "rule": self.rule, "option": option }),
            None => json!({ "message": self.message, "rule": self.rule }),
        }
        .to_string()
    }

    /// The answer with this body, which is [`body`](Self::body) as the caller has it.
    pub(crate) fn response<B>(&self, body: impl FnOnce(String) -> B) -> http::Response<B> {
        let mut response = http::Response::new(body(self.body()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(RULE, HeaderValue::from_static(self.rule));
        if let Some((name, value)) = self.header {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        response
    }
}

impl From<Answer> for Response {
    fn from(answer: Answer) -> Self {
        answer.response(Body::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_json_with_a_message_and_a_header_of_its_own() {
        let answer = Answer::new(StatusCode::METHOD_NOT_ALLOWED, "method", "No.").header("allow", "GET");
        let response = answer.response(|body| body);
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()["content-type"], "application/json");
        assert_eq!(
            (&response.headers()["allow"], &response.headers()[RULE]),
            (&"GET".parse().unwrap(), &"method".parse().unwrap())
        );
        assert_eq!(response.into_body(), r#"{"message":"No.","rule":"method"}"#);
        assert_eq!(answer.option("allow_more").body(), r#"{"message":"No.","option":"allow_more","rule":"method"}"#);
    }
}
