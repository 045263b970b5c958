//! What an application is called.

use std::{fmt, sync::Arc};

use crate::endpoint::{Endpoints, split_app};

/// The longest name of an application, in bytes, and the most segments that it has.
const MAX_LEN: usize = 256;
const MAX_SEGMENTS: usize = 10;

/// The name of an application as a path: `owner/app`, and what is below it, such as `owner/app/realtime`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct App(Arc<str>);

impl App {
    /// # Errors
    /// When the text is no path of two or more plain segments, three behind `workflows` or `comfy`.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidApp> {
        let app = Self::parse_any(text)?;
        if split_app(&app.0).is_some() { Ok(app) } else { Err(InvalidApp::NoOwner) }
    }

    /// As [`parse`](Self::parse), but an alias alone, such as `flux`, is a name too.
    pub(super) fn parse_any(text: &str) -> Result<Self, InvalidApp> {
        if text.len() > MAX_LEN || text.split('/').nth(MAX_SEGMENTS).is_some() {
            return Err(InvalidApp::TooLong);
        }
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        for segment in text.split('/') {
            if segment.is_empty() || segment == "." || segment == ".." {
                return Err(InvalidApp::Segment);
            }
            if !segment.bytes().all(is_plain) {
                return Err(InvalidApp::Character);
            }
        }
        Ok(Self(text.into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// What `POST /tokens/` calls the application: the second segment, or the third one behind `workflows` or `comfy`.
    ///
    /// Source: `@fal-ai/client` 1.10.1 (`auth.ts`).
    pub(crate) fn alias(&self) -> &str {
        let app = split_app(&self.0).map_or(&*self.0, |(app, _)| app);
        app.rsplit_once('/').map_or(app, |(_, alias)| alias)
    }

    /// The id of the endpoint: the name without the `/realtime` or `/stream` that clients put behind it. It may be the name
    /// of the application itself, and is part of the id then.
    pub(crate) fn endpoint(&self) -> &str {
        let id = self.0.strip_suffix("/realtime").or_else(|| self.0.strip_suffix("/stream"));
        id.filter(|id| split_app(id).is_some()).unwrap_or(&self.0)
    }

    /// Whether a list of endpoints has it.
    pub(crate) fn is_in(&self, endpoints: &Endpoints) -> bool {
        endpoints.covers(&self.0) || endpoints.covers(self.endpoint())
    }

    /// Whether it is the application that a list has under this name: the same one, its `/realtime` or `/stream`, or
    /// its alias alone.
    pub(crate) fn is_listed_as(&self, listed: &Self) -> bool {
        self == listed || self.endpoint() == listed.endpoint() || *self.0 == *listed.alias()
    }
}

impl fmt::Display for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not the name of an application. It does not show the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidApp {
    /// There is no `/`, or behind `workflows/` or `comfy/` no other one.
    #[error("the name of an application has an owner, as in `fal-ai/flux` and `workflows/owner/name`")]
    NoOwner,
    /// A part between two `/` is empty, `.` or `..`.
    #[error(
        "a part of the application's name is empty, `.` or `..`; it is a path such as `fal-ai/flux`, without `/` at its ends"
    )]
    Segment,
    /// There is a character that no name of an application has.
    #[error("the name of an application has letters, digits, `-`, `_` and `.` only, between `/`")]
    Character,
    /// It has more than 256 bytes or ten parts.
    #[error("the name of an application has at most {MAX_LEN} bytes, and at most {MAX_SEGMENTS} parts between `/`")]
    TooLong,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(text: &str) -> App {
        App::parse(text).unwrap()
    }

    #[test]
    fn an_alias_is_the_second_segment_or_the_third() {
        for (text, alias) in [
            ("fal-ai/flux", "flux"),
            ("fal-ai/flux/dev/realtime", "flux"),
            ("workflows/me/portrait", "portrait"),
            ("comfy/me/portrait/realtime", "portrait"),
            ("110602490-lcm/x", "x"),
        ] {
            assert_eq!(app(text).alias(), alias, "{text}");
        }
    }

    #[test]
    fn an_application_is_listed_under_its_endpoint() {
        let listed = app("fal-ai/flux/dev");
        for text in ["fal-ai/flux/dev", "fal-ai/flux/dev/realtime", "fal-ai/flux/dev/stream"] {
            assert!(app(text).is_listed_as(&listed), "{text}");
            assert!(listed.is_listed_as(&app(text)), "{text}");
        }
        assert!(App::parse_any("flux").unwrap().is_listed_as(&listed));
        for text in ["fal-ai/flux", "fal-ai/flux/pro", "fal-ai/flux/dev/other", "other/flux/dev", "x/flux", "flux/dev"]
        {
            assert!(!app(text).is_listed_as(&listed), "{text}");
        }
    }

    #[test]
    fn the_name_of_an_application_is_no_suffix() {
        for (text, endpoint) in [
            ("me/cats/realtime", "me/cats"),
            ("me/cats/stream", "me/cats"),
            ("me/cats/dev/realtime", "me/cats/dev"),
            ("me/realtime", "me/realtime"),
            ("me/stream/realtime", "me/stream"),
            ("workflows/me/realtime", "workflows/me/realtime"),
            ("workflows/me/stream", "workflows/me/stream"),
            ("workflows/me/cats/realtime", "workflows/me/cats"),
            ("workflows/me/realtime/stream", "workflows/me/realtime"),
            ("comfy/me/stream", "comfy/me/stream"),
            ("comfy/me/cats/stream", "comfy/me/cats"),
        ] {
            assert_eq!(app(text).endpoint(), endpoint, "{text}");
        }
        assert!(!app("workflows/me/stream").is_listed_as(&app("workflows/me/realtime")));
        assert!(app("workflows/me/realtime/stream").is_listed_as(&app("workflows/me/realtime")));
        let of_me = Endpoints::parse(["workflows/me/realtime"]).unwrap();
        assert!(app("workflows/me/realtime").is_in(&of_me) && !app("workflows/me/stream").is_in(&of_me));
    }

    #[test]
    fn a_text_that_is_no_name_is_refused() {
        let long = format!("a/{}", "b".repeat(MAX_LEN));
        for (text, why) in [
            ("", InvalidApp::Segment),
            ("/a/b", InvalidApp::Segment),
            ("a/b/", InvalidApp::Segment),
            ("a//b", InvalidApp::Segment),
            ("a/../b", InvalidApp::Segment),
            ("a/./b", InvalidApp::Segment),
            ("flux", InvalidApp::NoOwner),
            ("workflows/me", InvalidApp::NoOwner),
            ("comfy/me", InvalidApp::NoOwner),
            ("a/b?c", InvalidApp::Character),
            ("a/b%2fc", InvalidApp::Character),
            ("a/b c", InvalidApp::Character),
            ("a/b\"", InvalidApp::Character),
            ("a/\u{430}", InvalidApp::Character),
            ("https://fal.run/a/b", InvalidApp::Character),
            ("a/b/c/d/e/f/g/h/i/j/k", InvalidApp::TooLong),
            (&long, InvalidApp::TooLong),
        ] {
            assert_eq!(App::parse(text).unwrap_err(), why, "{text}");
        }
    }
}
