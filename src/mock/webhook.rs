//! Webhooks: the key pair, the deliveries and their repeats.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
    request::Parts,
};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::{net::TcpStream, sync::watch, time::timeout};

use super::{
    MockFal,
    answer::{Answer, Content, words},
    failure::ErrorType,
    scope::Tasks,
    shared::Shared,
    target::{Host, WEBHOOK_KEYS},
};
use crate::credential::Credential;

/// How many deliveries are kept. The oldest goes first.
const MAX_DELIVERIES: usize = 10_000;

impl MockFal {
    /// The user id of the account that all credentials belong to, unless they were [accepted for](Self::accept_for)
    /// another one.
    pub const USER_ID: &str = "mock|1";

    /// Makes a credential valid, as [`accept`](Self::accept) does, as one of another account: the webhooks of what is
    /// submitted with it are signed for this user id.
    ///
    /// # Panics
    /// When the user id cannot be the value of a header.
    pub fn accept_for(&self, user_id: &str, credential: &Credential) {
        let _ = header(user_id);
        self.accept(credential);
        let mut state = self.shared.webhooks.state();
        state.accounts.retain(|(of, _)| !of.same_value(credential));
        state.accounts.push((credential.clone(), user_id.to_owned()));
    }

    /// Where the public keys are: `http://127.0.0.1:40003/.well-known/jwks.json`, on the
    /// [`rest_origin`](Self::rest_origin). They need no credential. [`answer`](Self::answer) for
    /// `.well-known/jwks.json` sets another answer, such as one with headers for caches, and
    /// [`fail_next_on`](Self::fail_next_on) lets a fetch fail.
    pub fn webhook_keys_url(&self) -> Uri {
        self.shared.url(Host::Rest, WEBHOOK_KEYS)
    }

    /// The public keys of this moment, as a JSON Web Key Set.
    pub fn webhook_jwks(&self) -> Value {
        self.shared.webhooks.state().jwks()
    }

    /// Signs with a new key from now on. The set of public keys then has the new one and the one before.
    pub fn rotate_webhook_key(&self) {
        let mut state = self.shared.webhooks.state();
        state.previous = Some(state.key.verifying_key());
        state.key = new_key();
    }

    /// The four headers of a delivery, signed with the key of this moment: for a test that sends a delivery itself, with
    /// any time and to any place.
    ///
    /// ```
    /// # use std::time::SystemTime;
    /// # use http::Request;
    /// # use tower_fal::mock::MockFal;
    /// # #[tokio::main] async fn main() -> std::io::Result<()> {
    /// let fal = MockFal::start().await?;
    /// let body = r#"{"request_id":"r-1","status":"OK","payload":{}}"#;
    /// let mut delivery = Request::post("/webhook").body(body).unwrap();
    /// delivery.headers_mut().extend(fal.sign_webhook(MockFal::USER_ID, "r-1", SystemTime::now(), body.as_bytes()));
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// When an id cannot be the value of a header.
    pub fn sign_webhook(&self, user_id: &str, request_id: &str, at: SystemTime, body: &[u8]) -> HeaderMap {
        let key = self.shared.webhooks.state().key.clone();
        signed(&key, user_id, request_id, at, body)
    }

    /// How often a delivery is sent again, and how long after the answer to the one before. 10 times and 100 ms at first;
    /// fal waits longer. It is sent again after a 5xx, and when there is no answer in time.
    pub fn webhook_repeats(&self, times: usize, pause: Duration) {
        let mut state = self.shared.webhooks.state();
        (state.repeats, state.pause) = (times, pause);
    }

    /// How long a delivery waits for its answer: 15 s at first, as at fal.
    pub fn webhook_timeout(&self, timeout: Duration) {
        self.shared.webhooks.state().timeout = timeout;
    }

    /// Whether a repeat has the timestamp and the signature of the first delivery. `false` at first: each one is signed
    /// anew. fal does not say which of the two it does.
    pub fn keep_webhook_signature(&self, keep: bool) {
        self.shared.webhooks.state().keep_signature = keep;
    }

    /// Waits until the delivery of a request has ended: it was answered with something that is not a 5xx, or given up.
    /// Returns the status of each attempt; `None` where there was no answer. A delivery to a URL that is not on loopback
    /// ends without an attempt.
    pub async fn webhook_delivered(&self, request_id: &str) -> Vec<Option<StatusCode>> {
        let mut deliveries = self.shared.webhooks.deliveries.subscribe();
        let ended = |all: &BTreeMap<String, Delivery>| all.get(request_id).is_some_and(|one| !one.under_way);
        match deliveries.wait_for(ended).await {
            Ok(all) => all.get(request_id).map(|delivery| delivery.attempts.clone()).unwrap_or_default(),
            // This handle keeps the sender.
            Err(_) => Vec::new(),
        }
    }

    /// The status of each attempt so far to deliver the result of a request; `None` where there was no answer.
    pub fn webhook_attempts(&self, request_id: &str) -> Vec<Option<StatusCode>> {
        let deliveries = self.shared.webhooks.deliveries.borrow();
        deliveries.get(request_id).map(|delivery| delivery.attempts.clone()).unwrap_or_default()
    }

    /// Sends a delivery that has ended once more, as fal does when the answer was lost on its way. Returns whether there
    /// is such a delivery.
    pub fn deliver_webhook_again(&self, request_id: &str) -> bool {
        Webhooks::deliver(&self.shared, request_id)
    }
}

/// What the mock knows of webhooks.
pub(super) struct Webhooks {
    tasks: Tasks,
    state: Mutex<State>,
    /// By the id of the request.
    deliveries: watch::Sender<BTreeMap<String, Delivery>>,
}

struct State {
    key: SigningKey,
    /// The key before, which is still published.
    previous: Option<VerifyingKey>,
    accounts: Vec<(Credential, String)>,
    repeats: usize,
    pause: Duration,
    timeout: Duration,
    keep_signature: bool,
}

/// A delivery, under way or ended.
struct Delivery {
    url: Uri,
    user_id: String,
    body: Bytes,
    /// The headers of the first attempt.
    first: Option<HeaderMap>,
    attempts: Vec<Option<StatusCode>>,
    under_way: bool,
}

impl Webhooks {
    pub(super) fn new(tasks: Tasks) -> Self {
        let state = State {
            key: new_key(),
            previous: None,
            accounts: Vec::new(),
            repeats: 10,
            pause: Duration::from_millis(100),
            timeout: Duration::from_secs(15),
            keep_signature: false,
        };
        Self { tasks, state: Mutex::new(state), deliveries: watch::Sender::new(BTreeMap::new()) }
    }

    /// The set of public keys.
    pub(super) fn keys(&self) -> Option<Answer> {
        Some(Answer::ok(self.state().jwks()))
    }

    /// A request was submitted, and its outcome is known: delivers it, if it asked for that.
    pub(super) fn submitted(shared: &Arc<Shared>, head: &Parts, id: &str, outcome: &Result<Answer, ErrorType>) {
        let query = head.uri.query().unwrap_or_default();
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        let Some(Ok(url)) = pairs.find(|(name, _)| name == "fal_webhook").map(|(_, url)| url.parse::<Uri>()) else {
            return;
        };
        let user_id = shared.webhooks.state().account_of(head);
        let body = Bytes::from(payload(id, outcome).to_string());
        let delivery = Delivery { url, user_id, body, first: None, attempts: Vec::new(), under_way: false };
        shared.webhooks.deliveries.send_modify(|all| {
            all.insert(id.to_owned(), delivery);
            if all.len() > MAX_DELIVERIES {
                all.pop_first();
            }
        });
        Self::deliver(shared, id);
    }

    /// Begins to deliver, unless it is being delivered.
    fn deliver(shared: &Arc<Shared>, id: &str) -> bool {
        let begun = shared.webhooks.deliveries.send_if_modified(|all| {
            let Some(delivery) = all.get_mut(id).filter(|delivery| !delivery.under_way) else { return false };
            delivery.under_way = true;
            true
        });
        if begun {
            let (of_task, id) = (Arc::clone(shared), id.to_owned());
            shared.webhooks.tasks.spawn(async move { of_task.webhooks.attempt(&id).await });
        }
        begun
    }

    /// Sends a delivery until it is answered or was repeated often enough.
    async fn attempt(&self, id: &str) {
        let repeats = self.state().repeats;
        for attempt in 0..=repeats {
            let Some((request, timeout_after)) = self.request(id) else { break };
            let answer = timeout(timeout_after, send(request)).await;
            let status = answer.ok().and_then(Result::ok);
            self.change(id, |delivery| delivery.attempts.push(status));
            if status.is_some_and(|status| !status.is_server_error()) || attempt == repeats {
                break;
            }
            let pause = self.state().pause;
            tokio::time::sleep(pause).await;
        }
        self.change(id, |delivery| delivery.under_way = false);
    }

    /// The next attempt. There is none if the URL leads away from this machine.
    fn request(&self, id: &str) -> Option<(Request<Full<Bytes>>, Duration)> {
        let (key, keep_signature, timeout) = {
            let state = self.state();
            (state.key.clone(), state.keep_signature, state.timeout)
        };
        let mut request = None;
        self.change(id, |delivery| {
            let Delivery { url, user_id, body, first, .. } = delivery;
            if url.scheme_str() != Some("http") || !url.host().is_some_and(is_loopback) {
                return;
            }
            let anew = || signed(&key, user_id, id, SystemTime::now(), body);
            let headers = first.clone().filter(|_| keep_signature).unwrap_or_else(anew);
            first.get_or_insert_with(|| headers.clone());
            let mut made = Request::new(Full::from(body.clone()));
            *made.method_mut() = Method::POST;
            *made.uri_mut() = url.clone();
            *made.headers_mut() = headers;
            made.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            request = Some((made, timeout));
        });
        request
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Delivery)) {
        self.deliveries.send_modify(|all| {
            if let Some(delivery) = all.get_mut(id) {
                change(delivery);
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is of single values, so a panic elsewhere cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn jwks(&self) -> Value {
        let keys = [Some(self.key.verifying_key()), self.previous];
        let entry = |key: VerifyingKey| json!({ "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key) });
        json!({ "keys": keys.into_iter().flatten().map(entry).collect::<Vec<_>>() })
    }

    fn account_of(&self, head: &Parts) -> String {
        let credential = head.headers.get(AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let owns = |of: &Credential| bool::from(of.header().as_bytes().ct_eq(credential));
        let account = self.accounts.iter().find(|(of, _)| owns(of));
        account.map_or(MockFal::USER_ID, |(_, user_id)| user_id).to_owned()
    }
}

fn new_key() -> SigningKey {
    // Of a quality that is enough for a key that protects nothing.
    SigningKey::from_bytes(&std::array::from_fn(|_| fastrand::u8(..)))
}

/// The body of a delivery.
fn payload(id: &str, outcome: &Result<Answer, ErrorType>) -> Value {
    let mut body = json!({ "request_id": id, "gateway_request_id": id, "status": "ERROR", "payload": null });
    match outcome {
        Ok(answer) => {
            match &answer.content {
                Content::Json(value) | Content::Events(value) => body["payload"] = value.clone(),
                Content::Nothing | Content::Bytes(_) | Content::Statuses(_) => {
                    body["payload_error"] = "The payload is not JSON".into()
                }
            }
            if answer.status.is_success() {
                body["status"] = "OK".into();
            } else {
                body["error"] = format!("Unexpected status code: {}", answer.status.as_u16()).into();
            }
        }
        Err(error) => body["error"] = words(error.as_str()).into(),
    }
    body
}

fn signed(key: &SigningKey, user_id: &str, request_id: &str, at: SystemTime, body: &[u8]) -> HeaderMap {
    let timestamp = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let hash = hexadecimal(&Sha256::digest(body));
    let signature = key.sign(format!("{request_id}\n{user_id}\n{timestamp}\n{hash}").as_bytes());
    let signature = hexadecimal(&signature.to_bytes());
    [
        ("x-fal-webhook-request-id", request_id),
        ("x-fal-webhook-user-id", user_id),
        ("x-fal-webhook-timestamp", &timestamp.to_string()),
        ("x-fal-webhook-signature", &signature),
    ]
    .into_iter()
    .map(|(name, value)| (HeaderName::from_static(name), header(value)))
    .collect()
}

fn header(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|error| panic!("this cannot be the value of a header: {error}"))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Sends one request over a connection of its own, and returns the status of the answer.
async fn send(mut request: Request<Full<Bytes>>) -> io::Result<StatusCode> {
    let authority = request.uri().authority().cloned().ok_or(io::ErrorKind::InvalidInput)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
    request.headers_mut().insert(HOST, header(authority.as_str()));
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse().map_err(io::Error::other)?;

    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // The connection moves on only while it is polled, and ends with this future.
    let answer = tokio::select! {
        answer = sender.send_request(request) => answer,
        Err(error) = connection => Err(error),
    };
    Ok(answer.map_err(io::Error::other)?.status())
}
