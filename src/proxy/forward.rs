//! What happens to one request, from its head to the head of its answer.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header::CACHE_CONTROL, request::Parts};
use http_body::Body;
use serde::Deserialize;
use tower_service::Service;

use super::{
    Upstream, answers,
    body::{ProxyBody, UploadBody, UploadTooLong},
    finished::{Finish, Finished, OnFinished},
    headers::{self, Forwarded},
    in_flight::InFlight,
    owners::Owners,
    target::{Area, Target, Targets},
    tokens::{self, Applications},
};
use crate::{
    answer::Answer,
    caller::{Caller, Callers},
    endpoint::{Endpoints, split_app},
    error::{BoxError, FalAuthError, Refusal, foreign},
    events,
    retry::{PeekedBody, ReplayBody},
    wire::header::REQUEST_ID,
};

/// How much of the answer to a submitted request is read for its id, in bytes. fal's have some 500.
const MAX_SUBMITTED: usize = 64 * 1024;

/// What the proxy does, apart from where it sends.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) targets: Targets,
    /// `None` is all.
    pub(super) endpoints: Option<Endpoints>,
    /// Those whose tokens are handed out.
    pub(super) realtime: Applications,
    pub(super) callers: Callers,
    pub(super) forwarded: Forwarded,
    pub(super) max_body: u64,
    pub(super) max_in_flight: Option<usize>,
    pub(super) in_flight: InFlight,
    pub(super) first_byte_timeout: Option<Duration>,
    pub(super) owners: Option<Owners>,
    pub(super) on_finished: Option<OnFinished>,
}

/// A request that may be sent.
struct Admitted {
    target: Target,
    caller: Caller,
    finish: Option<Box<Finish>>,
}

/// Answers one request.
///
/// An `async fn` has room for an argument twice, as an argument and as a variable of its body. This future is made for each
/// request, and allocators are quick up to 1 KiB. So it is a block, which has what it uses once, and the functions that it
/// waits for take references.
pub(super) fn serve<C, B, R>(
    config: Arc<Config>,
    upstream: Upstream<C>,
    request: Request<B>,
) -> impl Future<Output = Response<ProxyBody<R>>>
where
    C: Service<Request<ReplayBody<UploadBody<B>>>, Response = Response<R>> + Clone,
    C::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
    R: Body + Send + 'static,
    R::Error: Into<BoxError> + Send,
{
    let (mut head, body) = request.into_parts();
    // What comes with a GET is not forwarded.
    let mut body = (head.method != Method::GET && !body.is_end_stream()).then_some(body);
    async move {
        let mut response = config.answer(upstream, &mut head, &mut body).await.unwrap_or_else(Into::into);
        // All targets and all callers have one URL, by which a browser or a CDN would keep the answer for the others too.
        if head.method == Method::GET {
            response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        }
        response
    }
}

fn ours<R: Body>(answer: &Answer) -> Response<ProxyBody<R>> {
    answer.response(ProxyBody::ours)
}

/// A request that is not sent, and its answer.
enum Refused {
    Ours(Answer),
    /// By who authenticates.
    Theirs(crate::caller::Refused),
}

impl From<Answer> for Refused {
    fn from(answer: Answer) -> Self {
        Self::Ours(answer)
    }
}

impl<R: Body> From<Refused> for Response<ProxyBody<R>> {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Ours(answer) => ours(&answer),
            Refused::Theirs(response) => response.map(ProxyBody::refused),
        }
    }
}

impl Config {
    /// Sends the request if it may be sent, and makes our answer of fal's.
    async fn answer<C, B, R>(
        &self,
        mut upstream: Upstream<C>,
        head: &mut Parts,
        body: &mut Option<B>,
    ) -> Result<Response<ProxyBody<R>>, Refused>
    where
        C: Service<Request<ReplayBody<UploadBody<B>>>, Response = Response<R>> + Clone,
        C::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
        R: Body + Send + 'static,
        R::Error: Into<BoxError> + Send,
    {
        let size = body.as_ref().map(|body| body.size_hint().lower());
        let mut admitted = self.admit(head, size).await?;
        if admitted.target.area == Area::Tokens {
            return Ok(Box::pin(self.mint(upstream, &head.method, body.take(), admitted)).await?);
        }
        let remembers = self.owners.as_ref().filter(|_| admitted.target.is_queue() && head.method == Method::POST);
        ready::<_, Request<UploadBody<B>>>(&mut upstream).await?;
        let response = {
            let sent = pin!(upstream.call_once(self.request(head, body.take(), admitted.target, &admitted.caller)));
            self.head(sent, &mut admitted.finish).await?
        };
        let (head, body) = response.into_parts();
        let body = match remembers {
            Some(owners) if head.status.is_success() => {
                Box::pin(remember(owners, &head.headers, body, &admitted.caller, admitted.finish)).await
            }
            _ => ProxyBody::fals(body, admitted.finish),
        };
        Ok(fals(head, body))
    }

    /// Decides whether a request is sent. Nothing of its body is read: `size` is what that has at least, if there is one.
    async fn admit(&self, head: &Parts, size: Option<u64>) -> Result<Admitted, Refused> {
        if !matches!(head.method, Method::GET | Method::POST | Method::PUT) {
            return Err(answers::METHOD.into());
        }
        let target = self.targets.judge(&head.headers)?;
        self.callers.check_host(head)?;
        let caller = self.callers.admit(head).await.map_err(Refused::Theirs)?;
        if target.area == Area::Endpoints {
            self.check_endpoint(&head.method, &target, &caller)?;
            if let Some(owners) = &self.owners
                && !owners.own_all_in(target.path(), &caller).await
            {
                return Err(answers::NOT_THEIRS.into());
            }
        }
        if let Some(size) = size {
            if !headers::say_json(&head.headers) {
                return Err(answers::NOT_JSON.into());
            }
            // HTTP/2 has both, and they may differ.
            if headers::content_length(&head.headers).unwrap_or(0).max(size) > self.max_body {
                return Err(answers::TOO_LONG.into());
            }
        }
        let finish = self.enter(&head.method, &target, &caller)?;
        Ok(Admitted { target, caller, finish })
    }

    fn check_endpoint(&self, method: &Method, target: &Target, caller: &Caller) -> Result<(), Answer> {
        let covers = |endpoints: &Endpoints| {
            endpoints.covers(target.path())
                || (target.is_queue()
                    && followed_app(method, target.path()).is_some_and(|app| endpoints.covers_app(app)))
        };
        if !self.endpoints.as_ref().is_none_or(covers) {
            Err(answers::ENDPOINT)
        } else if !caller.own_endpoints().is_none_or(covers) {
            Err(answers::ENDPOINT_OF_CALLER)
        } else {
            Ok(())
        }
    }

    /// What is done when the request has ended; nothing, as a rule.
    fn enter(&self, method: &Method, target: &Target, caller: &Caller) -> Result<Option<Box<Finish>>, Answer> {
        let enter = |most| self.in_flight.enter(caller.shared_name().cloned(), most).ok_or(answers::TOO_MANY);
        let permit = caller.own_max_in_flight().or(self.max_in_flight).map(enter).transpose()?;
        let told = self.on_finished.clone();
        let report = told.map(|tell| (tell, Finished::new(caller.clone(), method.clone(), target)));
        Ok((permit.is_some() || report.is_some()).then(|| Box::new(Finish { permit, report, is_sent: false })))
    }

    /// Our own request, made of a client's.
    fn request<B>(&self, head: &mut Parts, body: Option<B>, target: Target, caller: &Caller) -> Request<UploadBody<B>> {
        let body = match body {
            Some(body) => UploadBody::theirs(body, self.max_body),
            None => UploadBody::ours(Bytes::new()),
        };
        let mut headers = std::mem::take(&mut head.headers);
        self.forwarded.to_fal(&mut headers);
        request(head.method.clone(), target, headers, caller, body)
    }

    /// Asks fal for a realtime token in the client's place.
    async fn mint<C, B, R>(
        &self,
        mut upstream: Upstream<C>,
        method: &Method,
        body: Option<B>,
        admitted: Admitted,
    ) -> Result<Response<ProxyBody<R>>, Answer>
    where
        C: Service<Request<ReplayBody<UploadBody<B>>>, Response = Response<R>> + Clone,
        C::Error: Into<BoxError>,
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
        R: Body + Send + 'static,
        R::Error: Into<BoxError> + Send,
    {
        let Admitted { target, caller, mut finish } = admitted;
        let endpoint = tokens::endpoint(&target).filter(|_| *method == Method::POST).ok_or(answers::NOT_POST)?;
        let asked = tokens::read_asked(body).await?;
        let body = UploadBody::ours(self.realtime.rewrite(endpoint, &asked, &caller)?);
        ready::<_, Request<UploadBody<B>>>(&mut upstream).await?;
        let sent = upstream.call_once(request(Method::POST, target, tokens::headers(), &caller, body));
        let (head, body) = self.head(pin!(sent), &mut finish).await?.into_parts();
        if !head.status.is_success() {
            return Ok(fals(head, ProxyBody::fals(body, finish)));
        }
        let response = tokens::answer(endpoint, body).await;
        if let Some(finish) = &mut finish {
            finish.completed();
        }
        Ok(response)
    }

    /// Waits for the head of the answer.
    async fn head<F, R>(&self, sent: Pin<&mut F>, finish: &mut Option<Box<Finish>>) -> Result<Response<R>, Answer>
    where
        F: Future<Output = Result<Response<R>, FalAuthError>>,
    {
        Finish::sent(finish);
        let answer = match self.first_byte_timeout {
            None => sent.await,
            Some(limit) => Box::pin(tokio::time::timeout(limit, sent)).await.map_err(|_| answers::TIMED_OUT)?,
        };
        let answer = match answer {
            // Nobody asked for another protocol.
            Ok(response) if response.status().is_informational() => Err(answers::BROKEN),
            answer => answer.map_err(|error| unanswered(&error)),
        };
        if let Some(finish) = finish {
            match &answer {
                Ok(response) => finish.answered(response.status(), response.headers()),
                // Nobody is told of a request of which nothing was sent.
                Err(answers::NO_CREDENTIAL | answers::NOT_CONNECTED) => finish.is_sent = false,
                Err(_) => {}
            }
        }
        answer
    }
}

/// Waits until the client can send. Nothing was sent if it cannot.
async fn ready<S, T>(service: &mut S) -> Result<(), Answer>
where
    S: Service<T, Error = FalAuthError>,
{
    poll_fn(|cx| service.poll_ready(cx)).await.map_err(|error| {
        events::answered(answers::NOT_CONNECTED.status, answers::NOT_CONNECTED.rule, &error);
        answers::NOT_CONNECTED
    })
}

/// Our own request. It is made anew: of the client's nothing goes along that is not named here.
fn request<B>(method: Method, target: Target, headers: HeaderMap, caller: &Caller, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = target.uri;
    *request.headers_mut() = headers;
    if let Some(credential) = caller.own_credential() {
        request.extensions_mut().insert(credential.clone());
    }
    request
}

/// Notes who has submitted a request to the queue, and returns the body of the answer, which has been read for its id.
async fn remember<R: Body>(
    owners: &Owners,
    headers: &HeaderMap,
    body: PeekedBody<R>,
    caller: &Caller,
    finish: Option<Box<Finish>>,
) -> ProxyBody<R> {
    let (body, start) = ProxyBody::read_fals(body, MAX_SUBMITTED, finish).await;
    let in_header = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let in_body = serde_json::from_slice(&start).ok().map(|Submitted { request_id }| request_id);
    // The queue has made the one in the body. The other one may be what the client itself has sent.
    if let Some(id) = in_body.or_else(|| in_header.map(str::to_owned)) {
        owners.remember(&id, caller).await;
    }
    body
}

/// fal's answer, as a client gets it.
fn fals<R: Body>(mut head: http::response::Parts, body: ProxyBody<R>) -> Response<ProxyBody<R>> {
    headers::clean(&mut head.headers);
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    // For layers around the proxy; extensions do not leave the server.
    if let Some(refusal) = head.extensions.remove::<Refusal>() {
        response.extensions_mut().insert(refusal);
    }
    response
}

/// The answer to a request that has none of fal's.
fn unanswered(error: &FalAuthError) -> Answer {
    let answer = match error {
        FalAuthError::NoCredential => return answers::NO_CREDENTIAL,
        FalAuthError::Transport(error) if foreign::causes(&**error).any(|cause| cause.is::<UploadTooLong>()) => {
            return answers::TOO_LONG;
        }
        FalAuthError::Transport(error) if foreign::was_not_connected(&**error) => answers::NOT_CONNECTED,
        _ => answers::BROKEN,
    };
    events::answered(answer.status, answer.rule, error);
    answer
}

/// The app whose request is followed, if that is what a request to the queue does: its status (once, or as a stream), its
/// result, its cancellation.
///
/// Source: `@fal-ai/client` 1.10.1 (`queue.ts`).
fn followed_app<'a>(method: &Method, path: &'a str) -> Option<&'a str> {
    let (app, rest) = split_app(path)?;
    let (id, action) = match rest?.strip_prefix("requests/")?.split_once('/') {
        Some((id, action)) => (id, action),
        None => (rest?.strip_prefix("requests/")?, ""),
    };
    let follows = match action.strip_suffix('/').unwrap_or(action) {
        "" | "status" | "status/stream" => *method == Method::GET,
        "cancel" => *method == Method::PUT,
        _ => false,
    };
    (follows && !id.is_empty()).then_some(app)
}

/// The part of the queue's answer to a submitted request that says how to follow it.
#[derive(Deserialize)]
struct Submitted {
    request_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follow_up_belongs_to_an_app() {
        let (get, put) = (Method::GET, Method::PUT);
        for (method, path, app) in [
            (&get, "fal-ai/flux/requests/1", Some("fal-ai/flux")),
            (&get, "fal-ai/flux/requests/1/", Some("fal-ai/flux")),
            (&get, "fal-ai/flux/requests/1/status", Some("fal-ai/flux")),
            (&get, "fal-ai/flux/requests/1/status/stream", Some("fal-ai/flux")),
            (&put, "fal-ai/flux/requests/1/cancel", Some("fal-ai/flux")),
            (&get, "workflows/me/cats/requests/1/status", Some("workflows/me/cats")),
            (&get, "comfy/me/cats/requests/1", Some("comfy/me/cats")),
            (&put, "fal-ai/flux/requests/1", None),
            (&get, "fal-ai/flux/requests/1/cancel", None),
            (&get, "fal-ai/flux/requests", None),
            (&get, "fal-ai/flux/requests/", None),
            (&get, "fal-ai/flux/requests/1/other", None),
            (&get, "fal-ai/flux/dev/requests/1", None),
            (&get, "fal-ai/flux", None),
            (&get, "workflows/me/requests/1", None),
            (&Method::POST, "fal-ai/flux/requests/1", None),
        ] {
            assert_eq!(followed_app(method, path), app, "{method} {path}");
        }
    }
}
