//! Short-lived tokens for browsers, minted with the server's own credential.

#[allow(dead_code)] // some of it is for the proxy only
pub(crate) mod app;
#[allow(dead_code)] // some of it is for the proxy only
pub(crate) mod body;
mod cache;
mod error;
mod minter;
mod route;
mod token;

pub use self::{
    app::InvalidApp,
    body::{Body, Endpoint},
    error::{InvalidMinter, MintError},
    minter::{TokenMinter, TokenMinterBuilder},
    route::{TokenRoute, token_route},
    token::{SocketUrl, Token},
};
