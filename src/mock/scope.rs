//! Tasks that end with their owner.

use hyper::rt::Executor;
use tokio::sync::watch;

/// Owns tasks: when it is dropped, the tasks that were spawned in it end.
///
/// A `JoinSet` does the same but needs `&mut` to spawn, and hyper spawns the streams of HTTP/2 by itself.
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

    /// Runs a task until it ends or the scope does.
    pub(super) async fn run(mut self, task: impl Future<Output = ()>) {
        tokio::select! {
            // Nothing is ever sent, so this resolves only when the scope is dropped.
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
