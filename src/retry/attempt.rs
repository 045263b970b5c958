//! One attempt: what was sent, and how it ended.

use std::error::Error;

use http::{Extensions, HeaderMap, Method, StatusCode};

/// What of a request says whether it may be repeated.
#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "transient"), allow(dead_code))] // nothing is repeated then
pub(crate) struct Sent<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) extensions: &'a Extensions,
}

#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "transient"), allow(dead_code))] // nobody reads the headers then
pub(crate) enum Ended<'a> {
    Answered { status: StatusCode, headers: &'a HeaderMap, extensions: &'a Extensions },
    Failed(&'a (dyn Error + 'static)),
}
