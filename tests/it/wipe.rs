//! What the crate owns is wiped: a child process looks for a secret in its own memory after everything was dropped.
//!
//! The child is this test binary again, told by an environment variable what to do before it looks. Its secret is
//! made at run time and kept under a mask only, so that whatever is found is somebody's copy.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::{self, File},
    future::ready,
    io::Read as _,
    os::unix::{ffi::OsStringExt as _, fs::FileExt as _},
    process::Command,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{Request, Response, header::AUTHORIZATION};
use tower::{Layer as _, Service as _, ServiceExt as _, service_fn};
use tower_fal::{
    Credential, CredentialStore, FalAuthLayer, Scheme,
    source::{ChainSource, DotenvSource, EnvSource, FileSource},
};
use zeroize::Zeroizing;

const MODE: &str = "TOWER_FAL_WIPE_TEST";

/// Stands before the secret in every text, as an allocator writes into the first bytes of what is freed.
const ID: &str = "wipe-test-key-id-wipe-test-key-id-wipe-test-key-id-wipe-test-key-id";

// The tests: each one is the parent of a child.

#[test]
fn nothing_is_left_of_a_credential_when_everything_is_dropped() {
    assert_eq!(copies_found_by_child("everything"), 0);
}

/// Its store lives on.
#[test]
fn nothing_is_left_of_a_rotated_credential() {
    assert_eq!(copies_found_by_child("rotated"), 0);
}

#[test]
fn nothing_is_left_of_values_that_were_refused() {
    assert_eq!(copies_found_by_child("refused"), 0);
}

#[test]
fn control_a_copy_that_leaks_on_purpose_is_found() {
    assert!(copies_found_by_child("leaked") >= 1);
}

#[test]
fn control_a_copy_that_is_freed_without_being_wiped_is_found() {
    assert!(copies_found_by_child("freed") >= 1);
}

#[test]
fn control_a_header_that_is_still_alive_keeps_the_secret() {
    assert!(copies_found_by_child("header") >= 1);
}

fn copies_found_by_child(mode: &str) -> usize {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "wipe::child", "--nocapture", "--test-threads=1"])
        .env(MODE, mode)
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{mode}: {stdout}{stderr}");
    let (_, count) = stdout.split_once("copies=").expect("the child did not look");
    count.split_whitespace().next().unwrap().parse().unwrap()
}

/// No test of its own: without the variable it does nothing.
#[test]
fn child() {
    let Some(mode) = std::env::var_os(MODE) else {
        return;
    };
    let secret = Arc::new(Secret::generate());
    let keep_alive = match mode.to_str().unwrap() {
        "everything" => everything(&secret),
        "rotated" => rotated(&secret),
        "refused" => refused(&secret),
        "leaked" => leaked(&secret),
        "freed" => freed(&secret),
        "header" => Box::new(Credential::key(&*secret.key()).unwrap().header().clone()),
        other => panic!("no such mode: {other}"),
    };
    println!("\ncopies={}", secret.copies_in_memory());
    drop(keep_alive);
}

// What the children do.

type KeepAlive = Box<dyn Send>;

/// Every way in, and every place to which a credential goes. Nothing is left, and neither is the runtime.
fn everything(secret: &Arc<Secret>) -> KeepAlive {
    let directory = tempfile::tempdir().unwrap();
    let (key_file, token_file) = (directory.path().join("key"), directory.path().join("token"));
    fs::write(&key_file, &*secret.key()).unwrap();
    fs::write(&token_file, &*secret.token()).unwrap();
    let (id_file, secret_file) = (directory.path().join("id"), directory.path().join("secret"));
    fs::write(&id_file, ID).unwrap();
    fs::write(&secret_file, &*secret.value()).unwrap();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        send(CredentialStore::fixed(Credential::key(&*secret.key()).unwrap())).await;
        send(CredentialStore::fixed(Credential::key_pair(ID, &*secret.value()).unwrap())).await;
        let token = Credential::bearer(&*secret.token()).unwrap();
        assert!(token.expires_at().is_some());
        send(CredentialStore::fixed(token)).await;

        let file = FileSource::new(&key_file);
        send(CredentialStore::builder(file).build().await.unwrap()).await;
        let file = FileSource::new(&token_file).bearer();
        send(CredentialStore::builder(file).build().await.unwrap()).await;

        let pair = || FileSource::pair(&id_file, &secret_file);
        send(CredentialStore::builder(pair()).build().await.unwrap()).await;
        let nobody = EnvSource::all().environment(|_| None);
        let chain = ChainSource::new().push(nobody).push(pair()).push(FileSource::new(&key_file));
        send(CredentialStore::builder(chain).build().await.unwrap()).await;

        let env = EnvSource::key().environment(environment(Arc::clone(secret)));
        send(CredentialStore::builder(env).build().await.unwrap()).await;
        let env = EnvSource::pair().environment(environment(Arc::clone(secret)));
        send(CredentialStore::builder(env).build().await.unwrap()).await;
    });
    drop(runtime);
    Box::new(())
}

/// The store, its driver, the runtime and a service that has sent the key live on, with another key.
fn rotated(secret: &Arc<Secret>) -> KeepAlive {
    let directory = tempfile::tempdir().unwrap();
    let key_file = directory.path().join("key");
    fs::write(&key_file, &*secret.key()).unwrap();
    let (id_file, secret_file) = (directory.path().join("id"), directory.path().join("secret"));
    fs::write(&id_file, ID).unwrap();
    fs::write(&secret_file, &*secret.value()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (store, service, others) = runtime.block_on(async {
        let pair = || FileSource::pair(&id_file, &secret_file);
        let others = [
            CredentialStore::builder(pair()).build().await.unwrap(),
            CredentialStore::builder(ChainSource::new().push(pair())).build().await.unwrap(),
        ];
        for store in &others {
            send(store.clone()).await;
        }
        fs::write(&secret_file, "next-secret").unwrap();
        for store in &others {
            store.reload().await.unwrap();
            assert_eq!(store.load().credential().header(), &format!("Key {ID}:next-secret"));
        }

        let store = CredentialStore::builder(FileSource::new(&key_file)).build().await.unwrap();
        send(store.clone()).await;
        let answer = |_: Request<()>| ready(Ok::<_, Infallible>(Response::new(())));
        let mut service = FalAuthLayer::new(store.clone()).layer(service_fn(answer));
        for _ in 0..4 {
            let request = Request::get("https://fal.run/a").body(()).unwrap();
            service.ready().await.unwrap().call(request).await.unwrap();
        }
        store.reload().await.unwrap(); // the same one again
        fs::write(&key_file, "next-id:next-secret").unwrap();
        store.reload().await.unwrap();
        assert_eq!(store.load().credential().header(), "Key next-id:next-secret");
        (store, service, others)
    });
    Box::new((runtime, store, service, others, directory))
}

/// Values that are wrong, from each of the places that copy one before they look at it.
fn refused(secret: &Arc<Secret>) -> KeepAlive {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    let mut malformed = secret.key();
    malformed.extend_from_slice(b" and more"); // it does not grow: see `Secret::text`
    fs::write(&path, &*malformed).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let errors = runtime.block_on(async {
        let file = CredentialStore::builder(FileSource::new(&path)).build().await.unwrap_err();
        // A pair with more than a secret in place of one, also in a chain.
        let id_file = directory.path().join("id");
        fs::write(&id_file, ID).unwrap();
        let pair = || FileSource::pair(&id_file, &path);
        let chain = CredentialStore::builder(ChainSource::new().push(pair())).build().await.unwrap_err();
        let pair = CredentialStore::builder(pair()).build().await.unwrap_err();
        let of_the_environment = Arc::clone(secret);
        let env = EnvSource::key().environment(move |_| {
            let mut malformed = of_the_environment.key();
            malformed.extend_from_slice(b" and more");
            Some(OsString::from_vec(std::mem::take(&mut malformed)))
        });
        let env = CredentialStore::builder(env).build().await.unwrap_err();
        // Of a `.env` file only the content is ours to wipe: `dotenvy` copies each line, so it must not come to that.
        let dotenv_file = directory.path().join(".env");
        fs::write(&dotenv_file, &*secret.text("FAL_KEY=", &" ".repeat(64 * 1024))).unwrap();
        let dotenv = CredentialStore::builder(DotenvSource::new(&dotenv_file)).build().await.unwrap_err();
        assert!(dotenv.to_string().contains("larger than 65536 bytes"), "{dotenv}");
        // In base64, which is decoded to tell.
        let encoded = URL_SAFE_NO_PAD.encode(&*secret.key());
        let encoded = Credential::key(encoded).unwrap_err();
        assert!(encoded.to_string().contains("decode it once"), "{encoded}");
        (file, chain, pair, dotenv, env, encoded, Credential::key(&*malformed).unwrap_err())
    });
    Box::new(errors)
}

fn leaked(secret: &Secret) -> KeepAlive {
    let copy: &'static mut [u8] = Vec::leak(secret.key().to_vec());
    Box::new(copy)
}

fn freed(secret: &Secret) -> KeepAlive {
    drop(std::hint::black_box(secret.key().to_vec()));
    Box::new(())
}

/// Loads, clones and compares the credential of a store, sends a request with it, and drops all of that.
async fn send(store: CredentialStore) {
    let snapshot = store.load();
    let (credential, header) = (snapshot.credential().clone(), snapshot.credential().header().clone());
    assert_eq!(credential.clone().with_source("noted").header(), &header);
    assert_eq!(store.replace(credential.clone()), store.generation());
    let refuse = service_fn(|request: Request<()>| {
        assert!(request.headers()[AUTHORIZATION].is_sensitive());
        ready(Ok::<_, Infallible>(Response::builder().status(401).body(request).unwrap()))
    });
    let request = Request::get("https://fal.run/a").body(()).unwrap();
    let response = FalAuthLayer::new(store).layer(refuse).oneshot(request).await.unwrap();
    assert_eq!(response.body().headers()[AUTHORIZATION], header);
    assert!(matches!(credential.scheme(), Scheme::Key | Scheme::Bearer));
}

fn environment(secret: Arc<Secret>) -> impl Fn(&str) -> Option<OsString> {
    move |variable| {
        let mut value = match variable {
            "FAL_KEY" => secret.key(),
            "FAL_KEY_ID" => return Some(ID.into()),
            "FAL_KEY_SECRET" => secret.value(),
            _ => return None,
        };
        Some(OsString::from_vec(std::mem::take(&mut *value)))
    }
}

// The secret and the search for it.

/// A secret that is never in memory in clear, but in the buffers that are handed out.
struct Secret {
    masked: Vec<u8>,
    mask: Vec<u8>,
}

impl Secret {
    const LENGTH: usize = 64;

    fn generate() -> Self {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut random = [0; 2 * Self::LENGTH];
        File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        let (letters, mask) = random.split_at(Self::LENGTH);
        let mask: Vec<u8> = mask.iter().map(|byte| byte | 0x80).collect(); // never the letter itself
        let masked = letters.iter().zip(&mask).map(|(byte, mask)| ALPHABET[usize::from(byte % 64)] ^ mask).collect();
        Self { masked, mask }
    }

    fn byte(&self, index: usize) -> u8 {
        self.masked[index] ^ self.mask[index]
    }

    /// The secret between two texts, in a buffer that is wiped and that has room enough never to move.
    fn text(&self, start: &str, end: &str) -> Zeroizing<Vec<u8>> {
        let mut text = Zeroizing::new(Vec::with_capacity(start.len() + Self::LENGTH + end.len() + 16));
        text.extend_from_slice(start.as_bytes());
        text.extend((0..Self::LENGTH).map(|index| self.byte(index)));
        text.extend_from_slice(end.as_bytes());
        text
    }

    fn value(&self) -> Zeroizing<Vec<u8>> {
        self.text("", "")
    }

    fn key(&self) -> Zeroizing<Vec<u8>> {
        self.text(&format!("{ID}:"), "")
    }

    /// A JWT with the secret among its claims and, in place of the signature, once more.
    fn token(&self) -> Zeroizing<Vec<u8>> {
        let claims = self.text(&format!(r#"{{"sub":"{ID}","exp":4000000000,"secret":""#), r#""}"#);
        let mut token = Zeroizing::new(vec![0; 1024]);
        token[..4].copy_from_slice(b"e30.");
        let mut length = 4 + URL_SAFE_NO_PAD.encode_slice(&*claims, &mut token[4..]).unwrap();
        let signature = self.text(".", "");
        token[length..length + signature.len()].copy_from_slice(&signature);
        length += signature.len();
        token.truncate(length);
        token
    }

    /// How often one of the secret's halves stands in the writable memory of this process. Halves, as an allocator
    /// writes over the start of what is freed, and a buffer that grows leaves the start of its content behind.
    fn copies_in_memory(&self) -> usize {
        const CHUNK: usize = 64 * 1024;
        const HALF: usize = Secret::LENGTH / 2;
        let stands_in =
            |window: &[u8], start: usize| (start..).zip(window).all(|(index, &byte)| self.byte(index) == byte);
        let memory = File::open("/proc/self/mem").unwrap();
        let mut buffer = vec![0; CHUNK];
        let mut copies = 0;
        let mut searched = 0;
        for (start, end) in writable_mappings() {
            let mut at = start;
            while at + HALF as u64 <= end {
                let length = CHUNK.min(usize::try_from(end - at).unwrap());
                // What cannot be read holds nothing, such as a page that its owner has protected.
                if memory.read_exact_at(&mut buffer[..length], at).is_ok() {
                    searched += length;
                    copies += buffer[..length]
                        .windows(HALF)
                        .filter(|window| stands_in(window, 0) || stands_in(window, HALF))
                        .count();
                }
                buffer.fill(0); // it is a part of what is searched
                if length < CHUNK {
                    break;
                }
                at += (CHUNK - HALF + 1) as u64; // a copy may lie across two chunks
            }
        }
        assert!(searched > CHUNK, "only {searched} bytes could be read");
        copies
    }
}

fn writable_mappings() -> Vec<(u64, u64)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            rest.starts_with("rw").then(|| (address(start), address(end)))
        })
        .collect()
}
