//! Which application a request is for, and what is noted of the applications that were refused.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

/// What stands before the owner in the ids of some endpoints.
///
/// Source: `@fal-ai/client` 1.10.1 (`utils.ts`).
const NAMESPACES: [&str; 2] = ["workflows", "comfy"];

/// How many applications something is noted of.
const NOTED: usize = 64;

/// The app of an endpoint and what follows it: `fal-ai/flux` and `dev` of `fal-ai/flux/dev`. The ids of workflows have one
/// segment more.
pub(crate) fn split_app(path: &str) -> Option<(&str, Option<&str>)> {
    let first = path.split('/').next()?;
    let segments = if NAMESPACES.contains(&first) { 3 } else { 2 };
    match path.match_indices('/').nth(segments - 1) {
        Some((end, _)) => Some((&path[..end], Some(&path[end + 1..]))),
        None => (path.matches('/').count() == segments - 1).then_some((path, None)),
    }
}

/// The domains of fal's hosts.
const FALS: [&str; 3] = ["fal.run", "fal.ai", "falrun.com"];

/// An application behind fal: its host, its owner, and its name there. Hashes stand for them, as the texts may be of any
/// length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Application {
    owner: Owner,
    hash: u64,
}

/// Whoever has applications. It takes an account at fal to be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner(u64);

impl Application {
    /// The one at this host and path.
    pub(crate) fn at(host: Option<&str>, path: &str) -> Self {
        // With keys that nobody knows, nobody can choose two names of one hash.
        static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        let path = path.trim_start_matches('/');
        let host = host.map(str::to_ascii_lowercase);
        let app = if host.as_deref().is_none_or(is_fals) {
            split_app(path).map_or(path, |(app, _)| app)
        } else {
            // A gateway, whose paths may begin with a segment of its own.
            path.match_indices('/').nth(2).map_or(path, |(end, _)| &path[..end])
        };
        let owner = app.rsplit_once('/').map_or(app, |(owner, _)| owner);
        Self { owner: Owner(KEYS.hash_one(owner)), hash: KEYS.hash_one((host, app)) }
    }

    pub(crate) fn owner(self) -> Owner {
        self.owner
    }
}

/// Only a gateway's paths are read in another way: no credential depends on this.
fn is_fals(host: &str) -> bool {
    let is_under = |domain| host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    FALS.into_iter().any(is_under)
}

/// What is noted of each of the last 64 applications.
#[derive(Debug)]
pub(crate) struct ByApplication<V> {
    /// The last one that was looked at is the last one here.
    noted: Vec<(Application, V)>,
}

impl<V> Default for ByApplication<V> {
    fn default() -> Self {
        Self { noted: Vec::new() }
    }
}

impl<V: Default> ByApplication<V> {
    /// What is noted of this one.
    pub(crate) fn of(&mut self, application: Application) -> &mut V {
        if self.known(application).is_none() {
            if self.noted.len() >= NOTED {
                self.forget_one();
            }
            self.noted.push((application, V::default()));
        }
        let last = self.noted.len() - 1;
        &mut self.noted[last].1
    }

    pub(crate) fn knows(&self, application: Application) -> bool {
        self.noted.iter().any(|(known, _)| *known == application)
    }

    /// What is noted of this one, if it is one of the last.
    pub(crate) fn known(&mut self, application: Application) -> Option<&mut V> {
        let at = self.noted.iter().position(|(known, _)| *known == application)?;
        let noted = self.noted.remove(at);
        self.noted.push(noted);
        self.noted.last_mut().map(|(_, noted)| noted)
    }

    pub(crate) fn count(&self) -> usize {
        self.noted.len()
    }

    /// What is noted of all applications of this one's owner.
    pub(crate) fn of_owner(&self, application: Application) -> impl Iterator<Item = &V> {
        self.noted.iter().filter(move |(known, _)| known.owner == application.owner).map(|(_, noted)| noted)
    }

    pub(crate) fn all(&mut self) -> impl Iterator<Item = &mut V> {
        self.noted.iter_mut().map(|(_, noted)| noted)
    }

    /// Forgets the oldest one of the owner who has the most: applications with many names displace only each other.
    fn forget_one(&mut self) {
        let owner = |at: usize| self.noted[at].0.owner;
        let how_many = |at: usize| self.noted.iter().filter(|(other, _)| other.owner == owner(at)).count();
        // Of equals, this is the last one, and so the oldest.
        if let Some(at) = (0..self.noted.len()).rev().max_by_key(|at| how_many(*at)) {
            self.noted.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_has_two_segments_and_that_of_a_workflow_three() {
        for (path, split) in [
            ("fal-ai/flux", Some(("fal-ai/flux", None))),
            ("fal-ai/flux/dev/x", Some(("fal-ai/flux", Some("dev/x")))),
            ("fal-ai/flux/", Some(("fal-ai/flux", Some("")))),
            ("workflows/acme/cats/requests/1", Some(("workflows/acme/cats", Some("requests/1")))),
            ("comfy/acme/cats", Some(("comfy/acme/cats", None))),
            ("comfy/acme", None),
            ("json", None),
            ("", None),
        ] {
            assert_eq!(split_app(path), split, "{path}");
        }
    }

    fn fal(path: &str) -> Application {
        Application::at(Some("fal.run"), path)
    }

    #[test]
    fn an_application_is_a_host_and_the_start_of_a_path() {
        for path in ["fal-ai/flux", "/fal-ai/flux/", "/fal-ai/flux/dev", "//fal-ai/flux/requests/1/status"] {
            assert_eq!(fal(path), fal("/fal-ai/flux"), "{path}");
        }
        assert_eq!(fal("/workflows/acme/cats/x"), fal("/workflows/acme/cats"));
        assert_eq!(Application::at(Some("FAL.run"), "/fal-ai/flux"), fal("/fal-ai/flux"));
        for path in ["/fal-ai/flux2", "/fal-ai", "/acme/flux", "/workflows/fal-ai/flux", "/", ""] {
            assert_ne!(fal(path), fal("/fal-ai/flux"), "{path}");
        }
        assert_ne!(fal("/workflows/acme/cats"), fal("/workflows/acme/dogs"));
        for host in [Some("queue.fal.run"), None] {
            assert_ne!(Application::at(host, "/fal-ai/flux"), fal("/fal-ai/flux"), "{host:?}");
        }
    }

    #[test]
    fn behind_a_gateway_an_application_has_one_segment_more() {
        let at = |path| Application::at(Some("gateway.example.com"), path);
        let flux = at("/fal/fal-ai/flux");
        for path in ["/fal/fal-ai/flux/dev", "/fal/fal-ai/flux/requests/1", "/fal/fal-ai/flux/requests/2/status"] {
            assert_eq!(at(path), flux, "{path}");
        }
        for path in ["/fal/fal-ai", "/fal/fal-ai/other", "/fal/other/flux", "/fal-ai/flux/dev"] {
            assert_ne!(at(path), flux, "{path}");
        }
        assert_eq!(at("/fal/fal-ai/other").owner(), flux.owner());
        assert_ne!(at("/fal/other/flux").owner(), flux.owner());
        for host in ["fal.run", "queue.fal.run", "QUEUE.FALRUN.COM", "rest.fal.ai"] {
            let at = |path| Application::at(Some(host), path);
            assert_eq!(at("/fal-ai/flux/dev"), at("/fal-ai/flux/schnell"), "{host}");
        }
        let other = Application::at(Some("notfal.run"), "/fal-ai/flux/dev");
        assert_ne!(other, Application::at(Some("notfal.run"), "/fal-ai/flux/schnell"));
    }

    #[test]
    fn an_owner_has_applications_on_every_host() {
        let flux = fal("/fal-ai/flux").owner();
        assert_eq!(Application::at(Some("queue.fal.run"), "/fal-ai/other/x").owner(), flux);
        assert_ne!(fal("/acme/flux").owner(), flux);
        assert_eq!(fal("/comfy/acme/cats").owner(), fal("/comfy/acme/dogs").owner());
        assert_ne!(fal("/comfy/acme/cats").owner(), fal("/comfy/other/cats").owner());
    }

    #[test]
    fn the_oldest_gives_way() {
        let mut numbers = ByApplication::<usize>::default();
        let app = |n| fal(&format!("/acme/app-{n}"));
        for n in 1..=NOTED {
            *numbers.of(app(n)) = n;
        }
        assert_eq!(*numbers.of(app(1)), 1); // so it is the newest now
        assert_eq!(*numbers.of(app(NOTED + 1)), 0);
        assert_eq!(numbers.all().count(), NOTED);
        assert_eq!(*numbers.of(app(1)), 1);
        assert_eq!(*numbers.of(app(2)), 0, "it was the oldest");
    }

    #[test]
    fn an_owner_with_many_displaces_its_own_only() {
        let mut numbers = ByApplication::<usize>::default();
        *numbers.of(fal("/acme/one")) = 1;
        *numbers.of(fal("/other/two")) = 2;
        for n in 0..10 * NOTED {
            *numbers.of(fal(&format!("/crowd/app-{n}"))) = 3;
        }
        assert_eq!(numbers.all().count(), NOTED);
        assert_eq!((*numbers.of(fal("/acme/one")), *numbers.of(fal("/other/two"))), (1, 2));
    }
}
