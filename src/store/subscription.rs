use std::fmt;

use tokio::sync::watch;

use super::status::Status;

/// Follows the [`Status`] of a store. See [`subscribe`](super::CredentialStore::subscribe).
///
/// It hands out copies of the status and never a lock, so it may be kept for as long as you like without any effect on
/// the store. It does not keep the driver running.
#[derive(Clone)]
pub struct Subscription {
    receiver: watch::Receiver<Status>,
}

impl Subscription {
    pub(super) fn new(sender: &watch::Sender<Status>) -> Self {
        Self { receiver: sender.subscribe() }
    }

    /// The status now. After the last handle of the store is gone, this is its last status.
    pub fn status(&self) -> Status {
        self.receiver.borrow().clone()
    }

    /// Waits until the status has changed since the last call, or since [`subscribe`](super::CredentialStore::subscribe),
    /// and returns it. `None` when the last handle of the store is gone.
    ///
    /// Several changes in a row are one: the status returned is always the newest. Dropping the future loses nothing.
    pub async fn changed(&mut self) -> Option<Status> {
        self.receiver.changed().await.ok()?;
        Some(self.receiver.borrow_and_update().clone())
    }

    /// Waits until the status is as `wanted`, which it may be already, and returns it. `None` when the last handle of
    /// the store is gone before.
    ///
    /// ```
    /// # use tower_fal::{Credential, CredentialStore};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = CredentialStore::fixed(Credential::key("first-id:secret")?);
    /// let mut subscription = store.subscribe();
    /// store.replace(Credential::key("second-id:secret")?);
    /// let status = subscription.wait_for(|status| status.generation.get() == 2).await;
    /// assert_eq!(status.unwrap().key_id.unwrap().as_str(), "second-id");
    /// # Ok(()) }
    /// ```
    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&Status) -> bool) -> Option<Status> {
        // `wanted` gets a copy, because it may look at the store, or replace its credential.
        let mut status = self.receiver.borrow_and_update().clone();
        while !wanted(&status) {
            status = self.changed().await?;
        }
        Some(status)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("status", &self.status()).finish_non_exhaustive()
    }
}
