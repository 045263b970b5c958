//! The server proxy over real sockets: raw bytes in, raw bytes out.

mod conformance;
mod service;
mod support;
