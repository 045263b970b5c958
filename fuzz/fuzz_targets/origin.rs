//! What the default policy admits is one of fal's hosts over TLS, also as two other parsers read it.
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
    if !FalOrigins::new().admits(&uri) {
        return;
    }
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
