//! What the errors of other crates say: which error is behind them, that there was no connection, that a request was not
//! processed, that a time limit was reached, that a body was too long.
//!
//! The standard library's and Tokio's errors are always read, those of an HTTP client where its feature is on. This is
//! the one place that knows them: code that looks at a chain of errors asks here.

use std::{error::Error, io, iter};

/// An error and its causes, from the outside in. Causes that `source()` leaves out are included.
pub(crate) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |error| cause(*error))
}

fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    // The `source()` of this one is the cause of the error that it was made from, not that error.
    #[cfg(feature = "reqwest-middleware")]
    match error.downcast_ref() {
        Some(reqwest_middleware::Error::Middleware(error)) => return Some(error.as_ref()),
        Some(reqwest_middleware::Error::Reqwest(error)) => return Some(error),
        None => {}
    }
    // Likewise an `io::Error` that was made from another error.
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    wrapped.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source())
}

/// An error inside `reqwest_middleware::Error`, which is transparent: its `source()` is that of the error inside. So are
/// the wrappers of reqwest-retry. As the `source()` of this one is the error itself, that can still be found.
#[cfg(feature = "reqwest-middleware")]
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Findable<E: Error + 'static>(#[source] pub(crate) E);

/// Whether an error says that there was no connection: refused or unreachable. With the `client` feature hyper-util's
/// client is asked, and with `reqwest` reqwest's; what such a client says is final.
///
/// Without these features the [`io::ErrorKind`] alone decides. The system can, rarely, report "unreachable" about a
/// connection that existed: with hyper-util's client, enable `client`.
///
/// reqwest follows redirects by itself, and a connection that fails *behind* a redirect looks the same. fal's API
/// does not redirect; where something in between does, give reqwest's client `redirect::Policy::none()`.
#[cfg(any(feature = "proxy", feature = "transient"))]
#[cfg_attr(not(feature = "transient"), allow(unreachable_pub))] // which shows it
pub fn connection_failed(error: &(dyn Error + 'static)) -> bool {
    client_found_no_connection(error).unwrap_or(false)
        || error.downcast_ref::<io::Error>().is_some_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
            )
        })
}

/// Whether an error or one of its causes says that there was no connection, up to the error of an HTTP client: that is
/// final. What is behind it may say "unreachable" about a connection that existed and broke.
#[cfg(any(feature = "proxy", feature = "transient"))]
pub(crate) fn was_not_connected(error: &(dyn Error + 'static)) -> bool {
    let verdict = causes(error)
        .find_map(|cause| client_found_no_connection(cause).or_else(|| connection_failed(cause).then_some(true)));
    verdict.unwrap_or(false)
}

/// Whether a connection failed for a reason that stays: the peer does not speak TLS, or its certificate was refused.
/// rustls reports both as [`io::ErrorKind::InvalidData`].
///
/// Only while connecting: later, the same kind can be a record that was damaged on its way.
#[cfg(feature = "transient")]
pub(crate) fn connection_failed_for_good(error: &(dyn Error + 'static)) -> bool {
    let is_invalid = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::InvalidData)
    };
    causes(error).find_map(client_found_no_connection) == Some(true) && causes(error).any(is_invalid)
}

/// Whether the server said by HTTP/2 that it has not processed the request: it refused the stream, or was shutting down
/// when the stream came.
///
/// Source: RFC 9113, 8.7. h2 gives a stream the error of a GOAWAY only if its number is above the last one that the
/// server looked at; a stream below that one fails with an I/O error.
#[cfg(feature = "transient")]
pub(crate) fn was_not_processed(error: &(dyn Error + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<h2::Error>() else { return false };
    let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    let shut_down = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    // Not if the reason comes from this side: a request body that fails may bring it from elsewhere.
    error.is_remote() && (refused || shut_down)
}

/// Whether an HTTP client says that there was no connection. `None` if this is no client's error.
#[cfg(any(feature = "proxy", feature = "transient"))]
#[cfg_attr(not(any(feature = "client", feature = "reqwest")), allow(unused_variables))]
fn client_found_no_connection(error: &(dyn Error + 'static)) -> Option<bool> {
    #[cfg(feature = "client")]
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
        return Some(error.is_connect());
    }
    #[cfg(feature = "reqwest")]
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        return Some(error.is_connect());
    }
    None
}

/// Whether an error says that a time limit was reached: tower's, Tokio's, the system's, or with the `reqwest` feature
/// reqwest's.
#[cfg(feature = "axum")]
pub(crate) fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    #[cfg(feature = "reqwest")]
    if error.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_timeout) {
        return true;
    }
    error.is::<tower::timeout::error::Elapsed>()
        || error.is::<tokio::time::error::Elapsed>()
        || error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Whether an error says that a body was longer than a limit around it allows, such as tower-http's.
#[cfg(feature = "axum")]
pub(crate) fn is_too_long(error: &(dyn Error + 'static)) -> bool {
    error.is::<http_body_util::LengthLimitError>()
}
