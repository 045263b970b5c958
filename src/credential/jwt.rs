//! What a login's token says of itself.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

/// The `exp` claim of a JWT; `None` for anything that is not one, or that states none.
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
