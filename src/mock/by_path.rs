//! What a test sets for a path and for all paths below it.

use std::collections::BTreeMap;

/// Values by path. If several paths include that of a request, the longest one counts.
pub(super) struct ByPath<T>(BTreeMap<String, T>);

impl<T> Default for ByPath<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> ByPath<T> {
    /// Sets the value for a path, or takes it away.
    pub(super) fn set(&mut self, path: &str, value: Option<T>) {
        match value {
            Some(value) => self.0.insert(trimmed(path).to_owned(), value),
            None => self.0.remove(trimmed(path)),
        };
    }

    /// The value for a request to this path, among those that are wanted.
    pub(super) fn find(&mut self, path: &str, is_wanted: impl Fn(&T) -> bool) -> Option<&mut T> {
        let found = self.0.iter_mut().filter(|(at, value)| leads_to(at, trimmed(path)) && is_wanted(value));
        found.max_by_key(|(at, _)| at.len()).map(|(_, value)| value)
    }
}

/// A slash at the beginning or at the end makes no difference.
fn trimmed(path: &str) -> &str {
    path.trim_matches('/')
}

fn leads_to(at: &str, path: &str) -> bool {
    at.is_empty() || path.strip_prefix(at).is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_the_longest_path_above_is_found() {
        let mut values = ByPath::default();
        for (path, value) in [("", 0), ("/a/b/", 1), ("a/b/c", 2)] {
            values.set(path, Some(value));
        }
        for (path, expected) in [("/a/b", 1), ("/a/b/", 1), ("/a/b/d", 1), ("/a/b/c/d", 2), ("/a/bc", 0), ("/", 0)] {
            assert_eq!(values.find(path, |_| true), Some(&mut { expected }), "{path}");
        }
        assert_eq!(values.find("/a/b/c", |value| *value != 2), Some(&mut 1));
        values.set("/a/b", None);
        assert_eq!(values.find("/a/b", |_| true), Some(&mut 0));
    }
}
