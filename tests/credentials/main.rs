//! fal's own credentials: the accounts that they name, and where this crate finds them.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod account;
#[cfg(unix)]
mod cases;
#[cfg(unix)]
#[path = "../example/mod.rs"]
mod example;
#[cfg(unix)]
mod network;
#[cfg(unix)]
mod watch;
