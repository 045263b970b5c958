//! `vectors.json`, which `make_vectors.py` has made, and bits of it changed.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};
use tower_fal::webhook::{Accounts, InvalidAccounts, InvalidJwks, PublicKeys, Rejection, VerifiedWebhook, verify};

#[derive(Deserialize)]
struct Vectors {
    accounts: Vec<String>,
    sets: Map<String, Value>,
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    headers: Vec<(String, String)>,
    body: String,
    now: u64,
    keys: String,
    reason: Option<String>,
}

impl Vectors {
    fn read() -> Self {
        serde_json::from_str(include_str!("vectors.json")).unwrap()
    }

    fn keys(&self, name: &str) -> PublicKeys {
        PublicKeys::from_jwks(self.sets[name].to_string().as_bytes()).unwrap()
    }

    fn verify(&self, vector: &Vector) -> Result<VerifiedWebhook, Rejection> {
        let accounts = Accounts::only(&self.accounts).unwrap();
        verify(&vector.headers(), &vector.body(), &self.keys(&vector.keys), &accounts, at(vector.now))
    }
}

impl Vector {
    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn body(&self) -> Vec<u8> {
        STANDARD.decode(&self.body).unwrap()
    }
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[test]
fn each_vector_is_judged_as_expected() {
    let vectors = Vectors::read();
    for vector in &vectors.vectors {
        let judged = vectors.verify(vector);
        let reason = judged.as_ref().err().map(Rejection::as_str);
        assert_eq!(reason, vector.reason.as_deref(), "{}: {judged:?}", vector.name);
    }
    assert!(vectors.vectors.len() > 90);
}

#[test]
fn a_verified_delivery_says_whose_it_is() {
    let vectors = Vectors::read();
    let webhook = vectors.verify(&vectors.vectors[0]).unwrap();
    assert_eq!(webhook.request_id(), "764cabcf-b745-4b3e-ae38-1200304cf45b");
    assert_eq!(webhook.user_id(), "github|12345");
    assert_eq!(webhook.timestamp(), at(1_800_000_000));
    assert!(!webhook.is_repeat());
}

#[test]
fn a_rejection_says_how_far_the_clock_is_off() {
    let vectors = Vectors::read();
    let stale = |name| {
        let vector = vectors.vectors.iter().find(|vector| vector.name == name).unwrap();
        vectors.verify(vector).unwrap_err()
    };
    assert_eq!(stale("301 s old"), Rejection::Stale(Duration::from_secs(301)));
    assert_eq!(stale("301 s ahead"), Rejection::Stale(Duration::from_secs(301)));
    assert_eq!(stale("signed at the end of time"), Rejection::Stale(Duration::from_secs(u64::MAX - 1_800_000_000)));
}

#[test]
fn a_clock_before_1970_is_one_of_1970() {
    let vectors = Vectors::read();
    let first = &vectors.vectors[0];
    let now = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    let judged = verify(&first.headers(), &first.body(), &vectors.keys(&first.keys), &Accounts::any(), now);
    assert_eq!(judged, Err(Rejection::Stale(Duration::from_secs(1_800_000_000))));
}

#[test]
fn any_account_includes_all() {
    let vectors = Vectors::read();
    let other = vectors.vectors.iter().find(|vector| vector.name == "another account").unwrap();
    let keys = vectors.keys(&other.keys);
    let webhook = verify(&other.headers(), &other.body(), &keys, &Accounts::any(), at(other.now)).unwrap();
    assert_eq!(webhook.user_id(), "github|99999");
}

#[test]
fn a_list_of_accounts_that_no_delivery_can_meet_is_refused() {
    assert_eq!(Accounts::only([""; 0]).unwrap_err(), InvalidAccounts::Empty);
    let long = "u".repeat(257);
    for id in ["", "a b", "a\n", "ä", &long] {
        assert_eq!(Accounts::only(["github|1", id]).unwrap_err(), InvalidAccounts::NotAnId, "{id:?}");
    }
}

#[test]
fn a_set_without_a_usable_key_is_refused() {
    let set = |keys: &str| PublicKeys::from_jwks(format!(r#"{{"keys":[{keys}]}}"#).as_bytes());
    assert_eq!(set("").unwrap_err(), InvalidJwks::NoUsableKey);
    // The neutral element: everything would be signed with it.
    let weak = r#"{"kty":"OKP","crv":"Ed25519","x":"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}"#;
    assert_eq!(set(weak).unwrap_err(), InvalidJwks::NoUsableKey);
    for text in ["", "<html>", "{}", "null"] {
        assert_eq!(PublicKeys::from_jwks(text.as_bytes()).unwrap_err(), InvalidJwks::NotAKeySet, "{text}");
    }
    let vectors = Vectors::read();
    assert_eq!(vectors.keys("weak keys").len(), 1);
    assert_eq!(vectors.keys("among others").len(), 1);
    assert_eq!(vectors.keys("two keys").len(), 2);
}

/// Everything that is signed, and the signature itself.
#[derive(Clone, Debug)]
enum Place {
    Header(usize, usize, u8),
    Body(usize, u8),
}

fn place() -> impl Strategy<Value = Place> {
    let header = (0..4_usize, any::<usize>(), 0..7_u8).prop_map(|(name, at, bit)| Place::Header(name, at, bit));
    let body = (any::<usize>(), 0..8_u8).prop_map(|(at, bit)| Place::Body(at, bit));
    prop_oneof![3 => header, 1 => body]
}

proptest! {
    #[test]
    fn no_bit_can_be_changed(place in place()) {
        let vectors = Vectors::read();
        let mut good = vectors.vectors.into_iter().next().unwrap();
        let mut body = good.body();
        let mut is_same = false;
        match place {
            Place::Header(name, at, bit) => {
                let value = &mut good.headers[name].1;
                let mut bytes = std::mem::take(value).into_bytes();
                let at = at % bytes.len();
                let before = bytes[at];
                bytes[at] ^= 1 << bit;
                // Digits of the signature may be capitals.
                is_same = name == 3 && bytes[at].eq_ignore_ascii_case(&before);
                prop_assume!(HeaderValue::from_bytes(&bytes).is_ok());
                *value = String::from_utf8(bytes).unwrap();
            }
            Place::Body(at, bit) => {
                let at = at % body.len();
                body[at] ^= 1 << bit;
            }
        }
        let keys = Vectors::read().keys("two keys");
        let judged = verify(&good.headers(), &body, &keys, &Accounts::any(), at(good.now));
        prop_assert_eq!(judged.is_ok(), is_same);
    }
}
