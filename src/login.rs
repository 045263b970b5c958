//! The login with GitHub that fal's own tools make: found, kept fresh, made anew, and ended.
//!
//! * [`LoginSource`] is a [source](crate::source) of its tokens, which renews them.
//! * [`DeviceLogin`] makes one, as `fal auth login` does, or ends it.
//! * [`settled`] waits, before a program exits, for what has begun and must not be lost.
//!
//! ```no_run
//! use tower_fal::{CredentialStore, login::{self, LoginSource}};
//!
//! # #[tokio::main] async fn main() -> Result<(), tower_fal::SourceError> {
//! // What `fal auth login` has left on this machine, with the account that was chosen.
//! let store = CredentialStore::builder(LoginSource::new()).build().await?;
//! println!("{:?}", store.load().credential());
//! # drop(store);
//! login::settled().await;
//! # Ok(()) }
//! ```
//!
//! [`docs::login`](crate::docs::login) says where it is kept, when and how it is renewed, and what can go wrong.

mod account;
mod back_off;
mod base_url;
mod claims;
mod device;
mod endpoints;
mod error;
mod files;
mod https;
mod id_token;
mod life;
mod lock;
mod places;
mod renewal;
mod settled;
mod source;
mod token_file;

pub use self::{
    device::{Connection, DeviceLogin, PendingLogin},
    error::{LoginError, LoginErrorKind},
    settled::settled,
    source::LoginSource,
};
