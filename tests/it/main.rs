//! The integration tests, in one binary: they link once.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[cfg(unix)]
mod app;
mod auth;
#[cfg(unix)]
mod axum_byok;
#[cfg(unix)]
mod axum_images;
#[cfg(unix)]
mod axum_proxy;
#[cfg(unix)]
mod axum_router;
mod docs;
mod evidence;
mod examples;
#[cfg(unix)]
mod file_rotation;
#[cfg(unix)]
mod fleet;
mod leak;
mod matrix;
mod mock;
#[cfg(unix)]
mod mock_process;
mod observability;
#[cfg(unix)]
mod prometheus;
#[cfg(unix)]
mod python;
#[cfg(unix)]
mod queue;
mod redirect;
mod replay;
mod reqwest_client;
mod retry;
#[cfg(target_os = "linux")]
mod rotates_in_place;
#[cfg(unix)]
mod rotation;
#[cfg(unix)]
mod serve;
#[cfg(unix)]
mod signal;
#[cfg(unix)]
mod sources;
mod store;
mod stream;
mod support;
mod transient;
#[cfg(target_os = "linux")]
mod watch;
#[cfg(unix)]
mod websocket;
#[cfg(target_os = "linux")]
mod wipe;
