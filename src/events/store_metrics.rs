#[cfg(feature = "metrics")]
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use std::{sync::Arc, time::SystemTime};

use crate::credential::KeyId;

/// The metrics of one store.
pub(crate) struct StoreMetrics {
    store: Arc<str>,
    /// The id of the key that it was last shown to hold.
    #[cfg(feature = "metrics")]
    holds: Mutex<Option<Arc<str>>>,
}

/// How many stores of one name hold a key, by name and key id.
#[cfg(feature = "metrics")]
type Holders = BTreeMap<(Arc<str>, Arc<str>), usize>;

/// One for the process, as its recorder is.
#[cfg(feature = "metrics")]
static HOLDERS: Mutex<Holders> = Mutex::new(Holders::new());

impl StoreMetrics {
    pub(crate) fn new(store: Arc<str>) -> Self {
        Self {
            store,
            #[cfg(feature = "metrics")]
            holds: Mutex::default(),
        }
    }

    /// The name of the store.
    pub(crate) fn store(&self) -> &Arc<str> {
        &self.store
    }

    /// Shows what the store holds and since when, as may have been done before: a recorder that was installed since
    /// then hears of it now.
    ///
    /// No series ever goes away, so that of a key which no store of this name holds any more is set to 0. What is
    /// `current` is asked when nobody else can show anything: of two who rotate at once, the last one is right.
    pub(crate) fn show(&self, current: impl FnOnce() -> (Option<KeyId>, SystemTime)) {
        #[cfg(feature = "metrics")]
        {
            let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
            let (key_id, loaded_at) = current();
            let key_id: Arc<str> = key_id.as_ref().map_or("", KeyId::as_str).into();
            let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
            *holders.entry((Arc::clone(&self.store), Arc::clone(&key_id))).or_default() += 1;
            credential_info(&self.store, &key_id, 1.0);
            if let Some(before) = holds.replace(key_id) {
                self.release(&mut holders, before);
            }
            let since = loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            let store = Arc::clone(&self.store);
            metrics::gauge!("tower_fal_credential_loaded_timestamp_seconds", "store" => store).set(since);
        }
        #[cfg(not(feature = "metrics"))]
        drop(current);
    }

    #[cfg(feature = "metrics")]
    fn release(&self, holders: &mut Holders, key_id: Arc<str>) {
        let series = (Arc::clone(&self.store), key_id);
        if let Some(count) = holders.get_mut(&series) {
            *count -= 1;
            if *count == 0 {
                holders.remove(&series);
                credential_info(&series.0, &series.1, 0.0);
            }
        }
    }

    /// A load has ended: whether that was a poll or asked for by somebody.
    pub(crate) fn loaded(&self, result: &'static str) {
        #[cfg(feature = "metrics")]
        {
            let store = Arc::clone(&self.store);
            metrics::counter!("tower_fal_reloads_total", "store" => store, "result" => result).increment(1);
        }
        let _ = (&self.store, result);
    }
}

#[cfg(feature = "metrics")]
impl Drop for StoreMetrics {
    fn drop(&mut self) {
        let holds = self.holds.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(key_id) = holds {
            self.release(&mut HOLDERS.lock().unwrap_or_else(PoisonError::into_inner), key_id);
        }
    }
}

#[cfg(feature = "metrics")]
fn credential_info(store: &Arc<str>, key_id: &Arc<str>, value: f64) {
    let (store, key_id) = (Arc::clone(store), Arc::clone(key_id));
    metrics::gauge!("tower_fal_credential_info", "store" => store, "key_id" => key_id).set(value);
}
