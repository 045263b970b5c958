//! Endpoints of fal, such as `fal-ai/flux/dev`, and lists of them.

use std::sync::Arc;

pub(crate) use crate::application::split_app;
use crate::pattern::{InvalidPattern, Segments};

/// The patterns of the endpoints that may be used. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Endpoints(Arc<[Segments]>);

impl Endpoints {
    /// Reads patterns such as `fal-ai/flux/**`.
    pub(crate) fn parse<T: AsRef<str>>(patterns: impl IntoIterator<Item = T>) -> Result<Self, InvalidPattern> {
        let is_of_none = |byte: u8| !byte.is_ascii_graphic() || matches!(byte, b'\\' | b'#' | b'?');
        let parse = |pattern: T| match Segments::parse(pattern.as_ref(), '/')? {
            _ if pattern.as_ref().bytes().any(is_of_none) => Err(InvalidPattern::new(
                "has a character that no endpoint has: a blank, `\\`, `#`, `?`, or none of ASCII",
            )),
            // Each endpoint has an owner and an app, so this would cover none.
            segments if !segments.has_any() && split_app(&segments.example('/')).is_none() => Err(InvalidPattern::new(
                "is too short to cover any endpoint: write owner/app (workflows/owner/name, comfy/owner/name), owner/** \
                 for all of an owner, or ** for all",
            )),
            // Nor would this: an id has no slash at its end, and one in a target is not looked at.
            _ if pattern.as_ref().ends_with('/') => {
                Err(InvalidPattern::new("ends with a slash, which no endpoint does: write it without, or with /**"))
            }
            segments => Ok(segments),
        };
        patterns.into_iter().map(parse).collect::<Result<_, _>>().map(Self)
    }

    /// The same and one more.
    pub(crate) fn and(&self, pattern: &str) -> Result<Self, InvalidPattern> {
        let more = Self::parse([pattern])?;
        Ok(Self(self.0.iter().chain(&*more.0).cloned().collect()))
    }

    /// Whether an endpoint is in the list. Its own `/stream` is part of an endpoint, as that is where the official
    /// `fal.stream(id)` goes.
    pub(crate) fn covers(&self, endpoint: &str) -> bool {
        let endpoint = endpoint.strip_suffix('/').unwrap_or(endpoint);
        let without_stream = endpoint.strip_suffix("/stream").filter(|endpoint| split_app(endpoint).is_some());
        self.0.iter().any(|pattern| {
            pattern.matches(endpoint, b'/') || without_stream.is_some_and(|endpoint| pattern.matches(endpoint, b'/'))
        })
    }

    /// Whether any endpoint in the list is one of this app's, such as `fal-ai/flux`.
    pub(crate) fn covers_app(&self, app: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches_start(app, b'/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_covers_its_endpoints_and_their_streams() {
        let endpoints = Endpoints::parse(["fal-ai/flux/dev", "acme/*"]).unwrap();
        for endpoint in ["fal-ai/flux/dev", "fal-ai/flux/dev/", "fal-ai/flux/dev/stream", "acme/x", "acme/x/stream"] {
            assert!(endpoints.covers(endpoint), "{endpoint}");
        }
        for endpoint in ["fal-ai/flux", "fal-ai/flux/stream", "fal-ai/flux/dev/other", "acme", "acme/x/y", "stream", ""]
        {
            assert!(!endpoints.covers(endpoint), "{endpoint}");
        }
        assert!(!Endpoints::default().covers("fal-ai/flux"));
    }

    #[test]
    fn the_name_of_a_workflow_is_no_stream() {
        for (pattern, endpoint, covers) in [
            ("workflows/me/cats", "workflows/me/cats/stream", true),
            ("workflows/me/stream", "workflows/me/stream", true),
            ("workflows/me/stream", "workflows/me/stream/stream", true),
            ("workflows/me/cats", "workflows/me/stream", false),
            ("*/me", "workflows/me/stream", false),
            ("*/me", "comfy/me/stream", false),
            ("*/me", "fal-ai/me/stream", true),
        ] {
            assert_eq!(Endpoints::parse([pattern]).unwrap().covers(endpoint), covers, "{pattern} {endpoint}");
        }
    }

    #[test]
    fn an_app_is_covered_by_any_of_its_endpoints() {
        let endpoints = Endpoints::parse(["fal-ai/flux/dev", "workflows/acme/cats/**", "acme/**"]).unwrap();
        for app in ["fal-ai/flux", "workflows/acme/cats", "acme/anything"] {
            assert!(endpoints.covers_app(app), "{app}");
        }
        for app in ["fal-ai/other", "workflows/acme/dogs", "fal-ai/flux2"] {
            assert!(!endpoints.covers_app(app), "{app}");
        }
    }

    #[test]
    fn what_names_no_endpoint_is_refused() {
        for pattern in ["**", "fal-ai/**", "**/flux", "*/flux"] {
            assert!(Endpoints::parse([pattern]).unwrap().covers("fal-ai/flux"), "{pattern}");
        }
        assert!(Endpoints::parse(["workflows/**"]).unwrap().covers("workflows/me/cats"));
        for pattern in [
            "",
            "/fal-ai/flux",
            "fal-ai//flux",
            "fal-ai/flux**",
            "flux",
            "*",
            "fal-*",
            "workflows/me",
            "comfy/*",
            "fal-ai/flux/",
        ] {
            assert!(Endpoints::parse([pattern]).is_err(), "{pattern}");
        }
    }
}
