//! A success is proof and a refusal is a claim, over real sockets: a hostile application behind fal takes nothing from the
//! requests to other applications.
//!
//! Each story is run with the hostile application and without it. The requests of all others must fail in the one run no
//! more than in the other, which is mostly never.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::StatusCode;
use serde_json::json;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, Interval, MissedTickBehavior, interval, interval_at, sleep},
};
use tower_fal::{
    CredentialStore,
    mock::{Answer, MockFal},
};

use self::client::{Client, Kind, Network};
use crate::support::{Says, Script, key};

mod client;
mod rotations;
mod stories;

const SECOND: Duration = Duration::from_secs(1);
const SENDERS: u32 = 20;

/// What the hostile application answers, in the words of fal: a status, and a text.
const LIES: [(&str, StatusCode, &str); 3] = [
    ("unknown", StatusCode::UNAUTHORIZED, "No user found for Key ID and Secret"),
    ("private", StatusCode::UNAUTHORIZED, "Cannot access application \"a/b\". Authentication is required."),
    ("locked", StatusCode::FORBIDDEN, "User is locked. Reason: Exhausted balance."),
];

/// What the run has of the hostile application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hostile {
    Absent,
    /// Its answers have the headers of a runner, as all answers of an application have.
    ByARunner,
    /// Its answers have no such headers: a gateway is in front of it, or the platform answers for it.
    Disguised,
    /// Now with these headers, now without.
    Both,
}

impl Hostile {
    /// The application under each of its names, one for each lie.
    fn apps(self) -> Vec<String> {
        let owners: &[_] = match self {
            Self::Absent => &[],
            Self::ByARunner => &["runner"],
            Self::Disguised => &["disguised"],
            Self::Both => &["runner", "disguised"],
        };
        LIES.iter().flat_map(|(lie, ..)| owners.iter().map(move |owner| format!("{owner}/{lie}"))).collect()
    }
}

/// A store that a source renews, fal, and those who call it. Key 1 is everywhere at first.
struct World {
    fal: MockFal,
    source: Script,
    store: CredentialStore,
    client: Client,
    hostile: Hostile,
    begin: Instant,
}

/// What has become of the requests of everybody but the hostile application's callers.
#[derive(Debug, Default)]
struct Outcome {
    answered: usize,
    /// When they failed, and how.
    failed: Vec<(Duration, String)>,
    /// How the store was ever shown to be degraded.
    degraded: BTreeSet<&'static str>,
}

impl World {
    async fn new(kind: Kind, network: Network, hostile: Hostile, poll: Option<Duration>) -> Arc<Self> {
        let fal = MockFal::start().await.unwrap();
        fal.accept(&key(1));
        for (lie, status, text) in LIES {
            let answer = Answer::json(json!({ "detail": text })).status(status);
            fal.answer(&format!("runner/{lie}"), answer.clone());
            fal.answer(&format!("disguised/{lie}"), answer.without_runner_headers());
        }
        let source = Script::new(poll, Says::Here(key(1)));
        let store = CredentialStore::builder(source.clone()).build().await.unwrap();
        let client = Client::new(kind, network, &store);
        Arc::new(Self { fal, source, store, client, hostile, begin: Instant::now() })
    }

    /// The store has key `n`, whether fal knows it or not.
    async fn bring(&self, n: u64) {
        self.source.brings(n);
        self.store.reload().await.unwrap();
    }

    /// fal knows key `n` from now on, and no longer the key before it.
    fn switch_to(&self, n: u64) {
        self.fal.accept(&key(n));
        self.fal.revoke(&key(n - 1));
    }

    async fn post(&self, app: &str) -> Result<(), String> {
        self.client.post(self.fal.run_url(&format!("/{app}"))).await
    }

    /// Calls the hostile application once, for each of its lies. Returns how long each call took.
    async fn lie(self: &Arc<Self>) -> Vec<(String, Duration)> {
        let mut calls = JoinSet::new();
        for app in self.hostile.apps() {
            let world = Arc::clone(self);
            calls.spawn(async move {
                let called = Instant::now();
                world.post(&app).await.unwrap_err();
                (app, called.elapsed())
            });
        }
        calls.join_all().await
    }

    /// Calls the hostile application this often, until the handle is aborted. Nobody waits for an answer.
    fn lie_every(self: &Arc<Self>, period: Duration) -> AbortHandle {
        self.call_every(period, self.hostile.apps())
    }

    fn call_every(self: &Arc<Self>, period: Duration, apps: Vec<String>) -> AbortHandle {
        let world = Arc::clone(self);
        let calls = async move {
            let mut calls = JoinSet::new();
            let mut ticks = interval(period);
            for app in apps.into_iter().cycle() {
                ticks.tick().await;
                while calls.try_join_next().is_some() {}
                let world = Arc::clone(&world);
                calls.spawn(async move { world.post(&app).await });
            }
        };
        tokio::spawn(calls).abort_handle()
    }

    /// How often the hostile application was called, for each of its lies.
    fn calls(&self) -> Vec<usize> {
        let received = self.fal.received();
        let calls = |app: String| received.iter().filter(|received| received.path == format!("/{app}")).count();
        self.hostile.apps().into_iter().map(calls).collect()
    }

    /// Sends a request to a good application at each of these moments, unless the last one is still under way.
    async fn send(self: Arc<Self>, mut moments: Interval, mut end: watch::Receiver<bool>) -> Outcome {
        // Those who have waited for the same key must not go on in step with each other.
        moments.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut outcome = Outcome::default();
        loop {
            tokio::select! {
                _ = moments.tick() => {}
                _ = end.wait_for(|ended| *ended) => return outcome,
            }
            match self.post("fal-ai/flux").await {
                Ok(()) => outcome.answered += 1,
                Err(error) => outcome.failed.push((self.begin.elapsed(), error)),
            }
            outcome.degraded.extend(self.store.status().degraded().map(|problem| problem.as_str()));
        }
    }
}

/// Has many senders go on while a story is told, each of which sends a request this often.
async fn told(world: Arc<World>, period: Duration, story: impl AsyncFnOnce(&Arc<World>)) -> Outcome {
    let end = watch::Sender::new(false);
    let mut senders = JoinSet::new();
    for number in 0..SENDERS {
        let moments = interval_at(Instant::now() + period * number / SENDERS, period);
        senders.spawn(Arc::clone(&world).send(moments, end.subscribe()));
    }
    story(&world).await;
    end.send_replace(true);
    let mut outcome = Outcome::default();
    for sender in senders.join_all().await {
        outcome.answered += sender.answered;
        outcome.failed.extend(sender.failed);
        outcome.degraded.extend(sender.degraded);
    }
    outcome.failed.sort();
    outcome
}
