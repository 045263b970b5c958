//! Browsers talk to fal through your server, and the key stays on it.
#![allow(dead_code)]
mod pattern;
pub(crate) mod target;
