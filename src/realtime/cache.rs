//! The tokens that can be handed out, and those that are being minted.
//!
//! Why this is no [`CredentialStore`](crate::CredentialStore) whose source is the minting call, which has single flight
//! and a cool-down too:
//!
//! * A store keeps its credential current as long as it lives. Tokens would be minted every minute for each application
//!   that anybody has ever asked for, and each would have a task of its own.
//! * A store counts the life of a credential by the token's own claims, which fal documents nowhere. Here it counts from
//!   before the call, by the life that was asked for.
//! * A source's error becomes a [`SourceError`](crate::SourceError), which keeps its text only. The typed refusal would
//!   be lost to those who wait.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{app::App, error::MintError, token::Token};

/// How long a failure answers those who ask again, so that fal is not called once for each of them.
const FAILURE_KEPT: Duration = Duration::from_secs(1);

/// The applications that a token is for, in order and each once.
pub(super) type Apps = Arc<[App]>;

/// A token, and until when it may be handed out.
#[derive(Clone, Debug)]
pub(super) struct Minted {
    pub(super) token: Token,
    pub(super) until: Instant,
}

type Outcome = Result<Minted, MintError>;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    entries: Arc<Mutex<HashMap<Apps, Entry>>>,
    max_entries: usize,
}

#[derive(Debug)]
enum Entry {
    /// The sender is in the task that mints.
    Minting(watch::Receiver<Option<Outcome>>),
    Ready(Minted),
    Failed(MintError, Instant),
}

impl Entry {
    fn is_current(&self, now: Instant) -> bool {
        match self {
            // Without a sender the task has ended too early.
            Self::Minting(outcome) => outcome.has_changed().is_ok(),
            Self::Ready(minted) => now < minted.until,
            Self::Failed(_, until) => now < *until,
        }
    }
}

impl Cache {
    pub(super) fn new(max_entries: usize) -> Self {
        Self { entries: Arc::default(), max_entries }
    }

    /// The token for these applications, if need be a new one. Whoever asks while one is being minted waits for that.
    ///
    /// The call runs in a task of its own, so it goes on when those who wait for it go away.
    pub(super) async fn get<M, F>(&self, apps: Apps, mint: M) -> Result<Token, MintError>
    where
        M: Fn(Apps) -> F,
        F: Future<Output = Outcome> + Send + 'static,
    {
        loop {
            let mut outcome = match self.look_up(&apps, &mint)? {
                Found::Ready(token) => return Ok(token),
                Found::Minting(outcome) => outcome,
            };
            let outcome = match outcome.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone(),
                Err(_) => None,
            };
            let Minted { token, until } = outcome.unwrap_or(Err(MintError::Interrupted))?;
            // This task may have been kept from running for a long time.
            if Instant::now() < until {
                return Ok(token);
            }
        }
    }

    fn look_up<M, F>(&self, apps: &Apps, mint: &M) -> Result<Found, MintError>
    where
        M: Fn(Apps) -> F,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let now = Instant::now();
        let mut entries = self.lock();
        match entries.get(apps).filter(|entry| entry.is_current(now)) {
            Some(Entry::Ready(minted)) => return Ok(Found::Ready(minted.token.clone())),
            Some(Entry::Minting(outcome)) => return Ok(Found::Minting(outcome.clone())),
            Some(Entry::Failed(error, _)) => return Err(error.clone()),
            None => {}
        }
        make_room(&mut entries, self.max_entries, now)?;
        let (sender, outcome) = watch::channel(None);
        entries.insert(Arc::clone(apps), Entry::Minting(outcome.clone()));
        let (cache, apps, minting) = (self.clone(), Arc::clone(apps), mint(Arc::clone(apps)));
        tokio::spawn(async move {
            let outcome = minting.await;
            let entry = match &outcome {
                Ok(minted) => Entry::Ready(minted.clone()),
                Err(error) => Entry::Failed(error.clone(), Instant::now() + FAILURE_KEPT),
            };
            cache.lock().insert(apps, entry);
            sender.send_replace(Some(outcome));
        });
        Ok(Found::Minting(outcome))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Apps, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().len()
    }
}

enum Found {
    Ready(Token),
    Minting(watch::Receiver<Option<Outcome>>),
}

/// Removes what is of no use any more, and then, if there is still no room for another entry, the one that would be of no
/// use the soonest.
fn make_room(entries: &mut HashMap<Apps, Entry>, max_entries: usize, now: Instant) -> Result<(), MintError> {
    entries.retain(|_, entry| entry.is_current(now));
    if entries.len() < max_entries {
        return Ok(());
    }
    let ends = |entry: &Entry| match entry {
        // Those who wait for it are told what comes of it.
        Entry::Minting(_) => None,
        Entry::Ready(Minted { until, .. }) | Entry::Failed(_, until) => Some(*until),
    };
    let soonest = entries.iter().filter_map(|(apps, entry)| Some((ends(entry)?, apps))).min();
    let apps = Arc::clone(soonest.ok_or(MintError::Busy)?.1);
    entries.remove(&apps);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::Poll,
        time::SystemTime,
    };

    use tokio::sync::Semaphore;

    use super::*;

    const WINDOW: Duration = Duration::from_secs(60);

    /// A fal that mints when there is a permit.
    #[derive(Clone)]
    struct Fal {
        calls: Arc<AtomicUsize>,
        permits: Arc<Semaphore>,
        failures: Arc<AtomicUsize>,
    }

    impl Fal {
        fn new(permits: usize) -> Self {
            Self { calls: Arc::default(), permits: Arc::new(Semaphore::new(permits)), failures: Arc::default() }
        }

        fn calls(&self) -> usize {
            self.calls.load(Ordering::SeqCst)
        }

        async fn token(&self, cache: &Cache, app: &str) -> Result<String, MintError> {
            let apps: Apps = [App::parse(app).unwrap()].into();
            let token = cache.get(apps, |_| self.clone().mint()).await?;
            Ok(token.expose_secret().to_owned())
        }

        async fn mint(self) -> Outcome {
            let number = self.calls.fetch_add(1, Ordering::SeqCst);
            self.permits.acquire().await.unwrap().forget();
            if self.failures.load(Ordering::SeqCst) > number {
                return Err(MintError::NoToken);
            }
            let token = Token::new(number.to_string().into(), Duration::from_secs(120), SystemTime::UNIX_EPOCH);
            Ok(Minted { token, until: Instant::now() + WINDOW })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_gets_one_token_until_its_window_ends() {
        let (fal, cache) = (Fal::new(9), Cache::new(9));
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "0");
        tokio::time::advance(WINDOW - Duration::from_millis(1)).await;
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "0");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "1");
        assert_eq!(fal.token(&cache, "a/c").await.unwrap(), "2");
    }

    #[tokio::test]
    async fn a_call_goes_on_when_nobody_waits_for_it() {
        let (fal, cache) = (Fal::new(0), Cache::new(9));
        {
            let mut waiting = tokio_test::task::spawn(fal.token(&cache, "a/b"));
            assert!(waiting.poll().is_pending());
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(fal.calls(), 1);
        fal.permits.add_permits(1);
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "0");
        assert_eq!(fal.calls(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_answers_all_who_ask_within_a_second() {
        let (fal, cache) = (Fal::new(9), Cache::new(9));
        fal.failures.store(1, Ordering::SeqCst);
        let [first, second] = [fal.token(&cache, "a/b"), fal.token(&cache, "a/b")];
        let (first, second) = tokio::join!(first, second);
        assert!(matches!((first, second), (Err(MintError::NoToken), Err(MintError::NoToken))));
        assert!(fal.token(&cache, "a/b").await.is_err());
        assert_eq!(fal.calls(), 1);
        tokio::time::advance(FAILURE_KEPT).await;
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn the_token_that_ends_the_soonest_makes_room() {
        let (fal, cache) = (Fal::new(9), Cache::new(2));
        for app in ["a/1", "a/2", "a/3"] {
            fal.token(&cache, app).await.unwrap();
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(cache.len() <= 2);
        }
        assert_eq!(fal.token(&cache, "a/2").await.unwrap(), "1");
        assert_eq!(fal.token(&cache, "a/1").await.unwrap(), "3");
        // What has ended does not wait for its place to be needed.
        tokio::time::advance(WINDOW).await;
        fal.token(&cache, "a/1").await.unwrap();
        assert_eq!(cache.len(), 1);
    }

    #[tokio::test]
    async fn no_more_calls_run_than_there_is_room_for() {
        let (fal, cache) = (Fal::new(0), Cache::new(1));
        let mut waiting = tokio_test::task::spawn(fal.token(&cache, "a/1"));
        assert!(waiting.poll().is_pending());
        // It would wait for a permit, and not be refused.
        assert!(matches!(tokio_test::task::spawn(fal.token(&cache, "a/2")).poll(), Poll::Ready(Err(MintError::Busy))));
        fal.permits.add_permits(1);
        waiting.await.unwrap();
        fal.permits.add_permits(1);
        fal.token(&cache, "a/2").await.unwrap();
    }

    #[tokio::test]
    async fn a_call_that_panics_is_an_error_and_the_next_one_is_made() {
        let (fal, cache) = (Fal::new(9), Cache::new(9));
        let apps: Apps = [App::parse("a/b").unwrap()].into();
        let panics = cache.get(apps, |_| async { panic!("on purpose") });
        assert!(matches!(panics.await, Err(MintError::Interrupted)));
        assert_eq!(fal.token(&cache, "a/b").await.unwrap(), "0");
    }
}
