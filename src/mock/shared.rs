//! What the handles and the connections have in common.

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use http::Uri;
use tokio::sync::watch;

use super::{state::State, target::Host, webhook::Webhooks};

/// Where the hosts are, and what the mock knows.
pub(super) struct Shared {
    pub(super) run: SocketAddr,
    pub(super) queue: SocketAddr,
    pub(super) ws: SocketAddr,
    pub(super) rest: SocketAddr,
    pub(super) storage: SocketAddr,
    pub(super) state: Mutex<State>,
    /// How many events a stream may send.
    pub(super) events: watch::Sender<usize>,
    pub(super) webhooks: Webhooks,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment or one call, so a panic elsewhere cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The origin that stands for a host.
    pub(super) fn origin(&self, host: Host) -> String {
        let address = match host {
            Host::Queue => self.queue,
            Host::Ws => self.ws,
            Host::Rest => self.rest,
            Host::Storage => self.storage,
            // The Platform API has no port of its own. It is recognized by its name, on any port.
            Host::Run | Host::Platform => self.run,
        };
        format!("http://{address}")
    }

    pub(super) fn url(&self, host: Host, path: &str) -> Uri {
        self.at(&self.origin(host), path)
    }

    /// The same for a WebSocket.
    pub(super) fn socket_url(&self, host: Host, path: &str) -> Uri {
        self.at(&self.origin(host).replacen("http", "ws", 1), path)
    }

    fn at(&self, origin: &str, path: &str) -> Uri {
        let path = path.trim_start_matches('/');
        format!("{origin}/{path}").parse().unwrap_or_else(|error| panic!("`{path}` is no path of a URL: {error}"))
    }
}
