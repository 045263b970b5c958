//! Protection against what a web page can make a browser send. A server that spends money for everyone who can reach it
//! is otherwise open to each page that its users visit.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue, StatusCode, Uri,
        header::{HOST, ORIGIN},
        uri::Authority,
    },
    middleware::Next,
    response::Response,
};

use super::problem;

/// Which names this server goes by, or `None` if it can be reached under any.
pub(crate) type Hosts = Option<Arc<[String]>>;

/// The names of a server that listens at this address. On loopback only this machine can connect, so another name means
/// that a page's own domain was pointed here (DNS rebinding). `more` are further names, of a reverse proxy for example.
pub(crate) fn hosts(address: IpAddr, more: &[String]) -> Hosts {
    address.to_canonical().is_loopback().then(|| more.iter().map(|name| name.to_ascii_lowercase()).collect())
}

/// Answers a request with 421 if it is for another host, and with 403 if a page of another site caused it. That holds for
/// GET too: fal runs models by GET.
pub(crate) async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let authorities = authorities(request.uri(), request.headers());
    let is_ours = |authority: &Option<Authority>| match (&hosts, authority) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(more), Some(authority)) => is_local(authority.host(), more),
    };
    if !authorities.iter().all(is_ours) {
        problem(StatusCode::MISDIRECTED_REQUEST, "foreign_host")
    } else if is_cross_site(request.headers(), &authorities) {
        problem(StatusCode::FORBIDDEN, "cross_site")
    } else {
        next.run(request).await
    }
}

/// All that the request says about its host: `None` is a header that cannot be read.
fn authorities(uri: &Uri, headers: &HeaderMap) -> Vec<Option<Authority>> {
    let in_headers = headers.get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    uri.authority().cloned().map(Some).into_iter().chain(in_headers).collect()
}

fn is_local(host: &str, more: &[String]) -> bool {
    let host = host.to_ascii_lowercase();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&host);
    host == "localhost"
        || address.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
        || more.contains(&host)
}

/// By what browsers say themselves, which pages cannot change. Other clients send neither header.
fn is_cross_site(headers: &HeaderMap, authorities: &[Option<Authority>]) -> bool {
    if headers.contains_key("sec-fetch-site") {
        let is_own = |site: &HeaderValue| site == "same-origin" || site == "none";
        return !headers.get_all("sec-fetch-site").iter().all(is_own);
    }
    // An older browser, or a page that was not loaded over https.
    let is_own = |origin: &HeaderValue| {
        let origin = Uri::try_from(origin.as_bytes()).ok();
        let origin = origin.as_ref().and_then(Uri::authority);
        origin.is_some() && !authorities.is_empty() && authorities.iter().all(|authority| authority.as_ref() == origin)
    };
    !headers.get_all(ORIGIN).iter().all(is_own)
}
