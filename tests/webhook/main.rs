//! Deliveries of fal's: what is believed, what is not, and what becomes of repeats.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod bodies;
mod example;
mod keys;
mod observe;
mod repeats;
mod server;
mod signatures;
mod support;
