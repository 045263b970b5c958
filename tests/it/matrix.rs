//! One suite for every stack: the same behaviour, whichever client a server uses. Each cell is a test.
//!
//! The real thing as far as it goes: the URLs are fal's own, the policy is the default one, and the sockets speak TLS.
//! Only the names lead here, to a [`MockFal`] behind a certificate of our own.

use std::{collections::BTreeSet, time::Duration};

use http::{StatusCode, Version};
use tokio::{sync::watch, task::JoinSet};
use tower_fal::{
    CredentialStore,
    error::{Reason, Refusal},
    mock::{Failure, Lock, Presented},
    source::FileSource,
};

use self::{
    stack::{Outcome, Payload, Sent, Stack},
    tls_fal::{ELSEWHERE, TlsFal},
};
use crate::support::{self, KubeletVolume, key, key_text};

mod stack;
mod tls_fal;

const RUN: &str = "https://fal.run/fal-ai/flux/dev";
const PROMPT: &str = r#"{"prompt":"a cat"}"#;

/// The rows, and a test for each of them on each stack.
macro_rules! matrix {
    ($($stack:ident => $variant:ident),*) => {
        $(mod $stack {
            use super::*;

            matrix!(@rows Stack::$variant, inject, not_admitted, rotate_under_load, a_401_then_a_replay, a_401_for_good,
                the_applications_401, a_403_of_a_locked_account, a_streaming_body, its_own_credential, cancellation);
        })*
    };
    (@rows $stack:expr, $($row:ident),*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $row() {
            super::$row($stack).await;
        })*
    };
}

matrix! {
    hyper_util_http1 => HyperHttp1,
    hyper_util_http2 => HyperHttp2,
    reqwest_service => ReqwestService,
    reqwest_middleware => ReqwestMiddleware,
    axum_forwarded => AxumForwarded
}

type World = support::World<TlsFal>;

impl World {
    async fn new() -> Self {
        let fal = TlsFal::start().await;
        fal.accept(&key(1));
        Self::around(fal).await
    }

    /// Fal knows key `n` and no longer the first, which the store has; the source has key `n`.
    fn rotate(&self, n: u64) {
        self.source.brings(n);
        self.fal.accept(&key(n));
        self.fal.revoke(&key(1));
    }

    /// The keys that fal was shown, in order.
    fn shown(&self) -> Vec<Option<String>> {
        let id = |presented: &Presented| presented.key_id().map(ToString::to_string);
        self.fal.received().iter().map(|request| id(&request.presented)).collect()
    }
}

fn id(n: u64) -> Option<String> {
    key(n).key_id().map(ToString::to_string)
}

fn post() -> Sent {
    Sent { url: RUN, body: Payload::Whole(PROMPT), own: None }
}

/// It was a run, of this prompt.
#[track_caller]
fn ran(outcome: Outcome) {
    let Outcome::Answered(status, body) = outcome else { panic!("{outcome:?}") };
    assert!(status == StatusCode::OK && body.contains(r#""prompt":"a cat""#), "{status} {body}");
}

#[track_caller]
fn refused(outcome: Outcome) -> Refusal {
    let Outcome::Refused(refusal) = outcome else { panic!("{outcome:?}") };
    refusal
}

async fn inject(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    ran(client.send(post()).await);
    let received = &world.fal.received()[0];
    assert_eq!(received.presented, Presented::Accepted(key(1).key_id().cloned()));
    assert_eq!((received.host.as_str(), received.path.as_str()), ("fal.run", "/fal-ai/flux/dev"));
    let version = if stack == Stack::HyperHttp2 { Version::HTTP_2 } else { Version::HTTP_11 };
    assert_eq!(received.version, version);
}

async fn not_admitted(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    let outcome = client.send(Sent { url: ELSEWHERE, ..post() }).await;
    let Outcome::Answered(StatusCode::UNAUTHORIZED, body) = outcome else { panic!("{outcome:?}") };
    assert!(body.contains("Authentication is required"), "{body}");
    assert_eq!(world.fal.received()[0].presented, Presented::Nothing);
    assert_eq!((world.fal.requests(), world.reloads()), (1, 0));
}

async fn rotate_under_load(stack: Stack) {
    const ROTATIONS: u64 = 5;
    let fal = TlsFal::start().await;
    fal.accept(&key(0));
    let mut volume = KubeletVolume::new(key_text(0));
    let source = FileSource::new(volume.path()).poll_every(Duration::from_millis(50));
    let store = CredentialStore::builder(source).build().await.unwrap();
    let client = stack.client(&store, &fal).await;

    let (stop, stopped) = watch::channel(false);
    let answered: [watch::Sender<u64>; 4] = Default::default();
    let mut streams = JoinSet::new();
    for answered in answered.clone() {
        let (client, stopped) = (client.clone(), stopped.clone());
        streams.spawn(async move {
            while !*stopped.borrow() {
                ran(client.send(post()).await);
                answered.send_modify(|count| *count += 1);
            }
            *answered.borrow()
        });
    }
    for n in 1..=ROTATIONS {
        // The old key goes before anybody has seen the new one: those under way meet a 401.
        fal.accept(&key(n));
        fal.revoke(&key(n - 1));
        volume.update(key_text(n));
        // And the next one goes once none of them meets two: each has had an answer to what it sent since.
        let each_has_seen_it = async {
            store.subscribe().wait_for(|status| status.generation.get() == n + 1).await.unwrap();
            for answered in &answered {
                let before = *answered.borrow();
                answered.subscribe().wait_for(|count| *count >= before + 2).await.unwrap();
            }
        };
        tokio::select! {
            () = each_has_seen_it => {}
            Some(Err(failed)) = streams.join_next() => std::panic::resume_unwind(failed.into_panic()),
        }
    }
    stop.send_replace(true);
    let sent: u64 = streams.join_all().await.iter().sum();
    assert_eq!(fal.runs(), sent, "each request ran once");
    let shown: BTreeSet<_> = fal.received().iter().map(|request| request.presented.key_id().cloned()).collect();
    assert_eq!(shown.len() as u64, ROTATIONS + 1);
}

async fn a_401_then_a_replay(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    world.rotate(2);
    ran(client.send(post()).await);
    assert_eq!(world.shown(), [id(1), id(2)]);
    assert_eq!((world.fal.runs(), world.reloads()), (1, 1));
}

async fn a_401_for_good(stack: Stack) {
    let world = World::new().await;
    // In vain, so not so long that it shows.
    let client = stack.client_that_waits(Duration::from_millis(300), &world.store, &world.fal).await;
    world.fal.revoke(&key(1));
    let refusal = refused(client.send(post()).await);
    assert_eq!((refusal.status(), refusal.reason()), (StatusCode::UNAUTHORIZED, Reason::UnknownCredential));
    assert_eq!(refusal.key_id(), key(1).key_id());
    assert!(!refusal.was_replayed() && refusal.is_replayable(), "{refusal:?}");
    assert_eq!((world.fal.requests(), world.fal.runs()), (1, 0));
    assert!(world.reloads() >= 1);
}

async fn the_applications_401(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    world.source.brings(2); // which would be a reason to send it again, if there were one to reload
    world.fal.fail_next(1, Failure::Application(StatusCode::UNAUTHORIZED));
    assert_eq!(refused(client.send(post()).await).reason(), Reason::Application);
    assert_eq!((world.fal.requests(), world.fal.runs(), world.reloads()), (1, 1, 0));
}

async fn a_403_of_a_locked_account(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    world.source.brings(2);
    world.fal.lock(Lock::ExhaustedBalance);
    let refusal = refused(client.send(post()).await);
    assert!(matches!(refusal.reason(), Reason::AccountLocked(_)), "{refusal:?}");
    assert_eq!(refusal.status(), StatusCode::FORBIDDEN);
    assert_eq!((world.fal.requests(), world.reloads()), (1, 0));
}

async fn a_streaming_body(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    let streaming = || Sent { body: Payload::Streamed(&[r#"{"prompt""#, r#":"a c"#, r#"at"}"#]), ..post() };
    ran(client.send(streaming()).await);

    world.rotate(2);
    let outcome = client.send(streaming()).await;
    if stack == Stack::ReqwestMiddleware {
        // reqwest has no second copy of it: one attempt, and an error that says so.
        let refusal = refused(outcome);
        assert!(!refusal.is_replayable(), "{refusal:?}");
        assert_eq!(world.shown(), [id(1), id(1)]);
    } else {
        ran(outcome);
        assert_eq!(world.shown(), [id(1), id(1), id(2)]);
    }
}

async fn its_own_credential(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    let customers = || Sent { own: Some(9), ..post() };
    world.source.brings(2);
    let refusal = refused(client.send(customers()).await);
    assert_eq!((refusal.key_id(), refusal.generation()), (key(9).key_id(), None));
    assert_eq!((world.fal.requests(), world.reloads()), (1, 0));

    world.fal.accept(&key(9));
    ran(client.send(customers()).await);
    ran(client.send(post()).await);
    assert_eq!(world.shown(), [id(9), id(9), id(1)]);

    let outcome = client.send(Sent { url: ELSEWHERE, ..customers() }).await;
    assert!(matches!(outcome, Outcome::Answered(StatusCode::UNAUTHORIZED, _)), "{outcome:?}");
    assert_eq!(world.shown().last(), Some(&None));
}

async fn cancellation(stack: Stack) {
    let world = World::new().await;
    let client = stack.client(&world.store, &world.fal).await;
    world.rotate(2);
    world.source.close();
    let request = tokio::spawn({
        let client = client.clone();
        async move { client.send(post()).await }
    });
    world.source.loads_reach(2).await; // it waits for the reload that it has asked for
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    client.idle().await;
    world.source.open();

    // Nobody else has asked, and it comes all the same.
    world.store.subscribe().wait_for(|status| status.generation.get() == 2).await.unwrap();
    assert_eq!((world.fal.requests(), world.fal.runs(), world.reloads()), (1, 0, 1));
    ran(client.send(post()).await);
}
