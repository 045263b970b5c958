//! What the default policy admits is one of fal's hosts over TLS, also as two other parsers read it. A policy of some of
//! the hosts admits a part of that, and a handshake the same hosts.
//!
//! The input is a URI. Three lines are its scheme, its authority and its path, which are put together.

#![no_main]

use http::Uri;
use libfuzzer_sys::fuzz_target;
use tower_fal::origin::{FalOrigins, OriginPolicy as _};
use url::Url;

const HOSTS: [&str; 6] = ["fal.run", "queue.fal.run", "ws.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "api.fal.ai"];

fuzz_target!(|text: &[u8]| {
    let lines: Vec<_> = text.split(|&byte| byte == b'\n').collect();
    let uri = match *lines {
        [scheme, authority, path] => {
            Uri::builder().scheme(scheme).authority(authority).path_and_query(path).build().ok()
        }
        _ => Uri::try_from(text).ok(),
    };
    let Some(uri) = uri else { return };
    let (in_a_service, in_a_handshake) = (FalOrigins::new().admits(&uri), FalOrigins::new().admits_handshake(&uri));
    let some = FalOrigins::only(HOSTS[..2].iter().copied()).expect("hosts of fal's");
    if !in_a_handshake {
        assert!(!in_a_service && !some.admits(&uri) && !some.admits_handshake(&uri), "{uri}");
        return;
    }
    assert_eq!(in_a_service, uri.scheme_str().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")), "{uri}");
    assert_eq!(FalOrigins::new().handshakes().admits(&uri), in_a_handshake, "{uri}");
    let is_of_some = uri.host().is_some_and(|host| HOSTS[..2].iter().any(|known| known.eq_ignore_ascii_case(host)));
    assert_eq!(some.admits_handshake(&uri), is_of_some, "{uri}");
    assert_eq!(some.admits(&uri), is_of_some && in_a_service, "{uri}");
    let text = uri.to_string();

    // By hand, strictly: the scheme, the authority up to what ends it, and nothing in it but a host and `:443`.
    let (scheme, rest) = text.split_once("://").expect("an absolute URI");
    assert!(scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("wss"), "{text:?}");
    let authority = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default().to_ascii_lowercase();
    let host = authority.split_once(':').map_or(&*authority, |(host, port)| {
        assert_eq!(port, "443", "{text:?}");
        host
    });
    assert!(HOSTS.contains(&host), "{text:?}");

    // As browsers do.
    let url = Url::parse(&text).expect("a URL");
    assert!(matches!(url.scheme(), "https" | "wss"), "{text:?}");
    assert!(url.host_str().is_some_and(|host| HOSTS.contains(&host)), "{text:?}");
    assert_eq!(url.port_or_known_default(), Some(443), "{text:?}");
    assert!(url.username().is_empty() && url.password().is_none(), "{text:?}");
});
