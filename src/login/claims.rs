//! What a token states. Nobody has checked whether it is true.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, de::DeserializeOwned};
use zeroize::Zeroizing;

/// The three parts of a JWT in its compact form (RFC 7519, section 3).
pub(super) struct Parts<'a> {
    pub(super) header: &'a str,
    pub(super) claims: &'a str,
    pub(super) signature: &'a str,
    /// What the signature is made over.
    pub(super) signed: &'a str,
}

impl<'a> Parts<'a> {
    pub(super) fn of(token: &'a str) -> Option<Self> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        (!claims.contains('.')).then_some(Self { header, claims, signature, signed })
    }
}

/// One of the parts that are JSON.
pub(super) fn decoded<T: DeserializeOwned>(part: &str) -> Option<T> {
    serde_json::from_slice(&Zeroizing::new(URL_SAFE_NO_PAD.decode(part).ok()?)).ok()
}

/// The claims of an access token that matter here.
#[derive(Deserialize)]
pub(super) struct Claims {
    #[serde(rename = "sub")]
    pub(super) subject: Option<String>,
    exp: serde_json::Number,
    iat: Option<serde_json::Number>,
}

impl Claims {
    /// `None` for a text that is no JWT, and for a JWT that does not say when it expires.
    pub(super) fn of(access: &str) -> Option<Self> {
        decoded(Parts::of(access)?.claims)
    }

    pub(super) fn expires_at(&self) -> Option<SystemTime> {
        time(&self.exp)
    }

    pub(super) fn issued_at(&self) -> Option<SystemTime> {
        time(self.iat.as_ref()?)
    }
}

/// A time in seconds since 1970.
pub(super) fn time(number: &serde_json::Number) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(number.as_f64()?).ok()?)
}
