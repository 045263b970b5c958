//! The account that a login acts for: a team, or the personal account by its name.
//!
//! `fal auth login` asks for one and writes its nickname to the configuration, so that nearly every call by a login
//! names an account.
//!
//! Source: `fal` 1.83.0 (`cli/auth.py`, `auth/__init__.py`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    back_off::BackOff,
    claims::Claims,
    endpoints::{Endpoints, NoTeams},
    error::{LoginError, LoginErrorKind},
    token_file::Token,
};

/// The user ids that were looked up. Only the last is kept.
#[derive(Default)]
pub(super) struct Accounts(Mutex<State>);

#[derive(Default)]
struct State {
    last: Option<(Asked, String)>,
    back_off: BackOff<Asked>,
}

/// Whose account is looked up, and which.
#[derive(Clone, PartialEq)]
struct Asked {
    login: Login,
    /// In lower case.
    team: String,
}

impl Asked {
    fn new(access: &Token, team: &str) -> Self {
        let subject = Claims::of(access.as_str()).and_then(|claims| claims.subject);
        let login = subject.map_or_else(|| Login::Token(access.clone()), Login::Subject);
        Self { login, team: team.to_lowercase() }
    }
}

/// The user who is logged in.
#[derive(Clone, PartialEq)]
enum Login {
    Subject(String),
    /// A token that does not say whose it is.
    Token(Token),
}

/// Why there is no user id.
pub(super) enum NoAccount {
    /// The access token is refused.
    Unauthorized,
    Failed(LoginError),
}

impl Accounts {
    /// The user id of a team.
    pub(super) async fn user_id(&self, endpoints: &Endpoints, access: &Token, team: &str) -> Result<String, NoAccount> {
        let asked = Asked::new(access, team);
        {
            let state = self.state();
            if let Some((last, user_id)) = &state.last
                && *last == asked
            {
                return Ok(user_id.clone());
            }
            state.back_off.check(&asked).map_err(NoAccount::Failed)?;
        }
        let looked_up = look_up(endpoints, access, team, &asked.team).await;
        let mut state = self.state();
        match &looked_up {
            Ok(user_id) => {
                state.back_off.succeeded();
                state.last = Some((asked, user_id.clone()));
            }
            Err(NoAccount::Failed(error)) => {
                state.back_off.failed(asked, error.clone());
            }
            Err(NoAccount::Unauthorized) => {}
        }
        looked_up
    }

    /// Notes that a token was refused that had just been renewed, so that this is not done again at each look.
    pub(super) fn refused(&self, access: &Token, team: &str) -> LoginError {
        let message = "fal takes the token of this login no more: run `fal auth login`";
        let error = LoginError::new(LoginErrorKind::NoLogin, message);
        self.state().back_off.failed(Asked::new(access, team), error.clone());
        error
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn look_up(endpoints: &Endpoints, access: &Token, team: &str, in_lower_case: &str) -> Result<String, NoAccount> {
    let teams = endpoints.teams(access).await.map_err(|error| match error {
        NoTeams::Unauthorized => NoAccount::Unauthorized,
        NoTeams::Failed(error) => NoAccount::Failed(error),
    })?;
    let mut named: Vec<_> = teams.into_iter().filter(|known| known.nickname.to_lowercase() == in_lower_case).collect();
    let unusable = |what| {
        // Never the personal account in its place: that one would pay.
        let message = format!("the account {team:?} {what}: choose another with `fal account set`");
        Err(NoAccount::Failed(LoginError::new(LoginErrorKind::Account, message)))
    };
    if named.is_empty() {
        return unusable("is none of this login's");
    }
    named.retain(|team| !team.is_archived);
    match named.into_iter().next() {
        Some(team) => Ok(team.user_id),
        None => unusable("has been archived"),
    }
}
