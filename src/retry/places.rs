//! The places of the requests that wait for a newer credential.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::application::{Application, Owner};

/// There is one further place for each so many that are for all. A request gets one of these as long as fewer requests to
/// its owner wait than places are left. So an owner whose applications refuse a crowd leaves places for the others, and so
/// do several such owners.
const ONE_MORE_FOR: usize = 8;

#[derive(Debug)]
pub(super) struct Places {
    limit: usize,
    /// How many requests wait, to owners of whom any does.
    taken: Mutex<BTreeMap<Owner, usize>>,
}

/// A request waits as long as it holds one.
#[derive(Debug)]
pub(super) struct Place<'a> {
    places: &'a Places,
    owner: Owner,
}

impl Places {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, taken: Mutex::default() }
    }

    /// A place for a request to this application, if there is one.
    pub(super) fn take(&self, application: Application) -> Option<Place<'_>> {
        let owner = application.owner();
        let mut taken = self.taken();
        let (waiting, of_owner) = (taken.values().sum::<usize>(), taken.get(&owner).copied().unwrap_or_default());
        let left = self.limit.saturating_add(self.limit / ONE_MORE_FOR).saturating_sub(waiting);
        if waiting >= self.limit && of_owner >= left {
            return None;
        }
        *taken.entry(owner).or_default() += 1;
        Some(Place { places: self, owner })
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<Owner, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(count) = taken.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(path: &str) -> Application {
        Application::at(Some("fal.run"), path)
    }

    #[test]
    fn a_crowd_leaves_places_for_many_requests_to_another() {
        let places = Places::new(1024);
        let take = |path: &str| (0..2000).map_while(|_| places.take(app(path))).collect::<Vec<_>>();
        let crowd = take("/crowd/app");
        assert_eq!(crowd.len(), 1024);
        let others = [take("/fal-ai/flux"), take("/acme/cats"), take("/other/cats")];
        assert_eq!(others.each_ref().map(Vec::len), [64, 32, 16]);
    }

    #[test]
    fn the_last_places_are_for_those_who_have_none() {
        let places = Places::new(16);
        let crowd: Vec<_> = (0..100).filter_map(|n| places.take(app(&format!("/crowd/app-{n}")))).collect();
        assert_eq!(crowd.len(), 16);
        let flux = places.take(app("/fal-ai/flux"));
        assert!(flux.is_some());
        assert!(places.take(app("/fal-ai/flux")).is_none(), "the last one is for somebody else");
        let acme = places.take(app("/acme/cats"));
        assert!(acme.is_some());
        assert!(places.take(app("/other/cats")).is_none());
        drop(flux);
        assert!(places.take(app("/crowd/app-0")).is_none());
        assert!(places.take(app("/other/cats")).is_some());
        drop((crowd, acme));
        assert!(places.taken().is_empty());
    }

    #[test]
    fn few_places_are_for_whoever_comes() {
        let places = Places::new(3);
        let taken: Vec<_> = (0..10).filter_map(|_| places.take(app("/fal-ai/flux"))).collect();
        assert_eq!(taken.len(), 3);
        assert!(Places::new(0).take(app("/fal-ai/flux")).is_none());
    }
}
