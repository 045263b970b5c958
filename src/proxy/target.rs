//! The one judge of targets: what a client writes into `x-fal-target-url` is looked at here, on its raw bytes, before
//! anything else reads it.
//!
//! What is admitted has one reading only. There is nothing in it that two parsers understand differently: no user name, no
//! port but 443, no backslash, no fragment, no dot segment, no character in another form than it needs. The path and the
//! query of the request are the bytes that were judged, and its host is one of the list's.

use http::{
    HeaderMap, HeaderName, StatusCode, Uri,
    uri::{Authority, PathAndQuery, Scheme},
};

use super::pattern::TargetPattern;
use crate::{
    answer::Answer,
    origin::{FalOrigins, OriginPolicy as _},
    pattern::InvalidPattern,
    wire::API_HOSTS,
};

/// The header in which the official clients name the URL that they mean.
///
/// Source: `@fal-ai/client` 1.10.1 (`middleware.ts`).
pub(crate) const TARGET_URL: HeaderName = HeaderName::from_static("x-fal-target-url");

/// How long a target may be, in bytes.
const MAX_LENGTH: usize = 8 * 1024;

/// The query parameter that lets fal send the result of a request to a URL.
///
/// Source: fal's documentation, "Webhooks".
const WEBHOOK: &str = "fal_webhook";

/// The query parameter with a realtime token, which takes the place of the credential.
///
/// Source: `@fal-ai/client` 1.10.1 (`realtime.ts`).
const JWT: &str = "fal_jwt_token";

/// All targets that are allowed by default: running models, the queue, and the calls that begin an upload.
///
/// Source: `@fal-ai/client` 1.10.1 (`storage.ts`), `@fal-ai/server-proxy` 1.2.1 (`config.ts`).
const DEFAULT: [&str; 8] = [
    "fal.run/**",
    "queue.fal.run/**",
    "rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
    "rest.fal.ai/storage/upload/initiate-multipart?storage_type=fal-cdn-v3",
    "rest.fal.ai/storage/upload/complete-multipart?storage_type=fal-cdn-v3",
    "rest.alpha.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
    "rest.alpha.fal.ai/storage/upload/initiate-multipart?storage_type=fal-cdn-v3",
    "rest.alpha.fal.ai/storage/upload/complete-multipart?storage_type=fal-cdn-v3",
];

/// Which targets are allowed.
#[derive(Clone, Debug)]
pub(crate) struct Targets {
    patterns: Vec<TargetPattern>,
    /// Of what is opened by name only.
    of_account: Vec<TargetPattern>,
    /// Whether tokens are handed out.
    pub(crate) tokens: bool,
    webhooks: Webhooks,
    origins: FalOrigins,
}

#[derive(Clone, Debug)]
enum Webhooks {
    To(Vec<Box<str>>),
    Anywhere,
}

/// A target that is allowed.
#[derive(Debug)]
pub(crate) struct Target {
    /// What the request is sent to.
    pub(crate) uri: Uri,
    pub(crate) area: Area,
}

/// What is behind a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Area {
    /// Endpoints: whatever is not on a host of `fal.ai`.
    Endpoints,
    /// The upload of files.
    Storage,
    /// Realtime tokens.
    Tokens,
    /// The rest of the REST API, and the platform API: the account, its keys and what it pays.
    Account,
}

impl Target {
    /// The path without its first slash: of an endpoint that is its id.
    pub(crate) fn path(&self) -> &str {
        self.uri.path().get(1..).unwrap_or_default()
    }

    /// Whether it is on the host of the queue, or that host's backup.
    pub(crate) fn is_queue(&self) -> bool {
        self.uri.host().is_some_and(|host| host.starts_with("queue."))
    }
}

impl Targets {
    /// The default list.
    pub(crate) fn new() -> Self {
        Self {
            patterns: DEFAULT.iter().filter_map(|pattern| TargetPattern::parse(pattern).ok()).collect(),
            of_account: Vec::new(),
            tokens: false,
            webhooks: Webhooks::To(Vec::new()),
            origins: FalOrigins::new(),
        }
    }

    /// This list in place of the one before.
    pub(crate) fn only<T: AsRef<str>>(mut self, patterns: impl IntoIterator<Item = T>) -> Result<Self, InvalidPattern> {
        self.patterns.clear();
        patterns.into_iter().try_fold(self, |targets, pattern| targets.and(pattern.as_ref()))
    }

    /// One more.
    pub(crate) fn and(mut self, pattern: &str) -> Result<Self, InvalidPattern> {
        let pattern = self.parse(pattern)?;
        let is_for_uploads = |host: &Authority| is_rest(host.as_str()) && pattern.can_begin_with("storage/upload");
        if is_of_fal_ai(&pattern) && !pattern.authority().is_some_and(is_for_uploads) {
            return Err(InvalidPattern::new(
                "is for the account, and is not opened so: `allow_realtime` opens the tokens, and `allow_account_target` \
                 the rest",
            ));
        }
        self.patterns.push(pattern);
        Ok(self)
    }

    /// One of what mints keys or reads the account.
    pub(crate) fn and_of_account(mut self, pattern: &str) -> Result<Self, InvalidPattern> {
        let pattern = self.parse(pattern)?;
        if !is_of_fal_ai(&pattern) || pattern.can_begin_with("x-nothing-is-called-so") {
            return Err(InvalidPattern::new(
                "must name a host of fal.ai and the first segment of the path, like `api.fal.ai/v1/models`",
            ));
        }
        if pattern.can_begin_with("tokens") {
            return Err(InvalidPattern::new("is for tokens: `allow_realtime` opens these"));
        }
        self.of_account.push(pattern);
        Ok(self)
    }

    /// These origins may carry the credential. Each pattern has to be of one of them.
    pub(crate) fn with_origins(mut self, origins: FalOrigins) -> Result<Self, InvalidPattern> {
        self.origins = origins;
        match self.patterns.iter().chain(&self.of_account).all(|pattern| pattern.is_admitted_by(&self.origins)) {
            true => Ok(self),
            false => Err(NOT_ADMITTED),
        }
    }

    /// A host to which results may be sent, or `*` for any.
    pub(crate) fn allow_webhook(mut self, host: &str) -> Result<Self, InvalidPattern> {
        if host == "*" {
            self.webhooks = Webhooks::Anywhere;
            return Ok(self);
        }
        let host = host.to_ascii_lowercase();
        let is_port = |port: &[u8]| !port.is_empty() && port.iter().all(u8::is_ascii_digit);
        let parts = split_authority(host.as_bytes());
        if !parts.is_some_and(|(name, port)| is_host_name(name) && port.is_none_or(is_port)) {
            return Err(InvalidPattern::of(
                "host",
                "cannot be one: write it like `app.example.com`, or with a port, or `*`",
            ));
        }
        if let Webhooks::To(hosts) = &mut self.webhooks {
            hosts.push(host.into());
        }
        Ok(self)
    }

    fn parse(&self, pattern: &str) -> Result<TargetPattern, InvalidPattern> {
        let pattern = TargetPattern::parse(pattern)?;
        if pattern.is_admitted_by(&self.origins) { Ok(pattern) } else { Err(NOT_ADMITTED) }
    }

    /// Judges the target of a request.
    ///
    /// # Errors
    /// The answer with which the request is refused.
    pub(crate) fn judge(&self, headers: &HeaderMap) -> Result<Target, Answer> {
        let mut values = headers.get_all(TARGET_URL).iter();
        match (values.next(), values.next()) {
            (None, _) => Err(MISSING),
            (Some(value), None) if value.is_empty() => Err(MISSING),
            (Some(value), None) => self.judge_bytes(value.as_bytes()),
            (Some(_), Some(_)) => Err(REPEATED),
        }
    }

    /// Judges the bytes of a target.
    pub(crate) fn judge_bytes(&self, bytes: &[u8]) -> Result<Target, Answer> {
        if bytes.len() > MAX_LENGTH {
            return Err(TOO_LONG);
        }
        if !bytes.iter().all(|&byte| MAY_BE[usize::from(byte)].in_a_target) {
            return Err(CHARACTERS);
        }
        let text = str::from_utf8(bytes).map_err(|_| CHARACTERS)?;
        let rest = text.strip_prefix("https://").ok_or(SCHEME)?;
        let end = rest.bytes().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
        let (authority, path_and_query) = rest.split_at(end);
        // Nearly every target names its host exactly so.
        let is_plain = API_HOSTS.contains(&authority);
        let host = if is_plain { authority } else { judge_authority(authority)? };
        let (path, query) = match path_and_query.bytes().position(|byte| byte == b'?') {
            Some(place) => (&path_and_query[..place], Some(&path_and_query[place + 1..])),
            None => (path_and_query, None),
        };
        let path = judge_path(path)?;
        let webhooks_are_allowed = query.map_or(Ok(true), |query| self.judge_query(query))?;

        let host_in_lower_case;
        let host = if !is_plain && host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            host_in_lower_case = host.to_ascii_lowercase();
            &host_in_lower_case
        } else {
            host
        };
        let area = area(host, path);
        let listed = match area {
            Area::Endpoints | Area::Storage => find(&self.patterns, host, path, query).ok_or(NOT_LISTED)?,
            Area::Tokens if !self.tokens => return Err(TOKENS),
            Area::Tokens if matches!(path, "tokens/" | "tokens/realtime") && query.is_none() => None,
            Area::Tokens => return Err(NOT_LISTED),
            Area::Account => find(&self.of_account, host, path, query).ok_or(ACCOUNT)?,
        };
        if !webhooks_are_allowed {
            return Err(WEBHOOK_ELSEWHERE);
        }
        let authority = match listed {
            Some(authority) => authority.clone(),
            None => Authority::try_from(host).map_err(|_| HOST)?,
        };
        let uri = uri(authority, path_and_query).ok_or(CHARACTERS)?;
        // What is listed was admitted when it was listed. Tokens are not listed, and this one place decides for all.
        if self.origins.admits(&uri) { Ok(Target { uri, area }) } else { Err(NOT_LISTED) }
    }

    /// Looks at the names in a query as each reader could understand them. Returns whether all webhooks in it go to
    /// hosts that are allowed.
    fn judge_query(&self, query: &str) -> Result<bool, Answer> {
        if !query.split('%').skip(1).all(|behind| escape(behind.as_bytes()).is_some()) {
            return Err(QUERY);
        }
        // Some readers take a semicolon for an ampersand. A pair is looked at as both would read it.
        let pairs = form_urlencoded::parse(query.as_bytes()).chain(
            query
                .contains(';')
                .then_some(query)
                .into_iter()
                .flat_map(|query| query.split(['&', ';']).flat_map(|pair| form_urlencoded::parse(pair.as_bytes()))),
        );
        let mut webhooks_are_allowed = true;
        for (name, value) in pairs {
            let name = name.trim_matches(|character: char| character.is_whitespace() || character.is_control());
            // Some readers take `name[]` for one more value of `name`.
            let name = name.split_once('[').map_or(name, |(name, _)| name);
            // Not in ASCII only: to some readers the sign of the kelvin is a `k` in another case.
            let is = |known: &str| name.chars().flat_map(char::to_lowercase).eq(known.chars());
            if is(JWT) {
                return Err(TOKEN_IN_QUERY);
            }
            webhooks_are_allowed &= !is(WEBHOOK) || self.admits_webhook(&value);
        }
        Ok(webhooks_are_allowed)
    }

    /// Whether fal may send results to this URL.
    fn admits_webhook(&self, url: &str) -> bool {
        let Webhooks::To(hosts) = &self.webhooks else { return true };
        if url.bytes().any(|byte| !byte.is_ascii_graphic() || byte == b'\\') {
            return false;
        }
        let Some(rest) = url.strip_prefix("https://") else { return false };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default().to_ascii_lowercase();
        let Some((name, port)) = split_authority(authority.as_bytes()).filter(|(name, _)| is_host_name(name)) else {
            return false;
        };
        hosts.iter().any(|host| {
            *host.as_bytes() == *authority.as_bytes() || (port == Some(b"443") && *host.as_bytes() == *name)
        })
    }
}

const NOT_ADMITTED: InvalidPattern = InvalidPattern::new(
    "is for a host that may not carry the credential: only fal's API hosts may, and those that `origins` admits",
);

/// The host, as it is written.
fn judge_authority(authority: &str) -> Result<&str, Answer> {
    if authority.as_bytes().contains(&b'@') {
        return Err(USER);
    }
    let (host, port) = split_authority(authority.as_bytes()).ok_or(HOST)?;
    if port.is_some_and(|port| port != b"443") {
        return Err(PORT);
    }
    if is_host_name(host) && !has_punycode(host) { Ok(&authority[..host.len()]) } else { Err(HOST) }
}

/// Whether a label stands for characters that are not ASCII. No host of fal's has one, some readers see look-alikes there,
/// and others refuse it.
fn has_punycode(host: &[u8]) -> bool {
    let mut labels = host.split(|byte| *byte == b'.');
    labels.any(|label| label.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(b"xn--")))
}

/// The host and the port, if there is one.
fn split_authority(authority: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let mut parts = authority.split(|byte| *byte == b':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(host), port, None) => Some((host, port)),
        _ => None,
    }
}

/// Letters, digits and hyphens between dots, and no address.
fn is_host_name(host: &[u8]) -> bool {
    let mut labels = host.split(|byte| *byte == b'.');
    let is_label =
        |label: &[u8]| !label.is_empty() && label.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-');
    // A last label with a letter at its start is no part of an address in any notation, such as `0x7f.1`.
    let is_name = host.rsplit(|byte| *byte == b'.').next().and_then(<[u8]>::first).is_some_and(u8::is_ascii_alphabetic);
    host.len() <= 253 && is_name && labels.all(is_label)
}

/// The path behind its first slash, if it has one reading only.
fn judge_path(path: &str) -> Result<&str, Answer> {
    let path = path.strip_prefix('/').filter(|path| !path.is_empty()).ok_or(NO_APP)?;
    let bytes = path.as_bytes();
    let is_dots = |segment: &[u8]| segment == b"." || segment == b"..";
    // Of what is behind the first escape of a byte that is not ASCII.
    let mut decoded = Vec::new();
    let (mut at, mut begin) = (0, 0);
    while let Some(&byte) = bytes.get(at) {
        let mut means = byte;
        match byte {
            b'/' if at == begin || is_dots(&bytes[begin..at]) => return Err(PATH),
            b'/' => begin = at + 1,
            b'%' => match escape(&bytes[at + 1..]) {
                Some(escaped) if !is_to_be_written_plainly(escaped) => (means, at) = (escaped, at + 2),
                _ => return Err(PATH),
            },
            _ if !MAY_BE[usize::from(byte)].in_a_path => return Err(PATH),
            _ => {}
        }
        if !means.is_ascii() || !decoded.is_empty() {
            decoded.push(means);
        }
        at += 1;
    }
    // What is no UTF-8 has many readings: to some readers `%c0%ae` is a dot.
    if is_dots(&bytes[begin..]) || str::from_utf8(&decoded).is_err() { Err(PATH) } else { Ok(path) }
}

/// Where a byte may be.
#[derive(Clone, Copy)]
struct MayBe {
    in_a_target: bool,
    in_a_path: bool,
}

/// In a target: whatever cannot end a host, a path or a header for one reader and not for another. In a path: what needs
/// no escape (RFC 3986, 3.3), but for the semicolon, behind which some readers see parameters.
const MAY_BE: [MayBe; 256] = {
    let mut may_be = [MayBe { in_a_target: false, in_a_path: false }; 256];
    let mut byte = 0;
    while byte < 128 {
        let ascii = byte as u8;
        may_be[byte].in_a_target = ascii.is_ascii_graphic() && !matches!(ascii, b'\\' | b'#' | b'"' | b'<' | b'>');
        may_be[byte].in_a_path = ascii.is_ascii_alphanumeric()
            || matches!(ascii, b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+')
            || matches!(ascii, b',' | b'=' | b':' | b'@');
        byte += 1;
    }
    may_be
};

/// Whether a byte has no business in the escapes of a path: what needs none, such as a dot, and what a reader that
/// decodes before it routes takes for the structure of a URL.
fn is_to_be_written_plainly(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte.is_ascii_control() || b"-._~/\\%?#;".contains(&byte)
}

/// What a `%` with these bytes behind it stands for, if for anything.
fn escape(behind: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    match behind {
        [high, low, ..] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    }
}

/// Where a target leads. `host` is in lower case.
fn area(host: &str, path: &str) -> Area {
    if host != "fal.ai" && !host.ends_with(".fal.ai") {
        return Area::Endpoints;
    }
    if !is_rest(host) {
        return Area::Account;
    }
    // Whoever routes may not care for the case.
    let mut segments = path.split('/').map(str::to_ascii_lowercase);
    match [segments.next(), segments.next(), segments.next()].each_ref().map(Option::as_deref) {
        [Some("tokens"), ..] => Area::Tokens,
        [Some("storage"), Some("upload"), Some(_)] => Area::Storage,
        _ => Area::Account,
    }
}

/// Whether it is fal's REST API, under its newer or its older name.
fn is_rest(host: &str) -> bool {
    host.starts_with("rest.")
}

fn is_of_fal_ai(pattern: &TargetPattern) -> bool {
    // A pattern with a `*` in its host is never of fal.ai: the origins would not admit it.
    pattern.authority().is_some_and(|host| host.as_str() == "fal.ai" || host.as_str().ends_with(".fal.ai"))
}

/// The host of the first pattern that matches, if the pattern has only one. `None` if no pattern matches.
fn find<'a>(
    patterns: &'a [TargetPattern],
    host: &str,
    path: &str,
    query: Option<&str>,
) -> Option<Option<&'a Authority>> {
    patterns.iter().find(|pattern| pattern.matches(host, path, query)).map(TargetPattern::authority)
}

fn uri(authority: Authority, path_and_query: &str) -> Option<Uri> {
    let path_and_query_of_uri = PathAndQuery::try_from(path_and_query).ok()?;
    if path_and_query_of_uri.as_str() != path_and_query {
        return None;
    }
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTPS);
    parts.authority = Some(authority);
    parts.path_and_query = Some(path_and_query_of_uri);
    Uri::from_parts(parts).ok()
}

const MISSING: Answer =
    Answer::new(StatusCode::BAD_REQUEST, "target_missing", "The request has no `x-fal-target-url` header.");
const REPEATED: Answer =
    Answer::new(StatusCode::BAD_REQUEST, "target_repeated", "The request has more than one `x-fal-target-url` header.");
const TOO_LONG: Answer = refused("target_length", "The target URL is longer than 8 KiB.");
const CHARACTERS: Answer =
    refused("target_characters", "The target URL has a character in it that must be escaped, or a fragment.");
const SCHEME: Answer = refused("target_scheme", "The target is not a URL that begins with `https://`.");
const USER: Answer = refused("target_user", "The target URL has a user name in it.");
const PORT: Answer = refused("target_port", "The target URL has a port that is not 443.");
const HOST: Answer = refused("target_host", "The target URL does not have the name of a host in its place.");
const NO_APP: Answer = refused("target_path", "The target URL has no path, and so names no app.");
const PATH: Answer = refused(
    "target_path",
    "The path of the target URL has a dot segment, an empty segment, or an escape that is not needed or not allowed.",
);
const QUERY: Answer = refused("target_query", "The query of the target URL has a `%` without two digits behind it.");
const TOKEN_IN_QUERY: Answer = refused("target_token", "The target URL has a `fal_jwt_token` in its query.");
const NOT_LISTED: Answer =
    refused("target", "The target URL is not one of those that this server allows.").option("allow_target");
const ACCOUNT: Answer =
    refused("target_account", "The target URL is for the account, which this server has not opened.")
        .option("allow_account_target");
const TOKENS: Answer = Answer::new(StatusCode::FORBIDDEN, "realtime", "This server hands out no realtime tokens.")
    .option("allow_realtime");
const WEBHOOK_ELSEWHERE: Answer = Answer::new(
    StatusCode::FORBIDDEN,
    "webhook",
    "The `fal_webhook` in the target URL leads to a host that this server does not allow.",
)
.option("allow_webhook");

const fn refused(rule: &'static str, message: &'static str) -> Answer {
    Answer::new(StatusCode::PRECONDITION_FAILED, rule, message)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn rule(targets: &Targets, target: &str) -> Result<String, &'static str> {
        targets.judge_bytes(target.as_bytes()).map(|target| target.uri.to_string()).map_err(|answer| answer.rule)
    }

    fn default() -> Targets {
        Targets::new()
    }

    #[test]
    fn each_pattern_of_the_default_is_one_that_could_be_added() {
        assert_eq!(default().patterns.len(), DEFAULT.len());
        assert!(default().only(DEFAULT).is_ok());
    }

    #[test]
    fn what_is_admitted_is_sent_as_it_was_judged() {
        for target in [
            "https://fal.run/fal-ai/flux",
            "https://fal.run/json",
            "https://fal.run/fal-ai/flux/",
            "https://fal.run/.hidden/x",
            "https://fal.run/a/...",
            "https://fal.run/x?y=//z",
            "https://fal.run/x?y=%2F%2e%2E/../a;b='{}'|^`",
            "https://fal.run/x?",
            "https://fal.run/a%20b/%C3%A9",
            "https://queue.fal.run/a/b/requests/1/status/stream?logs=1",
            "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
            "https://rest.alpha.fal.ai/storage/upload/initiate-multipart?storage_type=fal-cdn-v3",
        ] {
            assert_eq!(rule(&default(), target).as_deref(), Ok(target));
        }
    }

    #[test]
    fn the_host_becomes_lower_case_and_the_port_goes() {
        assert_eq!(rule(&default(), "https://FAL.Run/Fal-ai/X").as_deref(), Ok("https://fal.run/Fal-ai/X"));
        assert_eq!(rule(&default(), "https://fal.run:443/x?Y").as_deref(), Ok("https://fal.run/x?Y"));
        let open = default().and("*.fal.run/**");
        assert!(open.is_err(), "the origins do not admit it");
        let open = default().with_origins(FalOrigins::new().subdomains()).unwrap().and("*.fal.run/**").unwrap();
        assert_eq!(rule(&open, "https://WMA.fal.run:443/x").as_deref(), Ok("https://wma.fal.run/x"));
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for (target, expected) in [
            ("not a url", "target_characters"),
            ("/relative", "target_scheme"),
            ("//fal.run/x", "target_scheme"),
            ("http://fal.run/x/y", "target_scheme"),
            ("ftp://fal.run/x", "target_scheme"),
            ("wss://fal.run/x", "target_scheme"),
            ("HTTPS://fal.run/x", "target_scheme"),
            ("https:/fal.run/x", "target_scheme"),
            ("https:///fal.run/x", "target_host"),
            (" https://fal.run/x", "target_characters"),
            ("https://fal.run", "target_path"),
            ("https://fal.run/", "target_path"),
            ("https://fal.run?x=/a", "target_path"),
            ("https://fal.run/?x", "target_path"),
            ("https://fal.run:8443/x", "target_port"),
            ("https://fal.run:/x", "target_port"),
            ("https://fal.run:0443/x", "target_port"),
            ("https://fal.run:443:443/x", "target_host"),
            ("https://user:pw@fal.run/x", "target_user"),
            ("https://fal.run@evil.com/x", "target_user"),
            ("https://fal.run.evil.com/x", "target"),
            ("https://notfal.run/x", "target"),
            ("https://evil.com/fal.run/x", "target"),
            ("https://fal.run\\@evil.com/x", "target_characters"),
            ("https://fal.run#@evil.com/", "target_characters"),
            ("https://fal.run/x#y", "target_characters"),
            ("https://fal.run./x", "target_host"),
            ("https://.fal.run/x", "target_host"),
            ("https://fal..run/x", "target_host"),
            ("https://ws.fal.run/x", "target"),
            ("https://gateway.fal.run/x", "target"),
            ("https://fal.dev/x", "target"),
            ("https://falrun.com/x", "target"),
            ("https://v3.fal.media/files/x", "target"),
            ("https://127.0.0.1/x", "target_host"),
            ("https://2130706433/x", "target_host"),
            ("https://0x7f.1/x", "target_host"),
            ("https://[::1]/x", "target_host"),
            ("https://fаl.run/x", "target_characters"),
            ("https://xn--fl-8kc.run/x", "target_host"),
            ("https://XN--uc.fal.run/x", "target_host"),
            ("https://fal\t.run/x", "target_characters"),
            ("https://fal.run/\u{7f}", "target_characters"),
            ("https://FAL.RUN%2eevil.com/x", "target_host"),
            ("https://fal.run/../x", "target_path"),
            ("https://fal.run/a/.", "target_path"),
            ("https://fal.run/a/%2e%2e/b", "target_path"),
            ("https://fal.run/a/.%2E/b", "target_path"),
            ("https://fal.run/a/..%2f..%2fb", "target_path"),
            ("https://fal.run/a%5cb", "target_path"),
            ("https://fal.run/a%00", "target_path"),
            ("https://fal.run/a/%c0%ae%c0%ae/b", "target_path"),
            ("https://fal.run/a%ff", "target_path"),
            ("https://fal.run/a%C3/%A9", "target_path"),
            ("https://fal.run/a%252fb", "target_path"),
            ("https://fal.run/%66al-ai/x", "target_path"),
            ("https://fal.run/a;b/..;/c", "target_path"),
            ("https://fal.run/a%", "target_path"),
            ("https://fal.run/a%4", "target_path"),
            ("https://fal.run/a%zz", "target_path"),
            ("https://fal.run//x", "target_path"),
            ("https://fal.run/a//x", "target_path"),
            ("https://fal.run/a//", "target_path"),
            ("https://fal.run/{a}", "target_path"),
            ("https://fal.run/a?b=%", "target_query"),
            ("https://fal.run/a?b=%u0041", "target_query"),
        ] {
            assert_eq!(rule(&default(), target), Err(expected), "{target}");
        }
        let long = format!("https://fal.run/{}", "a".repeat(MAX_LENGTH));
        assert_eq!(rule(&default(), &long), Err("target_length"));
        assert!(rule(&default(), &long[..MAX_LENGTH]).is_ok());
    }

    #[test]
    fn a_query_is_exact_where_the_list_has_one() {
        let initiate = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3";
        assert!(rule(&default(), initiate).is_ok());
        for target in [&format!("{initiate}&x=1"), "https://rest.fal.ai/storage/upload/initiate"] {
            assert_eq!(rule(&default(), target), Err("target"), "{target}");
        }
    }

    #[test]
    fn tokens_and_the_account_are_no_part_of_a_wide_pattern() {
        let wide = default().and("rest.fal.ai/**").unwrap();
        assert!(rule(&wide, "https://rest.fal.ai/storage/upload/x").is_ok());
        for (target, expected) in [
            ("https://rest.fal.ai/tokens/", "realtime"),
            ("https://rest.fal.ai/Tokens/realtime", "realtime"),
            ("https://rest.fal.ai/tokens", "realtime"),
            ("https://rest.alpha.fal.ai/tokens/", "realtime"),
            ("https://rest.fal.ai/users/current", "target_account"),
            ("https://rest.fal.ai/storage/auth/token", "target_account"),
            ("https://rest.fal.ai/storage/upload", "target_account"),
            ("https://rest.fal.ai/anything", "target_account"),
            ("https://api.fal.ai/v1/models", "target_account"),
            ("https://fal.ai/x", "target_account"),
        ] {
            assert_eq!(rule(&wide, target), Err(expected), "{target}");
        }
        for pattern in
            ["rest.fal.ai/tokens/", "rest.fal.ai/users/**", "api.fal.ai/**", "rest.fal.ai/storage/auth/token"]
        {
            assert!(default().and(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn tokens_are_asked_for_by_two_calls() {
        let mut open = default();
        open.tokens = true;
        for host in ["rest.fal.ai", "rest.alpha.fal.ai"] {
            for path in ["tokens/", "tokens/realtime"] {
                let target = format!("https://{host}/{path}");
                assert_eq!(rule(&open, &target), Ok(target));
            }
            for path in ["tokens", "tokens/x", "Tokens/", "tokens/?x", "tokens/realtime/", "tokens/realtime?x=1"] {
                assert_eq!(rule(&open, &format!("https://{host}/{path}")), Err("target"), "{path}");
            }
        }
        let run_only = open.only(["fal.run/**"]).unwrap().with_origins(FalOrigins::only(["fal.run"]).unwrap()).unwrap();
        assert_eq!(rule(&run_only, "https://rest.fal.ai/tokens/"), Err("target"), "it would carry no credential");
    }

    #[test]
    fn the_account_is_opened_by_name() {
        let open = default().and_of_account("api.fal.ai/v1/models").unwrap();
        assert!(rule(&open, "https://api.fal.ai/v1/models?limit=1").is_ok());
        assert_eq!(rule(&open, "https://api.fal.ai/v1/keys"), Err("target_account"));
        for pattern in ["api.fal.ai/**", "api.fal.ai/*/models", "rest.fal.ai/tokens/", "fal.run/a", "evil.com/a"] {
            assert!(default().and_of_account(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn a_list_of_ones_own_takes_the_place_of_the_default() {
        let none = default().only::<&str>([]).unwrap();
        assert_eq!(rule(&none, "https://fal.run/fal-ai/flux"), Err("target"));
        let one = default().only(["fal.run/json"]).unwrap();
        assert!(rule(&one, "https://fal.run/json").is_ok());
        assert_eq!(rule(&one, "https://fal.run/json/"), Err("target"));
    }

    #[test]
    fn origins_that_do_not_admit_what_is_listed_are_refused() {
        assert!(default().with_origins(FalOrigins::only(["fal.run"]).unwrap()).is_err());
        let run_only = default().only(["fal.run/**"]).unwrap().with_origins(FalOrigins::only(["fal.run"]).unwrap());
        assert!(run_only.unwrap().and("queue.fal.run/**").is_err());
    }

    #[test]
    fn a_webhook_leads_to_hosts_that_are_allowed() {
        let to = |query: &str| format!("https://queue.fal.run/a/b?{query}");
        let allowed = default().allow_webhook("App.example").unwrap().allow_webhook("other.example:8443").unwrap();
        for query in [
            "fal_webhook=https%3A%2F%2Fapp.example%2Fhook",
            "fal_webhook=https://APP.example:443",
            "fal_webhook=https://app.example?x",
            "fal_webhook=https://other.example:8443/a&x=1",
            "x=fal_webhook",
            "fal_webhooks=https://evil.com",
        ] {
            assert!(rule(&allowed, &to(query)).is_ok(), "{query}");
        }
        for query in [
            "fal_webhook=https://evil.com",
            "fal_webhook=https%3A%2F%2Fevil.com%2F",
            "FAL_Webhook=https://evil.com",
            "fal%5Fwebhook=https://evil.com",
            "%66al_webhook=https://evil.com",
            "+fal_webhook+=https://evil.com",
            "fal_webhook[]=https://evil.com",
            "fal_webhook%5B0%5D=https://evil.com",
            "fal_webhoo%E2%84%AA=https://evil.com",
            "a=b;fal_webhook=https://evil.com",
            "a;fal%5fwebhook=https://evil.com&b",
            "fal_webhook=https://app.example/&fal_webhook=https://evil.com",
            "fal_webhook=https://app.example@evil.com/",
            "fal_webhook=https://app.example.evil.com/",
            "fal_webhook=https://app.example%5C@evil.com/",
            "fal_webhook=https://evil.com%23app.example",
            "fal_webhook=http://app.example/",
            "fal_webhook=https://app.example:8443/",
            "fal_webhook=https://other.example/",
            "fal_webhook=//app.example/",
            "fal_webhook=+https://app.example/",
            "fal_webhook=https://app.example%0a.evil.com/",
            "fal_webhook=https://[::1]/",
            "fal_webhook=",
            "fal_webhook",
        ] {
            assert_eq!(rule(&allowed, &to(query)), Err("webhook"), "{query}");
            assert_eq!(rule(&default(), &to(query)), Err("webhook"), "{query}");
        }
        let anywhere = default().allow_webhook("*").unwrap().allow_webhook("app.example").unwrap();
        assert!(rule(&anywhere, &to("fal_webhook=https://evil.com")).is_ok());
        for host in ["https://app.example", "app.example/x", "", "[::1]", "user@app.example", "a b"] {
            assert!(default().allow_webhook(host).is_err(), "{host}");
        }
    }

    #[test]
    fn a_token_has_no_place_in_a_query() {
        for query in [
            "fal_jwt_token=x",
            "a=b&FAL_JWT%5ftoken=x",
            "a;fal_jwt_token=x",
            "fal_jwt_token",
            "fal_jwt_to%E2%84%AAen=x",
        ] {
            assert_eq!(rule(&default(), &format!("https://fal.run/a/b?{query}")), Err("target_token"), "{query}");
        }
    }

    #[test]
    fn there_is_one_header() {
        let judge = |values: &[&'static str]| {
            let headers = values.iter().map(|value| (TARGET_URL, HeaderValue::from_static(value))).collect();
            default()
                .judge(&headers)
                .map(|target| target.path().to_owned())
                .map_err(|answer| (answer.status.as_u16(), answer.rule))
        };
        assert_eq!(judge(&["https://fal.run/a/b"]).as_deref(), Ok("a/b"));
        assert_eq!(judge(&[]), Err((400, "target_missing")));
        assert_eq!(judge(&[""]), Err((400, "target_missing")));
        assert_eq!(judge(&["https://fal.run/a", "https://fal.run/a"]), Err((400, "target_repeated")));
    }
}
