//! What the proxy's judge of targets admits has one reading: an allowed host over https on port 443, also as browsers read
//! it, with the path and the query that came, and nothing in the query that sends results or tokens elsewhere.
//!
//! The input is the value of `x-fal-target-url`.

#![no_main]

use std::{collections::BTreeSet, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tower_fal::__fuzz::Targets;
use url::Url;

/// The default, and the widest that the options allow: uploads and tokens of the REST API, all subdomains of `fal.run`,
/// and webhooks to one host.
static DEFAULT: LazyLock<Targets> = LazyLock::new(Targets::new);
static WIDE: LazyLock<Targets> = LazyLock::new(Targets::wide);

fuzz_target!(|target: &[u8]| {
    let of_default = check(&DEFAULT, target, |host| {
        ["fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai"].contains(&host)
    });
    let of_wide = check(&WIDE, target, |host| {
        host == "fal.run" || host.ends_with(".fal.run") || ["rest.fal.ai", "rest.alpha.fal.ai"].contains(&host)
    });
    // A wider list admits what a narrower one does, and sends the same.
    if let Some(sent) = of_default {
        assert_eq!(of_wide.as_ref(), Some(&sent));
    }
});

fn check(targets: &Targets, target: &[u8], allows: impl Fn(&str) -> bool) -> Option<String> {
    let sent = targets.judge(target)?;
    let text = std::str::from_utf8(target).expect("ASCII");
    for text in [text, &sent] {
        let url = Url::parse(text).expect("a URL");
        assert_eq!(url.scheme(), "https", "{text:?}");
        assert_eq!(url.port_or_known_default(), Some(443), "{text:?}");
        assert!(url.username().is_empty() && url.password().is_none() && url.fragment().is_none(), "{text:?}");
        let host = url.host_str().expect("a host");
        assert!(allows(host), "{text:?}");

        // The same path, and nothing in it that a reader would take away or decode into structure.
        let from = "https://".len() + text["https://".len()..].find('/').expect("a path");
        let (path, query) =
            text[from..].split_once('?').map_or((&text[from..], None), |(path, query)| (path, Some(query)));
        assert_eq!(url.path(), path, "{text:?}");
        assert!(!path[1..].is_empty() && !path.contains("//"), "{text:?}");
        let lower = path.to_ascii_lowercase();
        assert!(!["%2f", "%5c", "%2e", "%00", ";", "\\"].iter().any(|part| lower.contains(part)), "{text:?}");
        assert_eq!(
            url.query().map(|query| query.replace("%27", "'")),
            query.map(|query| query.replace("%27", "'")),
            "{text:?}"
        );

        // The account stays closed, and of the tokens two calls are open.
        if host.ends_with("fal.ai") {
            let open = lower.starts_with("/storage/upload/") || ["/tokens/", "/tokens/realtime"].contains(&path);
            assert!(open, "{text:?}");
        }

        let names: BTreeSet<_> = url.query_pairs().map(|(name, _)| name.to_ascii_lowercase()).collect();
        assert!(!names.contains("fal_jwt_token"), "{text:?}");
        for (name, value) in url.query_pairs() {
            if name.eq_ignore_ascii_case("fal_webhook") {
                let webhook = Url::parse(&value).expect("a URL");
                assert_eq!(webhook.host_str(), Some("app.example"), "{text:?}");
                assert_eq!((webhook.scheme(), webhook.port_or_known_default()), ("https", Some(443)), "{text:?}");
            }
        }
    }
    // What is sent differs from what came in the host alone.
    let behind_host =
        |text: &str| text["https://".len()..].find('/').map(|at| text["https://".len() + at..].to_owned());
    assert_eq!(behind_host(&sent), behind_host(text));
    Some(sent)
}
