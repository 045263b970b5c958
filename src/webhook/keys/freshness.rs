use std::time::Duration;

use http::{
    HeaderMap, HeaderName,
    header::{AGE, CACHE_CONTROL, DATE, EXPIRES},
};

/// However often the answer may be asked for: a document that is never to be kept would be fetched for each delivery.
const SHORTEST: Duration = Duration::from_secs(60);

/// However long the answer may be kept.
///
/// Source: fal's documentation, "Webhooks".
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the headers say nothing.
const USUAL: Duration = Duration::from_secs(60 * 60);

/// How long an answer stays fresh by its headers (RFC 9111), within the bounds above.
pub(super) fn freshness(headers: &HeaderMap) -> Duration {
    by_directives(headers).or_else(|| by_expiry(headers)).map_or(USUAL, |fresh| fresh.clamp(SHORTEST, LONGEST))
}

/// `Cache-Control`, less the time for which a cache on the way has had the answer already.
fn by_directives(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut shortest = None;
    for directive in values.flat_map(|value| value.split(',')) {
        let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
        let seconds = match name.trim().to_ascii_lowercase().as_str() {
            "no-store" | "no-cache" => Some(0),
            // A number that does not fit is a long time; anything else is no number.
            "max-age" => number(value.trim().trim_matches('"')),
            _ => None,
        };
        shortest = match (shortest, seconds) {
            (Some(shortest), Some(seconds)) => Some(u64::min(shortest, seconds)),
            (shortest, seconds) => shortest.or(seconds),
        };
    }
    let age = text(headers, &AGE).and_then(number).unwrap_or_default();
    shortest.map(|seconds| Duration::from_secs(seconds.saturating_sub(age)))
}

/// `Expires`, counted from the `Date` of the answer, so that the clock of this server does not matter.
fn by_expiry(headers: &HeaderMap) -> Option<Duration> {
    let expires = text(headers, &EXPIRES)?;
    // What is no date, such as `0`, has passed.
    let Ok(expires) = httpdate::parse_http_date(expires) else { return Some(Duration::ZERO) };
    let date = httpdate::parse_http_date(text(headers, &DATE)?).ok()?;
    Some(expires.duration_since(date).unwrap_or_default())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn number(digits: &str) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn seconds(headers: &[(HeaderName, &'static str)]) -> u64 {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        let mut map = HeaderMap::new();
        headers.for_each(|(name, value)| {
            map.append(name, value);
        });
        freshness(&map).as_secs()
    }

    #[test]
    fn cache_control_says_how_long_the_keys_are_fresh() {
        for (value, fresh) in [
            ("max-age=600", 600),
            ("public, Max-Age=\"600\", must-revalidate", 600),
            ("max-age=600, max-age=300", 300),
            ("max-age=600, no-cache", 60),
            ("no-store", 60),
            ("max-age=0", 60),
            ("max-age=59", 60),
            ("max-age=86401", 86_400),
            ("max-age=99999999999999999999999", 86_400),
            ("max-age=-1", 3600),
            ("max-age", 3600),
            ("s-maxage=600", 3600),
            ("", 3600),
        ] {
            assert_eq!(seconds(&[(CACHE_CONTROL, value)]), fresh, "{value}");
        }
        assert_eq!(seconds(&[(CACHE_CONTROL, "max-age=600"), (AGE, "100")]), 500);
        assert_eq!(seconds(&[(CACHE_CONTROL, "max-age=600"), (AGE, "1000")]), 60);
        assert_eq!(seconds(&[(CACHE_CONTROL, "public"), (CACHE_CONTROL, "max-age=70")]), 70);
    }

    #[test]
    fn expires_counts_where_cache_control_says_nothing() {
        let date = (DATE, "Sun, 06 Nov 1994 08:49:37 GMT");
        let expires = |value| (EXPIRES, value);
        assert_eq!(seconds(&[date.clone(), expires("Sun, 06 Nov 1994 08:59:37 GMT")]), 600);
        assert_eq!(seconds(&[date.clone(), expires("Sun, 06 Nov 1994 08:00:00 GMT")]), 60);
        assert_eq!(seconds(&[date.clone(), expires("Mon, 06 Nov 2034 08:00:00 GMT")]), 86_400);
        assert_eq!(seconds(&[date.clone(), expires("0")]), 60);
        assert_eq!(seconds(&[expires("Sun, 06 Nov 1994 08:59:37 GMT")]), 3600);
        assert_eq!(seconds(&[date, expires("Sun, 06 Nov 1994 08:59:37 GMT"), (CACHE_CONTROL, "max-age=90")]), 90);
        assert_eq!(seconds(&[]), 3600);
    }
}
