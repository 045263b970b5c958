//! The login with GitHub that fal's own tools make.

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
