//! The server proxy over real sockets: raw bytes in, raw bytes out.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod conformance;
mod failures;
#[cfg(unix)]
mod program;
mod service;
mod support;
