//! Which headers go to fal, and which come back.

use std::sync::Arc;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{ACCEPT, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, USER_AGENT},
};

use crate::pattern::InvalidPattern;

/// The name of the proxy, which each request through it carries.
///
/// Source: `@fal-ai/server-proxy` 1.2.1 (`index.ts`), which sends `@fal-ai/server-proxy/express` and the like.
const CLIENT_PROXY: HeaderName = HeaderName::from_static("x-fal-client-proxy");

/// Asks that no other model takes the place of one that fails.
///
/// Source: fal's documentation, "Platform Headers".
static DISABLE_FALLBACK: HeaderName = HeaderName::from_static("x-app-fal-disable-fallback");

/// Who sends our requests.
const OURS: HeaderValue = HeaderValue::from_static(concat!("tower-fal/", env!("CARGO_PKG_VERSION")));

/// Which headers of a client go to fal.
#[derive(Clone, Debug, Default)]
pub(super) enum Forwarded {
    #[default]
    OfFal,
    These(Arc<[HeaderName]>),
}

impl Forwarded {
    /// These and no others.
    pub(super) fn these(names: impl IntoIterator<Item = HeaderName>) -> Result<Self, InvalidPattern> {
        let names: Arc<[_]> = names.into_iter().collect();
        if names.iter().any(|name| is_never_sent(name.as_str()) || is_hop_by_hop(name.as_str())) {
            return Err(InvalidPattern::of(
                "header",
                "never goes to fal: it is a credential, the host, one of the connection, or one that is ours",
            ));
        }
        Ok(Self::These(names))
    }

    fn includes(&self, name: &HeaderName) -> bool {
        // They belong to the body, which goes as it is.
        if *name == CONTENT_TYPE || *name == CONTENT_ENCODING {
            return true;
        }
        match self {
            Self::OfFal => {
                let of_fal = name.as_str().starts_with("x-fal-") && !is_never_sent(name.as_str());
                of_fal || *name == ACCEPT || *name == DISABLE_FALLBACK
            }
            Self::These(names) => names.contains(name),
        }
    }

    /// Makes the headers of our own request of a client's.
    ///
    /// The map is emptied, and only what goes to fal is put into it again. It stays the same one: hyper hands a map on from
    /// message to message, and a new one for each request would be allocated anew.
    pub(super) fn to_fal(&self, headers: &mut HeaderMap) {
        let connection = named_by_connection(headers);
        let mut is_included = false;
        let mut included = Vec::with_capacity(8);
        // A name that is left out is that of the value before.
        included.extend(headers.drain().filter(|(name, _)| {
            if let Some(name) = name {
                is_included = self.includes(name) && !connection.contains(name);
            }
            is_included
        }));
        headers.extend(included);
        mark(headers);
    }
}

// What follows looks at the text of names: a pattern of texts is compared by their length first, and a list of names one by
// one.

/// Whether a header is for one connection only: RFC 9110, 7.6.1.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade"
    )
}

/// Whether no client may send a header to fal, besides those that are [hop-by-hop](is_hop_by_hop): it is one of those, or
/// some server may take it for one. With CGI and WSGI, `x-fal-user_id` and `x-fal-user-id` are the same.
fn is_never_sent(name: &str) -> bool {
    let is_one = |name: &str| {
        matches!(
            name,
            "authorization"
                | "proxy-authorization"
                | "cookie"
                | "host"
                | "content-length"
                | "expect"
                | "user-agent"
                | "x-fal-client-proxy"
                | "x-fal-target-url"
                | "x-fal-user-id"
                | "x-fal-cdn-token"
                // It switches off a filter inside an app. Source: `fal` 1.83.0 (`toolkit`), which reads it inside apps only.
                | "x-app-fal-can-disable-filter"
        )
    };
    is_one(name) || (name.as_bytes().contains(&b'_') && is_one(&name.replace('_', "-")))
}

/// Says whose request it is.
pub(super) fn mark(ours: &mut HeaderMap) {
    ours.insert(USER_AGENT, OURS);
    ours.insert(CLIENT_PROXY, OURS);
}

/// Takes out of an answer of fal's, or out of its trailers, what does not come back.
pub(super) fn clean(answer: &mut HeaderMap) {
    // Hardly any answer has one of these, and one walk is less than a look-up for each.
    let mut left_out: Vec<_> = answer.keys().filter(|name| is_left_out(name.as_str())).cloned().collect();
    if left_out.contains(&CONNECTION) {
        left_out.extend(named_by_connection(answer));
    }
    for name in left_out {
        answer.remove(name);
    }
}

/// Whether a header does not come back: it is for one connection, a secret, or about fal's own host, which a browser would
/// take to be about this server's.
fn is_left_out(name: &str) -> bool {
    is_hop_by_hop(name)
        || matches!(
            name,
            "set-cookie"
                | "x-fal-cdn-token"
                | "www-authenticate"
                | "proxy-authenticate"
                | "alt-svc"
                | "strict-transport-security"
                // It has a browser forget what it keeps of the host that it asked, its log-in too.
                | "clear-site-data"
                // It is ours: by this one our answers are told from fal's.
                | "x-tower-fal-rule"
        )
        || is_for_a_server_in_front(name)
}

/// Whether a header tells a CDN or a web server in front of this one what to do: to keep an answer, which our `no-store`
/// would not undo (RFC 9213), or to send a file of its own in its place. That is not for an app of fal's to say.
fn is_for_a_server_in_front(name: &str) -> bool {
    let is_for_nginx = name.starts_with("x-accel-") && name != "x-accel-buffering";
    let is_for_others = matches!(
        name,
        "surrogate-control" | "edge-control" | "x-sendfile" | "x-lighttpd-send-file" | "x-litespeed-location"
    );
    name.ends_with("-cache-control") || is_for_nginx || is_for_others
}

/// What a `connection` header names. Hardly any names more than what is hop-by-hop anyway.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter();
    let names = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let names = names.filter(|name| !name.eq_ignore_ascii_case(b"keep-alive") && !name.eq_ignore_ascii_case(b"close"));
    names.filter_map(|name| HeaderName::from_bytes(name).ok()).collect()
}

/// Whether the headers say that a body is JSON, once.
pub(super) fn say_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let essence = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

/// How long a body says that it is.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{super::target::TARGET_URL, *};
    use crate::{
        answer::RULE,
        wire::header::{CDN_TOKEN, USER_ID},
    };

    const NEVER_SENT: [&str; 19] = [
        "authorization",
        "proxy-authorization",
        "cookie",
        "host",
        "content-length",
        "expect",
        "user-agent",
        "x-fal-client-proxy",
        "x-fal-target-url",
        "x-fal-user-id",
        "x-fal-cdn-token",
        "x-app-fal-can-disable-filter",
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];

    fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn sent(forwarded: &Forwarded, of: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut sent = headers(of);
        forwarded.to_fal(&mut sent);
        sent.iter()
            .filter(|(name, _)| **name != USER_AGENT && **name != CLIENT_PROXY)
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect()
    }

    #[test]
    fn what_is_fals_business_is_sent() {
        let ours = ["x-fal-queue-priority: low", "x-fal-custom: a", "x-fal-custom: b", "x-app-fal-disable-fallback: 1"];
        let of = [
            ("x-fal-queue-priority", "low"),
            ("x-fal-custom", "a"),
            ("x-fal-custom", "b"),
            ("x-app-fal-disable-fallback", "1"),
            ("accept", "text/event-stream"),
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
        ];
        let sent = sent(&Forwarded::default(), &of);
        assert!(ours.iter().all(|ours| sent.iter().any(|sent| sent == ours)), "{sent:?}");
        assert_eq!(sent.len(), of.len());
    }

    #[test]
    fn what_is_the_clients_or_ours_is_not_sent() {
        for name in NEVER_SENT {
            let mut sent = headers(&[(name, "spoof")]);
            Forwarded::default().to_fal(&mut sent);
            assert!(sent.values().all(|value| value == OURS), "{name}: {sent:?}");
            assert_eq!(sent.len(), 2, "{name}");
        }
        let underscores =
            [("x-fal-user_id", "a"), ("x-fal-cdn_token", "b"), ("x-fal_user_id", "c"), ("x_fal_user_id", "d")];
        assert!(sent(&Forwarded::default(), &underscores).is_empty());
        assert_eq!(sent(&Forwarded::default(), &[("x-fal-my_own", "a")]), ["x-fal-my_own: a"]);
        assert!(
            sent(&Forwarded::default(), &[("x-api-key", "a"), ("origin", "b"), ("x-forwarded-for", "c")]).is_empty()
        );
    }

    #[test]
    fn names_of_other_modules_are_written_alike() {
        assert!([TARGET_URL, CLIENT_PROXY, USER_ID, CDN_TOKEN].iter().all(|name| is_never_sent(name.as_str())));
        assert!([CDN_TOKEN, RULE].iter().all(|name| is_left_out(name.as_str())));
    }

    #[test]
    fn what_the_connection_names_is_not_sent() {
        let of = [
            ("connection", "keep-alive, X-Fal-Secret"),
            ("connection", "x-fal-other"),
            ("x-fal-secret", "a"),
            ("x-fal-other", "b"),
        ];
        assert!(sent(&Forwarded::default(), &of).is_empty());
    }

    #[test]
    fn a_closed_list_takes_the_place_of_the_default() {
        let only = Forwarded::these([HeaderName::from_static("x-custom")]).unwrap();
        let of =
            [("x-custom", "a"), ("x-fal-queue-priority", "low"), ("accept", "b"), ("content-type", "application/json")];
        assert_eq!(sent(&only, &of), ["x-custom: a", "content-type: application/json"]);
        for name in NEVER_SENT.into_iter().map(HeaderName::from_static) {
            assert!(Forwarded::these([name.clone()]).is_err(), "{name}");
        }
        assert!(Forwarded::these([HeaderName::from_static("x-fal-user_id")]).is_err());
    }

    #[test]
    fn what_is_for_one_connection_or_secret_does_not_come_back() {
        let mut answer = headers(&[
            ("connection", "close, x-hop"),
            ("x-hop", "a"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("trailer", "x"),
            ("set-cookie", "fal=hush"),
            ("x-fal-cdn-token", "hush"),
            ("www-authenticate", "Key"),
            ("proxy-authenticate", "Basic"),
            ("alt-svc", "h3=\":443\""),
            ("strict-transport-security", "max-age=31536000; includeSubDomains"),
            ("clear-site-data", "\"*\""),
            ("x-tower-fal-rule", "spoof"),
            ("location", "https://elsewhere.example/"),
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
            ("content-length", "7"),
            ("x-fal-request-id", "r"),
        ]);
        clean(&mut answer);
        let mut left: Vec<_> = answer.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-encoding", "content-length", "content-type", "location", "x-fal-request-id"]);
    }

    #[test]
    fn what_speaks_to_a_server_in_front_does_not_come_back() {
        for name in [
            "cdn-cache-control",
            "cloudflare-cdn-cache-control",
            "x-litespeed-cache-control",
            "surrogate-control",
            "edge-control",
            "x-accel-expires",
            "x-accel-redirect",
            "x-sendfile",
            "x-lighttpd-send-file",
            "x-litespeed-location",
        ] {
            let mut answer = headers(&[(name, "a")]);
            clean(&mut answer);
            assert!(answer.is_empty(), "{name}");
        }
        // The last one has no meaning where nothing is kept.
        for name in ["cache-control", "expires", "x-accel-buffering", "surrogate-key"] {
            let mut answer = headers(&[(name, "a")]);
            clean(&mut answer);
            assert_eq!(answer.len(), 1, "{name}");
        }
    }

    #[test]
    fn json_is_said_once() {
        for value in ["application/json", "Application/JSON; charset=utf-8", "application/json ;x"] {
            assert!(say_json(&headers(&[("content-type", value)])), "{value}");
        }
        for value in ["text/plain", "application/json+x", "multipart/form-data; boundary=application/json", ""] {
            assert!(!say_json(&headers(&[("content-type", value)])), "{value}");
        }
        assert!(!say_json(&headers(&[])));
        assert!(!say_json(&headers(&[("content-type", "application/json"), ("content-type", "application/json")])));
    }
}
