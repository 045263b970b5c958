//! Work that nobody who waits for it can cancel.

use std::sync::LazyLock;

use tokio::{sync::watch, task::JoinHandle};

/// How many such tasks there are in this process.
static UNDER_WAY: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// Waits until no renewal, no login and no logout of this process is under way.
///
/// A renewal spends the refresh token, which is good once. It runs in a task of its own, so that no timeout and no
/// dropped future ends it between the answer and the write to the file. But the end of the runtime does end it, so a
/// program that may exit at any time calls this last. Nothing is begun by this call, and it returns at once if nothing
/// is under way. It waits no longer than the limits of what has begun allow: at most about three minutes.
///
/// ```
/// # async fn work() {}
/// #[tokio::main]
/// async fn main() {
///     work().await;
///     tower_fal::login::settled().await;
/// }
/// ```
pub async fn settled() {
    // The sender is never dropped.
    let _ = UNDER_WAY.subscribe().wait_for(|count| *count == 0).await;
}

/// Runs it to its end, as long as the runtime lives.
pub(super) fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let counted = Counted::new();
    tokio::spawn(async move {
        let _counted = counted;
        work.await
    })
}

struct Counted;

impl Counted {
    fn new() -> Self {
        UNDER_WAY.send_modify(|count| *count += 1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        UNDER_WAY.send_modify(|count| *count -= 1);
    }
}
