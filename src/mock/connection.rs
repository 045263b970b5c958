//! What a connection is to those who serve it, and the tasks that end with it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::rt::Executor;
use tokio::sync::{Notify, watch};

use super::{Shared, socket::Socket, target::Plays};

/// What the answer to a request needs to know of the connection that the request came on.
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) plays: Plays,
    /// Tasks that end with the connection.
    pub(super) tasks: Tasks,
    /// Closes the connection, whatever goes on there.
    pub(super) hang_up: Notify,
    socket: Mutex<Option<Socket>>,
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, plays: Plays, tasks: Tasks) -> Self {
        Self { shared, plays, tasks, hang_up: Notify::new(), socket: Mutex::default() }
    }

    /// What the connection becomes when it has ended as one of HTTP.
    pub(super) fn socket(&self) -> MutexGuard<'_, Option<Socket>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Owns tasks: those that were spawned in it end when it is dropped.
///
/// A `JoinSet` would do the same, but only through `&mut`: hyper spawns the streams of HTTP/2 on its own.
pub(super) struct Scope(watch::Sender<()>);

impl Scope {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    pub(super) fn tasks(&self) -> Tasks {
        Tasks(self.0.subscribe())
    }
}

/// Spawns tasks in a [`Scope`].
#[derive(Clone)]
pub(super) struct Tasks(watch::Receiver<()>);

impl Tasks {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.clone().run(task));
    }

    /// The task itself, for whoever spawns it.
    pub(super) async fn run(mut self, task: impl Future<Output = ()>) {
        tokio::select! {
            // Nothing is ever sent: this is the end of the scope.
            _ = self.0.changed() => {}
            () = task => {}
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
