use std::{
    collections::{HashMap, VecDeque},
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use crate::caller::Caller;

/// Remembers who submitted which request to fal's queue, so that nobody follows the requests of others: see
/// [`request_owners`](super::FalProxy::request_owners).
///
/// Several servers behind one name need an implementation of yours, over what they share. [`RequestOwnersInMemory`] is for
/// one.
pub trait RequestOwners: Send + Sync + 'static {
    /// The caller has submitted a request, and gets its id as soon as this returns.
    fn remember(&self, request_id: &str, caller: &Caller) -> impl Future<Output = ()> + Send;

    /// Whether the request is one that this caller has submitted.
    fn owns(&self, request_id: &str, caller: &Caller) -> impl Future<Output = bool> + Send;
}

/// [`RequestOwners`] in the memory of one process, bounded: beyond so many requests, the oldest is forgotten. Then it
/// cannot be followed through the proxy any more.
///
/// Callers are told apart by the [name](Caller::name) of their tenant. All callers without a name count as one.
pub struct RequestOwnersInMemory {
    most: usize,
    requests: Mutex<Requests>,
}

#[derive(Default)]
struct Requests {
    owners: HashMap<Arc<str>, Option<Arc<str>>>,
    by_age: VecDeque<Arc<str>>,
}

/// The longest id that is remembered, in bytes. fal's are UUIDs.
const MAX_ID: usize = 128;

impl RequestOwnersInMemory {
    /// Remembers so many requests at most. By [`default`](Self::default) that is 100,000, which takes up some 20 MiB.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most, requests: Mutex::default() }
    }
}

impl Default for RequestOwnersInMemory {
    fn default() -> Self {
        Self::new(100_000)
    }
}

impl RequestOwners for RequestOwnersInMemory {
    async fn remember(&self, request_id: &str, caller: &Caller) {
        if request_id.len() > MAX_ID {
            return;
        }
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, owner): (Arc<str>, _) = (request_id.into(), caller.shared_name().cloned());
        // Whoever had it first has it: an answer that repeats an id gives nobody the request of another.
        if self.most == 0 || requests.owners.contains_key(&id) {
            return;
        }
        while requests.by_age.len() >= self.most
            && let Some(oldest) = requests.by_age.pop_front()
        {
            requests.owners.remove(&oldest);
        }
        requests.by_age.push_back(Arc::clone(&id));
        requests.owners.insert(id, owner);
    }

    async fn owns(&self, request_id: &str, caller: &Caller) -> bool {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.owners.get(request_id).is_some_and(|owner| owner.as_deref() == caller.name())
    }
}

impl fmt::Debug for RequestOwnersInMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestOwnersInMemory").field("most", &self.most).finish_non_exhaustive()
    }
}

/// [`RequestOwners`] of any type.
#[derive(Clone)]
pub(super) struct Owners(Arc<dyn OwnersBoxed>);

impl Owners {
    pub(super) fn new(owners: impl RequestOwners) -> Self {
        Self(Arc::new(owners))
    }

    pub(super) async fn remember(&self, request_id: &str, caller: &Caller) {
        self.0.remember_boxed(request_id, caller).await;
    }

    /// Whether all requests in a path are the caller's. An endpoint has none.
    pub(super) async fn own_all_in(&self, path: &str, caller: &Caller) -> bool {
        let mut segments = path.split('/');
        while let Some(segment) = segments.next() {
            // Wherever it stands: only fal knows how long the name of an app can be.
            if segment.eq_ignore_ascii_case("requests") {
                let id = segments.next().unwrap_or_default();
                if id.is_empty() || !self.0.owns_boxed(id, caller).await {
                    return false;
                }
            }
        }
        true
    }
}

impl fmt::Debug for Owners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owners")
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

trait OwnersBoxed: Send + Sync {
    fn remember_boxed<'a>(&'a self, request_id: &'a str, caller: &'a Caller) -> Boxed<'a, ()>;
    fn owns_boxed<'a>(&'a self, request_id: &'a str, caller: &'a Caller) -> Boxed<'a, bool>;
}

impl<O: RequestOwners> OwnersBoxed for O {
    fn remember_boxed<'a>(&'a self, request_id: &'a str, caller: &'a Caller) -> Boxed<'a, ()> {
        Box::pin(self.remember(request_id, caller))
    }

    fn owns_boxed<'a>(&'a self, request_id: &'a str, caller: &'a Caller) -> Boxed<'a, bool> {
        Box::pin(self.owns(request_id, caller))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_submitted_a_request_owns_it() {
        let (owners, acme, zeta) = (RequestOwnersInMemory::default(), Caller::tenant("acme"), Caller::tenant("zeta"));
        owners.remember("1", &acme).await;
        owners.remember("1", &zeta).await;
        owners.remember("2", &Caller::anonymous()).await;
        assert!(owners.owns("1", &acme).await && owners.owns("2", &Caller::anonymous()).await);
        for (id, caller) in [("1", &zeta), ("2", &acme), ("3", &acme), ("1", &Caller::anonymous())] {
            assert!(!owners.owns(id, caller).await, "{id} {caller:?}");
        }
    }

    #[tokio::test]
    async fn the_oldest_request_is_forgotten() {
        let (owners, acme) = (RequestOwnersInMemory::new(2), Caller::tenant("acme"));
        for id in ["1", "2", "3", &"4".repeat(MAX_ID + 1)] {
            owners.remember(id, &acme).await;
        }
        assert!(!owners.owns("1", &acme).await && owners.owns("2", &acme).await && owners.owns("3", &acme).await);
        assert_eq!(owners.requests.lock().unwrap().owners.len(), 2);
    }

    #[tokio::test]
    async fn every_request_in_a_path_is_looked_at() {
        let (owners, acme) = (Owners::new(RequestOwnersInMemory::default()), Caller::tenant("acme"));
        owners.remember("1", &acme).await;
        for path in ["fal-ai/flux", "fal-ai/flux/requests/1/status", "a/b/c/d/requests/1", "requests/1"] {
            assert!(owners.own_all_in(path, &acme).await, "{path}");
        }
        for path in
            ["a/b/requests/2", "a/b/Requests/2/status", "a/b/requests", "a/b/requests/", "a/b/requests/1/requests/2"]
        {
            assert!(!owners.own_all_in(path, &acme).await, "{path}");
        }
    }
}
