use super::SourceError;

/// Why a reload failed. The last good credential is still there.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// The source failed.
    #[error("the fal credential could not be reloaded")]
    Failed(#[source] SourceError),
    /// The source has not answered yet; the load goes on.
    #[error("the source of the fal credential has not answered yet")]
    Pending,
    /// The runtime on which the store was built has ended. Build a store on a runtime that lives.
    #[error("the runtime that reloads the fal credential has ended: build the store on one that lives as long")]
    DriverGone,
    /// The store was made by [`fixed`](crate::CredentialStore::fixed) or [`from_env`](crate::CredentialStore::from_env).
    #[error("this store never reloads: use `CredentialStore::builder` with a source, or `replace`")]
    NeverReloads,
}
