use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use crate::credential::KeyId;

/// The metrics of one store.
pub(crate) struct StoreMetrics {
    store: Arc<str>,
    /// The id of the key that the gauges show for this store.
    shown: Mutex<Option<Arc<str>>>,
}

/// How many stores of one name hold a key, by name and key id.
type Holders = BTreeMap<(Arc<str>, Arc<str>), usize>;

/// One for the process, as its recorder is.
static HOLDERS: Mutex<Holders> = Mutex::new(Holders::new());

impl StoreMetrics {
    pub(crate) fn new(store: Arc<str>) -> Self {
        Self { store, shown: Mutex::default() }
    }

    /// The name of the store.
    pub(crate) fn store(&self) -> &Arc<str> {
        &self.store
    }

    /// Sets the gauges: which key the store holds, since when, and whether fal has accepted it. They are set again even if nothing changed, for a
    /// recorder that was installed later.
    ///
    /// A series never goes away, so the one of a key that no store of this name holds any more is set to 0. `current`
    /// is read under the lock, so that of two concurrent rotations the last one wins.
    pub(crate) fn show(&self, current: impl FnOnce() -> (Option<KeyId>, SystemTime, bool)) {
        if !cfg!(feature = "metrics") {
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let (key_id, loaded_at, accepted) = current();
        let key_id: Arc<str> = key_id.as_ref().map_or("", KeyId::as_str).into();
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        *holders.entry((Arc::clone(&self.store), Arc::clone(&key_id))).or_default() += 1;
        credential_info(&self.store, &key_id, 1.0);
        credential_accepted(&self.store, &key_id, accepted);
        if let Some(before) = shown.replace(key_id) {
            self.release(&mut holders, before);
        }
        let since = loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        gauge!("tower_fal_credential_loaded_timestamp_seconds", "store" => Arc::clone(&self.store); since);
    }

    fn release(&self, holders: &mut Holders, key_id: Arc<str>) {
        let series = (Arc::clone(&self.store), key_id);
        if let Some(count) = holders.get_mut(&series) {
            *count -= 1;
            if *count == 0 {
                holders.remove(&series);
                credential_info(&series.0, &series.1, 0.0);
                credential_accepted(&series.0, &series.1, false);
            }
        }
    }

    /// A load has ended, whether it was a poll or a reload that was asked for.
    pub(crate) fn loaded(&self, result: &'static str) {
        count!("tower_fal_reloads_total", "store" => Arc::clone(&self.store), "result" => result);
    }
}

impl Drop for StoreMetrics {
    fn drop(&mut self) {
        let shown = self.shown.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(key_id) = shown {
            self.release(&mut HOLDERS.lock().unwrap_or_else(PoisonError::into_inner), key_id);
        }
    }
}

fn credential_info(store: &Arc<str>, key_id: &Arc<str>, value: f64) {
    gauge!("tower_fal_credential_info", "store" => Arc::clone(store), "key_id" => Arc::clone(key_id); value);
}

fn credential_accepted(store: &Arc<str>, key_id: &Arc<str>, accepted: bool) {
    let value = f64::from(u8::from(accepted));
    gauge!("tower_fal_credential_accepted", "store" => Arc::clone(store), "key_id" => Arc::clone(key_id); value);
}
