//! Who calls your server, and with which credential they are served: for the [`proxy`](crate::proxy), and for the route of
//! [`realtime`](crate::realtime).
//!
//! Both are closed until you say who may call them: everyone ([`allow_anonymous`], which lets each page that they visit
//! and each person who can reach the server spend from your account), or those whom an [`Authenticate`] admits.
//!
//! ```
//! use std::collections::HashMap;
//!
//! use axum::response::IntoResponse as _;
//! use http::{HeaderValue, StatusCode, request::Parts};
//! use tower_fal::caller::{Authenticate, Caller, Refused};
//!
//! /// The people who have logged in, by the cookie that each was given. A database, as a rule.
//! struct Sessions(HashMap<HeaderValue, String>);
//!
//! impl Authenticate for Sessions {
//!     async fn authenticate(&self, head: &Parts) -> Result<Caller, Refused> {
//!         let user = head.headers.get("cookie").and_then(|cookie| self.0.get(cookie));
//!         let user = user.ok_or_else(|| StatusCode::UNAUTHORIZED.into_response())?;
//!         Ok(Caller::tenant(user.as_str()).max_in_flight(8))
//!     }
//! }
//! ```
//!
//! A closure does too, if it needs nothing of its own: `async |head: &Parts| …`. For callers with tokens there is
//! [`Tokens`].
//!
//! [`allow_anonymous`]: crate::proxy::FalProxy::allow_anonymous

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use axum_core::response::Response;
use http::{StatusCode, request::Parts};

use crate::{answer::Answer, credential::Credential, endpoint::Endpoints};

mod hosts;
mod tokens;

use self::hosts::Hosts;
pub use self::tokens::Tokens;
pub use crate::pattern::InvalidPattern;

/// Somebody who may call: what an [`Authenticate`] says about a request.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Caller {
    tenant: Option<Arc<str>>,
    endpoints: Option<Endpoints>,
    credential: Option<Credential>,
    max_in_flight: Option<usize>,
}

impl Caller {
    /// Somebody without a name. All of these are counted as one tenant.
    pub fn anonymous() -> Self {
        Self::default()
    }

    /// Somebody of this tenant: a customer, a team or a user. By this name requests are counted, request ids are
    /// remembered, and usage is reported.
    pub fn tenant(name: impl Into<Arc<str>>) -> Self {
        Self { tenant: Some(name.into()), ..Self::default() }
    }

    /// The only endpoints that this caller may use, such as `fal-ai/flux/**`: `*` stands for a part of one segment and
    /// `**` for any number of segments. What the server as a whole does not allow stays closed. Default: all that the
    /// server allows.
    ///
    /// # Errors
    /// When one of them cannot be a pattern, or is so short that it covers no endpoint.
    pub fn endpoints<T: AsRef<str>>(mut self, patterns: impl IntoIterator<Item = T>) -> Result<Self, InvalidPattern> {
        self.endpoints = Some(Endpoints::parse(patterns)?);
        Ok(self)
    }

    /// The credential that this caller's requests are sent with. Default: the server's own, if it has one.
    pub fn credential(mut self, credential: Credential) -> Self {
        self.credential = Some(credential);
        self
    }

    /// How many requests of this caller's tenant may be under way at once, until their answers have ended. Default: what
    /// the server says.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = Some(requests);
        self
    }

    /// The tenant's name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.tenant.as_deref()
    }
}

/// What each part of this crate that has callers asks one about.
#[allow(dead_code)] // the route for tokens asks for less than the proxy
impl Caller {
    pub(crate) fn shared_name(&self) -> Option<&Arc<str>> {
        self.tenant.as_ref()
    }

    pub(crate) fn own_endpoints(&self) -> Option<&Endpoints> {
        self.endpoints.as_ref()
    }

    pub(crate) fn own_credential(&self) -> Option<&Credential> {
        self.credential.as_ref()
    }

    pub(crate) fn own_max_in_flight(&self) -> Option<usize> {
        self.max_in_flight
    }
}

/// The response to a request whose caller is not admitted: `401` as a rule.
///
/// fal's official client shows the `message` of a JSON body and nothing else. It sends a request again that is answered
/// with 429, 502, 503 or 504.
pub type Refused = Response;

/// Decides who calls. See the [module docs](self).
///
/// Closures that borrow nothing are such too: `async |head: &Parts| …`. A closure that has captured something makes a
/// future which owns a copy of that: `move |head: &Parts| { let users = users.clone(); async move { … } }`.
pub trait Authenticate: Send + Sync + 'static {
    /// Looks at the head of a request: its body is not read before this says yes.
    ///
    /// # Errors
    /// The response with which the caller is refused.
    fn authenticate(&self, head: &Parts) -> impl Future<Output = Result<Caller, Refused>> + Send;
}

impl<F> Authenticate for F
where
    F: for<'a> AuthenticateFn<'a>,
{
    fn authenticate(&self, head: &Parts) -> impl Future<Output = Result<Caller, Refused>> + Send {
        self(head)
    }
}

/// A closure that is an [`Authenticate`]. It is never named: it says that the future of a closure may borrow the head.
pub trait AuthenticateFn<'a>: Fn(&'a Parts) -> Self::Future + Send + Sync + 'static {
    /// What the closure returns.
    type Future: Future<Output = Result<Caller, Refused>> + Send + 'a;
}

impl<'a, F, Fut> AuthenticateFn<'a> for F
where
    F: Fn(&'a Parts) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Caller, Refused>> + Send + 'a,
{
    type Future = Fut;
}

/// Who may call, and under which names of the server. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Callers {
    who: Who,
    hosts: Hosts,
}

#[derive(Clone, Default)]
enum Who {
    #[default]
    Nobody,
    Everyone,
    Those(Arc<dyn AuthenticateBoxed>),
}

#[allow(dead_code)] // the route for tokens asks for less than the proxy
impl Callers {
    /// Those whom this one admits. It replaces what was said before.
    pub(crate) fn authenticate(&mut self, authenticate: impl Authenticate) {
        self.who = Who::Those(Arc::new(authenticate));
    }

    /// Everyone. It replaces what was said before.
    pub(crate) fn allow_anonymous(&mut self) {
        self.who = Who::Everyone;
    }

    /// A name under which the server is called; `*` is every name.
    pub(crate) fn allow_host(&mut self, name: &str) -> Result<(), InvalidPattern> {
        self.hosts.allow(name)
    }

    /// Whether the request is meant for this server.
    ///
    /// # Errors
    /// `400`.
    pub(crate) fn check_host(&self, head: &Parts) -> Result<(), Answer> {
        self.hosts.check(head, matches!(self.who, Who::Everyone))
    }

    /// Who calls. [`check_host`](Self::check_host) comes first.
    ///
    /// # Errors
    /// What the caller is answered.
    pub(crate) async fn admit(&self, head: &Parts) -> Result<Caller, Refused> {
        match &self.who {
            Who::Nobody => Err(CLOSED.into()),
            Who::Everyone => Ok(Caller::anonymous()),
            Who::Those(authenticate) => authenticate.authenticate_boxed(head).await,
        }
    }
}

const CLOSED: Answer = Answer::new(
    StatusCode::UNAUTHORIZED,
    "caller",
    "This server admits no callers: nobody has said yet who may call it.",
)
.option("authenticate");

impl fmt::Debug for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "Nobody",
            Self::Everyone => "Everyone",
            Self::Those(_) => "Those",
        })
    }
}

/// An [`Authenticate`] without its type.
trait AuthenticateBoxed: Send + Sync {
    fn authenticate_boxed<'a>(
        &'a self,
        head: &'a Parts,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Refused>> + Send + 'a>>;
}

impl<A: Authenticate> AuthenticateBoxed for A {
    fn authenticate_boxed<'a>(
        &'a self,
        head: &'a Parts,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Refused>> + Send + 'a>> {
        Box::pin(self.authenticate(head))
    }
}

#[cfg(test)]
mod tests {
    use axum_core::response::IntoResponse as _;
    use http::Request;

    use super::*;

    fn head(headers: &[(&'static str, &str)]) -> Parts {
        let mut request = Request::post("/").body(()).unwrap();
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        request.into_parts().0
    }

    async fn status(callers: &Callers, head: &Parts) -> Result<Option<String>, u16> {
        callers.check_host(head).map_err(|answer| answer.status.as_u16())?;
        let admitted = callers.admit(head).await;
        admitted.map(|caller| caller.name().map(str::to_owned)).map_err(|refused| refused.status().as_u16())
    }

    #[tokio::test]
    async fn nobody_is_admitted_until_somebody_is_named() {
        assert_eq!(status(&Callers::default(), &head(&[])).await, Err(401));
    }

    #[tokio::test]
    async fn a_closure_looks_at_the_head() {
        let mut callers = Callers::default();
        callers.authenticate(async |head: &Parts| {
            let name = head.headers.get("x-user").and_then(|name| name.to_str().ok());
            tokio::task::yield_now().await;
            name.map(Caller::tenant).ok_or_else(|| StatusCode::UNAUTHORIZED.into_response())
        });
        assert_eq!(status(&callers, &head(&[("x-user", "ann")])).await, Ok(Some("ann".to_owned())));
        assert_eq!(status(&callers, &head(&[])).await, Err(401));
        assert_eq!(format!("{callers:?}"), "Callers { who: Those, hosts: Hosts { names: None } }");
    }

    #[tokio::test]
    async fn a_closure_may_own_what_it_asks() {
        let (users, mut callers) = (Arc::new(vec!["ann".to_owned()]), Callers::default());
        callers.authenticate(move |head: &Parts| {
            let (users, name) = (Arc::clone(&users), head.headers.get("x-user").cloned());
            async move {
                let known = users.iter().find(|user| name.as_ref().is_some_and(|name| name == user.as_str()));
                known.map(|user| Caller::tenant(user.as_str())).ok_or_else(|| StatusCode::FORBIDDEN.into_response())
            }
        });
        assert_eq!(status(&callers, &head(&[("x-user", "ann")])).await, Ok(Some("ann".to_owned())));
        assert_eq!(status(&callers, &head(&[("x-user", "eve")])).await, Err(403));
    }

    #[tokio::test]
    async fn everyone_may_call_a_loopback_host_and_those_that_are_named() {
        let mut callers = Callers::default();
        callers.allow_anonymous();
        for host in ["localhost", "LOCALHOST:3000", "127.0.0.1:3000", "127.8.8.8", "[::1]:80", "[::1]"] {
            assert_eq!(status(&callers, &head(&[("host", host)])).await, Ok(None), "{host}");
        }
        for host in
            ["app.example", "127.0.0.1.app.example", "localhost.app.example", "x@localhost", "localhost:x", "", "*"]
        {
            assert_eq!(status(&callers, &head(&[("host", host)])).await, Err(400), "{host}");
        }
        callers.allow_host("App.example").unwrap();
        assert_eq!(status(&callers, &head(&[("host", "app.EXAMPLE:8443")])).await, Ok(None));
        assert_eq!(status(&callers, &head(&[("host", "other.example")])).await, Err(400));
        callers.allow_host("*").unwrap();
        assert_eq!(status(&callers, &head(&[("host", "other.example")])).await, Ok(None));
    }

    #[tokio::test]
    async fn a_request_names_one_host() {
        let mut callers = Callers::default();
        callers.allow_anonymous();
        callers.allow_host("*").unwrap();
        assert_eq!(status(&callers, &head(&[("host", "a.example"), ("host", "a.example")])).await, Err(400));
        assert_eq!(status(&callers, &head(&[("host", "a b")])).await, Err(400));
    }

    #[tokio::test]
    async fn who_is_known_may_call_any_name_until_some_are_named() {
        let mut callers = Callers::default();
        callers.authenticate(async |_: &Parts| Ok(Caller::anonymous()));
        assert_eq!(status(&callers, &head(&[("host", "app.example")])).await, Ok(None));
        callers.allow_host("other.example").unwrap();
        assert_eq!(status(&callers, &head(&[("host", "app.example")])).await, Err(400));
        assert_eq!(status(&callers, &head(&[("host", "other.example")])).await, Ok(None));
    }
}
