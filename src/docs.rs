//! The manual: pages about more than one item. There is no code in these modules.
//!
//! | page | answers |
//! |---|---|
//! | [`servers`] | Which part of this crate does what for a server, and which do you need? |
//! | [`rotation`] | How is a key rotated without a failed request, and when may the old one be revoked? |
//! | [`proxy`] | How do browsers call fal through your server, and what does it let through? |
//! | [`readiness`] | What does a readiness probe answer? |
//! | [`realtime`] | How do browsers open sockets to fal without the key? |
//! | [`observability`] | Which events and metrics are there? |
//! | [`testing`] | How is a program tested without fal? |
//! | [`login`] | How does a program use the login of `fal auth login`, and what happens to it? |
//! | [`stacks`] | Which layers go around which client, and what does a compile error mean? |
//! | [`performance`] | What does it cost? |
//! | [`secrets`] | Where does the credential go, where does it show, and what is wiped? |
//! | [`webhooks`] | Which deliveries of fal's are believed, and what becomes of repeats? |

#[doc = include_str!("../docs/login.md")]
#[doc(alias = "github", alias = "oauth", alias = "device flow", alias = "auth0", alias = "team")]
pub mod login {}

#[doc = include_str!("../docs/observability.md")]
#[doc(alias = "logging", alias = "prometheus", alias = "tracing", alias = "events")]
pub mod observability {}

#[doc = include_str!("../docs/performance.md")]
#[doc(alias = "benchmark", alias = "overhead")]
pub mod performance {}

#[doc = include_str!("../docs/proxy.md")]
#[doc(alias = "browser", alias = "proxyUrl", alias = "cors", alias = "javascript")]
pub mod proxy {}

#[doc = include_str!("../docs/readiness.md")]
#[doc(alias = "readyz", alias = "health", alias = "probe")]
pub mod readiness {}

#[doc = include_str!("../docs/realtime.md")]
#[doc(alias = "token", alias = "websocket", alias = "tokenProvider", alias = "jwt")]
pub mod realtime {}

#[doc = include_str!("../docs/rotation.md")]
#[doc(alias = "rotate", alias = "hot reload", alias = "revoke", alias = "kubernetes", alias = "fleet")]
pub mod rotation {}

#[doc = include_str!("../docs/secrets.md")]
#[doc(alias = "allow list", alias = "zeroize", alias = "redact")]
pub mod secrets {}

#[doc = include_str!("../docs/servers.md")]
#[doc(alias = "authentication", alias = "browser", alias = "overview")]
pub mod servers {}

#[doc = include_str!("../docs/stacks.md")]
#[doc(alias = "hyper", alias = "compile error", alias = "websocket")]
pub mod stacks {}

#[doc = include_str!("../docs/testing.md")]
#[doc(alias = "test", alias = "python")]
pub mod testing {}

#[doc = include_str!("../docs/webhooks.md")]
#[doc(alias = "signature", alias = "ed25519", alias = "jwks", alias = "idempotency")]
pub mod webhooks {}
