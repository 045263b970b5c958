//! Which deliveries were handled already, and which are being handled.

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    future::Future,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;

use super::VerifiedWebhook;
use crate::{error::BoxError, events};

/// Where the ids of deliveries are kept, so that a repeat is known when it comes.
///
/// [`RecentIds`] keeps them in this process. A fleet whose replicas share a database implements the trait for that: one
/// replica may be handling a delivery when fal's patience ends and it sends the same one to another replica.
///
/// A delivery is known by its request id and its user id together. Only deliveries that were verified come here.
///
/// An implementation should bound the time that each call takes, as fal waits 15 s for its answer, and give a place that
/// was taken by [`begin`](Self::begin) up by itself after some minutes, as a replica may end without a word.
///
/// ```
/// use std::{collections::HashMap, sync::Mutex};
///
/// use tower_fal::{error::BoxError, webhook::{Seen, SeenIds, VerifiedWebhook}};
///
/// /// A table with one row for each delivery: `false` while it is being handled.
/// #[derive(Default)]
/// struct Table(Mutex<HashMap<String, bool>>);
///
/// fn key(webhook: &VerifiedWebhook) -> String {
///     format!("{} {}", webhook.user_id(), webhook.request_id()) // there are no blanks in ids
/// }
///
/// impl SeenIds for Table {
///     async fn begin(&self, webhook: &VerifiedWebhook) -> Result<Seen, BoxError> {
///         let mut rows = self.0.lock().map_err(|_| "the table is broken")?;
///         Ok(match rows.get(&key(webhook)) {
///             Some(true) => Seen::Handled,
///             Some(false) => Seen::BeingHandled,
///             None => {
///                 rows.insert(key(webhook), false); // with a database, in one statement with the question
///                 Seen::New
///             }
///         })
///     }
///
///     async fn handled(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
///         self.0.lock().map_err(|_| "the table is broken")?.insert(key(webhook), true);
///         Ok(())
///     }
///
///     async fn failed(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
///         self.0.lock().map_err(|_| "the table is broken")?.remove(&key(webhook));
///         Ok(())
///     }
/// }
/// ```
pub trait SeenIds: Send + Sync + 'static {
    /// A delivery has arrived. If it is new, it counts as being handled from now on, until one of the other two methods is
    /// called. The question and the note must be one step: of two deliveries at once, one is new.
    ///
    /// # Errors
    /// When it cannot be found out. The delivery is answered with 503, so that fal sends it again.
    fn begin(&self, webhook: &VerifiedWebhook) -> impl Future<Output = Result<Seen, BoxError>> + Send;

    /// The handler has answered a new delivery with a status of success: all that follow are repeats.
    ///
    /// # Errors
    /// When it cannot be noted. fal gets the handler's answer all the same, and the error is logged.
    fn handled(&self, webhook: &VerifiedWebhook) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// The handler has failed, has panicked, or its caller has gone: the next delivery is a new one again.
    ///
    /// # Errors
    /// When it cannot be noted. The error is logged.
    fn failed(&self, webhook: &VerifiedWebhook) -> impl Future<Output = Result<(), BoxError>> + Send;
}

/// What is known of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Seen {
    /// It was not handled yet, and it is the caller's to handle now.
    New,
    /// Another delivery with the same id is being handled at this moment.
    BeingHandled,
    /// A delivery with the same id was handled before.
    Handled,
}

/// The ids of the last deliveries, in the memory of this process.
///
/// An id takes about 100 bytes, however long it is, so that 100,000 of them (the default) take about 10 MiB. The oldest
/// one is forgotten first. What is being handled does not count, and is never forgotten.
pub struct RecentIds {
    ids: Mutex<Ids>,
    capacity: NonZeroUsize,
}

#[derive(Default)]
struct Ids {
    being_handled: HashSet<Id>,
    handled: HashSet<Id>,
    /// The handled ones, the oldest first.
    order: VecDeque<Id>,
}

/// A hash, so that a long id takes no more memory than a short one.
type Id = [u8; 32];

impl RecentIds {
    /// Remembers so many ids.
    #[must_use]
    pub fn new(capacity: NonZeroUsize) -> Self {
        Self { ids: Mutex::default(), capacity }
    }

    fn ids(&self) -> MutexGuard<'_, Ids> {
        // Nothing below can panic between two changes that belong together.
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RecentIds {
    fn default() -> Self {
        const CAPACITY: NonZeroUsize = NonZeroUsize::new(100_000).unwrap();
        Self::new(CAPACITY)
    }
}

fn id_of(webhook: &VerifiedWebhook) -> Id {
    let hash = Sha256::new().chain_update(webhook.user_id()).chain_update("\n").chain_update(webhook.request_id());
    hash.finalize().into()
}

impl SeenIds for RecentIds {
    async fn begin(&self, webhook: &VerifiedWebhook) -> Result<Seen, BoxError> {
        let id = id_of(webhook);
        let mut ids = self.ids();
        Ok(if ids.handled.contains(&id) {
            Seen::Handled
        } else if ids.being_handled.insert(id) {
            Seen::New
        } else {
            Seen::BeingHandled
        })
    }

    async fn handled(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
        let id = id_of(webhook);
        let mut ids = self.ids();
        ids.being_handled.remove(&id);
        if ids.handled.insert(id) {
            ids.order.push_back(id);
        }
        while ids.order.len() > self.capacity.get() {
            if let Some(oldest) = ids.order.pop_front() {
                ids.handled.remove(&oldest);
            }
        }
        Ok(())
    }

    async fn failed(&self, webhook: &VerifiedWebhook) -> Result<(), BoxError> {
        self.ids().being_handled.remove(&id_of(webhook));
        Ok(())
    }
}

impl fmt::Debug for RecentIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.ids();
        f.debug_struct("RecentIds")
            .field("capacity", &self.capacity)
            .field("handled", &ids.handled.len())
            .field("being_handled", &ids.being_handled.len())
            .finish()
    }
}

/// [`SeenIds`] without its type. Cheap to clone.
#[derive(Clone)]
pub(super) struct BoxSeenIds(Arc<dyn Erased>);

type Boxed<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

trait Erased: Send + Sync {
    fn begin(self: Arc<Self>, webhook: VerifiedWebhook) -> Boxed<Seen>;
    fn end(self: Arc<Self>, webhook: VerifiedWebhook, handled: bool) -> Boxed<()>;
}

impl<T: SeenIds> Erased for T {
    fn begin(self: Arc<Self>, webhook: VerifiedWebhook) -> Boxed<Seen> {
        Box::pin(async move { SeenIds::begin(&*self, &webhook).await })
    }

    fn end(self: Arc<Self>, webhook: VerifiedWebhook, handled: bool) -> Boxed<()> {
        Box::pin(async move { if handled { self.handled(&webhook).await } else { self.failed(&webhook).await } })
    }
}

impl BoxSeenIds {
    pub(super) fn new(ids: impl SeenIds) -> Self {
        Self(Arc::new(ids))
    }

    /// What is known of the delivery. If it is new, there is a place for it, which its handler has until it ends.
    pub(super) async fn begin(&self, webhook: &VerifiedWebhook) -> Result<Begun, BoxError> {
        let ids = Arc::clone(&self.0);
        let webhook = webhook.clone();
        // The place is made inside: a caller that goes away while a database answers leaves no delivery behind that
        // would be being handled for ever.
        let begun = async move {
            Ok(match Arc::clone(&ids).begin(webhook.clone()).await? {
                Seen::New => Begun::New(Place { ids, webhook: Some(webhook) }),
                Seen::BeingHandled => Begun::BeingHandled,
                Seen::Handled => Begun::Handled,
            })
        };
        ToItsEnd(Some(Box::pin(begun))).await
    }
}

impl fmt::Debug for BoxSeenIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeenIds")
    }
}

/// What [`SeenIds::begin`] said.
pub(super) enum Begun {
    New(Place),
    BeingHandled,
    Handled,
}

/// The right to handle a delivery. Dropping it gives the delivery free, whatever the reason was.
pub(super) struct Place {
    ids: Arc<dyn Erased>,
    webhook: Option<VerifiedWebhook>,
}

impl Place {
    /// The handler has answered: with success, or not.
    pub(super) async fn end(mut self, handled: bool) {
        self.note(handled).await;
    }

    fn note(&mut self, handled: bool) -> ToItsEnd<()> {
        let webhook = self.webhook.take();
        let note = webhook.map(|webhook| Arc::clone(&self.ids).end(webhook, handled));
        ToItsEnd(note.map(|note| {
            Box::pin(async move {
                if let Err(error) = note.await {
                    events::webhook::not_noted(&*error);
                }
            }) as _
        }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.note(false));
    }
}

/// A future that comes to its end also when nobody waits for it any more.
struct ToItsEnd<T: Send + 'static>(Option<Pin<Box<dyn Future<Output = T> + Send>>>);

impl<T: Send + 'static> Future for ToItsEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // It is only empty when it has ended.
        let Some(future) = &mut self.0 else { return Poll::Pending };
        let output = future.as_mut().poll(cx);
        if output.is_ready() {
            self.0 = None;
        }
        output
    }
}

impl<T: Send + 'static> Drop for ToItsEnd<T> {
    fn drop(&mut self) {
        let Some(mut future) = self.0.take() else { return };
        // What is in memory is noted at once, and needs no runtime. This may happen while a handler's panic unwinds, so
        // another panic must not leave it.
        let poll = || future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if !matches!(catch_unwind(AssertUnwindSafe(poll)), Ok(Poll::Pending)) {
            return;
        }
        // Without a runtime the process most likely ends, and a place in a database has to end by itself.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn(async move { drop(future.await) }));
        }
    }
}
