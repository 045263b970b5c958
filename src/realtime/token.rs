use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use secrecy::{ExposeSecret as _, SecretString};

use super::app::{App, InvalidApp};
use crate::wire::token::{PARAMETER, SOCKETS};

/// A token with which a browser or an app opens sockets to fal, for some applications and for a short time.
///
/// Whoever has it spends from your account while it lives. It is cheap to clone, `Debug` does not show it, and it is wiped
/// with its last clone. The copies that an HTTP client and TLS made when it came from fal are out of this crate's reach.
///
/// ```
/// # async fn example(minter: tower_fal::realtime::TokenMinter) -> Result<(), Box<dyn std::error::Error>> {
/// let token = minter.token("fal-ai/fast-lcm-diffusion/realtime").await?;
/// assert!(token.expires_at() >= std::time::SystemTime::now() + token.lifetime());
/// let url = token.socket_url("fal-ai/fast-lcm-diffusion/realtime")?;
/// println!("{url:?}"); // SocketUrl("wss://fal.run/fal-ai/fast-lcm-diffusion/realtime?fal_jwt_token=…")
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Token {
    secret: Arc<SecretString>,
    lifetime: Duration,
    expires_at: SystemTime,
}

impl Token {
    pub(super) fn new(secret: SecretString, lifetime: Duration, expires_at: SystemTime) -> Self {
        Self { secret: Arc::new(secret), lifetime, expires_at }
    }

    /// The token itself. **This is the secret.**
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        self.secret.expose_secret()
    }

    /// For how long it was sure to live when it was handed out: the minter's
    /// [`lifetime`](super::TokenMinterBuilder::lifetime).
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// When it expires, by the clock of this machine. That is its [`lifetime`](Self::lifetime) from when it was handed
    /// out, or later.
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }

    /// The URL with which an application's socket is opened: `wss://fal.run/owner/app/realtime?fal_jwt_token=…`.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`realtime.ts`).
    ///
    /// # Errors
    /// When the text is not the path of an application.
    pub fn socket_url(&self, app: &str) -> Result<SocketUrl, InvalidApp> {
        let start = format!("{SOCKETS}/{}?{PARAMETER}=", App::parse(app)?);
        // The length is exact, so that the text never grows: that would leave a copy behind.
        let mut whole = String::with_capacity(start.len() + self.expose_secret().len());
        whole.push_str(&start);
        whole.push_str(self.expose_secret());
        Ok(SocketUrl { whole: whole.into(), start })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("lifetime", &self.lifetime)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// A URL with a [`Token`] in its query: see [`Token::socket_url`]. `Debug` leaves the token out, and it is wiped on drop.
pub struct SocketUrl {
    whole: SecretString,
    /// What is before the token.
    start: String,
}

impl SocketUrl {
    /// The whole URL. **The token is in it.**
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        self.whole.expose_secret()
    }
}

impl fmt::Debug for SocketUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SocketUrl").field(&format_args!("\"{}…\"", self.start)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::new("e30.hush.c2ln".into(), Duration::from_secs(120), SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn a_socket_url_is_the_one_that_fals_client_opens() {
        let url = token().socket_url("fal-ai/flux/realtime").unwrap();
        assert_eq!(url.expose_secret(), "wss://fal.run/fal-ai/flux/realtime?fal_jwt_token=e30.hush.c2ln");
        for app in ["flux", "fal-ai/flux?fal_jwt_token=", "fal-ai/flux#", "@evil.example/flux", ""] {
            assert!(token().socket_url(app).is_err(), "{app}");
        }
    }

    #[test]
    fn nothing_shows_the_token() {
        let url = token().socket_url("fal-ai/flux/realtime").unwrap();
        assert_eq!(format!("{url:?}"), r#"SocketUrl("wss://fal.run/fal-ai/flux/realtime?fal_jwt_token=…")"#);
        assert!(!format!("{:?} {url:#?}", token()).contains("hush"));
    }
}
