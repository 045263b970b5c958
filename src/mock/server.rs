//! Listeners, connections, and the tasks that go with them.

use std::{convert::Infallible, pin::pin, sync::Arc};

use hyper::{rt::Executor, service::service_fn};
use hyper_util::{rt::TokioIo, server::conn::auto};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
};

use super::{Shared, answer::answer};

/// Which of fal's hosts a listener plays.
#[derive(Clone, Copy)]
pub(super) enum Host {
    Run,
    Queue,
}

/// What the answer to a request needs to know of the connection that the request came on.
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) host: Host,
    /// Tasks that end with the connection.
    pub(super) tasks: Tasks,
    /// Closes the connection, whatever goes on there.
    pub(super) hang_up: Notify,
}

pub(super) async fn listen(listener: TcpListener, host: Host, shared: Arc<Shared>, tasks: Tasks) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => tasks.spawn(serve(stream, host, Arc::clone(&shared))),
            // A client that has gone again, or too many open files: both pass, and a test would rather wait.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn serve(stream: TcpStream, host: Host, shared: Arc<Shared>) {
    // Best effort: without it an answer is late, not wrong.
    let _ = stream.set_nodelay(true);
    let scope = Scope::new();
    let connection = Arc::new(Connection { shared, host, tasks: scope.tasks(), hang_up: Notify::new() });
    let service = service_fn(|request| {
        let connection = Arc::clone(&connection);
        async move { Ok::<_, Infallible>(answer(request, &connection).await) }
    });
    let server = auto::Builder::new(scope.tasks());
    let served = pin!(server.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        // How a connection ends is the client's affair; an error here has no one to be told to.
        _ = served => {}
        () = connection.hang_up.notified() => {}
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
        let mut scope = self.0.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Nothing is ever sent: this is the end of the scope.
                _ = scope.changed() => {}
                () = task => {}
            }
        });
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
