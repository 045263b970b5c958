//! The accept loop that all servers share.

use std::{
    io::{self, ErrorKind},
    time::Duration,
};

use metrics::gauge;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::sleep,
};
use tracing::warn;

use super::{
    connection::{self, Answers, Limits, Phase},
    seldom::Seldom,
};

/// How long to wait after an error that says that no connection can be accepted at the moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until `stop`, and then waits until those that are open have ended.
///
/// At most `max_connections` are open at a time. When that many are, the others wait in the system's queue, and
/// connections without a request are closed early, so that they leave room.
pub(crate) async fn serve<S: Answers>(
    name: &'static str,
    listener: TcpListener,
    answers: S,
    limits: Limits,
    max_connections: usize,
    stop: impl Future<Output = ()>,
) {
    static CROWDED: Seldom = Seldom::new();

    let phase = watch::Sender::new(Phase::Open);
    let mut connections = JoinSet::new();
    let count = gauge!("server_connections", "listener" => name);
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            stream = accept(&listener), if connections.len() < max_connections => {
                connections.spawn(connection::serve(stream, answers.clone(), limits, phase.subscribe()));
            }
        }
        count.set(connections.len() as f64);
        // Not below one and the same number, or it would change with each connection.
        if connections.len() >= max_connections {
            set(&phase, Phase::Crowded);
            if let Some(times) = CROWDED.count() {
                warn!(
                    listener = name,
                    max_connections, times, "no connection is left: closing those without a request"
                );
            }
        } else if connections.len() <= max_connections / 4 * 3 {
            set(&phase, Phase::Open);
        }
    }
    drop(listener);
    set(&phase, Phase::Draining);
    while connections.join_next().await.is_some() {
        count.set(connections.len() as f64);
    }
}

/// Wakes the connections only if there is news for them.
fn set(phase: &watch::Sender<Phase>, new: Phase) {
    phase.send_if_modified(|phase| std::mem::replace(phase, new) != new);
}

/// The next connection, however long that takes.
async fn accept(listener: &TcpListener) -> TcpStream {
    static FAILED: Seldom = Seldom::new();

    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // If it fails, an answer is late and not wrong.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                // Such as too many open files. The next attempt would fail at once, so a loop without a pause would
                // take a whole core.
                if let Some(times) = FAILED.count() {
                    warn!(%error, times, "cannot accept connections: trying again every {ACCEPT_PAUSE:?}");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the peer went away before its connection was accepted.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset)
}
