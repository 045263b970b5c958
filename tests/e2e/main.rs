//! fal's own JavaScript client, in a page in Chromium, through the running examples `proxy` and
//! `realtime_token`, to a fal of this process.
//!
//! They need Node.js and Chromium, so they run when they are asked for: `npm ci --prefix tests/e2e`, then
//! `cargo test --test e2e -- --ignored`. `CHROMIUM` is the path of the browser, `/usr/bin/chromium` if it is not set.

#![cfg(unix)]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod browser;
mod calls;
mod demo;
mod failures;
mod rotation;
mod servers;
mod tokens;
