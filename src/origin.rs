//! Which origins may carry the credential.
//!
//! An [`OriginPolicy`] looks at the URI of an outgoing request: its scheme, host and port. It is asked for every request,
//! so a redirect that is followed by an outer layer is looked at again on each hop. The `Host` header admits nothing, as
//! in a server that forwards it is whatever the caller wrote; it can only [refuse](host_agrees).
//!
//! | policy | admits |
//! |---|---|
//! | [`FalOrigins`] (default) | `https` to fal's API hosts, on port 443; fewer hosts, or more, by name |
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
//!
//! # WebSockets
//! A service that speaks HTTP gets no credential for `wss`: hyper-tls, for one, takes `wss` for a scheme without TLS and
//! sends the request to port 80 in clear. [`authorize`](crate::FalAuthLayer::authorize) is for handshakes and admits
//! `wss` to the same hosts. A service that makes handshakes says so with [`FalOrigins::handshakes`].
//!
//! # Redirects
//! Under a layer that follows redirects, an answer from one admitted origin can send the request, with the credential, to
//! another admitted origin, and it chooses what is called there. `api.fal.ai`, which makes new keys, is one of fal's API
//! hosts. So admit the hosts that you call and no others: [`FalOrigins::only`].

use std::{fmt, net::IpAddr, sync::Arc};

use http::{
    HeaderMap, Uri,
    header::HOST,
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

    /// Whether a handshake to this URI, which is made without Tower, may carry the credential: asked by
    /// [`authorize`](crate::FalAuthLayer::authorize). Default: what [`admits`](Self::admits) says.
    fn admits_handshake(&self, uri: &Uri) -> bool {
        self.admits(uri)
    }

    /// Whether a request to an admitted URI may carry the credential with the `host` header that it has, if it has one.
    /// Default: if [`host_agrees`].
    ///
    /// A policy of your own may allow another one, such as where the URI has the address of a gateway and the header
    /// its name.
    fn admits_host(&self, uri: &Uri, headers: &HeaderMap) -> bool {
        host_agrees(uri, headers)
    }
}

impl<F: Fn(&Uri) -> bool> OriginPolicy for F {
    fn admits(&self, uri: &Uri) -> bool {
        self(uri)
    }
}

/// Whether the `host` header of a request, if there is one, names the host and port of the URI.
///
/// A client sends a header that is there as it is, so the server behind the URI serves another host than the one that
/// was admitted. The header does not agree if it names another host or port, is empty, has a user name or blanks in it,
/// or if there are two. Upper and lower case are the same, and the default port of the scheme may be stated or not. To a
/// URI without a host, such as `/a`, any single host agrees.
///
/// ```
/// use http::{HeaderMap, HeaderValue, Uri, header::HOST};
/// use tower_fal::origin::host_agrees;
///
/// let uri = Uri::from_static("https://fal.run/fal-ai/flux/dev");
/// let with_host = |host| HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]);
/// assert!(host_agrees(&uri, &HeaderMap::new()));
/// assert!(host_agrees(&uri, &with_host("FAL.run:443")));
/// assert!(!host_agrees(&uri, &with_host("tenant.example")));
/// ```
pub fn host_agrees(uri: &Uri, headers: &HeaderMap) -> bool {
    one_host(headers, |host| match uri.authority() {
        Some(authority) => names(host, authority.host(), effective_port(uri), uri.scheme().and_then(default_port)),
        None => !host.is_empty(),
    })
}

/// fal's own origins, or some of them, and those that you add. The default policy.
///
/// Without options: `https`, on port 443, to exactly `fal.run`, `queue.fal.run`, `ws.fal.run`, `rest.fal.ai`,
/// `rest.alpha.fal.ai` or `api.fal.ai`. Upper and lower case are the same. A URI with a user name, a dot at the end of
/// the host, another port or anything else that is unusual is not admitted.
///
/// ```
/// use tower_fal::origin::FalOrigins;
///
/// let all = FalOrigins::new();
/// let runs = FalOrigins::only(["fal.run", "queue.fal.run"])?;
/// let gateway = FalOrigins::only([])?.and("https://fal-gateway.example.com:8443")?;
/// # let _ = (all, runs, gateway);
/// # Ok::<(), tower_fal::origin::InvalidOrigin>(())
/// ```
#[doc(alias = "allow list")]
#[doc(alias = "allowlist")]
#[derive(Clone, Debug)]
#[must_use]
pub struct FalOrigins {
    hosts: Hosts,
    subdomains: bool,
    backups: bool,
    loopback_http: bool,
    handshakes: bool,
    others: Option<Arc<[Origin]>>,
}

impl FalOrigins {
    /// fal's API hosts and nothing else.
    pub fn new() -> Self {
        Self::of(Hosts::ALL)
    }

    /// These of fal's API hosts and nothing else, such as `["fal.run", "queue.fal.run"]`. `[]` is none of them, for a
    /// policy that is made of other [origins](Self::and).
    ///
    /// # Errors
    /// When one of them is not an API host of fal's as [`FalOrigins`] lists them.
    pub fn only<'a>(hosts: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidOrigin> {
        hosts.into_iter().try_fold(Hosts::NONE, Hosts::with).map(Self::of)
    }

    fn of(hosts: Hosts) -> Self {
        Self { hosts, subdomains: false, backups: false, loopback_http: false, handshakes: false, others: None }
    }

    /// Admits every subdomain of `fal.run` too, such as `gateway.fal.run`.
    pub fn subdomains(mut self) -> Self {
        self.subdomains = true;
        self
    }

    /// Admits the backups of those hosts that are admitted: `falrun.com` for `fal.run`, and `queue.falrun.com` for
    /// `queue.fal.run`.
    ///
    /// Source: `fal_client` 1.0.3, which sends the whole request there when the primary cannot be reached.
    pub fn backups(mut self) -> Self {
        self.backups = true;
        self
    }

    /// Admits plain `http` to this machine too, on any port: `127.0.0.0/8`, `[::1]` and `localhost`. For tests. For
    /// [handshakes](Self::handshakes), `ws` as well.
    pub fn loopback_http(mut self) -> Self {
        self.loopback_http = true;
        self
    }

    /// Admits WebSocket handshakes, `wss` to the same hosts, also in a service. [`authorize`] admits them without this.
    ///
    /// For a service that makes handshakes, such as the one in `examples/websocket.rs`. Not for an HTTP client, which
    /// may send `wss` in clear: see the [module docs](self).
    ///
    /// [`authorize`]: crate::FalAuthLayer::authorize
    pub fn handshakes(mut self) -> Self {
        self.handshakes = true;
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

impl Default for FalOrigins {
    fn default() -> Self {
        Self::new()
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
            && ((scheme.as_str() == "https" && self.hosts.any(|host| host == authority.as_str()))
                || self.admits_written_otherwise(uri, scheme, authority, self.handshakes))
    }

    fn admits_handshake(&self, uri: &Uri) -> bool {
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return false;
        };
        is_host_kept_apart(uri) && self.admits_written_otherwise(uri, scheme, authority, true)
    }
}

impl FalOrigins {
    fn admits_written_otherwise(&self, uri: &Uri, scheme: &Scheme, authority: &Authority, handshakes: bool) -> bool {
        let is_one_of = |http: Scheme, ws| *scheme == http || (handshakes && scheme.as_str().eq_ignore_ascii_case(ws));
        if is_one_of(Scheme::HTTPS, "wss") && self.admits_fal_host(authority.as_str()) {
            return true;
        }
        // Off the path of requests to fal itself.
        (self.loopback_http && is_one_of(Scheme::HTTP, "ws") && !has_user(uri) && uri.host().is_some_and(is_loopback))
            || self.others.as_deref().is_some_and(|others| others.iter().any(|origin| origin.is_of(uri)))
    }

    fn admits_fal_host(&self, authority: &str) -> bool {
        // As it is written, but for the default port: whatever is written oddly (a user, a dot at the end, `:0443`)
        // equals none of the hosts.
        let host = authority.strip_suffix(":443").unwrap_or(authority);
        self.hosts.any(|known| host.eq_ignore_ascii_case(known))
            || (self.backups
                && BACKUP_HOSTS.iter().any(|(primary, backup)| {
                    host.eq_ignore_ascii_case(backup) && self.hosts.any(|known| known == *primary)
                }))
            || (self.subdomains && is_subdomain_of_fal_run(host))
    }
}

/// Some of fal's API hosts.
#[derive(Clone, Copy)]
struct Hosts([bool; API_HOSTS.len()]);

impl Hosts {
    const ALL: Self = Self([true; API_HOSTS.len()]);
    const NONE: Self = Self([false; API_HOSTS.len()]);

    fn with(mut self, host: &str) -> Result<Self, InvalidOrigin> {
        let place = API_HOSTS.iter().position(|known| known.eq_ignore_ascii_case(host));
        let place = place.ok_or(InvalidOrigin {
            problem: "is not one of fal's API hosts, such as `fal.run`: admit any other with `and(\"https://host\")`",
        })?;
        self.0[place] = true;
        Ok(self)
    }

    #[inline]
    fn any(&self, is: impl Fn(&str) -> bool) -> bool {
        API_HOSTS.iter().zip(&self.0).any(|(host, is_in)| *is_in && is(host))
    }
}

impl fmt::Debug for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = API_HOSTS.iter().zip(&self.0).filter_map(|(host, is_in)| is_in.then_some(host));
        f.debug_set().entries(hosts).finish()
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
/// still be of that origin, and so must the `host` header of any request that has one.
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

    fn admits_host(&self, _uri: &Uri, headers: &HeaderMap) -> bool {
        let Origin { scheme, host, port } = &self.origin;
        one_host(headers, |named| names(named, host, Some(*port), default_port(scheme)))
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
/// The error names the rule and never the text, as the text may hold a key or a password.
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

fn is_plain(scheme: &Scheme) -> bool {
    *scheme == Scheme::HTTP || scheme.as_str().eq_ignore_ascii_case("ws")
}

fn default_port(scheme: &Scheme) -> Option<u16> {
    if is_encrypted(scheme) {
        Some(443)
    } else if is_plain(scheme) {
        Some(80)
    } else {
        None
    }
}

fn effective_port(uri: &Uri) -> Option<u16> {
    let authority = uri.authority()?;
    let host_and_port = authority.as_str().rsplit('@').next()?;
    // Not `Authority::port`: one that is no number would be none, and thus the default one.
    match host_and_port.strip_prefix(authority.host())?.strip_prefix(':') {
        Some(port) => parse_port(port.as_bytes()),
        None => default_port(uri.scheme()?),
    }
}

fn parse_port(digits: &[u8]) -> Option<u16> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    is_number.then(|| str::from_utf8(digits).ok()?.parse().ok())?
}

/// Whether there is no `host` header, or one that is as it must be.
#[inline]
fn one_host(headers: &HeaderMap, is: impl FnOnce(&[u8]) -> bool) -> bool {
    // Nearly no request has one. To compare the few names is cheaper than to hash the one that is looked for.
    if !headers.keys().any(|name| name == HOST) {
        return true;
    }
    let mut values = headers.get_all(HOST).iter();
    match (values.next(), values.next()) {
        (None, _) => true,
        (Some(host), None) => is(host.as_bytes()),
        (Some(_), Some(_)) => false,
    }
}

/// Whether a `host` header names this host and port.
fn names(header: &[u8], host: &str, port: Option<u16>, default_port: Option<u16>) -> bool {
    let Some((name, rest)) = header.split_at_checked(host.len()) else { return false };
    let names_port = match rest {
        [] => port == default_port,
        [b':', digits @ ..] => port.is_some() && parse_port(digits) == port,
        _ => false,
    };
    !name.is_empty() && name.eq_ignore_ascii_case(host.as_bytes()) && names_port
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

/// Whether a host is this machine: `localhost`, or an address of it. What goes there needs no encryption.
pub(crate) fn is_loopback(host: &str) -> bool {
    // An address ends with a digit or a bracket; no other name is read as one.
    if !host.ends_with(|last: char| last.is_ascii_digit() || last == ']') {
        return host.eq_ignore_ascii_case("localhost");
    }
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    address.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(policy: &impl OriginPolicy, uri: &str) -> bool {
        uri.parse().is_ok_and(|uri: Uri| policy.admits(&uri))
    }

    fn admits_handshake(policy: &impl OriginPolicy, uri: &str) -> bool {
        uri.parse().is_ok_and(|uri: Uri| policy.admits_handshake(&uri))
    }

    fn with_hosts(hosts: &[&str]) -> HeaderMap {
        hosts.iter().map(|host| (HOST, host.parse().unwrap())).collect()
    }

    #[test]
    fn the_default_admits_fals_api_hosts_over_tls() {
        for uri in [
            "https://fal.run/fal-ai/flux",
            "https://queue.fal.run/a/b?c=d",
            "https://ws.fal.run/a/b",
            "https://rest.fal.ai/tokens/",
            "https://rest.alpha.fal.ai/tokens/",
            "https://api.fal.ai/v1/models",
            "https://fal.run:443/a",
            "https://FAL.Run/a",
            "HTTPS://fal.run/a",
            "HTTPS://QUEUE.FAL.RUN:443/a",
        ] {
            assert!(admits(&FalOrigins::new(), uri), "{uri}");
            assert!(admits_handshake(&FalOrigins::new(), uri), "{uri}");
        }
    }

    #[test]
    fn the_default_admits_nothing_else() {
        for uri in [
            "http://fal.run/a",
            "http://fal.run:443/a",
            "ws://fal.run/a",
            "ws://fal.run:443/a",
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
            for origins in [FalOrigins::new(), FalOrigins::new().handshakes()] {
                for uri in [uri, &uri.replacen("https:", "wss:", 1)] {
                    assert!(!admits(&origins, uri) && !admits_handshake(&origins, uri), "{uri}");
                }
            }
        }
    }

    #[test]
    fn wss_is_for_handshakes_alone() {
        for uri in ["wss://ws.fal.run/a/b", "wss://fal.run/a/b/realtime", "WSS://QUEUE.FAL.RUN:443/a"] {
            assert!(!admits(&FalOrigins::new(), uri), "{uri}");
            assert!(!admits(&FalOrigins::new().subdomains().backups().loopback_http(), uri), "{uri}");
            assert!(admits_handshake(&FalOrigins::new(), uri), "{uri}");
            assert!(admits(&FalOrigins::new().handshakes(), uri), "{uri}");
        }
        let loopback = FalOrigins::new().loopback_http();
        assert!(!admits(&loopback, "ws://127.0.0.1:8080/"));
        assert!(admits_handshake(&loopback, "ws://127.0.0.1:8080/"));
        assert!(admits(&loopback.handshakes(), "ws://127.0.0.1:8080/"));
        let closure = |uri: &Uri| uri.scheme_str() == Some("wss");
        assert!(admits(&closure, "wss://fal.run/") && admits_handshake(&closure, "wss://fal.run/"));
    }

    #[test]
    fn only_some_of_fals_hosts_can_be_admitted() {
        let queue = FalOrigins::only(["queue.FAL.run"]).unwrap();
        for uri in ["https://queue.fal.run/a", "https://QUEUE.fal.run:443/a"] {
            assert!(admits(&queue, uri), "{uri}");
        }
        assert!(admits_handshake(&queue, "wss://queue.fal.run/a"));
        for uri in
            ["https://fal.run/a", "https://api.fal.ai/v1/keys", "https://queue.falrun.com/a", "https://a.fal.run/"]
        {
            assert!(!admits(&queue, uri), "{uri}");
        }
        assert!(!admits_handshake(&queue, "wss://ws.fal.run/a"));
        let backups = queue.clone().backups();
        assert!(admits(&backups, "https://queue.falrun.com/a") && !admits(&backups, "https://falrun.com/a"));

        let all = FalOrigins::only(API_HOSTS).unwrap();
        for host in API_HOSTS {
            assert!(admits(&all, &format!("https://{host}/")), "{host}");
            assert!(!admits(&FalOrigins::only([]).unwrap(), &format!("https://{host}/")), "{host}");
        }
        assert!(format!("{queue:?}").contains(r#"{"queue.fal.run"}"#), "{queue:?}");
    }

    #[test]
    fn only_takes_no_host_but_fals() {
        for host in ["", "example.com", "https://fal.run", "fal.run:443", "fal.run.", "falrun.com", "gateway.fal.run"] {
            let error = FalOrigins::only(["fal.run", host]).unwrap_err().to_string();
            assert!(error.contains("is not one of fal's API hosts"), "{error}");
        }
    }

    #[test]
    fn a_host_header_must_name_the_uris_host_and_port() {
        #[rustfmt::skip]
        let table: [(&str, &[&str], bool); 36] = [
            ("https://fal.run/a", &[], true),
            ("https://fal.run/a", &["fal.run"], true),
            ("https://fal.run/a", &["FAL.Run"], true),
            ("https://fal.run/a", &["fal.run:443"], true),
            ("https://FAL.run:443/a", &["fal.RUN"], true),
            ("http://127.0.0.1/a", &["127.0.0.1:80"], true),
            ("http://127.0.0.1:8080/a", &["127.0.0.1:8080"], true),
            ("http://[::1]:8080/a", &["[::1]:8080"], true),
            ("wss://ws.fal.run/a", &["ws.fal.run:443"], true),
            ("https://user@fal.run/a", &["fal.run"], true),
            ("/a", &[], true),
            ("/a", &["tenant.example"], true),

            ("https://fal.run/a", &["tenant.example"], false),
            ("https://fal.run/a", &["queue.fal.run"], false),
            ("https://queue.fal.run/a", &["fal.run"], false),
            ("https://fal.run/a", &[""], false),
            ("https://fal.run/a", &[" fal.run"], false),
            ("https://fal.run/a", &["fal.run "], false),
            ("https://fal.run/a", &["fal.run."], false),
            ("https://fal.run/a", &["fal.run:"], false),
            ("https://fal.run/a", &["fal.run:80"], false),
            ("https://fal.run/a", &["fal.run:+443"], false),
            ("https://fal.run/a", &["fal.run:65979"], false), // 443, and 65,536 more
            ("https://fal.run/a", &["fal.run.example"], false),
            ("https://fal.run/a", &["fal.run@tenant.example"], false),
            ("https://fal.run/a", &["tenant.example@fal.run"], false),
            ("https://fal.run/a", &["fal.run, fal.run"], false),
            ("https://fal.run/a", &["fal.run/a"], false),
            ("https://fal.run/a", &["fal.run", "fal.run"], false),
            ("https://fal.run/a", &["fal.run", "tenant.example"], false),
            ("https://fal.run/a", &["tenant.example", "fal.run"], false),
            ("http://127.0.0.1:8080/a", &["127.0.0.1"], false),
            ("http://127.0.0.1:8080/a", &["127.0.0.1:8081"], false),
            ("http://[::1]:8080/a", &["::1:8080"], false),
            ("/a", &[""], false),
            ("/a", &["fal.run", "fal.run"], false),
        ];
        for (uri, hosts, agrees) in table {
            let headers = with_hosts(hosts);
            assert_eq!(host_agrees(&uri.parse().unwrap(), &headers), agrees, "{uri}, {hosts:?}");
        }
        // Bytes that are no text.
        let headers = HeaderMap::from_iter([(HOST, http::HeaderValue::from_bytes(b"fal.run\xFF").unwrap())]);
        assert!(!host_agrees(&Uri::from_static("https://fal.run/"), &headers));
    }

    #[test]
    fn a_bound_origin_knows_its_host_if_the_uri_names_none() {
        let bound = BoundOrigin::new("https://fal.run").unwrap();
        let gateway = BoundOrigin::new("https://gateway.example.com:8443").unwrap();
        for (policy, uri, hosts, agrees) in [
            (&bound, "/a", &[][..], true),
            (&bound, "/a", &["fal.run"], true),
            (&bound, "/a", &["FAL.RUN:443"], true),
            (&bound, "https://fal.run/a", &["fal.run"], true),
            (&gateway, "/a", &["gateway.example.com:8443"], true),
            (&bound, "/a", &["tenant.example"], false),
            (&bound, "/a", &["queue.fal.run"], false),
            (&bound, "/a", &[""], false),
            (&bound, "/a", &["fal.run", "fal.run"], false),
            (&bound, "https://fal.run/a", &["tenant.example"], false),
            (&gateway, "/a", &["gateway.example.com"], false),
        ] {
            let uri: Uri = uri.parse().unwrap();
            assert!(policy.admits(&uri));
            assert_eq!(policy.admits_host(&uri, &with_hosts(hosts)), agrees, "{uri}, {hosts:?}");
        }
    }

    #[test]
    fn a_policy_of_ones_own_may_allow_another_host() {
        struct Gateway;
        impl OriginPolicy for Gateway {
            fn admits(&self, uri: &Uri) -> bool {
                uri.host() == Some("10.0.0.1")
            }

            fn admits_host(&self, _: &Uri, headers: &HeaderMap) -> bool {
                headers.get(HOST).is_some_and(|host| host == "gateway.internal")
            }
        }
        let uri = Uri::from_static("https://10.0.0.1/a");
        assert!(Gateway.admits(&uri) && Gateway.admits_host(&uri, &with_hosts(&["gateway.internal"])));
        assert!(!Gateway.admits_host(&uri, &with_hosts(&["10.0.0.1"])));
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
        for uri in ["https://gateway.fal.run/", "https://a.b-c.FAL.run:443/", "https://fal.run/"] {
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
        for uri in [
            "http://127.0.0.1:8080/",
            "http://127.9.9.9/",
            "http://[::1]:1/",
            "http://LOCALHOST:1/",
            "http://[::ffff:127.0.0.1]/",
        ] {
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
