//! The server proxy over real sockets: raw bytes in, raw bytes out.

mod conformance;
mod support;
