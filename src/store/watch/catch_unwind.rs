use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use notify::{RecursiveMode, Watcher};

use crate::error::BoxError;

pub(super) type BoxWatcher = Box<dyn Watcher + Send>;

/// A watcher whose panics are caught. That of `notify` panics when its thread is gone or could not be started, and once
/// more when it is dropped.
pub(super) struct CatchUnwindWatcher(Option<BoxWatcher>);

impl CatchUnwindWatcher {
    pub(super) fn new(watcher: BoxWatcher) -> Self {
        Self(Some(watcher))
    }

    pub(super) fn watch(&mut self, directory: &Path) -> Result<(), BoxError> {
        self.call(|watcher| watcher.watch(directory, RecursiveMode::NonRecursive))?;
        Ok(())
    }

    pub(super) fn unwatch(&mut self, directory: &Path) {
        let _ = self.call(|watcher| watcher.unwatch(directory)); // it may not be watched any more
    }

    pub(super) fn is_dead(&self) -> bool {
        self.0.is_none()
    }

    fn call(&mut self, call: impl FnOnce(&mut BoxWatcher) -> notify::Result<()>) -> notify::Result<()> {
        let dead = || notify::Error::generic("the watcher has died");
        let watcher = self.0.as_mut().ok_or_else(dead)?;
        catch_unwind(AssertUnwindSafe(|| call(watcher))).unwrap_or_else(|_| {
            drop(Self(self.0.take()));
            Err(dead())
        })
    }
}

impl Drop for CatchUnwindWatcher {
    fn drop(&mut self) {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(self.0.take())));
    }
}
