//! Which origins may carry the credential.
//!
//! An [`OriginPolicy`] looks at the URI of an outgoing request: its scheme, host and port. It never reads the `Host`
//! header, which in a server that forwards is whatever the caller wrote. It is asked for every request, so a
//! redirect that is followed by an outer layer is looked at again on each hop.
//!
//! | policy | admits |
//! |---|---|
//! | [`FalOrigins`] (default) | `https` and `wss` to fal's API hosts, on port 443; more only by name |
//! | [`BoundOrigin`] | one origin, and requests that name none: for a service bound to one connection |
//! | a closure | what it says |
//! | [`EveryRequest`] | everything |
//!
//! ```
//! use http::Uri;
//! use tower_fal::origin::{FalOrigins, OriginPolicy};
//!
//! let fal = FalOrigins::new();
//! assert!(fal.admits(&Uri::from_static("https://queue.fal.run/fal-ai/flux/dev")));
//! assert!(!fal.admits(&Uri::from_static("http://queue.fal.run/fal-ai/flux/dev")));
//! assert!(!fal.admits(&Uri::from_static("https://queue.fal.run.example.com/")));
//! assert!(!fal.admits(&Uri::from_static("/fal-ai/flux/dev")));
//! ```

use std::{net::IpAddr, sync::Arc};

use http::{
    Uri,
    uri::{Authority, Scheme},
};

use crate::wire::{API_HOSTS, BACKUP_HOSTS};

/// Decides which requests may carry the credential. See the [module docs](self).
///
/// Closures are policies, and so are functions: `fn(&Uri) -> bool` is the policy to name in a struct field.
///
/// ```
/// use tower_fal::{Credential, CredentialStore, FalAuthLayer};
///
/// # let store = CredentialStore::fixed(Credential::key("id:secret")?);
/// let layer = FalAuthLayer::new(store).origins(|uri: &http::Uri| uri.host() == Some("gateway.internal"));
/// # let _ = layer;
/// # Ok::<(), tower_fal::CredentialError>(())
/// ```
pub trait OriginPolicy {
    /// Whether a request to this URI may carry the credential.
    fn admits(&self, uri: &Uri) -> bool;
}

impl<F: Fn(&Uri) -> bool> OriginPolicy for F {
    fn admits(&self, uri: &Uri) -> bool {
        self(uri)
    }
}

/// fal's own origins, and those that you add. The default policy.
///
/// Without options: `https` or `wss`, on port 443, to exactly `fal.run`, `queue.fal.run`, `ws.fal.run`, `rest.fal.ai`,
/// `rest.alpha.fal.ai` or `api.fal.ai`. Upper and lower case are the same. A user name, a trailing dot, another port
/// or anything else that is not written plainly is not admitted.
///
/// ```
/// use tower_fal::origin::FalOrigins;
///
/// let origins = FalOrigins::new().backups().and("https://fal-gateway.example.com:8443")?;
/// # let _ = origins;
/// # Ok::<(), tower_fal::origin::InvalidOrigin>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct FalOrigins {
    subdomains: bool,
    backups: bool,
    loopback_http: bool,
    others: Option<Arc<[Origin]>>,
}

impl FalOrigins {
    /// fal's API hosts and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// Admits every subdomain of `fal.run` too, such as `gateway.fal.run`.
    pub fn subdomains(mut self) -> Self {
        self.subdomains = true;
        self
    }

    /// Admits `falrun.com` and `queue.falrun.com` too, the backups of `fal.run` and `queue.fal.run`.
    ///
    /// Source: `fal_client` 1.0.3, which sends the whole request there when the primary cannot be reached.
    pub fn backups(mut self) -> Self {
        self.backups = true;
        self
    }

    /// Admits plain `http` and `ws` to this machine too, on any port: `127.0.0.0/8`, `[::1]` and `localhost`. For
    /// tests.
    pub fn loopback_http(mut self) -> Self {
        self.loopback_http = true;
        self
    }

    /// Admits one more origin, such as `https://fal-gateway.example.com`.
    ///
    /// # Errors
    /// When it is not `scheme://host` or `scheme://host:port`, or not encrypted: `http` and `ws` are taken for this
    /// machine only.
    pub fn and(mut self, origin: &str) -> Result<Self, InvalidOrigin> {
        let origin = Origin::parse(origin)?;
        let others = self.others.as_deref().unwrap_or_default();
        self.others = Some(others.iter().cloned().chain([origin]).collect());
        Ok(self)
    }
}

impl OriginPolicy for FalOrigins {
    #[inline]
    fn admits(&self, uri: &Uri) -> bool {
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return false;
        };
        // Nearly every request is written exactly so.
        is_host_kept_apart(uri)
            && ((scheme.as_str() == "https" && API_HOSTS.contains(&authority.as_str()))
                || self.admits_written_otherwise(uri, scheme, authority))
    }
}

impl FalOrigins {
    fn admits_written_otherwise(&self, uri: &Uri, scheme: &Scheme, authority: &Authority) -> bool {
        if is_encrypted(scheme) && self.admits_fal_host(authority.as_str()) {
            return true;
        }
        // Off the path of requests to fal itself.
        (self.loopback_http && is_plain(scheme) && !has_user(uri) && uri.host().is_some_and(is_loopback))
            || self.others.as_deref().is_some_and(|others| others.iter().any(|origin| origin.is_of(uri)))
    }

    fn admits_fal_host(&self, authority: &str) -> bool {
        // As it is written, but for the default port: whatever is written oddly (a user, a dot at the end, `:0443`)
        // equals none of the hosts.
        let host = authority.strip_suffix(":443").unwrap_or(authority);
        let is_one_of = |known: &[&str]| known.iter().any(|known| host.eq_ignore_ascii_case(known));
        is_one_of(&API_HOSTS)
            || (self.backups && is_one_of(&BACKUP_HOSTS))
            || (self.subdomains && is_subdomain_of_fal_run(host))
    }
}

fn is_subdomain_of_fal_run(host: &str) -> bool {
    const PARENT: &str = ".fal.run";
    let Some((labels, parent)) = host.len().checked_sub(PARENT.len()).and_then(|at| host.split_at_checked(at)) else {
        return false;
    };
    parent.eq_ignore_ascii_case(PARENT)
        && labels
            .split('.')
            .all(|label| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
}

/// One origin, and the requests that name none. For a service that is bound to one connection.
///
/// Such a service is often called with URIs like `/fal-ai/flux/dev`, whose origin only you know. An absolute URI must
/// still be of that origin.
///
/// ```
/// use http::Uri;
/// use tower_fal::origin::{BoundOrigin, OriginPolicy};
///
/// let bound = BoundOrigin::new("https://fal.run")?;
/// assert!(bound.admits(&Uri::from_static("/fal-ai/flux/dev")));
/// assert!(bound.admits(&Uri::from_static("https://fal.run/fal-ai/flux/dev")));
/// assert!(!bound.admits(&Uri::from_static("https://example.com/")));
/// # Ok::<(), tower_fal::origin::InvalidOrigin>(())
/// ```
#[derive(Clone, Debug)]
pub struct BoundOrigin {
    origin: Origin,
}

impl BoundOrigin {
    /// The policy of a service whose connection leads to this origin.
    ///
    /// # Errors
    /// As [`FalOrigins::and`].
    pub fn new(origin: &str) -> Result<Self, InvalidOrigin> {
        Origin::parse(origin).map(|origin| Self { origin })
    }
}

impl OriginPolicy for BoundOrigin {
    fn admits(&self, uri: &Uri) -> bool {
        match uri.authority() {
            None => uri.scheme().is_none(),
            Some(_) => self.origin.is_of(uri),
        }
    }
}

/// Admits every request, whatever its URI.
///
/// Only where nothing but fal can be reached, such as a route that only forwards. Everything behind it sees the
/// secret.
#[derive(Clone, Copy, Debug, Default)]
pub struct EveryRequest;

impl OriginPolicy for EveryRequest {
    fn admits(&self, _uri: &Uri) -> bool {
        true
    }
}

/// A text that names no origin which may carry a credential.
///
/// It names the rule, never the text: people paste keys into the wrong place, and passwords into URLs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the origin {problem}")]
pub struct InvalidOrigin {
    problem: &'static str,
}

/// A scheme, a lower-case host and a port that is always stated.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: Scheme,
    host: Box<str>,
    port: u16,
}

impl Origin {
    fn parse(text: &str) -> Result<Self, InvalidOrigin> {
        let invalid = |problem| InvalidOrigin { problem };
        let form = "is not written as one: write `https://host` or `https://host:port`";
        let uri: Uri = text.parse().map_err(|_| invalid(form))?;
        let (Some(scheme), Some(authority), "/", None) = (uri.scheme(), uri.authority(), uri.path(), uri.query())
        else {
            return Err(invalid(form));
        };
        if has_user(&uri) || authority.host().is_empty() {
            return Err(invalid(form));
        }
        if !is_encrypted(scheme) && !is_loopback(authority.host()) {
            return Err(invalid(
                "would carry the credential in clear: use `https` or `wss`, or a closure as the policy",
            ));
        }
        let port = effective_port(&uri).ok_or_else(|| invalid(form))?;
        Ok(Self { scheme: scheme.clone(), host: authority.host().to_ascii_lowercase().into(), port })
    }

    fn is_of(&self, uri: &Uri) -> bool {
        uri.scheme() == Some(&self.scheme)
            && uri.host().is_some_and(|host| host.eq_ignore_ascii_case(&self.host))
            && effective_port(uri) == Some(self.port)
            && !has_user(uri)
            && is_host_kept_apart(uri)
    }
}

fn is_encrypted(scheme: &Scheme) -> bool {
    *scheme == Scheme::HTTPS || scheme.as_str().eq_ignore_ascii_case("wss")
}

fn effective_port(uri: &Uri) -> Option<u16> {
    let (scheme, authority) = (uri.scheme()?, uri.authority()?);
    let host_and_port = authority.as_str().rsplit('@').next()?;
    // Not `Authority::port`: one that is no number would be none, and thus the default one.
    match host_and_port.strip_prefix(authority.host())?.strip_prefix(':') {
        Some(port) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => port.parse().ok(),
        Some(_) => None,
        None if is_encrypted(scheme) => Some(443),
        None if is_plain(scheme) => Some(80),
        None => None,
    }
}

fn is_plain(scheme: &Scheme) -> bool {
    *scheme == Scheme::HTTP || scheme.as_str().eq_ignore_ascii_case("ws")
}

fn has_user(uri: &Uri) -> bool {
    uri.authority().is_some_and(|authority| authority.as_str().contains('@'))
}

/// Whether the host is the same to a client that writes the URI out and reads it again, as `reqwest` does.
///
/// `Uri` writes a path that does not begin with a slash right behind the host: `*`, and before `http` 1.5 any other one
/// too, such as `@example.com`. A server that forwards HTTP/2 takes its path from the caller.
fn is_host_kept_apart(uri: &Uri) -> bool {
    uri.path().starts_with('/')
}

fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(policy: &impl OriginPolicy, uri: &str) -> bool {
        uri.parse().is_ok_and(|uri: Uri| policy.admits(&uri))
    }

    #[test]
    fn the_default_admits_fals_api_hosts_over_tls() {
        for uri in [
            "https://fal.run/fal-ai/flux",
            "https://queue.fal.run/a/b?c=d",
            "wss://ws.fal.run/a/b",
            "wss://fal.run/a/b/realtime",
            "https://rest.fal.ai/tokens/",
            "https://rest.alpha.fal.ai/tokens/",
            "https://api.fal.ai/v1/models",
            "https://fal.run:443/a",
            "https://FAL.Run/a",
            "HTTPS://fal.run/a",
            "WSS://QUEUE.FAL.RUN:443/a",
        ] {
            assert!(admits(&FalOrigins::new(), uri), "{uri}");
        }
    }

    #[test]
    fn the_default_admits_nothing_else() {
        for uri in [
            "http://fal.run/a",
            "http://fal.run:443/a",
            "ws://fal.run/a",
            "ftp://fal.run/a",
            "https://fal.run:8443/a",
            "https://fal.run:80/a",
            "https://fal.run:/a",
            "https://fal.run:0443/a",
            "https://fal.run./a",
            "https://fal.run.example.com/a",
            "https://notfal.run/a",
            "https://evil-fal.run/a",
            "https://example.com/fal.run",
            "https://fal.run@example.com/a",
            "https://example.com@fal.run/a",
            "https://user:password@fal.run/a",
            "https://user:443@fal.run:443/a",
            "https://gateway.fal.run/a",
            "https://wma.fal.run/ice",
            "https://fal.ai/a",
            "https://auth.fal.ai/oauth/token",
            "https://v3.fal.media/files/a",
            "https://falrun.com/a",
            "https://queue.falrun.com/a",
            "https://mcp.fal.ai/mcp",
            "https://[::1]/a",
            "https://[::1]:443/a",
            "https://127.0.0.1/a",
            "http://localhost/a",
            "https://fal.run%2eexample.com/a",
            "/fal-ai/flux",
            "//fal.run/a",
            "*",
            "fal.run:443",
        ] {
            assert!(!admits(&FalOrigins::new(), uri), "{uri}");
        }
    }

    #[test]
    fn a_path_that_would_lengthen_the_host_is_not_admitted() {
        let origins = FalOrigins::new().loopback_http().and("https://gateway.example.com").unwrap();
        let bound = BoundOrigin::new("https://fal.run").unwrap();
        for authority in ["fal.run", "gateway.example.com"] {
            for path in ["*", "*.example.com/", "@example.com", ":1@example.com/", ".example.com", "-example.com"] {
                // `http` takes no more than `*` since 1.5.
                let uri = Uri::builder().scheme("https").authority(authority).path_and_query(path).build();
                assert!(uri.is_ok() || path != "*");
                assert!(!uri.is_ok_and(|uri| origins.admits(&uri) || bound.admits(&uri)), "{authority}, {path}");
            }
            let query = Uri::builder().scheme("https").authority(authority).path_and_query("?a=b").build().unwrap();
            assert!(origins.admits(&query) && query.to_string().ends_with("/?a=b"));
        }
    }

    #[test]
    fn subdomains_are_bounded_by_a_dot_and_made_of_labels() {
        let origins = FalOrigins::new().subdomains();
        for uri in ["https://gateway.fal.run/", "wss://a.b-c.FAL.run:443/", "https://fal.run/"] {
            assert!(admits(&origins, uri), "{uri}");
        }
        for uri in [
            "https://notfal.run/",
            "https://.fal.run/",
            "https://a..fal.run/",
            "https://a@b.fal.run/",
            "https://a_b.fal.run/",
            "https://gateway.fal.run:8443/",
            "https://gateway.fal.run./",
            "http://gateway.fal.run/",
            "https://gateway.fal.ai/",
            "https://fal.run.example.com/",
        ] {
            assert!(!admits(&origins, uri), "{uri}");
        }
    }

    #[test]
    fn backups_are_two_hosts() {
        let origins = FalOrigins::new().backups();
        assert!(admits(&origins, "https://falrun.com/a") && admits(&origins, "https://queue.falrun.com:443/a"));
        for uri in ["http://falrun.com/a", "https://ws.falrun.com/a", "https://falrun.com.example.com/"] {
            assert!(!admits(&origins, uri), "{uri}");
        }
    }

    #[test]
    fn loopback_http_is_this_machine_on_any_port() {
        let origins = FalOrigins::new().loopback_http();
        for uri in
            ["http://127.0.0.1:8080/", "http://127.9.9.9/", "http://[::1]:1/", "http://LOCALHOST:1/", "ws://127.0.0.1/"]
        {
            assert!(admits(&origins, uri), "{uri}");
        }
        for uri in [
            "http://127.0.0.1.example.com/",
            "http://user@127.0.0.1/",
            "http://[::2]/",
            "http://10.0.0.1/",
            "http://localhost.example.com/",
            "http://fal.run/",
            "ftp://127.0.0.1/",
        ] {
            assert!(!admits(&origins, uri), "{uri}");
        }
    }

    #[test]
    fn another_origin_is_scheme_host_and_effective_port() {
        let origins = FalOrigins::new().and("https://Gateway.example.com").unwrap();
        let origins = origins.and("https://other.example.com:8443").unwrap().and("ws://127.0.0.1:9").unwrap();
        for uri in [
            "https://gateway.EXAMPLE.com/a",
            "https://gateway.example.com:443/a",
            "https://other.example.com:8443/a",
            "ws://127.0.0.1:9/a",
            "https://fal.run/a",
        ] {
            assert!(admits(&origins, uri), "{uri}");
        }
        for uri in [
            "http://gateway.example.com/a",
            "http://gateway.example.com:443/a",
            "wss://gateway.example.com/a",
            "https://gateway.example.com:8443/a",
            "https://other.example.com/a",
            "https://user@gateway.example.com/a",
            "https://gateway.example.com./a",
            "https://gateway.example.com:/a",
            "https://gateway.example.com:+443/a",
            "https://gateway.example.com:65979/a", // 443, and 65,536 more
            "https://gateway.example.com:99999/a",
            "ws://127.0.0.1/a",
        ] {
            assert!(!admits(&origins, uri), "{uri}");
        }
    }

    #[test]
    fn an_origin_is_refused_when_it_is_none_or_would_leak() {
        for (text, hint) in [
            ("gateway.example.com", "is not written as one"),
            ("/a", "is not written as one"),
            ("https://gateway.example.com/a", "is not written as one"),
            ("https://gateway.example.com/?a", "is not written as one"),
            ("https://user@gateway.example.com", "is not written as one"),
            ("ftp://127.0.0.1", "is not written as one"),
            ("https://", "is not written as one"),
            ("https://gateway.example.com:84430", "is not written as one"),
            ("https://gateway.example.com:", "is not written as one"),
            ("http://gateway.example.com", "in clear"),
            ("ws://gateway.example.com", "in clear"),
        ] {
            let error = FalOrigins::new().and(text).unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
        }
    }

    #[test]
    fn a_bound_origin_admits_itself_and_what_names_none() {
        let bound = BoundOrigin::new("https://fal.run").unwrap();
        for uri in ["/a", "/a?b", "*", "https://fal.run/a", "https://FAL.run:443/a"] {
            assert!(admits(&bound, uri), "{uri}");
        }
        for uri in ["https://queue.fal.run/a", "http://fal.run/a", "fal.run:443", "https://example.com/"] {
            assert!(!admits(&bound, uri), "{uri}");
        }
    }

    #[test]
    fn every_request_and_closures_say_what_they_say() {
        assert!(admits(&EveryRequest, "/a") && admits(&EveryRequest, "http://example.com/"));
        let closure = |uri: &Uri| uri.path() == "/yes";
        assert!(admits(&closure, "/yes") && !admits(&closure, "/no"));
    }
}
