//! The two bodies: a request's, which can be sent again, and a refusal's, of which the start was read.

use bytes::{Buf, Bytes};

mod peeked;
mod replay;
#[cfg(test)]
mod script;

pub(crate) use self::{
    peeked::Peeked,
    replay::{Replay, ReplayMemory},
};
pub use self::{peeked::PeekedBody, replay::ReplayBody};

/// Without a copy if it is `Bytes` already.
pub(crate) fn into_bytes(mut data: impl Buf) -> Bytes {
    data.copy_to_bytes(data.remaining())
}
