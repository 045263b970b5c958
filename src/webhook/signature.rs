//! The one judge of a signature: on the raw bytes, before anything else reads them.

use std::{fmt, sync::Arc, time::Duration, time::SystemTime};

use ed25519_dalek::{Signature, VerifyingKey};
use http::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest as _, Sha256};

use super::{Accounts, Rejection};
use crate::{
    jwks::KeySet,
    wire::header::{WEBHOOK_REQUEST_ID, WEBHOOK_SIGNATURE, WEBHOOK_TIMESTAMP, WEBHOOK_USER_ID},
};

/// How far the timestamp and the clock may be apart.
///
/// Source: fal's documentation, "Webhooks".
pub(super) const TOLERANCE: Duration = Duration::from_secs(300);

/// The longest id that is taken. fal's have 36 characters.
const MAX_ID: usize = 256;

/// The largest number has 20 digits, and zeros before it are nothing that fal sends.
const MAX_DIGITS: usize = 20;

/// fal's public keys, ready to verify with: of each JSON Web Key Set those of the type `OKP` and the curve `Ed25519`.
///
/// Keys of other types are passed over, and so are malformed ones and the few points with which anybody can sign. Of a
/// set, the first 32 keys are looked at.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKeys(Arc<[VerifyingKey]>);

impl PublicKeys {
    /// Reads a JSON Web Key Set (RFC 7517), such as that at `https://rest.fal.ai/.well-known/jwks.json`.
    ///
    /// # Errors
    /// When it is not a JSON Web Key Set, or has no key that can be used.
    pub fn from_jwks(json: &[u8]) -> Result<Self, InvalidJwks> {
        let set = KeySet::parse(json).map_err(|_| InvalidJwks::NotAKeySet)?;
        let mut keys = Vec::new();
        for key in set.ed25519.iter().filter_map(verifying_key) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.is_empty() { Err(InvalidJwks::NoUsableKey) } else { Ok(Self(keys.into())) }
    }

    /// How many keys there are: at least one.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A key in its only form, with which nobody can sign who does not have the secret one.
fn verifying_key(bytes: &[u8; 32]) -> Option<VerifyingKey> {
    let key = VerifyingKey::from_bytes(bytes).ok()?;
    // A point may have a second encoding, which a strict reader does not take.
    let is_canonical = key.to_edwards().compress().as_bytes() == bytes;
    (is_canonical && !key.is_weak()).then_some(key)
}

impl fmt::Debug for PublicKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublicKeys").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// Why a text gives no keys. No part of the text is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidJwks {
    /// It is not JSON with a list of `keys`.
    #[error("it is not a JSON Web Key Set")]
    NotAKeySet,
    /// It has no Ed25519 key.
    #[error("the JSON Web Key Set has no Ed25519 key that can be used")]
    NoUsableKey,
}

/// What fal has signed: the identity of a delivery, for the handler.
///
/// The layer puts it into the request's extensions. With axum a handler takes `Extension<VerifiedWebhook>`. Cheap to
/// clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedWebhook {
    request_id: Arc<str>,
    user_id: Arc<str>,
    timestamp: u64,
    pub(super) repeat: bool,
}

impl VerifiedWebhook {
    /// The id of the request whose result this is: the one that the queue gave when the request was submitted.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The account that submitted the request.
    #[must_use]
    pub fn user_id(&self) -> &str {
        &self.user_id
    }

    /// When fal signed the delivery.
    #[must_use]
    pub fn timestamp(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.timestamp)).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Whether a delivery with this id was handled before, which means answered with a status of success (2xx). It is
    /// `false` when it is not known: from [`verify`], and while another delivery with the id is being handled and the
    /// layer only [observes](super::VerifyWebhookLayer::observe).
    #[must_use]
    pub fn is_repeat(&self) -> bool {
        self.repeat
    }
}

/// Verifies one delivery without Tower: its four headers, its raw body, and the account and the time that it was signed
/// for. The tolerance is 300 s, and `now` is usually [`SystemTime::now`].
///
/// `body` must be the bytes that arrived. JSON that was read and written again has other bytes and other signatures.
///
/// ```
/// use std::time::SystemTime;
/// use http::HeaderMap;
/// use tower_fal::webhook::{Accounts, PublicKeys, Rejection, verify};
///
/// # let jwks = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
/// # let (headers, body) = (HeaderMap::new(), b"{}");
/// let keys = PublicKeys::from_jwks(jwks)?;
/// let accounts = Accounts::only(["github|12345"])?;
/// match verify(&headers, body, &keys, &accounts, SystemTime::now()) {
///     Ok(webhook) => println!("the result of {}", webhook.request_id()),
///     Err(rejection) => assert_eq!(rejection, Rejection::MissingHeader("x-fal-webhook-request-id")),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Why the delivery must not be believed: a rejection whose status is 401 or 403.
pub fn verify(
    headers: &HeaderMap,
    body: &[u8],
    keys: &PublicKeys,
    accounts: &Accounts,
    now: SystemTime,
) -> Result<VerifiedWebhook, Rejection> {
    let signed = Headers::read(headers)?.over(body);
    if !signed.is_by(keys) {
        return Err(Rejection::BadSignature);
    }
    signed.is_for(accounts, TOLERANCE, now)?;
    Ok(signed.verified())
}

/// The four headers of a delivery, each of which was there once and in its form.
pub(super) struct Headers {
    /// What was signed but for the hash of the body: each of the other three, and a line feed behind it.
    message: Vec<u8>,
    request_id: Arc<str>,
    user_id: Arc<str>,
    timestamp: u64,
    signature: Signature,
}

impl Headers {
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, Rejection> {
        let request_id = id(headers, &WEBHOOK_REQUEST_ID)?;
        let user_id = id(headers, &WEBHOOK_USER_ID)?;
        let timestamp = only(headers, &WEBHOOK_TIMESTAMP)?;
        let seconds = number(timestamp).ok_or(invalid(&WEBHOOK_TIMESTAMP))?;
        let signature = signature(only(headers, &WEBHOOK_SIGNATURE)?).ok_or(invalid(&WEBHOOK_SIGNATURE))?;

        let length = request_id.len() + user_id.len() + timestamp.len() + 3 + HASH_DIGITS;
        let mut message = Vec::with_capacity(length);
        for part in [request_id.as_bytes(), user_id.as_bytes(), timestamp.as_bytes()] {
            message.extend_from_slice(part);
            message.push(b'\n');
        }
        Ok(Self { message, request_id: request_id.into(), user_id: user_id.into(), timestamp: seconds, signature })
    }

    /// The whole of what was signed.
    pub(super) fn over(mut self, body: &[u8]) -> Signed {
        self.message.extend(Sha256::digest(body).iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]));
        Signed(self)
    }
}

/// A delivery and its signature.
pub(super) struct Signed(Headers);

impl Signed {
    /// Whether one of the keys has signed it. A request does not say which, so each is tried.
    pub(super) fn is_by(&self, keys: &PublicKeys) -> bool {
        let Self(Headers { message, signature, .. }) = self;
        keys.0.iter().any(|key| key.verify_strict(message, signature).is_ok())
    }

    /// Whether it may be believed if its signature is good.
    pub(super) fn is_for(&self, accounts: &Accounts, tolerance: Duration, now: SystemTime) -> Result<(), Rejection> {
        // In whole seconds, as fal's own examples compute it.
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let apart = now.abs_diff(self.0.timestamp);
        if apart > tolerance.as_secs() {
            return Err(Rejection::Stale(Duration::from_secs(apart)));
        }
        if accounts.include(&self.0.user_id) { Ok(()) } else { Err(Rejection::OtherAccount) }
    }

    /// The identity, for whoever has asked the two questions above.
    pub(super) fn verified(self) -> VerifiedWebhook {
        let Self(Headers { request_id, user_id, timestamp, .. }) = self;
        VerifiedWebhook { request_id, user_id, timestamp, repeat: false }
    }
}

/// The value of a header that is there exactly once. With two of them, a proxy in front might have looked at the other.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a HeaderValue, Rejection> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value),
        (Some(_), Some(_)) => Err(Rejection::RepeatedHeader(text(name))),
        (None, _) => Err(Rejection::MissingHeader(text(name))),
    }
}

fn id<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str, Rejection> {
    let value = only(headers, name)?.as_bytes();
    // No blanks, so that the line feeds of the message are the only ones, whoever reads it.
    let is_id = (1..=MAX_ID).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic);
    is_id.then(|| std::str::from_utf8(value).ok()).flatten().ok_or(invalid(name))
}

/// Decimal digits and nothing else: `str::parse` takes a sign.
fn number(value: &HeaderValue) -> Option<u64> {
    let digits = value.as_bytes();
    let is_number = (1..=MAX_DIGITS).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

/// 128 hexadecimal digits, small or capital.
fn signature(value: &HeaderValue) -> Option<Signature> {
    let digits: &[u8; 2 * Signature::BYTE_SIZE] = value.as_bytes().try_into().ok()?;
    let mut bytes = [0; Signature::BYTE_SIZE];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
        *byte = u8::try_from(high? << 4 | low?).ok()?;
    }
    Some(Signature::from_bytes(&bytes))
}

/// How many digits the hash of the body has.
const HASH_DIGITS: usize = 64;

fn digit(half: u8) -> u8 {
    b"0123456789abcdef"[usize::from(half & 15)]
}

fn invalid(name: &HeaderName) -> Rejection {
    Rejection::InvalidHeader(text(name))
}

/// The name of one of the four headers, for longer than the request lives.
fn text(name: &HeaderName) -> &'static str {
    match name {
        name if *name == WEBHOOK_REQUEST_ID => "x-fal-webhook-request-id",
        name if *name == WEBHOOK_USER_ID => "x-fal-webhook-user-id",
        name if *name == WEBHOOK_TIMESTAMP => "x-fal-webhook-timestamp",
        _ => "x-fal-webhook-signature",
    }
}
