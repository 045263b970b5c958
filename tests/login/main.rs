//! The login over real files, sockets and processes, against `MockAuthorization`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod account;
mod device;
mod endpoints;
#[path = "../example/mod.rs"]
mod example;
mod example_login;
mod files;
#[cfg(unix)]
mod processes;
mod proxy;
#[cfg(unix)]
mod python;
mod renewal;
mod support;
