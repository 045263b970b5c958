//! The server proxy over real sockets: raw bytes in, raw bytes out.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod conformance;
mod failures;
#[cfg(unix)]
mod program;
mod service;
mod support;
