//! Under which names the server may be called. A page of any site can send requests to a server on its visitor's machine
//! once its own domain leads there (DNS rebinding), and only the `host` of such a request tells.

use std::{net::IpAddr, sync::Arc};

use http::{HeaderValue, StatusCode, header::HOST, request::Parts, uri::Authority};

use crate::{answer::Answer, pattern::InvalidPattern};

/// The names of the server.
#[derive(Clone, Debug, Default)]
pub(super) struct Hosts {
    /// Besides those of this machine. `None` if nothing was said.
    names: Option<Names>,
}

#[derive(Clone, Debug)]
enum Names {
    Every,
    These(Arc<[String]>),
}

impl Hosts {
    pub(super) fn allow(&mut self, name: &str) -> Result<(), InvalidPattern> {
        if name == "*" {
            self.names = Some(Names::Every);
            return Ok(());
        }
        let authority = Authority::try_from(name).ok().filter(|authority| authority.as_str() == authority.host());
        // A `*` is a character of hosts to `Authority`, and no request has it.
        let authority = authority.filter(|_| !name.contains('*'));
        let name = authority.ok_or(INVALID)?.host().to_ascii_lowercase();
        self.names = Some(match &self.names {
            None => Names::These([name].into()),
            Some(Names::These(names)) => Names::These(names.iter().cloned().chain([name]).collect()),
            Some(Names::Every) => Names::Every,
        });
        Ok(())
    }

    /// Whether all that a request says about its host is one of these names. Nothing being said, a request that has no
    /// other sign of where it comes from has to name this machine.
    pub(super) fn check(&self, head: &Parts, anonymous: bool) -> Result<(), Answer> {
        let mut in_headers = head.headers.get_all(HOST).iter();
        let header = match (in_headers.next(), in_headers.next()) {
            (header, None) => header.map(read).transpose()?,
            (_, Some(_)) => return Err(MALFORMED),
        };
        let names = match &self.names {
            Some(Names::Every) => return Ok(()),
            Some(Names::These(names)) => &**names,
            None if anonymous => &[],
            None => return Ok(()),
        };
        let is_ours = |host: &str| is_local(host) || names.iter().any(|name| host.eq_ignore_ascii_case(name));
        let named = [head.uri.authority(), header.as_ref()];
        let mut hosts = named.iter().flatten().map(|authority| authority.host()).peekable();
        if hosts.peek().is_some() && hosts.all(is_ours) { Ok(()) } else { Err(FOREIGN) }
    }
}

fn read(header: &HeaderValue) -> Result<Authority, Answer> {
    let authority = Authority::try_from(header.as_bytes()).map_err(|_| MALFORMED)?;
    // `Authority` takes a user name, and anything for a port.
    let port = authority.as_str().strip_prefix(authority.host()).ok_or(MALFORMED)?;
    if port.is_empty() || authority.port_u16().is_some() { Ok(authority) } else { Err(MALFORMED) }
}

fn is_local(host: &str) -> bool {
    // An address ends with a digit or a bracket; no other name is read as one.
    if !host.ends_with(|last: char| last.is_ascii_digit() || last == ']') {
        return host.eq_ignore_ascii_case("localhost");
    }
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    address.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
}

const INVALID: InvalidPattern =
    InvalidPattern::of("host", "cannot be one: write a name without a scheme and a port, or `*`");

const MALFORMED: Answer =
    Answer::new(StatusCode::BAD_REQUEST, "host", "The request does not have one `host` header that can be read.");

const FOREIGN: Answer =
    Answer::new(StatusCode::BAD_REQUEST, "host", "The request is for a host that is none of this server's names.")
        .option("allow_host");

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    #[test]
    fn a_name_is_a_host_without_a_scheme_and_a_port() {
        for name in ["https://a.example", "a.example:80", "", "a b", "user@a.example", "*.a.example"] {
            assert!(Hosts::default().allow(name).is_err(), "{name}");
        }
        assert!(Hosts::default().allow("[2001:db8::1]").is_ok());
    }

    #[test]
    fn the_uri_of_a_request_counts_as_much_as_its_header() {
        let check = |uri: &str, host: Option<&str>| {
            let mut request = Request::get(uri).body(()).unwrap();
            request.headers_mut().extend(host.map(|host| (HOST, host.parse().unwrap())));
            Hosts::default().check(&request.into_parts().0, true).is_ok()
        };
        assert!(check("http://localhost/", None) && check("/", Some("localhost")));
        assert!(!check("http://app.example/", Some("localhost")) && !check("http://localhost/", Some("app.example")));
        assert!(!check("/", None));
    }
}
