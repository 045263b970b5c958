//! Tasks that end with their owner.

use hyper::rt::Executor;
use tokio::sync::watch;

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
