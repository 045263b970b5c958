//! What it costs to verify a webhook of 4 KiB, beside the signature and the hash alone: `cargo bench --bench webhook`.
//!
//! *bare* is `ed25519-dalek` and `sha2` and nothing else: the hash of the body in hexadecimal digits behind the other
//! three parts, and `verify_strict` with a key and a signature that were read before. *verify* reads the four headers as
//! well, and looks at the account and the time. *layer* is a whole request through `VerifyWebhook` to a handler that does
//! nothing, its repeats looked up.
//!
//! Absolute times drift with the machine, so all of them are measured in every round, and each ratio is the median of the
//! ratios within the rounds. It ends with 1 if the ratio of *verify* or of *layer* is above 1.15.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    convert::Infallible,
    hint::black_box,
    process::ExitCode,
    time::{Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use ed25519_dalek::{Signature, VerifyingKey};
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Builder;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_fal::{
    mock::MockFal,
    webhook::{Accounts, PublicKeys, VerifyWebhookLayer, WebhookBody, WebhookKeys, verify},
};

/// Deliveries in one measurement: enough to make the clock's own cost small.
const BATCH: usize = 16;
/// The most that is allowed, as a ratio to *bare*.
const MOST: f64 = 1.15;

fn main() -> ExitCode {
    let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { 500 };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let fal = runtime.block_on(MockFal::start()).unwrap();
    let body = Bytes::from(vec![b'a'; 4096]);
    let jwks = fal.webhook_jwks();
    let keys = PublicKeys::from_jwks(jwks.to_string().as_bytes()).unwrap();
    let signed = |n: usize| fal.sign_webhook(MockFal::USER_ID, &format!("r-{n}"), SystemTime::now(), &body);

    let accounts = Accounts::only([MockFal::USER_ID]).unwrap();
    let layer = VerifyWebhookLayer::for_accounts(WebhookKeys::fixed(keys.clone()), [MockFal::USER_ID]).unwrap();
    let service = layer.layer(service_fn(async |_: Request<WebhookBody<Full<Bytes>>>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    }));

    let mut times = [const { Vec::new() }; 3];
    for round in 0..rounds + 1 {
        // The same deliveries for all three, and others in each round: the processor learns how a signature goes.
        let headers: Vec<_> = (0..BATCH).map(|n| signed(round * BATCH + n)).collect();
        let bare: Vec<_> = headers.iter().map(|headers| Bare::new(&jwks, headers)).collect();
        let requests: Vec<_> = headers
            .iter()
            .map(|headers| {
                let mut request = Request::post("/webhook").body(Full::new(body.clone())).unwrap();
                request.headers_mut().extend(headers.clone());
                (service.clone(), request)
            })
            .collect();
        let by_bare = time(|| bare.iter().for_each(|bare| assert!(bare.verify(black_box(&body)))));
        let by_verify = time(|| {
            for headers in &headers {
                verify(black_box(headers), black_box(&body), &keys, &accounts, SystemTime::now()).unwrap();
            }
        });
        let by_layer = time(|| {
            runtime.block_on(async {
                for (service, request) in requests {
                    assert_eq!(service.oneshot(request).await.unwrap().status(), 200);
                }
            });
        });
        // The first round warms up.
        if round > 0 {
            for (times, time) in times.iter_mut().zip([by_bare, by_verify, by_layer]) {
                times.push(time);
            }
        }
    }

    println!("| case | µs | to bare |\n|---|--:|--:|");
    let mut worst: f64 = 0.0;
    for (name, of_case) in ["bare", "verify", "layer"].into_iter().zip(&times) {
        let ratio = median(of_case.iter().zip(&times[0]).map(|(ours, bare)| ours / bare));
        worst = worst.max(ratio);
        println!("| {name} | {:.1} | {ratio:.3} |", median(of_case.iter().copied()));
    }
    if worst > MOST && rounds > 1 {
        println!("more than {MOST} times as much as bare");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// What cannot be left out.
struct Bare {
    key: VerifyingKey,
    signature: Signature,
    /// The three parts before the hash.
    parts: String,
}

impl Bare {
    fn new(jwks: &Value, headers: &HeaderMap) -> Self {
        let key = jwks["keys"][0]["x"].as_str().unwrap();
        let value = |name| headers[name].to_str().unwrap();
        let names = ["x-fal-webhook-request-id", "x-fal-webhook-user-id", "x-fal-webhook-timestamp"];
        let digits = value("x-fal-webhook-signature");
        let bytes: [u8; 64] = std::array::from_fn(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap());
        let key: [u8; 32] = URL_SAFE_NO_PAD.decode(key).unwrap().try_into().unwrap();
        Self {
            key: VerifyingKey::from_bytes(&key).unwrap(),
            signature: Signature::from_bytes(&bytes),
            parts: names.map(|name| format!("{}\n", value(name))).concat(),
        }
    }

    fn verify(&self, body: &[u8]) -> bool {
        let mut message = self.parts.clone();
        for byte in Sha256::digest(body) {
            message.extend([byte >> 4, byte & 15].map(|half| char::from(b"0123456789abcdef"[usize::from(half)])));
        }
        self.key.verify_strict(message.as_bytes(), &self.signature).is_ok()
    }
}

/// How long one of a batch takes, in microseconds.
fn time(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64() * 1e6 / BATCH as f64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
