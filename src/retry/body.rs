//! The two bodies: a request's, which can be sent again, and a refusal's, of which the start was read.

mod peeked;
mod replay;

pub(crate) use self::{
    peeked::Peeked,
    replay::{Replay, ReplayMemory},
};
pub use self::{peeked::PeekedBody, replay::ReplayBody};
