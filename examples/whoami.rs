//! Which credential does this environment resolve to, and from where? `cargo run --example whoami`.
//!
//! Prints one line of JSON, never the secret:
//! `{"scheme":"Key","source":"env:FAL_KEY","key_id":"…","value_sha256":"…"}`, where `value_sha256` is the SHA-256 of
//! the value without its scheme, in hex, so that you can compare it with the one of another machine. When there is no
//! usable credential it prints `{"error":"…"}` and exits with 1.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, clippy::print_stdout)] // an example is there to be read

use std::{error::Error, process::ExitCode};

use clap::Parser;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tower_fal::{CredentialStore, error::report, source::EnvSource};

mod terminal;

/// Prints which credential this environment resolves to, and from where, as one line of JSON without the secret.
///
/// It reads FAL_KEY, then FAL_KEY_ID and FAL_KEY_SECRET, then the file that FAL_KEY_FILE names. It takes no arguments.
#[derive(Parser)]
struct Arguments {}

#[derive(Serialize)]
struct Found {
    scheme: &'static str,
    source: String,
    key_id: Option<String>,
    value_sha256: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    if let Err(code) = terminal::arguments::<Arguments>() {
        return code;
    }
    match whoami().await {
        Ok(found) => {
            println!("{found}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}", json!({ "error": report(&*error) }));
            ExitCode::FAILURE
        }
    }
}

async fn whoami() -> Result<String, Box<dyn Error>> {
    let store = CredentialStore::builder(EnvSource::all()).build().await?;
    let current = store.load();
    let credential = current.credential();
    let header = credential.header().as_bytes();
    let value = &header[credential.scheme().as_str().len() + 1..];
    let found = Found {
        scheme: credential.scheme().as_str(),
        source: current.source().to_owned(),
        key_id: credential.key_id().map(ToString::to_string),
        value_sha256: hex(&Sha256::digest(value)),
    };
    Ok(serde_json::to_string(&found)?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
