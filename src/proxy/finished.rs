use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::{in_flight::Permit, target::Target};
use crate::{
    caller::Caller,
    wire::header::{BILLABLE_UNITS, REQUEST_ID},
};

/// A request that went to fal and has ended, for those who meter: see [`on_finished`](super::FalProxy::on_finished).
#[derive(Clone, Debug)]
pub struct Finished {
    caller: Caller,
    method: Method,
    host: Box<str>,
    path: Box<str>,
    status: Option<StatusCode>,
    billable_units: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    complete: bool,
}

impl Finished {
    pub(super) fn new(caller: Caller, method: Method, target: &Target) -> Self {
        Self {
            caller,
            method,
            host: target.uri.host().unwrap_or_default().into(),
            path: target.path().into(),
            status: None,
            billable_units: None,
            request_id: None,
            complete: false,
        }
    }

    /// Who called.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The method: with `POST` endpoints are run and requests submitted, and with `GET` some are run too.
    #[must_use]
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The host that was called, such as `queue.fal.run`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path that was called, without its first slash: on the hosts that run models that is the endpoint, or a request
    /// that is followed.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.path
    }

    /// The status of fal's answer. `None` if there was no answer: the client left first, or the connection broke.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        self.status
    }

    /// What fal says that it bills: the header `x-fal-billable-units` of the answer.
    #[must_use]
    pub fn billable_units(&self) -> Option<&str> {
        self.billable_units.as_ref()?.to_str().ok()
    }

    /// fal's id of the request: the header `x-fal-request-id` of the answer.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_ref()?.to_str().ok()
    }

    /// Whether the whole answer was handed on. If not, the client left or the connection broke.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

/// Who is told.
#[derive(Clone)]
pub(super) struct OnFinished(pub(super) Arc<dyn Fn(&Finished) + Send + Sync>);

impl fmt::Debug for OnFinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnFinished")
    }
}

/// What is done when a request has ended, however it ends: this goes with it, and is dropped with it.
#[derive(Debug)]
pub(super) struct Finish {
    pub(super) permit: Option<Permit>,
    pub(super) report: Option<(OnFinished, Finished)>,
    /// Whether it went to fal, so that somebody is told.
    pub(super) is_sent: bool,
}

impl Finish {
    /// From now on fal may have it.
    pub(super) fn sent(this: &mut Option<Box<Self>>) {
        if let Some(finish) = this {
            finish.is_sent = true;
        }
    }

    /// There is an answer.
    pub(super) fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        if let Some((_, finished)) = &mut self.report {
            finished.status = Some(status);
            finished.billable_units = headers.get(BILLABLE_UNITS).cloned();
            finished.request_id = headers.get(REQUEST_ID).cloned();
        }
    }

    /// The whole answer was handed on.
    pub(super) fn completed(&mut self) {
        if let Some((_, finished)) = &mut self.report {
            finished.complete = true;
        }
    }
}

impl Drop for Finish {
    fn drop(&mut self) {
        // First, so that whoever is told can let the tenant send another one.
        self.permit = None;
        if let Some((OnFinished(tell), finished)) = self.report.as_ref().filter(|_| self.is_sent) {
            tell(finished);
        }
    }
}
