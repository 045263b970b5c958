use std::sync::Arc;

/// Whose deliveries are believed.
///
/// fal signs for all of its customers with the same keys, and any of them can name your URL when they submit a request.
/// So a good signature says "this comes from fal", and only the account says "this is for you".
#[derive(Clone, Debug)]
pub struct Accounts(Option<Arc<[Box<str>]>>);

impl Accounts {
    /// These accounts and no others, by their user ids. It is the id that fal puts into `X-Fal-Webhook-User-Id`, such as
    /// `github|12345`; the [page on webhooks](crate::docs::webhooks#which-is-my-user-id) says how to find yours.
    ///
    /// # Errors
    /// When there is no id, or one that cannot stand in a header: an id is 1 to 256 visible characters of ASCII.
    pub fn only<I>(user_ids: I) -> Result<Self, InvalidAccounts>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let mut accounts = Vec::new();
        for id in user_ids {
            let id = id.as_ref();
            if !(1..=256).contains(&id.len()) || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(InvalidAccounts::NotAnId);
            }
            accounts.push(id.into());
        }
        if accounts.is_empty() { Err(InvalidAccounts::Empty) } else { Ok(Self(Some(accounts.into()))) }
    }

    /// Every customer of fal's. Whoever has an account can then have a delivery of any content signed for your URL, so
    /// the handler has to look at [`user_id`](super::VerifiedWebhook::user_id) itself.
    #[must_use]
    pub fn any() -> Self {
        Self(None)
    }

    pub(super) fn include(&self, user_id: &str) -> bool {
        self.0.as_ref().is_none_or(|accounts| accounts.iter().any(|account| **account == *user_id))
    }
}

/// Why a list of accounts cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAccounts {
    /// There is none, so that nothing would ever be believed.
    #[error("there is no account; name the user ids of your accounts, or ask for any account by its name")]
    Empty,
    /// There is one that no delivery can have.
    #[error("a user id is 1 to 256 visible characters of ASCII, without blanks")]
    NotAnId,
}
