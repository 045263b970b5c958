//! The credential itself: checked once, a ready-made header from then on, wiped when its last clone goes.
//!
//! ```
//! use tower_fal::{Credential, Scheme};
//!
//! let credential = Credential::key("2f1d-key-id:not-a-real-secret\n")?; // the newline of `echo` is trimmed
//! assert_eq!(credential.scheme(), Scheme::Key);
//! assert_eq!(credential.key_id().unwrap().as_str(), "2f1d-key-id");
//! assert_eq!(format!("{credential:?}"), r#"Credential { scheme: Key, key_id: "2f1d-key-id" }"#);
//! # Ok::<(), tower_fal::CredentialError>(())
//! ```
//!
//! # What is wiped, and what is not
//! The bytes of the header live in one buffer that is overwritten with zeros when the last clone of the
//! credential and of its header is dropped. The text handed to a constructor stays the caller's to wipe, and the
//! copies that an HTTP client, HTTP/2's header compression or TLS make while they send are out of this crate's
//! reach.

use std::{fmt, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use secrecy::{ExposeSecret as _, SecretSlice};
use subtle::ConstantTimeEq as _;

use self::{
    error::{Part, Problem},
    shape::accept,
};

mod error;
mod jwt;
mod shape;

pub use self::error::CredentialError;
pub(crate) use self::shape::{may_be_credential, trim};

/// The longest key id taken, in bytes. Those seen in the wild are UUIDs; an id ends up in logs and labels.
const MAX_KEY_ID_LEN: usize = 256;

/// One fal credential: an API key or the token of a login. See the [module docs](self) for an example.
///
/// Immutable and cheap to clone: a clone allocates nothing and shares the bytes. There is neither `Display` nor
/// `Serialize`, and `Debug` shows the scheme and the key id only:
///
/// ```compile_fail
/// # let credential = tower_fal::Credential::key("id:secret").unwrap();
/// println!("{credential}");
/// ```
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
}

impl Credential {
    /// An API key in the form in which fal hands it out: `id:secret`. It is sent as `Authorization: Key id:secret`.
    ///
    /// Blanks, line breaks and a byte order mark at the ends are trimmed. Only the first `:` separates, so a secret
    /// may hold more of them. The shape of the two halves is not checked any further, as fal guarantees none.
    ///
    /// Source: fal's documentation, page "Key-Based Authentication".
    ///
    /// # Errors
    /// When the value is empty, has no `:` with something on both sides, holds anything but visible ASCII, or
    /// still wears its packaging (`Key …`, `Bearer …`, quotes, `FAL_KEY=…`). The error names the rule and the
    /// position, never the content.
    pub fn key(value: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let key = accept(Part::Key, value.as_ref())?;
        let colon = key.iter().position(|&byte| byte == b':').ok_or(Part::Key.has(Problem::NoColon))?;
        let (id, secret) = (&key[..colon], &key[colon + 1..]);
        if secret.is_empty() {
            return Err(Part::Key.has(Problem::NothingAfterColon));
        }
        Self::assemble(Scheme::Key, &[key], Some(KeyId::new(id)?), None)
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
    /// As [`key`](Self::key), for each half; also when the id holds a `:`, or when the secret is a whole key.
    pub fn key_pair(id: impl AsRef<[u8]>, secret: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let id = accept(Part::KeyId, id.as_ref())?;
        let secret = accept(Part::KeySecret, secret.as_ref())?;
        if id.contains(&b':') {
            return Err(Part::KeyId.has(Problem::IdWithColon));
        }
        if secret.strip_prefix(id).is_some_and(|rest| rest.starts_with(b":")) {
            return Err(Part::KeySecret.has(Problem::WholeKeyAsSecret));
        }
        Self::assemble(Scheme::Key, &[id, b":", secret], Some(KeyId::new(id)?), None)
    }

    /// The access token of a login, sent as `Authorization: Bearer …`.
    ///
    /// When the token is a JWT with an `exp` claim, that is its [expiry](Self::expires_at). Its signature is not
    /// checked (fal does that), and a token that states no expiry has none.
    ///
    /// An API key does not belong here: fal answers `401 bearer: unable to decode issuer` to one that is sent so.
    ///
    /// ```
    /// # use tower_fal::Credential;
    /// let credential = Credential::bearer("an-opaque-token")?;
    /// assert_eq!(credential.expires_at(), None);
    /// # Ok::<(), tower_fal::CredentialError>(())
    /// ```
    ///
    /// # Errors
    /// As [`key`](Self::key), but for the `:`.
    pub fn bearer(token: impl AsRef<[u8]>) -> Result<Self, CredentialError> {
        let token = accept(Part::Token, token.as_ref())?;
        Self::assemble(Scheme::Bearer, &[token], None, jwt::expiry(token))
    }

    fn assemble(
        scheme: Scheme,
        value: &[&[u8]],
        key_id: Option<KeyId>,
        expires_at: Option<SystemTime>,
    ) -> Result<Self, CredentialError> {
        // The length is exact, so that the vector never grows or shrinks: either would leave a copy behind.
        let length = scheme.as_str().len() + 1 + value.iter().map(|piece| piece.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(scheme.as_str().as_bytes());
        bytes.push(b' ');
        for piece in value {
            bytes.extend_from_slice(piece);
        }
        let header = wiping_header(bytes)?;
        Ok(Self { inner: Arc::new(Inner { header, scheme, key_id, expires_at, source: None }) })
    }

    /// The same credential with a note of where it was found, such as `env:FAL_KEY`, for status, logs and errors.
    ///
    /// [`CredentialSource`](crate::source::CredentialSource)s that look in several places set it; without it the
    /// source's own name is reported. Never put the secret in it.
    #[must_use]
    pub fn with_source(self, name: impl Into<Arc<str>>) -> Self {
        Self { inner: Arc::new(Inner { source: Some(name.into()), ..Inner::clone(&self.inner) }) }
    }

    /// Whether this is a key or a login's token.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.inner.scheme
    }

    /// The public half of a key; `None` for a login's token. It is safe to show: fal's own tools print it.
    #[must_use]
    pub fn key_id(&self) -> Option<&KeyId> {
        self.inner.key_id.as_ref()
    }

    /// When a login's token says that it expires. Keys do not.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.inner.expires_at
    }

    /// Where the credential was found, when its source noted that. See [`with_source`](Self::with_source).
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        self.inner.source.as_deref()
    }

    /// The whole value of the `authorization` header, marked sensitive. **This is the secret.**
    ///
    /// Cloning it allocates nothing, and the bytes are wiped only when the last such clone is gone as well.
    #[must_use]
    pub fn header(&self) -> &HeaderValue {
        &self.inner.header
    }

    /// The same credential with bytes of its own, so that two threads do not count their clones in one place.
    pub(crate) fn duplicate(&self) -> Self {
        match wiping_header(self.inner.header.as_bytes().to_vec()) {
            Ok(header) => Self { inner: Arc::new(Inner { header, ..Inner::clone(&self.inner) }) },
            Err(_) => self.clone(),
        }
    }

    /// Whether both would put the same bytes on the wire; takes the same time wherever they differ.
    pub(crate) fn same_value(&self, other: &Self) -> bool {
        self.inner.header.as_bytes().ct_eq(other.inner.header.as_bytes()).into()
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
    /// The scheme as it stands on the wire.
    #[must_use]
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

/// The public half of an API key: what stands before the first `:`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Arc<str>);

impl KeyId {
    /// From visible ASCII.
    fn new(id: &[u8]) -> Result<Self, CredentialError> {
        match std::str::from_utf8(id) {
            Ok("") => Err(Part::Key.has(Problem::NothingBeforeColon)),
            Ok(id) if id.len() <= MAX_KEY_ID_LEN => Ok(Self(id.into())),
            _ => Err(Part::KeyId.has(Problem::TooLong { most: MAX_KEY_ID_LEN })),
        }
    }

    /// The id as text: visible ASCII, at most 256 bytes.
    #[must_use]
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::{shape::MAX_VALUE_LEN, *};

    fn key_error(value: impl AsRef<[u8]>) -> String {
        Credential::key(value).unwrap_err().to_string()
    }

    fn jwt(claims: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn a_key_becomes_a_sensitive_header_with_its_scheme() {
        let credential = Credential::key("id:secret").unwrap();
        assert_eq!(credential.header(), "Key id:secret");
        assert!(credential.header().is_sensitive());
        assert!(credential.clone().header().clone().is_sensitive());
    }

    #[test]
    fn blanks_line_breaks_and_a_byte_order_mark_at_the_ends_are_trimmed() {
        for value in ["id:secret\n", "id:secret\r\n", " \t id:secret \n\n", "\u{feff}id:secret", "\u{feff} id:secret"] {
            assert_eq!(Credential::key(value).unwrap().header(), "Key id:secret", "{value:?}");
        }
        assert_eq!(Credential::key_pair(" id\n", "\tsecret\n").unwrap().header(), "Key id:secret");
        assert_eq!(Credential::bearer("token\n").unwrap().header(), "Bearer token");
    }

    #[test]
    fn nothing_and_blanks_alone_are_empty() {
        for value in ["", " ", "\n", "\u{feff}", " \t\r\n"] {
            let error = Credential::key(value).unwrap_err();
            assert!(error.is_empty(), "{value:?}");
            assert_eq!(error.to_string(), "the key is empty");
        }
    }

    #[test]
    fn only_the_first_colon_separates() {
        let credential = Credential::key("id:se:cr:et").unwrap();
        assert_eq!(credential.key_id().unwrap().as_str(), "id");
        assert_eq!(credential.header(), "Key id:se:cr:et");
    }

    #[test]
    fn a_key_needs_something_on_both_sides_of_a_colon() {
        assert_eq!(key_error("idsecret"), "the key has no `:`; a fal key has the form `id:secret`");
        assert_eq!(key_error(":secret"), "the key has nothing before its `:`; a fal key has the form `id:secret`");
        assert_eq!(key_error("id:"), "the key has nothing behind its `:`; a fal key has the form `id:secret`");
        assert!(Credential::key(":").is_err());
    }

    #[test]
    fn what_is_no_visible_ascii_is_refused_with_its_place_and_class() {
        for (value, position, class) in [
            (&b"id:sec\nret"[..], 6, "a line break"),
            (b"id:sec\rret", 6, "a line break"),
            (b"id:sec ret", 6, "a blank"),
            (b"id:sec\0ret", 6, "a control character"),
            (b"id:sec\x7Fret", 6, "a control character"),
            (b"id:sec\xC3\xA9", 6, "a byte outside ASCII"),
            (b"\xFFid:secret", 0, "a byte outside ASCII"),
            (b" \n id:sec\tret", 9, "a blank"),
            (b"\xEF\xBB\xBFid:s\xEF\xBB\xBF", 7, "a byte outside ASCII"),
        ] {
            let error = Credential::key(value).unwrap_err();
            assert_eq!(error.position(), Some(position), "{value:?}");
            assert!(error.to_string().contains(class), "{error}");
        }
    }

    #[test]
    fn packaging_is_refused_with_the_hint_that_says_what_to_remove() {
        for (value, hint) in [
            ("Key id:secret", "`Key `: remove"),
            ("key id:secret", "`Key `: remove"),
            ("Bearer id:secret", "`Bearer `: remove"),
            ("\"id:secret\"", "remove the quotes"),
            ("'id:secret'", "remove the quotes"),
            ("FAL_KEY=id:secret", "behind the `=`"),
        ] {
            assert!(key_error(value).contains(hint), "{value}: {}", key_error(value));
        }
        assert!(key_error(b"\xFF\xFEi\0d\0:\0").contains("UTF-16"));
        assert_eq!(Credential::key("Keyless:secret").unwrap().key_id().unwrap().as_str(), "Keyless");
    }

    #[test]
    fn a_pair_names_the_half_that_is_wrong() {
        let error = |id, secret| Credential::key_pair(id, secret).unwrap_err().to_string();
        assert_eq!(error("", "secret"), "the key id is empty");
        assert_eq!(error("id", " "), "the key secret is empty");
        assert!(error("id:secret", "secret").starts_with("the key id holds a `:`"));
        assert!(error("id", "id:secret").starts_with("the key secret is the whole key"));
        assert_eq!(Credential::key_pair("id", "se:cret").unwrap().header(), "Key id:se:cret");
    }

    #[test]
    fn a_credential_in_the_wrong_place_is_recognised() {
        for text in [
            "id:secret",
            "Key id:secret",
            "\"id:secret\"",
            "'id",
            "FAL_KEY=id:secret",
            "Bearer token",
            "id:se/cret",
            "id:secret extra",
            "a\nb",
            "eyJhbGciOiJSUzI1NiJ9",
        ] {
            assert!(may_be_credential(text.as_bytes()), "{text}");
        }
        for text in
            ["/run/secrets/fal key", "./id:x", "../a b", "~/fal", "C:\\key", "c:/key", "fal_key", "dir/fal_key", ""]
        {
            assert!(!may_be_credential(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn values_have_a_greatest_length() {
        assert!(Credential::bearer("t".repeat(MAX_VALUE_LEN)).is_ok());
        assert!(Credential::bearer("t".repeat(MAX_VALUE_LEN + 1)).is_err());
        assert!(Credential::key(format!("{}:s", "i".repeat(MAX_KEY_ID_LEN))).is_ok());
        assert!(Credential::key(format!("{}:s", "i".repeat(MAX_KEY_ID_LEN + 1))).is_err());
    }

    #[test]
    fn the_expiry_of_a_bearer_is_the_exp_claim_and_nothing_else() {
        let expiry = |token: String| Credential::bearer(token).unwrap().expires_at();
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds));
        assert_eq!(expiry(jwt(r#"{"sub":"me","exp":1790000000}"#)), at(1_790_000_000.0));
        assert_eq!(expiry(jwt(r#"{"exp":1790000000.5}"#)), at(1_790_000_000.5));
        for token in [
            "opaque".to_owned(),
            "a.b".to_owned(),
            "a.b.c.d".to_owned(),
            "a.!.c".to_owned(),
            jwt("{}"),
            jwt("[]"),
            jwt("not json"),
            jwt(r#"{"exp":"1790000000"}"#),
            jwt(r#"{"exp":-1}"#),
            jwt(r#"{"exp":1e300}"#),
            jwt(r#"{"exp":null}"#),
            jwt(&"[".repeat(10_000)),
        ] {
            assert_eq!(expiry(token.clone()), None, "{token}");
        }
    }

    #[test]
    fn debug_shows_scheme_and_key_id_only() {
        let credential = Credential::key("id:hush").unwrap();
        assert_eq!(format!("{credential:?}"), r#"Credential { scheme: Key, key_id: "id" }"#);
        assert_eq!(format!("{:?}", Credential::bearer("hush").unwrap()), "Credential { scheme: Bearer }");
        assert!(!format!("{:?}", credential.header()).contains("hush"));
    }

    #[test]
    fn a_note_of_the_source_leaves_the_value_alone() {
        let plain = Credential::key("id:secret").unwrap();
        let noted = plain.clone().with_source("env:FAL_KEY");
        assert_eq!((plain.source(), noted.source()), (None, Some("env:FAL_KEY")));
        assert!(plain.same_value(&noted));
        assert!(!plain.same_value(&Credential::key("id:secreT").unwrap()));
        assert!(!plain.same_value(&Credential::bearer("id:secret").unwrap()));
    }
}
