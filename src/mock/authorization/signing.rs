//! The key with which the mock signs its tokens. It is in this repository, so it proves nothing to anybody.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    rsa::{KeyPair, PublicKeyComponents},
    signature::RSA_PKCS1_SHA256,
};
use serde_json::{Value, json};

/// Made for this mock, by `openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048`.
static KEY: &[u8] = include_bytes!("key.der");

/// A JWT. It is signed if its header says `RS256`; for any other algorithm the signature is empty.
pub(super) fn token(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(header), part(claims));
    let signature = if header["alg"] == "RS256" { sign(signed.as_bytes()) } else { Vec::new() };
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn sign(message: &[u8]) -> Vec<u8> {
    let key = key();
    let mut signature = vec![0; key.public().modulus_len()];
    let signed = key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature);
    assert!(signed.is_ok(), "the system has no random bytes");
    signature
}

fn key() -> KeyPair {
    KeyPair::from_pkcs8(KEY).unwrap_or_else(|error| panic!("the mock's own key is broken: {error}"))
}

/// The JSON Web Key Set with the key under these ids.
pub(super) fn keys(ids: &[String]) -> Value {
    let public = PublicKeyComponents::<Vec<u8>>::from(key().public());
    let [n, e] = [&public.n, &public.e].map(|number| URL_SAFE_NO_PAD.encode(number));
    let keys: Vec<_> =
        ids.iter().map(|id| json!({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": id, "n": n, "e": e})).collect();
    json!({ "keys": keys })
}
