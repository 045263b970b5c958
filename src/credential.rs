//! The credential itself. It is checked once, is a ready-made header from then on, and is wiped with its last clone.
//!
//! ```
//! use tower_fal::{Credential, Scheme};
//!
//! let credential = Credential::key("2f1d-key-id:not-a-real-secret\n")?; // the line break of `echo` is trimmed
//! assert_eq!(credential.scheme(), Scheme::Key);
//! assert_eq!(credential.key_id().unwrap().as_str(), "2f1d-key-id");
//! assert_eq!(format!("{credential:?}"), r#"Credential { scheme: Key, key_id: "2f1d-key-id" }"#);
//! # Ok::<(), tower_fal::CredentialError>(())
//! ```
//!
//! # What is refused
//! fal guarantees no format for its keys, so an unusual key is accepted. What surely is no key is refused, wherever it
//! comes from, with a sentence that says what it is and what to do, and that never shows the text:
//!
//! | a text that is | such as |
//! |---|---|
//! | JSON, a list, several keys | `{"FAL_KEY":"…"}`, `["…"]`, `id:secret,id:secret` |
//! | HTML or XML, a URL, a path | `<html>…`, `https://…`, `/run/secrets/fal` |
//! | a template that nothing has filled in | `${FAL_KEY}`, `{{ key }}`, `$(…)`, `%FAL_KEY%`, `<key_id>:<key_secret>` |
//! | a reference that nothing has resolved | `arn:…`, `op://…`, `vault:…`, `secretref:…`, `projects/…`, `keyring:…` |
//! | encrypted, or in base64 | `ENC[…]`, `encrypted:…`, `{cipher}…`, `!vault`, `-----BEGIN …` |
//! | a placeholder, or masked | `undefined`, `null`, `None`, `changeme`, `id:***` |
//! | wrapped in something else | `FAL_KEY=…`, `Key …`, `Bearer …`, quotes, brackets, a comma at the end |
//! | in the wrong place | swapped halves, a key as a token, a token as a key |
//!
//! # What is wiped, and what is not
//! The bytes of the header live in one buffer, which is overwritten with zeros when the last clone of the credential
//! and of its header is dropped. The text that is passed to a constructor remains the caller's to wipe. The copies that
//! an HTTP client, HTTP/2's header compression or TLS make while they send are out of this crate's reach.

use std::{fmt, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use secrecy::{ExposeSecret as _, SecretSlice};
use subtle::ConstantTimeEq as _;

use self::error::{Part, Problem};

mod error;
mod jwt;
mod redact;
mod shape;

pub use self::error::CredentialError;
pub(crate) use self::redact::redact;
pub(crate) use self::shape::{has_quote_at_an_end, may_be_credential, trim};

/// One fal credential: an API key or the token of a login. See the [module docs](self) for an example.
///
/// It is immutable and cheap to clone: a clone allocates nothing and shares the bytes. It has neither `Display` nor
/// `Serialize`, and `Debug` shows only the scheme, the key id and the account:
///
/// ```compile_fail
/// # let credential = tower_fal::Credential::key("id:secret").unwrap();
/// println!("{credential}");
/// ```
#[doc(alias = "api key")]
#[derive(Clone)]
pub struct Credential {
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    header: HeaderValue,
    scheme: Scheme,
    key_id: Option<KeyId>,
    expires_at: Option<SystemTime>,
    source: Option<Arc<str>>,
    /// Boxed, as most credentials name none, and the place of one is read for each request.
    account: Option<Box<Account>>,
}

#[derive(Clone)]
struct Account {
    id: AccountId,
    header: HeaderValue,
}

impl Account {
    fn new(id: AccountId) -> Result<Self, CredentialError> {
        let header = wiping_header(id.as_str().as_bytes().to_vec())?;
        Ok(Self { id, header })
    }
}

impl Credential {
    /// An API key in the form in which fal shows it, `id:secret`. It is sent as `Authorization: Key id:secret`.
    ///
    /// Blanks, line breaks and a byte order mark at the ends are trimmed. Only the first `:` separates, so a secret
    /// may hold more of them.
    ///
    /// Source: fal's documentation, page "Key-Based Authentication".
    ///
    /// # Errors
    /// When the value is empty, has no `:` with something on both sides, holds anything but visible ASCII, or surely is
    /// [something else](self#what-is-refused). The error names the rule and the position, never the content.
    pub fn key(value: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let (id, secret) = shape::key(value.as_ref())?;
        Self::assemble(Scheme::Key, &[id, ":", secret], Some(KeyId(id.into())), None)
    }

    /// An API key in two halves, as in `FAL_KEY_ID` and `FAL_KEY_SECRET`.
    ///
    /// ```
    /// # use tower_fal::Credential;
    /// let credential = Credential::key_pair("id", "secret")?;
    /// assert_eq!(credential.header(), "Key id:secret");
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    ///
    /// # Errors
    /// As [`key`](Self::key), for each half. Also when the id holds a `:`, or when the secret is a whole key.
    pub fn key_pair(id: impl AsRef<[u8]>, secret: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let (id, secret) = shape::key_pair(id.as_ref(), secret.as_ref())?;
        Self::assemble(Scheme::Key, &[id, ":", secret], Some(KeyId(id.into())), None)
    }

    /// The access token of a login. It is sent as `Authorization: Bearer …`.
    ///
    /// When the token is a JWT with an `exp` claim, that is its [expiry](Self::expires_at). Its signature is not
    /// checked, because fal does that. A token without the claim has no expiry.
    ///
    /// ```
    /// # use tower_fal::Credential;
    /// let credential = Credential::bearer("an-opaque-token")?;
    /// assert_eq!(credential.expires_at(), None);
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    ///
    /// # Errors
    /// As [`key`](Self::key), but for the `:`. Also when the token holds a character that a token cannot have (RFC
    /// 6750, section 2.1). A `:` is such a character, so an API key is refused: fal would answer `401 bearer: unable to
    /// decode issuer`.
    pub fn bearer(token: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let token = shape::token(token.as_ref())?;
        Self::assemble(Scheme::Bearer, &[token], None, jwt::expiry(token.as_bytes()))
    }

    fn assemble(
        scheme: Scheme,
        value: &[&str],
        key_id: Option<KeyId>,
        expires_at: Option<SystemTime>,
    ) -> Result<Self, CredentialError> {
        // The length is exact, so that the vector never grows or shrinks: either would leave a copy behind.
        let length = scheme.as_str().len() + 1 + value.iter().map(|piece| piece.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(scheme.as_str().as_bytes());
        bytes.push(b' ');
        for piece in value {
            bytes.extend_from_slice(piece.as_bytes());
        }
        let header = wiping_header(bytes)?;
        Ok(Self { inner: Arc::new(Inner { header, scheme, key_id, expires_at, source: None, account: None }) })
    }

    /// The same credential with a note of where it was found, such as `env:FAL_KEY`, for status, logs and errors.
    ///
    /// A [`CredentialSource`](crate::source::CredentialSource) that looks in several places sets it. Without it the
    /// name of the source is reported. It is shown, so never put the secret in it.
    #[must_use]
    pub fn with_source(self, name: impl Into<Arc<str>>) -> Self {
        Self { inner: Arc::new(Inner { source: Some(name.into()), ..Inner::clone(&self.inner) }) }
    }

    /// The same credential, acting for this account: a team, or the personal account of a login.
    ///
    /// A login's token is one user's, who may belong to several teams. The user id that fal has for the account says
    /// which of them pays; without it the personal account does. It is sent as `x-fal-user-id` wherever the credential
    /// is sent, in place of such a header that the request has already, and to no other place. A credential without an
    /// account leaves a caller's own `x-fal-user-id` as it is.
    ///
    /// The account is no secret: [`Debug`], the status of a store, refusals and logs show it. It belongs to the value: the
    /// same token for another account is another credential.
    ///
    /// Source: `fal` 1.83.0 (`sdk.py`), which sends the header with a login's token. A key belongs to one account
    /// already, and fal's own tools name none with it.
    ///
    /// ```
    /// # use tower_fal::Credential;
    /// let credential = Credential::bearer("an-opaque-token")?.for_account("github|1")?;
    /// assert_eq!(credential.account().unwrap().as_str(), "github|1");
    /// assert_eq!(format!("{credential:?}"), r#"Credential { scheme: Bearer, account: "github|1" }"#);
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    ///
    /// # Errors
    /// When the user id is empty, longer than 256 bytes, holds anything but visible ASCII, or looks like a credential.
    pub fn for_account(self, user_id: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let account = Account::new(AccountId(shape::account(user_id.as_ref())?.into()))?;
        Ok(Self { inner: Arc::new(Inner { account: Some(Box::new(account)), ..Inner::clone(&self.inner) }) })
    }

    /// Whether this is a key or a login's token.
    pub fn scheme(&self) -> Scheme {
        self.inner.scheme
    }

    /// The public half of a key; `None` for a login's token. It is safe to show: fal's own tools print it.
    pub fn key_id(&self) -> Option<&KeyId> {
        self.inner.key_id.as_ref()
    }

    /// The account that the credential acts for, if it [names one](Self::for_account). It is safe to show.
    pub fn account(&self) -> Option<&AccountId> {
        self.inner.account.as_ref().map(|account| &account.id)
    }

    /// When a login's token expires, if it says so. Keys do not expire.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.inner.expires_at
    }

    /// Where the credential was found, if its source noted that. See [`with_source`](Self::with_source).
    pub fn source(&self) -> Option<&str> {
        self.inner.source.as_deref()
    }

    /// The whole value of the `authorization` header, marked sensitive. **This is the secret.**
    ///
    /// A clone of it allocates nothing. The bytes are wiped only when the last such clone is gone as well.
    #[must_use]
    pub fn header(&self) -> &HeaderValue {
        &self.inner.header
    }

    /// The value of the `x-fal-user-id` header. It is marked sensitive although it is no secret: by this mark one that
    /// a caller has set is told from one of ours.
    #[inline]
    pub(crate) fn account_header(&self) -> Option<&HeaderValue> {
        self.inner.account.as_ref().map(|account| &account.header)
    }

    /// The same credential with bytes of its own, so that two threads do not count their clones in one place.
    pub(crate) fn duplicate(&self) -> Self {
        let header = wiping_header(self.inner.header.as_bytes().to_vec());
        let account = self.account().cloned().map(Account::new).transpose();
        match (header, account) {
            (Ok(header), Ok(account)) => {
                let account = account.map(Box::new);
                Self { inner: Arc::new(Inner { header, account, ..Inner::clone(&self.inner) }) }
            }
            _ => self.clone(),
        }
    }

    /// Whether both put the same bytes on the wire, those of the [account](Self::for_account) included. It takes the same
    /// time wherever the secrets differ.
    ///
    /// Where they were [found](Self::source) does not matter.
    #[must_use]
    pub fn same_value(&self, other: &Self) -> bool {
        self.account() == other.account()
            && bool::from(self.inner.header.as_bytes().ct_eq(other.inner.header.as_bytes()))
    }

    /// A text from outside without this secret in it.
    pub(crate) fn strike_out(&self, text: &str) -> String {
        let header = self.inner.header.as_bytes();
        let value = std::str::from_utf8(&header[self.scheme().as_str().len() + 1..]).unwrap_or_default();
        let secret = self.key_id().map_or(value, |key_id| &value[key_id.as_str().len() + 1..]);
        let mut text = text.replace(value, "…").replace(secret, "…"); // no part of any secret, so none comes about anew
        // One that was cut off may end in the first part of it.
        if let Some(part) = (4..secret.len()).rev().find(|&length| text.ends_with(&secret[..length])) {
            text.truncate(text.len() - part);
            text.push('…');
        }
        text
    }

    pub(crate) fn source_arc(&self) -> Option<&Arc<str>> {
        self.inner.source.as_ref()
    }

    pub(crate) fn is_expired_at(&self, now: SystemTime) -> bool {
        self.inner.expires_at.is_some_and(|expiry| expiry <= now)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Credential");
        shown.field("scheme", &self.inner.scheme);
        if let Some(key_id) = &self.inner.key_id {
            shown.field("key_id", key_id);
        }
        if let Some(account) = self.account() {
            shown.field("account", account);
        }
        shown.finish()
    }
}

/// A header whose bytes are wiped with its last clone. The vector has no room to spare.
fn wiping_header(bytes: Vec<u8>) -> Result<HeaderValue, CredentialError> {
    let bytes = Bytes::from_owner(WipedOnDrop(SecretSlice::from(bytes)));
    // Visible ASCII is always a valid header value; this only spares an `expect`.
    let mut header = HeaderValue::from_maybe_shared(bytes).map_err(|_| Part::Key.has(Problem::NoHeaderValue))?;
    header.set_sensitive(true);
    Ok(header)
}

/// What owns the header's bytes: [`Bytes`] drops it with its last clone, and `secrecy` wipes it then.
///
/// Aligned, so that the count of the clones, which lies beside it, shares a cache line with nothing.
#[repr(align(128))]
struct WipedOnDrop(SecretSlice<u8>);

impl AsRef<[u8]> for WipedOnDrop {
    fn as_ref(&self) -> &[u8] {
        self.0.expose_secret()
    }
}

/// The word in front of a credential in the `authorization` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// An API key.
    Key,
    /// The access token of a login.
    Bearer,
}

impl Scheme {
    /// The scheme as it is sent.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key => "Key",
            Self::Bearer => "Bearer",
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The public half of an API key: the part before the first `:`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Arc<str>);

impl KeyId {
    /// The id as text: visible ASCII, at most 256 bytes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for KeyId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The user id that fal has for an account: see [`Credential::for_account`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccountId(Arc<str>);

impl AccountId {
    /// The id as text: visible ASCII, at most 256 bytes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for AccountId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_becomes_a_sensitive_header_with_its_scheme() {
        let credential = Credential::key("id:secret").unwrap();
        assert_eq!(credential.header(), "Key id:secret");
        assert!(credential.header().is_sensitive());
        assert!(credential.clone().header().clone().is_sensitive());
    }

    #[test]
    fn only_the_first_colon_separates() {
        let credential = Credential::key("id:se:cr:et").unwrap();
        assert_eq!(credential.key_id().unwrap().as_str(), "id");
        assert_eq!(credential.header(), "Key id:se:cr:et");
    }

    #[test]
    fn debug_shows_only_the_scheme_and_the_key_id() {
        let credential = Credential::key("id:hush").unwrap();
        assert_eq!(format!("{credential:?}"), r#"Credential { scheme: Key, key_id: "id" }"#);
        assert_eq!(format!("{:?}", Credential::bearer("hush").unwrap()), "Credential { scheme: Bearer }");
        assert!(!format!("{:?}", credential.header()).contains("hush"));
    }

    #[test]
    fn a_note_of_the_source_does_not_change_the_value() {
        let plain = Credential::key("id:secret").unwrap();
        let noted = plain.clone().with_source("env:FAL_KEY");
        assert_eq!((plain.source(), noted.source()), (None, Some("env:FAL_KEY")));
        assert!(plain.same_value(&noted));
        assert!(!plain.same_value(&Credential::key("id:secreT").unwrap()));
        let team = plain.clone().for_account("team").unwrap();
        assert!(!plain.same_value(&team) && !team.same_value(&plain));
        assert!(team.same_value(&plain.clone().for_account(" team\n").unwrap().with_source("elsewhere")));
        assert!(!team.same_value(&plain.for_account("Team").unwrap()));
        let [key, token] = [Credential::key("e30:c2ln").unwrap(), Credential::bearer("e30.c2ln").unwrap()];
        assert!(!key.same_value(&token));
    }

    #[test]
    fn an_account_is_checked_and_its_header_is_ours() {
        let named = Credential::bearer("token").unwrap().for_account("github|1").unwrap();
        assert_eq!(named.account_header().unwrap(), "github|1");
        assert!(named.account_header().unwrap().is_sensitive());
        assert!(named.duplicate().same_value(&named));
        assert_eq!(format!("{named:?}"), r#"Credential { scheme: Bearer, account: "github|1" }"#);
        for (user_id, rule) in [
            ("", "is empty"),
            (" \n", "is empty"),
            ("id:hush", "looks like a credential"),
            ("eyJhdshush", "looks like a credential"),
            ("a b", "has a blank at byte 1"),
            ("caf\u{e9}", "a byte outside ASCII"),
            ("a\r\nx-evil: 1", "a line break"),
            ("undefined", "is a placeholder"),
            (&"a".repeat(257), "is longer than 256 bytes"),
        ] {
            let error = named.clone().for_account(user_id).unwrap_err().to_string();
            assert!(error.starts_with("the account's user id ") && error.contains(rule), "{user_id:?}: {error}");
            assert!(!error.contains("hush"));
        }
        assert!(named.for_account("a".repeat(256)).is_ok());
    }
}
