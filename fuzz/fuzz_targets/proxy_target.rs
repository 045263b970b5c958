//! What the proxy's judge of targets admits has one reading: an allowed host over https on port 443, also as browsers read
//! it, with the path and the query that came, and nothing in the query that sends results or tokens elsewhere.
//!
//! The input is the value of `x-fal-target-url`. Nothing here asks the judge how it reads: URLs are read by the crate `url`,
//! and the names in a query by the few lines below.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tower_fal::__fuzz::Targets;
use url::Url;

/// The default, and the widest that the options allow: uploads and tokens of the REST API, all subdomains of `fal.run`,
/// and webhooks to one host.
static DEFAULT: LazyLock<Targets> = LazyLock::new(Targets::new);
static WIDE: LazyLock<Targets> = LazyLock::new(Targets::wide);

fuzz_target!(|target: &[u8]| {
    let of_default = check(&DEFAULT, target, None, |url| match url.host_str() {
        Some("fal.run" | "queue.fal.run") => true,
        Some("rest.fal.ai" | "rest.alpha.fal.ai") => {
            let calls = ["initiate", "initiate-multipart", "complete-multipart"];
            url.query() == Some("storage_type=fal-cdn-v3")
                && url.path().strip_prefix("/storage/upload/").is_some_and(|call| calls.contains(&call))
        }
        _ => false,
    });
    let of_wide = check(&WIDE, target, Some("app.example"), |url| match url.host_str() {
        Some("rest.fal.ai" | "rest.alpha.fal.ai") => {
            url.path().to_ascii_lowercase().starts_with("/storage/upload/")
                || ["/tokens/", "/tokens/realtime"].contains(&url.path()) && url.query().is_none()
        }
        Some(host) => host == "fal.run" || host.ends_with(".fal.run"),
        None => false,
    });
    // A wider list admits what a narrower one does, and sends the same.
    if let Some(sent) = of_default {
        assert_eq!(of_wide.as_ref(), Some(&sent));
    }
});

fn check(targets: &Targets, target: &[u8], webhooks_to: Option<&str>, allows: impl Fn(&Url) -> bool) -> Option<String> {
    let sent = targets.judge(target)?;
    let text = std::str::from_utf8(target).expect("ASCII");
    for text in [text, &sent] {
        let url = Url::parse(text).expect("a URL");
        assert_eq!(url.scheme(), "https", "{text:?}");
        assert_eq!(url.port_or_known_default(), Some(443), "{text:?}");
        assert!(url.username().is_empty() && url.password().is_none() && url.fragment().is_none(), "{text:?}");
        assert!(allows(&url), "{text:?}");

        // The same path, and nothing in it that a reader would take away or decode into structure.
        let (path, query) = path_and_query(text);
        assert_eq!(url.path(), path, "{text:?}");
        assert!(!path[1..].is_empty() && !path.contains("//"), "{text:?}");
        let lower = path.to_ascii_lowercase();
        assert!(!["%2f", "%5c", "%2e", "%00", "%25", ";", "\\"].iter().any(|part| lower.contains(part)), "{text:?}");
        assert!(String::from_utf8(decode(path)).is_ok(), "{text:?}");
        assert_eq!(
            url.query().map(|query| query.replace("%27", "'")),
            query.map(|query| query.replace("%27", "'")),
            "{text:?}"
        );

        // Some readers begin a pair at a semicolon too.
        for separators in [&['&'][..], &['&', ';']] {
            for pair in query.unwrap_or_default().split(separators) {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                let name = String::from_utf8_lossy(&decode(name)).to_lowercase();
                let name = name.split('[').next().expect("a first part").trim_matches(|c| c <= ' ' || c == '\u{7f}');
                assert_ne!(name, "fal_jwt_token", "{text:?}");
                if name == "fal_webhook" {
                    let value = String::from_utf8(decode(value)).expect("UTF-8");
                    let webhook = Url::parse(&value).expect("a URL");
                    assert_eq!(webhook.host_str(), webhooks_to, "{text:?}");
                    assert_eq!((webhook.scheme(), webhook.port_or_known_default()), ("https", Some(443)), "{text:?}");
                    assert!(webhook.username().is_empty() && webhook.password().is_none(), "{text:?}");
                }
            }
        }
    }
    // What is sent differs from what came in the host alone.
    assert_eq!(path_and_query(&sent), path_and_query(text));
    Some(sent)
}

fn path_and_query(url: &str) -> (&str, Option<&str>) {
    let behind = &url["https://".len()..];
    let behind = &behind[behind.find('/').expect("a path")..];
    behind.split_once('?').map_or((behind, None), |(path, query)| (path, Some(query)))
}

/// What the escapes stand for, and a blank for a plus, as in a form.
fn decode(text: &str) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let escaped = behind.get(..2).and_then(|two| u8::from_str_radix(str::from_utf8(two).ok()?, 16).ok());
        match (first, escaped) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                rest = &behind[2..];
                continue;
            }
            (b'+', _) => decoded.push(b' '),
            _ => decoded.push(*first),
        }
        rest = behind;
    }
    decoded
}
