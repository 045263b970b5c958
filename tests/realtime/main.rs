//! Realtime tokens, over real sockets: minted, handed out, and used.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[cfg(unix)]
#[allow(dead_code)]
#[path = "../it/app.rs"]
mod app;
#[cfg(unix)]
mod example;
mod hostile;
mod minter;
mod route;
#[allow(dead_code)]
#[path = "../it/support.rs"]
mod support;
#[cfg(target_os = "linux")]
mod wipe;
mod world;
