//! Under which names the server may be called. A page of any site can send requests to a server on its visitor's machine
//! once its own domain leads there (DNS rebinding), and only the `host` of such a request tells.

use std::{net::Ipv6Addr, sync::Arc};

use http::{StatusCode, header::HOST, request::Parts};

use crate::{answer::Answer, origin::is_loopback, pattern::InvalidPattern};

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
        let name = read(name).filter(|host| *host == name).ok_or(INVALID)?.to_ascii_lowercase();
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
            (Some(header), None) => Some(header.to_str().ok().and_then(read).ok_or(MALFORMED)?),
            (None, _) => None,
            (Some(_), Some(_)) => return Err(MALFORMED),
        };
        let names = match &self.names {
            Some(Names::Every) => return Ok(()),
            Some(Names::These(names)) => &**names,
            None if anonymous => &[],
            None => return Ok(()),
        };
        let is_ours = |host: &str| is_loopback(host) || names.iter().any(|name| host.eq_ignore_ascii_case(name));
        let in_uri = head.uri.authority().map(|authority| authority.host());
        let mut hosts = in_uri.into_iter().chain(header).peekable();
        if hosts.peek().is_some() && hosts.all(is_ours) { Ok(()) } else { Err(FOREIGN) }
    }
}

/// The host of a `host` header, with or without a port behind it: a name, or an address (RFC 9110, 7.2).
fn read(header: &str) -> Option<&str> {
    let end = if header.starts_with('[') { header.find(']')? + 1 } else { header.find(':').unwrap_or(header.len()) };
    let (host, port) = header.split_at(end);
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)),
    };
    let is_port = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit()) && digits.parse::<u16>().is_ok();
    (is_host && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))).then_some(host)
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
        for name in [
            "https://a.example",
            "a.example:80",
            "a.example:",
            "",
            "a b",
            "user@a.example",
            "*.a.example",
            "[a.example]",
        ] {
            assert!(Hosts::default().allow(name).is_err(), "{name}");
        }
        assert!(Hosts::default().allow("[2001:db8::1]").is_ok());
    }

    #[test]
    fn a_header_is_a_host_and_at_most_a_port() {
        for (header, host) in [
            ("a.example", "a.example"),
            ("A.example:8080", "A.example"),
            ("127.0.0.1:65535", "127.0.0.1"),
            ("[::1]", "[::1]"),
            ("[::1]:80", "[::1]"),
        ] {
            assert_eq!(read(header), Some(host), "{header}");
        }
        for header in [
            "", ":80", "a:", "a:+1", "a:65536", "a:80:80", "a,b", "a b", "user@a", "a/b", "a%2eb", "::1", "[::1", "[]",
            "[a]", "[::1]a", "[::1]]",
        ] {
            assert_eq!(read(header), None, "{header}");
        }
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
