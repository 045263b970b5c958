//! The login over real files, sockets and processes, against `MockAuthorization`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod account;
mod device;
mod endpoints;
mod files;
#[cfg(unix)]
mod processes;
mod renewal;
mod support;
