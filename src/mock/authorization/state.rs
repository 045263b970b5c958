//! What the mock knows: logins, tokens, codes, accounts, and what the test wants.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Endpoint, EndpointFailure, signing};

pub(super) const CLIENT_ID: &str = "TwXR51Vz8JbY8GUUMy6EyuVR0fTO7N4N";
const AUDIENCE: &str = "fal-cloud";

/// What a test changes about each id_token: its header and its claims.
pub(super) type Forge = Arc<dyn Fn(&mut Value, &mut Value) + Send + Sync>;

pub(super) struct State {
    began: (SystemTime, Instant),
    pub(super) clock_offset: f64,
    /// For the numbers in tokens.
    issued: u64,
    /// By its number: whose login it is, and whether it is over.
    pub(super) logins: HashMap<u64, Login>,
    pub(super) refresh_tokens: HashMap<String, RefreshToken>,
    pub(super) access_tokens: HashMap<String, AccessToken>,
    pub(super) devices: Vec<Device>,
    pub(super) teams: Vec<Team>,
    pub(super) subject: String,
    pub(super) token_life: Duration,
    pub(super) rotates: bool,
    pub(super) states_expires_in: bool,
    pub(super) interval: Duration,
    pub(super) device_life: Duration,
    pub(super) confirm_after: Option<u32>,
    pub(super) latency: Duration,
    pub(super) forge: Option<Forge>,
    key_number: u32,
    pub(super) stale_keys: bool,
    pub(super) next: HashMap<Endpoint, VecDeque<EndpointFailure>>,
    pub(super) always: HashMap<Endpoint, EndpointFailure>,
    pub(super) received: HashMap<Endpoint, usize>,
    pub(super) refreshes: usize,
    pub(super) reuses: usize,
}

pub(super) struct Login {
    pub(super) subject: String,
    pub(super) is_over: bool,
}

pub(super) struct RefreshToken {
    pub(super) login: u64,
    pub(super) is_spent: bool,
}

pub(super) struct AccessToken {
    pub(super) login: u64,
    pub(super) ends_at: Instant,
    pub(super) is_refused: bool,
}

pub(super) struct Device {
    pub(super) device_code: String,
    pub(super) user_code: String,
    pub(super) decision: Decision,
    pub(super) polls: u32,
    pub(super) last_poll: Option<Instant>,
    pub(super) interval: Duration,
    pub(super) ends_at: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Pending,
    Confirmed,
    Denied,
    /// Its tokens were given out.
    Used,
}

pub(super) struct Team {
    pub(super) nickname: String,
    pub(super) user_id: String,
    pub(super) is_archived: bool,
}

/// New tokens of a login.
pub(super) struct Pair {
    pub(super) access: String,
    pub(super) refresh: Option<String>,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            began: (SystemTime::now(), Instant::now()),
            clock_offset: 0.0,
            issued: 0,
            logins: HashMap::new(),
            refresh_tokens: HashMap::new(),
            access_tokens: HashMap::new(),
            devices: Vec::new(),
            teams: Vec::new(),
            subject: "github|1".to_owned(),
            token_life: Duration::from_secs(60 * 60),
            rotates: true,
            states_expires_in: true,
            interval: Duration::from_secs(5),
            device_life: Duration::from_secs(15 * 60),
            confirm_after: None,
            latency: Duration::ZERO,
            forge: None,
            key_number: 1,
            stale_keys: false,
            next: HashMap::new(),
            always: HashMap::new(),
            received: HashMap::new(),
            refreshes: 0,
            reuses: 0,
        }
    }

    /// The mock's clock, in seconds since 1970. It goes with Tokio's, which a test may have paused.
    pub(super) fn now(&self) -> f64 {
        let (wall, instant) = self.began;
        let since_epoch = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (since_epoch + instant.elapsed()).as_secs_f64() + self.clock_offset
    }

    fn number(&mut self) -> u64 {
        self.issued += 1;
        self.issued
    }

    /// A text that nobody can guess.
    fn unguessable(&mut self, what: &str) -> String {
        format!("mock-{what}-{}-{:016x}{:016x}", self.number(), fastrand::u64(..), fastrand::u64(..))
    }

    /// A new login of the user.
    pub(super) fn log_in(&mut self) -> (u64, String) {
        let login = self.number();
        self.logins.insert(login, Login { subject: self.subject.clone(), is_over: false });
        (login, self.refresh_token(login))
    }

    fn refresh_token(&mut self, login: u64) -> String {
        let token = self.unguessable("refresh");
        self.refresh_tokens.insert(token.clone(), RefreshToken { login, is_spent: false });
        token
    }

    pub(super) fn access_token(&mut self, login: u64, life: Duration) -> String {
        let subject = self.logins.get(&login).map(|login| login.subject.clone());
        // One that has expired is an hour old.
        let began = if life.is_zero() { self.now() - 3600.0 } else { self.now() };
        let number = self.number();
        let claims = json!({
            "iss": "https://auth.fal.ai/",
            "sub": subject,
            "aud": AUDIENCE,
            "iat": began,
            "exp": began + life.as_secs_f64(),
            "jti": number,
        });
        let token = signing::token(&json!({"alg": "RS256", "typ": "JWT", "kid": self.key_id()}), &claims);
        let ends_at = Instant::now() + life;
        self.access_tokens.insert(token.clone(), AccessToken { login, ends_at, is_refused: false });
        token
    }

    /// Spends a refresh token. `None` if it is good for nothing.
    pub(super) fn refresh(&mut self, token: &str) -> Option<(u64, Pair)> {
        let known = self.refresh_tokens.get_mut(token)?;
        let login = known.login;
        if known.is_spent {
            // Somebody has it who should not: the whole login is over.
            self.reuses += 1;
            self.end(login);
            return None;
        }
        if self.logins.get(&login).is_none_or(|login| login.is_over) {
            return None;
        }
        let rotates = self.rotates;
        known.is_spent = rotates;
        self.refreshes += 1;
        let access = self.access_token(login, self.token_life);
        let refresh = rotates.then(|| self.refresh_token(login));
        Some((login, Pair { access, refresh }))
    }

    /// The tokens of a device whose login was confirmed.
    pub(super) fn grant(&mut self) -> (u64, Pair) {
        let (login, refresh) = self.log_in();
        let access = self.access_token(login, self.token_life);
        (login, Pair { access, refresh: Some(refresh) })
    }

    /// No token of the login is good any more.
    pub(super) fn end(&mut self, login: u64) {
        if let Some(login) = self.logins.get_mut(&login) {
            login.is_over = true;
        }
        for token in self.access_tokens.values_mut().filter(|token| token.login == login) {
            token.is_refused = true;
        }
    }

    pub(super) fn id_token(&self, login: u64, issuer: &str) -> String {
        let now = self.now();
        let mut header = json!({"alg": "RS256", "typ": "JWT", "kid": self.key_id()});
        let mut claims = json!({
            "iss": issuer,
            "sub": self.logins.get(&login).map(|login| &login.subject),
            "aud": CLIENT_ID,
            "iat": now.floor(),
            "exp": now.floor() + 36_000.0,
            "nickname": "mock",
        });
        if let Some(forge) = &self.forge {
            forge(&mut header, &mut claims);
        }
        signing::token(&header, &claims)
    }

    /// The user whose access token it is, if it is good.
    pub(super) fn user_of(&self, access: &str) -> Option<&str> {
        let token = self.access_tokens.get(access)?;
        let is_good = !token.is_refused && Instant::now() < token.ends_at;
        self.logins.get(&token.login).filter(|_| is_good).map(|login| login.subject.as_str())
    }

    pub(super) fn device_code(&mut self) -> &Device {
        let device_code = self.unguessable("device");
        let code = |number: u32| char::from(b'B' + u8::try_from(number % 19).unwrap_or_default());
        let user_code: String = (0..9).map(|place| if place == 4 { '-' } else { code(fastrand::u32(..)) }).collect();
        self.devices.push(Device {
            device_code,
            user_code,
            decision: Decision::Pending,
            polls: 0,
            last_poll: None,
            interval: self.interval,
            ends_at: Instant::now() + self.device_life,
        });
        &self.devices[self.devices.len() - 1]
    }

    fn key_id(&self) -> String {
        format!("mock-key-{}", self.key_number)
    }

    pub(super) fn rotate_keys(&mut self) {
        self.key_number += 1;
        self.stale_keys = true;
    }

    pub(super) fn key_ids(&mut self) -> Vec<String> {
        let newest = if std::mem::take(&mut self.stale_keys) { self.key_number - 1 } else { self.key_number };
        (1..=newest).map(|number| format!("mock-key-{number}")).collect()
    }

    /// How the next request to an endpoint fails, if it does.
    pub(super) fn failure(&mut self, endpoint: Endpoint) -> Option<EndpointFailure> {
        let next = self.next.get_mut(&endpoint).and_then(VecDeque::pop_front);
        next.or_else(|| self.always.get(&endpoint).cloned())
    }
}
