//! How an access token is renewed: once for all processes, and so that neither the old nor the new login is lost.
//!
//! 1. Our lock and that of fal's tools are taken.
//! 2. The file is read again: what somebody else has renewed meanwhile is used.
//! 3. Room for the new tokens is taken on the disk.
//! 4. The refresh token is spent.
//! 5. The new tokens take the place of the file, before anything else can fail.
//!
//! No id_token is checked here: a clock that is off, or a set of keys that cannot be fetched, would lose the login.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use super::{
    back_off::BackOff,
    claims::Claims,
    endpoints::{Endpoints, Granted, NoTokens, REQUEST_TIMEOUT, Refusal},
    error::{LoginError, LoginErrorKind},
    files::blocking,
    life::{Counted, Life},
    lock::Locks,
    settled,
    token_file::{Found, Room, Token, TokenFile, Tokens},
};
use crate::events;

/// How long the lock of fal's tools is waited for.
///
/// Source: `fal` 1.83.0 (`auth/local.py`) waits as long.
pub(super) const CLI_LOCK_TIMEOUT: Duration = Duration::from_secs(20);

/// How long our own is waited for: as long as somebody who has it may wait for the other lock and for two answers.
pub(super) const OWN_LOCK_TIMEOUT: Duration = CLI_LOCK_TIMEOUT.saturating_add(REQUEST_TIMEOUT.saturating_mul(2));

/// How often the file may turn out to have changed while its refresh token was being spent.
const MOST_ROUNDS: u32 = 3;

/// What makes renewals. Its clones share what they know.
#[derive(Clone)]
pub(super) struct Renewal {
    /// The name of the source, for events.
    name: Arc<str>,
    pub(super) file: TokenFile,
    pub(super) endpoints: Endpoints,
    known: Arc<Known>,
}

#[derive(Default)]
struct Known {
    /// One renewal of this process at a time.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last token that we were given.
    given: Option<Given>,
    /// The refresh token that fal takes no more.
    refused: Option<Token>,
    /// What could not be written, and the refresh token that was spent for it.
    unwritten: Option<(Token, Tokens)>,
    back_off: BackOff<Token>,
}

#[derive(Clone)]
struct Given {
    access: Token,
    subject: Option<String>,
    life: Counted,
}

/// An access token that may be used.
#[derive(Clone)]
pub(super) struct Usable {
    pub(super) access: Token,
    pub(super) life: Life,
}

impl Renewal {
    pub(super) fn new(name: Arc<str>, file: TokenFile, endpoints: Endpoints) -> Self {
        Self { name, file, endpoints, known: Arc::default() }
    }

    /// The access token that goes with what is in the file, good or not; `None` if there is none that can be read.
    pub(super) fn usable(&self, found: &Found) -> Option<Usable> {
        let in_file = found.tokens.access.as_ref()?;
        let claims = Claims::of(in_file.as_str());
        let stated = claims.as_ref().and_then(|claims| Life::stated(claims, found.written_at, SystemTime::now()));
        let state = self.state();
        let given = state.given.as_ref().filter(|given| {
            let is_same = given.access == *in_file;
            // To a clock that is wrong, what other processes have written looks as if it were over. As long as ours is
            // good and of the same user, theirs need not be renewed.
            let is_of_same =
                claims.as_ref().is_some_and(|claims| claims.subject.is_some() && claims.subject == given.subject);
            is_same || (is_of_same && given.life.life().is_good() && !stated.is_some_and(Life::is_good))
        });
        match given {
            Some(given) => Some(Usable { access: given.access.clone(), life: given.life.life() }),
            None => stated.map(|life| Usable { access: in_file.clone(), life }),
        }
    }

    /// Another access token than this one. It runs to its end even if nobody waits for it.
    pub(super) async fn renewed(&self, found: Found, stale: Option<Token>) -> Result<Token, LoginError> {
        let renewal = self.clone();
        let task = settled::run(async move { renewal.take_turn(&found.tokens.refresh, stale.as_ref()).await });
        task.await.unwrap_or_else(|_| {
            let message = "the renewal was ended by the end of its runtime: call `login::settled` before that";
            Err(LoginError::new(LoginErrorKind::Unreachable, message))
        })
    }

    async fn take_turn(&self, refresh: &Token, stale: Option<&Token>) -> Result<Token, LoginError> {
        let _turn = self.known.turn.lock().await;
        // Not again what has been refused, and not yet what has failed.
        self.refused(refresh)?;
        self.state().back_off.check(refresh)?;
        let renewed = self.renew(stale).await;
        match &renewed {
            Ok(_) => self.state().back_off.succeeded(),
            Err(error) => {
                let failures = self.state().back_off.failed(refresh.clone(), error.clone());
                events::renewal_failed(&self.name, error, failures);
            }
        }
        renewed
    }

    async fn renew(&self, stale: Option<&Token>) -> Result<Token, LoginError> {
        self.check_home().await?;
        let locks = Locks::take(self.file.directory(), OWN_LOCK_TIMEOUT, CLI_LOCK_TIMEOUT).await?;
        let mut spent: Option<Token> = None;
        for _ in 0..MOST_ROUNDS {
            let Some(found) = self.file.now().await? else { return Err(self.file.no_login()) };
            if let Some(tokens) = self.unwritten(&found.tokens.refresh) {
                self.file.make_room().await?.fill(tokens).await?;
                self.state().unwritten = None;
                continue;
            }
            // Somebody else has renewed it.
            if let Some(usable) = self.usable(&found)
                && stale != Some(&usable.access)
                && usable.life.is_good()
            {
                return Ok(usable.access);
            }
            if spent.as_ref() == Some(&found.tokens.refresh) {
                self.state().refused = spent;
            }
            self.refused(&found.tokens.refresh)?;
            let room = self.file.make_room().await?;
            match self.endpoints.refresh(&found.tokens.refresh).await {
                Ok(granted) => {
                    let kept = self.keep(granted, found.tokens.refresh, room).await;
                    drop(locks);
                    return kept;
                }
                // fal's Python client takes no lock while it spends one: the file may hold another by now.
                Err(NoTokens::Refused(Refusal::InvalidGrant)) => spent = Some(found.tokens.refresh),
                Err(NoTokens::Refused(_)) => {
                    let message =
                        format!("{} does not renew the login: run `fal auth login`", self.endpoints.authority.as_str());
                    return Err(LoginError::new(LoginErrorKind::Answer, message));
                }
                Err(NoTokens::Failed(error)) => return Err(error),
            }
        }
        Err(self.no_login("was replaced again and again while it was being renewed"))
    }

    /// Without a directory there is nothing to lock.
    async fn check_home(&self) -> Result<(), LoginError> {
        let directory = self.file.directory().to_owned();
        let is_there = blocking(move || Ok(directory.is_dir())).await?;
        if is_there { Ok(()) } else { Err(self.file.no_login()) }
    }

    /// Writes what was given out, at once.
    async fn keep(&self, granted: Granted, spent: Token, room: Room) -> Result<Token, LoginError> {
        let Granted { asked_at, access, refresh, life, .. } = granted;
        if let Some(access) = &access {
            let claims = Claims::of(access.as_str());
            let life = Counted::new(asked_at, life, claims.as_ref());
            let subject = claims.and_then(|claims| claims.subject);
            // Before the write: if that fails, this process has at least this token.
            self.state().given = Some(Given { access: access.clone(), subject, life });
        }
        if access.is_some() || refresh.is_some() {
            let tokens = Tokens { refresh: refresh.unwrap_or_else(|| spent.clone()), access: access.clone() };
            room.fill(tokens.clone()).await.inspect_err(|_| self.state().unwritten = Some((spent, tokens)))?;
        }
        access.ok_or_else(|| {
            let message = format!(
                "{} answered without an access token: try again later, or run `fal auth login`",
                self.endpoints.authority.as_str()
            );
            LoginError::new(LoginErrorKind::Answer, message)
        })
    }

    /// What this process was given for a refresh token, if that is still in the file. It must not be spent again: that
    /// would end the login.
    pub(super) fn unwritten(&self, refresh: &Token) -> Option<Tokens> {
        let state = self.state();
        state.unwritten.as_ref().filter(|(spent, _)| spent == refresh).map(|(_, tokens)| tokens.clone())
    }

    /// # Errors
    /// When fal takes this refresh token no more.
    fn refused(&self, refresh: &Token) -> Result<(), LoginError> {
        match &self.state().refused {
            Some(refused) if refused == refresh => Err(self.no_login("is no login any more, as fal says")),
            _ => Ok(()),
        }
    }

    fn no_login(&self, what: &str) -> LoginError {
        let path = self.file.path();
        LoginError::new(LoginErrorKind::NoLogin, format!("{} {what}: run `fal auth login`", path.display()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment or one call, so a panic elsewhere cannot leave it half changed.
        self.known.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
