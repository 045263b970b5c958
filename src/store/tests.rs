//! What needs the private clock: tokens that expire. The rest is in `tests/it/store.rs`.

use std::{
    ops::RangeInclusive,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::FutureExt as _;
use tokio::time::Instant;
use tokio_test::{assert_pending, task};

use super::{evidence::Witness as _, *};
use crate::{
    error::{BoxError, LockReason, SourceErrorKind},
    source::{LoadReason, from_fn_with},
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);
/// The longest wait before a source is asked again, which is a minute and a fifth. Timers round up.
const LONGEST_WAIT: Duration = Duration::from_millis(72_002);

/// Brings tokens, and keeps the time: its wall clock follows Tokio's, which a test pauses.
#[derive(Clone)]
struct Issuer {
    start: Instant,
    jumped: Arc<AtomicU64>,
    brings: Arc<Mutex<Brings>>,
    loads: Arc<Mutex<Vec<Instant>>>,
}

#[derive(Clone)]
enum Brings {
    /// Another token each time, with this much left to live.
    Fresh(Duration),
    /// Another token each time, that has expired already.
    Stale,
    /// The same token each time.
    Same(Credential),
    Nothing,
}

impl Issuer {
    fn new(brings: Brings) -> Self {
        Self {
            start: Instant::now(),
            jumped: Arc::default(),
            brings: Arc::new(Mutex::new(brings)),
            loads: Arc::default(),
        }
    }

    /// A store with a `refresh_before` of 5 min, on this source and this clock.
    async fn store(&self, every: Option<Duration>) -> CredentialStore {
        let source = from_fn_with("issuer", every, self.clone(), async |issuer: Self| {
            if issuer.loads() > 10_000 {
                std::future::pending::<()>().await; // a hot loop is to fail a test, not to keep it from its end
            }
            Ok(issuer.load()?)
        });
        let clock = self.clone();
        let builder = CredentialStore::builder(source).clock(Clock::new(move || clock.now()));
        let store = builder.refresh_before(Duration::from_secs(300)).build().await.unwrap();
        tokio::task::yield_now().await; // the driver looks at the first token
        store
    }

    fn now(&self) -> SystemTime {
        let jumped = Duration::from_secs(self.jumped.load(Ordering::SeqCst));
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + self.start.elapsed() + jumped
    }

    /// As after a night's sleep: the wall clock is ahead of what the timers have seen.
    fn jump(&self, ahead: Duration) {
        self.jumped.fetch_add(ahead.as_secs(), Ordering::SeqCst);
    }

    fn brings(&self, brings: Brings) {
        *self.brings.lock().unwrap() = brings;
    }

    fn load(&self) -> Result<Option<Credential>, SourceError> {
        let number = {
            let mut loads = self.loads.lock().unwrap();
            loads.push(Instant::now());
            loads.len()
        };
        Ok(match self.brings.lock().unwrap().clone() {
            Brings::Fresh(life) => Some(token(number, self.now() + life)),
            Brings::Stale => Some(token(number, self.now() - HOUR)),
            Brings::Same(token) => Some(token),
            Brings::Nothing => None,
        })
    }

    fn loads(&self) -> usize {
        self.loads.lock().unwrap().len()
    }

    /// The seconds between the loads, from load number `first` on.
    fn gaps(&self, first: usize) -> Vec<f64> {
        let loads = self.loads.lock().unwrap();
        loads[first..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
    }
}

/// Nobody checks its signature.
fn token(number: usize, expiry: SystemTime) -> Credential {
    let expiry = expiry.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"jti":{number},"exp":{expiry:.3}}}"#));
    Credential::bearer(format!("e30.{claims}.signature")).unwrap()
}

/// Timers tick in milliseconds and never fire early.
#[track_caller]
fn assert_within(gap: f64, allowed: RangeInclusive<f64>) {
    let allowed = allowed.start() - 0.002..=allowed.end() + 0.002;
    assert!(allowed.contains(&gap), "{gap} s is not in {allowed:?}");
}

#[track_caller]
fn assert_doubling(gaps: &[f64]) {
    let doubling = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0].into_iter().chain(std::iter::repeat(60.0));
    assert!(gaps.len() >= 8, "only {} gaps", gaps.len());
    for (gap, about) in gaps.iter().zip(doubling) {
        assert_within(*gap, about * 0.8..=about * 1.2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_is_refreshed_ahead_of_its_expiry_and_once() {
    let issuer = Issuer::new(Brings::Fresh(HOUR));
    let store = issuer.store(None).await;
    tokio::time::sleep(100 * HOUR).await;
    let gaps = issuer.gaps(0);
    assert!(gaps.len() >= 100, "only {} refreshes", gaps.len());
    for gap in &gaps {
        assert_within(*gap, 3240.0..=3300.0); // 6 to 5 min ahead
    }
    assert!(gaps.iter().any(|gap| *gap < 3260.0) && gaps.iter().any(|gap| *gap > 3280.0), "not spread: {gaps:?}");
    assert_eq!(usize::try_from(store.generation().get()).unwrap(), issuer.loads());
    assert!(store.status().expires_at.unwrap() > issuer.now());
}

#[tokio::test(start_paused = true)]
async fn a_token_is_not_refreshed_in_the_first_half_of_its_life() {
    let issuer = Issuer::new(Brings::Fresh(60 * SECOND));
    let _store = issuer.store(None).await;
    tokio::time::sleep(HOUR).await;
    let gaps = issuer.gaps(0);
    assert!(gaps.len() >= 100, "only {} refreshes", gaps.len());
    for gap in gaps {
        assert_within(gap, 30.0..=30.0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_lives_a_second_makes_no_hot_loop() {
    let issuer = Issuer::new(Brings::Fresh(SECOND));
    let _store = issuer.store(None).await;
    tokio::time::sleep(60 * SECOND).await;
    assert!((60..=121).contains(&issuer.loads()), "{} loads in a minute", issuer.loads());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_keeps_its_token_is_not_asked_in_a_hurry() {
    let issuer = Issuer::new(Brings::Nothing);
    issuer.brings(Brings::Same(token(0, issuer.now() + HOUR)));
    let store = issuer.store(None).await;
    tokio::time::sleep(HOUR - SECOND).await;
    assert_within(issuer.gaps(0)[0], 3240.0..=3300.0);
    // Once a minute, and after half of the time that is left when that is less.
    let mut left = 3600.0 - issuer.gaps(0)[0];
    for gap in issuer.gaps(1) {
        let about = f64::clamp(left / 2.0, 1.0, 60.0);
        assert_within(gap, about * 0.8..=about * 1.2);
        left -= gap;
    }
    assert!((8..=18).contains(&issuer.loads()), "{} loads", issuer.loads());
    assert!(store.status().last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_source_with_an_expired_token_is_asked_less_and_less() {
    let issuer = Issuer::new(Brings::Nothing);
    issuer.brings(Brings::Same(token(0, issuer.now() + HOUR)));
    let store = issuer.store(None).await;
    tokio::time::sleep(HOUR + Duration::from_millis(1)).await;
    let first = issuer.loads();
    tokio::time::sleep(HOUR).await;
    assert_doubling(&issuer.gaps(first));

    // Past its expiry it goes out all the same: fal's clock decides.
    assert!(store.load().credential().is_expired_at(issuer.now()));
    let status = store.status();
    assert_eq!((status.generation.get(), status.last_error.is_none()), (1, true));
    assert_eq!(store.reload().await.unwrap(), Reloaded::Unchanged(store.generation()));

    issuer.brings(Brings::Fresh(HOUR));
    let loads = issuer.loads();
    tokio::time::sleep(LONGEST_WAIT).await;
    assert_eq!((store.generation().get(), issuer.loads()), (2, loads + 1));
    tokio::time::sleep(Duration::from_secs(3200)).await;
    assert_eq!(issuer.loads(), loads + 1);
}

#[tokio::test(start_paused = true)]
async fn a_polled_source_that_keeps_its_token_is_only_polled() {
    let issuer = Issuer::new(Brings::Nothing);
    issuer.brings(Brings::Same(token(0, issuer.now() + HOUR)));
    let _store = issuer.store(Some(10 * SECOND)).await;
    tokio::time::sleep(HOUR - SECOND).await;
    let short = issuer.gaps(0).iter().filter(|gap| **gap < 7.998).count();
    // The one at which the refresh is due, and in the last 20 s a wait is half of the time that is left.
    assert!(short <= 8, "{short} gaps are shorter than the interval");
}

#[tokio::test(start_paused = true)]
async fn a_failed_refresh_is_tried_again_also_without_an_interval() {
    let issuer = Issuer::new(Brings::Fresh(HOUR));
    let store = issuer.store(None).await;
    issuer.brings(Brings::Nothing);
    assert!(store.reload().await.is_err()); // which does not put the refresh off
    tokio::time::sleep(2 * HOUR).await;
    assert_within(issuer.gaps(0).iter().take(2).sum(), 3240.0..=3300.0);
    assert_doubling(&issuer.gaps(2));
    assert_eq!(store.status().last_error.unwrap().kind(), SourceErrorKind::NotFound);

    issuer.brings(Brings::Fresh(HOUR));
    tokio::time::sleep(LONGEST_WAIT).await;
    assert_eq!((store.generation().get(), store.status().consecutive_failures), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_come_expired_are_asked_for_less_and_less_often() {
    let issuer = Issuer::new(Brings::Stale);
    let store = issuer.store(None).await;
    tokio::time::sleep(HOUR).await;
    assert_doubling(&issuer.gaps(1));
    issuer.brings(Brings::Fresh(HOUR));
    tokio::time::sleep(LONGEST_WAIT).await;
    assert!(!store.load().credential().is_expired_at(issuer.now()));
}

#[tokio::test(start_paused = true)]
async fn an_expired_token_never_replaces_one_that_is_not() {
    let issuer = Issuer::new(Brings::Fresh(HOUR));
    let store = issuer.store(None).await;
    issuer.brings(Brings::Stale);
    assert!(
        matches!(store.reload().await, Err(ReloadError::Failed(error)) if error.kind() == SourceErrorKind::Invalid)
    );
    assert_eq!(store.generation().get(), 1);
    issuer.jump(HOUR); // nothing is lost now
    assert!(matches!(store.reload().await, Ok(Reloaded::Changed(_))));
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_that_jumps_ahead_is_noticed_in_30_s() {
    let issuer = Issuer::new(Brings::Fresh(24 * HOUR));
    let store = issuer.store(None).await;
    tokio::time::sleep(HOUR).await;
    for generation in 2..10 {
        issuer.jump(24 * HOUR);
        tokio::time::sleep(30 * SECOND + Duration::from_millis(2)).await;
        assert_eq!(store.generation().get(), generation);
        assert!(!store.load().credential().is_expired_at(issuer.now()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_expires_is_refreshed_ahead_of_its_expiry() {
    let issuer = Issuer::new(Brings::Same(Credential::key("id:secret").unwrap()));
    let store = issuer.store(None).await;
    tokio::time::sleep(100 * HOUR).await;
    assert_eq!(issuer.loads(), 1);

    store.replace(token(1, issuer.now() + HOUR));
    issuer.brings(Brings::Fresh(HOUR));
    tokio::time::sleep(Duration::from_secs(3239)).await;
    assert_eq!((store.generation().get(), issuer.loads()), (2, 1));
    tokio::time::sleep(62 * SECOND).await;
    assert_eq!((store.generation().get(), issuer.loads()), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_does_not_expire_is_not_refreshed() {
    let issuer = Issuer::new(Brings::Fresh(HOUR));
    let store = issuer.store(None).await;
    store.replace(Credential::key("id:secret").unwrap());
    tokio::time::sleep(100 * HOUR).await;
    assert_eq!((store.generation().get(), issuer.loads()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_replacement_does_not_wait_for_a_backoff_before_it() {
    let issuer = Issuer::new(Brings::Nothing);
    issuer.brings(Brings::Same(token(0, issuer.now() + HOUR)));
    let store = issuer.store(None).await;
    tokio::time::sleep(2 * HOUR).await; // it is asked once a minute by now
    store.replace(token(1, issuer.now() + 20 * SECOND));
    issuer.brings(Brings::Fresh(HOUR));
    tokio::time::sleep(11 * SECOND).await;
    assert_eq!(store.generation().get(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_polled_token_is_refreshed_between_two_polls() {
    let issuer = Issuer::new(Brings::Nothing);
    issuer.brings(Brings::Same(token(0, issuer.now() + HOUR)));
    let store = issuer.store(Some(10 * HOUR)).await;
    tokio::time::sleep(Duration::from_secs(3302)).await;
    let loads = issuer.loads();
    assert!(loads >= 2, "not asked ahead of the expiry");
    issuer.brings(Brings::Fresh(30 * HOUR));
    tokio::time::sleep(HOUR).await;
    assert_eq!((store.generation().get(), issuer.loads()), (2, loads + 1));
}

/// What a source was told, for each load.
#[derive(Clone, Debug, PartialEq)]
enum Heard {
    Poll,
    Expiring(String),
    Refused(String),
}

/// A login: it hands out its token until it is told that it expires or was refused.
#[derive(Clone)]
struct Renewing {
    issuer: Issuer,
    token: Arc<Mutex<Option<Credential>>>,
    heard: Arc<Mutex<Vec<Heard>>>,
    every: Option<Duration>,
    held: Arc<tokio::sync::Mutex<()>>,
}

impl Renewing {
    fn new(every: Option<Duration>) -> Self {
        let issuer = Issuer::new(Brings::Fresh(HOUR));
        Self { issuer, token: Arc::default(), heard: Arc::default(), every, held: Arc::default() }
    }

    async fn store(&self) -> CredentialStore {
        let clock = self.issuer.clone();
        let builder = CredentialStore::builder(self.clone()).clock(Clock::new(move || clock.now()));
        let store = builder.build().await.unwrap();
        tokio::task::yield_now().await; // the driver looks at the first token
        store
    }

    fn renew(&self) -> Credential {
        let token = self.issuer.load().unwrap().unwrap();
        *self.token.lock().unwrap() = Some(token.clone());
        token
    }

    fn renewals(&self) -> usize {
        self.issuer.loads()
    }

    fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }
}

impl crate::source::CredentialSource for Renewing {
    fn name(&self) -> &str {
        "renewing"
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        unreachable!("the store says why it asks")
    }

    async fn load_because(&self, reason: LoadReason<'_>) -> Result<Option<Credential>, SourceError> {
        let text = |credential: &Credential| credential.header().to_str().unwrap().to_owned();
        let (heard, old) = match reason {
            LoadReason::Poll => (Heard::Poll, None),
            LoadReason::Expiring(old) => (Heard::Expiring(text(old)), Some(old)),
            LoadReason::Refused(old) => (Heard::Refused(text(old)), Some(old)),
        };
        self.heard.lock().unwrap().push(heard);
        let held = self.token.lock().unwrap().clone();
        let _held = self.held.lock().await;
        Ok(Some(match held {
            Some(token) if old.is_none_or(|old| !old.same_value(&token)) => token,
            _ => self.renew(),
        }))
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.every
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_is_told_of_an_expiry_and_renews_once() {
    let source = Renewing::new(Some(10 * SECOND));
    let store = source.store().await;
    let first = store.load().credential().header().to_str().unwrap().to_owned();
    tokio::time::sleep(Duration::from_secs(3302)).await;
    assert_eq!((store.generation().get(), source.renewals()), (2, 2));
    let told: Vec<_> = source.heard().into_iter().filter(|heard| *heard != Heard::Poll).collect();
    assert_eq!(told, [Heard::Expiring(first)]);
    // The second token was taken after 3,240 s at the earliest, and the next is due 3,240 s later.
    tokio::time::sleep(Duration::from_secs(6479 - 3302)).await;
    assert_eq!(source.renewals(), 2);
}

fn claim(reason: Reason) -> Claim {
    Claim { application: Application::at(Some("fal.run"), "/fal-ai/flux"), reason }
}

#[tokio::test(start_paused = true)]
async fn a_source_is_told_which_credential_fal_refused() {
    let source = Renewing::new(None);
    let store = source.store().await;
    let first = store.load();
    let text = first.credential().header().to_str().unwrap().to_owned();
    store.reload().await.unwrap();
    assert!(matches!(store.reload_past(first.generation()).await, Ok(Reloaded::Changed(_))));
    assert_eq!(source.heard(), [Heard::Poll, Heard::Poll, Heard::Refused(text)]);

    // However often the same one is refused.
    for _ in 0..100 {
        assert!(matches!(store.reload_past(first.generation()).await, Ok(Reloaded::Changed(_))));
        tokio::time::sleep(60 * SECOND).await;
    }
    assert_eq!(source.renewals(), 2 + 100 * 60 / 3300);
}

#[tokio::test(start_paused = true)]
async fn what_no_other_key_cures_is_no_refusal_to_a_source() {
    let source = Renewing::new(None);
    let store = source.store().await;
    for reason in [Reason::Application, Reason::InsufficientPermissions, Reason::AccountLocked(LockReason::TopUp)] {
        tokio::time::sleep(120 * SECOND).await;
        store.ask_past(store.generation(), claim(reason));
        tokio::time::sleep(SECOND).await;
    }
    assert_eq!(source.heard(), [Heard::Poll, Heard::Poll, Heard::Poll, Heard::Poll]);
    tokio::time::sleep(120 * SECOND).await;
    store.ask_past(store.generation(), claim(Reason::Unknown));
    tokio::time::sleep(SECOND).await;
    assert_eq!((store.generation().get(), source.renewals()), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_during_a_poll_is_told_right_after_it() {
    let source = Renewing::new(None);
    let store = source.store().await;
    let held = source.held.clone().lock_owned().await;
    let mut poll = task::spawn(store.reload());
    assert_pending!(poll.poll());
    tokio::time::sleep(SECOND).await; // it reads the token that is refused now
    let refused = store.load();
    let mut waits: Vec<_> = (0..100).map(|_| task::spawn(store.reload_past(refused.generation()))).collect();
    for wait in &mut waits {
        assert_pending!(wait.poll());
    }
    let began = Instant::now();
    drop(held);
    for wait in waits {
        assert!(matches!(wait.await, Ok(Reloaded::Changed(_))));
    }
    assert_eq!((source.heard().len(), source.renewals(), began.elapsed()), (3, 2, Duration::ZERO));
    assert!(matches!(source.heard()[2], Heard::Refused(_)));
    assert!(poll.await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_nobody_waits_for_is_told_all_the_same() {
    let source = Renewing::new(None);
    let store = source.store().await;
    let held = source.held.clone().lock_owned().await;
    let mut poll = task::spawn(store.reload());
    assert_pending!(poll.poll());
    tokio::time::sleep(SECOND).await;
    store.ask_past(store.generation(), claim(Reason::UnknownCredential));
    drop(held);
    assert!(poll.await.is_ok());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!((source.heard().len(), store.generation().get()), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn a_refused_credential_that_fal_accepts_is_not_told_of() {
    let source = Renewing::new(None);
    let store = source.store().await;
    let held = source.held.clone().lock_owned().await;
    let mut poll = task::spawn(store.reload());
    assert_pending!(poll.poll());
    tokio::time::sleep(SECOND).await;
    let (current, mark) = (store.load(), store.load().mark());
    store.ask_past(current.generation(), claim(Reason::Unknown));
    current.note_accepted(mark);
    drop(held);
    assert!(poll.await.is_ok());
    tokio::time::sleep(SECOND).await;
    assert_eq!((source.heard(), source.renewals()), (vec![Heard::Poll, Heard::Poll], 1));
}

/// A source that hangs, and that has a limit of its own.
struct Hangs(Option<Duration>);

impl crate::source::CredentialSource for Hangs {
    fn name(&self) -> &str {
        "hangs"
    }

    async fn load(&self) -> Result<Option<Credential>, SourceError> {
        std::future::pending().await
    }

    fn load_timeout(&self) -> Option<Duration> {
        self.0
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_has_the_limit_of_the_store_or_of_its_source() {
    for (of_source, of_store, expected) in [
        (None, None, 10),
        (Some(90 * SECOND), None, 90),
        (Some(3 * SECOND), None, 3),
        (Some(90 * SECOND), Some(5 * SECOND), 5),
        (None, Some(20 * SECOND), 20),
    ] {
        let began = Instant::now();
        let mut builder = CredentialStore::builder(Hangs(of_source));
        if let Some(limit) = of_store {
            builder = builder.load_timeout(limit);
        }
        let error = builder.build().await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed().as_secs()), (SourceErrorKind::TimedOut, expected));
    }
}

#[test]
fn a_store_from_the_environment_is_fixed() {
    let of = |variables: &'static [(&'static str, &'static str)]| {
        let lookup = move |name: &str| variables.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
        CredentialStore::from_fixed_env(&EnvSource::all().environment(lookup))
    };
    let store = of(&[("FAL_KEY", "id:secret")]).unwrap();
    assert_eq!((store.status().driver, store.load().source()), (DriverState::Absent, "env:FAL_KEY"));

    let error = of(&[]).unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::NotFound);
    assert!(error.to_string().contains("nothing is set: set FAL_KEY;"), "{error}");

    let error = of(&[("FAL_KEY_FILE", "/key")]).unwrap_err();
    assert!(error.to_string().contains("CredentialStore::builder(EnvSource::file())"), "{error}");
}

/// A wall clock that stands still until a test moves it.
#[derive(Clone)]
struct StoppedClock(Arc<AtomicU64>);

impl StoppedClock {
    const START: u64 = 1_800_000_000;

    fn new() -> Self {
        Self(Arc::new(AtomicU64::new(Self::START)))
    }

    fn set(&self, seconds: u64) {
        self.0.store(seconds, Ordering::SeqCst);
    }

    fn forward(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    fn clock(&self) -> Clock {
        let seconds = Arc::clone(&self.0);
        Clock::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.load(Ordering::SeqCst)))
    }
}

/// What the store of the next tests is asked for, and its clock.
async fn observed(first: Credential) -> (CredentialStore, Arc<Mutex<Option<Credential>>>, StoppedClock) {
    let brings = Arc::new(Mutex::new(Some(first)));
    let source = from_fn_with("vault", None, Arc::clone(&brings), async |brings: Arc<Mutex<_>>| {
        Ok(brings.lock().unwrap().clone())
    });
    let clock = StoppedClock::new();
    let builder = CredentialStore::builder(source).name("house").clock(clock.clock());
    (builder.build().await.unwrap(), brings, clock)
}

fn json(store: &CredentialStore) -> String {
    serde_json::to_string(&store.status()).unwrap()
}

/// A plain word that nothing but the store knows for a secret.
#[tokio::test(start_paused = true)]
async fn an_error_of_the_source_shows_no_secret_of_the_store() {
    let source = from_fn_with("vault", None, AtomicU64::new(0).into(), async |loads: Arc<AtomicU64>| {
        match loads.fetch_add(1, Ordering::Relaxed) {
            0 => Ok::<_, BoxError>(Some(Credential::key("first:plain-word")?)),
            _ => Err("first:plain-word is not in the vault".into()),
        }
    });
    let store = CredentialStore::builder(source).build().await.unwrap();
    store.reload().await.unwrap_err();
    let error = store.status().last_error.unwrap();
    let text = format!("{error:?} {}", crate::error::report(&error));
    assert!(text.contains("is not in the vault") && !text.contains("plain-word"), "{text}");
}

#[test]
fn a_status_as_json_in_each_state() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let store = runtime.block_on(async {
        let (store, brings, clock) = observed(Credential::key("first:secret").unwrap()).await;
        assert_eq!(
            json(&store),
            r#"{"ready":true,"degraded":[],"store":"house","generation":1,"source":"vault","scheme":"Key","key_id":"first","account":null,"loaded_at":1800000000,"checked_at":1800000000,"expires_at":null,"last_error":null,"consecutive_failures":0,"driver":"running","accepted":false,"pending":null}"#
        );

        clock.forward(10);
        *brings.lock().unwrap() = None;
        for _ in 0..2 {
            store.reload().await.unwrap_err();
        }
        assert_eq!(
            json(&store),
            r#"{"ready":true,"degraded":["reload_failing"],"store":"house","generation":1,"source":"vault","scheme":"Key","key_id":"first","account":null,"loaded_at":1800000000,"checked_at":1800000000,"expires_at":null,"last_error":"vault: has no credential any more","consecutive_failures":2,"driver":"running","accepted":false,"pending":null}"#
        );

        refuse(&store, &store.load(), Reason::UnknownCredential);
        refuse(&store, &store.load(), Reason::AccountLocked(LockReason::TopUp));
        assert_eq!(
            json(&store),
            r#"{"ready":true,"degraded":["reload_failing","refused","account_locked"],"store":"house","generation":1,"source":"vault","scheme":"Key","key_id":"first","account":null,"loaded_at":1800000000,"checked_at":1800000000,"expires_at":null,"last_error":"vault: has no credential any more","consecutive_failures":2,"driver":"running","accepted":false,"pending":null}"#
        );

        clock.forward(90);
        *brings.lock().unwrap() = Some(token(1, clock.clock().now() + HOUR));
        store.reload().await.unwrap();
        assert_eq!(
            json(&store),
            r#"{"ready":true,"degraded":[],"store":"house","generation":2,"source":"vault","scheme":"Bearer","key_id":null,"account":null,"loaded_at":1800000100,"checked_at":1800000100,"expires_at":1800003700,"last_error":null,"consecutive_failures":0,"driver":"running","accepted":false,"pending":null}"#
        );
        clock.set(StoppedClock::START + 3699);
        assert!(store.status().is_ready());
        clock.forward(1);
        assert_eq!(
            json(&store),
            r#"{"ready":false,"degraded":["expired"],"store":"house","generation":2,"source":"vault","scheme":"Bearer","key_id":null,"account":null,"loaded_at":1800000100,"checked_at":1800000100,"expires_at":1800003700,"last_error":null,"consecutive_failures":0,"driver":"running","accepted":false,"pending":null}"#
        );
        store.replace(Credential::key("second:secret").unwrap());
        store
    });
    drop(runtime);
    assert_eq!(
        json(&store),
        r#"{"ready":true,"degraded":["driver_ended"],"store":"house","generation":3,"source":"replaced","scheme":"Key","key_id":"second","account":null,"loaded_at":1800003700,"checked_at":1800000100,"expires_at":null,"last_error":null,"consecutive_failures":0,"driver":"ended","accepted":false,"pending":null}"#
    );
}

fn refuse(store: &CredentialStore, refused: &Snapshot, reason: Reason) {
    store.note_refused(refused, refused.mark(), claim(reason));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_stands_for_a_minute_and_for_its_own_credential() {
    let (store, _, clock) = observed(Credential::key("first:secret").unwrap()).await;
    let degraded = || store.status().degraded().collect::<Vec<_>>();
    let first = store.load();
    refuse(&store, &first, Reason::WrongScheme);
    clock.forward(59);
    refuse(&store, &first, Reason::MissingCredential);
    clock.forward(59);
    assert_eq!(degraded(), [Degraded::Refused]);
    let last = store.status().last_refusal().unwrap();
    assert_eq!((last.reason, last.at), (Reason::MissingCredential, clock.clock().now() - 59 * SECOND));
    clock.forward(1);
    assert_eq!((degraded(), store.status().last_refusal()), (vec![], None));

    // One that is about a single app says nothing about the credential.
    for reason in [Reason::Application, Reason::Unknown, Reason::AccessDenied, Reason::InsufficientPermissions] {
        refuse(&store, &first, reason);
    }
    assert_eq!(degraded(), []);

    // A rotation ends a refusal, and not a lock: that is the account's.
    refuse(&store, &first, Reason::UnknownCredential);
    refuse(&store, &first, Reason::AccountLocked(LockReason::ExhaustedBalance));
    assert_eq!(degraded(), [Degraded::Refused, Degraded::AccountLocked]);
    store.replace(Credential::key("second:secret").unwrap());
    assert_eq!(degraded(), [Degraded::AccountLocked]);
    // A late refusal of the previous credential says nothing.
    refuse(&store, &first, Reason::MalformedCredential);
    assert_eq!(degraded(), [Degraded::AccountLocked]);
    clock.forward(60);
    assert_eq!(degraded(), []);

    // A clock that is set back does not make it stand for ever.
    refuse(&store, &store.load(), Reason::MalformedCredential);
    clock.set(StoppedClock::START - 3600);
    assert_eq!(degraded(), []);
}

/// A success is noted in the evidence first, and in the store a moment later. A refusal may come in between.
#[tokio::test(start_paused = true)]
async fn a_refusal_amid_an_acceptance_sets_nothing_aside() {
    let (store, _, _) = observed(Credential::key("first:secret").unwrap()).await;
    store.keep_previous_for(HOUR);
    store.replace(Credential::key("second:secret").unwrap());
    let second = store.load();
    assert!(second.evidence().note(second.mark()));
    refuse(&store, &second, Reason::UnknownCredential);
    let status = store.status();
    assert_eq!((status.generation, status.pending), (second.generation(), None));

    // The store hears of a success that is over: the key is in doubt, and the way back stays.
    store.shared.accepted(second.generation());
    assert!(!store.status().accepted);
    assert_eq!(store.candidates(claim(Reason::Unknown).application).into_iter().flatten().count(), 2);
    // The next success ends the doubt.
    second.note_accepted(second.mark());
    assert!(store.status().accepted);
    assert_eq!(store.candidates(claim(Reason::Unknown).application).into_iter().flatten().count(), 1);
}

/// fal has come to know the key while the refusal was on its way, whatever was claimed after that.
#[tokio::test(start_paused = true)]
async fn a_refusal_from_before_the_first_success_is_no_doubt() {
    let (store, _, _) = observed(Credential::key("first:secret").unwrap()).await;
    let first = store.load();
    let sent = first.mark();
    first.note_accepted(sent);
    refuse(&store, &first, Reason::UnknownCredential);
    let doubted = first.mark();
    assert!(!store.note_refused(&first, sent, claim(Reason::UnknownCredential)).was_ever_accepted());
    assert_eq!(first.mark(), doubted);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_wakes_subscribers_only_when_degraded_changes() {
    let (store, _, clock) = observed(Credential::key("first:secret").unwrap()).await;
    let mut subscription = store.subscribe();
    let mut woken = || subscription.changed().now_or_never().is_some();
    let (unknown, missing) = (Reason::UnknownCredential, Reason::MissingCredential);
    let locked = Reason::AccountLocked(LockReason::Admin);
    for (reason, wakes) in [(unknown, true), (unknown, false), (missing, false), (locked, true), (unknown, false)] {
        refuse(&store, &store.load(), reason);
        assert_eq!(woken(), wakes, "{reason:?}");
    }
    for _ in 0..if cfg!(miri) { 100 } else { 10_000 } {
        clock.forward(1);
        refuse(&store, &store.load(), unknown);
        assert!(!woken());
    }
    refuse(&store, &store.load(), Reason::Application);
    assert!(!woken());
    clock.forward(60);
    assert!(!woken(), "time passes, and nobody is woken");
    refuse(&store, &store.load(), unknown);
    assert!(woken(), "it had lapsed");
}

#[tokio::test]
async fn a_store_is_named_with_what_can_be_a_label() {
    let source = || from_fn_with("vault", None, (), async |()| Ok(Credential::key("id:secret")?));
    let named = async |name: String| CredentialStore::builder(source()).name(name).build().await;
    assert_eq!(&*named("n".repeat(64)).await.unwrap().status().store, "n".repeat(64));
    for name in [String::new(), "n".repeat(65), "two\nlines".to_owned()] {
        let error = named(name).await.unwrap_err();
        assert!(crate::error::report(&error).contains("1 to 64 bytes and no control characters"), "{error:?}");
    }
    assert_eq!(&*CredentialStore::builder(source()).build().await.unwrap().status().store, "default");
    assert_eq!(&*CredentialStore::fixed(Credential::key("id:secret").unwrap()).status().store, "default");
}

#[test]
fn the_debug_of_a_status_does_not_read_the_clock() {
    let clock = StoppedClock::new();
    let store = CredentialStore {
        shared: Shared::new(
            "house".into(),
            Credential::key("id:secret").unwrap(),
            &"vault".into(),
            None,
            clock.clock(),
        ),
    };
    let status = store.status();
    let before = format!("{status:?}");
    clock.forward(60);
    assert_eq!(format!("{status:?}"), before);
    assert!(before.ends_with("clock: clock }"), "{before}");
}

/// A source that decides what it brings when a load begins, and brings it when the gate is open.
#[derive(Clone)]
struct Gated {
    brings: Arc<Mutex<u64>>,
    gate: Arc<tokio::sync::watch::Sender<bool>>,
    loads: Arc<AtomicU64>,
}

impl Gated {
    async fn store() -> (CredentialStore, Self) {
        let source = Self {
            brings: Arc::new(Mutex::new(1)),
            gate: Arc::new(tokio::sync::watch::Sender::new(true)),
            loads: Arc::default(),
        };
        let load = async |source: Self| {
            let n = *source.brings.lock().unwrap();
            source.loads.fetch_add(1, Ordering::SeqCst);
            let _ = source.gate.subscribe().wait_for(|open| *open).await;
            Ok(Credential::key(format!("id-{n}:secret"))?)
        };
        let store = CredentialStore::builder(from_fn_with("gated", None, source.clone(), load)).build().await.unwrap();
        (store, source)
    }

    fn brings(&self, n: u64) {
        *self.brings.lock().unwrap() = n;
    }

    fn set_open(&self, open: bool) {
        self.gate.send_replace(open);
    }

    fn loads(&self) -> u64 {
        self.loads.load(Ordering::SeqCst)
    }

    /// Waits for a newer credential on behalf of so many requests, and lets the driver begin a load.
    async fn refused(
        &self,
        store: &CredentialStore,
        requests: usize,
    ) -> Vec<task::Spawn<impl Future<Output = Waited> + use<>>> {
        let before = self.loads();
        let waits = (0..requests).map(|_| {
            let store = store.clone();
            task::spawn(async move {
                let claim = claim(Reason::UnknownCredential);
                store.wait_past(Generation::FIRST, claim, &[], WaitFor::Newer, 2 * SECOND).await
            })
        });
        let mut waits: Vec<_> = waits.collect();
        for wait in &mut waits {
            assert_pending!(wait.poll());
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(self.loads(), before + 1);
        waits
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_wakes_up_late_looks_once_more() {
    let (store, source) = Gated::store().await;
    source.set_open(false);
    let waits = source.refused(&store, 100).await;
    source.brings(2);
    tokio::time::advance(5 * SECOND).await; // the process was stopped
    source.set_open(true); // the old key, which was read before
    for wait in waits {
        let waited = wait.await;
        assert!(waited.error.is_none() && !waited.timed_out, "{waited:?}");
        assert_eq!(store.generation().get(), 2);
    }
    assert_eq!(source.loads(), 3, "the last look was not shared");
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_was_late_and_finds_nothing_has_timed_out() {
    let (store, source) = Gated::store().await;
    source.set_open(false);
    let mut waits = source.refused(&store, 1).await;
    tokio::time::advance(5 * SECOND).await;
    source.set_open(true);
    let waited = waits.remove(0).await;
    assert!(waited.error.is_none() && waited.timed_out, "{waited:?}");
    assert_eq!(source.loads(), 3);

    // The last look does not wait for ever either.
    tokio::time::sleep(60 * SECOND).await; // longer than the cool-down
    source.set_open(false);
    let mut waits = source.refused(&store, 1).await;
    tokio::time::advance(5 * SECOND).await;
    let began = Instant::now();
    let waited = waits.remove(0).await;
    assert!(matches!(waited, Waited { error: Some(ReloadError::Pending), timed_out: true }), "{waited:?}");
    assert_eq!(began.elapsed(), 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_late_wait_ends_when_the_refused_key_is_accepted() {
    for is_paused in [false, true] {
        let (store, source) = Gated::store().await;
        let refused = store.load();
        let tried = [(refused.clone(), refused.mark())];
        let claim = claim(Reason::UnknownCredential);
        source.set_open(is_paused);
        let mut wait = task::spawn(store.wait_past(Generation::FIRST, claim, &tried, WaitFor::Newer, 2 * SECOND));
        assert_pending!(wait.poll());
        if is_paused {
            tokio::time::sleep(Duration::from_millis(1990)).await;
            assert_pending!(wait.poll());
            // Others ask so often that no load may begin for 150 ms.
            for n in 0..9 {
                store.ask_past(
                    Generation::FIRST,
                    Claim { application: Application::at(Some("fal.run"), &format!("/other/{n}")), ..claim },
                );
                for _ in 0..10 {
                    tokio::task::yield_now().await; // the load ends
                }
            }
            assert!(source.loads() >= 9, "{}", source.loads());
        }
        tokio::time::advance(Duration::from_millis(if is_paused { 70 } else { 5000 })).await; // the process was stopped
        assert_pending!(wait.poll());
        let began = Instant::now();
        refused.note_accepted(refused.mark());
        let waited = wait.await;
        assert!(waited.error.is_none() && !waited.timed_out, "{waited:?}");
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_ends_in_time_does_not_look_again() {
    let (store, source) = Gated::store().await;
    let mut waits = source.refused(&store, 1).await;
    let waited = waits.remove(0).await;
    assert!(waited.error.is_none() && waited.timed_out, "{waited:?}");
    assert!((3..=4).contains(&source.loads()), "{}", source.loads()); // at once, after a second, and the last chance
}

#[tokio::test(start_paused = true)]
async fn many_waits_that_wake_up_late_cause_few_loads() {
    let (store, source) = Gated::store().await;
    for _ in 0..240 {
        let store = store.clone();
        let claim = claim(Reason::UnknownCredential);
        let wait = async move { store.wait_past(Generation::FIRST, claim, &[], WaitFor::Newer, 2 * SECOND).await };
        drop(tokio::spawn(wait));
        tokio::time::advance(Duration::from_millis(90)).await; // so nobody wakes up in time
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }
    assert!((60..=154).contains(&source.loads()), "{} in 21.6 s", source.loads());
}

/// Requests to an application that go once, and are refused with both credentials.
#[tokio::test(start_paused = true)]
async fn a_store_is_degraded_while_all_is_refused() {
    let (store, _, clock) = observed(Credential::key("first:secret").unwrap()).await;
    store.keep_previous_for(24 * HOUR);
    store.load().note_accepted(store.load().mark());
    store.replace(Credential::key("second:secret").unwrap());
    let application = claim(Reason::Unknown).application;
    for second in 0..if cfg!(miri) { 100 } else { 3600 } {
        let sent_with = store.send_with(|| Some(application), || false).unwrap_or_else(|| store.load());
        refuse(&store, &sent_with, Reason::UnknownCredential);
        assert!(store.status().degraded().next().is_some(), "after {second} s");
        clock.forward(1);
        tokio::time::advance(SECOND).await;
    }
}
