//! What the token of a login states.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

/// The `exp` claim of a JWT; `None` for a text that is not a JWT, and for a JWT without the claim.
pub(super) fn expiry(token: &[u8]) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: serde_json::Number,
    }

    let mut parts = token.split(|&byte| byte == b'.');
    let (Some(_header), Some(claims), Some(_signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let mut decoded = Zeroizing::new(vec![0; base64::decoded_len_estimate(claims.len())]);
    let length = URL_SAFE_NO_PAD.decode_slice(claims, &mut decoded).ok()?;
    let Claims { exp } = serde_json::from_slice(&decoded[..length]).ok()?;
    let since_epoch = Duration::try_from_secs_f64(exp.as_f64()?).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since_epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(claims: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn the_expiry_is_the_exp_claim_and_nothing_else() {
        let expiry = |token: String| expiry(token.as_bytes());
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
}
