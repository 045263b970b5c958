//! Short-lived tokens for browsers, minted with the server's own credential.

#[allow(dead_code)] // some of it is only for the proxy
pub(crate) mod app;
#[allow(dead_code)] // some of it is only for the proxy
pub(crate) mod body;

pub use self::{
    app::InvalidApp,
    body::{Body, Endpoint},
};
