//! Whether an id_token was made by fal's login, for fal's own tools, just now.
//!
//! Only RS256 is understood (RFC 7518, section 3.3), with keys from the provider's own set. A token cannot choose
//! another way to be checked.
//!
//! Source: `fal` 1.83.0 (`auth/auth0.py`): RS256, the audience is the client id, the issuer is `https://auth.fal.ai/`,
//! `exp` and `iat` must be there, and clocks may differ by 60 s.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use serde::Deserialize;

use super::claims::{Parts, decoded, time};
use crate::jwks::{KeySet, RsaKey};

/// How far the clocks of this machine and of the provider may differ.
const LEEWAY: Duration = Duration::from_secs(60);

/// The longest id_token that is looked at, in bytes.
const MAX_LEN: usize = 64 * 1024;

/// What an id_token has to say.
pub(super) struct Expected<'a> {
    pub(super) issuer: &'a str,
    pub(super) audience: &'a str,
    pub(super) now: SystemTime,
}

/// The rule that an id_token breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Untrusted {
    #[error("it is no JSON Web Token")]
    NoToken,
    #[error("it is not signed with RS256")]
    Algorithm,
    #[error("it asks for an extension that is not known here")]
    Extension,
    #[error("its key is not one of the provider's")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("it lacks a claim, or a claim has the wrong type")]
    Claims,
    #[error("it is of another issuer")]
    Issuer,
    #[error("it is for another client")]
    Audience,
    #[error("it has expired; see whether the clock of this machine is right")]
    Expired,
    #[error("it is from the future; see whether the clock of this machine is right")]
    Future,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    azp: Option<String>,
    exp: serde_json::Number,
    iat: serde_json::Number,
    nbf: Option<serde_json::Number>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

/// Checks an id_token. [`Untrusted::UnknownKey`] may mean that the keys were fetched too long ago.
pub(super) fn check(token: &str, keys: &KeySet, expected: &Expected<'_>) -> Result<(), Untrusted> {
    if token.len() > MAX_LEN {
        return Err(Untrusted::NoToken);
    }
    let parts = Parts::of(token).ok_or(Untrusted::NoToken)?;
    let header: Header = decoded(parts.header).ok_or(Untrusted::NoToken)?;
    if header.alg != "RS256" {
        return Err(Untrusted::Algorithm);
    }
    if header.crit.is_some() {
        return Err(Untrusted::Extension);
    }
    let signature = URL_SAFE_NO_PAD.decode(parts.signature).map_err(|_| Untrusted::NoToken)?;
    // A token that names no key may be of any of them.
    let mut candidates = keys.rsa.iter().filter(|key| header.kid.is_none() || key.id == header.kid).peekable();
    if candidates.peek().is_none() {
        return Err(Untrusted::UnknownKey);
    }
    if !candidates.any(|key| is_signed_by(key, parts.signed.as_bytes(), &signature)) {
        return Err(Untrusted::Signature);
    }
    check_claims(&decoded(parts.claims).ok_or(Untrusted::Claims)?, expected)
}

fn is_signed_by(key: &RsaKey, signed: &[u8], signature: &[u8]) -> bool {
    let key = RsaPublicKeyComponents { n: &key.modulus, e: &key.exponent };
    key.verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature).is_ok()
}

fn check_claims(claims: &Claims, expected: &Expected<'_>) -> Result<(), Untrusted> {
    if claims.iss != expected.issuer {
        return Err(Untrusted::Issuer);
    }
    let is_for_us = match &claims.aud {
        Audience::One(audience) => audience == expected.audience,
        // For several, it has to say for which of them it was made (OpenID Connect Core, section 3.1.3.7).
        Audience::Several(audiences) => {
            audiences.iter().any(|audience| audience == expected.audience)
                && (audiences.len() == 1 || claims.azp.is_some())
        }
    };
    if !is_for_us || claims.azp.as_ref().is_some_and(|party| party != expected.audience) {
        return Err(Untrusted::Audience);
    }
    let at = |number| time(number).ok_or(Untrusted::Claims);
    if at(&claims.exp)?.checked_add(LEEWAY).is_none_or(|end| end <= expected.now) {
        return Err(Untrusted::Expired);
    }
    let latest = expected.now.checked_add(LEEWAY).ok_or(Untrusted::Claims)?;
    if at(&claims.iat)? > latest || claims.nbf.as_ref().map(at).transpose()?.is_some_and(|from| from > latest) {
        return Err(Untrusted::Future);
    }
    Ok(())
}
