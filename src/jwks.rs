//! Somebody else's public keys: a JSON Web Key Set (RFC 7517), read once and bounded.
//!
//! fal publishes two: the one of its login (RS256) and the one of its webhooks (Ed25519, RFC 8037). Keys of other
//! types and keys that are malformed are passed over, as the RFC asks, so that fal may add a kind without breaking
//! anybody.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

/// More keys than this are not looked at: each may be tried for each signature.
const MAX_KEYS: usize = 32;
/// RSA of 16,384 bits; longer ones only cost time.
const MAX_MODULUS: usize = 2048;

/// The keys of a set that can be used.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeySet {
    pub(crate) rsa: Vec<RsaKey>,
    pub(crate) ed25519: Vec<[u8; 32]>,
}

/// An RSA key that is not kept from signing with RS256 by what its entry says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RsaKey {
    pub(crate) id: Option<String>,
    pub(crate) modulus: Vec<u8>,
    pub(crate) exponent: Vec<u8>,
}

/// Not a JSON Web Key Set.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer is not a JSON Web Key Set")]
pub(crate) struct NotAKeySet;

impl KeySet {
    /// Reads a set.
    ///
    /// # Errors
    /// When the text is not JSON with a list of `keys`. A set without a usable key is no error.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, NotAKeySet> {
        let document: Document = serde_json::from_slice(text).map_err(|_| NotAKeySet)?;
        let mut set = Self::default();
        for entry in document.keys.into_iter().take(MAX_KEYS) {
            if let Ok(entry) = serde_json::from_value(entry) {
                set.add(entry);
            }
        }
        Ok(set)
    }

    fn add(&mut self, entry: Entry) {
        if entry.purpose.as_deref().is_some_and(|purpose| purpose != "sig") {
            return;
        }
        match (entry.kind.as_str(), entry.curve.as_deref()) {
            ("RSA", _) if entry.algorithm.as_deref().is_none_or(|algorithm| algorithm == "RS256") => {
                if let (Some(modulus), Some(exponent)) = (bytes(entry.n, MAX_MODULUS), bytes(entry.e, 8)) {
                    self.rsa.push(RsaKey { id: entry.id, modulus, exponent });
                }
            }
            // RFC 8037 calls the algorithm `EdDSA`, and RFC 9864 `Ed25519`.
            ("OKP", Some("Ed25519")) if matches!(entry.algorithm.as_deref(), None | Some("EdDSA" | "Ed25519")) => {
                if let Some(Ok(key)) = bytes(entry.x, 32).map(<[u8; 32]>::try_from) {
                    self.ed25519.push(key);
                }
            }
            _ => {}
        }
    }
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "kty")]
    kind: String,
    #[serde(rename = "crv")]
    curve: Option<String>,
    #[serde(rename = "kid")]
    id: Option<String>,
    #[serde(rename = "alg")]
    algorithm: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
}

/// What a member in unpadded base64url stands for, unless it is empty or longer than `limit` bytes.
fn bytes(member: Option<String>, limit: usize) -> Option<Vec<u8>> {
    let decoded = URL_SAFE_NO_PAD.decode(member?).ok()?;
    (!decoded.is_empty() && decoded.len() <= limit).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_both_kinds_are_read() {
        let x = URL_SAFE_NO_PAD.encode([7; 32]);
        let text = format!(
            r#"{{"keys":[{{"kty":"RSA","kid":"1","n":"AQAB","e":"AQAB","use":"sig","alg":"RS256"}},
                {{"kty":"OKP","crv":"Ed25519","x":"{x}"}}]}}"#
        );
        let set = KeySet::parse(text.as_bytes()).unwrap();
        assert_eq!(set.rsa, [RsaKey { id: Some("1".into()), modulus: vec![1, 0, 1], exponent: vec![1, 0, 1] }]);
        assert_eq!(set.ed25519, [[7; 32]]);
    }

    #[test]
    fn keys_that_cannot_be_used_are_passed_over() {
        let text = r#"{"keys":[7, {}, {"kty":"EC","crv":"P-256"}, {"kty":"OKP","crv":"X25519","x":"AAAA"},
            {"kty":"OKP","crv":"Ed25519","x":"AAAA"}, {"kty":"OKP","crv":"Ed25519","x":"!"}, {"kty":"RSA","n":"","e":""},
            {"kty":"RSA","n":"AQAB","e":"AQAB","use":"enc"}, {"kty":"RSA","n":"AQAB","e":"AQAB","alg":"RS512"},
            {"kty":"OKP","crv":"Ed25519","x":"KEY","use":"enc"}, {"kty":"OKP","crv":"Ed25519","x":"KEY","alg":"HS256"}]}"#
            .replace("KEY", &URL_SAFE_NO_PAD.encode([7; 32]));
        let set = KeySet::parse(text.as_bytes()).unwrap();
        assert!(set.rsa.is_empty() && set.ed25519.is_empty(), "{set:?}");
    }

    #[test]
    fn no_more_than_thirty_two_keys_are_read() {
        let entry = r#"{"kty":"RSA","n":"AQAB","e":"AQAB"},"#.repeat(40);
        let text = format!(r#"{{"keys":[{}]}}"#, entry.trim_end_matches(','));
        assert_eq!(KeySet::parse(text.as_bytes()).unwrap().rsa.len(), 32);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "<html>", "{}", r#"{"keys":{}}"#, "[]", r#""keys""#] {
            assert_eq!(KeySet::parse(text.as_bytes()).unwrap_err(), NotAKeySet, "{text}");
        }
    }
}
