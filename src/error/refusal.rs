use std::{error::Error, fmt, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::{Kept, LockReason, Reason, ReloadError};
use crate::{
    application::Application,
    credential::{AccountId, KeyId},
    generation::Generation,
};

/// A credential that fal, or the application behind it, refused with 401 or 403: which one, why, and what was done.
///
/// One pointer and `Clone`; it holds at most 16 KiB of the answer's body and about as much of its headers. Its text is one sentence that says what to do next. It never shows the secret: `Debug`
/// leaves out the answer's headers and body, and a secret that the answer repeats is removed from the
/// [`detail`](Self::detail).
///
/// ```
/// # use http::{Request, Response, StatusCode};
/// # use http_body_util::Full;
/// # use tower::{ServiceBuilder, ServiceExt as _, service_fn};
/// # use tower_fal::retry::ReplayBody;
/// use tower_fal::{Credential, CredentialStore, error::{LockReason, Reason}};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let client = service_fn(async |_: Request<ReplayBody<Full<bytes::Bytes>>>| {
/// #     let body = r#"{"detail":"User is locked. Reason: Exhausted balance."}"#;
/// #     let answer = Response::builder().status(StatusCode::FORBIDDEN).header("x-fal-request-id", "b6e0");
/// #     answer.body(Full::<bytes::Bytes>::from(body))
/// # });
/// let store = CredentialStore::fixed(Credential::key("id:secret")?);
/// let fal = ServiceBuilder::new().layer(tower_fal::layer(&store)).service(client);
///
/// let request = Request::post("https://fal.run/fal-ai/flux/dev").body(Full::default())?;
/// let error = fal.oneshot(request).await.unwrap_err();
/// let refusal = error.refusal().ok_or("not a refusal")?;
///
/// assert_eq!(refusal.reason(), Reason::AccountLocked(LockReason::ExhaustedBalance));
/// assert_eq!(refusal.detail(), Some("User is locked. Reason: Exhausted balance."));
/// assert_eq!(refusal.request_id(), Some("b6e0")); // for fal's support
/// assert_eq!(refusal.key_id().map(|id| id.as_str()), Some("id"));
/// assert!(!refusal.was_replayed());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Refusal {
    inner: Arc<RefusalParts>,
}

/// The facts about a refused attempt: lent to the rule and to the event, and made a [`Refusal`] at the end.
pub(crate) struct RefusalParts {
    /// What the request was for.
    pub(crate) application: Application,
    pub(crate) status: StatusCode,
    pub(crate) reason: Reason,
    pub(crate) detail: Option<String>,
    pub(crate) error_type: Option<String>,
    pub(crate) request_id: Option<String>,
    pub(crate) key_id: Option<KeyId>,
    pub(crate) account: Option<AccountId>,
    pub(crate) generation: Option<Generation>,
    /// The newest of the store's credentials that the request was refused with; `None` if it brought its own.
    pub(crate) newest: Option<Generation>,
    pub(crate) source: Arc<str>,
    pub(crate) kept: Kept,
    pub(crate) replayable: bool,
    pub(crate) replayed: Replayed,
    pub(crate) reload: Option<ReloadError>,
}

/// With which other credentials a request was sent again. Each happens at most once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replayed {
    /// With one that is newer than all that it was sent with before.
    pub(crate) with_newer: bool,
    /// With the previous one.
    pub(crate) with_previous: bool,
    /// With one that had been refused, as fal came to accept it since.
    pub(crate) again: bool,
}

impl Replayed {
    pub(crate) fn is_any(self) -> bool {
        self.with_newer || self.with_previous || self.again
    }
}

#[cfg(test)]
impl RefusalParts {
    /// Of a request with its own credential, and an answer without a word.
    pub(crate) fn of_request(status: StatusCode, reason: Reason, source: Arc<str>) -> Self {
        Self {
            application: Application::at(None, ""),
            status,
            reason,
            detail: None,
            error_type: None,
            request_id: None,
            key_id: None,
            account: None,
            generation: None,
            newest: None,
            source,
            kept: Kept::copy(&HeaderMap::new(), b""),
            replayable: false,
            replayed: Replayed::default(),
            reload: None,
        }
    }
}

impl Refusal {
    pub(crate) fn new(parts: RefusalParts) -> Self {
        Self { inner: Arc::new(parts) }
    }

    /// 401 or 403.
    pub fn status(&self) -> StatusCode {
        self.inner.status
    }

    /// Why it was refused.
    pub fn reason(&self) -> Reason {
        self.inner.reason
    }

    /// The answer's own words, if it has any: one line of at most 300 characters.
    pub fn detail(&self) -> Option<&str> {
        self.inner.detail.as_deref()
    }

    /// fal's error type, such as `authorization_error`, if the answer has one.
    pub fn error_type(&self) -> Option<&str> {
        self.inner.error_type.as_deref()
    }

    /// The `x-fal-request-id` of the answer: what fal's support asks for.
    pub fn request_id(&self) -> Option<&str> {
        self.inner.request_id.as_deref()
    }

    /// The public half of the refused key; `None` for a login's token.
    pub fn key_id(&self) -> Option<&KeyId> {
        self.inner.key_id.as_ref()
    }

    /// The account that the refused credential acts for, if it [names one](crate::Credential::for_account).
    pub fn account(&self) -> Option<&AccountId> {
        self.inner.account.as_ref()
    }

    /// Which of the store's credentials was refused; `None` when the request brought its own.
    pub fn generation(&self) -> Option<Generation> {
        self.inner.generation
    }

    /// Where the refused credential was found, such as `env:FAL_KEY`.
    pub fn source_name(&self) -> &str {
        &self.inner.source
    }

    /// The headers of the answer, as far as they fit into 16 KiB. `set-cookie` and `x-fal-cdn-token` are left out, as
    /// they hold secrets.
    pub fn headers(&self) -> &HeaderMap {
        &self.inner.kept.headers
    }

    /// The body of the answer, as far as it was read: at most 16 KiB. Encoded, if the answer has a `content-encoding`.
    pub fn body(&self) -> &Bytes {
        &self.inner.kept.body
    }

    /// Whether the request could have been replayed. It could not if its body was longer than the layer keeps, if the
    /// memory for such bodies was used up, or if the body ended early.
    pub fn is_replayable(&self) -> bool {
        self.inner.replayable
    }

    /// Whether the request had been replayed with another credential, so that this is the answer to a later attempt.
    pub fn was_replayed(&self) -> bool {
        self.inner.replayed.is_any()
    }

    /// Why no newer credential could be loaded, if a reload was tried and failed.
    pub fn reload_error(&self) -> Option<&ReloadError> {
        self.inner.reload.as_ref()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inner } = self;
        let who = Who { key_id: inner.key_id.as_ref(), account: inner.account.as_ref(), source: &inner.source };
        let said = inner.detail.as_ref().map_or_else(String::new, |detail| format!(" ({detail})"));
        match inner.reason {
            Reason::MissingCredential => {
                write!(
                    f,
                    "fal saw no credential although {who} was sent: look for what strips `authorization` on the way"
                )
            }
            Reason::MalformedCredential => {
                write!(f, "fal cannot read {who}: it must have the form `id:secret`, as fal.ai/dashboard/keys shows it")
            }
            Reason::WrongScheme => write!(
                f,
                "fal takes {who} for another kind of credential: API keys are made with `Credential::key`, tokens of a \
                 login with `Credential::bearer`"
            ),
            Reason::UnknownCredential => write!(
                f,
                "fal does not know {who}: it was revoked, has expired or was mistyped; put a valid one in its place, \
                 from fal.ai/dashboard/keys"
            ),
            Reason::AccountLocked(reason) => write!(
                f,
                "the account of {who} is locked{}: {}; another key of this account will not help",
                if reason == LockReason::Other { said.as_str() } else { "" },
                reason.what_to_do()
            ),
            Reason::InsufficientPermissions => {
                write!(f, "{who} lacks a permission for this call: use a key that has it, from fal.ai/dashboard/keys")
            }
            Reason::AccessDenied => {
                write!(f, "{who} may not use this: check the name of the app, and whose account the key belongs to")
            }
            Reason::Application => write!(
                f,
                "the application refused the request with {}{said} by its own rules, and not because of {who}: send \
                 what the application asks for",
                inner.status
            ),
            Reason::Unknown => write!(
                f,
                "{who} was refused with {}{said} for a reason that is not known here: check at fal.ai/dashboard/keys \
                 that it is valid, and write to support@fal.ai if it is",
                inner.status
            ),
        }?;
        if let Some(id) = self.request_id() {
            write!(f, " [x-fal-request-id {id}]")?;
        }
        Ok(())
    }
}

/// The credential, as a sentence names it.
struct Who<'a> {
    key_id: Option<&'a KeyId>,
    account: Option<&'a AccountId>,
    source: &'a str,
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key_id {
            Some(key_id) => write!(f, "key `{key_id}`")?,
            None => f.write_str("the token")?,
        }
        if let Some(account) = self.account {
            write!(f, " for the account `{account}`")?;
        }
        write!(f, " from {}", self.source)
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusal")
            .field("status", &self.inner.status)
            .field("reason", &self.inner.reason)
            .field("detail", &self.inner.detail)
            .field("request_id", &self.request_id())
            .field("error_type", &self.inner.error_type)
            .field("key_id", &self.inner.key_id)
            .field("account", &self.inner.account)
            .field("generation", &self.inner.generation)
            .field("source", &self.inner.source)
            .field("replayable", &self.inner.replayable)
            .field("replayed", &self.was_replayed())
            .field("reload_error", &self.inner.reload)
            .finish_non_exhaustive()
    }
}

impl Error for Refusal {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.inner.reload.as_ref().map(|error| error as &(dyn Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::Credential;

    fn said(reason: Reason, detail: Option<&str>) -> String {
        let unauthorized = StatusCode::UNAUTHORIZED;
        Refusal::new(RefusalParts {
            key_id: Credential::key("id:secret").unwrap().key_id().cloned(),
            detail: detail.map(ToOwned::to_owned),
            request_id: Some("b6e0".to_owned()),
            ..RefusalParts::of_request(unauthorized, reason, "env:FAL_KEY".into())
        })
        .to_string()
    }

    #[test]
    fn each_text_names_the_key_and_a_next_step() {
        for (reason, next_step) in [
            (Reason::MissingCredential, "look for what strips `authorization`"),
            (Reason::MalformedCredential, "must have the form `id:secret`"),
            (Reason::WrongScheme, "`Credential::key`"),
            (Reason::UnknownCredential, "put a valid one in its place"),
            (Reason::AccountLocked(LockReason::ExhaustedBalance), "top up"),
            (Reason::AccountLocked(LockReason::Other), "see fal.ai/dashboard"),
            (Reason::InsufficientPermissions, "use a key that has it"),
            (Reason::AccessDenied, "check the name of the app"),
            (Reason::Application, "send what the application asks for"),
            (Reason::Unknown, "write to support@fal.ai"),
        ] {
            for detail in [None, Some("its words")] {
                let text = said(reason, detail);
                for part in ["key `id` from env:FAL_KEY", next_step, " [x-fal-request-id b6e0]"] {
                    assert!(text.contains(part), "{part}: {text}");
                }
                let shows =
                    matches!(reason, Reason::Application | Reason::Unknown | Reason::AccountLocked(LockReason::Other));
                assert_eq!(text.contains(" (its words)"), shows && detail.is_some(), "{text}");
            }
        }
    }

    #[test]
    fn a_token_is_named_by_its_account() {
        let token = Credential::bearer("hush").unwrap().for_account("github|1").unwrap();
        let refusal = Refusal::new(RefusalParts {
            account: token.account().cloned(),
            ..RefusalParts::of_request(StatusCode::UNAUTHORIZED, Reason::UnknownCredential, "login".into())
        });
        assert!(refusal.to_string().starts_with("fal does not know the token for the account `github|1` from login: "));
        assert!(format!("{refusal:?}").contains(r#"account: Some("github|1")"#));
    }
}
