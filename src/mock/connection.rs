//! One connection of a client.

use std::sync::Arc;

use http::request::Parts;
use tokio::sync::Notify;

use super::{
    scope::Tasks,
    shared::Shared,
    target::{Host, Plays, authority},
};

/// What the answer to a request needs to know about the connection of the request.
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) plays: Plays,
    /// Tasks that end with the connection.
    pub(super) tasks: Tasks,
    /// Closes the connection at once.
    pub(super) hang_up: Notify,
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, plays: Plays, tasks: Tasks) -> Self {
        Self { shared, plays, tasks, hang_up: Notify::new() }
    }

    /// The URL of a path on another of the hosts, for the client that sent this request.
    pub(super) fn url(&self, head: &Parts, host: Host, path: &str) -> String {
        let Plays::All(scheme) = &self.plays else { return format!("{}{path}", self.shared.origin(host)) };
        let authority = authority(head);
        if Host::named(authority).is_none() {
            return format!("{scheme}://{authority}{}{path}", host.prefix());
        }
        let port = authority.split_once(':').map(|(_, port)| format!(":{port}")).unwrap_or_default();
        format!("{scheme}://{}{port}{path}", host.name())
    }
}
