//! A token is wiped: a child process looks for it in its own memory after everything was dropped.
//!
//! The child is this test binary again, told by an environment variable what to do before it looks. The token is made at
//! run time and kept under a mask only, so that whatever is found is somebody's copy.

use std::{
    convert::Infallible,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    process::Command,
    sync::Arc,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::service_fn;
use tower_fal::realtime::{Token, TokenMinter};
use zeroize::Zeroizing;

const MODE: &str = "TOWER_FAL_TOKEN_WIPE_TEST";

#[test]
fn nothing_is_left_of_a_token_when_everything_is_dropped() {
    assert_eq!(copies_found_by_child("dropped"), 0);
}

#[test]
fn control_a_token_that_is_still_alive_is_found() {
    assert!(copies_found_by_child("alive") >= 1);
}

#[test]
fn control_a_copy_that_leaks_on_purpose_is_found() {
    assert!(copies_found_by_child("leaked") >= 1);
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
    let Some(mode) = std::env::var_os(MODE) else { return };
    let secret = Arc::new(Secret::generate());
    let token = mint(&secret);
    let keep_alive: Option<Token> = match mode.to_str().unwrap() {
        "dropped" => {
            drop(token);
            None
        }
        "alive" => Some(token),
        "leaked" => {
            std::mem::forget(token.expose_secret().to_owned());
            drop(token);
            None
        }
        other => panic!("no such mode: {other}"),
    };
    println!("\ncopies={}", secret.copies_in_memory());
    drop(keep_alive);
}

/// Mints a token in each shape of an answer, uses it, and returns the last one. The runtime is gone then.
fn mint(secret: &Arc<Secret>) -> Token {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut last = None;
    // With so much around it that nothing comes to lie in its place by chance.
    let blanks = " ".repeat(2000);
    for (start, end) in [("{\"detail\":\"", "\"}"), ("{\"token\":\"", "\"}"), ("\"", "\""), ("", "\n")] {
        let (start, end) = (format!("{blanks}{start}"), format!("{end}{blanks}"));
        let secret = Arc::clone(secret);
        // A body that wipes itself stands for the client's own copies, which are out of reach.
        let fal = service_fn(move |_: Request<Full<Bytes>>| {
            let body = Full::new(Bytes::from_owner(secret.text(&start, &end)));
            std::future::ready(Ok::<_, Infallible>(Response::new(body)))
        });
        let minter = TokenMinter::builder(fal).allow_app("acme/*").build().unwrap();
        last = Some(runtime.block_on(async {
            let token = minter.token("acme/cats/realtime").await.unwrap();
            let url = token.clone().socket_url("acme/cats/realtime").unwrap();
            assert!(url.expose_secret().ends_with(token.expose_secret()));
            assert!(!format!("{token:?} {url:?} {minter:?}").is_empty());
            token
        }));
    }
    last.unwrap()
}

/// A secret that is never in memory in clear, but in the buffers that are handed out.
struct Secret {
    masked: Vec<u8>,
    mask: Vec<u8>,
}

impl Secret {
    const LENGTH: usize = 128;

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

    /// The secret between two texts, in a buffer that is wiped and never moves.
    fn text(&self, start: &str, end: &str) -> Zeroizing<Vec<u8>> {
        let mut text = Zeroizing::new(Vec::with_capacity(start.len() + Self::LENGTH + end.len()));
        text.extend_from_slice(start.as_bytes());
        text.extend((0..Self::LENGTH).map(|index| self.byte(index)));
        text.extend_from_slice(end.as_bytes());
        text
    }

    /// How often one of the secret's halves stands in the writable memory of this process. Halves, as an allocator
    /// writes over the start of what is freed.
    fn copies_in_memory(&self) -> usize {
        const CHUNK: usize = 64 * 1024;
        const HALF: usize = Secret::LENGTH / 2;
        let stands_in =
            |window: &[u8], start: usize| (start..).zip(window).all(|(index, &byte)| self.byte(index) == byte);
        let memory = File::open("/proc/self/mem").unwrap();
        let mut buffer = vec![0; CHUNK];
        let (mut copies, mut searched) = (0, 0);
        for (start, end) in writable_mappings() {
            let mut at = start;
            while at + HALF as u64 <= end {
                let length = CHUNK.min(usize::try_from(end - at).unwrap());
                // What cannot be read holds nothing, such as a page that its owner has protected.
                if memory.read_exact_at(&mut buffer[..length], at).is_ok() {
                    searched += length;
                    let windows = buffer[..length].windows(HALF);
                    copies += windows.filter(|window| stands_in(window, 0) || stands_in(window, HALF)).count();
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
    let mapping = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        rest.starts_with("rw").then(|| (address(start), address(end)))
    };
    maps.lines().filter_map(mapping).collect()
}
