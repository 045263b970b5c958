use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use axum_core::response::Response;
use http::{HeaderValue, StatusCode, header::AUTHORIZATION, request::Parts};
use subtle::ConstantTimeEq as _;

use super::{Authenticate, Caller, Refused};
use crate::answer::Answer;

/// Callers who have a token, which they send as `authorization: Bearer TOKEN`, or as `Key TOKEN` as fal's official client
/// does with its `credentials`.
///
/// Each token is compared in constant time with what came, so how long a refusal takes says nothing about them but their
/// lengths. Clones share the tokens, so that a clone can [replace](Self::replace) them.
///
/// ```
/// use tower_fal::{CredentialStore, caller::{Caller, Tokens}, proxy::FalProxy};
///
/// # fn proxy(store: &CredentialStore) -> Result<(), rustls::Error> {
/// let tokens = Tokens::new([("token-of-acme", Caller::tenant("acme").max_in_flight(8))]);
/// let proxy = FalProxy::new(store)?.authenticate(tokens.clone());
/// # let _ = proxy;
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Tokens {
    callers: Arc<RwLock<Arc<[(Box<str>, Caller)]>>>,
}

impl Tokens {
    /// These tokens, each with whoever has it. Blanks around a token are left out, and a token that is empty admits
    /// nobody.
    #[must_use]
    pub fn new<T: AsRef<str>>(tokens: impl IntoIterator<Item = (T, Caller)>) -> Self {
        let all = Self::default();
        all.replace(tokens);
        all
    }

    /// Puts these in the place of all tokens, for requests from now on.
    pub fn replace<T: AsRef<str>>(&self, tokens: impl IntoIterator<Item = (T, Caller)>) {
        let tokens = tokens.into_iter().map(|(token, caller)| (token.as_ref().trim().into(), caller));
        let tokens = tokens.filter(|(token, _): &(Box<str>, _)| !token.is_empty()).collect();
        *self.callers.write().unwrap_or_else(PoisonError::into_inner) = tokens;
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all().len()
    }

    /// Whether there is none, so that nobody is admitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn all(&self) -> Arc<[(Box<str>, Caller)]> {
        Arc::clone(&self.callers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn find(&self, head: &Parts) -> Option<Caller> {
        let mut values = head.headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let presented = token(value)?;
        let mut found = None;
        for (token, caller) in &*self.all() {
            // All of them, so that the place of the right one does not show.
            if bool::from(token.as_bytes().ct_eq(presented)) {
                found = Some(caller.clone());
            }
        }
        found
    }
}

/// What follows the scheme, whose case does not matter: RFC 9110, 11.1.
fn token(value: &HeaderValue) -> Option<&[u8]> {
    let space = value.as_bytes().iter().position(|byte| *byte == b' ')?;
    let (scheme, token) = value.as_bytes().split_at(space);
    let is_ours = scheme.eq_ignore_ascii_case(b"bearer") || scheme.eq_ignore_ascii_case(b"key");
    is_ours.then(|| token.trim_ascii())
}

impl Authenticate for Tokens {
    async fn authenticate(&self, head: &Parts) -> Result<Caller, Refused> {
        self.find(head).ok_or_else(|| {
            let mut response: Response = UNKNOWN.into();
            response.headers_mut().insert(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        })
    }
}

const UNKNOWN: Answer = Answer::new(
    StatusCode::UNAUTHORIZED,
    "caller",
    "The request does not have a token of this server's in its `authorization` header.",
);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn tokens() -> Tokens {
        Tokens::new([("one", Caller::tenant("a")), (" two\n", Caller::tenant("b")), ("", Caller::tenant("nobody"))])
    }

    async fn name(tokens: &Tokens, values: &[&str]) -> Option<String> {
        let mut request = Request::get("/").body(()).unwrap();
        request.headers_mut().extend(values.iter().map(|value| (AUTHORIZATION, value.parse().unwrap())));
        let head = request.into_parts().0;
        tokens.authenticate(&head).await.ok()?.name().map(str::to_owned)
    }

    #[tokio::test]
    async fn a_token_is_presented_as_a_bearer_or_a_key() {
        for value in ["Bearer one", "bearer one", "Key one", "KEY  one"] {
            assert_eq!(name(&tokens(), &[value]).await.as_deref(), Some("a"), "{value}");
        }
        assert_eq!(name(&tokens(), &["Key two"]).await.as_deref(), Some("b"));
        for value in ["one", "Basic one", "Bearer ones", "Bearer on", "Bearer", "Bearer ", "Key  ", "Bearerone"] {
            assert_eq!(name(&tokens(), &[value]).await, None, "{value}");
        }
        assert_eq!(name(&tokens(), &[]).await, None);
        assert_eq!(name(&tokens(), &["Bearer one", "Bearer one"]).await, None);
    }

    #[tokio::test]
    async fn replaced_tokens_admit_nobody_any_more() {
        let tokens = tokens();
        tokens.clone().replace([("three", Caller::tenant("c"))]);
        assert_eq!(name(&tokens, &["Bearer one"]).await, None);
        assert_eq!(name(&tokens, &["Bearer three"]).await.as_deref(), Some("c"));
    }

    #[test]
    fn nothing_shows_a_token() {
        assert_eq!(format!("{:?}", tokens()), "Tokens { len: 2, .. }");
    }
}
