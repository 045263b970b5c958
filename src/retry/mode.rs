use http::Response;
use http_body::Body;

use super::body::PeekedBody;
use crate::error::{FalAuthError, Refusal};

/// What becomes of a refusal in the end: [`Typed`] or [`Passthrough`].
///
/// It is in the type, so that by default the response's body is the inner service's own.
pub trait Mode: sealed::Mode {}

/// A refusal is a [`FalAuthError`]. The default.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Typed;

/// A refusal is a response: see [`FalRetryLayer::passthrough`](super::FalRetryLayer::passthrough).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Passthrough;

impl Mode for Typed {}
impl Mode for Passthrough {}

pub(super) mod sealed {
    use super::{Body, FalAuthError, PeekedBody, Refusal, Response};

    #[allow(unnameable_types)] // which is what seals it
    pub trait Mode: Send + Sync + 'static {
        /// The body of a response, where `R` is that of the inner service's.
        type Body<R: Body>;

        /// Whether a final refusal is returned as the response it came in.
        const RETURNS_RESPONSE: bool;

        fn not_refused<R: Body>(response: Response<R>) -> Response<Self::Body<R>>;

        fn refused<R: Body>(
            refusal: Refusal,
            response: Response<PeekedBody<R>>,
        ) -> Result<Response<Self::Body<R>>, FalAuthError>;
    }
}

impl sealed::Mode for Typed {
    type Body<R: Body> = R;
    const RETURNS_RESPONSE: bool = false;

    fn not_refused<R: Body>(response: Response<R>) -> Response<R> {
        response
    }

    fn refused<R: Body>(refusal: Refusal, _: Response<PeekedBody<R>>) -> Result<Response<R>, FalAuthError> {
        Err(refusal.into())
    }
}

impl sealed::Mode for Passthrough {
    type Body<R: Body> = PeekedBody<R>;
    const RETURNS_RESPONSE: bool = true;

    fn not_refused<R: Body>(response: Response<R>) -> Response<PeekedBody<R>> {
        response.map(PeekedBody::whole)
    }

    fn refused<R: Body>(
        refusal: Refusal,
        mut response: Response<PeekedBody<R>>,
    ) -> Result<Response<PeekedBody<R>>, FalAuthError> {
        response.extensions_mut().insert(refusal);
        Ok(response)
    }
}
