//! How many requests of each tenant are under way.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A tenant, or all callers without a name.
type Tenant = Option<Arc<str>>;

#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Mutex<HashMap<Tenant, usize>>>);

/// One request that is under way. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    counts: InFlight,
    tenant: Tenant,
}

impl InFlight {
    /// A permit, unless as many are out as there may be.
    pub(super) fn enter(&self, tenant: Tenant, most: usize) -> Option<Permit> {
        let mut counts = self.lock();
        let count = counts.get(&tenant).copied().unwrap_or(0);
        if count >= most {
            return None;
        }
        counts.insert(tenant.clone(), count + 1);
        drop(counts);
        Some(Permit { counts: self.clone(), tenant })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Tenant, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        match counts.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            // A tenant without requests takes up no memory.
            _ => drop(counts.remove(&self.tenant)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenant_has_as_many_as_it_may() {
        let (in_flight, acme) = (InFlight::default(), Some(Arc::from("acme")));
        let first = in_flight.enter(acme.clone(), 2).unwrap();
        let second = in_flight.enter(acme.clone(), 2).unwrap();
        assert!(in_flight.enter(acme.clone(), 2).is_none());
        let other = in_flight.enter(None, 1).unwrap();
        assert!(in_flight.enter(None, 1).is_none());
        drop(first);
        let third = in_flight.enter(acme.clone(), 2).unwrap();
        assert!(in_flight.enter(acme.clone(), 2).is_none() && in_flight.enter(acme, 0).is_none());
        drop((second, third, other));
        assert!(in_flight.lock().is_empty());
    }
}
