//! Listeners and connections.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{rt::TokioIo, server::conn::auto};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};

use super::{
    connection::Connection,
    handle::handle,
    scope::{Scope, Tasks},
    shared::Shared,
    socket::Socket,
    target::{Host, Plays},
};

/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn listen(listener: TcpListener, host: Host, shared: Arc<Shared>, tasks: Tasks) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // If this fails, answers are a little later and no less right.
                let _ = stream.set_nodelay(true);
                tasks.spawn(serve(stream, Plays::One(host), Arc::clone(&shared)));
            }
            // The client has gone again, or too many files are open. Both end by themselves, so the test waits.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

pub(super) async fn serve<I>(io: I, plays: Plays, shared: Arc<Shared>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let scope = Scope::new();
    let connection = Arc::new(Connection::new(shared, plays, scope.tasks()));
    // The WebSocket that the connection becomes when its HTTP has ended.
    let socket = Arc::new(Mutex::new(None));
    let service = service_fn(|request| {
        let (connection, socket) = (Arc::clone(&connection), Arc::clone(&socket));
        async move {
            let (response, accepted) = handle(request, &connection).await;
            if accepted.is_some() {
                *slot(&socket) = accepted;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let server = auto::Builder::new(scope.tasks());
    let served = async {
        // A client may end its connection as it likes, and an error here concerns nobody.
        let _ = server.serve_connection_with_upgrades(TokioIo::new(io), service).await;
        let socket = slot(&socket).take();
        if let Some(socket) = socket {
            let _ = socket.serve(&connection).await;
        }
    };
    tokio::select! {
        () = served => {}
        () = connection.hang_up.notified() => {}
    }
}

fn slot(socket: &Mutex<Option<Socket>>) -> MutexGuard<'_, Option<Socket>> {
    // It is only assigned, so a panic elsewhere cannot leave it half changed.
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}
