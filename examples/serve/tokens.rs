//! Callers' tokens in a file, which is read again when it changes.
#![allow(dead_code)] // not every server has callers with tokens

use std::{fs, io::Read as _, path::Path, time::Duration};

use sha2::{Digest as _, Sha256};
use tokio::time::sleep;
use tower_fal::{
    caller::{Caller, Tokens},
    error::BoxError,
};
use tracing::{info, warn};

/// How often the file is read.
const EVERY: Duration = Duration::from_secs(5);

/// The longest file that is read, in bytes.
const MAX_LEN: u64 = 16 * 1024 * 1024;

/// The tokens in this file, which a task keeps up to date. Each line is `TOKEN` or `NAME TOKEN`; empty lines and those
/// that begin with `#` are passed over.
///
/// An unreadable file, or one without a token, is an error at first. Later it changes nothing, and the log says so.
pub(crate) async fn follow(path: &Path) -> Result<Tokens, BoxError> {
    let mut lines = read(path).await?;
    let tokens = Tokens::new(callers(&lines));
    let (path, followed) = (path.to_owned(), tokens.clone());
    tokio::spawn(async move {
        let mut is_well = true;
        loop {
            sleep(EVERY).await;
            match read(&path).await {
                Ok(new) if new == lines => is_well = true,
                Ok(new) => {
                    is_well = true;
                    lines = new;
                    followed.replace(callers(&lines));
                    info!(count = followed.len(), "the callers' tokens were read again");
                }
                Err(error) if is_well => {
                    is_well = false;
                    warn!(%error, "going on with the callers' tokens of before");
                }
                Err(_) => {}
            }
        }
    });
    Ok(tokens)
}

/// The lines with a token, each as `[name, token]` or `[token]`.
async fn read(path: &Path) -> Result<Vec<Vec<String>>, BoxError> {
    let owned = path.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        fs::File::open(owned)?.take(MAX_LEN).read_to_string(&mut text).map(|_| text)
    });
    // The error of a text that is no UTF-8 does not show it.
    let text = read.await?.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let lines: Vec<Vec<_>> = lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect();
    if lines.is_empty() || lines.iter().any(|words| words.len() > 2) {
        return Err(format!("{}: each line must be TOKEN or NAME TOKEN, and there must be one", path.display()).into());
    }
    Ok(lines)
}

fn callers(lines: &[Vec<String>]) -> impl Iterator<Item = (&str, Caller)> {
    lines.iter().filter_map(|words| match words.as_slice() {
        [name, token] => Some((token.as_str(), Caller::tenant(name.as_str()))),
        [token] => Some((token.as_str(), Caller::tenant(nameless(token)))),
        _ => None,
    })
}

/// A name that says nothing about the token and stays the same when other lines come and go.
fn nameless(token: &str) -> String {
    let digest = Sha256::digest(token.as_bytes());
    let digits: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("caller-{digits}")
}
