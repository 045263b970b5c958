//! Patterns of targets: which URLs of fal's a client may have the proxy call.

use http::{Uri, uri::Authority};

use crate::{
    origin::{FalOrigins, OriginPolicy as _},
    pattern::{InvalidPattern, Segments},
};

/// A pattern such as `queue.fal.run/fal-ai/**`: a host, a path, and if there is a `?` exactly this query.
#[derive(Clone, Debug)]
pub(super) struct TargetPattern {
    host: Host,
    path: Segments,
    query: Option<Box<str>>,
}

#[derive(Clone, Debug)]
enum Host {
    /// One host, kept in the form in which each request takes it.
    One(Authority),
    Many(Segments),
}

impl TargetPattern {
    pub(super) fn parse(text: &str) -> Result<Self, InvalidPattern> {
        if text.bytes().any(|byte| !byte.is_ascii_graphic() || matches!(byte, b'\\' | b'#' | b'@')) {
            return Err(InvalidPattern::new(
                "has a character that no target has: a blank, `\\`, `#`, `@`, or none of ASCII",
            ));
        }
        let (url, query) = match text.split_once('?') {
            Some((url, query)) => (url, Some(query.into())),
            None => (text, None),
        };
        let (host, path) = url.split_once('/').ok_or(InvalidPattern::new("has no path: write it like `fal.run/**`"))?;
        if host.contains(':') {
            return Err(InvalidPattern::new("has a scheme or a port: write it without, like `fal.run/**`"));
        }
        let labels = Segments::parse(&host.to_ascii_lowercase(), '.')?;
        if labels.has_any() {
            return Err(InvalidPattern::new("has `**` in its host: `*` stands for a part of one label"));
        }
        let host = match labels.literal('.') {
            Some(host) => Host::One(
                Authority::try_from(host)
                    .map_err(|_| InvalidPattern::new("has a host that cannot be one: write it like `fal.run/**`"))?,
            ),
            None => Host::Many(labels),
        };
        Ok(Self { host, path: Segments::parse(path, '/')?, query })
    }

    /// Whether a target matches. `host` is in lower case, and `path` begins behind the first slash.
    pub(super) fn matches(&self, host: &str, path: &str, query: Option<&str>) -> bool {
        let of_host = match &self.host {
            Host::One(one) => *one.as_str() == *host,
            Host::Many(labels) => labels.matches(host, b'.'),
        };
        of_host && self.query.as_deref().is_none_or(|exact| query == Some(exact)) && self.path.matches(path, b'/')
    }

    /// The host as a request has it, if there is only one.
    pub(super) fn authority(&self) -> Option<&Authority> {
        match &self.host {
            Host::One(authority) => Some(authority),
            Host::Many(_) => None,
        }
    }

    /// Whether a path that begins so can match.
    pub(super) fn can_begin_with(&self, start: &str) -> bool {
        self.path.matches_start(start, b'/')
    }

    /// Whether a request to such a target could carry the credential. A host with a `*` is asked about with a name in its
    /// place that is nobody's: it must not be that only some of the hosts are admitted.
    pub(super) fn is_admitted_by(&self, origins: &FalOrigins) -> bool {
        let host = match &self.host {
            Host::One(authority) => authority.as_str().to_owned(),
            Host::Many(labels) => labels.example('.'),
        };
        format!("https://{host}/").parse().is_ok_and(|uri: Uri| origins.admits(&uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, host: &str, path: &str, query: Option<&str>) -> bool {
        TargetPattern::parse(pattern).unwrap().matches(host, path, query)
    }

    #[test]
    fn a_query_is_exact_if_there_is_one() {
        assert!(matches("fal.run/a", "fal.run", "a", None) && matches("fal.run/a", "fal.run", "a", Some("b=c")));
        assert!(matches("fal.run/a?b=*", "fal.run", "a", Some("b=*")));
        for query in [None, Some("b=c"), Some("b=*&d"), Some("")] {
            assert!(!matches("fal.run/a?b=*", "fal.run", "a", query), "{query:?}");
        }
        assert!(matches("fal.run/a?", "fal.run", "a", Some("")) && !matches("fal.run/a?", "fal.run", "a", None));
    }

    #[test]
    fn a_star_stays_within_a_label() {
        assert!(matches("*.fal.run/**", "a.fal.run", "x/y", None));
        for host in ["fal.run", "a.b.fal.run", ".fal.run", "a.fal.run.evil.com", "afal.run"] {
            assert!(!matches("*.fal.run/**", host, "x", None), "{host}");
        }
        assert!(matches("FAL.run/a", "fal.run", "a", None) && !matches("fal.run/a", "fal.run", "A", None));
    }

    #[test]
    fn what_cannot_be_a_pattern_is_refused() {
        for text in [
            "",
            "fal.run",
            "/a",
            "fal.run//a",
            "https://fal.run/a",
            "fal.run:443/a",
            "user@fal.run/a",
            "fal.run/a b",
            "fal.run/a#b",
            "fal.run\\a/b",
            "**.run/a",
            "fal..run/a",
            "fаl.run/a",
            "fal.run/a**",
            "fal.run/",
            "[::1]/a",
        ] {
            assert!(TargetPattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_hosts_that_carry_the_credential_are_admitted() {
        let admitted =
            |pattern: &str, origins: FalOrigins| TargetPattern::parse(pattern).unwrap().is_admitted_by(&origins);
        for pattern in ["fal.run/**", "queue.fal.run/a", "rest.alpha.fal.ai/a", "api.fal.ai/v1/models"] {
            assert!(admitted(pattern, FalOrigins::new()), "{pattern}");
        }
        for pattern in
            ["evil.com/**", "*.fal.run/**", "*.run/**", "re*.fal.ai/**", "falrun.com/**", "*/**", "127.0.0.1/a"]
        {
            assert!(!admitted(pattern, FalOrigins::new()), "{pattern}");
        }
        assert!(admitted("*.fal.run/**", FalOrigins::new().subdomains()));
        assert!(!admitted("*.run/**", FalOrigins::new().subdomains()));
        assert!(admitted("falrun.com/**", FalOrigins::new().backups()));
    }
}
