use http::Uri;

use super::error::{LoginError, LoginErrorKind};
use crate::origin::is_loopback;

/// The origin of an endpoint, and what its paths begin with. Without a slash at the end.
#[derive(Clone, Debug)]
pub(super) struct BaseUrl(String);

impl BaseUrl {
    /// One of fal's own.
    pub(super) fn of_fal(url: &'static str) -> Self {
        Self(url.to_owned())
    }

    /// Only `https` is taken, and `http` on this machine: what is sent there, and what comes back, are secrets.
    pub(super) fn parse(url: &str) -> Result<Self, LoginError> {
        let refused = |rule| Err(LoginError::new(LoginErrorKind::Setting, format!("the URL of an endpoint {rule}")));
        let Ok(uri) = url.parse::<Uri>() else { return refused("cannot be read: it is like https://auth.example.com") };
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return refused("needs a scheme and a host: it is like https://auth.example.com");
        };
        if authority.as_str().contains('@') {
            return refused("must not have a user: remove what is before the @");
        }
        if uri.query().is_some() {
            return refused("must not have a query: remove the ? and what follows");
        }
        match scheme {
            "https" => {}
            "http" if is_loopback(authority.host()) => {}
            _ => {
                return refused(
                    "must begin with https://; http:// is for this machine only, such as http://127.0.0.1:8080",
                );
            }
        }
        Ok(Self(format!("{scheme}://{authority}{}", uri.path().trim_end_matches('/'))))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The URL of a path, which begins with a slash.
    pub(super) fn at(&self, path: &str) -> Result<Uri, LoginError> {
        let url = format!("{}{path}", self.0);
        url.parse()
            .map_err(|_| LoginError::new(LoginErrorKind::Setting, "the URL of an endpoint is too long: shorten it"))
    }

    pub(super) fn is_this_machine(&self) -> bool {
        self.0.starts_with("http://")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_is_taken_and_http_on_this_machine() {
        for url in [
            "https://auth.fal.ai",
            "https://auth.fal.ai/",
            "http://127.0.0.1:1/rest",
            "http://[::1]:2",
            "http://localhost",
            "http://127.0.0.2",
        ] {
            let base = BaseUrl::parse(url).unwrap();
            assert_eq!(base.at("/x").unwrap().to_string(), format!("{}/x", url.trim_end_matches('/')));
        }
        for url in [
            "",
            "auth.fal.ai",
            "/x",
            "http://auth.fal.ai",
            "ftp://127.0.0.1",
            "https://u:p@host",
            "https://host/?a",
            "http://127.0.0.1.nip.io",
        ] {
            let error = BaseUrl::parse(url).unwrap_err();
            assert_eq!(error.kind(), LoginErrorKind::Setting);
            assert!(!error.to_string().contains("u:p"));
        }
    }
}
